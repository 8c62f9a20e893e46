//! Made-up tensors for modules that come without any: the same numbers for the same name and shape, everywhere.

use std::collections::BTreeMap;

use awqc_ir::{Module, RawTensor, Stored, TensorError, TensorInfo, TensorSource, WeightExpr};
use half::f16;

/// Largest tensor that is made up, in bytes.
const LIMIT: usize = 1 << 31;

/// Tensors of the names and shapes that a module asks for.
pub(crate) struct Synthetic {
    tensors: BTreeMap<String, TensorInfo>,
}

impl Synthetic {
    pub(crate) fn new(module: &Module) -> Self {
        let mut tensors = BTreeMap::new();
        let bodies = module.fused.iter().map(|d| &d.body);
        for region in module.regions.iter().chain(bodies) {
            for id in region.weight_ids() {
                let weight = region.weight(id);
                let Some(shape) = weight.ty.const_shape() else { continue };
                let mut add = |name: &str, suffix: &str, stored: Stored, shape: Vec<usize>| {
                    tensors.insert(format!("{}{suffix}", region.tensor_name(name)), TensorInfo { stored, shape });
                };
                match (&weight.expr, weight.ty.elem.quant(), weight.ty.matrix()) {
                    (WeightExpr::Source(name), None, _) => add(name, "", Stored::F32, shape),
                    (WeightExpr::Packed { tensor, layout }, Some(quant), Some((rows, cols))) => {
                        for (suffix, stored, shape) in layout.parts(quant, rows, cols) {
                            add(tensor, suffix, stored, shape);
                        }
                    }
                    (
                        WeightExpr::Source(_)
                        | WeightExpr::Packed { .. }
                        | WeightExpr::Param(_)
                        | WeightExpr::Mul { .. }
                        | WeightExpr::Div { .. }
                        | WeightExpr::Offset { .. }
                        | WeightExpr::Cat { .. }
                        | WeightExpr::Stack(_)
                        | WeightExpr::Rows { .. }
                        | WeightExpr::Transpose(_)
                        | WeightExpr::Clip { .. }
                        | WeightExpr::Codes { .. }
                        | WeightExpr::Quant(_)
                        | WeightExpr::Pack(_),
                        _,
                        _,
                    ) => {}
                }
            }
        }
        Self { tensors }
    }
}

/// The SplitMix64 sequence (Steele, Lea and Flood, OOPSLA 2014), seeded by the FNV-1a hash of a name.
struct Random(u64);

impl Random {
    fn of(name: &str) -> Self {
        Self(name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)))
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

impl TensorSource for Synthetic {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).cloned()
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        let info = self.info(name).ok_or_else(|| TensorError(format!("the module names no tensor `{name}`")))?;
        let count = info.shape.iter().try_fold(info.stored.size(), |n, d| n.checked_mul(*d)).filter(|n| *n <= LIMIT);
        let count = count.ok_or_else(|| {
            TensorError(format!("tensor `{name}` of shape {:?} is too large to be made up", info.shape))
        })? / info.stored.size();
        let mut random = Random::of(name);
        let cols = info.shape.last().copied().unwrap_or(1).max(1);
        // Matrices keep the size of what they multiply; vectors are near 1, as gains are.
        let spread = (3.0 / cols as f32).sqrt();
        let mut bytes = Vec::with_capacity(count * info.stored.size());
        for _ in 0..count {
            match info.stored {
                Stored::U8 | Stored::I8 => bytes.push((random.bits() >> 56) as u8),
                Stored::I32 => bytes.extend_from_slice(&random.bits().to_le_bytes()[..4]),
                Stored::F16 => bytes.extend_from_slice(&f16::from_f32(0.01 + 0.002 * random.unit()).to_le_bytes()),
                Stored::I16 => bytes.extend_from_slice(&random.bits().to_le_bytes()[..2]),
                Stored::F32 | Stored::Bf16 | Stored::F64 | Stored::I64 => {
                    let v = if info.shape.len() > 1 { spread * random.unit() } else { 1.0 + 0.1 * random.unit() };
                    bytes.extend_from_slice(&v.to_le_bytes());
                }
            }
        }
        Ok(RawTensor { info, bytes })
    }
}

//! Random weights for a configuration without a checkpoint: the shape of a model, to measure what does not depend on
//! its numbers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use awqc_ir::{Elem, Module, Op, RawTensor, Stored, TensorError, TensorInfo, TensorSource, WeightExpr};
use half::f16;
use half::slice::HalfFloatSliceExt;
use serde_json::{Map, Value as Json};

use crate::error::ImportError;
use crate::family::{Instance, by_config, instantiate, template};
use crate::folder::open_folder;
use crate::open::{CONFIG, Imported, Kind, extra_files, read_config};

/// Standard deviation of matrices and biases: what the configurations of most families begin training with.
const DEVIATION: f32 = 0.02;
/// Largest tensor that is made, in bytes: `isize::MAX` and memory are far away.
const LIMIT: usize = 1 << 36;

/// Opens the configuration of a model, `config.json` or the folder that holds it, with random weights: the same for the
/// same seed, name and shape, on every machine. Matrices and biases are about normally distributed with a deviation of
/// 0.02; norms multiply by 1.
///
/// # Errors
/// When there is no configuration, its family is not known, or its weights are packed.
pub fn open_random(path: &Path, seed: u64) -> Result<Imported, ImportError> {
    let file = if path.is_dir() { path.join(CONFIG) } else { path.to_owned() };
    let config = read_config(&file)?;
    if config.get("quantization_config").is_some_and(|v| !v.is_null()) {
        let problem = "is there, but random weights are floats: remove it from the configuration";
        return Err(ImportError::config(&file, "quantization_config", problem));
    }
    let family = by_config(&file, &config, Vec::new)?;
    let stored = stored(&file, &config)?;
    let module = template(&file, &family, &config, elem(stored))?;
    let checkpoint = Arc::new(RandomWeights::of(&module, stored, seed));
    let Instance { module, source, mut notes } =
        instantiate(&file, &family, &config, checkpoint, None, Some(elem(stored)))?;
    notes.push(format!("the weights are random (seed {seed}): what the model says means nothing"));
    if file.parent().is_some_and(|folder| open_folder(folder).is_ok()) {
        notes.push("there are weights beside the configuration: they are not read".into());
    }
    let files = file.parent().map_or_else(Vec::new, extra_files);
    Ok(Imported { module, source, config, files, notes, kind: Kind::HuggingFace })
}

/// How the configuration says that weights are stored; f16 if it does not.
fn stored(path: &Path, config: &Map<String, Json>) -> Result<Stored, ImportError> {
    let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    match config.get(key).and_then(Json::as_str) {
        None | Some("float16") => Ok(Stored::F16),
        Some("bfloat16") => Ok(Stored::Bf16),
        Some("float32") => Ok(Stored::F32),
        Some(other) => {
            Err(ImportError::config(path, key, format!("is `{other}`; float16, bfloat16 or float32 is needed")))
        }
    }
}

fn elem(stored: Stored) -> Elem {
    match stored {
        Stored::Bf16 => Elem::Bf16,
        Stored::F32 | Stored::F64 => Elem::F32,
        Stored::F16 | Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => Elem::F16,
    }
}

/// See [`open_random`]. Nothing is kept: numbers are computed whenever somebody reads them.
struct RandomWeights {
    seed: u64,
    /// Every tensor, and the one number that it holds if it is a norm's gain.
    tensors: BTreeMap<String, (TensorInfo, Option<f32>)>,
}

impl RandomWeights {
    fn of(module: &Module, stored: Stored, seed: u64) -> Self {
        let mut tensors = BTreeMap::new();
        for region in &module.regions {
            for id in region.weight_closure(&region.used_weights()) {
                let weight = region.weight(id);
                let (WeightExpr::Source(name), Some(shape)) = (&weight.expr, weight.ty.const_shape()) else { continue };
                tensors.insert(region.tensor_name(name), (TensorInfo { stored, shape }, None));
            }
            for (_, node) in region.nodes() {
                let gain = if let Op::RmsNorm(norm) = &node.op {
                    1.0 - norm.offset as f32
                } else if matches!(node.op, Op::LayerNorm(_)) {
                    1.0
                } else {
                    continue;
                };
                let Some(weight) = node.operands.get(1).and_then(|o| o.weight()) else { continue };
                for name in region.sources(weight) {
                    if let Some((_, fixed)) = tensors.get_mut(&region.tensor_name(&name)) {
                        *fixed = Some(gain);
                    }
                }
            }
        }
        Self { seed, tensors }
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): number `i` of a sequence without those before it.
fn mix(start: u64, i: u64) -> u64 {
    let z = start.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The sum of four uniform numbers of 16 bits, centred and scaled: bell-shaped, within 3.5 deviations.
fn bell(bits: u64) -> f32 {
    const MEAN: i32 = 2 * 0xffff;
    // Each of the four has the variance (2³² − 1) / 12.
    const SCALE: f32 = DEVIATION / 37_837.227;
    let part = |shift: u32| (bits >> shift & 0xffff) as i32;
    (part(0) + part(16) + part(32) + part(48) - MEAN) as f32 * SCALE
}

impl TensorSource for RandomWeights {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info.clone())
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        let values = self.read_f32(name)?;
        let info = self.info(name).ok_or_else(|| TensorError(format!("there is no tensor `{name}`")))?;
        let bytes = match info.stored {
            Stored::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(&values);
                halves.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            // The low halves are 0.
            Stored::Bf16 => values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
            Stored::F32 | Stored::F64 | Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => {
                values.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
        };
        Ok(RawTensor { info, bytes })
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, TensorError> {
        let (info, fixed) =
            self.tensors.get(name).ok_or_else(|| TensorError(format!("there is no tensor `{name}`")))?;
        let count = info.shape.iter().try_fold(4usize, |n, d| n.checked_mul(*d)).filter(|n| *n <= LIMIT);
        let count = count
            .ok_or_else(|| TensorError(format!("tensor `{name}` of shape {:?} is too large to be made", info.shape)))?
            / 4;
        if let Some(fixed) = fixed {
            return Ok(vec![*fixed; count]);
        }
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let start = mix(hash, self.seed);
        let mut values: Vec<f32> = (0..count as u64).map(|i| bell(mix(start, i))).collect();
        match info.stored {
            Stored::F16 => {
                let mut halves = vec![f16::ZERO; count];
                halves.convert_from_f32_slice(&values);
                halves.convert_to_f32_slice(&mut values);
            }
            Stored::Bf16 => values.iter_mut().for_each(|v| *v = f32::from_bits(v.to_bits() & 0xffff_0000)),
            Stored::F32 | Stored::F64 | Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => {}
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_bell_shaped_with_the_deviation() {
        let n = 1 << 20;
        let numbers: Vec<f64> = (0..n).map(|i| f64::from(bell(mix(7, i)))).collect();
        let mean = numbers.iter().sum::<f64>() / n as f64;
        let deviation = (numbers.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
        assert!(mean.abs() < 1e-4 && (deviation - 0.02).abs() < 1e-4, "{mean} ± {deviation}");
        let beyond = numbers.iter().filter(|v| v.abs() > 0.04).count() as f64 / n as f64;
        // Of a normal distribution, 4.6 % are farther than two deviations.
        assert!((0.035..0.055).contains(&beyond), "{beyond}");
    }
}

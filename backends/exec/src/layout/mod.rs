//! Physical layouts: between codes in memory, one a byte, and the tensors that a file holds.

mod awq_gemm;
pub mod mma16;
pub mod r16;
mod rows;
mod simd16;

use awqc_ir::{Layout, Quant, RawTensor, Stored, TensorInfo, TensorSource};
use awqc_passes::rtn::Codes;
use half::f16;

/// A weight that does not fit a layout, or stored parts that contradict each other. The message names the tensor where
/// one is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LayoutError(pub String);

/// One stored tensor of a packed weight.
#[derive(Clone, Debug)]
pub struct Part {
    /// Appended to the stem: `.codes`, `.qweight`, …
    pub suffix: &'static str,
    /// The numbers.
    pub tensor: RawTensor,
}

/// The stored parts of `codes` in `layout`.
///
/// # Errors
/// When the layout cannot hold this type or shape, or a scale does not fit f16.
pub fn pack(codes: &Codes, layout: Layout) -> Result<Vec<Part>, LayoutError> {
    match layout {
        Layout::Rows => rows::pack(codes),
        Layout::AwqGemm => awq_gemm::pack(codes),
        Layout::R16 => r16::pack(codes),
        Layout::Simd16 => simd16::pack(codes),
        Layout::Mma16 => mma16::pack(codes),
    }
}

/// The codes whose parts `part(suffix)` gives.
///
/// # Errors
/// When a part is missing or has another type or shape than the layout wants.
pub fn unpack(
    layout: Layout,
    quant: Quant,
    rows: usize,
    cols: usize,
    part: impl FnMut(&'static str) -> Result<RawTensor, LayoutError>,
) -> Result<Codes, LayoutError> {
    match layout {
        Layout::Rows => rows::unpack(quant, rows, cols, part),
        Layout::AwqGemm => awq_gemm::unpack(quant, rows, cols, part),
        Layout::R16 => r16::unpack(quant, rows, cols, part),
        Layout::Simd16 => simd16::unpack(quant, rows, cols, part),
        Layout::Mma16 => mma16::unpack(quant, rows, cols, part),
    }
}

/// Whether `layout` can hold a `[rows, cols]` weight of this type; otherwise why not.
///
/// # Errors
/// A sentence that names the constraint.
pub fn fits(layout: Layout, quant: Quant, rows: usize, cols: usize) -> Result<(), LayoutError> {
    match layout {
        Layout::Rows => Ok(()),
        Layout::AwqGemm => awq_gemm::fits(quant, rows, cols),
        Layout::R16 => r16::shape(quant, rows, cols).map(|_| ()),
        Layout::Simd16 => simd16::fits(quant),
        Layout::Mma16 => mma16::shape(quant, rows, cols).map(|_| ()),
    }
}

/// Reads and unpacks the weight of this stem.
///
/// # Errors
/// As [`unpack`], with the tensor's full name, and when the source cannot read it.
pub fn read(
    source: &dyn TensorSource,
    stem: &str,
    layout: Layout,
    quant: Quant,
    rows: usize,
    cols: usize,
) -> Result<Codes, LayoutError> {
    let part = |suffix: &'static str| source.read(&format!("{stem}{suffix}")).map_err(|e| LayoutError(e.0));
    unpack(layout, quant, rows, cols, part)
        .map_err(|e| LayoutError(format!("packed weight `{stem}` ({layout}): {}", e.0)))
}

fn expect(suffix: &str, tensor: &RawTensor, stored: Stored, shape: &[usize]) -> Result<(), LayoutError> {
    let info = &tensor.info;
    if info.stored != stored || info.shape != shape {
        return Err(LayoutError(format!(
            "part `{suffix}` is {} {:?}, expected {stored} {shape:?}",
            info.stored, info.shape
        )));
    }
    let bytes = shape.iter().try_fold(stored.size(), |a, b| a.checked_mul(*b));
    if bytes != Some(tensor.bytes.len()) {
        return Err(LayoutError(format!(
            "part `{suffix}` has {} bytes, its shape is {shape:?} of {stored}",
            tensor.bytes.len()
        )));
    }
    Ok(())
}

fn tensor(stored: Stored, shape: [usize; 2], bytes: Vec<u8>) -> RawTensor {
    RawTensor { info: TensorInfo { stored, shape: shape.to_vec() }, bytes }
}

/// f16 bytes of scales, which must be exact in f16.
fn scale_bytes(scales: impl Iterator<Item = f32>) -> Result<Vec<u8>, LayoutError> {
    let mut out = Vec::new();
    for s in scales {
        let h = f16::from_f32(s);
        if h.to_f32() != s {
            return Err(LayoutError(format!("the scale {s} is not an f16 number")));
        }
        out.extend(h.to_le_bytes());
    }
    Ok(out)
}

fn read_scales(bytes: &[u8]) -> Result<Vec<f32>, LayoutError> {
    let scales: Vec<f32> = bytes.as_chunks::<2>().0.iter().map(|c| f16::from_le_bytes(*c).to_f32()).collect();
    match scales.iter().find(|s| !s.is_finite()) {
        None => Ok(scales),
        Some(s) => Err(LayoutError(format!("a scale is {s}: the checkpoint is damaged"))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use awqc_ir::Group;
    use proptest::prelude::*;

    use super::*;

    fn codes(quant: Quant, rows: usize, cols: usize, seed: u64) -> Codes {
        let mut state = seed | 1;
        let mut next = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let range = 1u64 << quant.bits;
        let groups = quant.group.count(cols);
        let zero = |n: u64| if quant.symmetric { 1 << (quant.bits - 1) } else { n as u8 };
        Codes {
            quant,
            rows,
            cols,
            codes: (0..rows * cols).map(|_| next(range) as u8).collect(),
            scales: (0..rows * groups).map(|_| f16::from_f32(next(1000) as f32 / 777.0).to_f32()).collect(),
            zeros: (0..rows * groups).map(|_| zero(next(range))).collect(),
        }
    }

    fn round_trip(c: &Codes, layout: Layout) -> Codes {
        let parts: BTreeMap<_, _> = pack(c, layout).unwrap().into_iter().map(|p| (p.suffix, p.tensor)).collect();
        unpack(layout, c.quant, c.rows, c.cols, |s| Ok(parts[s].clone())).unwrap()
    }

    proptest! {
        #[test]
        fn rows_round_trips(bits in prop::sample::select(vec![2u8, 3, 4, 8]), symmetric: bool, group in prop::option::of(1u32..40), rows in 1usize..9, cols in 1usize..90, seed: u64) {
            let group = group.map_or(Group::Row, Group::Size);
            let c = codes(Quant { bits, symmetric, group }, rows, cols, seed);
            prop_assert_eq!(round_trip(&c, Layout::Rows), c);
        }

        #[test]
        fn r16_round_trips(bits in prop::sample::select(vec![2u8, 3, 4, 8]), symmetric: bool, group in prop::option::of(1u32..80), rows in 1usize..40, cols in 1usize..150, seed: u64) {
            let group = group.map_or(Group::Row, Group::Size);
            let c = codes(Quant { bits, symmetric, group }, rows, cols, seed);
            prop_assert_eq!(round_trip(&c, Layout::R16), c);
        }

        #[test]
        fn simd16_round_trips(symmetric: bool, group in prop::option::of(1u32..80), rows in 1usize..9, cols in 1usize..150, seed: u64) {
            let group = group.map_or(Group::Row, Group::Size);
            let c = codes(Quant { bits: 4, symmetric, group }, rows, cols, seed);
            prop_assert_eq!(round_trip(&c, Layout::Simd16), c);
        }

        #[test]
        fn mma16_round_trips(bits in prop::sample::select(vec![2u8, 3, 4, 8]), symmetric: bool, group in prop::option::of(1u32..6), rows in 1usize..40, cols in 1usize..70, seed: u64) {
            let group = group.map_or(Group::Row, |g| Group::Size(16 * g));
            let c = codes(Quant { bits, symmetric, group }, rows, 4 * cols, seed);
            prop_assert_eq!(round_trip(&c, Layout::Mma16), c);
        }

        #[test]
        fn awq_gemm_round_trips(groups in 1usize..5, group in 1usize..40, words in 1usize..5, seed: u64) {
            let quant = Quant { bits: 4, symmetric: false, group: Group::Size(group as u32) };
            let c = codes(quant, words * 8, groups * group, seed);
            prop_assert_eq!(round_trip(&c, Layout::AwqGemm), c);
        }
    }

    #[test]
    fn wrong_parts_are_refused() {
        let quant = Quant { bits: 4, symmetric: false, group: Group::Size(4) };
        let c = codes(quant, 8, 8, 1);
        let parts: BTreeMap<_, _> = pack(&c, Layout::Rows).unwrap().into_iter().map(|p| (p.suffix, p.tensor)).collect();
        let short = unpack(Layout::Rows, quant, 8, 8, |s| {
            let mut t = parts[s].clone();
            t.bytes.pop();
            Ok(t)
        });
        assert!(short.unwrap_err().0.contains("bytes"));
        let shape = unpack(Layout::Rows, quant, 8, 9, |s| Ok(parts[s].clone()));
        assert!(shape.unwrap_err().0.contains(".codes"));
        let mut nan = parts.clone();
        nan.get_mut(".scales").unwrap().bytes[..2].copy_from_slice(&f16::NAN.to_le_bytes());
        assert!(unpack(Layout::Rows, quant, 8, 8, |s| Ok(nan[s].clone())).unwrap_err().0.contains("NaN"));
    }
}

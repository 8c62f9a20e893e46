//! f32 numbers to stored tensors.

use awqc_ir::{Elem, RawTensor, Stored, TensorInfo};
use half::{bf16, f16};

/// `data` stored as `elem`; `Err` with the first element that is finite but does not fit.
///
/// # Errors
/// The index of an element that overflows, or 0 if `elem` is not a float type.
pub fn encode(elem: Elem, shape: Vec<usize>, data: &[f32]) -> Result<RawTensor, usize> {
    let (stored, bytes): (Stored, Vec<u8>) = match elem {
        Elem::F32 => (Stored::F32, data.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Elem::F16 => (Stored::F16, data.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
        Elem::Bf16 => (Stored::Bf16, data.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
        Elem::I32 | Elem::Quant(_) => return Err(0),
    };
    match data.iter().position(|v| v.is_finite() && !elem.round(*v).is_finite()) {
        None => Ok(RawTensor { info: TensorInfo { stored, shape }, bytes }),
        Some(at) => Err(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_is_found() {
        assert_eq!(encode(Elem::F16, vec![2], &[1.0, 70000.0]).unwrap_err(), 1);
        assert!(encode(Elem::Bf16, vec![2], &[1.0, 70000.0]).is_ok());
        let t = encode(Elem::F16, vec![1], &[1.0]).unwrap();
        assert_eq!((t.bytes.as_slice(), t.info.stored), (&[0x00, 0x3c][..], Stored::F16));
    }
}

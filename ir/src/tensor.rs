//! The port through which the rest of the compiler reads checkpoint tensors. Front ends implement it.

use std::fmt;

use half::{bf16, f16};

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// 4-byte float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-byte float.
    F64,
    /// Bytes.
    U8,
    /// 1-byte integer.
    I8,
    /// 2-byte integer.
    I16,
    /// 4-byte integer.
    I32,
    /// 8-byte integer.
    I64,
}

impl Stored {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Stored::U8 | Stored::I8 => 1,
            Stored::F16 | Stored::Bf16 | Stored::I16 => 2,
            Stored::F32 | Stored::I32 => 4,
            Stored::F64 | Stored::I64 => 8,
        }
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stored::F32 => "f32",
            Stored::F16 => "f16",
            Stored::Bf16 => "bf16",
            Stored::F64 => "f64",
            Stored::U8 => "u8",
            Stored::I8 => "i8",
            Stored::I16 => "i16",
            Stored::I32 => "i32",
            Stored::I64 => "i64",
        })
    }
}

/// Whether a tensor of shape `stored` can be read as one of shape `wanted`: they are the same, or the last axes of the
/// stored one, taken together, are the last axis of the other. So a convolution whose stride is its kernel,
/// `[out, C, k, k]`, is a matrix.
pub fn reads_as(stored: &[usize], wanted: &[usize]) -> bool {
    let Some((last, outer)) = wanted.split_last() else { return stored.is_empty() };
    let rest = stored.strip_prefix(outer).filter(|rest| !rest.is_empty());
    rest.is_some_and(|rest| rest.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) == Some(*last))
}

/// What is known of a tensor before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element storage.
    pub stored: Stored,
    /// Outermost axis first.
    pub shape: Vec<usize>,
}

/// A tensor's numbers, little-endian and row-major.
#[derive(Clone, Debug)]
pub struct RawTensor {
    /// Element storage and shape.
    pub info: TensorInfo,
    /// `info.shape.product() * info.stored.size()` bytes.
    pub bytes: Vec<u8>,
}

/// Why a tensor could not be had. The message names file and tensor and says what was expected.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct TensorError(pub String);

/// Named tensors that can be read one at a time, each time afresh: nothing is kept in memory.
pub trait TensorSource: Send + Sync {
    /// Every tensor name, sorted.
    fn names(&self) -> Vec<String>;

    /// Storage and shape of a tensor; `None` if there is no such tensor.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// When there is no such tensor, or its file cannot be read.
    fn read(&self, name: &str) -> Result<RawTensor, TensorError>;

    /// The tensor's bytes where they lie, if the source maps its file into memory.
    fn mapped(&self, _name: &str) -> Option<&[u8]> {
        None
    }

    /// Reads a tensor of float storage as f32, row-major.
    ///
    /// # Errors
    /// As [`TensorSource::read`], and when the storage is not a float type or a number is NaN or infinite.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>, TensorError> {
        let raw = self.read(name)?;
        let values = raw
            .to_f32()
            .ok_or_else(|| TensorError(format!("tensor `{name}` holds {}, floats are needed here", raw.info.stored)))?;
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(at) => Err(TensorError(format!(
                "tensor `{name}` holds {} at element {at} of {}: the checkpoint is damaged, or was saved from a run that diverged",
                values[at],
                values.len()
            ))),
        }
    }
}

impl RawTensor {
    /// The numbers as f32; `None` if the storage is not a float type.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let b = &self.bytes;
        Some(match self.info.stored {
            Stored::F32 => b.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect(),
            Stored::F16 => b.as_chunks::<2>().0.iter().map(|c| f16::from_le_bytes(*c).to_f32()).collect(),
            Stored::Bf16 => b.as_chunks::<2>().0.iter().map(|c| bf16::from_le_bytes(*c).to_f32()).collect(),
            Stored::F64 => b.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c) as f32).collect(),
            Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => return None,
        })
    }

    /// The numbers as i32; `None` if the storage is no integer type or an `i64` does not fit.
    pub fn to_i32(&self) -> Option<Vec<i32>> {
        let b = &self.bytes;
        match self.info.stored {
            Stored::I32 => Some(b.as_chunks::<4>().0.iter().map(|c| i32::from_le_bytes(*c)).collect()),
            Stored::I64 => b.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c).try_into().ok()).collect(),
            Stored::I16 => Some(b.as_chunks::<2>().0.iter().map(|c| i16::from_le_bytes(*c).into()).collect()),
            Stored::I8 => Some(b.iter().map(|c| i32::from(*c as i8)).collect()),
            Stored::U8 => Some(b.iter().map(|c| i32::from(*c)).collect()),
            Stored::F32 | Stored::F16 | Stored::Bf16 | Stored::F64 => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reads_as;

    #[test]
    fn the_last_axes_of_a_tensor_may_be_one() {
        assert!(reads_as(&[4, 3, 2, 2], &[4, 12]));
        assert!(reads_as(&[4, 3], &[4, 3]));
        assert!(reads_as(&[], &[]));
        assert!(!reads_as(&[4, 3, 2, 2], &[12, 4]));
        assert!(!reads_as(&[4, 12], &[4, 3, 4]));
        assert!(!reads_as(&[4], &[4, 1]));
        assert!(!reads_as(&[4, usize::MAX, 2], &[4, 2]));
    }
}

//! Between burn-ndarray tensors and plain slices, without copies where the tensor allows it.

use std::borrow::Cow;

use burn_backend::{Shape, TensorData, TensorMetadata};
use burn_ndarray::NdArrayTensor;

/// The numbers of a float tensor, row-major; copied only if the tensor is a permuted view or not f32.
pub fn floats(t: &NdArrayTensor) -> Cow<'_, [f32]> {
    match t {
        NdArrayTensor::F32(storage) => {
            let view = storage.view();
            match view.to_slice() {
                Some(slice) => Cow::Borrowed(slice),
                None => Cow::Owned(view.iter().copied().collect()),
            }
        }
        NdArrayTensor::F64(storage) => Cow::Owned(storage.view().iter().map(|v| *v as f32).collect()),
        // The foreign enum has integer arms, which no float op is ever given.
        _ => Cow::Owned(Vec::new()),
    }
}

/// The numbers as a vector: the tensor's own memory if nothing else uses it.
pub(crate) fn take(t: NdArrayTensor) -> Vec<f32> {
    match t {
        NdArrayTensor::F32(storage) if storage.is_unique() && storage.view().is_standard_layout() => {
            let len = storage.view().len();
            match storage.into_shared().into_owned().into_raw_vec_and_offset() {
                (data, None | Some(0)) if data.len() == len => data,
                (data, offset) => data.into_iter().skip(offset.unwrap_or(0)).take(len).collect(),
            }
        }
        other => floats(&other).into_owned(),
    }
}

/// A tensor over `data`, which is not copied.
pub(crate) fn tensor(data: Vec<f32>, shape: Vec<usize>) -> NdArrayTensor {
    NdArrayTensor::from_data(TensorData::new(data, Shape::from(shape)))
}

pub(super) fn shape_of(t: &NdArrayTensor) -> Vec<usize> {
    t.shape().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unique_tensor_keeps_its_memory() {
        let data = vec![1.0f32; 1000];
        let at = data.as_ptr();
        let t = tensor(data, vec![10, 100]);
        assert!(matches!(floats(&t), Cow::Borrowed(_)));
        let shared = t.clone();
        let copy = take(shared);
        assert_ne!(copy.as_ptr(), at, "a shared tensor must not be written to");
        let own = take(t);
        assert_eq!(own.as_ptr(), at);
    }
}

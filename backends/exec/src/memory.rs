//! Tensors in memory: for tests, for examples, and for library users whose checkpoint is not a file.

use std::collections::BTreeMap;

use awqc_ir::{Elem, RawTensor, TensorError, TensorInfo, TensorSource};

use crate::emit::encode;

/// A source over owned tensors.
#[derive(Clone, Debug, Default)]
pub struct MemorySource {
    tensors: BTreeMap<String, RawTensor>,
}

impl MemorySource {
    /// No tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: RawTensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// Adds or replaces a tensor of f32 numbers.
    pub fn insert_f32(&mut self, name: impl Into<String>, shape: &[usize], data: &[f32]) {
        // f32 holds every f32: encoding cannot fail.
        if let Ok(tensor) = encode(Elem::F32, shape.to_vec(), data) {
            self.insert(name, tensor);
        }
    }
}

impl TensorSource for MemorySource {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|t| t.info.clone())
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        self.tensors.get(name).cloned().ok_or_else(|| TensorError(format!("there is no tensor `{name}` in memory")))
    }
}

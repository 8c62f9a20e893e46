//! A checkpoint under the names that its family uses: other prefixes read as the usual ones, tensors of no use hidden.

use std::collections::BTreeMap;
use std::sync::Arc;

use awqc_ir::{RawTensor, TensorError, TensorInfo, TensorSource};

/// See the module documentation.
pub(crate) struct View {
    inner: Arc<dyn TensorSource>,
    /// Name here to name there.
    names: BTreeMap<String, String>,
}

impl View {
    /// `rename` gives the name that a tensor has here, or `None` to hide it. Two tensors of one name are an error that
    /// names both.
    pub(crate) fn new(inner: Arc<dyn TensorSource>, rename: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let mut names = BTreeMap::new();
        for stored in inner.names() {
            let Some(name) = rename(&stored) else { continue };
            if let Some(other) = names.insert(name.clone(), stored.clone()) {
                return Err(format!("tensors `{other}` and `{stored}` both stand for `{name}`: remove one of them"));
            }
        }
        Ok(Self { inner, names })
    }

    /// The names that the tensors have in the checkpoint, without those that are hidden.
    pub(crate) fn stored(&self) -> Vec<String> {
        self.names.values().cloned().collect()
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }
}

impl TensorSource for View {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.inner.info(self.names.get(name)?)
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        match self.names.get(name) {
            Some(stored) => self.inner.read(stored),
            None => Err(TensorError(format!("there is no tensor `{name}` in the checkpoint"))),
        }
    }
}

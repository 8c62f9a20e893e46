//! A checkpoint whose packed weights read in a layout of the language, or as floats.

use std::collections::BTreeMap;
use std::sync::Arc;

use awqc_ir::{RawTensor, Stored, TensorError, TensorInfo, TensorSource};

use super::Recoded;

/// See the module documentation. The tensors that packed weights consist of are hidden; `STEM.codes`, `STEM.scales` and
/// `STEM.zeros` stand in their place, or `STEM.weight`.
pub(crate) struct Unpacked {
    inner: Arc<dyn TensorSource>,
    hidden: Vec<String>,
    weights: BTreeMap<String, Recoded>,
}

impl Unpacked {
    /// `weights` by stem, and the tensors that they consist of.
    pub(crate) fn new(
        inner: Arc<dyn TensorSource>,
        weights: BTreeMap<String, Recoded>,
        mut hidden: Vec<String>,
    ) -> Self {
        hidden.sort();
        Self { inner, hidden, weights }
    }

    /// The weight that a name is a part of, and the part's suffix.
    fn part<'n>(&self, name: &'n str) -> Option<(&Recoded, &'n str)> {
        let at = name.rfind('.')?;
        let (stem, suffix) = name.split_at(at);
        let weight = self.weights.get(stem)?;
        let known = match weight.scattered {
            Some(_) => suffix == ".weight",
            None => weight.parts().iter().any(|(part, _)| *part == suffix),
        };
        known.then_some((weight, suffix))
    }

    fn is_hidden(&self, name: &str) -> bool {
        self.hidden.binary_search_by(|h| h.as_str().cmp(name)).is_ok()
    }
}

impl TensorSource for Unpacked {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.inner.names().into_iter().filter(|n| !self.is_hidden(n)).collect();
        for (stem, weight) in &self.weights {
            match weight.scattered {
                Some(_) => names.push(format!("{stem}.weight")),
                None => names.extend(weight.parts().into_iter().map(|(suffix, _)| format!("{stem}{suffix}"))),
            }
        }
        names.sort();
        names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        match self.part(name) {
            Some((weight, ".weight")) => {
                Some(TensorInfo { stored: Stored::F32, shape: vec![weight.rows, weight.cols] })
            }
            Some((weight, suffix)) => weight.parts().into_iter().find(|(s, _)| *s == suffix).map(|(_, info)| info),
            None if self.is_hidden(name) => None,
            None => self.inner.info(name),
        }
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        let missing = || TensorError(format!("there is no tensor `{name}` in the checkpoint"));
        match self.part(name) {
            Some((weight, ".weight")) => weight.floats(self.inner.as_ref()),
            Some((weight, suffix)) => weight.part(suffix, self.info(name).ok_or_else(missing)?, self.inner.as_ref()),
            None if self.is_hidden(name) => Err(missing()),
            None => self.inner.read(name),
        }
    }
}

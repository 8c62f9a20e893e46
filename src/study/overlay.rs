//! A model some of whose weights are computed when they are read: the numbers of the float model, edited.

use std::collections::BTreeMap;

use awqc_exec::realize;
use awqc_ir::{
    Elem, Module, RawTensor, Stored, TensorError, TensorInfo, TensorSource, Type, ValueId, WeightExpr, WeightId,
};
use awqc_passes::Tensor;
use awqc_passes::analysis::linears::quantizable;

use super::Lab;
use crate::failure::Failure;
use crate::metrics::Clusters;

/// A weight that is computed.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Index of its region.
    pub region: usize,
    /// The weight, in the original module.
    pub weight: WeightId,
    /// What its linear reads.
    pub input: ValueId,
    shape: Vec<usize>,
}

/// Changes the numbers of a weight, `[…, out, in]`.
pub type Edit<'a> = dyn Fn(&Linear, &mut Tensor) + Send + Sync + 'a;

/// The tensors of `inner`, and the computed ones.
struct Overlay<'a> {
    inner: &'a dyn TensorSource,
    original: &'a Module,
    computed: BTreeMap<String, Linear>,
    edit: &'a Edit<'a>,
}

impl Lab<'_> {
    /// The negative log likelihoods of all windows under the model with the weights that `quantize` would quantize
    /// edited.
    ///
    /// # Errors
    /// When the model cannot be run.
    pub fn edited(&self, edit: &Edit<'_>, label: &str) -> Result<Clusters, Failure> {
        let original = &self.model.module;
        let mut module = original.clone();
        let mut computed = BTreeMap::new();
        for (index, region) in module.regions.iter_mut().enumerate() {
            for linear in quantizable(region) {
                let ty = region.weight(linear.weight).ty.clone();
                let Some(shape) = ty.const_shape() else { continue };
                // No checkpoint has a tensor of such a name.
                let name = format!("(edited {})", linear.weight.index());
                let full = region.tensor_name(&name);
                let entry = Linear { region: index, weight: linear.weight, input: linear.input, shape };
                computed.insert(full, entry);
                region.set_weight(linear.weight, WeightExpr::Source(name.into()), Type::new(Elem::F32, ty.shape));
            }
        }
        let overlay = Overlay { inner: self.model.source.as_ref(), original, computed, edit };
        self.likelihoods(&module, &overlay, label)
    }
}

impl TensorSource for Overlay<'_> {
    fn names(&self) -> Vec<String> {
        let mut names = self.inner.names();
        names.extend(self.computed.keys().cloned());
        names.sort();
        names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        match self.computed.get(name) {
            Some(linear) => Some(TensorInfo { stored: Stored::F32, shape: linear.shape.clone() }),
            None => self.inner.info(name),
        }
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        let Some(info) = self.info(name).filter(|_| self.computed.contains_key(name)) else {
            return self.inner.read(name);
        };
        let bytes = self.read_f32(name)?.iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(RawTensor { info, bytes })
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, TensorError> {
        let Some(linear) = self.computed.get(name) else { return self.inner.read_f32(name) };
        let region = &self.original.regions[linear.region];
        let mut tensor = realize::tensor(region, linear.weight, self.inner).map_err(|e| TensorError(e.to_string()))?;
        (self.edit)(linear, &mut tensor);
        Ok(tensor.data)
    }

    fn mapped(&self, name: &str) -> Option<&[u8]> {
        self.inner.mapped(name)
    }
}

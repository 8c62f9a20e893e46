//! How large a quantized model is.

use std::collections::BTreeSet;

use awqc_ir::Region;

/// Counts weights, region by region.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// All weights.
    pub parameters: u64,
    /// Those that are quantized.
    pub quantized: u64,
    bits: f64,
}

impl Tally {
    /// Adds a region. A tensor that several regions use, those that `shared` names, counts once: in the first region.
    pub fn add(&mut self, region: &Region, shared: &BTreeSet<String>, first: bool) {
        for weight in region.used_weights() {
            let ty = &region.weight(weight).ty;
            let len = ty.const_len().unwrap_or(0) as u64;
            // A tensor that several regions use counts once, where it is used first.
            let tied = region.sources(weight).iter().any(|s| shared.contains(&region.tensor_name(s)));
            if !tied || first {
                self.parameters += len;
            }
            if let Some(q) = ty.elem.quant() {
                self.quantized += len;
                self.bits += len as f64 * q.bits_per_weight(ty.channels().unwrap_or(1) as usize);
            }
        }
    }

    /// Mean bits of a quantized weight, scales and zero points included; 0 if there is none.
    pub fn bits_per_weight(&self) -> f64 {
        if self.quantized == 0 { 0.0 } else { self.bits / self.quantized as f64 }
    }
}

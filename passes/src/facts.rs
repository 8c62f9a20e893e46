//! What is known of a region besides its text: the activation statistics that `profile` gathers.

use std::collections::BTreeMap;

use awqc_ir::ValueId;

/// Statistics of one value over all calibration tokens: what a linear that reads it will see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputStats {
    /// Number of tokens.
    pub tokens: u64,
    /// Mean of |x| for each channel.
    pub mean_abs: Vec<f32>,
    /// Largest |x| for each channel.
    pub max_abs: Vec<f32>,
    /// `Σ x xᵀ` over tokens, `[C,C]` row-major, symmetric. Not divided by the number of tokens.
    pub gram: Vec<f32>,
    /// A few tokens' channels, `[rows,C]` row-major, evenly spaced over the stream.
    pub sample: Vec<f32>,
}

impl InputStats {
    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.mean_abs.len()
    }

    /// The statistics of `x / s`, channel by channel.
    pub fn divide(&mut self, s: &[f32]) {
        let c = self.channels();
        for (i, k) in s.iter().enumerate().take(c) {
            self.mean_abs[i] /= k;
            self.max_abs[i] /= k;
        }
        for (i, row) in self.gram.chunks_mut(c.max(1)).enumerate() {
            for (j, g) in row.iter_mut().enumerate() {
                *g /= s[i] * s[j];
            }
        }
        for row in self.sample.chunks_mut(c.max(1)) {
            row.iter_mut().zip(s).for_each(|(x, k)| *x /= k);
        }
    }
}

/// Facts of the region at hand. Those keyed by value follow the values when the region is compacted.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Statistics of the inputs of linears: one set, or one for each expert whose rows the value holds.
    pub inputs: BTreeMap<ValueId, Vec<InputStats>>,
    /// The width that was allocated to the linears that read a value, where widths are mixed.
    pub widths: BTreeMap<ValueId, u8>,
    /// Whether the calibration stream waits at the region's entry, for the region in its final form to move it on.
    pub waiting: bool,
}

/// Below so many calibration tokens, nothing is searched for an expert: its weights are rounded as they are.
pub const FEW_TOKENS: u64 = 16;

impl Facts {
    /// Follows the renumbering that [`awqc_ir::Region::compact`] reports.
    pub fn renumber(&mut self, map: &[Option<ValueId>]) {
        fn follow<T>(old: &mut BTreeMap<ValueId, T>, map: &[Option<ValueId>]) {
            let moved = std::mem::take(old).into_iter();
            *old = moved.filter_map(|(id, fact)| Some(((*map.get(id.index())?)?, fact))).collect();
        }
        follow(&mut self.inputs, map);
        follow(&mut self.widths, map);
    }
}

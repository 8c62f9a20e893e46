//! `profile`: runs the calibration text through a region and keeps the statistics of what its linears read.

pub mod store;

use awqc_ir::{Region, ValueId};
use serde::{Deserialize, Serialize};

use crate::analysis::linears::{linears, units};
use crate::exec::Afterwards;
use crate::facts::{FEW_TOKENS, InputStats};
use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::remark::{RemarkKind, counted};

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct Profile {
    afterwards: Afterwards,
}

/// Options of [`Profile`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProfileOptions {
    /// Whether the layers behind see the errors of this one.
    pub propagate: bool,
}

impl Pass for Profile {
    const NAME: &'static str = "profile";
    const DOC: &'static str = "\
Runs the calibration stream through the region and keeps, for each distinct input of its linears, the number of
tokens, mean and largest magnitude and Gram matrix of its channels, and a few sampled rows.

# Before
Any region.
# After
The same region. The passes behind this one find the statistics of its activations; the stream stands at its exit, or,
with `propagate`, at its entry until the last pass has run: then the region as it has become moves it on.
# Legal when
Always. Regions that are not layers have no linears to quantize: the stream only moves through them, and the last one
is left out, because nothing comes after it.
# Fidelity
Exact: nothing changes.
# Options
`propagate` (`false`): the statistics of a layer are those of a model whose earlier layers are compiled already, so that
later layers can make up for their errors. Such statistics hold for one pipeline only and cannot be saved.

Saved statistics take the place of a run when the driver is given them.
# Reference
The statistics of AWQ (arXiv 2306.00978, section 3.2) and, with the Gram matrix, of GPTQ (arXiv 2210.17323, section 3).
";
    type Options = ProfileOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        Ok(Self { afterwards: if options.propagate { Afterwards::Entry } else { Afterwards::Exit } })
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        if let Some(widths) = cx.widths {
            bind(region, widths, cx)?;
        }
        let taps = taps(region);
        if taps.is_empty() && cx.last {
            return Ok(Changed::No);
        }
        let stats = cx.exec.profile(region, cx.fused, &taps, self.afterwards)?;
        cx.facts.waiting = self.afterwards == Afterwards::Entry && !cx.last;
        store::check(region, &taps, &stats)?;
        cx.remarks.count("taps", taps.len() as f64);
        let mut stats = stats.into_iter();
        for tap in &taps {
            let sets: Vec<InputStats> = stats.by_ref().take(store::sets(region, *tap)).collect();
            let largest = sets.iter().flat_map(|s| &s.max_abs).copied().fold(0.0f32, f32::max);
            let tokens: serde_json::Value = match sets.as_slice() {
                [one] => one.tokens.into(),
                experts => experts.iter().map(|s| s.tokens).collect::<Vec<_>>().into(),
            };
            let (name, channels) = (&*region.value(*tap).name, sets.first().map_or(0, InputStats::channels));
            cx.remarks.push(
                RemarkKind::Applied,
                format!("%{name}: {}, {channels} channels, magnitudes up to {largest:.3}", seen(&sets)),
            );
            cx.remarks.record(serde_json::json!({
                "value": name,
                "tokens": tokens,
                "channels": channels,
                "max_abs": largest,
            }));
            if let Some(line) = rare(&sets) {
                cx.remarks.push(RemarkKind::Warning, format!("%{}: {line}", region.value(*tap).name));
            }
            cx.facts.inputs.insert(*tap, sets);
        }
        Ok(Changed::No)
    }
}

/// Ties the widths that were allocated to the values that the linears read here: the searches behind find them there,
/// whatever passes in between do to the region.
fn bind(region: &Region, widths: &[u8], cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let units = units(region);
    if units.len() != widths.len() {
        return Err(PassError::Refused(format!(
            "{} widths were allocated to the linears of region {}, which has {} groups of them: the allocation belongs to \
             another pipeline or model, compile anew",
            widths.len(),
            region.name,
            units.len()
        )));
    }
    for (unit, bits) in units.iter().zip(widths) {
        cx.facts.widths.extend(unit.iter().map(|l| (l.input, *bits)));
    }
    Ok(())
}

/// How many tokens the statistics of one value, or of its experts, were taken of.
fn seen(sets: &[InputStats]) -> String {
    let (fewest, most) = sets.iter().fold((u64::MAX, 0), |(a, b), s| (a.min(s.tokens), b.max(s.tokens)));
    match sets {
        [_, _, ..] => format!("{} with {fewest} to {most} tokens", counted(sets.len() as u64, "expert")),
        [] | [_] => counted(most, "token"),
    }
}

/// Which experts saw too few tokens to be searched for.
fn rare(sets: &[InputStats]) -> Option<String> {
    let rare: Vec<String> =
        sets.iter().enumerate().filter(|(_, s)| s.tokens < FEW_TOKENS).map(|(e, _)| e.to_string()).collect();
    let line = || {
        format!(
            "{} of {} experts saw fewer than {FEW_TOKENS} calibration tokens and will be rounded as they are ({}): calibrate with more text",
            rare.len(),
            sets.len(),
            rare.join(", ")
        )
    };
    (sets.len() > 1 && !rare.is_empty()).then(line)
}

/// The values whose statistics are kept: in a layer, the distinct inputs of its linears with float weights, in program
/// order; in other regions none.
pub fn taps(region: &Region) -> Vec<ValueId> {
    let mut taps = Vec::new();
    if region.name.is_layer() {
        for l in linears(region) {
            if !taps.contains(&l.input) {
                taps.push(l.input);
            }
        }
    }
    taps
}

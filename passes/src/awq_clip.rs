//! `awq-clip`: cuts off the largest weights of each group where that makes the remaining ones finer.
//!
//! Which bounds are best is decided in [`search`], from the weights and the Gram matrix of their input alone.

mod search;

use std::sync::Arc;

use awqc_ir::{Data, DataId, Dim, Elem, Quant, Region, WeightExpr, WeightId};
use serde::{Deserialize, Serialize};

use crate::analysis::inputs::{gram, inputs};
use crate::analysis::linears::{LinearUse, feeds_attention_scores, label, quantizable, weights};
use crate::awq::reference;
use crate::awq_scale::Mode;
use crate::facts::{FEW_TOKENS, InputStats};
use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::quantize::GroupOption;
use crate::remark::RemarkKind;
use crate::scheme::Scheme;
pub use search::{Bounds, Plan, search};

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct AwqClip {
    options: AwqClipOptions,
}

/// Which bounds are tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// `[−m, m]`.
    Symmetric,
    /// `[lo, hi]`, each end by itself.
    #[default]
    Asymmetric,
}

/// Which error the bounds of a group are judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Of the group's share of the output, by itself: the block diagonal of G.
    Group,
    /// Of the whole row's output, given the bounds of the other groups: groups are visited in turn, `sweeps` times.
    #[default]
    Row,
}

/// Which linears are left alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Skip {
    /// None.
    #[default]
    None,
    /// Those whose output ends up in the queries or keys of an attention, as published.
    Scores,
}

/// Options of [`AwqClip`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwqClipOptions {
    /// Which bounds are tried.
    pub shape: Shape,
    /// Which error they are judged by.
    pub scope: Scope,
    /// Sizes tried for each end.
    pub steps: u32,
    /// How much of an end is cut off at most.
    pub max_shrink: f64,
    /// Rounds through the groups of a row, for `scope=row`.
    pub sweeps: u32,
    /// Which linears are left alone.
    pub skip: Skip,
    /// Which search.
    pub mode: Mode,
    /// Bits to search for, if not those of the pipeline's `quantize`.
    pub bits: Option<u8>,
    /// Group to search for, if not that of the pipeline's `quantize`.
    pub group: Option<GroupOption>,
}

impl Default for AwqClipOptions {
    fn default() -> Self {
        Self {
            shape: Shape::default(),
            scope: Scope::default(),
            steps: 10,
            max_shrink: 0.5,
            sweeps: 3,
            skip: Skip::default(),
            mode: Mode::default(),
            bits: None,
            group: None,
        }
    }
}

impl Plan {
    /// The search that the options describe, for a weight of `elem` numbers.
    pub fn of(options: &AwqClipOptions, quant: Quant, elem: Elem) -> Self {
        let AwqClipOptions { shape, scope, steps, max_shrink, sweeps, .. } = *options;
        Self { quant, elem, shape, scope, steps, max_shrink: max_shrink as f32, sweeps }
    }
}

impl Pass for AwqClip {
    const NAME: &'static str = "awq-clip";
    const DOC: &'static str = "\
Limits each group of each row of the weights to a range that is chosen so that rounding it makes the least error in the
linear's output.

# Before
`linear %x, $w` with `$w = \"…\" : f16[out,in]`.
# After
`$w = clip(\"…\", #lo, #hi, g128)`, the bounds in data entries `[out, groups]`.
# Legal when
The weight will be quantized and the statistics of its input are known.
# Fidelity
Lossy. Not clipping is always among the candidates: measured by its own loss, the pass never makes a row worse.
# Options
`shape` (asymmetric): `symmetric` tries [−m, m], `asymmetric` both ends by themselves. `scope` (row): `group` judges
each group by its share of the output alone, `row` by the whole row's output, visiting the groups in turn, `sweeps` (3)
times. `steps` (10) sizes are tried for an end, down to 1 − `max_shrink` (0.5) of it. `skip` (none): `scores` leaves
linears alone that end in the queries or keys of an attention. `mode` (search): `reference` follows the published search
on the sampled tokens. `bits`, `group`: what to search for, if not what the pipeline's `quantize` says.
# Reference
The clip search of the AWQ authors' program (arXiv 2306.00978), there symmetric, by group, on sampled tokens.
";
    type Options = AwqClipOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Lossy
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        if options.steps == 0 || options.steps > 1000 {
            return Err(PassError::Refused(format!("steps={} is not possible: use 1 to 1000", options.steps)));
        }
        if !(0.0..1.0).contains(&options.max_shrink) {
            return Err(PassError::Refused(format!("max_shrink={} is not in 0..1", options.max_shrink)));
        }
        if let Some(bits) = options.bits.filter(|b| !Quant::BITS.contains(b)) {
            return Err(PassError::Refused(format!("bits={bits} is not possible: use 2, 3, 4 or 8")));
        }
        Ok(Self { options })
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        if !region.name.is_layer() {
            return Ok(Changed::No);
        }
        let Some(scheme) = Scheme::searched(cx.scheme, self.options.bits, self.options.group) else {
            cx.remarks
                .push(RemarkKind::Missed, "nothing will be quantized: add `quantize` to the pipeline, or set bits");
            return Ok(Changed::No);
        };
        let linears = quantizable(region);
        let mut changed = Changed::No;
        for weight in weights(&linears) {
            if !cx.budget.allows() {
                break;
            }
            let uses: Vec<LinearUse> = linears.iter().filter(|l| l.weight == weight).copied().collect();
            let quant = scheme.of(region, &uses, cx.facts)?;
            if self.clip(region, weight, &uses, quant, cx)? == Changed::Yes {
                cx.budget.spend();
                changed = Changed::Yes;
            }
        }
        Ok(changed)
    }
}

impl AwqClip {
    /// Clips one weight, given the linears that use it.
    fn clip(
        &self,
        region: &mut Region,
        weight: WeightId,
        uses: &[LinearUse],
        quant: Quant,
        cx: &mut PassCx<'_>,
    ) -> Result<Changed, PassError> {
        let name = label(region, weight);
        if self.options.skip == Skip::Scores && uses.iter().any(|l| feeds_attention_scores(region, l)) {
            cx.remarks.push(RemarkKind::Missed, format!("{name}: ends in the queries or keys of an attention"));
            return Ok(Changed::No);
        }
        let numbers = cx.exec.realize(region, weight)?;
        let (rows, cols) = (numbers.rows(), numbers.cols());
        let ty = region.weight(weight).ty.clone();
        // Of a stack, each matrix is looked at with the statistics of its expert.
        let experts = ty.shape.first().and_then(Dim::as_const).filter(|_| ty.rank() == 3).unwrap_or(1) as usize;
        let plan = Plan::of(&self.options, quant, ty.elem);
        let mut bounds = Bounds { lo: Vec::new(), hi: Vec::new(), before: None, after: None };
        let size = numbers.data.len() / experts.max(1);
        let mut why = None;
        for (e, numbers) in numbers.data.chunks(size.max(1)).enumerate() {
            let part = match inputs(uses, e, cols, cx.facts) {
                Err(reason) if experts == 1 => {
                    why = Some(reason);
                    break;
                }
                Err(_) => None,
                Ok(stats) if experts > 1 && stats.iter().map(|s| s.tokens).sum::<u64>() < FEW_TOKENS => None,
                Ok(stats) => Some(stats),
            };
            let found = match (part, self.options.mode) {
                (None, _) => whole(numbers.len() / cols.max(1) * quant.group.count(cols)),
                (Some(stats), Mode::Search) => search(numbers, cols, &gram(&stats), &plan),
                (Some(stats), Mode::Reference) => published(numbers, cols, &stats, quant),
            };
            bounds.lo.extend(found.lo);
            bounds.hi.extend(found.hi);
            bounds.before = add_up(bounds.before, found.before);
            bounds.after = add_up(bounds.after, found.after);
        }
        if let Some(why) = why {
            cx.remarks.push(RemarkKind::Missed, format!("{name}: {why}"));
            return Ok(Changed::No);
        }
        cx.remarks.count("weights", 1.0);
        let told = bounds.before.zip(bounds.after).map(|(b, a)| format!(", loss {b:.3e} before, {a:.3e} after"));
        cx.remarks.push(RemarkKind::Applied, format!("{name}: clipped{}", told.unwrap_or_default()));
        cx.remarks.record(serde_json::json!({
            "linear": name,
            "loss_before": bounds.before,
            "loss_after": bounds.after,
        }));
        let shape = vec![rows as u64, quant.group.count(cols) as u64];
        let lo = add(region, "lo", format!("lower bounds of {name}"), &shape, bounds.lo);
        let hi = add(region, "hi", format!("upper bounds of {name}"), &shape, bounds.hi);
        region.wrap_weight(weight, ty, |of| WeightExpr::Clip { of, lo, hi, group: quant.group });
        Ok(Changed::Yes)
    }
}

fn add(region: &mut Region, base: &str, label: String, shape: &[u64], values: Vec<f32>) -> DataId {
    let name = region.fresh_data_name(base);
    region.add_data(Data { name, label: label.into(), shape: shape.to_vec(), values: Some(Arc::from(values)) })
}

/// Bounds that cut nothing off.
fn whole(groups: usize) -> Bounds {
    Bounds { lo: vec![f32::MIN; groups], hi: vec![f32::MAX; groups], before: None, after: None }
}

fn add_up(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (None, other) | (other, None) => other,
    }
}

/// The published bounds, from the sampled tokens. The losses are not part of that search and stay unknown.
fn published(weight: &[f32], cols: usize, stats: &[&InputStats], quant: Quant) -> Bounds {
    const SAMPLE: usize = 512;
    let tokens: Vec<f32> = stats.iter().flat_map(|s| &s.sample).copied().collect();
    let found = reference::clip_search(weight, &tokens, cols, quant, SAMPLE);
    let lo = found.max.iter().map(|m| -m).collect();
    Bounds { lo, hi: found.max, before: None, after: None }
}

//! `awq-scale`: moves range from weights to activations where it costs least.
//!
//! Where scales are free comes from [`crate::analysis::gauge`]; this file decides which of them pay. For each site it
//! makes candidate scales of the statistics ([`candidates`]), judges them by the error that rounding makes
//! ([`linear_loss`], [`block_loss`]), and folds the best into the weights. All sites of a region are searched on the
//! original weights, then applied: dividing rows of a weight changes each group's scale and nothing else, so the
//! searches do not depend on each other.

mod block_loss;
mod candidates;
mod linear_loss;
mod parts;
mod statistics;

use awqc_ir::{Quant, Region};
use serde::{Deserialize, Serialize};

use crate::analysis::gauge::{self, Site};
use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::quantize::GroupOption;
use crate::remark::RemarkKind;
use crate::scheme::Scheme;
use candidates::Candidate;
use linear_loss::Judge;
use parts::Choice;
use statistics::SiteData;

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct AwqScale {
    options: AwqScaleOptions,
}

/// What a candidate is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// The squared error of the outputs of the site's linears, over all calibration tokens, from their Gram matrix.
    #[default]
    Linear,
    /// The squared error of the output of the block around them, by running the region on a few sequences.
    Block,
}

/// How the outputs of several linears are added up in the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weight {
    /// As they are.
    #[default]
    Plain,
    /// Each linear's error relative to the energy of its output.
    Energy,
}

/// Which rules make candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// `x^α`, with x the mean magnitude of the activations.
    #[default]
    Paper,
    /// `x^α / w^(1−α)`, with w the mean relative magnitude of the weights.
    Duo,
    /// Half of the grid by each rule.
    Both,
}

/// Which search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The one described here.
    #[default]
    Search,
    /// The published one, step by step: see [`crate::awq::reference`].
    Reference,
}

/// Options of [`AwqScale`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwqScaleOptions {
    /// What a candidate is judged by.
    pub loss: Loss,
    /// How several linears are weighed.
    pub weight: Weight,
    /// Which rules make candidates.
    pub rule: Rule,
    /// Number of candidates besides s = 1.
    pub grid: u32,
    /// Rows of each linear that are clipped for a trial, with `loss=linear`; 0 judges all rows, and without bounds.
    pub bounds: u32,
    /// Which search.
    pub mode: Mode,
    /// Bits to search for, if not those of the pipeline's `quantize`.
    pub bits: Option<u8>,
    /// Group to search for, if not that of the pipeline's `quantize`.
    pub group: Option<GroupOption>,
}

impl Default for AwqScaleOptions {
    fn default() -> Self {
        Self {
            loss: Loss::default(),
            weight: Weight::default(),
            rule: Rule::default(),
            grid: 20,
            bounds: 0,
            mode: Mode::default(),
            bits: None,
            group: None,
        }
    }
}

impl Pass for AwqScale {
    const NAME: &'static str = "awq-scale";
    const DOC: &'static str = "\
Scales the input channels of linears up where activations are large, and what produces the activations down, so that
rounding hurts the salient weights less.

# Before
`$ln1`, `$q`, `$k`, `$v` of a norm and the linears that read it.
# After
`#s0 = scales \"…\"`, `$ln1 = div.0(\"…\", #s0)`, `$q = mul.1(\"…\", #s0)`, and so on; `tie(#s1, …)` where query heads
share a key/value head.
# Legal when
The scales are free: every producer of the scaled values absorbs them and every use undoes them. Found by solving the
ops' scale laws, never by names.
# Fidelity
Rounding: the function is the same up to rounding of the folded weights. The loss is never larger than without scales,
which are among the candidates.
# Options
`loss` (linear): `linear`, the squared error of the outputs of the site's linears over all tokens, tr(ΔW G ΔWᵀ) with
ΔW = Q(W·s)/s − W, or `block`, that of the output of the block around them, on a few sequences. `weight` (plain):
`energy` divides each linear's error by the energy of its output. `rule` (paper): `paper` s = x^α, `duo`
s = x^α/w^(1−α), or `both`. `grid` (20): number of α. `bounds` (0): judge by so many rows of each linear, evenly
spread, within the bounds that would suit them best: for pipelines with `awq-clip` behind; 0 judges by all rows, without
bounds. `mode` (search): `reference` follows the published search step by step. `bits`, `group`: what to search for, if
not what the pipeline's `quantize` says. Channels tied to one scale enter with the root of their mean square.
# Reference
AWQ, arXiv 2306.00978, section 3.2, equations 4 and 5.
";
    type Options = AwqScaleOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Rounding(65536.0)
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        if options.grid == 0 || options.grid > 1000 {
            return Err(PassError::Refused(format!("grid={} is not possible: use 1 to 1000", options.grid)));
        }
        if options.bounds > 0 && (options.mode == Mode::Reference || options.loss == Loss::Block) {
            let message = "bounds belongs to loss=linear and mode=search: leave it out";
            return Err(PassError::Refused(message.into()));
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
        let sites = gauge::sites(region, cx.shared);
        let mut chosen: Vec<(Site, Choice, String)> = Vec::new();
        for site in sites {
            let line = gauge::describe(region, &site);
            if let Some(best) = self.search(region, &site, &line, scheme, cx)? {
                chosen.push((site, best, line));
            }
        }
        let mut changed = Changed::No;
        for (site, best, line) in chosen {
            if !cx.budget.allows() {
                break;
            }
            cx.budget.spend();
            let label = format!("scales {}", line.split(" (").next().unwrap_or(&line));
            gauge::apply(region, &site, &best.scales, &label, cx.facts);
            cx.remarks.push(RemarkKind::Applied, format!("{line}: {best}"));
            cx.remarks.count("sites", 1.0);
            changed = Changed::Yes;
        }
        Ok(changed)
    }
}

impl AwqScale {
    fn judge(&self) -> Judge {
        match (self.options.mode, self.options.bounds) {
            (Mode::Reference, _) => Judge::Published,
            (Mode::Search, 0) => Judge::Rounded,
            (Mode::Search, rows) => Judge::Bounded { rows: rows as usize },
        }
    }

    /// The best scales of a site, unless they are all 1.
    fn search(
        &self,
        region: &Region,
        site: &Site,
        line: &str,
        scheme: Scheme,
        cx: &mut PassCx<'_>,
    ) -> Result<Option<Choice>, PassError> {
        let data = match SiteData::gather(region, site, scheme, &*cx.exec, &*cx.facts)? {
            Ok(data) => data,
            Err(why) => {
                cx.remarks.push(RemarkKind::Missed, format!("{line}: {why}"));
                return Ok(None);
            }
        };
        if self.options.mode == Mode::Reference && data.tied(site) {
            cx.remarks.push(RemarkKind::Missed, format!("{line}: the published search leaves tied channels alone"));
            return Ok(None);
        }
        let all = match self.options.mode {
            Mode::Search => candidates::grid(&data, site, scheme.group(), self.options.rule, self.options.grid),
            Mode::Reference => candidates::published(&data, site, scheme.group(), self.options.rule),
        };
        let candidates: Vec<Candidate> = all.into_iter().filter(|c| data.stays_finite(site, &c.scales)).collect();
        let parts = match self.options.loss {
            Loss::Linear => parts::of(&data, site),
            Loss::Block => vec![parts::Part::whole(&data, site)],
        };
        let mut chosen: Vec<(usize, f64, Option<f64>)> = Vec::with_capacity(parts.len());
        for part in &parts {
            if part.rare {
                chosen.push((candidates.iter().position(Candidate::is_one).unwrap_or(0), 0.0, None));
                continue;
            }
            let losses = match self.options.loss {
                Loss::Linear => {
                    let consumers = part.consumers.iter().filter_map(|i| data.consumers.get(*i));
                    linear_loss::losses(&data, consumers, site, &candidates, self.options.weight, self.judge())
                }
                Loss::Block => block_loss::losses(region, site, scheme, &candidates, cx)?,
            };
            // The first of equals, and s = 1 is the first of the search's grid: a change has to pay.
            let mut best: Option<usize> = None;
            for (i, l) in losses.iter().enumerate().filter(|(_, l)| l.is_finite()) {
                if best.is_none_or(|b| *l < losses[b]) {
                    best = Some(i);
                }
            }
            let Some(best) = best else {
                let message = format!("{line}: no candidate has a finite loss, the site stays as it is");
                cx.remarks.push(RemarkKind::Warning, message);
                return Ok(None);
            };
            let before = candidates.iter().position(Candidate::is_one).and_then(|i| losses.get(i).copied());
            chosen.push((best, losses[best], before));
        }
        let best = parts::compose(&candidates, &parts, &chosen.iter().map(|(i, _, _)| *i).collect::<Vec<_>>());
        let alphas: Vec<f64> = best.alphas.clone();
        let scaled = best.scales.iter().any(|s| *s != 1.0);
        cx.remarks.record(serde_json::json!({
            "producers": site.producers.iter().map(|p| crate::analysis::linears::label(region, p.weight)).collect::<Vec<_>>(),
            "consumers": site.consumers.iter().map(|p| crate::analysis::linears::label(region, p.weight)).collect::<Vec<_>>(),
            "free": site.free,
            "scaled": scaled,
            "rule": best.rule.to_string(),
            "alpha": if let [alpha] = alphas[..] { serde_json::json!(alpha) } else { serde_json::json!(alphas) },
            "loss_before": chosen.iter().map(|(_, _, before)| *before).sum::<Option<f64>>(),
            "loss_after": chosen.iter().map(|(_, after, _)| after).sum::<f64>(),
        }));
        if !scaled {
            cx.remarks.push(RemarkKind::Missed, format!("{line}: no scales are better than none"));
            return Ok(None);
        }
        Ok(Some(best))
    }
}

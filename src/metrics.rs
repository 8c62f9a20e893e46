//! How good a model is, and how near another: perplexity, Kullback-Leibler divergence, top-token agreement, each with
//! its standard error.
//!
//! Errors are those of a mean over *windows*, not over tokens: tokens of one window are about one text and depend on
//! each other, windows hardly do. See [`Clusters::error`].

use awqc_exec::host::math::log_sum_exp;
use serde::{Deserialize, Serialize};

/// Sums of a quantity over the targets of each window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Clusters {
    /// Sum over the targets of a window, by window.
    pub sums: Vec<f64>,
    /// Number of targets of a window.
    pub counts: Vec<u64>,
}

impl Clusters {
    /// Adds one target of a window.
    pub fn push(&mut self, window: usize, value: f64) {
        self.grow(window);
        self.sums[window] += value;
        self.counts[window] += 1;
    }

    /// Adds the targets that another part of the work saw.
    pub fn append(&mut self, other: &Self) {
        for (window, (sum, count)) in other.sums.iter().zip(&other.counts).enumerate() {
            self.grow(window);
            self.sums[window] += sum;
            self.counts[window] += count;
        }
    }

    fn grow(&mut self, window: usize) {
        if self.sums.len() <= window {
            self.sums.resize(window + 1, 0.0);
            self.counts.resize(window + 1, 0);
        }
    }

    /// Number of targets.
    pub fn targets(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Windows that hold a target.
    pub fn windows(&self) -> usize {
        self.counts.iter().filter(|n| **n > 0).count()
    }

    /// Mean over all targets; 0 for none.
    pub fn mean(&self) -> f64 {
        self.sums.iter().sum::<f64>() / self.targets().max(1) as f64
    }

    /// Standard error of [`Clusters::mean`] with windows as clusters. With sums `S_w` over `n_w` targets each, `N` in
    /// all, and the mean `m`: `√(W/(W−1) · Σ_w (S_w − n_w·m)²) / N`. For windows of one length this is the deviation
    /// of the windows' means over `√W`. `None` for one window, which says nothing of the spread.
    pub fn error(&self) -> Option<f64> {
        let (mean, n, w) = (self.mean(), self.targets() as f64, self.windows() as f64);
        let squares = self.sums.iter().zip(&self.counts).map(|(s, c)| (s - *c as f64 * mean).powi(2)).sum::<f64>();
        (w > 1.0).then(|| (w / (w - 1.0) * squares).sqrt() / n)
    }

    /// Target by target less `other`, which saw the same targets.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let sums = self.sums.iter().zip(&other.sums).map(|(a, b)| a - b).collect();
        Self { sums, counts: self.counts.clone() }
    }

    /// The mean of several runs over the same targets, target by target.
    #[must_use]
    pub fn average(runs: &[Self]) -> Self {
        let mut all = Self::default();
        runs.iter().for_each(|run| all.append(run));
        let n = runs.len().max(1);
        all.sums.iter_mut().for_each(|s| *s /= n as f64);
        all.counts.iter_mut().for_each(|c| *c /= n as u64);
        all
    }

    /// Those of windows in `range`.
    #[must_use]
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        let sums = self.sums.get(range.clone()).unwrap_or_default().to_vec();
        Self { sums, counts: self.counts.get(range).unwrap_or_default().to_vec() }
    }

    /// exp of the mean with its error, to first order: perplexity, of negative log likelihoods.
    pub fn exp(&self) -> (f64, Option<f64>) {
        let value = self.mean().exp();
        (value, self.error().map(|e| value * e))
    }
}

/// Sums over targets; [`Metrics::summary`] makes means of them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    nll: Clusters,
    reference: Clusters,
    kl: Clusters,
    /// The divergence at every target, in order.
    each_kl: Vec<f64>,
    agree: Clusters,
}

/// What `eval` prints. Errors are standard errors, `None` where there is one window only.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// exp of the mean negative log likelihood.
    pub perplexity: f64,
    /// Its error: the perplexity times the error of the mean.
    pub perplexity_error: Option<f64>,
    /// Mean negative log likelihood, in nats.
    pub nll: f64,
    /// Its error.
    pub nll_error: Option<f64>,
    /// Number of targets.
    pub tokens: u64,
    /// Number of windows.
    pub windows: u64,
    /// How far from the reference, if there is one.
    #[serde(flatten)]
    pub distance: Option<Distance>,
}

/// How far a model is from its reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distance {
    /// The reference's perplexity.
    pub reference_perplexity: f64,
    /// Perplexity over the reference's.
    pub perplexity_ratio: f64,
    /// Its error, from the differences of the two models' log likelihoods: much smaller than the errors of the
    /// perplexities, because both find the same windows hard.
    pub perplexity_ratio_error: Option<f64>,
    /// Mean over targets of KL(reference ‖ model), in nats.
    pub kl_divergence: f64,
    /// Its error.
    pub kl_error: Option<f64>,
    /// Median of the same.
    pub kl_median: f64,
    /// 99th percentile of the same.
    pub kl_p99: f64,
    /// Largest of the same.
    pub kl_max: f64,
    /// Share of targets at which both models find the same token most probable.
    pub top1_agreement: f64,
    /// Its error.
    pub top1_error: Option<f64>,
}

/// What a reference says of one target.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected<'a> {
    /// Its logits, or log-probabilities.
    pub logits: &'a [f32],
    /// Negative log likelihood of the target.
    pub nll: f64,
    /// The most probable token, the first of several.
    pub top: usize,
}

impl<'a> Expected<'a> {
    /// What these logits say; `None` if there is no such token.
    pub fn of(logits: &'a [f32], target: usize) -> Option<Self> {
        let nll = log_sum_exp(logits) - f64::from(*logits.get(target)?);
        Some(Self { logits, nll, top: top(logits) })
    }
}

/// The most probable token.
pub fn top(logits: &[f32]) -> usize {
    crate::sample::argmax(logits)
}

/// The score of one target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Negative log likelihood.
    pub nll: f64,
    /// Against the reference: its negative log likelihood, the divergence, and whether the most probable tokens agree.
    pub against: Option<(f64, f64, bool)>,
}

/// The score of `target` under a model's logits; `None` if there is no such token.
pub fn score(logits: &[f32], target: usize, reference: Option<&Expected<'_>>) -> Option<Score> {
    let z = log_sum_exp(logits);
    let nll = z - f64::from(*logits.get(target)?);
    let against = reference.map(|r| {
        let zr = log_sum_exp(r.logits);
        let kl: f64 = r
            .logits
            .iter()
            .zip(logits)
            .map(|(a, b)| {
                let lp = f64::from(*a) - zr;
                lp.exp() * (lp - (f64::from(*b) - z))
            })
            .sum();
        (r.nll, kl.max(0.0), r.top == top(logits))
    });
    Some(Score { nll, against })
}

impl Metrics {
    /// Adds the score of one target of a window.
    pub fn push(&mut self, window: usize, score: Score) {
        self.nll.push(window, score.nll);
        if let Some((reference, kl, same)) = score.against {
            self.reference.push(window, reference);
            self.kl.push(window, kl);
            self.each_kl.push(kl);
            self.agree.push(window, f64::from(u8::from(same)));
        }
    }

    /// Adds another part's targets after this one's.
    pub fn append(&mut self, other: &Self) {
        self.nll.append(&other.nll);
        self.reference.append(&other.reference);
        self.kl.append(&other.kl);
        self.each_kl.extend(&other.each_kl);
        self.agree.append(&other.agree);
    }

    /// The negative log likelihoods.
    pub fn nll(&self) -> &Clusters {
        &self.nll
    }

    /// The means.
    pub fn summary(&self) -> Summary {
        let (perplexity, perplexity_error) = self.nll.exp();
        Summary {
            perplexity,
            perplexity_error,
            nll: self.nll.mean(),
            nll_error: self.nll.error(),
            tokens: self.nll.targets(),
            windows: self.nll.windows() as u64,
            distance: self.distance(),
        }
    }

    fn distance(&self) -> Option<Distance> {
        let mut kl = self.each_kl.clone();
        kl.sort_by(f64::total_cmp);
        kl.first()?;
        let (perplexity_ratio, perplexity_ratio_error) = self.nll.minus(&self.reference).exp();
        Some(Distance {
            reference_perplexity: self.reference.exp().0,
            perplexity_ratio,
            perplexity_ratio_error,
            kl_divergence: self.kl.mean(),
            kl_error: self.kl.error(),
            kl_median: quantile(&kl, 0.5),
            kl_p99: quantile(&kl, 0.99),
            kl_max: quantile(&kl, 1.0),
            top1_agreement: self.agree.mean(),
            top1_error: self.agree.error(),
        })
    }
}

/// A quantile of sorted numbers, between two of them in proportion to their ranks; NaN if there are none.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = q * sorted.len().saturating_sub(1) as f64;
    let at = |rank: f64| sorted.get(rank as usize).copied().unwrap_or(f64::NAN);
    match rank.fract() {
        // Infinities are not taken from each other.
        0.0 => at(rank),
        between => at(rank.floor()) * (1.0 - between) + at(rank.ceil()) * between,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_numbers() {
        assert_eq!(quantile(&[1.0, 4.0], 0.5), 2.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 0.5), 2.0);
        assert_eq!((quantile(&[1.0, 3.0, 5.0], 0.0), quantile(&[1.0, 3.0, f64::INFINITY], 1.0)), (1.0, f64::INFINITY));
        assert!((quantile(&[0.0, 10.0], 0.99) - 9.9).abs() < 1e-12 && quantile(&[], 0.5).is_nan());
    }

    fn against(logits: &[f32], reference: &[f32]) -> (f64, f64, bool) {
        let reference = Expected::of(reference, 0).expect("the target exists");
        score(logits, 0, Some(&reference)).expect("the target exists").against.expect("there is a reference")
    }

    #[test]
    fn a_uniform_model_has_the_vocabulary_as_perplexity() {
        let mut m = Metrics::default();
        for target in 0..7 {
            m.push(target / 4, score(&[0.5; 7], target, None).expect("the target exists"));
        }
        let summary = m.summary();
        assert!((summary.perplexity - 7.0).abs() < 1e-9 && summary.distance.is_none());
        assert_eq!((summary.tokens, summary.windows), (7, 2));
        assert!(summary.perplexity_error.expect("two windows") < 1e-9, "all targets are alike");
    }

    #[test]
    fn divergence_is_zero_only_for_equal_distributions() {
        let a = [1.0f32, 2.0, 3.0];
        let (_, kl, same) = against(&[11.0, 12.0, 13.0], &a);
        assert!(kl.abs() < 1e-9 && same);
        let (_, kl, same) = against(&[3.0, 2.0, 1.0], &a);
        // By hand: Σ p_i (a_i − b_i) with p = softmax(1,2,3) and equal normalisers; exponentials are taken in f32.
        let p: Vec<f64> = [1.0f64, 2.0, 3.0].iter().map(|v| v.exp() / (1f64.exp() + 2f64.exp() + 3f64.exp())).collect();
        assert!((kl - (p[0] * -2.0 + p[2] * 2.0)).abs() < 1e-6 && !same);
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() {
        assert!(score(&[0.0; 3], 3, None).is_none());
    }

    #[test]
    fn errors_are_those_of_the_windows_means() {
        let mut c = Clusters::default();
        // Tokens agree within a window: six of them know no more than the three windows.
        for (window, value) in [(0, 1.0), (0, 1.0), (1, 2.0), (1, 2.0), (2, 6.0), (2, 6.0)] {
            c.push(window, value);
        }
        assert_eq!(c.mean(), 3.0);
        // Deviation of 1, 2, 6 is √7; over √3.
        assert!((c.error().expect("three windows") - (7.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(c.part(0..1).error(), None, "one window says nothing of the spread");
        assert_eq!(c.part(1..3).mean(), 4.0);
        // A constant factor between two models has no error, whatever the spread of either.
        let mut shifted = c.clone();
        shifted.sums.iter_mut().zip(&shifted.counts).for_each(|(s, n)| *s += 0.5 * *n as f64);
        let (ratio, error) = shifted.minus(&c).exp();
        assert!((ratio - 0.5f64.exp()).abs() < 1e-12 && error.expect("three windows") < 1e-12);
    }
}

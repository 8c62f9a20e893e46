//! How good a model is, and how near another: perplexity, Kullback-Leibler divergence, top-token agreement.

use awqc_exec::host::math::log_sum_exp;
use serde::Serialize;

/// Sums over targets; [`Metrics::summary`] makes means of them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    nll: Vec<f64>,
    kl: Vec<f64>,
    agree: u64,
}

/// What `eval` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// exp of the mean negative log likelihood.
    pub perplexity: f64,
    /// Standard error of the perplexity, from the spread of the targets.
    pub perplexity_error: f64,
    /// Number of targets.
    pub tokens: u64,
    /// Mean over targets of KL(reference ‖ model), in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_divergence: Option<f64>,
    /// Median of the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_median: Option<f64>,
    /// 99th percentile of the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_p99: Option<f64>,
    /// Share of targets at which both models find the same token most probable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
}

/// Negative log likelihood of `target`, and, against a reference's logits, the divergence and whether the most probable
/// tokens agree.
pub fn score(logits: &[f32], target: usize, reference: Option<&[f32]>) -> Option<(f64, Option<(f64, bool)>)> {
    let z = log_sum_exp(logits);
    let nll = z - f64::from(*logits.get(target)?);
    let against = reference.map(|r| {
        let zr = log_sum_exp(r);
        let kl: f64 = r
            .iter()
            .zip(logits)
            .map(|(a, b)| {
                let lp = f64::from(*a) - zr;
                lp.exp() * (lp - (f64::from(*b) - z))
            })
            .sum();
        (kl.max(0.0), crate::sample::argmax(r) == crate::sample::argmax(logits))
    });
    Some((nll, against))
}

impl Metrics {
    /// Adds one target's score.
    pub fn push(&mut self, nll: f64, against: Option<(f64, bool)>) {
        self.nll.push(nll);
        if let Some((kl, same)) = against {
            self.kl.push(kl);
            self.agree += u64::from(same);
        }
    }

    /// Adds another part's targets after this one's.
    pub fn append(&mut self, other: Self) {
        self.nll.extend(other.nll);
        self.kl.extend(other.kl);
        self.agree += other.agree;
    }

    /// The means.
    pub fn summary(&self) -> Summary {
        let n = self.nll.len().max(1) as f64;
        let mean = self.nll.iter().sum::<f64>() / n;
        let variance = self.nll.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let mut kl = self.kl.clone();
        kl.sort_by(f64::total_cmp);
        let quantile = |q: f64| kl.get(((kl.len().saturating_sub(1)) as f64 * q).round() as usize).copied();
        let some = !kl.is_empty();
        Summary {
            perplexity: mean.exp(),
            perplexity_error: mean.exp() * (variance / n).sqrt(),
            tokens: self.nll.len() as u64,
            kl_divergence: some.then(|| kl.iter().sum::<f64>() / kl.len() as f64),
            kl_median: quantile(0.5),
            kl_p99: quantile(0.99),
            top1_agreement: some.then(|| self.agree as f64 / kl.len() as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_model_has_the_vocabulary_as_perplexity() {
        let mut m = Metrics::default();
        for target in 0..7 {
            let (nll, _) = score(&[0.5; 7], target, None).expect("the target exists");
            m.push(nll, None);
        }
        assert!((m.summary().perplexity - 7.0).abs() < 1e-9);
    }

    #[test]
    fn divergence_is_zero_only_for_equal_distributions() {
        let a = [1.0f32, 2.0, 3.0];
        let shifted = [11.0f32, 12.0, 13.0];
        let (_, against) = score(&shifted, 0, Some(&a)).expect("the target exists");
        let (kl, same) = against.expect("there is a reference");
        assert!(kl.abs() < 1e-9 && same);
        let (_, against) = score(&[3.0, 2.0, 1.0], 0, Some(&a)).expect("the target exists");
        let (kl, same) = against.expect("there is a reference");
        // By hand: Σ p_i (a_i − b_i) with p = softmax(1,2,3) and equal normalisers; exponentials are taken in f32.
        let p: Vec<f64> = [1.0f64, 2.0, 3.0].iter().map(|v| v.exp() / (1f64.exp() + 2f64.exp() + 3f64.exp())).collect();
        assert!((kl - (p[0] * -2.0 + p[2] * 2.0)).abs() < 1e-6 && !same);
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() {
        assert!(score(&[0.0; 3], 3, None).is_none());
    }
}

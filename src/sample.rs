//! Choosing the next token from logits.

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest.
    pub temperature: f32,
    /// Only the `top_k` largest logits; 0 for all.
    pub top_k: usize,
    /// Only the most probable tokens that together reach this probability.
    pub top_p: f32,
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0 };

    /// Whether the most probable token is always taken.
    pub fn is_greedy(self) -> bool {
        self.temperature <= 0.0
    }

    /// The index of the chosen token.
    pub fn choose(self, logits: &[f32], rng: &mut fastrand::Rng) -> usize {
        if self.is_greedy() {
            return argmax(logits);
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let descending = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        let keep = if self.top_k == 0 { order.len() } else { self.top_k.min(order.len()) };
        if keep < order.len() {
            order.select_nth_unstable_by(keep, descending);
            order.truncate(keep);
        }
        if self.top_p < 1.0 || keep < logits.len() {
            order.sort_unstable_by(descending);
        }
        let kept: Vec<(usize, f32)> = order.into_iter().map(|i| (i, logits[i])).collect();
        self.draw(&kept, rng)
    }

    /// One of the logits that `top_k` keeps, given with their tokens: larger ones first as [`f32::total_cmp`] orders
    /// them, and of equals the smaller token, if there are fewer than the vocabulary has.
    pub fn draw(self, kept: &[(usize, f32)], rng: &mut fastrand::Rng) -> usize {
        let top = kept.iter().map(|(_, v)| *v).fold(f32::NEG_INFINITY, f32::max);
        let mut weights: Vec<f64> = kept.iter().map(|(_, v)| f64::from((v - top) / self.temperature).exp()).collect();
        if self.top_p < 1.0 {
            let total: f64 = weights.iter().sum();
            let mut sum = 0.0;
            let enough = weights.iter().position(|w| {
                sum += w / total;
                sum >= f64::from(self.top_p)
            });
            weights.truncate(enough.map_or(weights.len(), |i| i + 1));
        }
        let mut left = rng.f64() * weights.iter().sum::<f64>();
        for ((token, _), w) in kept.iter().zip(&weights) {
            left -= w;
            if left <= 0.0 {
                return *token;
            }
        }
        kept.first().map_or(0, |(token, _)| *token)
    }
}

/// The index of the largest logit, the first of equals.
pub fn argmax(logits: &[f32]) -> usize {
    let better = |best: (usize, f32), (i, v): (usize, f32)| if v > best.1 { (i, v) } else { best };
    logits.iter().copied().enumerate().fold((0, f32::NEG_INFINITY), better).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(Sampling::GREEDY.choose(&[0.0, 2.0, 2.0, 1.0], &mut fastrand::Rng::with_seed(1)), 1);
    }

    #[test]
    fn top_k_and_top_p_exclude_the_tail() {
        let logits = [3.0, 2.0, 1.0, -1.0, 2.5];
        let mut rng = fastrand::Rng::with_seed(7);
        let k = Sampling { temperature: 1.0, top_k: 2, top_p: 1.0 };
        let p = Sampling { temperature: 1.0, top_k: 0, top_p: 0.5 };
        for _ in 0..200 {
            assert!([0, 4].contains(&k.choose(&logits, &mut rng)));
            assert!([0, 4].contains(&p.choose(&logits, &mut rng)));
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0f32, 1.0];
        let mut rng = fastrand::Rng::with_seed(3);
        let all = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
        let ones = (0..4000).filter(|_| all.choose(&logits, &mut rng) == 1).count();
        let expected = 4000.0 * 1f64.exp() / (1.0 + 1f64.exp());
        assert!((ones as f64 - expected).abs() < 150.0, "{ones} against {expected}");
    }
}

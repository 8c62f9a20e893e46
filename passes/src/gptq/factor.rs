//! The triangular factor of the inverse that compensation goes by, and its damping.

use rayon::prelude::*;

use super::cholesky;
use crate::dense::TILE;

/// The factor by which the raised damping grows.
const RAISE: f64 = 10.0;

/// What a damping of 0 is raised to first.
const LEAST: f64 = 1e-3;

/// The order of columns, and `U` with `(H + λI)⁻¹ = UᵀU` for `H` in that order.
#[derive(Clone, Debug, PartialEq)]
pub struct Factor {
    /// The column of the weight that is rounded first, second, ….
    pub order: Vec<usize>,
    /// `U`, `[cols, cols]`, upper triangular.
    pub upper: Vec<f32>,
    /// λ as a fraction of the mean of the diagonal: what was asked for, or more where that was not enough.
    pub damp: f64,
    /// Whether no token has anything in a channel, by column of the weight.
    pub dead: Vec<bool>,
}

/// Why there is no factor.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum FactorError {
    /// A Gram matrix that holds NaN or infinity.
    #[error("its input was not finite, channel {channel}")]
    NotFinite {
        /// The row of the matrix.
        channel: usize,
    },
    /// A Gram matrix of zeros.
    #[error("its input was always 0")]
    Silent,
    /// Not positive definite whatever the damping.
    #[error("the Gram matrix of its input is not positive definite, even with a damping of {damp}")]
    Indefinite {
        /// The last damping that was tried.
        damp: f64,
    },
}

impl Factor {
    /// Factors the Gram matrix `gram`, `[cols, cols]`. `damp` times the mean of its diagonal is added to the diagonal,
    /// and ten times as much as long as the sum is not positive definite, up to the mean itself. With `act_order`,
    /// columns come by falling energy of their channel, else as they are. A channel that is always 0 counts as one of
    /// mean energy that goes with no other.
    ///
    /// # Errors
    /// See [`FactorError`].
    ///
    /// # Panics
    /// When `gram` is not `cols` times `cols`: a fault of the caller, not of data.
    pub fn new(gram: &[f32], cols: usize, damp: f64, act_order: bool) -> Result<Self, FactorError> {
        assert!(gram.len() == cols * cols, "the Gram matrix has another size");
        if let Some(at) = gram.par_iter().position_first(|v| !v.is_finite()) {
            return Err(FactorError::NotFinite { channel: at / cols });
        }
        let diagonal: Vec<f64> = (0..cols).map(|c| f64::from(gram[c * cols + c])).collect();
        let dead: Vec<bool> = diagonal.iter().map(|d| *d <= 0.0).collect();
        let live = diagonal.iter().filter(|d| **d > 0.0);
        let (count, sum) = live.fold((0u32, 0.0), |(n, sum), d| (n + 1, sum + d));
        if count == 0 {
            return Err(FactorError::Silent);
        }
        let mean = sum / f64::from(count);
        let energy = |c: usize| if dead[c] { mean } else { diagonal[c] };
        let mut order: Vec<usize> = (0..cols).collect();
        if act_order {
            // Channels without signal last: their columns can make up for nothing.
            order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
        }
        let mut damp = damp;
        loop {
            // H = R Rᵀ with R upper triangular, and U = R⁻¹. Backwards, R is the usual lower factor.
            let mut a = vec![0.0f64; cols * cols];
            a.par_chunks_mut(cols).enumerate().for_each(|(i, row)| {
                let from = order[cols - 1 - i];
                for (j, v) in row[..i].iter_mut().enumerate() {
                    let to = order[cols - 1 - j];
                    *v = if dead[from] || dead[to] { 0.0 } else { f64::from(gram[from * cols + to]) };
                }
                row[i] = energy(from) + damp * mean;
            });
            if cholesky::factor(&mut a, cols).is_ok() {
                cholesky::invert(&mut a, cols);
                let mut upper = vec![0.0f32; cols * cols];
                upper.par_chunks_mut((TILE * cols).max(1)).enumerate().for_each(|(t, rows)| {
                    for (i, row) in (t * TILE..).zip(rows.chunks_mut(cols)) {
                        let from = &a[(cols - 1 - i) * cols..(cols - i) * cols];
                        row[i..].iter_mut().zip(from[..cols - i].iter().rev()).for_each(|(u, v)| *u = *v as f32);
                    }
                });
                return Ok(Self { order, upper, damp, dead });
            }
            if damp >= 1.0 {
                return Err(FactorError::Indefinite { damp });
            }
            damp = (damp * RAISE).clamp(LEAST, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Σ x xᵀ` over made-up tokens.
    fn gram(cols: usize, tokens: usize) -> Vec<f32> {
        let x = |t: usize, c: usize| ((t * 37 + c * 101 + t * c * 7) % 211) as f64 / 105.0 - 1.0;
        let at = |i: usize, j: usize| (0..tokens).map(|t| x(t, i) * x(t, j)).sum::<f64>();
        (0..cols * cols).map(|i| at(i / cols, i % cols) as f32).collect()
    }

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let cols = 300;
        let g = gram(cols, 500);
        let f = Factor::new(&g, cols, 0.01, true).unwrap();
        let mean = (0..cols).map(|c| f64::from(g[c * cols + c])).sum::<f64>() / cols as f64;
        let energy: Vec<f32> = f.order.iter().map(|c| g[c * cols + c]).collect();
        assert!(energy.is_sorted_by(|a, b| a >= b));
        let h =
            |i: usize, j: usize| f64::from(g[f.order[i] * cols + f.order[j]]) + if i == j { 0.01 * mean } else { 0.0 };
        let u = |i: usize, j: usize| f64::from(f.upper[i * cols + j]);
        // U H Uᵀ is the identity.
        for i in (0..cols).step_by(13) {
            let uh: Vec<f64> = (0..cols).map(|j| (i..cols).map(|k| u(i, k) * h(k, j)).sum()).collect();
            for j in 0..cols {
                let v: f64 = (j..cols).map(|k| uh[k] * u(j, k)).sum();
                assert!((v - if i == j { 1.0 } else { 0.0 }).abs() < 1e-3, "{i} {j} {v}");
            }
        }
        assert!((0..cols).all(|i| (0..i).all(|j| u(i, j) == 0.0)));
    }

    #[test]
    fn damping_is_raised_until_it_is_enough() {
        // Four tokens say nothing of most of ten channels.
        let f = Factor::new(&gram(10, 4), 10, 0.0, false).unwrap();
        assert_eq!(f.damp, LEAST);
        assert!(f.upper.iter().all(|v| v.is_finite()));
        // No Gram matrix at all: an indefinite one.
        let mut g = vec![0.0; 4];
        (g[0], g[1], g[2], g[3]) = (1.0, 5.0, 5.0, 1.0);
        assert_eq!(Factor::new(&g, 2, 0.01, false), Err(FactorError::Indefinite { damp: 1.0 }));
        g[1] = f32::NAN;
        assert_eq!(Factor::new(&g, 2, 0.01, false), Err(FactorError::NotFinite { channel: 0 }));
        assert_eq!(Factor::new(&[0.0; 4], 2, 0.01, true), Err(FactorError::Silent));
    }
}

//! Elementary functions and reductions in a form that compilers turn into SIMD code: no branches, no calls, fixed
//! lanes. [`simd`] compiles its closure once for each instruction set and chooses at run time.

/// Partial sums of a reduction: fixed, so that every machine adds in the same order.
pub const LANES: usize = 16;

/// Runs `f` compiled for the widest vectors of this machine. `f` and what it calls must be `#[inline(always)]`.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// eˣ to 2 units in the last place; 0 below −87.3 and +∞ above 88.7.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let bounded = x.clamp(-87.3, 88.7);
    let shifted = bounded * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (bounded - n * LN2_HI) - n * LN2_LO;
    // Taylor's series on |r| <= ln2/2: the seventh power is below one unit in the last place.
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = (p * r) * r + r + 1.0;
    // Times 2ⁿ, by adding n to the exponent, which stays one of a normal number: p is at least 1 where n is -126, and
    // below 1 where n is 128. The low bits of the shifted number are n.
    let n = shifted.to_bits().wrapping_sub(MAGIC.to_bits());
    let y = f32::from_bits(p.to_bits().wrapping_add(n << 23));
    let y = if x < -87.3 { 0.0 } else { y };
    let y = if x > 88.7 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent to about 3e-7 relative.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Near 0 the exponential form cancels; the series does not.
    let s = x * x;
    let series = x + x * s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))));
    let far = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    if s < 0.0625 { series } else { far }
}

/// The error function to 3e-7 absolute: Abramowitz & Stegun, formula 7.1.26, and its series (7.1.5) near 0, where that
/// formula cancels.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    const TWO_OVER_ROOT_PI: f32 = std::f32::consts::FRAC_2_SQRT_PI;
    let s = x * x;
    let series = 1.0 - s * (1.0 / 3.0 - s * (1.0 / 10.0 - s * (1.0 / 42.0 - s * (1.0 / 216.0 - s / 1320.0))));
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = 1.061_405_4 * t - 1.453_152;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_74;
    let p = p * t + 0.254_829_6;
    let y = 1.0 - p * t * exp(-s);
    let far = if x < 0.0 { -y } else { y };
    if a < 0.5 { TWO_OVER_ROOT_PI * x * series } else { far }
}

/// Sum of products.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    fold(sums) + rest
}

/// Sum.
#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            sums[i] += chunk[i];
        }
    }
    fold(sums) + rest.iter().sum::<f32>()
}

/// Largest number; −∞ for none.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            best[i] = if chunk[i] > best[i] { chunk[i] } else { best[i] };
        }
    }
    best.iter().chain(rest).fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m })
}

/// Partial sums added pairwise.
#[inline(always)]
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            sums[i] += sums[i + n];
        }
        n /= 2;
    }
    sums[0]
}

/// `row` becomes its softmax; a row that is −∞ throughout becomes 0.
#[inline(always)]
pub fn softmax(row: &mut [f32]) {
    let (_, total) = exponentials(row);
    let inverse = if total > 0.0 { 1.0 / total } else { total };
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

/// `row` becomes exp(row − top); gives `top` and the sum. `top` is the largest number if that is finite, and else 0.
#[inline(always)]
pub fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let top = max(row);
    let top = if top.is_finite() { top } else { 0.0 };
    for v in row.iter_mut() {
        *v = exp(*v - top);
    }
    (top, sum(row))
}

/// log Σ exp(row): with it, the log-probability of token `t` is `row[t] − log_sum_exp(row)`.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    simd(
        #[inline(always)]
        || {
            let top = max(row);
            if !top.is_finite() {
                return f64::from(top);
            }
            let mut sums = [0.0f32; LANES];
            let (chunks, rest) = row.as_chunks::<LANES>();
            for chunk in chunks {
                for i in 0..LANES {
                    sums[i] += exp(chunk[i] - top);
                }
            }
            let rest: f32 = rest.iter().map(|v| exp(v - top)).sum();
            f64::from(top) + f64::from(fold(sums) + rest).ln()
        },
    )
}

/// Whether no number is NaN or infinite.
pub(crate) fn all_finite(data: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    simd(
        #[inline(always)]
        || {
            let bad = |part: &[f32]| part.iter().fold(false, |bad, v| bad | (v.to_bits() & EXPONENT == EXPONENT));
            !data.chunks(1 << 12).any(bad)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(lo: f64, hi: f64) -> impl Iterator<Item = f64> {
        (0..=20_000).map(move |i| lo + (hi - lo) * f64::from(i) / 20_000.0).map(|x| f64::from(x as f32))
    }

    #[test]
    fn exp_is_accurate() {
        for x in grid(-87.0, 88.0) {
            let (got, want) = (f64::from(exp(x as f32)), x.exp());
            assert!((got - want).abs() <= 3e-7 * want, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_accurate() {
        for x in grid(-12.0, 12.0) {
            let (got, want) = (f64::from(tanh(x as f32)), x.tanh());
            assert!((got - want).abs() <= 4e-7 * want.abs(), "tanh({x}) = {got}, not {want}");
        }
        assert_eq!(tanh(100.0), 1.0);
        assert_eq!(tanh(-100.0), -1.0);
    }

    #[test]
    fn erf_is_accurate() {
        // Trapezoidal integral of the density as an independent reference.
        let (mut integral, step) = (0.0f64, 1e-4);
        let density = |x: f64| (-x * x).exp() * 2.0 / std::f64::consts::PI.sqrt();
        for i in 0..50_000 {
            let x = f64::from(i) * step;
            assert!((f64::from(erf(x as f32)) - integral).abs() < 4e-7, "erf({x})");
            assert_eq!(erf(-x as f32), -erf(x as f32));
            integral += step * (density(x) + density(x + step)) / 2.0;
        }
    }

    #[test]
    fn reductions_take_every_element() {
        let a: Vec<f32> = (1..=37).map(|i| i as f32).collect();
        assert_eq!(sum(&a), 703.0);
        assert_eq!(max(&a), 37.0);
        assert_eq!(dot(&a, &a), 17_575.0);
        let mut p = vec![1.0, f32::NEG_INFINITY, 1.0];
        softmax(&mut p);
        assert_eq!(p, [0.5, 0.0, 0.5]);
    }
}

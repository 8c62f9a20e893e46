//! Rotary frequencies and their scalings.

use std::f64::consts::TAU;

use awqc_ir::op::{RopeScaling, RopeTable};

/// The frequency of each pair in radians a position, and the factor on `cos` and `sin`, for a sequence of `len`
/// positions (its largest position plus one).
///
/// Two scalings depend on `len`: keys that a cache kept from a shorter sequence stay as they were turned then.
pub fn frequencies(op: &RopeTable, len: u64) -> (Vec<f64>, f64) {
    let pairs = op.dim / 2;
    let plain = |theta: f64| move |j: u64| theta.powf(-(2.0 * j as f64) / op.dim as f64);
    let base = plain(op.theta);
    match &op.scaling {
        None => ((0..pairs).map(base).collect(), 1.0),
        Some(RopeScaling::Linear { factor }) => ((0..pairs).map(|j| base(j) / factor).collect(), 1.0),
        Some(RopeScaling::Dynamic { factor, original }) => {
            let stretch = factor * (len as f64).max(*original) / original - (factor - 1.0);
            let dim = op.dim as f64;
            let theta = if op.dim > 2 { op.theta * stretch.powf(dim / (dim - 2.0)) } else { op.theta };
            ((0..pairs).map(plain(theta)).collect(), 1.0)
        }
        Some(RopeScaling::Bands { factor, low, high, original }) => {
            let band = |j| {
                let f = base(j);
                let wavelength = TAU / f;
                if wavelength > original / low {
                    f / factor
                } else if wavelength < original / high {
                    f
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            };
            ((0..pairs).map(band).collect(), 1.0)
        }
        Some(RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention, truncate }) => {
            let (start, end) = ramp(op, *original, *beta_fast, *beta_slow, *truncate);
            let part = |j: u64| {
                let interpolated = ((j as f64 - start) / (end - start)).clamp(0.0, 1.0);
                base(j) * ((1.0 - interpolated) + interpolated / factor)
            };
            ((0..pairs).map(part).collect(), *attention)
        }
        Some(RopeScaling::Long { short, long, original, attention }) => {
            let divisors = if len as f64 > *original { long } else { short };
            ((0..pairs).zip(divisors).map(|(j, d)| base(j) / d).collect(), *attention)
        }
    }
}

/// The pairs between which YaRN goes from extrapolation to interpolation (arXiv 2309.00071, section 3.2): those that
/// turn `fast` and `slow` times over the trained context.
fn ramp(op: &RopeTable, original: f64, fast: f64, slow: f64, truncate: bool) -> (f64, f64) {
    let dim = op.dim as f64;
    let pair = |turns: f64| dim * (original / (turns * TAU)).ln() / (2.0 * op.theta.ln());
    let (mut start, mut end) = (pair(fast), pair(slow));
    if truncate {
        (start, end) = (start.floor(), end.ceil());
    }
    let (start, end) = (start.max(0.0), end.min(dim - 1.0));
    // A ramp of no length would divide by zero.
    (start, if start == end { end + 0.001 } else { end })
}

/// Cosine and sine of each pair at a position, times `factor`. The angles are f64: at long contexts f32 products of
/// position and frequency are off by more than the rounding of the result.
pub fn angles(frequencies: &[f64], factor: f64, position: i64) -> impl Iterator<Item = (f32, f32)> {
    frequencies.iter().map(move |f| {
        let angle = position as f64 * f;
        ((angle.cos() * factor) as f32, (angle.sin() * factor) as f32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(dim: u64, theta: f64, scaling: Option<RopeScaling>) -> RopeTable {
        RopeTable { dim, theta, scaling }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-9 * b.abs().max(1e-12), "{a} is not {b}");
    }

    #[test]
    fn plain_and_linear() {
        let (f, m) = frequencies(&table(4, 10000.0, None), 9);
        close(f[0], 1.0);
        close(f[1], 0.01);
        close(m, 1.0);
        let (g, _) = frequencies(&table(4, 10000.0, Some(RopeScaling::Linear { factor: 4.0 })), 9);
        close(g[1], 0.0025);
    }

    #[test]
    fn dynamic_starts_beyond_the_trained_length() {
        let op = table(8, 10000.0, Some(RopeScaling::Dynamic { factor: 2.0, original: 16.0 }));
        assert_eq!(frequencies(&op, 16).0, frequencies(&table(8, 10000.0, None), 16).0);
        // len 32: the base grows by (2·32/16 − 1)^(8/6) = 3^(4/3).
        let want = frequencies(&table(8, 10000.0 * 3f64.powf(4.0 / 3.0), None), 32).0;
        frequencies(&op, 32).0.iter().zip(&want).for_each(|(a, b)| close(*a, *b));
    }

    #[test]
    fn bands_keep_short_and_stretch_long_waves() {
        let scaling = RopeScaling::Bands { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let (plain, _) = frequencies(&table(128, 500000.0, None), 1);
        let (f, _) = frequencies(&table(128, 500000.0, Some(scaling)), 1);
        close(f[0], plain[0]);
        close(f[63], plain[63] / 8.0);
        let middle = (0..64).filter(|j| (2048.0..=8192.0).contains(&(TAU / plain[*j]))).count();
        assert!(middle > 0);
        assert!(f.windows(2).all(|w| w[1] < w[0]), "the blend is monotone");
    }

    #[test]
    fn yarn_interpolates_slow_pairs_only() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original: 2048.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention: 1.25,
            truncate: true,
        };
        let (plain, _) = frequencies(&table(64, 10000.0, None), 1);
        let (f, m) = frequencies(&table(64, 10000.0, Some(scaling)), 1);
        close(m, 1.25);
        // floor(pair(32)) = 8, ceil(pair(1)) = 21.
        close(f[8], plain[8]);
        close(f[21], plain[21] / 4.0);
        assert!(f[15] < plain[15] && f[15] > plain[15] / 4.0);
    }

    #[test]
    fn long_switches_beyond_the_trained_length() {
        let scaling = RopeScaling::Long { short: vec![1.0, 2.0], long: vec![4.0, 8.0], original: 10.0, attention: 1.1 };
        let op = table(4, 10000.0, Some(scaling));
        let (f, m) = frequencies(&op, 10);
        close(f[1], 0.01 / 2.0);
        close(m, 1.1);
        close(frequencies(&op, 11).0[1], 0.01 / 8.0);
    }
}

//! The inner loops of quantization, compiled for several instruction sets from one source and chosen at run time.
//!
//! Every version does the same f32 operations in the same order (no fused multiply-add, sums in fixed lanes), so the
//! results do not depend on the machine.

use awqc_ir::Quant;

use super::Grid;

/// Makes `name(args)` run `body(args)` compiled for AVX-512, AVX2 or the baseline, whichever the machine has.
macro_rules! versions {
    ($($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:path;)*) => {$(
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the machine has every feature that the function is compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the machine has the feature that the function is compiled for.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    )*};
}

pub(crate) use versions;

versions! {
    /// Smallest and largest number of a slice; `(∞, −∞)` for none.
    pub fn range(w: &[f32]) -> (f32, f32) = range_body;

    /// The stored codes of one group.
    pub fn codes(w: &[f32], grid: Grid, out: &mut [u8]) = codes_body;

    /// For one row, what rounding does to it when its columns are scaled: `out = Q(w · s) / s − w`. `inverse` is `1/s`.
    pub fn scaled_error(w: &[f32], s: &[f32], inverse: &[f32], quant: Quant, out: &mut [f32]) = scaled_error_body;

    /// For one group and several bounds: `out = Q(clip(w)) − w`, `[bounds, group]`. Bounds are `(lo, hi)` with
    /// `lo <= 0 <= hi`, inside the group's range or at its ends.
    pub fn clipped_errors(w: &[f32], bounds: &[(f32, f32)], quant: Quant, out: &mut [f32]) = clipped_errors_body;

    /// For each row `d` of `delta`, with the row `y` of `image` that belongs to it: `out = Σ d (y + 2 linear)`, in f32.
    /// There are as many rows as `out` is long; an empty `linear` counts as 0.
    pub fn forms(delta: &[f32], image: &[f32], linear: &[f32], out: &mut [f32]) = forms_body;

    /// `Σ a b`, products and sum in f64.
    pub fn dot(a: &[f32], b: &[f32]) -> f64 = dot_body;
}

const LANES: usize = 16;

#[inline(always)]
fn range_body(w: &[f32]) -> (f32, f32) {
    let (mut lo, mut hi) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (chunks, rest) = w.as_chunks::<LANES>();
    for c in chunks {
        for i in 0..LANES {
            lo[i] = if c[i] < lo[i] { c[i] } else { lo[i] };
            hi[i] = if c[i] > hi[i] { c[i] } else { hi[i] };
        }
    }
    let rest = rest.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
    lo.iter().zip(&hi).fold(rest, |(a, b), (lo, hi)| (a.min(*lo), b.max(*hi)))
}

#[inline(always)]
fn codes_body(w: &[f32], grid: Grid, out: &mut [u8]) {
    for (o, w) in out.iter_mut().zip(w) {
        *o = grid.code(*w) as u8;
    }
}

#[inline(always)]
fn clipped_errors_body(w: &[f32], bounds: &[(f32, f32)], quant: Quant, out: &mut [f32]) {
    for ((lo, hi), out) in bounds.iter().zip(out.chunks_exact_mut(w.len().max(1))) {
        let grid = Grid::spanning(quant, *lo, *hi);
        for (o, w) in out.iter_mut().zip(w) {
            let clipped = if *w < *lo { *lo } else { *w };
            let clipped = if clipped > *hi { *hi } else { clipped };
            *o = grid.round(clipped) - w;
        }
    }
}

#[inline(always)]
fn scaled_error_body(w: &[f32], s: &[f32], inverse: &[f32], quant: Quant, out: &mut [f32]) {
    let len = quant.group.len(w.len());
    let groups = w.chunks(len).zip(s.chunks(len)).zip(inverse.chunks(len)).zip(out.chunks_mut(len));
    for (((w, s), inverse), out) in groups {
        for ((o, w), s) in out.iter_mut().zip(w).zip(s) {
            *o = w * s;
        }
        let (lo, hi) = range_body(out);
        let grid = Grid::spanning(quant, lo, hi);
        for (o, i) in out.iter_mut().zip(inverse) {
            *o = (grid.round(*o) - *o) * i;
        }
    }
}

#[inline(always)]
fn forms_body(delta: &[f32], image: &[f32], linear: &[f32], out: &mut [f32]) {
    let n = (delta.len() / out.len().max(1)).max(1);
    for ((d, y), out) in delta.chunks_exact(n).zip(image.chunks_exact(n)).zip(out) {
        *out = dot32(d, y) + 2.0 * dot32(d, linear);
    }
}

#[inline(always)]
fn dot32(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = [0.0f32; LANES];
    let ((ca, ra), (cb, rb)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in ca.iter().zip(cb) {
        for i in 0..LANES {
            sum[i] += a[i] * b[i];
        }
    }
    let rest: f32 = ra.iter().zip(rb).map(|(a, b)| a * b).sum();
    sum.iter().sum::<f32>() + rest
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sum = [0.0f64; LANES];
    let ((ca, ra), (cb, rb)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in ca.iter().zip(cb) {
        for i in 0..LANES {
            sum[i] += f64::from(a[i]) * f64::from(b[i]);
        }
    }
    let rest: f64 = ra.iter().zip(rb).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    sum.iter().sum::<f64>() + rest
}

//! Products with a weight matrix: `gemm` for many rows, dot products for few.

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use super::math::{dot, simd};

/// Rows that one task multiplies. Fixed: a different cut could change the order of additions.
const ROWS: usize = 256;
/// Up to this many rows the product reads each weight once and is bound by memory: dot products do.
const FEW: usize = 4;
/// Output channels of one task of dot products.
const COLUMNS: usize = 128;

/// A matrix inside a slice: element `(r, c)` at `r · row + c · col`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) col: usize,
}

/// What happens with the old content of the destination of [`product`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Into {
    /// It is replaced.
    Replace,
    /// The product is added to it.
    Accumulate,
}

/// The last element that a `rows × cols` matrix of these strides touches, plus one.
fn span(rows: usize, cols: usize, row: usize, col: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row + (cols - 1) * col + 1 }
}

/// `out[m,n] (+)= factor · a[m,k] · b[k,n]` on the calling thread; rows of `out` are `stride` apart.
///
/// # Panics
/// When a slice is shorter than its matrix.
#[allow(clippy::too_many_arguments)]
pub(crate) fn product(m: usize, n: usize, k: usize, out: &mut [f32], stride: usize, into: Into, a: Mat<'_>, b: Mat<'_>, factor: f32) {
    assert!(out.len() >= span(m, n, stride, 1), "the destination is too short");
    assert!(a.data.len() >= span(m, k, a.row, a.col), "the left matrix is too short");
    assert!(b.data.len() >= span(k, n, b.row, b.col), "the right matrix is too short");
    let accumulate = into == Into::Accumulate;
    // SAFETY: the three assertions bound every address that the strides can form, `out` is borrowed mutably and so
    // aliases neither input, and rows of `out` do not overlap because callers pass `stride >= n` (checked here).
    unsafe {
        assert!(stride >= n || m <= 1, "rows of the destination overlap");
        gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            1.0,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `x[m,k] · w[n,k]ᵀ + bias[n]`, `[m,n]`.
pub(crate) fn linear(x: &[f32], w: &[f32], bias: Option<&[f32]>, n: usize, k: usize) -> Vec<f32> {
    let m = x.len() / k.max(1);
    if m <= FEW {
        return few(x, w, bias, m, n, k);
    }
    let mut out = vec![0.0; m * n];
    out.par_chunks_mut((ROWS * n).max(1)).zip(x.par_chunks((ROWS * k).max(1))).for_each(|(out, x)| {
        let into = match bias {
            Some(bias) => {
                out.chunks_mut(n).for_each(|row| row.copy_from_slice(bias));
                Into::Accumulate
            }
            None => Into::Replace,
        };
        let (a, b) = (Mat { data: x, row: k, col: 1 }, Mat { data: w, row: 1, col: k });
        product(x.len() / k, n, k, out, n, into, a, b, 1.0);
    });
    out
}

fn few(x: &[f32], w: &[f32], bias: Option<&[f32]>, m: usize, n: usize, k: usize) -> Vec<f32> {
    // Channel-major first, so that each task owns a contiguous piece.
    let mut turned = vec![0.0; n * m];
    turned.par_chunks_mut((COLUMNS * m).max(1)).enumerate().for_each(|(block, out)| {
        simd(
            #[inline(always)]
            || {
                for (i, cell) in out.chunks_exact_mut(m).enumerate() {
                    let c = block * COLUMNS + i;
                    let (row, start) = (&w[c * k..(c + 1) * k], bias.map_or(0.0, |b| b[c]));
                    for (r, y) in cell.iter_mut().enumerate() {
                        *y = start + dot(&x[r * k..(r + 1) * k], row);
                    }
                }
            },
        );
    });
    if m == 1 {
        return turned;
    }
    (0..m * n).map(|at| turned[(at % n) * m + at / n]).collect()
}

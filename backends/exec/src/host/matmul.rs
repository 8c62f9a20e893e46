//! Products with a weight matrix: `gemm` for many rows, dot products for few.

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use super::math::{dot, simd};

/// Largest tile of the output that one task computes. Tiles depend on the shape alone, never on the number of threads:
/// another cut could change the order of additions. They are wide in rows because every task packs its weights anew.
const ROWS: usize = 512;
const COLUMNS: usize = 512;
/// Up to this many rows the product reads each weight once and is bound by memory: dot products do.
const FEW: usize = 4;
/// Output channels of one task of dot products.
const DOTS: usize = 128;

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
/// When a slice is shorter than its matrix, or rows of the destination overlap.
#[allow(clippy::too_many_arguments)]
pub(crate) fn product(
    m: usize,
    n: usize,
    k: usize,
    out: &mut [f32],
    stride: usize,
    into: Into,
    a: Mat<'_>,
    b: Mat<'_>,
    factor: f32,
) {
    assert!(out.len() >= span(m, n, stride, 1), "the destination is too short");
    assert!(stride >= n || m <= 1, "rows of the destination overlap");
    let out = Target(out.as_mut_ptr());
    // SAFETY: the assertions bound the tile, and `out` is borrowed mutably for the whole call.
    unsafe { out.product(m, n, k, stride, into, a, b, factor) }
}

/// `out[m,n] = x[m,k] · w[n,k]ᵀ` on the calling thread.
///
/// # Panics
/// When a slice is too short.
pub fn product_with_transposed(m: usize, n: usize, k: usize, x: &[f32], w: &[f32], out: &mut [f32]) {
    let (x, w) = (Mat { data: x, row: k, col: 1 }, Mat { data: w, row: 1, col: k });
    product(m, n, k, out, n, Into::Replace, x, w, 1.0);
}

/// Where a tile of a shared output begins.
#[derive(Clone, Copy)]
struct Target(*mut f32);

// SAFETY: whoever sends a target to other threads gives each of them a tile of its own, see `linear`.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// The tile that begins `offset` elements later.
    ///
    /// # Safety
    /// The offset must lie inside the same allocation.
    unsafe fn at(self, offset: usize) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { self.0.add(offset) })
    }

    /// As [`product`], into the tile that begins here.
    ///
    /// # Safety
    /// The tile, `m` rows of `n` elements `stride >= n` apart, must be inside one live allocation, and nothing else
    /// may read or write it during the call.
    ///
    /// # Panics
    /// When `a` or `b` is shorter than its matrix.
    #[allow(clippy::too_many_arguments)]
    unsafe fn product(
        self,
        m: usize,
        n: usize,
        k: usize,
        stride: usize,
        into: Into,
        a: Mat<'_>,
        b: Mat<'_>,
        factor: f32,
    ) {
        assert!(a.data.len() >= span(m, k, a.row, a.col), "the left matrix is too short");
        assert!(b.data.len() >= span(k, n, b.row, b.col), "the right matrix is too short");
        // SAFETY: the assertions bound every address of the inputs that the strides can form, the caller bounds those
        // of the destination and promises that nothing else touches it.
        unsafe {
            gemm(
                m,
                n,
                k,
                self.0,
                1,
                stride as isize,
                into == Into::Accumulate,
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
}

/// `x[m,k] · w[n,k]ᵀ + bias[n]`, `[m,n]`.
pub(crate) fn linear(x: &[f32], w: &[f32], bias: Option<&[f32]>, n: usize, k: usize) -> Vec<f32> {
    let m = x.len() / k.max(1);
    if m <= FEW {
        return few(x, w, bias, m, n, k);
    }
    assert!(w.len() >= n * k && bias.is_none_or(|b| b.len() == n), "the weight or bias is too short");
    let mut out = vec![0.0; m * n];
    let into = match bias {
        Some(bias) => {
            out.chunks_mut(n.max(1)).for_each(|row| row.copy_from_slice(bias));
            Into::Accumulate
        }
        None => Into::Replace,
    };
    let (rows, columns) = (even(m, ROWS), even(n, COLUMNS));
    let tiles = |r: usize| (0..n).step_by(columns).map(move |c| (r, c));
    let tiles: Vec<(usize, usize)> = (0..m).step_by(rows).flat_map(tiles).collect();
    let target = Target(out.as_mut_ptr());
    tiles.into_par_iter().for_each(|(r, c)| {
        let (rows, columns) = (rows.min(m - r), columns.min(n - c));
        let a = Mat { data: &x[r * k..(r + rows) * k], row: k, col: 1 };
        let b = Mat { data: &w[c * k..(c + columns) * k], row: 1, col: k };
        // SAFETY: the tiles cut `out`, `m` rows of `n`, without overlap: each task writes its own, and `out` is not
        // touched otherwise until all are done.
        unsafe { target.at(r * n + c).product(rows, columns, k, n, into, a, b, 1.0) }
    });
    out
}

/// The size of a piece when `len` is cut into as few equal pieces of at most `most` as possible, rounded up to whole
/// cache lines.
fn even(len: usize, most: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1)).next_multiple_of(16).max(16)
}

fn few(x: &[f32], w: &[f32], bias: Option<&[f32]>, m: usize, n: usize, k: usize) -> Vec<f32> {
    // Channel-major first, so that each task owns a contiguous piece.
    let mut turned = vec![0.0; n * m];
    turned.par_chunks_mut((DOTS * m).max(1)).enumerate().for_each(|(block, out)| {
        simd(
            #[inline(always)]
            || {
                for (i, cell) in out.chunks_exact_mut(m).enumerate() {
                    let c = block * DOTS + i;
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

//! Dense matrix products over the `gemm` crate. Work is cut into fixed tiles whatever the number of threads, each
//! tile is computed by one thread, and sums over tiles run in tile order: the same inputs give the same bits.

use gemm::Parallelism;
use rayon::prelude::*;

use crate::rtn::kernel;

/// Rows of a tile: enough to reuse the right side from cache, few enough to keep several threads busy.
pub const TILE: usize = 96;

/// Columns that the quadratic form takes at a time. The form's matrix is symmetric, so each block needs only the part
/// of it above and on its diagonal.
const BLOCK: usize = 128;

/// The numbers that matrices are of.
pub trait Real: Copy + Send + Sync + 'static {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

/// A row-major matrix inside a slice: element `(i, j)` is `data[i * stride + j]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T = f32> {
    /// The numbers.
    pub data: &'a [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Distance between rows.
    pub stride: usize,
}

impl<'a, T: Real> View<'a, T> {
    /// A whole matrix `[rows, cols]`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, stride: cols }
    }

    /// The block of `rows` × `cols` from row `r` and column `c`.
    pub fn block(self, r: usize, c: usize, rows: usize, cols: usize) -> Self {
        let at = r * self.stride + c;
        Self { data: self.data.get(at..).unwrap_or(&[]), rows, cols, stride: self.stride }
    }

    fn fits(self) -> bool {
        extent(self.rows, self.cols, self.stride) <= self.data.len()
    }
}

fn extent(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// Whether a product replaces or adds to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// `out = a b`.
    Replace,
    /// `out += a b`.
    Add,
}

/// `a b` into `out`, rows of which are `stride` apart, on the calling thread.
///
/// # Panics
/// When the shapes do not fit each other or the slices: a fault of the caller, not of data.
pub fn product<T: Real>(a: View<'_, T>, b: View<'_, T>, out: &mut [T], stride: usize, put: Put) {
    assert!(a.cols == b.rows && a.fits() && b.fits(), "the factors do not fit");
    assert!(extent(a.rows, b.cols, stride) <= out.len(), "the product does not fit its place");
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    let alpha = match put {
        Put::Replace => T::ZERO,
        Put::Add => T::ONE,
    };
    // SAFETY: the three slices hold every element that the shapes and strides reach, as asserted above, and `out` is
    // borrowed mutably, so it does not overlap the factors.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            stride as isize,
            put == Put::Add,
            a.data.as_ptr(),
            1,
            a.stride as isize,
            b.data.as_ptr(),
            1,
            b.stride as isize,
            alpha,
            T::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `a b`, `[a.rows, b.cols]`, on all threads.
pub fn matmul(a: View<'_>, b: View<'_>) -> Vec<f32> {
    let mut out = vec![0.0; a.rows * b.cols];
    if b.cols > 0 {
        out.par_chunks_mut(TILE * b.cols).enumerate().for_each(|(t, out)| {
            let rows = out.len() / b.cols;
            product(a.block(t * TILE, 0, rows, a.cols), b, out, b.cols, Put::Replace);
        });
    }
    out
}

/// `dᵀ G d` for each row `d` of `d`, `[rows, c]`, on the calling thread. `gram` is `G`, `[c, c]`, symmetric.
/// `scratch` is reused between calls.
pub fn quadratic(d: View<'_>, gram: &[f32], scratch: &mut Vec<f32>) -> Vec<f64> {
    let c = d.cols;
    let g = View::new(gram, c, c);
    scratch.resize(d.rows * BLOCK.min(c), 0.0);
    let mut sums = vec![0.0f64; d.rows];
    for start in (0..c).step_by(BLOCK) {
        let n = BLOCK.min(c - start);
        // Twice the part above the diagonal block, once the block itself.
        if start > 0 {
            product(d.block(0, 0, d.rows, start), g.block(0, start, start, n), scratch, n, Put::Replace);
            add_dots(d.block(0, start, d.rows, n), scratch, 2.0, &mut sums);
        }
        product(d.block(0, start, d.rows, n), g.block(start, start, n, n), scratch, n, Put::Replace);
        add_dots(d.block(0, start, d.rows, n), scratch, 1.0, &mut sums);
    }
    sums
}

fn add_dots(d: View<'_>, p: &[f32], factor: f64, sums: &mut [f64]) {
    for (i, (sum, p)) in sums.iter_mut().zip(p.chunks(d.cols.max(1))).enumerate() {
        let at = i * d.stride;
        *sum += factor * kernel::dot(&d.data[at..at + d.cols], p);
    }
}

/// `tr(D G Dᵀ)`: the squared output error that an error `D`, `[rows, c]`, of a weight makes over all tokens whose Gram
/// matrix is `gram`, `[c, c]`. On all threads.
pub fn energy(d: &[f32], c: usize, gram: &[f32]) -> f64 {
    if c == 0 {
        return 0.0;
    }
    let tiles: Vec<f64> = d
        .par_chunks(TILE * c)
        .map_init(Vec::new, |scratch, d| quadratic(View::new(d, d.len() / c, c), gram, scratch).iter().sum())
        .collect();
    tiles.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn naive(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f64> {
        let at = |i: usize, j: usize| (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j])).sum();
        (0..m * n).map(|i| at(i / n, i % n)).collect()
    }

    #[test]
    fn matmul_is_the_product() {
        let (m, k, n) = (2 * TILE + 5, 37, 19);
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let got = matmul(View::new(&a, m, k), View::new(&b, k, n));
        for (got, want) in got.iter().zip(naive(&a, &b, m, k, n)) {
            assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
        }
    }

    #[test]
    fn add_adds_to_a_strided_place() {
        let mut out = vec![1.0; 8];
        product(View::new(&[2.0, 3.0], 2, 1), View::new(&[10.0, 100.0], 1, 2), &mut out, 5, Put::Add);
        assert_eq!(out, [21.0, 201.0, 1.0, 1.0, 1.0, 31.0, 301.0, 1.0]);
    }

    #[test]
    fn energy_sums_the_quadratic_form_over_blocks_and_tiles() {
        let (rows, c, tokens) = (TILE + 7, 2 * BLOCK + 33, 40);
        let (d, x) = (numbers(rows * c, 3), numbers(tokens * c, 4));
        let xt: Vec<f32> = (0..c * tokens).map(|i| x[(i % tokens) * c + i / tokens]).collect();
        let gram = matmul(View::new(&xt, c, tokens), View::new(&x, tokens, c));
        let y = naive(&d, &xt, rows, c, tokens);
        let want: f64 = y.iter().map(|v| v * v).sum();
        let got = energy(&d, c, &gram);
        assert!((got / want - 1.0).abs() < 1e-5, "{got} {want}");
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let (rows, c) = (5 * TILE + 1, 70);
        let (d, g) = (numbers(rows * c, 5), numbers(c * c, 6));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| (energy(&d, c, &g), matmul(View::new(&d, rows, c), View::new(&g, c, c))))
        };
        assert_eq!(run(1), run(3));
    }
}

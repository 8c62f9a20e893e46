//! Cholesky's factor of a positive definite matrix, and the inverse of a triangular one, in f64.
//!
//! Both go block by block: a small block on one thread, then products over fixed tiles on all. The same input gives the
//! same bits whatever the number of threads.

use rayon::prelude::*;

use crate::dense::{Put, TILE, View, product};

/// Rows and columns of a block.
const BLOCK: usize = 128;

/// A pivot below this share of what the diagonal was is rounding noise: the entries come from f32.
const NOISE: f64 = 1e-7;

/// The matrix is not positive definite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Indefinite;

/// Replaces the lower triangle of `a`, `[n, n]`, by `L` with `L Lᵀ = a`. What is above the diagonal is not read, and
/// stays. On an error, `a` is left half done.
pub(super) fn factor(a: &mut [f64], n: usize) -> Result<(), Indefinite> {
    let diagonal: Vec<f64> = (0..n).map(|i| a[i * n + i]).collect();
    for start in (0..n).step_by(BLOCK) {
        let size = BLOCK.min(n - start);
        let end = start + size;
        let mut block = take(a, n, start, size);
        factor_small(&mut block, size, &diagonal[start..end])?;
        put(a, n, start, &block, size);
        if end == n {
            break;
        }
        invert_small(&mut block, size);
        // The panel below: P = A L⁻ᵀ.
        let mut turned = vec![0.0; size * size];
        (0..size * size).for_each(|i| turned[i % size * size + i / size] = block[i]);
        let below = n - end;
        let mut panel = vec![0.0; below * size];
        let (tiles, strips) = (a[end * n..].par_chunks_mut(TILE * n), panel.par_chunks_mut(TILE * size));
        tiles.zip(strips).for_each(|(a, p)| {
            let rows = p.len() / size;
            let old = View { data: &a[start..], rows, cols: size, stride: n };
            product(old, View::new(&turned, size, size), p, size, Put::Replace);
            a.chunks_mut(n).zip(p.chunks(size)).for_each(|(a, p)| a[start..end].copy_from_slice(p));
        });
        // What is right of it: A − P Pᵀ, up to the diagonal.
        let mut minus = vec![0.0; below * size];
        minus.par_chunks_mut(below).enumerate().for_each(|(k, row)| {
            row.iter_mut().zip(panel.chunks(size)).for_each(|(m, p)| *m = -p[k]);
        });
        a[end * n..].par_chunks_mut(TILE * n).enumerate().for_each(|(t, a)| {
            let rows = a.len() / n;
            let left = View::new(&panel, below, size).block(t * TILE, 0, rows, size);
            let right = View::new(&minus, size, below).block(0, 0, size, t * TILE + rows);
            product(left, right, &mut a[end..], n, Put::Add);
        });
    }
    Ok(())
}

/// Replaces a lower triangular matrix, the lower triangle of `a`, `[n, n]`, by its inverse, with zeros above the
/// diagonal in each block on it.
pub(super) fn invert(a: &mut [f64], n: usize) {
    for start in (0..n).step_by(BLOCK) {
        let size = BLOCK.min(n - start);
        let mut block = take(a, n, start, size);
        invert_small(&mut block, size);
        // Left of the diagonal: −(block's inverse) · L · (the inverse so far).
        let (above, rows) = a.split_at_mut(start * n);
        block.iter_mut().for_each(|v| *v = -*v);
        let mut scaled = vec![0.0; size * start];
        let old = View { data: rows, rows: size, cols: start, stride: n };
        scaled.par_chunks_mut(TILE * start.max(1)).enumerate().for_each(|(t, out)| {
            let count = out.len() / start;
            let left = View::new(&block, size, size).block(t * TILE, 0, count, size);
            product(left, old, out, start, Put::Replace);
        });
        block.iter_mut().for_each(|v| *v = -*v);
        let above = View { data: &*above, rows: start, cols: start, stride: n };
        let columns: Vec<usize> = (0..start).step_by(BLOCK).collect();
        let found: Vec<Vec<f64>> = columns
            .par_iter()
            .map(|c| {
                // Above its diagonal block, a column of blocks is 0.
                let (deep, wide) = (start - c, BLOCK.min(start - c));
                let mut out = vec![0.0; size * wide];
                let left = View::new(&scaled, size, start).block(0, *c, size, deep);
                product(left, above.block(*c, *c, deep, wide), &mut out, wide, Put::Replace);
                out
            })
            .collect();
        for (c, found) in columns.into_iter().zip(found) {
            let wide = BLOCK.min(start - c);
            rows.chunks_mut(n).zip(found.chunks(wide)).for_each(|(row, v)| row[c..c + wide].copy_from_slice(v));
        }
        put(a, n, start, &block, size);
    }
}

/// The block of `size` on the diagonal, with zeros above.
fn take(a: &[f64], n: usize, start: usize, size: usize) -> Vec<f64> {
    let mut block = vec![0.0; size * size];
    for (i, row) in block.chunks_mut(size).enumerate() {
        row[..=i].copy_from_slice(&a[(start + i) * n + start..][..=i]);
    }
    block
}

fn put(a: &mut [f64], n: usize, start: usize, block: &[f64], size: usize) {
    for (i, row) in block.chunks(size).enumerate() {
        a[(start + i) * n + start..][..size].copy_from_slice(row);
    }
}

fn factor_small(a: &mut [f64], n: usize, diagonal: &[f64]) -> Result<(), Indefinite> {
    for i in 0..n {
        let (done, rest) = a.split_at_mut(i * n);
        let row = &mut rest[..n];
        for (j, other) in done.chunks(n).enumerate() {
            let sum: f64 = row[..j].iter().zip(&other[..j]).map(|(a, b)| a * b).sum();
            row[j] = (row[j] - sum) / other[j];
        }
        let pivot = row[i] - row[..i].iter().map(|v| v * v).sum::<f64>();
        // False for NaN too.
        let sound = pivot > NOISE * diagonal[i];
        if !sound {
            return Err(Indefinite);
        }
        row[i] = pivot.sqrt();
    }
    Ok(())
}

fn invert_small(a: &mut [f64], n: usize) {
    for i in 0..n {
        let (done, rest) = a.split_at_mut(i * n);
        let row = &mut rest[..n];
        let pivot = row[i];
        let old = row[..i].to_vec();
        row[..i].fill(0.0);
        for (l, other) in old.iter().zip(done.chunks(n)) {
            row[..i].iter_mut().zip(other).for_each(|(r, v)| *r -= l * v);
        }
        row[..i].iter_mut().for_each(|v| *v /= pivot);
        row[i] = 1.0 / pivot;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lower triangle that is well conditioned, and garbage above it.
    fn lower(n: usize) -> Vec<f64> {
        let at = |i: usize, j: usize| match i.cmp(&j) {
            std::cmp::Ordering::Less => 9.0,
            std::cmp::Ordering::Equal => 2.0 + (i % 5) as f64,
            std::cmp::Ordering::Greater => ((i * 31 + j * 17 + i * j) % 23) as f64 / 23.0 / (n as f64).sqrt(),
        };
        (0..n * n).map(|i| at(i / n, i % n)).collect()
    }

    fn square(l: &[f64], n: usize) -> Vec<f64> {
        let at = |i: usize, j: usize| (0..=i.min(j)).map(|k| l[i * n + k] * l[j * n + k]).sum();
        (0..n * n).map(|i| at(i / n, i % n)).collect()
    }

    #[test]
    fn the_factor_of_a_square_is_the_root() {
        for n in [1, 7, BLOCK, 2 * BLOCK + 77] {
            let l = lower(n);
            let mut a = square(&l, n);
            factor(&mut a, n).unwrap();
            for i in 0..n {
                (0..=i).for_each(|j| assert!((a[i * n + j] - l[i * n + j]).abs() < 1e-9, "{n} {i} {j}"));
            }
        }
    }

    #[test]
    fn the_inverse_undoes_the_triangle() {
        for n in [1, 7, BLOCK, 3 * BLOCK + 50] {
            let l = lower(n);
            let mut x = l.clone();
            invert(&mut x, n);
            for i in 0..n {
                for j in 0..=i {
                    let v: f64 = (j..=i).map(|k| l[i * n + k] * x[k * n + j]).sum();
                    assert!((v - if i == j { 1.0 } else { 0.0 }).abs() < 1e-9, "{n} {i} {j}");
                }
            }
        }
    }

    #[test]
    fn what_is_indefinite_is_refused() {
        assert_eq!(factor(&mut [1.0, 0.0, 2.0, 1.0], 2), Err(Indefinite));
        assert_eq!(factor(&mut [f64::NAN], 1), Err(Indefinite));
        assert_eq!(factor(&mut [0.0], 1), Err(Indefinite));
        let n = 2 * BLOCK;
        let mut a = square(&lower(n), n);
        a[(n - 1) * n + n - 1] -= 40.0;
        assert_eq!(factor(&mut a, n), Err(Indefinite));
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        let n = 2 * BLOCK + 100;
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut a = square(&lower(n), n);
                factor(&mut a, n).unwrap();
                invert(&mut a, n);
                a
            })
        };
        assert_eq!(run(1), run(3));
    }
}

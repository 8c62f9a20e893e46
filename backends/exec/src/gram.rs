//! Sums over tokens: the Gram matrix `Σ x xᵀ` and the moments that calibration keeps.

use awqc_passes::InputStats;
use rayon::prelude::*;

use crate::host::math::simd;
use crate::host::matmul::{Into, Mat, product};

/// Largest side of a tile of the Gram matrix.
const TILE: usize = 256;
/// Rows whose |x| are added in f32 before they go to the f64 total.
const ROWS: usize = 256;

/// Which rows are sampled: one of so many, so that `tokens` give about `samples`.
pub(crate) fn stride(tokens: u64, samples: usize) -> u64 {
    tokens.div_ceil(samples.max(1) as u64).max(1)
}

/// Makes a `[c,c]` matrix symmetric: its upper triangle decides.
pub(crate) fn mirror(gram: &mut [f32], c: usize) {
    for i in 0..c {
        for j in 0..i {
            gram[i * c + j] = gram[j * c + i];
        }
    }
}

/// One block of the upper triangle.
struct Tile {
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

/// Statistics of one value under construction. Blocks of rows are added in order; the cut into tiles depends on the
/// number of channels alone, so the sums do not depend on the number of threads.
pub struct Accumulator {
    channels: usize,
    tiles: Vec<Tile>,
    tokens: u64,
    sum_abs: Vec<f64>,
    max_abs: Vec<f32>,
    sample: Vec<f32>,
    /// Every `stride`-th row is sampled.
    stride: u64,
}

impl Accumulator {
    /// For rows of `channels`, sampling about `samples` of `tokens` rows.
    pub(crate) fn new(channels: usize, tokens: u64, samples: usize) -> Self {
        let parts = channels.div_ceil(TILE).max(1);
        let side = channels.div_ceil(parts).next_multiple_of(16);
        let cuts: Vec<usize> = (0..channels).step_by(side.max(1)).collect();
        let mut tiles = Vec::new();
        for &row in &cuts {
            for &col in cuts.iter().filter(|c| **c >= row) {
                let (rows, cols) = (side.min(channels - row), side.min(channels - col));
                tiles.push(Tile { row, col, rows, cols, data: vec![0.0; rows * cols] });
            }
        }
        Self {
            channels,
            tiles,
            tokens: 0,
            sum_abs: vec![0.0; channels],
            max_abs: vec![0.0; channels],
            sample: Vec::new(),
            stride: stride(tokens, samples),
        }
    }

    /// Numbers in a row.
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// Adds row-major blocks of rows.
    pub(crate) fn add(&mut self, blocks: &[&[f32]]) {
        let c = self.channels;
        if c == 0 {
            return;
        }
        self.tiles.par_iter_mut().for_each(|tile| {
            for x in blocks.iter().filter(|x| !x.is_empty()) {
                let a = Mat { data: &x[tile.row..], row: 1, col: c };
                let b = Mat { data: &x[tile.col..], row: c, col: 1 };
                product(tile.rows, tile.cols, x.len() / c, &mut tile.data, tile.cols, Into::Accumulate, a, b, 1.0);
            }
        });
        let moments: Vec<(Vec<f64>, Vec<f32>)> = blocks.par_iter().map(|x| moments(x, c)).collect();
        for (sums, maxima) in moments {
            self.sum_abs.iter_mut().zip(sums).for_each(|(a, b)| *a += b);
            self.max_abs.iter_mut().zip(maxima).for_each(|(a, b)| *a = a.max(b));
        }
        for row in blocks.iter().flat_map(|x| x.chunks_exact(c)) {
            if self.tokens % self.stride == self.stride / 2 {
                self.sample.extend_from_slice(row);
            }
            self.tokens += 1;
        }
    }

    /// The statistics.
    pub(crate) fn finish(self) -> InputStats {
        let c = self.channels;
        let mut gram = vec![0.0; c * c];
        for tile in &self.tiles {
            for (i, row) in tile.data.chunks(tile.cols.max(1)).enumerate() {
                for (j, v) in row.iter().enumerate() {
                    gram[(tile.row + i) * c + tile.col + j] = *v;
                }
            }
        }
        // Also inside the tiles on the diagonal.
        mirror(&mut gram, c);
        let n = (self.tokens as f64).max(1.0);
        InputStats {
            tokens: self.tokens,
            mean_abs: self.sum_abs.iter().map(|s| (s / n) as f32).collect(),
            max_abs: self.max_abs,
            gram,
            sample: self.sample,
        }
    }
}

/// Σ|x| and max|x| for each channel.
fn moments(x: &[f32], c: usize) -> (Vec<f64>, Vec<f32>) {
    let (mut sums, mut maxima) = (vec![0.0f64; c], vec![0.0f32; c]);
    let mut part = vec![0.0f32; c];
    for rows in x.chunks(ROWS * c) {
        part.fill(0.0);
        simd(
            #[inline(always)]
            || {
                for row in rows.chunks_exact(c) {
                    for ((x, sum), max) in row.iter().zip(&mut part).zip(&mut maxima) {
                        let a = x.abs();
                        *sum += a;
                        *max = if a > *max { a } else { *max };
                    }
                }
            },
        );
        sums.iter_mut().zip(&part).for_each(|(s, p)| *s += f64::from(*p));
    }
    (sums, maxima)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_definition() {
        let c = 300;
        let x: Vec<f32> = (0..40 * c).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 250.0).collect();
        let mut acc = Accumulator::new(c, 40, 8);
        acc.add(&[&x[..25 * c], &x[25 * c..]]);
        let stats = acc.finish();
        assert_eq!((stats.tokens, stats.channels(), stats.sample.len()), (40, c, 8 * c));
        assert_eq!(stats.sample[..c], x[2 * c..3 * c]);
        for (i, j) in [(0, 0), (3, 299), (299, 3), (160, 170), (170, 160), (255, 256)] {
            let want: f64 = x.chunks(c).map(|r| f64::from(r[i]) * f64::from(r[j])).sum();
            assert!((f64::from(stats.gram[i * c + j]) - want).abs() < 1e-4, "gram[{i},{j}]");
        }
        let column: Vec<f32> = x.chunks(c).map(|r| r[17].abs()).collect();
        assert!((stats.mean_abs[17] - column.iter().sum::<f32>() / 40.0).abs() < 1e-6);
        assert_eq!(stats.max_abs[17], column.iter().copied().fold(0.0, f32::max));
    }
}

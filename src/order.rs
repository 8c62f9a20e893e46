//! What the order of four-bit codes in memory is worth (AWQ, arXiv 2306.00978, section 4.2): products of weight rows
//! with rounded activations, the same arithmetic over each order, compiled for the widest vectors of the machine.
//!
//! The weights stay in the cache and one thread works, so that unpacking is what is measured and not the memory.

use std::hint::black_box;
use std::time::Instant;

use awqc_cpu::Isa;
use awqc_cpu::kernels::{Acts, OutTile, matmul_i8};
use awqc_exec::host::math::simd;
use awqc_exec::layout::{self, Part};
use awqc_ir::panels::Panels;
use awqc_ir::{Group, Layout, Quant};
use awqc_passes::rtn::Codes;
use serde::Serialize;

/// The speed of one order.
#[derive(Clone, Debug, Serialize)]
pub struct Order {
    /// The layout that has it.
    pub layout: String,
    /// Which columns follow each other.
    pub order: &'static str,
    /// 10⁹ weights a second.
    pub gigaweights: f64,
    /// The same in relation to the first order.
    pub gain: f64,
}

const ROWS: usize = 128;
const COLS: usize = 4096;
/// Columns of a block of `simd16`, and of a scale of the activations.
const BLOCK: usize = 32;

/// Measures the order of nature, the paper's, and that of the kernels.
pub fn orders(isa: Isa) -> Vec<Order> {
    let quant = Quant { bits: 4, symmetric: true, group: Group::Size(128) };
    let mut rng = fastrand::Rng::with_seed(1);
    let codes: Vec<u8> = (0..ROWS * COLS).map(|_| rng.u8(0..16)).collect();
    let groups = ROWS * COLS / 128;
    let codes = Codes { quant, rows: ROWS, cols: COLS, codes, scales: vec![0.5; groups], zeros: vec![8; groups] };
    let x: Vec<i8> = (0..COLS).map(|_| rng.i8(-127..=127)).collect();
    let mut sums = vec![0i32; ROWS];
    let stored = |layout: Layout| {
        let mut parts: Vec<Part> = layout::pack(&codes, layout).expect("every layout holds these codes");
        parts.swap_remove(0).tensor.bytes
    };
    let mut measured = Vec::new();
    for (layout, order, dot) in [
        (Layout::Rows, "w0 w1 w2 w3 …", neighbours as fn(&[u8], &[i8]) -> i32),
        (Layout::Simd16, "w0 w16 w1 w17 …", halves as fn(&[u8], &[i8]) -> i32),
    ] {
        let bytes = stored(layout);
        let speed = rate(|| {
            for (sum, row) in sums.iter_mut().zip(bytes.chunks_exact(COLS / 2)) {
                *sum = dot(black_box(row), &x);
            }
            black_box(&sums);
        });
        measured.push((layout, order, speed));
    }
    let shape = Panels::of(quant, ROWS, COLS).expect("a small shape");
    let bytes = stored(Layout::R16);
    let numbers: Vec<f32> = x.iter().map(|v| f32::from(*v)).collect();
    let (mut acts, mut out) = (Acts::default(), vec![0.0; ROWS]);
    acts.quantize(isa, &shape, 1, &numbers);
    let speed = rate(|| {
        matmul_i8(isa, &shape, black_box(&bytes), 0..shape.panels(), &acts, OutTile::new(&mut out, 1, ROWS, ROWS));
    });
    measured.push((Layout::R16, "16 rows of w0 w1 w2 w3, …", speed));
    let first = measured[0].2;
    let row = |(layout, order, speed): (Layout, _, f64)| Order {
        layout: layout.to_string(),
        order,
        gigaweights: speed,
        gain: speed / first,
    };
    measured.into_iter().map(row).collect()
}

/// 10⁹ weights a second: the best of many rounds.
fn rate(mut round: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < 0.3 {
        let start = Instant::now();
        round();
        best = best.min(start.elapsed().as_secs_f64());
    }
    1e-9 * (ROWS * COLS) as f64 / best
}

/// Byte `i` holds columns `2 i` and `2 i + 1`.
fn neighbours(row: &[u8], x: &[i8]) -> i32 {
    sum(row, x, |bytes, x, i| [(bytes[i] & 15, x[2 * i]), (bytes[i] >> 4, x[2 * i + 1])])
}

/// Byte `e` of a block holds columns `e` and `e + 16`.
fn halves(row: &[u8], x: &[i8]) -> i32 {
    sum(row, x, |bytes, x, e| [(bytes[e] & 15, x[e]), (bytes[e] >> 4, x[e + 16])])
}

/// Σ code · activation, where `at` gives the two codes of a block's byte with their activations. Each byte has a sum of
/// its own, so that compilers see sixteen lanes.
#[inline(always)]
fn sum(row: &[u8], x: &[i8], at: impl Fn(&[u8; BLOCK / 2], &[i8; BLOCK], usize) -> [(u8, i8); 2]) -> i32 {
    simd(
        #[inline(always)]
        || {
            let mut sums = [0i32; BLOCK / 2];
            for (bytes, x) in row.as_chunks::<{ BLOCK / 2 }>().0.iter().zip(x.as_chunks::<BLOCK>().0) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let [a, b] = at(bytes, x, i);
                    *sum += i32::from(i16::from(a.0) * i16::from(a.1)) + i32::from(i16::from(b.0) * i16::from(b.1));
                }
            }
            sums.iter().sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_orders_give_the_same_sum() {
        let code = |c: usize| (c * 7 % 16) as u8;
        let x: Vec<i8> = (0..64).map(|c| (c * 37 % 255) as u8 as i8).collect();
        let natural: Vec<u8> = (0..32).map(|i| code(2 * i) | code(2 * i + 1) << 4).collect();
        let paper: Vec<u8> = (0..32).map(|e| e / 16 * 32 + e % 16).map(|c| code(c) | code(c + 16) << 4).collect();
        let want: i32 = x.iter().enumerate().map(|(c, x)| i32::from(code(c)) * i32::from(*x)).sum();
        assert_eq!((neighbours(&natural, &x), halves(&paper, &x)), (want, want));
    }
}

//! Among how many blocks the columns of a decoding product are divided (split-K), from its shape and the architecture's
//! typical device.
//!
//! A block of [`super::gemv`] takes 16 rows. It loads its weights in rounds: every warp asks for a few tiles, waits,
//! multiplies them, and asks for the next. A weight with many rows has enough blocks for all of a device's memory
//! bandwidth, whatever a round takes. One with few rows and many columns, as the last product of a small model's MLP,
//! has too few: its time is that of a block's rounds, one after the other. Then several blocks share 16 rows, each with
//! a part of the columns; the one that is done last adds up what the others found, always in the same order.

use awqc_ir::tiles::Tiles;

use super::gemv::rounds;
use crate::arch::Arch;

/// The most blocks that share 16 rows.
const MOST: usize = 16;
/// Panels of 16 rows that can be shared: there is a counter for each.
pub(crate) const PANELS: usize = 1024;
/// Seconds of a round: what memory takes to answer, and the products. An estimate.
const ROUND: f64 = 1.3e-6;
/// Seconds until the last block has seen what the others found. An estimate.
const JOIN: f64 = 1.2e-6;
/// What dividing must gain, for estimates are not exact: the time with it, relative to that without.
const WORTH: f64 = 0.9;

/// Blocks that share 16 rows of a weight: 1 unless more are faster.
pub fn splits(arch: &Arch, shape: &Tiles) -> usize {
    if shape.panels() > PANELS {
        return 1;
    }
    // As many as have tiles, if each has the same number of them but for the last.
    let even = |splits: usize| shape.tiles().div_ceil(shape.tiles().div_ceil(splits));
    let all = (2..=MOST.min(shape.tiles())).filter(|s| even(*s) == *s);
    let best = all.map(|s| (s, seconds(arch, shape, s))).min_by(|a, b| a.1.total_cmp(&b.1));
    match best {
        Some((splits, time)) if time < WORTH * seconds(arch, shape, 1) => splits,
        Some(_) | None => 1,
    }
}

/// Seconds that the product takes, by the number of rounds and by the bytes.
fn seconds(arch: &Arch, shape: &Tiles, splits: usize) -> f64 {
    let (warps, rounds) = rounds(shape, splits);
    let blocks = (shape.panels() * splits).div_ceil(arch.multiprocessors);
    // Blocks of a multiprocessor run side by side, as many as fit.
    let turns = blocks.div_ceil(arch.warps_sm / warps.max(1) as usize);
    let latency = turns as f64 * f64::from(rounds) * ROUND;
    let transfer = shape.total_bytes() as f64 / (1e9 * arch.gigabytes_per_second as f64);
    latency.max(transfer) + if splits > 1 { JOIN } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use awqc_ir::{Group, Quant};

    fn of(sm: u32, rows: usize, cols: usize) -> usize {
        let quant = Quant { bits: 4, symmetric: false, group: Group::Size(128) };
        splits(Arch::find(sm).unwrap(), &Tiles::of(quant, rows, cols).unwrap())
    }

    #[test]
    fn few_rows_and_many_columns_are_divided_on_fast_memory() {
        // The MLPs of models of 0.5, 1.5 and 1 billion weights.
        assert!(of(90, 896, 4864) > 1 && of(90, 1536, 8960) > 1 && of(90, 2048, 8192) > 1);
        assert!(of(80, 896, 4864) > 1);
        // Memory that is slow beside the multiprocessors is busy anyway.
        assert_eq!(of(89, 2048, 8192), 1);
    }

    #[test]
    fn large_and_small_weights_are_not_divided() {
        for sm in [80, 86, 89, 90] {
            for (rows, cols) in [(4096, 4096), (4096, 11008), (22016, 4096), (128_256, 4096), (576, 576), (16, 64)] {
                assert_eq!(of(sm, rows, cols), 1, "sm_{sm}: {rows}x{cols}");
            }
        }
    }

    #[test]
    fn every_block_has_columns() {
        for cols in (64..20_000).step_by(192) {
            let tiles = cols / 64;
            let splits = of(90, 64, cols);
            assert!((splits - 1) * tiles.div_ceil(splits) < tiles, "{cols}: {splits}");
        }
    }
}

//! Properties of round-to-nearest quantization, for every width, grouping and symmetry.

use awqc_ir::{Group, Quant};
use awqc_passes::rtn::{self, Grid, kernel};
use half::f16;
use proptest::prelude::*;

fn quant() -> impl Strategy<Value = Quant> {
    let group = prop_oneof![(1u32..70).prop_map(Group::Size), Just(Group::Row)];
    (prop::sample::select(&Quant::BITS[..]), any::<bool>(), group).prop_map(|(bits, symmetric, group)| Quant {
        bits,
        symmetric,
        group,
    })
}

/// Rows of weights around a centre that may be far from 0, on scales from tiny to huge.
fn matrix() -> impl Strategy<Value = (usize, Vec<f32>)> {
    (1usize..90, 1usize..4, -3.0f32..3.0, -9i32..9).prop_flat_map(|(cols, rows, centre, scale)| {
        let number = (-1.0f32..1.0).prop_map(move |v| (v + centre) * 2.0f32.powi(scale));
        (Just(cols), prop::collection::vec(number, rows * cols))
    })
}

proptest! {
    #[test]
    fn codes_are_in_range_and_errors_at_most_half_a_step(quant in quant(), (cols, w) in matrix()) {
        let q = rtn::quantize(&w, w.len() / cols, cols, quant);
        let (decoded, group, groups) = (q.decode(), quant.group.len(cols), q.groups());
        let max = (1u16 << quant.bits) - 1;
        for (i, (w, d)) in w.iter().zip(&decoded).enumerate() {
            let at = i / cols * groups + i % cols / group;
            let (scale, zero) = (q.scales[at], f32::from(q.zeros[at]));
            prop_assert!(u16::from(q.codes[i]) <= max && u16::from(q.zeros[at]) <= max);
            prop_assert_eq!(f16::from_f32(scale).to_f32(), scale);
            // Inside what the grid reaches; a scale rounded down leaves the ends a little outside.
            let (lo, hi) = (-zero * scale, (f32::from(max) - zero) * scale);
            let inside = w.clamp(lo, hi);
            prop_assert!((inside - d).abs() <= 0.5001 * scale, "{} {} {}", w, d, scale);
            // At most half a step of zero point and the rounding of max steps to f16 (subnormal ones are 2⁻²⁴ apart)
            // outside.
            let rounding = f32::from(max) * (scale / 2048.0).max(2.0f32.powi(-25));
            prop_assert!((w - inside).abs() <= 0.5 * scale + 1.001 * rounding, "{} {}", w, inside);
        }
    }

    #[test]
    fn zero_stays_zero(quant in quant(), (cols, mut w) in matrix()) {
        let at = w.len() / 2;
        w[at] = 0.0;
        let q = rtn::quantize(&w, w.len() / cols, cols, quant);
        prop_assert_eq!(q.decode()[at], 0.0);
    }

    #[test]
    fn decoded_numbers_round_to_themselves(quant in quant(), (cols, w) in matrix()) {
        let q = rtn::quantize(&w, w.len() / cols, cols, quant);
        let (decoded, group, groups) = (q.decode(), quant.group.len(cols), q.groups());
        let max = f32::from((1u16 << quant.bits) - 1);
        for (i, d) in decoded.iter().enumerate() {
            let at = i / cols * groups + i % cols / group;
            let grid = Grid { scale: q.scales[at], zero: q.zeros[at].into(), max };
            prop_assert_eq!(grid.round(*d), *d);
        }
    }

    #[test]
    fn kernels_do_what_the_rule_says(quant in quant(), (cols, w) in matrix(), seed in any::<u64>()) {
        let w = &w[..cols];
        let s: Vec<f32> = (0..cols).map(|i| ((seed >> (i % 57)) & 63) as f32 / 16.0 + 0.1).collect();
        let inverse: Vec<f32> = s.iter().map(|s| 1.0 / s).collect();
        let mut got = vec![0.0; cols];
        kernel::scaled_error(w, &s, &inverse, quant, &mut got);
        let scaled: Vec<f32> = w.iter().zip(&s).map(|(w, s)| w * s).collect();
        let rounded = rtn::quantize(&scaled, 1, cols, quant).decode();
        for i in 0..cols {
            prop_assert_eq!(got[i], (rounded[i] - scaled[i]) * inverse[i]);
        }
        let (lo, hi) = rtn::range(w);
        prop_assert_eq!(lo, w.iter().copied().fold(f32::INFINITY, f32::min));
        prop_assert_eq!(hi, w.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        // Clipping and then rounding is what `clip` and `quant` do one after the other.
        let (lo, hi) = (0.7 * lo.min(0.0), 0.6 * hi.max(0.0));
        let row = Quant { group: Group::Row, ..quant };
        kernel::clipped_errors(w, &[(lo, hi)], quant, &mut got);
        let clipped: Vec<f32> = w.iter().map(|w| w.clamp(lo, hi)).collect();
        let rounded = rtn::quantize(&clipped, 1, cols, row).decode();
        for i in 0..cols {
            prop_assert_eq!(got[i], rounded[i] - w[i]);
        }
    }
}

#[test]
fn scales_round_to_f16_as_the_format_says() {
    // Every number between neighbours that could round either way, and the neighbours themselves.
    for bits in 0..0x7bff_u16 {
        let (a, b) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
        let middle = a + (b - a) / 2.0;
        for x in [a, middle, f32::from_bits(middle.to_bits() + 1), f32::from_bits(middle.to_bits().max(1) - 1)] {
            assert_eq!(rtn::round_f16(x), f16::from_f32(x).to_f32(), "{x}");
        }
    }
    assert_eq!(rtn::round_f16(65504.0), 65504.0);
    assert_eq!(rtn::round_f16(65520.0), 65504.0);
    assert_eq!(rtn::round_f16(f32::INFINITY), 65504.0);
}

#[test]
fn a_group_far_from_zero_stays_near_itself() {
    // A range that need not contain 0 would make 0.3 of all four.
    let quant = Quant { bits: 4, symmetric: false, group: Group::Size(4) };
    let decoded = rtn::quantize(&[1.0, 1.1, 1.2, 1.3], 1, 4, quant).decode();
    for (d, w) in decoded.iter().zip([1.0, 1.1, 1.2, 1.3]) {
        assert!((d - w).abs() < 0.045, "{d} {w}");
    }
    let q = rtn::quantize(&[-0.1, 1.1, 1.2, 1.3], 1, 4, quant);
    assert_eq!((q.codes, q.zeros), (vec![0, 13, 14, 15], vec![1]));
}

#[test]
fn halves_round_to_even_and_zeros_give_zeros() {
    let grid = Grid { scale: 1.0, zero: 8.0, max: 15.0 };
    assert_eq!([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5].map(|w| grid.code(w)), [6.0, 6.0, 8.0, 8.0, 10.0, 10.0]);
    for symmetric in [false, true] {
        let quant = Quant { bits: 3, symmetric, group: Group::Size(2) };
        assert_eq!(rtn::quantize(&[0.0; 5], 1, 5, quant).decode(), [0.0; 5]);
    }
}

#[test]
fn huge_and_tiny_groups_stay_finite() {
    for w in [f32::MAX, 1e30, 65504.0 * 15.0, 1e-8, f32::MIN_POSITIVE] {
        for symmetric in [false, true] {
            let quant = Quant { bits: 4, symmetric, group: Group::Row };
            let decoded = rtn::quantize(&[w, -w, w / 3.0], 1, 3, quant).decode();
            assert!(decoded.iter().all(|d| d.is_finite()), "{w} {decoded:?}");
        }
    }
}

//! The products of attention: every instruction set against the scalar specification, and that against f64.

use awqc_cpu::Isa;
use awqc_cpu::kernels::{Lines, Numbers, Stacked, times_panels, widen};
use half::f16;

use crate::support::{Random, numbers};

#[test]
fn rows_times_panels_are_the_scalar_ones() {
    let mut rng = Random::new(3);
    for (rows, heads, panels, depth) in [
        (1usize, 1, 1, 1),
        (1, 1, 9, 64),
        (3, 3, 4, 80),
        (7, 1, 3, 17),
        (12, 3, 5, 64),
        (13, 2, 8, 33),
        (48, 4, 7, 5),
        (5, 1, 2, 0),
    ] {
        // Lines and columns with something between them that is not theirs.
        let (head, step) = (depth + 1, 16 + 3);
        let (token, panel_step) = (heads * head + 2, (depth * step).max(1) + 5);
        let a = numbers(&mut rng, rows.div_ceil(heads) * token);
        let halves: Vec<f16> = numbers(&mut rng, panels * panel_step + 16).into_iter().map(f16::from_f32).collect();
        let b: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
        let lines = Lines { data: &a, heads, token, head };
        let product = |isa, data| {
            let stacked = Stacked { data, panels, depth, panel_step, step };
            let mut out = vec![f32::MAX; rows * panels * 16];
            times_panels(isa, rows, lines, &stacked, 0.125, &mut out);
            out
        };
        let expected = product(Isa::Scalar, Numbers::F32(&b));
        for (i, found) in expected.iter().enumerate() {
            let (r, column) = (i / (panels * 16), i % (panels * 16));
            let from = r / heads * token + r % heads * head;
            let at =
                |k: usize| f64::from(a[from + k]) * f64::from(b[column / 16 * panel_step + column % 16 + k * step]);
            let sum: f64 = (0..depth).map(at).sum();
            assert!((f64::from(*found) - 0.125 * sum).abs() < 1e-5, "{found} instead of {sum} / 8");
        }
        for isa in Isa::available() {
            for data in [Numbers::F32(&b), Numbers::F16(&halves)] {
                assert_eq!(product(isa, data), expected, "{isa}, {rows} rows, {panels} panels of {depth}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "2 rows of 8 numbers and 3 panels")]
fn short_operands_are_refused() {
    let (a, b) = (vec![0.0; 16], vec![0.0; 3 * 8 * 16 - 1]);
    let lines = Lines { data: &a, heads: 1, token: 8, head: 0 };
    let stacked = Stacked { data: Numbers::F32(&b), panels: 3, depth: 8, panel_step: 128, step: 16 };
    times_panels(Isa::detect(), 2, lines, &stacked, 1.0, &mut [0.0; 96]);
}

#[test]
fn halves_become_the_same_numbers() {
    // Every f16 that is a number, and a few of them twice.
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|h| !h.is_nan()).collect();
    let halves = &halves[..halves.len() / 16 * 16];
    let expected: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
    for isa in Isa::available() {
        let mut found = vec![0.0; halves.len()];
        widen(isa, halves, &mut found);
        assert_eq!(found, expected, "{isa}");
    }
}

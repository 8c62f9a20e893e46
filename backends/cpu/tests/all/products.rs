//! Every instruction set of the machine against the scalar specification, and that against f64.

use awqc_cpu::Isa;
use awqc_cpu::kernels::{Acts, Bf16Acts, FloatActs, OutTile, dequantize, matmul_bf16, matmul_f32, matmul_i8};
use awqc_ir::panels::{PANEL_ROWS, Panels};
use half::f16;

use crate::support::{Random, Weight, numbers};

/// The vector instruction sets of the machine.
fn vector_isas() -> impl Iterator<Item = Isa> {
    Isa::available().into_iter().filter(|isa| *isa != Isa::Scalar)
}

/// Passes everywhere: it tells what the other tests of this file could not try.
#[test]
fn instruction_sets() {
    for isa in Isa::ALL {
        println!("{}: no {isa}", if isa.is_available() { continue } else { "skipped" });
    }
}

fn i8_product(isa: Isa, w: &Weight, tokens: usize, x: &[f32]) -> Vec<f32> {
    let mut acts = Acts::default();
    acts.quantize(isa, &w.shape, tokens, x);
    let rows = w.shape.rows();
    let mut out = vec![f32::MAX; tokens * rows];
    matmul_i8(isa, &w.shape, &w.bytes, 0..w.shape.panels(), &acts, OutTile::new(&mut out, tokens, rows, rows));
    out
}

fn f32_product(isa: Isa, w: &Weight, tokens: usize, x: &[f32]) -> Vec<f32> {
    let mut acts = FloatActs::default();
    acts.copy(&w.shape, tokens, x);
    let rows = w.shape.rows();
    let mut out = vec![f32::MAX; tokens * rows];
    matmul_f32(isa, &w.shape, &w.bytes, 0..w.shape.panels(), &acts, OutTile::new(&mut out, tokens, rows, rows));
    out
}

fn decoded(isa: Isa, w: &Weight) -> Vec<f32> {
    let mut out = vec![f32::MAX; w.shape.panels() * PANEL_ROWS * w.shape.cols()];
    dequantize(isa, &w.shape, &w.bytes, 0..w.shape.panels(), &mut out);
    out
}

/// Equal bits, or both NaN.
#[track_caller]
fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(f.to_bits() == e.to_bits() || f.is_nan() && e.is_nan(), "{what}: {f} instead of {e} at {i}");
    }
}

/// Shapes with everything that can be odd about them, for all bits: groups that divide and do not, short last groups,
/// rows that do not fill a panel.
fn each_weight(mut check: impl FnMut(&mut Random, &Weight, String)) {
    let mut rng = Random::new(7);
    let shapes = [(16, 64, 32), (33, 192, 64), (20, 256, 128), (7, 150, 48), (31, 50, 20), (40, 97, usize::MAX)];
    for (rows, cols, group) in shapes.into_iter().chain([(1, 1, 1), (17, 200, 128), (16, 33, 32), (5, 7, 3)]) {
        for bits in [2, 3, 4, 8] {
            for symmetric in [false, true] {
                let w = Weight::random(&mut rng, rows, cols, bits, symmetric, group);
                check(&mut rng, &w, format!("{rows}×{cols}, {bits} bits, symmetric {symmetric}, group {group}"));
            }
        }
    }
}

#[test]
fn decoding_is_the_formula_everywhere() {
    each_weight(|_, w, what| {
        for isa in vector_isas().chain([Isa::Scalar]) {
            for (row, line) in decoded(isa, w).chunks(w.shape.cols()).enumerate() {
                for (col, found) in line.iter().enumerate() {
                    // Exact in f64: the rounding to f32 is the kernel's only one.
                    let expected = if row < w.shape.rows() { w.number(row, col) as f32 } else { 0.0 };
                    assert_eq!(*found, expected, "{isa}, {what}");
                }
            }
        }
    });
}

#[test]
fn products_are_the_scalar_ones() {
    each_weight(|rng, w, what| {
        for tokens in [1, 3, 7, 16, 17, 100] {
            let x = numbers(rng, tokens * w.shape.cols());
            let (i8s, f32s) = (i8_product(Isa::Scalar, w, tokens, &x), f32_product(Isa::Scalar, w, tokens, &x));
            for isa in vector_isas() {
                assert_same(&i8_product(isa, w, tokens, &x), &i8s, &format!("i8, {isa}, {tokens} tokens, {what}"));
                assert_same(&f32_product(isa, w, tokens, &x), &f32s, &format!("f32, {isa}, {tokens} tokens, {what}"));
            }
        }
    });
}

/// The nearest bf16 number; of two, the one that is even.
fn bf16(v: f32) -> f64 {
    f64::from(half::bf16::from_f32(v).to_f32())
}

/// Products of bf16 numbers are exact in f32: only their sums are rounded.
#[test]
fn products_in_bf16_are_those_of_rounded_numbers() {
    if !Isa::Amx.is_available() {
        return; // `instruction_sets` says so.
    }
    let mut room = Vec::new();
    each_weight(|rng, w, what| {
        let (rows, cols) = (w.shape.rows(), w.shape.cols());
        for tiles in [vec![1], vec![16], vec![17], vec![64, 33]] {
            let tokens: usize = tiles.iter().sum();
            let x = numbers(rng, tokens * cols);
            let (mut acts, mut first) = (Vec::new(), 0);
            for tile in tiles {
                let mut own = Bf16Acts::default();
                own.round(&w.shape, tile, &x[first * cols..(first + tile) * cols]);
                acts.push(own);
                first += tile;
            }
            let acts: Vec<&Bf16Acts> = acts.iter().collect();
            let mut out = vec![f32::MAX; tokens * rows];
            let mut rest = OutTile::new(&mut out, tokens, rows, rows);
            for panels in [0..w.shape.panels().min(1), w.shape.panels().min(1)..w.shape.panels()] {
                let own;
                (own, rest) = rest.split_at(w.shape.panel_rows(panels.clone()).len());
                matmul_bf16(&w.shape, &w.bytes, panels, &acts, &mut room, own);
            }
            for (i, found) in out.iter().enumerate() {
                let (t, row) = (i / rows, i % rows);
                let products = (0..cols).map(|c| bf16(x[t * cols + c]) * bf16(w.number(row, c) as f32));
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                let error = (f64::from(*found) - sum).abs();
                assert!(error <= 1e-5 * size + 1e-6, "{found}, not {sum}, at {t}, {row}, {what}");
            }
        }
    });
}

#[test]
fn bf16_shows_nan_and_infinity() {
    if !Isa::Amx.is_available() {
        return;
    }
    let mut rng = Random::new(5);
    let w = Weight::random(&mut rng, 20, 96, 4, false, 32);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(&mut rng, 18 * 96);
        x[3 * 96 + 40] = bad;
        let (mut acts, mut out) = (Bf16Acts::default(), vec![0.0; 18 * 20]);
        acts.round(&w.shape, 18, &x);
        matmul_bf16(&w.shape, &w.bytes, 0..2, &[&acts], &mut Vec::new(), OutTile::new(&mut out, 18, 20, 20));
        for (t, line) in out.chunks(20).enumerate() {
            assert_eq!(line.iter().all(|v| v.is_finite()), t != 3, "{bad}, token {t}: {line:?}");
        }
    }
}

/// More tokens than a tile has, rows shared out over threads: nothing changes.
#[test]
fn neither_threads_nor_other_tokens_matter() {
    let mut rng = Random::new(8);
    let w = Weight::random(&mut rng, 70, 160, 4, false, 64);
    let (tokens, stride) = (131, 75);
    let x = numbers(&mut rng, tokens * 160);
    for isa in vector_isas() {
        let (mut acts, mut floats) = (Acts::default(), FloatActs::default());
        acts.resize(&w.shape, tokens);
        std::thread::scope(|s| {
            for mut tile in acts.tiles_mut() {
                let x = &x;
                s.spawn(move || tile.quantize(isa, x));
            }
        });
        floats.copy(&w.shape, tokens, &x);
        let (mut i8s, mut f32s) = (vec![9.0; tokens * stride], vec![9.0; tokens * stride]);
        std::thread::scope(|s| {
            let mut rest = OutTile::new(&mut i8s, tokens, stride, 70);
            let mut rest_f32 = OutTile::new(&mut f32s, tokens, stride, 70);
            for panels in [0..1, 1..3, 3..3, 3..5] {
                let rows = w.shape.panel_rows(panels.clone()).len();
                let (mine, mine_f32);
                (mine, rest) = rest.split_at(rows);
                (mine_f32, rest_f32) = rest_f32.split_at(rows);
                let (w, acts, floats) = (&w, &acts, &floats);
                s.spawn(move || {
                    matmul_i8(isa, &w.shape, &w.bytes, panels.clone(), acts, mine);
                    matmul_f32(isa, &w.shape, &w.bytes, panels, floats, mine_f32);
                });
            }
        });
        for t in 0..tokens {
            let x = &x[t * 160..(t + 1) * 160];
            let (i8s, f32s) = (&i8s[t * stride..(t + 1) * stride], &f32s[t * stride..(t + 1) * stride]);
            assert_same(&i8s[..70], &i8_product(isa, &w, 1, x), &format!("i8, {isa}, token {t}"));
            assert_same(&f32s[..70], &f32_product(isa, &w, 1, x), &format!("f32, {isa}, token {t}"));
            assert_eq!((&i8s[70..], &f32s[70..]), (&[9.0; 5][..], &[9.0; 5][..]), "the rest of the line");
        }
    }
}

/// Rounding an activation moves it by half of its block's scale at most, so a product by no more than that times the
/// weights' magnitudes; f32 arithmetic adds a little to it.
#[test]
fn products_are_near_the_exact_ones() {
    each_weight(|rng, w, what| {
        let (rows, cols) = (w.shape.rows(), w.shape.cols());
        let x = numbers(rng, 2 * cols);
        let isa = Isa::detect();
        let (i8s, f32s) = (i8_product(isa, w, 2, &x), f32_product(isa, w, 2, &x));
        for t in 0..2 {
            let x = &x[t * cols..(t + 1) * cols];
            for row in 0..rows {
                let (mut exact, mut rounding, mut magnitude) = (0.0, 0.0, 0.0);
                for g in 0..w.shape.groups() {
                    let columns: Vec<usize> = w.shape.group_columns(g).collect();
                    for block in columns.chunks(32) {
                        let amax = block.iter().fold(0.0f32, |a, c| a.max(x[*c].abs()));
                        let at = row * w.shape.groups() + g;
                        for c in block {
                            let number = w.number(row, *c);
                            exact += number * f64::from(x[*c]);
                            rounding += number.abs() * f64::from(amax) / 127.0 / 2.0;
                            let terms = f64::from(w.codes[row * cols + c]) + f64::from(w.zeros[at]);
                            magnitude += terms * w.scales[at].to_f64() * f64::from(amax);
                        }
                    }
                }
                let steps = w.shape.cols() as f64 + 8.0;
                let float = magnitude * steps * f64::from(f32::EPSILON);
                let (i8, f32) = (f64::from(i8s[t * rows + row]), f64::from(f32s[t * rows + row]));
                assert!((i8 - exact).abs() <= rounding + float, "{what}: {i8} for {exact}, allowed {rounding}");
                assert!((f32 - exact).abs() <= float, "{what}: {f32} for {exact}, allowed {float}");
            }
        }
    });
}

/// The largest sums that there can be, of both signs: a kernel whose intermediate sums were too narrow would lose them.
#[test]
fn extreme_codes_do_not_overflow() {
    let ends: [fn(usize) -> f32; 3] = [|_| 127.0, |_| -127.0, |c| if c % 2 == 0 { 127.0 } else { -127.0 }];
    for bits in [2, 3, 4, 8] {
        // Rows of two whole panels, which kernels take together, and of a third.
        let (rows, cols, max) = (33, 128, ((1u32 << bits) - 1) as u8);
        let shape = Panels::new(rows, cols, bits, false, 128).unwrap();
        let w = Weight::new(shape, vec![max; rows * cols], vec![f16::ONE; rows], vec![0; rows]);
        for x in ends {
            let x: Vec<f32> = (0..cols).map(x).collect();
            let expected = x.iter().sum::<f32>() * f32::from(max);
            for isa in Isa::available() {
                for tokens in [1, 2] {
                    let found = i8_product(isa, &w, tokens, &x.repeat(tokens));
                    assert_eq!(found, vec![expected; tokens * rows], "{isa}, {bits} bits");
                }
            }
        }
    }
}

#[test]
fn nan_and_infinity_are_seen() {
    let mut rng = Random::new(9);
    let w = Weight::random(&mut rng, 16, 100, 4, false, 50);
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 49, 99] {
            let mut x = numbers(&mut rng, 300);
            x[100 + at] = bad;
            for isa in Isa::available() {
                for (t, line) in i8_product(isa, &w, 3, &x).chunks(16).enumerate() {
                    assert!(line.iter().all(|v| v.is_nan() == (t == 1)), "{isa}, token {t}: {line:?}");
                }
                assert!(i8_product(isa, &w, 1, &x[100..200]).iter().all(|v| v.is_nan()), "{isa}");
                for (t, line) in f32_product(isa, &w, 3, &x).chunks(16).enumerate() {
                    assert!(line.iter().all(|v| v.is_finite() == (t != 1)), "{isa}, token {t}: {line:?}");
                }
            }
        }
    }
}

/// Large activations do not overflow in rounding, tiny ones count as nothing.
#[test]
fn activations_of_any_size() {
    let shape = Panels::new(1, 32, 4, true, 32).unwrap();
    let w = Weight::new(shape, vec![9; 32], vec![f16::from_f32(1.0 / 64.0)], vec![8]);
    for isa in Isa::available() {
        let product = |x: f32| i8_product(isa, &w, 1, &[x; 32])[0];
        assert_eq!((product(0.0), product(1e-37), product(f32::from_bits(1))), (0.0, 0.0, 0.0), "{isa}");
        assert!((product(1e34) / 5e33 - 1.0).abs() < 1e-6, "{isa}");
        assert!((product(2e-36) - 1e-36).abs() < 1e-38, "{isa}");
    }
}

/// Weights may lie anywhere, as in a file that is mapped.
#[test]
fn alignment_does_not_matter() {
    let w = Weight::random(&mut Random::new(3), 40, 96, 4, false, 32);
    let x = numbers(&mut Random::new(4), 3 * 96);
    for isa in vector_isas() {
        let mut acts = Acts::default();
        acts.quantize(isa, &w.shape, 3, &x);
        let expected = i8_product(isa, &w, 3, &x);
        for offset in [1, 2, 31] {
            let moved = [&vec![0; offset][..], &w.bytes].concat();
            let mut out = vec![0.0; 3 * 40];
            matmul_i8(isa, &w.shape, &moved[offset..], 0..3, &acts, OutTile::new(&mut out, 3, 40, 40));
            assert_same(&out, &expected, isa.name());
        }
    }
}

#[test]
fn empty_matrices() {
    for isa in Isa::available() {
        for (rows, cols, tokens) in [(0, 32, 2), (3, 0, 2), (3, 32, 0)] {
            let w = Weight::random(&mut Random::new(1), rows, cols, 4, false, 32);
            let x = vec![1.0; tokens * cols];
            let expected = vec![0.0; tokens * rows];
            assert_eq!(i8_product(isa, &w, tokens, &x), expected, "{isa}");
            assert_eq!(f32_product(isa, &w, tokens, &x), expected, "{isa}");
            assert!(decoded(isa, &w).len() == w.shape.panels() * 16 * cols);
        }
    }
}

#[test]
#[should_panic(expected = "other columns or groups")]
fn activations_of_another_shape_are_refused() {
    let w = Weight::random(&mut Random::new(1), 16, 64, 4, false, 32);
    let mut acts = Acts::default();
    acts.quantize(Isa::Scalar, &Panels::new(16, 64, 4, false, 64).unwrap(), 1, &[0.0; 64]);
    matmul_i8(Isa::Scalar, &w.shape, &w.bytes, 0..1, &acts, OutTile::new(&mut [0.0; 16], 1, 16, 16));
}

#[test]
#[should_panic(expected = "this machine has no")]
fn a_missing_instruction_set_is_refused() {
    let missing = Isa::ALL.into_iter().find(|isa| !isa.is_available()).expect("no machine has them all");
    Acts::default().quantize(missing, &Panels::new(16, 64, 4, false, 64).unwrap(), 1, &[0.0; 64]);
}

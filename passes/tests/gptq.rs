//! Error compensation: what it promises for any matrix, and the pass that uses it on one small layer.
#![allow(clippy::unwrap_used)] // also outside of test functions

mod support;

use awqc_ir::{Quant, Region, WeightExpr, WeightId};
use awqc_passes::awq_clip::AwqClip;
use awqc_passes::awq_scale::AwqScale;
use awqc_passes::gptq::{Factor, Grids, compensate, keep_better};
use awqc_passes::profile::Profile;
use awqc_passes::quantize::Quantize;
use awqc_passes::rtn::{self, Codes, Grid};
use awqc_passes::{Changed, Pass, RemarkKind, dense};
use proptest::prelude::*;
use support::{Bench, layer, noise};

/// Two linears that read one value and one after them; 20 and 36 channels, so that groups of 8 leave remainders.
const LAYER: &str = r#"layer @0 (%x: f32[B,S,20]) from "m.0" {
  $n = "n" : f32[20]
  $g = "g" : f32[36,20]
  $u = "u" : f32[36,20]
  $d = "d" : f32[20,36]
  %h = rms_norm %x, $n {eps=1e-5} : f32[B,S,20]
  %g = linear %h, $g : f32[B,S,36]
  %u = linear %h, $u : f32[B,S,36]
  %s = silu %g : f32[B,S,36]
  %m = mul %s, %u : f32[B,S,36]
  %d = linear %m, $d : f32[B,S,20]
  %y = add %x, %d : f32[B,S,20]
  return %y
}"#;

/// `Σ x xᵀ` over tokens whose channels go together.
fn gram(name: &str, cols: usize, tokens: usize) -> Vec<f32> {
    let mut x = noise(name, tokens * cols);
    for row in x.chunks_mut(cols) {
        (1..cols).for_each(|c| row[c] += 0.8 * row[c - 1]);
    }
    let at = |i: usize, j: usize| (0..tokens).map(|t| f64::from(x[t * cols + i]) * f64::from(x[t * cols + j])).sum();
    (0..cols * cols)
        .map(|i| {
            let v: f64 = at(i / cols, i % cols);
            v as f32
        })
        .collect()
}

fn loss(codes: &[f32], w: &[f32], cols: usize, gram: &[f32]) -> f64 {
    let error: Vec<f32> = codes.iter().zip(w).map(|(a, b)| a - b).collect();
    dense::energy(&error, cols, gram)
}

fn given(rounded: &Codes) -> Grids<'_> {
    Grids::Given { scales: &rounded.scales, zeros: &rounded.zeros }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever the shape, the statistics and the options: codes in range, and no row above its rounding.
    #[test]
    fn no_row_is_worse_than_rounding(
        rows in 1usize..40,
        cols in 1usize..50,
        tokens in 1usize..60,
        bits in prop::sample::select(Quant::BITS.to_vec()),
        symmetric: bool,
        group in prop::sample::select(vec!["row", "g8", "g5", "g64"]),
        act_order: bool,
        block in 1usize..60,
        damp in prop::sample::select(vec![0.0, 0.01, 1.0]),
        seed: u16,
    ) {
        let quant: Quant = format!("{}{bits}{group}", if symmetric { 'i' } else { 'u' }).parse().unwrap();
        let w = noise(&format!("w{seed}"), rows * cols);
        let g = gram(&format!("x{seed}"), cols, tokens);
        let factor = Factor::new(&g, cols, damp, act_order).unwrap();
        let rounded = rtn::quantize(&w, rows, cols, quant);
        let running = compensate(&w, cols, &factor, Grids::Running(Grid::spanning), quant, block);
        prop_assert!(running.decode().iter().all(|v| v.is_finite()));
        let mut codes = compensate(&w, cols, &factor, given(&rounded), quant, block).codes;
        prop_assert!(codes.codes.iter().all(|c| u32::from(*c) < 1 << bits));
        let kept = keep_better(&mut codes, &rounded, &w, &g);
        prop_assert!(kept.after <= kept.before);
        let (row_losses, decoded) = (rounded.decode(), codes.decode());
        for (r, w) in w.chunks(cols).enumerate() {
            let of = |d: &[f32]| loss(&d[r * cols..(r + 1) * cols], w, cols, &g);
            prop_assert!(of(&decoded) <= of(&row_losses) * (1.0 + 1e-5) + 1e-9, "row {r}");
        }
    }
}

#[test]
fn correlated_channels_make_up_for_each_other() {
    let (rows, cols) = (96, 128);
    let (w, g) = (noise("w", rows * cols), gram("x", cols, 400));
    for scheme in ["u2g32", "u3g32", "i4g48", "u4row"] {
        let quant: Quant = scheme.parse().unwrap();
        let rounded = rtn::quantize(&w, rows, cols, quant);
        let factor = Factor::new(&g, cols, 0.01, true).unwrap();
        let codes = compensate(&w, cols, &factor, given(&rounded), quant, 32).codes;
        let (before, after) = (loss(&rounded.decode(), &w, cols, &g), loss(&codes.decode(), &w, cols, &g));
        assert!(after < 0.7 * before, "{scheme}: {after} after {before}");
    }
}

#[test]
fn channels_that_go_with_no_other_are_rounded() {
    let (rows, cols) = (20, 30);
    let w = noise("w", rows * cols);
    let g: Vec<f32> = (0..cols * cols).map(|i| if i / cols == i % cols { 1.0 + i as f32 } else { 0.0 }).collect();
    let rounded = rtn::quantize(&w, rows, cols, "u3g8".parse().unwrap());
    for act_order in [false, true] {
        let factor = Factor::new(&g, cols, 0.01, act_order).unwrap();
        let codes = compensate(&w, cols, &factor, given(&rounded), rounded.quant, 7).codes;
        assert_eq!(codes, rounded);
    }
}

#[test]
fn grids_of_another_weight_are_kept_and_their_error_is_absorbed() {
    let (rows, cols) = (32, 64);
    let (w, g) = (noise("w", rows * cols), gram("x", cols, 300));
    let narrow: Vec<f32> = w.iter().map(|v| v.clamp(-0.8, 0.8)).collect();
    let clipped = rtn::quantize(&narrow, rows, cols, "u3g16".parse().unwrap());
    let factor = Factor::new(&g, cols, 0.01, true).unwrap();
    let codes = |target: &[f32]| compensate(target, cols, &factor, given(&clipped), clipped.quant, 128).codes;
    let (whole, cut) = (codes(&w), codes(&narrow));
    assert_eq!((&whole.scales, &whole.zeros), (&clipped.scales, &clipped.zeros));
    let of = |c: &Codes| loss(&c.decode(), &w, cols, &g);
    assert!(of(&whole) < 0.9 * of(&cut), "{} {}", of(&whole), of(&cut));
    assert!(of(&cut) < of(&clipped));
}

#[test]
fn the_block_is_a_matter_of_speed_only() {
    let (rows, cols) = (100, 150);
    let (w, g) = (noise("w", rows * cols), gram("x", cols, 400));
    let factor = Factor::new(&g, cols, 0.01, true).unwrap();
    let rounded = rtn::quantize(&w, rows, cols, "u3g16".parse().unwrap());
    let codes = |block| compensate(&w, cols, &factor, given(&rounded), rounded.quant, block).codes;
    let want = codes(1);
    for block in [16, 128, 1000] {
        let got = codes(block);
        let moved = got.codes.iter().zip(&want.codes).filter(|(a, b)| a != b).count();
        assert!(moved * 200 < rows * cols, "{moved} codes moved with blocks of {block}");
    }
}

#[test]
fn channels_without_signal_become_zero() {
    let (rows, cols) = (9, 24);
    let (w, mut g) = (noise("w", rows * cols), gram("x", cols, 100));
    (0..cols).for_each(|j| (g[5 * cols + j], g[j * cols + 5]) = (0.0, 0.0));
    let factor = Factor::new(&g, cols, 0.01, true).unwrap();
    assert_eq!((factor.dead.iter().filter(|d| **d).count(), factor.order.last()), (1, Some(&5)));
    let rounded = rtn::quantize(&w, rows, cols, "u4g8".parse().unwrap());
    let found = compensate(&w, cols, &factor, given(&rounded), rounded.quant, 128).codes.decode();
    assert!(found.chunks(cols).all(|row| row[5] == 0.0 && row[4] != 0.0));
}

fn profiled(scheme: &str) -> (Bench, Region) {
    let (mut bench, mut region) = (Bench::new(Some(scheme)), layer(LAYER));
    assert_eq!(bench.pass::<Profile>(&mut region, "{}"), Changed::No);
    (bench, region)
}

fn matrices(region: &Region) -> Vec<WeightId> {
    region.used_weights().into_iter().filter(|w| region.weight(*w).ty.rank() == 2).collect()
}

fn chosen(region: &Region) -> Vec<bool> {
    matrices(region).iter().map(|w| matches!(region.weight(*w).expr, WeightExpr::Codes { .. })).collect()
}

fn warnings(bench: &Bench) -> Vec<String> {
    bench.remarks.list.iter().filter(|r| r.kind == RemarkKind::Warning).map(|r| r.message.clone()).collect()
}

#[test]
fn every_linear_loses_less_than_by_rounding() {
    let errors = |method: &str, before: &[&str]| {
        let (mut bench, mut region) = profiled("u3g8");
        for pass in before {
            match *pass {
                "scale" => bench.pass::<AwqScale>(&mut region, "{}"),
                _ => bench.pass::<AwqClip>(&mut region, "{}"),
            };
        }
        bench.pass::<Quantize>(&mut region, &format!(r#"{{"bits":3,"group":8{method}}}"#));
        (bench.numbers("quantize", "relative_error"), region)
    };
    for before in [&[][..], &["clip"], &["scale", "clip"]] {
        let (rounded, _) = errors("", before);
        for options in
            ["", r#","act_order":false"#, r#","act-order":false,"static-groups":false"#, r#","block":3,"damp":0.1"#]
        {
            let (found, region) = errors(&format!(r#","method":"gptq"{options}"#), before);
            assert_eq!((found.len(), chosen(&region)), (3, vec![true; 3]), "{options}");
            for (found, rounded) in found.iter().zip(&rounded) {
                assert!(found <= &(rounded * 1.0001), "{before:?} {options}: {found} {rounded}");
            }
            // Grids taken along the way know nothing of a clip.
            let gain = if options.contains("static-groups") && before.contains(&"clip") { 1.0 } else { 0.9 };
            let sum = |errors: &[f64]| errors.iter().sum::<f64>();
            assert!(sum(&found) < gain * sum(&rounded), "{before:?} {options}: {found:?} {rounded:?}");
            // What the codes stand for is kept: the clipped term, where there is a clip.
            let WeightExpr::Codes { of, .. } = region.weight(matrices(&region)[1]).expr else { panic!("codes") };
            assert_eq!(matches!(region.weight(of).expr, WeightExpr::Clip { .. }), before.contains(&"clip"));
        }
    }
}

#[test]
fn what_cannot_be_compensated_is_rounded_with_a_warning() {
    const GPTQ: &str = r#"{"bits":3,"group":8,"method":"gptq"}"#;
    let rounded = |change: &dyn Fn(&mut Bench)| {
        let (mut bench, mut region) = profiled("u3g8");
        change(&mut bench);
        assert_eq!(bench.pass::<Quantize>(&mut region, GPTQ), Changed::Yes);
        let finite = region.data_ids().all(|d| region.data(d).values.as_ref().unwrap().iter().all(|v| v.is_finite()));
        assert!(finite);
        (chosen(&region), warnings(&bench))
    };
    let (codes, said) = rounded(&|_| ());
    assert_eq!((codes, said.len()), (vec![true; 3], 0));
    let (codes, said) = rounded(&|b| b.facts.inputs.clear());
    assert_eq!((codes, said.len()), (vec![false; 3], 3));
    assert_eq!(said[0], "g: no statistics of its input: put `profile` before this pass: rounded to the nearest code");
    let (codes, said) = rounded(&|b| b.facts.inputs.values_mut().flatten().for_each(|s| s.tokens = 15));
    assert_eq!((codes, said.len()), (vec![false; 3], 3));
    assert!(said[2].starts_with("d: too few calibration tokens"), "{said:?}");
    let (codes, said) = rounded(&|b| b.facts.inputs.values_mut().next_back().unwrap()[0].gram[37] = f32::INFINITY);
    assert_eq!(codes, [true, true, false]);
    assert_eq!(said, ["d: its input was not finite, channel 1: rounded to the nearest code"]);
    let (codes, said) = rounded(&|b| b.facts.inputs.values_mut().next_back().unwrap()[0].gram.fill(0.0));
    assert_eq!(
        (codes, said),
        (vec![true, true, false], vec!["d: its input was always 0: rounded to the nearest code".to_owned()])
    );
    // A matrix that is no Gram matrix: damping helps.
    let (codes, said) = rounded(&|b| {
        let g = &mut b.facts.inputs.values_mut().next_back().unwrap()[0].gram;
        (g[1], g[36]) = (1.05 * (g[0] * g[37]).sqrt(), 1.05 * (g[0] * g[37]).sqrt());
    });
    assert_eq!(codes, vec![true; 3]);
    assert!(said.len() == 1 && said[0].starts_with("d: damping was raised from 0.01 to "), "{said:?}");
}

#[test]
fn options_are_checked() {
    let refused = |text: &str| match Quantize::new(serde_json::from_str(text).unwrap()) {
        Ok(_) => None,
        Err(e) => Some(e.to_string()),
    };
    assert_eq!(refused(r#"{"method":"gptq"}"#), None);
    assert_eq!(refused(r#"{"method":"gptq","act_order":true,"static_groups":false,"group":"row"}"#), None);
    let remedy = refused(r#"{"method":"gptq","static_groups":false}"#).unwrap();
    assert!(remedy.contains("use static_groups"), "{remedy}");
    assert!(refused(r#"{"damp":0.1}"#).unwrap().contains("method=gptq"));
    assert!(refused(r#"{"method":"gptq","damp":-0.1}"#).is_some());
    assert!(refused(r#"{"method":"gptq","block":0}"#).is_some());
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (rows, cols) = (300, 140);
            let (w, g) = (noise("w", rows * cols), gram("x", cols, 200));
            let factor = Factor::new(&g, cols, 0.01, true).unwrap();
            let rounded = rtn::quantize(&w, rows, cols, "u3g32".parse().unwrap());
            let mut codes = compensate(&w, cols, &factor, given(&rounded), rounded.quant, 64).codes;
            let kept = keep_better(&mut codes, &rounded, &w, &g);
            (factor, codes, kept)
        })
    };
    assert_eq!(run(1), run(3));
}

//! The passes of activation-aware quantization on one small layer of every kind of site: what they may and may not do
//! to the function and to their own losses.
#![allow(clippy::unwrap_used)] // also outside of test functions

mod support;

use awqc_ir::{Region, WeightExpr};
use awqc_passes::awq_clip::AwqClip;
use awqc_passes::awq_scale::AwqScale;
use awqc_passes::profile::Profile;
use awqc_passes::quantize::Quantize;
use awqc_passes::{Changed, Pass, RemarkKind, dense};
use support::{Bench, layer};

/// Grouped attention and a gated feed-forward; inputs of 20, 12 and 36 channels, so that groups of 8 leave remainders.
const LAYER: &str = r#"layer @0 (%x: f32[B,S,20], %cos: f32[S,1], %sin: f32[S,1]) from "m.0" {
  $ln1 = "ln1" : f32[20]
  $q = "q" : f32[12,20]
  $k = "k" : f32[6,20]
  $v = "v" : f32[6,20]
  $o = "o" : f32[20,12]
  $ln2 = "ln2" : f32[20]
  $g = "g" : f32[36,20]
  $u = "u" : f32[36,20]
  $d = "d" : f32[20,36]
  %h = rms_norm %x, $ln1 {eps=1e-5} : f32[B,S,20]
  %q = linear %h, $q : f32[B,S,12]
  %k = linear %h, $k : f32[B,S,6]
  %v = linear %h, $v : f32[B,S,6]
  %qr = rope %q, %cos, %sin {heads=4} : f32[B,S,12]
  %kr = rope %k, %cos, %sin {heads=2} : f32[B,S,6]
  %a = sdpa %qr, %kr, %v {causal, heads=4, kv_heads=2} : f32[B,S,12]
  %o = linear %a, $o : f32[B,S,20]
  %r = add %x, %o : f32[B,S,20]
  %h2 = rms_norm %r, $ln2 {eps=1e-5} : f32[B,S,20]
  %g = linear %h2, $g : f32[B,S,36]
  %u = linear %h2, $u : f32[B,S,36]
  %s = silu %g : f32[B,S,36]
  %m = mul %s, %u : f32[B,S,36]
  %d = linear %m, $d : f32[B,S,20]
  %y = add %r, %d : f32[B,S,20]
  return %y
}"#;

fn profiled(scheme: &str) -> (Bench, Region) {
    let (mut bench, mut region) = (Bench::new(Some(scheme)), layer(LAYER));
    assert_eq!(bench.pass::<Profile>(&mut region, "{}"), Changed::No);
    (bench, region)
}

fn largest_difference(bench: &Bench, a: &Region, b: &Region) -> f64 {
    let (a, b) = (bench.exec.run(a).results(), bench.exec.run(b).results());
    let pairs = a.iter().zip(&b).flat_map(|(a, b)| a.data.iter().zip(&b.data));
    pairs.fold(0.0, |m, (a, b)| m.max((a - b).abs()))
}

#[test]
fn scales_keep_the_function_and_never_raise_the_loss() {
    for options in [
        "{}",
        r#"{"rule":"duo","grid":7}"#,
        r#"{"bounds":5}"#,
        r#"{"rule":"both","weight":"energy"}"#,
        r#"{"loss":"block","grid":6}"#,
        r#"{"loss":"block","rule":"both","bits":2,"group":"row"}"#,
    ] {
        for scheme in ["u4g8", "u3g8", "i3row"] {
            let (mut bench, mut region) = profiled(scheme);
            let before = region.clone();
            let changed = bench.pass::<AwqScale>(&mut region, options);
            assert_eq!(changed, Changed::Yes, "{options} {scheme}: outliers are planted, some site must pay");
            assert!(largest_difference(&bench, &before, &region) < 1e-9);
            let (old, new) = (bench.numbers("awq-scale", "loss_before"), bench.numbers("awq-scale", "loss_after"));
            assert_eq!((old.len(), new.len()), (4, 4), "{options}");
            for (old, new) in old.iter().zip(&new) {
                assert!(new <= old, "{options} {scheme}: {new} after {old}");
            }
            assert!(new.iter().sum::<f64>() < 0.95 * old.iter().sum::<f64>(), "{options} {scheme}: {new:?} {old:?}");
        }
    }
}

/// The last linear's loss behind both searches, and what the search for scales claims.
#[test]
fn scales_judged_within_bounds_are_those_that_clipping_does_best_with() {
    for scheme in ["u4g8", "u3g8", "u2g8", "i3row"] {
        let losses = |options: &str| {
            let (mut bench, mut region) = profiled(scheme);
            assert_eq!(bench.pass::<AwqScale>(&mut region, options), Changed::Yes);
            bench.pass::<AwqClip>(&mut region, r#"{"scope":"group"}"#);
            (bench.numbers("awq-scale", "loss_after")[3], bench.numbers("awq-clip", "loss_after")[6])
        };
        let (claimed, bounded) = losses(r#"{"bounds":64}"#);
        let (_, plain) = losses("{}");
        assert!((claimed / bounded - 1.0).abs() < 1e-3, "{scheme}: {claimed} {bounded}");
        assert!(bounded <= plain * (1.0 + 1e-6), "{scheme}: {bounded} {plain}");
    }
    for options in [r#"{"bounds":8,"loss":"block"}"#, r#"{"bounds":8,"mode":"reference"}"#] {
        assert!(AwqScale::new(serde_json::from_str(options).unwrap()).is_err(), "{options}");
    }
}

#[test]
fn the_linear_loss_is_the_squared_error_of_the_outputs() {
    let (mut bench, mut region) = profiled("u4g8");
    let before = region.clone();
    bench.pass::<AwqScale>(&mut region, "{}");
    let claimed = bench.numbers("awq-scale", "loss_after")[3];
    let mut quantized = region.clone();
    bench.pass::<Quantize>(&mut quantized, r#"{"bits":4,"group":8}"#);
    // The last linear by hand: its exact input, its exact and its rounded weight.
    let exact = bench.exec.run(&before);
    let x = exact.values()[&exact.named("m")].clone();
    let d = before.used_weights()[8];
    let (w, r) = (exact.weight(d).1, bench.exec.run(&quantized).weight(d).1);
    let scaled = bench.exec.run(&region).weight(d).1;
    let mut sum = 0.0;
    for row in x.data.chunks(36) {
        for ((w, r), scaled) in w.chunks(36).zip(r.chunks(36)).zip(scaled.chunks(36)) {
            // The input of the scaled weight is x / s, with s the quotient of the weights.
            let e: f64 = (0..36).map(|i| row[i] * w[i] / scaled[i] * (r[i] - scaled[i])).sum();
            sum += e * e;
        }
    }
    assert!((claimed / sum - 1.0).abs() < 1e-3, "{claimed} {sum}");
}

#[test]
fn clipping_never_raises_its_own_loss_and_is_what_quantize_does() {
    for options in [
        "{}",
        r#"{"scope":"group"}"#,
        r#"{"shape":"symmetric"}"#,
        r#"{"shape":"symmetric","scope":"group"}"#,
        r#"{"steps":3,"max_shrink":0.8,"sweeps":1}"#,
    ] {
        for scheme in ["u4g8", "u2g8", "i3g8", "u3row"] {
            let (mut bench, mut region) = profiled(scheme);
            assert_eq!(bench.pass::<AwqClip>(&mut region, options), Changed::Yes);
            let (old, new) = (bench.numbers("awq-clip", "loss_before"), bench.numbers("awq-clip", "loss_after"));
            assert_eq!(new.len(), 7);
            for (old, new) in old.iter().zip(&new) {
                assert!(*new <= old * (1.0 + 1e-6), "{options} {scheme}: {new} after {old}");
            }
            assert!(new.iter().sum::<f64>() < 0.98 * old.iter().sum::<f64>(), "{options} {scheme}: {new:?} {old:?}");
            if options == "{}" {
                check_claims(&mut bench, &mut region, scheme, &new);
            }
        }
    }
}

/// The loss that the search claims is that of the rounded weight: tr(ΔW G ΔWᵀ).
fn check_claims(bench: &mut Bench, region: &mut Region, scheme: &str, claimed: &[f64]) {
    let quant: awqc_ir::Quant = scheme.parse().unwrap();
    let original = layer(LAYER);
    let options = serde_json::json!({
        "bits": quant.bits,
        "symmetric": quant.symmetric,
        "group": match quant.group {
            awqc_ir::Group::Size(n) => n.into(),
            awqc_ir::Group::Row => serde_json::Value::from("row"),
        },
    });
    bench.pass::<Quantize>(region, &options.to_string());
    let weights = region.used_weights();
    let linears = [1, 2, 3, 4, 6, 7, 8].map(|i| weights[i]);
    let taps = awqc_passes::profile::taps(&original);
    for (i, (w, claimed)) in linears.into_iter().zip(claimed).enumerate() {
        let (exact, rounded) = (bench.exec.run(&original).weight(w).1, bench.exec.run(region).weight(w).1);
        let delta: Vec<f32> = rounded.iter().zip(&exact).map(|(a, b)| (a - b) as f32).collect();
        let stats = &bench.facts.inputs[&taps[[0, 0, 0, 1, 2, 2, 3][i]]][0];
        let loss = dense::energy(&delta, stats.channels(), &stats.gram);
        assert!((loss / claimed - 1.0).abs() < 2e-3, "{scheme} linear {i}: {loss}, claimed {claimed}");
    }
}

#[test]
fn looking_at_whole_rows_beats_looking_at_groups() {
    let loss = |options: &str| {
        let (mut bench, mut region) = profiled("u3g8");
        bench.pass::<AwqClip>(&mut region, options);
        bench.pass::<Quantize>(&mut region, r#"{"bits":3,"group":8}"#);
        bench.numbers("quantize", "relative_error").iter().sum::<f64>()
    };
    let (row, group) = (loss("{}"), loss(r#"{"scope":"group"}"#));
    assert!(row < 0.95 * group, "{row} {group}");
}

#[test]
fn the_whole_recipe_is_better_than_rounding() {
    let error = |recipe: bool| {
        let (mut bench, mut region) = profiled("u3g8");
        let before = region.clone();
        if recipe {
            bench.pass::<AwqScale>(&mut region, "{}");
            bench.pass::<AwqClip>(&mut region, "{}");
        }
        bench.pass::<Quantize>(&mut region, r#"{"bits":3,"group":8}"#);
        let (a, b) = (bench.exec.run(&before).results(), bench.exec.run(&region).results());
        let square: f64 = a[0].data.iter().zip(&b[0].data).map(|(a, b)| (a - b).powi(2)).sum();
        (square, bench.numbers("quantize", "relative_error"))
    };
    let ((awq, awq_linears), (rtn, rtn_linears)) = (error(true), error(false));
    assert!(awq < 0.6 * rtn, "{awq} {rtn}");
    assert_eq!(awq_linears.len(), 7);
    assert!(awq_linears.iter().zip(&rtn_linears).all(|(a, r)| a < r), "{awq_linears:?} {rtn_linears:?}");
}

#[test]
fn reference_mode_follows_the_published_limits() {
    let (mut bench, mut region) = profiled("u4g4");
    let before = region.clone();
    bench.pass::<AwqScale>(&mut region, r#"{"mode":"reference"}"#);
    // The tied value site is left alone, and exponents are twentieths below 1.
    assert_eq!(bench.numbers("awq-scale", "alpha").len(), 3);
    for a in bench.numbers("awq-scale", "alpha") {
        assert!((a * 20.0 - (a * 20.0).round()).abs() < 1e-5 && a < 0.96, "{a}");
    }
    assert!(largest_difference(&bench, &before, &region) < 1e-9);
    bench.pass::<AwqClip>(&mut region, r#"{"mode":"reference","skip":"scores"}"#);
    let clipped = |i: usize| matches!(region.weight(region.used_weights()[i]).expr, WeightExpr::Clip { .. });
    assert_eq!([1, 2, 3, 4, 6, 7, 8].map(clipped), [false, false, true, true, true, true, true]);
}

#[test]
fn quantize_wraps_float_weights_once() {
    let mut region = layer(LAYER);
    let mut bench = Bench::new(None);
    assert_eq!(bench.pass::<Quantize>(&mut region, r#"{"bits":3,"group":"row","symmetric":true}"#), Changed::Yes);
    let types: Vec<String> = region.used_weights().iter().map(|w| region.weight(*w).ty.to_string()).collect();
    assert_eq!(types[1], "i3row[12,20]");
    assert_eq!(types.iter().filter(|t| t.starts_with("i3row")).count(), 7);
    assert_eq!(bench.pass::<Quantize>(&mut region, r#"{"bits":4}"#), Changed::No);
    // Without statistics there is no error to report.
    assert!(bench.numbers("quantize", "relative_error").is_empty());
}

#[test]
fn options_are_checked() {
    use awqc_passes::Pass;
    let quantize = |text: &str| serde_json::from_str(text).map(|o| Quantize::new(o).is_ok());
    assert!(quantize(r#"{"bits":4,"group":0}"#).unwrap());
    assert!(!quantize(r#"{"bits":5}"#).unwrap());
    assert!(quantize(r#"{"group":"column"}"#).is_err());
    assert!(quantize(r#"{"group":-1}"#).is_err());
    let group = |text: &str| serde_json::from_str::<awqc_passes::quantize::QuantizeOptions>(text).unwrap();
    let round = |text: &str| serde_json::to_value(group(text)).unwrap()["group"].clone();
    assert_eq!((round(r#"{"group":64}"#), round(r#"{"group":0}"#)), (64.into(), "row".into()));
    assert!(AwqClip::new(serde_json::from_str(r#"{"max_shrink":1.0}"#).unwrap()).is_err());
    assert!(AwqClip::new(serde_json::from_str(r#"{"steps":0}"#).unwrap()).is_err());
    assert!(AwqScale::new(serde_json::from_str(r#"{"grid":0}"#).unwrap()).is_err());
}

#[test]
fn nothing_happens_without_statistics_tokens_or_a_scheme() {
    // No statistics.
    let (mut bench, mut region) = (Bench::new(Some("u4g8")), layer(LAYER));
    assert_eq!(bench.pass::<AwqScale>(&mut region, "{}"), Changed::No);
    assert_eq!(bench.pass::<AwqClip>(&mut region, "{}"), Changed::No);
    let missed = bench.remarks.list.iter().filter(|r| r.kind == RemarkKind::Missed).count();
    assert_eq!(missed, 4 + 7);
    // No tokens.
    let (mut bench, mut region) = profiled("u4g8");
    bench.facts.inputs.values_mut().flatten().for_each(|s| s.tokens = 0);
    assert_eq!(bench.pass::<AwqScale>(&mut region, "{}"), Changed::No);
    assert_eq!(bench.pass::<AwqClip>(&mut region, "{}"), Changed::No);
    // Nothing to search for.
    let (mut bench, mut region) = profiled("u4g8");
    bench.scheme = None;
    assert_eq!(bench.pass::<AwqScale>(&mut region, "{}"), Changed::No);
    assert_eq!(bench.pass::<AwqScale>(&mut region, r#"{"bits":4,"group":8}"#), Changed::Yes);
    // Regions that are no layers.
    let text = "awqir 1\nmodel \"t\" { dtype=\"f32\" }\ndim B, S\n\nregion @head (%x: f32[B,S,4]) {\n  $n = \"n\" : f32[4]\n  $w = \"w\" : f32[6,4]\n  %h = rms_norm %x, $n {eps=1e-5} : f32[B,S,4]\n  %y = linear %h, $w : f32[B,S,6]\n  return %y\n}\n";
    let mut head = awqc_ir::parse(text).unwrap().regions.remove(0);
    assert_eq!(bench.pass::<AwqScale>(&mut head, r#"{"bits":4,"group":2}"#), Changed::No);
    assert_eq!(bench.pass::<Quantize>(&mut head, "{}"), Changed::No);
}

#[test]
fn dead_channels_and_dead_inputs_are_survived() {
    let (mut bench, mut region) = profiled("u4g8");
    let before = region.clone();
    for stats in bench.facts.inputs.values_mut().flatten() {
        let c = stats.channels();
        // Channel 2 never fires.
        stats.mean_abs[2] = 0.0;
        (0..c).for_each(|j| (stats.gram[2 * c + j], stats.gram[j * c + 2]) = (0.0, 0.0));
    }
    // And nothing at all reaches the last linear.
    if let Some(stats) = bench.facts.inputs.values_mut().flatten().last() {
        stats.mean_abs.fill(0.0);
        stats.gram.fill(0.0);
    }
    assert_eq!(bench.pass::<AwqScale>(&mut region, r#"{"rule":"both"}"#), Changed::Yes);
    let scales = region.data_ids().flat_map(|d| region.data(d).values.clone().unwrap().to_vec());
    assert!(scales.into_iter().all(|s| s > 0.0 && s.is_finite()));
    assert!(largest_difference(&bench, &before, &region) < 1e-9);
    bench.pass::<AwqClip>(&mut region, "{}");
    let bounds = region.data_ids().flat_map(|d| region.data(d).values.clone().unwrap().to_vec());
    assert!(bounds.into_iter().all(|b| b.is_finite()));
}

#[test]
fn folded_half_precision_parameters_stay_finite() {
    let (mut bench, mut region) = (
        Bench::new(Some("u4g8")),
        layer(&LAYER.replace("f32", "f16").replace(
            "(%x: f16[B,S,20], %cos: f16[S,1], %sin: f16[S,1])",
            "(%x: f16[B,S,20], %cos: f32[S,1], %sin: f32[S,1])",
        )),
    );
    // Weights near the largest f16: no column may be scaled up.
    for (name, n) in [("m.0.q", 240), ("m.0.k", 120), ("m.0.v", 120)] {
        bench.exec.weights.insert(name.to_owned(), support::noise(name, n).iter().map(|v| v * 65000.0).collect());
    }
    bench.pass::<Profile>(&mut region, "{}");
    bench.pass::<AwqScale>(&mut region, "{}");
    use awqc_passes::Executor;
    for w in region.used_weights() {
        assert!(bench.exec.realize(&region, w).unwrap().data.iter().all(|v| v.is_finite()));
    }
    let q = region.used_weights()[1];
    assert!(matches!(region.weight(q).expr, WeightExpr::Source(_)), "q could only overflow");
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut bench, mut region) = profiled("u3g8");
            bench.pass::<AwqScale>(&mut region, "{}");
            bench.pass::<AwqClip>(&mut region, "{}");
            let data: Vec<Vec<f32>> =
                region.data_ids().map(|d| region.data(d).values.clone().unwrap().to_vec()).collect();
            (data, bench.remarks.records)
        })
    };
    let (one, three) = (run(1), run(3));
    assert_eq!(one.0, three.0);
    assert_eq!(one.1, three.1);
}

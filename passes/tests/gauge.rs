//! Scale freedom on the block shapes that exist: which sites there are, and that scaling them by anything keeps the
//! function.

mod support;

use std::collections::BTreeSet;

use awqc_ir::{DataMap, Region};
use awqc_passes::Facts;
use awqc_passes::analysis::gauge::{Site, apply, data_map, describe, sites};
use support::{Naive, layer, noise, stats};

/// The sites of a layer, after scaling each at random and comparing the function in f64.
fn found(body: &str) -> Vec<String> {
    found_with(&layer(body), &[])
}

fn found_with(region: &Region, shared: &[&str]) -> Vec<String> {
    let shared: BTreeSet<String> = shared.iter().map(|s| (*s).to_owned()).collect();
    let exec = Naive::new(6);
    let want = exec.run(region).results();
    let sites = sites(region, &shared);
    for site in &sites {
        let mut scaled = region.clone();
        // Statistics must follow the values.
        let mut facts = Facts::default();
        let values = exec.run(region).values();
        for (v, m) in &values {
            facts.inputs.insert(*v, vec![stats(m)]);
        }
        let s: Vec<f32> = noise("scales", site.free).iter().map(|v| (1.5 * v).exp()).collect();
        apply(&mut scaled, site, &s, "test", &mut facts);
        let got = exec.run(&scaled).results();
        for (got, want) in got.iter().zip(&want) {
            let largest = want.data.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let error = got.data.iter().zip(&want.data).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
            assert!(error < 1e-12 * largest, "{}: {error} of {largest}", describe(region, site));
        }
        follows(&scaled, site, &facts, &exec);
    }
    sites.iter().map(|s| describe(region, s)).collect()
}

fn follows(scaled: &Region, site: &Site, facts: &Facts, exec: &Naive) {
    for (v, m) in exec.run(scaled).values() {
        let (want, got) = (stats(&m), &facts.inputs[&v][0]);
        let touched = site.values.iter().any(|u| u.value == v);
        for (a, b) in want.gram.iter().zip(&got.gram).chain(want.mean_abs.iter().zip(&got.mean_abs)) {
            assert!((a - b).abs() <= 1e-4 * (a.abs() + 1e-2), "statistics of {v:?}, touched: {touched}: {a} {b}");
        }
    }
}

const ATTENTION: &str = r#"
  %q = linear %h, $q : f32[B,S,12]
  %k = linear %h, $k : f32[B,S,6]
  %v = linear %h, $v : f32[B,S,4]
  %qr = rope %q, %cos, %sin {heads=4} : f32[B,S,12]
  %kr = rope %k, %cos, %sin {heads=2} : f32[B,S,6]
  %a = sdpa %qr, %kr, %v {causal, heads=4, kv_heads=2} : f32[B,S,8]
  %o = linear %a, $o : f32[B,S,10]
  %r = add %x, %o : f32[B,S,10]
"#;

const ATTENTION_WEIGHTS: &str = r#"
  $q = "q" : f32[12,10]
  $k = "k" : f32[6,10]
  $v = "v" : f32[4,10]
  $o = "o" : f32[10,8]
"#;

const HEAD: &str = "layer @0 (%x: f32[B,S,10], %cos: f32[S,1], %sin: f32[S,1]) from \"m.0\" {\n";

#[test]
fn grouped_attention_and_gated_feed_forward() {
    let body = format!(
        r#"{HEAD}  $ln1 = "ln1" : f32[10] {ATTENTION_WEIGHTS}
  $ln2 = "ln2" : f32[10]
  $g = "g" : f32[14,10]
  $u = "u" : f32[14,10]
  $d = "d" : f32[10,14]
  %h = rms_norm %x, $ln1 {{eps=1e-5}} : f32[B,S,10]
{ATTENTION}
  %h2 = rms_norm %r, $ln2 {{eps=1e-5}} : f32[B,S,10]
  %g = linear %h2, $g : f32[B,S,14]
  %u = linear %h2, $u : f32[B,S,14]
  %s = silu %g : f32[B,S,14]
  %m = mul %s, %u : f32[B,S,14]
  %d = linear %m, $d : f32[B,S,10]
  %y = add %r, %d : f32[B,S,10]
  return %y
}}"#
    );
    assert_eq!(
        found(&body),
        ["ln1 -> q, k, v (10 free)", "v -> o (4 free)", "ln2 -> g, u (10 free)", "u -> d (14 free)",]
    );
    // The query heads of one key/value head share its scales.
    let region = layer(&body);
    let tied = &sites(&region, &BTreeSet::new())[1];
    assert_eq!(data_map(&tied.consumers[0].entry, tied.free), Some(DataMap::Tie { width: 2, times: 2 }));
    // A tensor that another region uses pins what touches it, and only that.
    let rest = found_with(&region, &["m.0.o", "m.0.g"]);
    assert_eq!(rest, ["ln1 -> q, k, v (10 free)", "u -> d (14 free)"]);
}

#[test]
fn multi_head_attention_has_no_tie() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $q = "q" : f32[6,10]
  $k = "k" : f32[6,10]
  $v = "v" : f32[9,10]
  $o = "o" : f32[10,9]
  %h = rms_norm %x, $ln {eps=1e-5} : f32[B,S,10]
  %q = linear %h, $q : f32[B,S,6]
  %k = linear %h, $k : f32[B,S,6]
  %v = linear %h, $v : f32[B,S,9]
  %a = sdpa %q, %k, %v {causal, heads=3, kv_heads=3} : f32[B,S,9]
  %o = linear %a, $o : f32[B,S,10]
  %y = add %x, %o : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["ln -> q, k, v (10 free)", "v -> o (9 free)"]);
    let region = layer(body);
    let site = &sites(&region, &BTreeSet::new())[1];
    assert_eq!(data_map(&site.consumers[0].entry, site.free), Some(DataMap::Whole));
}

#[test]
fn fused_projections_scale_their_own_rows() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $qkv = "qkv" : f32[22,10]
  $b = "b" : f32[22]
  $o = "o" : f32[10,8]
  $ln2 = "ln2" : f32[10]
  $gu = "gu" : f32[28,10]
  $d = "d" : f32[10,14]
  %h = rms_norm %x, $ln {eps=1e-5} : f32[B,S,10]
  %qkv = linear %h, $qkv, $b : f32[B,S,22]
  %q, %k, %v = split %qkv {sizes=[12,6,4]} : f32[B,S,12], f32[B,S,6], f32[B,S,4]
  %a = sdpa %q, %k, %v {causal, heads=4, kv_heads=2} : f32[B,S,8]
  %o = linear %a, $o : f32[B,S,10]
  %r = add %x, %o : f32[B,S,10]
  %h2 = rms_norm %r, $ln2 {eps=1e-5} : f32[B,S,10]
  %gu = linear %h2, $gu : f32[B,S,28]
  %g, %u = split %gu {sizes=[14,14]} : f32[B,S,14], f32[B,S,14]
  %s = silu %g : f32[B,S,14]
  %m = mul %s, %u : f32[B,S,14]
  %d = linear %m, $d : f32[B,S,10]
  %y = add %r, %d : f32[B,S,10]
  return %y
}"#;
    let want = [
        "ln -> qkv (10 free)",
        "qkv[18..22], b[18..22] -> o (4 free)",
        "ln2 -> gu (10 free)",
        "gu[14..28] -> d (14 free)",
    ];
    assert_eq!(found(body), want);
    let region = layer(body);
    let site = &sites(&region, &BTreeSet::new())[1];
    assert_eq!(data_map(&site.producers[0].entry, site.free), Some(DataMap::Within { start: 18, total: 22 }));
}

#[test]
fn norms_with_an_offset_scale_gain_plus_offset() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $post = "post" : f32[6]
  $w = "w" : f32[6,10]
  $p = "p" : f32[10,6]
  %h = rms_norm %x, $ln {eps=1e-5, offset=1.0} : f32[B,S,10]
  %a = linear %h, $w : f32[B,S,6]
  %n = rms_norm %a, $post {eps=1e-5, offset=1.0} : f32[B,S,6]
  %b = linear %n, $p : f32[B,S,10]
  %y = add %x, %b : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["ln -> w (10 free)", "post -> p (6 free)"]);
}

#[test]
fn parallel_branches_share_their_norm() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $bias = "bias" : f32[10]
  $q = "q" : f32[6,10]
  $k = "k" : f32[6,10]
  $v = "v" : f32[6,10]
  $o = "o" : f32[10,6]
  $up = "up" : f32[14,10]
  $down = "down" : f32[10,14]
  %h = layer_norm %x, $ln, $bias {eps=1e-5} : f32[B,S,10]
  %q = linear %h, $q : f32[B,S,6]
  %k = linear %h, $k : f32[B,S,6]
  %v = linear %h, $v : f32[B,S,6]
  %a = sdpa %q, %k, %v {causal, heads=2, kv_heads=2} : f32[B,S,6]
  %o = linear %a, $o : f32[B,S,10]
  %u = linear %h, $up : f32[B,S,14]
  %g = gelu %u {form="tanh"} : f32[B,S,14]
  %d = linear %g, $down : f32[B,S,10]
  %m = add %o, %d : f32[B,S,10]
  %y = add %x, %m : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["ln, bias -> q, k, v, up (10 free)", "v -> o (6 free)"]);
}

#[test]
fn relu_passes_scales_and_biases_follow() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $b = "b" : f32[10]
  $w1 = "w1" : f32[14,10]
  $b1 = "b1" : f32[14]
  $w2 = "w2" : f32[10,14]
  $b2 = "b2" : f32[10]
  %h = layer_norm %x, $ln, $b {eps=1e-5} : f32[B,S,10]
  %u = linear %h, $w1, $b1 : f32[B,S,14]
  %g = relu %u : f32[B,S,14]
  %d = linear %g, $w2, $b2 : f32[B,S,10]
  %y = add %x, %d : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["ln, b -> w1 (10 free)", "w1, b1 -> w2 (14 free)"]);
}

#[test]
fn norms_of_queries_and_keys_take_no_scale() {
    let body = format!(
        r#"{HEAD}  $ln1 = "ln1" : f32[10] {ATTENTION_WEIGHTS}
  $qn = "qn" : f32[3]
  %h = rms_norm %x, $ln1 {{eps=1e-5}} : f32[B,S,10]
  %q = linear %h, $q : f32[B,S,12]
  %k = linear %h, $k : f32[B,S,6]
  %v = linear %h, $v : f32[B,S,4]
  %qq = rms_norm %q, $qn {{eps=1e-5, heads=4}} : f32[B,S,12]
  %kk = rms_norm %k, $qn {{eps=1e-5, heads=2}} : f32[B,S,6]
  %a = sdpa %qq, %kk, %v {{causal, heads=4, kv_heads=2}} : f32[B,S,8]
  %o = linear %a, $o : f32[B,S,10]
  %y = add %x, %o : f32[B,S,10]
  return %y
}}"#
    );
    assert_eq!(found(&body), ["ln1 -> q, k, v (10 free)", "v -> o (4 free)"]);
}

#[test]
fn one_gain_for_all_heads_ties_them() {
    // Without anything rigid behind it, a head norm's gain is one scale for every head.
    let body = r#"layer @0 (%x: f32[B,S,12]) {
  $g = "g" : f32[4]
  $w = "w" : f32[12,12]
  %h = rms_norm %x, $g {eps=1e-5, heads=3} : f32[B,S,12]
  %y = linear %h, $w : f32[B,S,12]
  return %y
}"#;
    assert_eq!(found(body), ["g -> w (4 free)"]);
}

#[test]
fn a_norm_whose_output_stays_in_the_residual_stream_is_pinned() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $n1 = "n1" : f32[10]
  $b1 = "b1" : f32[10]
  $n2 = "n2" : f32[10]
  $b2 = "b2" : f32[10]
  $q = "q" : f32[6,10]
  $k = "k" : f32[6,10]
  $v = "v" : f32[6,10]
  $o = "o" : f32[10,6]
  $up = "up" : f32[14,10]
  $down = "down" : f32[10,14]
  %q = linear %x, $q : f32[B,S,6]
  %k = linear %x, $k : f32[B,S,6]
  %v = linear %x, $v : f32[B,S,6]
  %a = sdpa %q, %k, %v {heads=2, kv_heads=2} : f32[B,S,6]
  %o = linear %a, $o : f32[B,S,10]
  %r = add %x, %o : f32[B,S,10]
  %h = layer_norm %r, $n1, $b1 {eps=1e-5} : f32[B,S,10]
  %u = linear %h, $up : f32[B,S,14]
  %g = gelu %u {form="tanh"} : f32[B,S,14]
  %d = linear %g, $down : f32[B,S,10]
  %r2 = add %h, %d : f32[B,S,10]
  %y = layer_norm %r2, $n2, $b2 {eps=1e-5} : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["v -> o (6 free)"]);
}

#[test]
fn a_norm_that_something_rigid_reads_is_pinned() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $w = "w" : f32[10,10]
  %h = rms_norm %x, $ln {eps=1e-5} : f32[B,S,10]
  %a = linear %h, $w : f32[B,S,10]
  %s = silu %h : f32[B,S,10]
  %y = add %a, %s : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), [""; 0]);
}

#[test]
fn one_weight_behind_two_norms_is_scaled_once() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $n1 = "n1" : f32[10]
  $n2 = "n2" : f32[10]
  $s = "s" : f32[8,10]
  $w = "w" : f32[10,8]
  %h1 = rms_norm %x, $n1 {eps=1e-5} : f32[B,S,10]
  %h2 = rms_norm %x, $n2 {eps=1e-5} : f32[B,S,10]
  %p = linear %h1, $s : f32[B,S,8]
  %q = linear %h2, $s : f32[B,S,8]
  %a = add %p, %q : f32[B,S,8]
  %y = linear %a, $w : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["n1, n2 -> s (10 free)", "s -> w (8 free)"]);
}

#[test]
fn one_weight_in_both_senses_is_pinned() {
    // The columns of the table make the scale that they would have to undo: it would be its own inverse.
    let body = |head: &str| {
        format!(
            r#"layer @0 (%i: i32[B,S]) {{
  $t = "t" : f32[12,10]
  $w = "w" : f32[12,10]
  %e = embedding %i, $t : f32[B,S,10]
  %y = linear %e, {head} : f32[B,S,12]
  return %y
}}"#
        )
    };
    let found = |head: &str| {
        let region = layer(&body(head));
        sites(&region, &BTreeSet::new()).iter().map(|s| describe(&region, s)).collect::<Vec<_>>()
    };
    assert_eq!(found("$w"), ["t -> w (10 free)"]);
    assert_eq!(found("$t"), [""; 0]);
}

#[test]
fn a_gain_that_is_also_a_bias_of_something_rigid_is_pinned() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $w = "w" : f32[10,10]
  $v = "v" : f32[10]
  %a = linear %x, $w, $v : f32[B,S,10]
  %n = rms_norm %a, $v {eps=1e-5} : f32[B,S,10]
  %b = linear %n, $w : f32[B,S,10]
  return %b
}"#;
    assert_eq!(found(body), [""; 0]);
}

#[test]
fn the_second_branch_of_a_product_passes_when_nothing_pins_either() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $g = "g" : f32[14,10]
  $u = "u" : f32[14,10]
  $d = "d" : f32[10,14]
  %h = rms_norm %x, $ln {eps=1e-5} : f32[B,S,10]
  %g = linear %h, $g : f32[B,S,14]
  %u = linear %h, $u : f32[B,S,14]
  %m = mul %g, %u : f32[B,S,14]
  %y = linear %m, $d : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["ln -> g, u (10 free)", "u -> d (14 free)"]);
}

#[test]
fn a_square_passes_nothing() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $u = "u" : f32[14,10]
  $d = "d" : f32[10,14]
  %u = linear %x, $u : f32[B,S,14]
  %m = mul %u, %u : f32[B,S,14]
  %y = linear %m, $d : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), [""; 0]);
}

#[test]
fn weights_over_the_same_rows_of_a_tensor_are_pinned_and_others_are_not() {
    let body = |v: &str| {
        format!(
            r#"layer @0 (%x: f32[B,S,10]) {{
  $ln = "ln" : f32[10]
  $all = "all" : f32[18,10]
  $q = rows($all, 0, 6) : f32[6,10]
  $k = rows($all, 6, 6) : f32[6,10]
  $v = rows($all, {v}, 6) : f32[6,10]
  $o = "o" : f32[10,6]
  %h = rms_norm %x, $ln {{eps=1e-5}} : f32[B,S,10]
  %q = linear %h, $q : f32[B,S,6]
  %k = linear %h, $k : f32[B,S,6]
  %v = linear %h, $v : f32[B,S,6]
  %a = sdpa %q, %k, %v {{causal, heads=2, kv_heads=2}} : f32[B,S,6]
  %y = linear %a, $o : f32[B,S,10]
  return %y
}}"#
        )
    };
    assert_eq!(found(&body("12")), ["ln -> q, k, v (10 free)", "v -> o (6 free)"]);
    assert_eq!(found(&body("7")), [""; 0]);
}

#[test]
fn a_quantized_weight_takes_no_scale() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $ln = "ln" : f32[10]
  $g = quant("g") : u4g4[14,10]
  $d = "d" : f32[10,14]
  %h = rms_norm %x, $ln {eps=1e-5} : f32[B,S,10]
  %g = linear %h, $g : f32[B,S,14]
  %y = linear %g, $d : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), [""; 0]);
}

#[test]
fn entries_without_a_form_are_written_out() {
    assert_eq!(data_map(&[Some(1), Some(0)], 2), None);
    assert_eq!(data_map(&[None, None, Some(0), Some(1), None], 2), Some(DataMap::Within { start: 2, total: 5 }));
    assert_eq!(
        data_map(&[Some(0), Some(1), Some(0), Some(1), Some(2), Some(3), Some(2), Some(3)], 4),
        Some(DataMap::Tie { width: 2, times: 2 })
    );
    assert_eq!(data_map(&[Some(0); 3], 1), Some(DataMap::Tie { width: 1, times: 3 }));
}

#[test]
fn names_say_nothing() {
    let body = r#"layer @0 (%x: f32[B,S,10]) {
  $a = "x1" : f32[10]
  $b = "x2" : f32[14,10]
  $c = "x3" : f32[10,14]
  %h = rms_norm %x, $a {eps=1e-5} : f32[B,S,10]
  %u = linear %h, $b : f32[B,S,14]
  %r = relu %u : f32[B,S,14]
  %y = linear %r, $c : f32[B,S,10]
  return %y
}"#;
    assert_eq!(found(body), ["a -> b (10 free)", "b -> c (14 free)"]);
}

//! Which linears count, what reaches the scores of an attention, where a block's output is, and what `profile` keeps.
#![allow(clippy::unwrap_used)] // also outside of test functions

mod support;

use awqc_ir::{NodeId, Region};
use awqc_passes::analysis::linears::{feeds_attention_scores, quantizable};
use awqc_passes::analysis::objective::objective;
use awqc_passes::awq_clip::AwqClip;
use awqc_passes::profile::{Profile, taps};
use support::{Bench, layer};

fn block(output: &str) -> Region {
    layer(&format!(
        r#"layer @0 (%x: f32[B,S,10], %cos: f32[S,1], %sin: f32[S,1]) {{
  $n1 = "n1" : f32[10]
  $n2 = "n2" : f32[10]
  $qn = "qn" : f32[3]
  $q = "q" : f32[12,10]
  $k = "k" : f32[6,10]
  $v = "v" : f32[4,10]
  $o = "o" : f32[10,8]
  $g = "g" : f32[14,10]
  $u = "u" : f32[14,10]
  $d = "d" : f32[10,14]
  %h = rms_norm %x, $n1 {{eps=1e-5}} : f32[B,S,10]
  %q = linear %h, $q : f32[B,S,12]
  %k = linear %h, $k : f32[B,S,6]
  %v = linear %h, $v : f32[B,S,4]
  %qq = rms_norm %q, $qn {{eps=1e-5, heads=4}} : f32[B,S,12]
  %qr = rope %qq, %cos, %sin {{heads=4}} : f32[B,S,12]
  %kr = rope %k, %cos, %sin {{heads=2}} : f32[B,S,6]
  %a = sdpa %qr, %kr, %v {{causal, heads=4, kv_heads=2}} : f32[B,S,8]
  %o = linear %a, $o : f32[B,S,10]
{output}"#
    ))
}

const SEQUENTIAL: &str = r#"  %on = rms_norm %o, $n2 {eps=1e-5} : f32[B,S,10]
  %r = add %x, %on : f32[B,S,10]
  %g = linear %r, $g : f32[B,S,14]
  %u = linear %r, $u : f32[B,S,14]
  %s = silu %g : f32[B,S,14]
  %m = mul %s, %u : f32[B,S,14]
  %d = linear %m, $d : f32[B,S,10]
  %y = add %r, %d : f32[B,S,10]
  return %y
}"#;

const PARALLEL: &str = r#"  %g = linear %h, $g : f32[B,S,14]
  %u = linear %h, $u : f32[B,S,14]
  %s = silu %g : f32[B,S,14]
  %m = mul %s, %u : f32[B,S,14]
  %d = linear %m, $d : f32[B,S,10]
  %b = add %o, %d : f32[B,S,10]
  %y = add %x, %b : f32[B,S,10]
  return %y
}"#;

fn nodes(region: &Region, outputs: &[&str]) -> Vec<NodeId> {
    let name = |l: &awqc_passes::analysis::linears::LinearUse| region.value(l.output).name.to_string();
    quantizable(region).iter().filter(|l| outputs.contains(&&*name(l))).map(|l| l.node).collect()
}

fn looks_at(region: &Region, outputs: &[&str]) -> Option<String> {
    let nodes = nodes(region, outputs);
    assert_eq!(nodes.len(), outputs.len());
    objective(region, &nodes).map(|v| region.value(v).name.to_string())
}

#[test]
fn a_block_ends_where_its_output_meets_the_residual_stream() {
    let region = block(SEQUENTIAL);
    assert_eq!(looks_at(&region, &["q", "k", "v"]).unwrap(), "on");
    assert_eq!(looks_at(&region, &["o"]).unwrap(), "on");
    assert_eq!(looks_at(&region, &["g", "u"]).unwrap(), "d");
    assert_eq!(looks_at(&region, &["d"]).unwrap(), "d");
    let region = block(PARALLEL);
    assert_eq!(looks_at(&region, &["q", "k", "v", "g", "u"]).unwrap(), "b");
    assert_eq!(looks_at(&region, &["g", "u"]).unwrap(), "d");
}

#[test]
fn paths_that_part_for_good_have_no_common_output() {
    let region = layer(
        r#"layer @0 (%x: f32[B,S,4]) {
  $a = "a" : f32[3,4]
  $b = "b" : f32[5,4]
  %y = linear %x, $a : f32[B,S,3]
  %z = linear %x, $b : f32[B,S,5]
  return %y, %z
}"#,
    );
    assert_eq!(looks_at(&region, &["y", "z"]), None);
    assert_eq!(looks_at(&region, &["z"]).unwrap(), "z");
}

#[test]
fn queries_and_keys_end_in_scores() {
    let region = block(SEQUENTIAL);
    let linears = quantizable(&region);
    let scores = linears.iter().filter(|l| feeds_attention_scores(&region, l));
    let names: Vec<_> = scores.map(|l| region.value(l.output).name.to_string()).collect();
    assert_eq!(names, ["q", "k"]);
}

#[test]
fn profile_keeps_each_linear_input_once() {
    let (mut bench, mut region) = (Bench::new(None), block(PARALLEL));
    let names = |region: &Region| taps(region).iter().map(|v| region.value(*v).name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&region), ["h", "a", "m"]);
    bench.pass::<Profile>(&mut region, "{}");
    let kept: Vec<_> = bench.facts.inputs.keys().copied().collect();
    assert_eq!(kept, taps(&region));
    assert!(bench.facts.inputs.values().flatten().all(|s| s.tokens == 40));
    assert_eq!(bench.numbers("profile", "channels"), [10.0, 8.0, 14.0]);
}

#[test]
fn a_weight_with_two_inputs_is_clipped_for_both() {
    let text = r#"layer @0 (%x: f32[B,S,8], %z: f32[B,S,8]) {
  $w = "w" : f32[6,8]
  %a = linear %x, $w : f32[B,S,6]
  %b = linear %z, $w : f32[B,S,6]
  return %a, %b
}"#;
    let loss = |keep: &[usize]| {
        let (mut bench, mut region) = (Bench::new(Some("u2g4")), layer(text));
        bench.pass::<Profile>(&mut region, "{}");
        for (i, s) in bench.facts.inputs.values_mut().flatten().enumerate() {
            if !keep.contains(&i) {
                s.tokens = 0;
            }
        }
        bench.pass::<AwqClip>(&mut region, "{}");
        bench.numbers("awq-clip", "loss_before")[0]
    };
    let (both, first, second) = (loss(&[0, 1]), loss(&[0]), loss(&[1]));
    assert!((both / (first + second) - 1.0).abs() < 1e-4, "{both} {first} {second}");
}

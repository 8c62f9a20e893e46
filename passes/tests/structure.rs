//! The structural passes on the file tests of the repository, without running anything: what the text becomes, and
//! that a second run changes nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use awqc_ir::{Module, text};
use awqc_passes::canonicalize::Canonicalize;
use awqc_passes::dce::Dce;
use awqc_passes::fuse_gate_up::FuseGateUp;
use awqc_passes::fuse_norm::FuseNorm;
use awqc_passes::fuse_qkv::FuseQkv;
use awqc_passes::fuse_rope::FuseRope;
use awqc_passes::fuse_swiglu::FuseSwiglu;
use awqc_passes::manager::{Manager, Options};
use awqc_passes::{Registry, Remarks};

use support::Nothing;

fn registry() -> Registry {
    Registry::empty()
        .with::<Canonicalize>()
        .with::<Dce>()
        .with::<FuseQkv>()
        .with::<FuseGateUp>()
        .with::<FuseNorm>()
        .with::<FuseRope>()
        .with::<FuseSwiglu>()
}

fn run(module: &mut Module, pipeline: &str) -> Remarks {
    let mut manager = Manager::new(&registry(), pipeline.parse().unwrap(), Options::default()).unwrap();
    let mut remarks = Remarks::default();
    let done = manager.run_module(module, &mut Nothing, &mut remarks, &mut |_| {});
    done.unwrap_or_else(|e| panic!("{e}"));
    remarks
}

/// The text after the passes that the file names, without types and alignment, a line each; and what was missed.
fn after(name: &str) -> (Vec<String>, Vec<String>) {
    let path = format!("{}/../tests/filetests/passes/{name}.awqir", env!("CARGO_MANIFEST_DIR"));
    let source = std::fs::read_to_string(path).unwrap();
    let pipeline = source.lines().next().and_then(|l| l.strip_prefix("// passes:")).unwrap().trim().to_owned();
    let mut module = text::parse(&source).unwrap_or_else(|e| panic!("{name}: {e}"));
    let remarks = run(&mut module, &pipeline);
    let once = text::print(&module);
    run(&mut module, &pipeline);
    assert_eq!(once, text::print(&module), "{name}: a second run changes nothing");
    let plain = |l: &str| l.split(" : ").next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let lines = once.lines().map(plain).filter(|l| !l.is_empty()).collect();
    let missed = remarks.list.into_iter().filter(|r| r.kind == awqc_passes::RemarkKind::Missed).map(|r| r.message);
    (lines, missed.collect())
}

/// The lines of the region's body, behind its header and before `return`.
fn body(name: &str) -> Vec<String> {
    let (lines, _) = after(name);
    let start = lines.iter().position(|l| l.starts_with("layer")).unwrap();
    lines[start + 1..].iter().filter(|l| *l != "}").cloned().collect()
}

/// The lines of a fused op's body.
fn fused(name: &str, op: &str) -> Vec<String> {
    let (lines, _) = after(name);
    let start =
        lines.iter().position(|l| l.starts_with(&format!("fused @{op} "))).unwrap_or_else(|| panic!("no @{op}"));
    lines[start + 1..].iter().take_while(|l| *l != "}").cloned().collect()
}

#[test]
fn canonicalize_ops() {
    let want = [
        "$w = \"w\"",
        "%a, %b = split %x {sizes=[16,32]}",
        "%y = linear %x, $w",
        "%r = relu %y",
        "%z = add %r, %b",
        "return %z",
    ];
    assert_eq!(body("canonicalize/ops"), want);
    assert_eq!(body("canonicalize/kept").len(), 6);
}

#[test]
fn canonicalize_weights() {
    let want = [
        "$whole = \"qkv\"",
        "$q = \"q\"",
        "$a = rows($q, 4, 10)",
        "$head = rows($whole, 0, 40)",
        "$tail = rows($whole, 40, 24)",
        "$c = \"r\"",
        "$d = rows($whole, 12, 20)",
        "$apart = cat.0($tail, $head)",
        "%a = linear %x, $a",
        "%b = linear %x, $whole",
        "%c = linear %x, $c",
        "%d = linear %x, $d",
        "%e = linear %x, $apart",
        "%y = concat %a, %b, %c, %d, %e",
        "return %y",
    ];
    let mut got = body("canonicalize/weights");
    got.sort_by_key(|l| !l.starts_with('$'));
    let mut want = want.map(str::to_owned);
    // The order of definitions is not this pass's concern.
    got[..8].sort();
    want[..8].sort();
    assert_eq!(got, want);
}

#[test]
fn dce() {
    assert_eq!(body("dce/chain"), ["$u = \"u\"", "%e = linear %x, $u", "return %e"]);
    assert_eq!(body("dce/half_used"), ["%a, %b = split %x {sizes=[16,32]}", "%d = silu %b", "return %d"]);
}

#[test]
fn qkv_is_joined_in_the_order_of_the_attention() {
    let got = body("fuse-qkv/rope");
    for line in ["$qkv = cat.0($q, $k, $v)", "%qkv = linear %x, $qkv", "%q, %k, %v = split %qkv {sizes=[60,30,30]}"] {
        assert!(got.iter().any(|l| l == line), "{line} in {got:#?}");
    }
    let got = body("fuse-qkv/quantized");
    let want =
        ["$qkv = quant(cat.0($q, $k, $v))", "$qkv_bias = cat.0($bq, $bk, $bv)", "%qkv = linear %x, $qkv, $qkv_bias"];
    for line in want {
        assert!(got.iter().any(|l| l == line), "{line} in {got:#?}");
    }
    assert_eq!(got.iter().filter(|l| l.contains("linear")).count(), 1);
    let (lines, missed) = after("fuse-qkv/apart");
    assert_eq!(lines.iter().filter(|l| l.contains("linear")).count(), 3);
    assert_eq!(missed, ["%q, %k, %v stay apart: their weights are of different types, u4g16[60,48] and u4g24[30,48]"]);
}

#[test]
fn the_gate_comes_first() {
    let got = body("fuse-gate-up/silu");
    assert!(got.contains(&"$gu = cat.0($g, $u)".to_owned()), "{got:#?}");
    let got = body("fuse-gate-up/gate_second");
    for line in [
        "$gu = quant(cat.0($g, $u))",
        "$gu_bias = cat.0($c, $b)",
        "%g, %u = split %gu {sizes=[80,80]}",
        "%m = mul %u, %s",
    ] {
        assert!(got.iter().any(|l| l == line), "{line} in {got:#?}");
    }
}

#[test]
fn sum_and_norm() {
    assert!(body("fuse-norm/rms").contains(&"%r, %h = fused @add_rms_norm(%x, %o, $g)".to_owned()));
    let want = ["%r = add %x, %o", "%h = rms_norm %r, $g {eps=1e-5, offset=1.0}", "return %r, %h"];
    assert_eq!(fused("fuse-norm/rms", "add_rms_norm"), want);
    // Two calls, one definition.
    let (lines, _) = after("fuse-norm/layer");
    assert_eq!(lines.iter().filter(|l| l.contains("= fused @add_layer_norm(")).count(), 2);
    assert_eq!(lines.iter().filter(|l| l.starts_with("fused @")).count(), 1);
    let (lines, missed) = after("fuse-norm/kept");
    assert!(!lines.iter().any(|l| l.contains("fused")), "{lines:#?}");
    let want = [
        "add_rms_norm at %a: %x is f32[B,S,48] and %p is f32[S,48], they must be equal",
        "add_rms_norm at %b: %b is a rms_norm with `heads`",
    ];
    assert_eq!(missed, want);
}

#[test]
fn rotations() {
    assert!(body("fuse-rope/split").contains(&"%qr, %kr, %v = fused @rope_qkv(%qkv, %cos, %sin)".to_owned()));
    assert_eq!(fused("fuse-rope/split", "rope_qkv").len(), 4);
    // Query first, whatever the order of the text.
    assert!(body("fuse-rope/separate").contains(&"%qr, %kr = fused @rope_qk(%q, %k, %cos, %sin)".to_owned()));
    let escapes = body("fuse-rope/escapes");
    assert!(escapes[0].starts_with("%q, %k, %v = split"), "{escapes:#?}");
    assert!(escapes[1].starts_with("%qr, %kr = fused @rope_qk("), "{escapes:#?}");
}

#[test]
fn gates() {
    assert!(body("fuse-swiglu/silu").contains(&"%m = fused @swiglu(%gu)".to_owned()));
    assert!(body("fuse-swiglu/gelu").contains(&"%m = fused @geglu(%gu)".to_owned()));
    assert_eq!(fused("fuse-swiglu/gelu", "geglu")[1], "%s = gelu %g {form=tanh}");
    let (lines, missed) = after("fuse-swiglu/kept");
    assert!(!lines.iter().any(|l| l.contains("fused")));
    assert!(
        missed.contains(&"swiglu at %n: %a is also used outside of the fused nodes (not contained)".to_owned()),
        "{missed:#?}"
    );
}

#[test]
fn a_whole_block() {
    let want = [
        "%h1 = rms_norm %x, $ln1 {eps=1e-5}",
        "%qkv = linear %h1, $qkv",
        "%qr, %kr, %v = fused @rope_qkv(%qkv, %cos, %sin)",
        "%a = sdpa %qr, %kr, %v {causal, heads=4, kv_heads=2}",
        "%o = linear %a, $o",
        "%r1, %h2 = fused @add_rms_norm(%x, %o, $ln2)",
        "%gu = linear %h2, $gu",
        "%m = fused @swiglu(%gu)",
        "%d = linear %m, $d",
        "%r2 = add %r1, %d",
        "return %r2",
    ];
    let got: Vec<String> = body("fuse-qkv/block").into_iter().filter(|l| !l.starts_with('$')).collect();
    assert_eq!(got, want);
}

#[test]
fn layers_share_fused_definitions() {
    let path = format!("{}/../tests/filetests/passes/fuse-swiglu/silu.awqir", env!("CARGO_MANIFEST_DIR"));
    let source = std::fs::read_to_string(path).unwrap();
    let mut module = text::parse(&source).unwrap();
    let mut second = module.regions[0].clone();
    second.name = awqc_ir::RegionName::Layer(1);
    // The results of a layer are the next layer's parameters: a block of other types is verified on its own.
    run(&mut module, "fuse-swiglu");
    let mut next = Module { regions: vec![second], ..module.clone() };
    run(&mut next, "fuse-swiglu");
    assert_eq!(next.fused.len(), 1);
}

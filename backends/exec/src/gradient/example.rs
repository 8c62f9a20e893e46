//! A model for the tests of what goes back through models.
#![allow(clippy::unwrap_used)]

use awqc_ir::{Elem, Group, Module, Op, Operand, Quant, Type, WeightExpr, parse};

use crate::memory::MemorySource;

/// Two layers: query heads that share keys and values, a gated MLP in a fused op, a tied head.
const DECODER: &str = r#"awqir 1
model "tiny" {dtype=f32}
dim B, S

fused @gate (%g: f32[B,S,32], %u: f32[B,S,32]) {
  %a = silu %g
  %m = mul %a, %u
  return %m
}

region @embed (%ids: i32[B,S], %pos: i32[S]) {
  $emb       = "embed" : f32[40,24]
  %x         = embedding %ids, $emb
  %cos, %sin = rope_table %pos {dim=6, theta=10000.0}
  return %x, %cos, %sin
}

layer @0..1 (%x: f32[B,S,24], %cos: f32[S,3], %sin: f32[S,3]) from "layers.{i}" {
  $ln1 = "ln1"  : f32[24]
  $qkv = "qkv"  : f32[48,24]
  $o   = "o"    : f32[24,24]
  $ob  = "ob"   : f32[24]
  $ln2 = "ln2"  : f32[24]
  $lb  = "lb"   : f32[24]
  $g   = "gate" : f32[32,24]
  $u   = "up"   : f32[32,24]
  $d   = "down" : f32[24,32]
  %h1  = rms_norm %x, $ln1 {eps=1e-5}
  %qkv = linear %h1, $qkv
  %q, %k, %v = split %qkv {sizes=[24, 12, 12]}
  %qr  = rope %q, %cos, %sin {heads=4}
  %kr  = rope %k, %cos, %sin {heads=2}
  %a   = sdpa %qr, %kr, %v {causal, heads=4, kv_heads=2}
  %o   = linear %a, $o, $ob
  %r1  = add %x, %o
  %h2  = layer_norm %r1, $ln2, $lb {eps=1e-5}
  %g   = linear %h2, $g
  %u   = linear %h2, $u
  %m   = fused @gate(%g, %u)
  %y   = linear %m, $d
  %r2  = add %r1, %y
  return %r2
}

region @head (%x: f32[B,S,24]) {
  $ln  = "norm"  : f32[24]
  $emb = "embed" : f32[40,24]
  %h   = rms_norm %x, $ln {eps=1e-5}
  %y   = linear %h, $emb
  return %y
}
"#;

/// Numbers in (−1, 1).
pub(crate) fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

/// The float model, its tensors, and the same model with linears of 3 bits.
pub(crate) fn models() -> (Module, MemorySource, Module) {
    let float = parse(DECODER).unwrap();
    let mut source = MemorySource::new();
    let mut number = random(5);
    for region in &float.regions {
        for id in region.weight_ids() {
            let WeightExpr::Source(name) = &region.weight(id).expr else { continue };
            let shape = region.weight(id).ty.const_shape().unwrap();
            let (spread, middle) = if shape.len() == 2 { (0.4, 0.0) } else { (0.3, 1.0) };
            let data: Vec<f32> = (0..shape.iter().product()).map(|_| middle + spread * number()).collect();
            source.insert_f32(region.tensor_name(name), &shape, &data);
        }
    }
    let mut small = float.clone();
    let quant = Quant { bits: 3, symmetric: false, group: Group::Size(8) };
    for region in small.regions.iter_mut().filter(|r| r.name.is_layer()) {
        let linears: Vec<_> = region
            .nodes()
            .filter(|(_, n)| matches!(n.op, Op::Linear(_)))
            .filter_map(|(_, n)| match n.operands.get(1) {
                Some(Operand::Weight(w)) => Some(*w),
                Some(Operand::Value(_)) | None => None,
            })
            .collect();
        for weight in linears {
            let ty = Type::new(Elem::Quant(quant), region.weight(weight).ty.shape.clone());
            region.wrap_weight(weight, ty, WeightExpr::Quant);
        }
    }
    (float, source, small)
}

/// Windows of 12 to 14 tokens.
pub(crate) fn windows(count: usize) -> Vec<Vec<i32>> {
    let mut number = random(11);
    (0..count).map(|i| (0..12 + i % 3).map(|_| ((number() + 1.0) * 20.0) as i32).collect()).collect()
}

//! The text form on whole modules: what is written reads back, templates expand, wrong texts are refused with a place.

use awqc_ir::{Env, parse, parse_with, print};
use serde_json::{Value as Json, json};

const BLOCK: &str = r#"awqir 1
model "llama" {dtype=f16, hidden=64, layers=3, tied}
dim B, S

fused @swiglu (%gu: f16[B,S,224]) {
  %g, %u = split %gu {sizes=[112,112]} : f16[B,S,112], f16[B,S,112]
  %s     = silu %g                     : f16[B,S,112]
  %m     = mul %s, %u                  : f16[B,S,112]
  return %m
}

region @embed (%ids: i32[B,S], %pos: i32[S]) from "model" {
  $e = "embed_tokens.weight" : f16[100,64]

  %x         = embedding %ids, $e                                                  : f16[B,S,64]
  %cos, %sin = rope_table %pos {dim=16, theta=500000.0, scaling=linear(factor=8.0)} : f32[S,8], f32[S,8]
  return %x, %cos, %sin
}

layer @0..1 (%x: f16[B,S,64], %cos: f32[S,8], %sin: f32[S,8]) from "model.layers.{i}" {
  #s0  = data "attn_in"                                                               : f32[64]
  #s1  = data "attn_out"                                                              : f32[32]
  $ln1 = div.0("input_layernorm.weight", #s0)                                         : f16[64]
  $q   = quant(mul.1("self_attn.q_proj.weight", #s0))                                 : u4g32[64,64]
  $k   = quant(mul.1("self_attn.k_proj.weight", #s0))                                 : u4g32[32,64]
  $v   = quant(div.0(mul.1("self_attn.v_proj.weight", #s0), #s1))                     : u4g32[32,64]
  $o   = pack(quant(mul.1("self_attn.o_proj.weight", tie(#s1, 16, 2))))               : u4g32@rows[64,64]
  $g   = "mlp.gate_proj.weight"                                                       : f16[112,64]
  $u   = "mlp.up_proj.weight"                                                         : f16[112,64]
  $gu  = cat.0($g, $u)                                                                : f16[224,64]
  $d   = transpose("mlp.down_proj.weight")                                            : f16[64,112]

  %h1 = rms_norm %x, $ln1 {eps=1e-5}                    : f16[B,S,64]
  %q  = linear %h1, $q                                  : f16[B,S,64]
  %k  = linear %h1, $k                                  : f16[B,S,32]
  %v  = linear %h1, $v                                  : f16[B,S,32]
  %qr = rope %q, %cos, %sin {heads=4}                   : f16[B,S,64]
  %kr = rope %k, %cos, %sin {heads=2}                   : f16[B,S,32]
  %a  = sdpa %qr, %kr, %v {causal, heads=4, kv_heads=2} : f16[B,S,64]
  %o  = linear %a, $o                                   : f16[B,S,64]
  %r1 = add %x, %o                                      : f16[B,S,64]
  %gu = linear %r1, $gu                                 : f16[B,S,224]
  %m  = fused @swiglu(%gu)                              : f16[B,S,112]
  %d  = linear %m, $d                                   : f16[B,S,64]
  %r2 = add %r1, %d                                     : f16[B,S,64]
  return %r2
}

layer @2 (%x: f16[B,S,64]) from "model.layers.2" {
  %y = gelu %x {form=tanh} : f16[B,S,64]
  return %y
}
"#;

/// Columns are white space: two texts are compared without it.
fn squeezed(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_module_reads_back() {
    let module = parse(BLOCK).map_err(|e| e.to_string()).unwrap();
    assert_eq!(module.layers(), 3);
    let printed = print(&module);
    assert_eq!(squeezed(&printed), squeezed(BLOCK));
    assert_eq!(print(&parse(&printed).unwrap()), printed);
}

//! A small model, random weights for it, and a reader of what the emitters write.

use std::collections::BTreeMap;
use std::path::Path;

use awqc_exec::MemorySource;
use awqc_ir::{Module, RawTensor, Stored, TensorInfo, WeightExpr, parse};

/// Two decoder layers of unlike sizes: 3 query heads on 1 key/value head, a gated MLP in a fused op, a tied head.
pub(crate) const DECODER: &str = r#"awqir 1
model "tiny" {dtype=f16}
dim B, S

fused @gate (%g: f16[B,S,32], %u: f16[B,S,32], $w: f16[24,32]) {
  %a = silu %g
  %m = mul %a, %u
  %y = linear %m, $w
  return %y
}

region @embed (%ids: i32[B,S], %pos: i32[S]) {
  $emb       = "embed.weight"      : f16[50,24]
  %x         = embedding %ids, $emb
  %cos, %sin = rope_table %pos {dim=6, theta=10000.0}
  return %x, %cos, %sin
}

layer @0..1 (%x: f16[B,S,24], %cos: f32[S,3], %sin: f32[S,3]) from "layers.{i}" {
  $ln1 = "ln1.weight" : f16[24]
  $q   = "q.weight"   : f16[24,24]
  $k   = "k.weight"   : f16[8,24]
  $v   = "v.weight"   : f16[8,24]
  $o   = "o.weight"   : f16[24,24]
  $ob  = "o.bias"     : f16[24]
  $ln2 = "ln2.weight" : f16[24]
  $g   = "gate.weight" : f16[32,24]
  $u   = "up.weight"  : f16[32,24]
  $d   = "down.weight" : f16[24,32]
  %h1  = rms_norm %x, $ln1 {eps=1e-5}
  %q   = linear %h1, $q
  %k   = linear %h1, $k
  %v   = linear %h1, $v
  %qr  = rope %q, %cos, %sin {heads=3}
  %kr  = rope %k, %cos, %sin {heads=1}
  %a   = sdpa %qr, %kr, %v {causal, heads=3, kv_heads=1}
  %o   = linear %a, $o, $ob
  %r1  = add %x, %o
  %h2  = rms_norm %r1, $ln2 {eps=1e-5}
  %g   = linear %h2, $g
  %u   = linear %h2, $u
  %m   = fused @gate(%g, %u, $d)
  %r2  = add %r1, %m
  return %r2
}

region @head (%x: f16[B,S,24]) {
  $ln  = "norm.weight"  : f16[24]
  $emb = "embed.weight" : f16[50,24]
  %h   = rms_norm %x, $ln {eps=1e-5}
  %y   = linear %h, $emb
  return %y
}
"#;

/// The module of a text.
pub(crate) fn module(text: &str) -> Module {
    parse(text).map_err(|e| panic!("{e}")).unwrap()
}

/// A generator of numbers in [-1, 1).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    pub(crate) fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}

/// Random tensors for every source of `module`: gains near 1, matrices of sensible size.
pub(crate) fn weights(module: &Module) -> MemorySource {
    let mut source = MemorySource::new();
    let mut random = Random(7);
    for region in &module.regions {
        for id in region.weight_ids() {
            let weight = region.weight(id);
            if let WeightExpr::Source(name) = &weight.expr {
                let shape = weight.ty.const_shape().unwrap();
                let mut data = random.numbers(shape.iter().product());
                match shape.as_slice() {
                    [_, fan] => data.iter_mut().for_each(|v| *v *= 1.7 / (*fan as f32).sqrt()),
                    _ => data.iter_mut().for_each(|v| *v = 1.0 + 0.3 * *v),
                }
                let data: Vec<f32> = data.iter().map(|v| weight.ty.elem.round(*v)).collect();
                source.insert_f32(region.tensor_name(name), &shape, &data);
            }
        }
    }
    source
}

/// Token windows of these lengths.
pub(crate) fn windows(lengths: &[usize], vocab: u64) -> Vec<Vec<i32>> {
    let mut random = Random(3);
    lengths.iter().map(|n| (0..*n).map(|_| (random.bits() % vocab) as i32).collect()).collect()
}

/// Largest difference; the lengths must agree.
pub(crate) fn diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() })
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

/// The tensors of a safetensors file, read by the format's own library.
pub(crate) fn read(path: &Path) -> BTreeMap<String, RawTensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = |d| match d {
        safetensors::Dtype::F32 => Stored::F32,
        safetensors::Dtype::F16 => Stored::F16,
        safetensors::Dtype::BF16 => Stored::Bf16,
        safetensors::Dtype::U8 => Stored::U8,
        safetensors::Dtype::I32 => Stored::I32,
        other => panic!("{other:?}"),
    };
    let tensors = file.tensors().into_iter();
    tensors
        .map(|(n, t)| {
            (
                n,
                RawTensor {
                    info: TensorInfo { stored: stored(t.dtype()), shape: t.shape().to_vec() },
                    bytes: t.data().to_vec(),
                },
            )
        })
        .collect()
}

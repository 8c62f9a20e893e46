//! The gradient against differences of the divergence itself, and what tuning does to a model.

use awqc_ir::{Elem, Group, Module, Op, Operand, Quant, Type, WeightExpr, parse, verify::verify};

use super::{Options, Student, settle, tune};
use crate::control::Control;
use crate::memory::MemorySource;
use crate::stream;

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

fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

/// The model, its tensors, and the same model with linears of 3 bits.
fn models() -> (Module, MemorySource, Module) {
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

fn windows(count: usize) -> Vec<Vec<i32>> {
    let mut number = random(11);
    (0..count).map(|i| (0..12 + i % 3).map(|_| ((number() + 1.0) * 20.0) as i32).collect()).collect()
}

#[test]
fn the_gradient_is_that_of_the_divergence() {
    let (float, source, mut small) = models();
    small.regions.iter_mut().for_each(|r| settle(r, &source).unwrap());
    let windows = windows(2);
    let control = Control::new();
    let teacher = stream::prepare(verify(&float).unwrap(), &source, &windows, &control).unwrap();
    let mut student = Student::new(&small, &source).unwrap();
    let loss = student.step(&teacher, &windows, &[0, 1], 0.0, &control).unwrap();
    let measured = student.divergence(&teacher, &windows, &[0, 1], &control).unwrap();
    assert!(loss > 0.01 && (loss - measured).abs() < 1e-5, "{loss} {measured}");
    let mut number = random(23);
    let mut checked = 0;
    for region in 0..student.moved.len() {
        for weight in 0..student.moved[region].len() {
            let moved = &student.moved[region][weight];
            let at = ((number() + 1.0) * 0.5 * moved.len() as f32) as usize % moved.len();
            let want = f64::from(moved.first_gradient(at));
            let mut at_change = |change: f32| {
                student.moved[region][weight].set(at, change);
                student.divergence(&teacher, &windows, &[0, 1], &control).unwrap()
            };
            let step = 0.02f32;
            let (up, down) = (at_change(step), at_change(-step));
            at_change(0.0);
            let got = (up - down) / f64::from(2.0 * step);
            assert!((got - want).abs() < 2e-4 + 0.03 * want.abs(), "region {region}, weight {weight}: {got} {want}");
            checked += usize::from(want.abs() > 1e-3);
        }
    }
    // Two layers of a norm each side, four or five linears; the last norm.
    assert!(checked >= 8, "only {checked} gradients are large enough to tell");
}

#[test]
fn tuning_lowers_the_divergence_on_windows_that_it_did_not_see() {
    let (float, source, small) = models();
    let windows = windows(24);
    let control = Control::new();
    let options = Options { steps: 60, batch: 4, rate: 0.01, held_out: 4 };
    let mut tuned = small.clone();
    let float = verify(&float).unwrap();
    let mut reported = Vec::new();
    let mut report = |step, loss| reported.push((step, loss));
    let result = tune(&mut tuned, float, &source, &windows, &options, &control, &mut report).unwrap();
    assert!(result.kept && result.after < 0.8 * result.before, "{} {}", result.before, result.after);
    assert_eq!((result.steps.len(), reported.len(), reported[59].0), (60, 60, 60));
    // The module holds what was measured, but for the rounding of scales to f16.
    verify(&tuned).unwrap();
    let teacher = stream::prepare(float, &source, &windows, &control).unwrap();
    let student = Student::new(&tuned, &source).unwrap();
    let again = student.divergence(&teacher, &windows, &[20, 21, 22, 23], &control).unwrap();
    assert!((again - result.after).abs() < 0.01 * result.after, "{again} {}", result.after);
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let (float, source, small) = models();
    let windows = windows(8);
    let options = Options { steps: 3, batch: 3, rate: 0.01, held_out: 2 };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut module = small.clone();
        let float = verify(&float).unwrap();
        pool.install(|| {
            tune(&mut module, float, &source, &windows, &options, &Control::new(), &mut |_, _| {}).unwrap().steps
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn too_few_windows_are_refused_and_nothing_is_moved() {
    let (float, source, small) = models();
    let mut module = small.clone();
    let options = Options { steps: 3, batch: 1, rate: 0.01, held_out: 4 };
    let float = verify(&float).unwrap();
    let error = tune(&mut module, float, &source, &windows(4), &options, &Control::new(), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("more than 4"), "{error}");
    assert_eq!(awqc_ir::text::print(&module), awqc_ir::text::print(&small));
}

//! Values share memory only where nobody can tell: random programs full of splits, in-place steps, values that are used
//! again late, and products with windows, against the reference executor.

use std::fmt::Write;

use awqc_cpu::{Activations, CacheNumbers, CpuError, Isa, Options, Pages, Session};
use awqc_exec::{Host, Logits, MemorySource};
use awqc_ir::{WeightExpr, parse, verify};

use crate::support::{Random, numbers};

/// Channels of every value but those in the middle of a split and a concat.
const WIDTH: usize = 16;
const VOCABULARY: usize = 11;

/// A program of so many random steps, whose results are values from anywhere in it.
fn program(rng: &mut Random, steps: usize) -> String {
    let mut body = String::new();
    let mut weights = String::new();
    let mut values = vec![0];
    for step in 1..=steps {
        // Old values too, so that some live long; the latest more often, so that some die at once.
        let pick = |rng: &mut Random| {
            let last = values.len() - 1;
            values[if rng.bits().is_multiple_of(2) { last } else { rng.bits() as usize % values.len() }]
        };
        let (a, b) = (pick(rng), pick(rng));
        let half = WIDTH / 2;
        match rng.bits() % 9 {
            0 => writeln!(body, "  %v{step} = add %v{a}, %v{b}"),
            1 => writeln!(body, "  %v{step} = mul %v{a}, %v{b}"),
            2 => writeln!(body, "  %v{step} = silu %v{a}"),
            3 => writeln!(body, "  %v{step} = rms_norm %v{a} {{eps=1e-5}}"),
            4 => writeln!(body, "  %v{step} = sdpa %v{a}, %v{b}, %v{a} {{causal, heads=2, kv_heads=2}}"),
            5 => {
                // Halves that are changed on their own, and one is read before and after.
                writeln!(body, "  %l{step}, %r{step} = split %v{a} {{sizes=[{half},{half}]}}")
                    .and_then(|()| writeln!(body, "  %s{step} = silu %l{step}"))
                    .and_then(|()| writeln!(body, "  %m{step} = mul %r{step}, %s{step}"))
                    .and_then(|()| writeln!(body, "  %v{step} = concat %m{step}, %s{step}"))
            }
            6 => {
                // A product with a window.
                writeln!(weights, "  $w{step} = \"w{step}\" : f32[{WIDTH},{half}]")
                    .and_then(|()| writeln!(body, "  %l{step}, %r{step} = split %v{a} {{sizes=[{half},{half}]}}"))
                    .and_then(|()| writeln!(body, "  %v{step} = linear %r{step}, $w{step}"))
            }
            7 => writeln!(weights, "  $w{step} = \"w{step}\" : f32[{WIDTH},{WIDTH}]")
                .and_then(|()| writeln!(body, "  %v{step} = linear %v{a}, $w{step}")),
            _ => writeln!(weights, "  $w{step} = quant(\"w{step}\") : u4g8[{WIDTH},{WIDTH}]")
                .and_then(|()| writeln!(body, "  %v{step} = linear %v{a}, $w{step}")),
        }
        .expect("strings take everything");
        values.push(step);
    }
    let one = values[rng.bits() as usize % values.len()];
    format!(
        "awqir 1\nmodel \"random\" {{dtype=f32}}\ndim B, S\n\n\
         region @embed (%ids: i32[B,S]) {{\n  $e = \"e\" : f32[{VOCABULARY},{WIDTH}]\n\
         \x20 %x = embedding %ids, $e\n  return %x\n}}\n\n\
         region @0 (%v0: f32[B,S,{WIDTH}]) {{\n{weights}{body}  return %v{steps}, %v{one}\n}}\n\n\
         region @head (%x: f32[B,S,{WIDTH}], %y: f32[B,S,{WIDTH}]) {{\n  $h = \"h\" : f32[{VOCABULARY},{WIDTH}]\n\
         \x20 %s = add %y, %x\n  %n = rms_norm %s {{eps=1e-5}}\n  %z = linear %n, $h\n  return %z\n}}\n"
    )
}

#[test]
fn random_programs_compute_the_same() {
    let mut rng = Random::new(5);
    for round in 0..300 {
        let text = program(&mut rng, 3 + round % 12);
        let module = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let verified = verify(&module).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let mut source = MemorySource::new();
        for region in &module.regions {
            for id in region.weight_ids() {
                if let WeightExpr::Source(name) = &region.weight(id).expr {
                    let shape = region.weight(id).ty.const_shape().expect("constant shapes");
                    let data: Vec<f32> = numbers(&mut rng, shape.iter().product()).iter().map(|v| v / 2.0).collect();
                    source.insert_f32(region.tensor_name(name), &shape, &data);
                }
            }
        }
        let ids: Vec<i32> = (0..40).map(|_| (rng.bits() as usize % VOCABULARY) as i32).collect();
        let mut reference =
            awqc_exec::Session::<Host>::new(verified, &source, Default::default()).unwrap_or_else(|e| panic!("{e}"));
        let want = reference.forward(&ids, Logits::All).unwrap_or_else(|e| panic!("{e}\n{text}")).data;
        let pages = if round % 2 == 0 { Pages::Map } else { Pages::Huge };
        let options = Options {
            context: 40,
            threads: 2,
            isa: Isa::detect(),
            activations: Activations::F32,
            pages,
            cache: CacheNumbers::F32,
        };
        let mut session = Session::new(verified, &source, options).unwrap_or_else(|e| panic!("{e}\n{text}"));
        for _ in 0..2 {
            let got = session.forward(&ids, Logits::All).unwrap_or_else(|e| panic!("{e}\n{text}")).data;
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() <= 2e-4 * want.abs().max(1.0), "{got} instead of {want}\n{text}");
            }
            session.reset();
        }
    }
}

#[test]
fn attention_that_sees_later_tokens_is_refused() {
    let text = "awqir 1\nmodel \"m\" {dtype=f32}\ndim B, S\n\nregion @embed (%ids: i32[B,S]) {\n  $e = \"e\" : f32[5,8]\n  \
                %x = embedding %ids, $e\n  %y = sdpa %x, %x, %x {heads=1, kv_heads=1}\n  return %y\n}\n\n\
                region @head (%x: f32[B,S,8]) {\n  $h = \"h\" : f32[5,8]\n  %y = linear %x, $h\n  return %y\n}\n";
    let module = parse(text).unwrap_or_else(|e| panic!("{e}"));
    let mut source = MemorySource::new();
    ["e", "h"].iter().for_each(|name| source.insert_f32(*name, &[5, 8], &[0.5; 40]));
    let options = Options {
        context: 8,
        threads: 1,
        isa: Isa::Scalar,
        activations: Activations::F32,
        pages: Pages::Map,
        cache: CacheNumbers::F32,
    };
    let made = Session::new(verify(&module).unwrap_or_else(|e| panic!("{e}")), &source, options);
    let Err(CpuError::Unsupported(why)) = made.map(|_| ()) else { panic!("it was accepted") };
    assert!(why.contains("sdpa") && why.contains("causal"), "{why}");
}

//! Whole modules against the reference: what can stand between `dispatch` and `combine`.

use awqc_cuda::{CudaError, Session, lower};
use awqc_exec::{Host, Logits, MemorySource};
use awqc_ir::{Module, WeightExpr, parse, verify};

use crate::emulator::arch;
use crate::support::{Bench, Random, error};

const VOCABULARY: usize = 7;

/// A layer with this body, which makes `%o` of `%x`.
fn module(weights: &str, body: &str) -> (Module, MemorySource) {
    let text = format!(
        "awqir 1\nmodel \"m\" {{dtype=f32}}\ndim B, S\n\nregion @embed (%ids: i32[B,S]) {{\n  $e = \"e\" : f32[{VOCABULARY},16]\n  \
         %x = embedding %ids, $e\n  return %x\n}}\n\nregion @0 (%x: f32[B,S,16]) {{\n{weights}{body}  return %o\n}}\n\n\
         region @head (%x: f32[B,S,16]) {{\n  $h = \"h\" : f32[{VOCABULARY},16]\n  %z = linear %x, $h\n  return %z\n}}\n"
    );
    let module = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let (mut source, mut random) = (MemorySource::new(), Random::new(3));
    for region in &module.regions {
        for id in region.weight_ids() {
            if let WeightExpr::Source(name) = &region.weight(id).expr {
                let shape = region.weight(id).ty.const_shape().expect("constant shapes");
                source.insert_f32(region.tensor_name(name), &shape, &random.floats(shape.iter().product()));
            }
        }
    }
    (module, source)
}

#[test]
fn whatever_treats_rows_by_themselves_runs_between_dispatch_and_combine() {
    // Steps on what was dispatched, heads of rows, rows of two products, and rows that no product saw.
    let (module, source) = module(
        "  $r = \"r\" : f32[6,16]\n  $n = \"n\" : f32[16]\n  $a = \"a\" : f32[6,20,16]\n  $b = \"b\" : f32[6,16,20]\n",
        "  %l = linear %x, $r\n  %p = softmax %l\n  %w, %e = top_k %p {k=3, normalize, scale=1.5}\n  \
         %t = dispatch %x, %e {experts=6}\n  %tn = rms_norm %t, $n {eps=1e-5}\n  %ts = add %tn, %t\n  \
         %g = linear %ts, $a\n  %f = linear %t, $a\n  %gf = add %g, %f\n  %u, %v = split %gf {sizes=[5,5], heads=2}\n  \
         %s = silu %u\n  %m = mul %s, %v\n  %c = concat %m, %v {heads=2}\n  %y = linear %c, $b\n  %k = add %y, %ts\n  \
         %d = combine %k, %w, %e\n  %q = combine %t, %w, %e\n  %both = add %d, %q\n  %o = add %both, %x\n",
    );
    let verified = verify(&module).unwrap_or_else(|e| panic!("{e}"));
    let lowered = lower(verified, &source, arch()).unwrap_or_else(|e| panic!("{e}"));
    let bench = Bench::new(&lowered.kernels);
    let image = |name: &str| {
        let kernel = lowered.kernels.iter().find(|k| k.name == name);
        kernel.map_or_else(|| Err(CudaError::Artefact(name.to_owned())), |kernel| bench.image(kernel))
    };
    let mut cuda = Session::new(lowered.plan.clone(), &source, image, bench.another(), 96).expect("a session");
    let mut reference = awqc_exec::Session::<Host>::new(verified, &source, Default::default()).expect("a session");
    let ids: Vec<i32> = (0..70).map(|i| (i * i / 3 % VOCABULARY) as i32).collect();
    for part in [&ids[..1], &ids[..8], &ids[..9], &ids] {
        cuda.reset();
        reference.reset();
        let got = cuda.forward(part, Logits::All).expect("logits");
        let want: Vec<f64> =
            reference.forward(part, Logits::All).expect("logits").data.iter().map(|v| f64::from(*v)).collect();
        let error = error(&got.data, &want);
        assert!(error < 1e-5, "{} tokens: {error}", part.len());
    }
}

#[test]
fn what_rows_of_experts_have_no_kernel_for_is_refused() {
    let choice = "  %l = linear %x, $r\n  %w, %e = top_k %l {k=2}\n  %t = dispatch %x, %e {experts=4}\n";
    let other = "  %v, %f = top_k %l {k=2, scale=2.0}\n  %u = dispatch %x, %f {experts=4}\n";
    for (body, why) in [
        (format!("{choice}{other}  %s = add %t, %u\n  %o = combine %s, %w, %e\n"), "by different choices"),
        (format!("{choice}{other}  %o = combine %t, %v, %f\n"), "the experts that it names"),
    ] {
        let (module, source) = module("  $r = \"r\" : f32[4,16]\n", &body);
        let verified = verify(&module).unwrap_or_else(|e| panic!("{e}\n{body}"));
        let refused = lower(verified, &source, arch()).map(|_| ()).expect_err("it is refused").to_string();
        assert!(refused.contains("region @0") && refused.contains(why), "{refused}");
    }
}

//! Attention, float products and the largest logit against their formulas in f64.

use awqc_cuda::arch::Arch;
use awqc_cuda::kernels::attend::{Shape, join_source, source};
use awqc_cuda::kernels::{Float, argmax, dense};
use awqc_ir::op::{Alibi, Sdpa};
use half::bf16;

use crate::support::{Bench, Random, error, rounded};

fn op(heads: u64, kv_heads: u64, window: Option<u64>, softcap: Option<f64>) -> Sdpa {
    Sdpa { causal: true, heads, kv_heads, scale: None, window, softcap, alibi: None }
}

#[test]
fn attention_over_a_cache() {
    let arch = Arch::find(90).expect("an architecture");
    let shape = |op: &Sdpa, key, value, half, splits| Shape::of(op, key, value, half, splits).expect("a shape");
    let alibi = Alibi { max: 8.0, scale: 0.5 };
    let biased = Sdpa { alibi: Some(alibi.clone()), ..op(6, 6, None, None) };
    let cases = [
        (shape(&op(4, 2, None, None), 64, 64, false, 1), 37),
        (shape(&op(6, 2, Some(5), None), 12, 12, true, 1), 9),
        (shape(&op(2, 1, None, Some(2.0)), 80, 80, false, 3), 50),
        (shape(&op(3, 3, Some(16), None), 128, 64, true, 4), 40),
        (shape(&op(1, 1, None, None), 5, 3, false, 2), 0),
        (shape(&op(2, 2, None, None), 256, 256, false, 1), 3),
        (shape(&biased, 16, 16, false, 1), 20),
    ];
    let kernels: Vec<_> = cases
        .iter()
        .map(|(s, _)| (source(arch, s).expect("a kernel"), join_source(arch, s).expect("a kernel")))
        .collect();
    let bench = Bench::new(kernels.iter().flat_map(|(a, j)| [a, j]));
    let tokens = 3;
    for ((shape, past), (attend, join)) in cases.iter().zip(&kernels) {
        let (h, kv, d, e) = (shape.heads, shape.kv_heads, shape.key, shape.value);
        let positions = past + tokens;
        let mut random = Random::new(d as u64);
        let q: Vec<f32> = random.floats(tokens * h * d).iter().map(|v| 3.0 * v).collect();
        let (k, v) = (rounded(&random.floats(positions * kv * d)), rounded(&random.floats(positions * kv * e)));
        let mut want = vec![0.0; tokens * h * e];
        for (t, head) in (0..tokens).flat_map(|t| (0..h).map(move |head| (t, head))) {
            let at = past + t;
            let from = shape.window.map_or(0, |w| (at + 1).saturating_sub(w));
            let own = head / (h / kv);
            let score = |p: usize| {
                let dot: f64 =
                    (0..d).map(|i| f64::from(q[(t * h + head) * d + i]) * f64::from(k[(p * kv + own) * d + i])).sum();
                let s = dot * f64::from(shape.scale);
                let s = shape.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh());
                let slope = shape.alibi.map_or(0.0, |_| alibi.slopes(h as u64)[head]);
                s + slope * p as f64
            };
            let weights: Vec<f64> = (from..=at).map(|p| score(p).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (p, w) in (from..=at).zip(&weights) {
                for i in 0..e {
                    want[(t * h + head) * e + i] += w / total * f64::from(v[(p * kv + own) * e + i]);
                }
            }
        }
        // What lies behind the last position must not be read.
        let pad = |x: &[f32], row: usize| [x.to_vec(), vec![f32::NAN; 4 * row]].concat();
        let (bq, bk, bv) = (bench.f32(&q), bench.f16(&pad(&k, kv * d)), bench.f16(&pad(&v, kv * e)));
        let out = bench.f32(&vec![f32::NAN; want.len()]);
        let partials = bench.f32(&vec![f32::NAN; tokens * shape.partials() + 1]);
        let call = bench.call(tokens, *past);
        let to = if shape.splits == 1 { &out } else { &partials };
        let grid = [h as u32, tokens as u32, shape.splits as u32];
        bench.launch(attend, grid, &[bq.address(), bk.address(), bv.address(), to.address(), call.address()]);
        if shape.splits > 1 {
            bench.launch(join, [h as u32, tokens as u32, 1], &[partials.address(), out.address()]);
        }
        let got = if shape.half { bench.read_f16(&out)[..want.len()].to_vec() } else { bench.read_f32(&out) };
        let bound = if shape.half { 5e-4 } else { 2e-6 };
        let error = error(&got, &want);
        assert!(error < bound, "{shape:?}: {error}");
    }
}

#[test]
fn shapes_that_no_kernel_covers() {
    let later = Sdpa { causal: false, ..op(2, 2, None, None) };
    assert!(Shape::of(&later, 64, 64, true, 1).unwrap_err().contains("later positions"));
    assert!(Shape::of(&op(2, 2, None, None), 99, 99, true, 1).unwrap_err().contains("99"));
}

#[test]
fn float_products() {
    let arch = Arch::find(80).expect("an architecture");
    let cases = [
        (Float::F32, 21, 36, true),
        (Float::F16, 9, 264, false),
        (Float::Bf16, 17, 44, true),
        (Float::F16, 8, 7, false),
        (Float::Bf16, 5, 6, false),
    ];
    let kernels = cases.map(|(of, rows, cols, bias)| dense::source(arch, of, rows, cols, bias).expect("a kernel"));
    let bench = Bench::new(&kernels);
    for ((of, rows, cols, has_bias), kernel) in cases.iter().zip(&kernels) {
        for tokens in [1, 11] {
            let mut random = Random::new(*cols as u64);
            let (w, x, b) = (random.floats(rows * cols), random.floats(tokens * cols), random.floats(*rows));
            let (weight, stored) = match of {
                Float::F32 => (bench.f32(&w), w),
                Float::F16 => (bench.f16(&w), rounded(&w)),
                Float::Bf16 => {
                    let short: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
                    let bytes: Vec<u8> = short.iter().flat_map(|v| v.to_le_bytes()).collect();
                    (bench.bytes(&bytes), short.iter().map(|v| v.to_f32()).collect())
                }
            };
            let (bx, bb, call) = (bench.f32(&x), bench.f32(&b), bench.call(tokens, 0));
            let y = bench.f32(&vec![f32::NAN; tokens * rows]);
            let mut args = vec![weight.address(), bx.address()];
            args.extend(has_bias.then(|| bb.address()));
            args.extend([y.address(), call.address()]);
            bench.launch(kernel, [rows.div_ceil(8) as u32, tokens.div_ceil(8) as u32, 1], &args);
            let want: Vec<f64> = (0..tokens * rows)
                .map(|i| {
                    let (t, r) = (i / rows, i % rows);
                    let dot: f64 =
                        (0..*cols).map(|c| f64::from(x[t * cols + c]) * f64::from(stored[r * cols + c])).sum();
                    dot + if *has_bias { f64::from(b[r]) } else { 0.0 }
                })
                .collect();
            let error = error(&bench.read_f32(&y), &want);
            assert!(error < 1e-6, "{of:?} {rows}x{cols}: {error}");
        }
    }
}

#[test]
fn the_largest_logit_is_the_first_of_equals() {
    let width = 2500;
    let kernel = argmax::source(Arch::find(86).expect("an architecture"), width).expect("a kernel");
    let bench = Bench::new([&kernel]);
    let mut logits = Random::new(9).floats(2 * width);
    for at in [1999, 700, 2300, width + 1] {
        logits[at] = 5.0;
    }
    let out = bench.u32(&[9, 9]);
    bench.launch(&kernel, [1, 2, 1], &[bench.f32(&logits).address(), out.address()]);
    let bits: Vec<u32> = bench.read_f32(&out).iter().map(|v| v.to_bits()).collect();
    assert_eq!(bits, [700, 1]);
}

//! Attention, float products and the largest logits against their formulas in f64.

use awqc_cuda::arch::Arch;
use awqc_cuda::driver::Buffer;
use awqc_cuda::emit::Source;
use awqc_cuda::kernels::attend::{Shape, join_source, source};
use awqc_cuda::kernels::{Float, argmax, dense, flash, top};
use awqc_ir::op::{Alibi, Sdpa};
use half::{bf16, f16};

use crate::support::{Bench, Random, error, rounded};

fn op(heads: u64, kv_heads: u64, window: Option<u64>, softcap: Option<f64>) -> Sdpa {
    Sdpa { causal: true, heads, kv_heads, scale: None, window, softcap, alibi: None }
}

fn shape(op: &Sdpa, key: usize, value: usize, half: bool, splits: usize) -> Shape {
    Shape::of(op, key, value, half, splits).expect("a shape")
}

/// The largest slope is 2^-1, so that positions matter.
const ALIBI: Alibi = Alibi { max: 8.0, scale: 0.5 };

/// An attention of some tokens behind `past` others.
struct Case {
    shape: Shape,
    past: usize,
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(shape: Shape, past: usize, tokens: usize) -> Self {
        let (kv, d, e) = (shape.kv_heads, shape.key, shape.value);
        let positions = past + tokens;
        let mut random = Random::new(d as u64);
        let q = random.floats(tokens * shape.pitch).iter().map(|v| 3.0 * v).collect();
        let (k, v) = (rounded(&random.floats(positions * kv * d)), rounded(&random.floats(positions * kv * e)));
        Self { shape, past, tokens, q, k, v }
    }

    /// The result, of queries times the scale as `query` gives them.
    fn expected(&self, query: impl Fn(f32) -> f64) -> Vec<f64> {
        let Shape { heads: h, kv_heads: kv, key: d, value: e, pitch, col, .. } = self.shape;
        let slopes = self.shape.alibi.map_or(vec![0.0; h], |_| ALIBI.slopes(h as u64));
        let mut want = vec![0.0; self.tokens * h * e];
        for (t, head) in (0..self.tokens).flat_map(|t| (0..h).map(move |head| (t, head))) {
            let at = self.past + t;
            let from = self.shape.window.map_or(0, |w| (at + 1).saturating_sub(w));
            let own = head / (h / kv);
            let q: Vec<f64> = self.q[t * pitch + col + head * d..][..d].iter().map(|q| query(*q)).collect();
            let score = |p: usize| {
                let dot: f64 = q.iter().zip(&self.k[(p * kv + own) * d..]).map(|(q, k)| q * f64::from(*k)).sum();
                self.shape.softcap.map_or(dot, |c| f64::from(c) * (dot / f64::from(c)).tanh()) + slopes[head] * p as f64
            };
            let scores: Vec<f64> = (from..=at).map(score).collect();
            let top = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (p, w) in (from..=at).zip(&weights) {
                for i in 0..e {
                    want[(t * h + head) * e + i] += w / total * f64::from(self.v[(p * kv + own) * e + i]);
                }
            }
        }
        want
    }

    /// What the kernels give: `attend` over a grid of `[heads, blocks, splits]`, and the one that joins splits.
    fn run(&self, bench: &Bench, attend: &Source, blocks: usize, join: Option<&Source>) -> Vec<f32> {
        let s = &self.shape;
        // What lies behind the last position must not be read.
        let pad = |x: &[f32], row: usize| [x.to_vec(), vec![f32::NAN; 4 * row]].concat();
        let (q, k) = (bench.f32(&self.q), bench.f16(&pad(&self.k, s.kv_heads * s.key)));
        let v = bench.f16(&pad(&self.v, s.kv_heads * s.value));
        let count = self.tokens * s.heads * s.value;
        // What lies behind the last token must not be written.
        let out = bench.bytes(&vec![0xff; (count + 4) * if s.half { 2 } else { 4 }]);
        let partials = bench.f32(&vec![f32::NAN; self.tokens * s.partials() + 1]);
        let call = bench.call(self.tokens, self.past);
        let to = if join.is_some() { &partials } else { &out };
        let grid = [s.heads as u32, blocks as u32, s.splits as u32];
        bench.launch(attend, grid, &[q.address(), k.address(), v.address(), to.address(), call.address()]);
        if let Some(join) = join {
            let grid = [s.heads as u32, self.tokens as u32, 1];
            bench.launch(join, grid, &[partials.address(), out.address()]);
        }
        let got = if s.half { bench.read_f16(&out) } else { bench.read_f32(&out) };
        assert!(got[count..].iter().all(|v| v.is_nan()), "{s:?}: something is written behind the result");
        got[..count].to_vec()
    }
}

#[test]
fn attention_over_a_cache() {
    let arch = Arch::find(90).expect("an architecture");
    let biased = Sdpa { alibi: Some(ALIBI), ..op(6, 6, None, None) };
    let cases = [
        (shape(&op(4, 2, None, None), 64, 64, false, 1), 37),
        (shape(&op(6, 2, Some(5), None), 12, 12, true, 1), 9),
        (shape(&op(2, 1, None, Some(2.0)), 80, 80, false, 3), 50),
        (shape(&op(3, 3, Some(16), None), 128, 64, true, 4), 40),
        (shape(&op(1, 1, None, None), 5, 3, false, 2), 0),
        (shape(&op(2, 2, None, None), 256, 256, false, 1), 3),
        (shape(&biased, 16, 16, false, 1), 20),
    ]
    .map(|(shape, past)| Case::new(shape, past, 3));
    let kernels: Vec<_> = cases
        .iter()
        .map(|c| (source(arch, &c.shape).expect("a kernel"), join_source(arch, &c.shape).expect("a kernel")))
        .collect();
    let bench = Bench::new(kernels.iter().flat_map(|(a, j)| [a, j]));
    for (case, (attend, join)) in cases.iter().zip(&kernels) {
        let want = case.expected(|q| f64::from(q) * f64::from(case.shape.scale));
        let got = case.run(&bench, attend, case.tokens, (case.shape.splits > 1).then_some(join));
        let bound = if case.shape.half { 5e-4 } else { 2e-6 };
        let error = error(&got, &want);
        assert!(error < bound, "{:?}: {error}", case.shape);
    }
}

/// Odd lengths, with and without a past, windows across tiles and blocks, every size of heads that models have.
#[test]
fn attention_of_many_tokens() {
    let arch = Arch::find(89).expect("an architecture");
    let biased = |heads| Sdpa { alibi: Some(ALIBI), ..op(heads, heads, None, None) };
    let within = |mut shape: Shape| {
        (shape.pitch, shape.col) = (shape.pitch + 2 * shape.key + 12, 4);
        shape
    };
    let cases = [
        (shape(&op(4, 2, None, None), 64, 64, false, 1), 37, 70),
        (shape(&op(2, 1, None, None), 64, 64, true, 1), 0, 9),
        (shape(&op(2, 2, None, None), 64, 64, false, 1), 0, 64),
        (within(shape(&op(6, 2, Some(5), None), 16, 16, true, 1)), 9, 131),
        (shape(&op(2, 1, Some(100), Some(2.0)), 80, 80, false, 1), 150, 67),
        (within(shape(&op(2, 1, Some(64), None), 96, 96, false, 1)), 63, 65),
        (shape(&op(3, 3, Some(16), None), 128, 64, true, 1), 40, 33),
        (shape(&op(4, 1, None, None), 128, 128, false, 1), 129, 63),
        (shape(&op(2, 1, None, None), 192, 128, false, 1), 5, 40),
        (shape(&op(1, 1, None, None), 160, 136, false, 1), 30, 20),
        (shape(&op(2, 1, Some(40), Some(50.0)), 256, 256, false, 1), 50, 140),
        (shape(&op(1, 1, None, None), 8, 24, false, 1), 1, 10),
        (shape(&biased(6), 16, 16, false, 1), 20, 70),
        (shape(&biased(2), 112, 112, false, 1), 0, 20),
    ]
    .map(|(shape, past, tokens)| Case::new(shape, past, tokens));
    let kernels: Vec<_> = cases.iter().map(|c| flash::source(arch, &c.shape).expect("a kernel")).collect();
    let bench = Bench::new(&kernels);
    for (case, kernel) in cases.iter().zip(&kernels) {
        flash::covers(&case.shape).expect("a shape that is covered");
        let want = case.expected(|q| f64::from(f16::from_f32(q * case.shape.scale).to_f32()));
        let got = case.run(&bench, kernel, case.tokens.div_ceil(flash::tokens(&case.shape) as usize), None);
        // Weights are rounded to f16.
        let error = error(&got, &want);
        assert!(error < 5e-4, "{:?}: {error}", case.shape);
    }
}

#[test]
fn shapes_that_no_kernel_covers() {
    let later = Sdpa { causal: false, ..op(2, 2, None, None) };
    assert!(Shape::of(&later, 64, 64, true, 1).unwrap_err().contains("later positions"));
    assert!(Shape::of(&op(2, 2, None, None), 99, 99, true, 1).unwrap_err().contains("99"));
    // Attention of many tokens on tensor cores covers less.
    let plain = |key, col| Shape { col, ..shape(&op(2, 2, None, None), key, key, true, 1) };
    assert_eq!(flash::covers(&plain(64, 4)), Ok(()));
    assert!(flash::covers(&plain(12, 0)).unwrap_err().contains("12 columns, which 8 does not divide"));
    assert!(flash::covers(&plain(64, 6)).unwrap_err().contains("16 bytes"));
    let wide = shape(&op(1, 1, None, None), 64, 192, true, 1);
    assert!(flash::covers(&wide).unwrap_err().contains("values of 192 columns and keys of 64"));
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

#[test]
fn the_largest_logits_come_in_total_order() {
    let arch = Arch::find(89).expect("an architecture");
    let launches = |width| -> Vec<Source> {
        let counts = top::rounds(width).into_iter().enumerate();
        counts.map(|(i, count)| top::source(arch, count, i == 0).expect("a kernel")).collect()
    };
    let widths = [10, 64, 2048, 2049, 70_000];
    let kernels = widths.map(launches);
    assert_eq!(kernels.each_ref().map(Vec::len), [1, 1, 1, 2, 3]);
    let bench = Bench::new(kernels.iter().flatten());
    for (width, kernels) in widths.into_iter().zip(&kernels) {
        let mut logits = Random::new(width as u64).floats(width);
        // Equal ones, and what has no usual order.
        logits.iter_mut().skip(3).step_by(width.div_ceil(40)).for_each(|v| *v = 0.999);
        logits[..5].copy_from_slice(&[f32::NAN, f32::INFINITY, -0.0, 0.0, f32::NEG_INFINITY]);
        let mut want: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
        want.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut candidates = vec![bench.f32(&logits)];
        for (kernel, count) in kernels.iter().zip(top::rounds(width)) {
            let blocks = top::blocks(count);
            let kept = vec![0; blocks * top::KEPT as usize];
            let next = vec![bench.u32(&kept), bench.u32(&kept)];
            let args: Vec<_> = candidates.iter().chain(&next).map(Buffer::address).collect();
            bench.launch(kernel, [blocks as u32, 1, 1], &args);
            candidates = next;
        }
        let (values, ids) = (bench.read_f32(&candidates[0]), bench.read_f32(&candidates[1]));
        for (i, (value, id)) in want.iter().take(top::KEPT as usize).enumerate() {
            assert_eq!((values[i].to_bits(), ids[i].to_bits()), (value.to_bits(), *id), "{i} of {width}");
        }
        assert!(ids.iter().skip(width).all(|id| id.to_bits() == u32::MAX), "{width}: candidates that are none");
    }
}

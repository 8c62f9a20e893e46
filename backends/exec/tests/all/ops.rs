//! Every op against plain loops, in burn's primitives and in the host's kernels.

use awqc_exec::host::floats;
use awqc_exec::interp::Routed;
use awqc_exec::interp::ops;
use awqc_exec::interp::ops::sdpa::GrowingCache;
use awqc_exec::{ExecBackend, Host, Val, interp::upload};
use awqc_ir::op::{
    Alibi, Embedding, GeluForm, GroupScore, Groups, LayerNorm, RmsNorm, Rope, RopeTable, Sdpa, Split, TopK,
};
use awqc_passes::Tensor;
use burn_backend::tensor::FloatTensor;

use crate::support::{Random, diff};

type T = FloatTensor<Host>;

fn tensor(shape: &[usize], data: Vec<f32>) -> T {
    upload::<Host>(Tensor { shape: shape.to_vec(), data }, &Default::default())
}

fn random(seed: u64, shape: &[usize]) -> (T, Vec<f32>) {
    let data: Vec<f32> = Random(seed).numbers(shape.iter().product()).iter().map(|v| v * 2.0).collect();
    (tensor(shape, data.clone()), data)
}

/// Both implementations must agree with the loop, and keep the shape.
#[track_caller]
fn agree(want: &[f32], shape: &[usize], plain: &T, host: &T) {
    for (what, got) in [("burn", plain), ("host", host)] {
        assert_eq!(Val::<Host>::Float(got.clone()).shape(), shape, "{what}");
        let d = diff(&floats(got), want);
        assert!(d <= 1e-5, "{what} differs by {d}");
    }
}

#[test]
fn linear() {
    // 3 rows go to dot products, 300 to gemm in two blocks.
    for (batch, seq) in [(1, 3), (2, 150)] {
        let (n, k) = (11, 37);
        let (x, xs) = random(1, &[batch, seq, k]);
        let (w, ws) = random(2, &[n, k]);
        let (b, bs) = random(3, &[n]);
        for bias in [None, Some(&b)] {
            let mut want = Vec::new();
            for row in xs.chunks(k) {
                for c in 0..n {
                    let dot: f64 = (0..k).map(|i| f64::from(row[i]) * f64::from(ws[c * k + i])).sum();
                    want.push((dot + bias.map_or(0.0, |_| f64::from(bs[c]))) as f32);
                }
            }
            let shape = [batch, seq, n];
            agree(
                &want,
                &shape,
                &ops::linear::linear::<Host>(x.clone(), &w, bias),
                &Host::op_linear(x.clone(), &w, bias),
            );
        }
    }
}

#[test]
fn embedding() {
    let (table, data) = random(4, &[7, 5]);
    let ids = |v: Vec<i32>| match Val::<Host>::ints(v, &[2, 2], &Default::default()) {
        Val::Int(t) => t,
        Val::Float(_) | Val::Routed(_) => unreachable!(),
    };
    let op = Embedding { offset: 2 };
    let want: Vec<f32> = [5, 2, 3, 6].iter().flat_map(|r| data[r * 5..(r + 1) * 5].to_vec()).collect();
    let given = vec![3, 0, 1, 4];
    let plain = ops::embedding::embed::<Host>(&op, table.clone(), ids(given.clone())).unwrap();
    agree(&want, &[2, 2, 5], &plain, &Host::op_embedding(&op, table.clone(), ids(given)).unwrap());
    for bad in [vec![0, 0, 0, 5], vec![-3, 0, 0, 0], vec![i32::MAX, 0, 0, 0], vec![i32::MIN, 0, 0, 0]] {
        assert!(ops::embedding::embed::<Host>(&op, table.clone(), ids(bad.clone())).unwrap_err().contains("outside"));
        assert!(Host::op_embedding(&op, table.clone(), ids(bad)).is_err());
    }
}

#[test]
fn rms_norm() {
    let (x, xs) = random(5, &[2, 3, 20]);
    for (heads, width) in [(None, 20), (Some(4), 5)] {
        let (g, gs) = random(6, &[width]);
        let op = RmsNorm { eps: 1e-2, offset: 1.0, heads };
        for gain in [None, Some(&g)] {
            let mut want = Vec::new();
            for row in xs.chunks(width) {
                let mean = row.iter().map(|v| f64::from(v * v)).sum::<f64>() / width as f64;
                let k = 1.0 / (mean + 1e-2).sqrt();
                want.extend(
                    row.iter()
                        .zip(&gs)
                        .map(|(v, g)| (f64::from(*v) * k * gain.map_or(1.0, |_| f64::from(*g) + 1.0)) as f32),
                );
            }
            agree(
                &want,
                &[2, 3, 20],
                &ops::norm::rms_norm::<Host>(&op, x.clone(), gain),
                &Host::op_rms_norm(&op, x.clone(), gain),
            );
        }
    }
}

#[test]
fn layer_norm() {
    let (x, xs) = random(7, &[2, 3, 19]);
    let ((g, gs), (b, bs)) = (random(8, &[19]), random(9, &[19]));
    let op = LayerNorm { eps: 1e-3, heads: None };
    for (gain, bias) in [(None, None), (Some(&g), None), (Some(&g), Some(&b))] {
        let mut want = Vec::new();
        for row in xs.chunks(19) {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / 19.0;
            let var = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / 19.0;
            for (i, v) in row.iter().enumerate() {
                let y = (f64::from(*v) - mean) / (var + 1e-3).sqrt() * gain.map_or(1.0, |_| f64::from(gs[i]))
                    + bias.map_or(0.0, |_| f64::from(bs[i]));
                want.push(y as f32);
            }
        }
        agree(
            &want,
            &[2, 3, 19],
            &ops::norm::layer_norm::<Host>(&op, x.clone(), gain, bias),
            &Host::op_layer_norm(&op, x.clone(), gain, bias),
        );
    }
}

#[test]
fn layer_norm_head_by_head() {
    let (x, xs) = random(7, &[2, 3, 12]);
    let op = LayerNorm { eps: 1e-3, heads: Some(3) };
    // One head's gain, and one for each.
    for shape in [vec![4], vec![3, 4]] {
        let (g, gs) = random(8, &shape);
        let mut want = Vec::new();
        for (r, row) in xs.chunks(4).enumerate() {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / 4.0;
            let var = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / 4.0;
            let gain = |i: usize| f64::from(gs[(r * 4 + i) % gs.len()]);
            want.extend(
                row.iter().enumerate().map(|(i, v)| ((f64::from(*v) - mean) / (var + 1e-3).sqrt() * gain(i)) as f32),
            );
        }
        let plain = ops::norm::layer_norm::<Host>(&op, x.clone(), Some(&g), None);
        agree(&want, &[2, 3, 12], &plain, &Host::op_layer_norm(&op, x.clone(), Some(&g), None));
    }
}

#[test]
fn split_concat_and_repeat_by_heads() {
    let (x, xs) = random(7, &[1, 2, 12]);
    let op = Split { sizes: vec![1, 3], heads: 3 };
    let plain = ops::shape::split::<Host>(&op, x.clone());
    let host = Host::op_split(&op, x.clone());
    let pick = |from: usize, len: usize| -> Vec<f32> {
        xs.chunks(4).flat_map(|head| head[from..from + len].to_vec()).collect()
    };
    agree(&pick(0, 1), &[1, 2, 3], &plain[0], &host[0]);
    agree(&pick(1, 3), &[1, 2, 9], &plain[1], &host[1]);
    agree(&xs, &[1, 2, 12], &ops::shape::concat::<Host>(3, plain), &Host::op_concat(3, host));
    let want: Vec<f32> = xs.chunks(12).flat_map(|row| row.iter().chain(row).copied().collect::<Vec<_>>()).collect();
    let twice = Host::op_repeat(2, x);
    agree(&want, &[1, 2, 24], &twice, &twice);
}

#[test]
fn slopes_of_heads_that_are_no_power_of_two() {
    let slopes = Alibi { max: 8.0, scale: 1.0 }.slopes(6);
    let want = [-2.0, -4.0, -6.0, -8.0, -1.0, -3.0].map(f64::exp2);
    assert_eq!(slopes, want);
}

#[test]
fn rope() {
    let positions = match Val::<Host>::ints(vec![0, 3, 7], &[3], &Default::default()) {
        Val::Int(t) => t,
        Val::Float(_) | Val::Routed(_) => unreachable!(),
    };
    let table = RopeTable { dim: 4, theta: 100.0, scaling: None };
    let (cos, sin) = ops::rope::table::<Host>(&table, positions, &Default::default()).unwrap();
    let (c, s) = (floats(&cos), floats(&sin));
    assert!(
        (c[3] - (0.3f32).cos()).abs() < 1e-6 && (s[2] - (3.0f32).sin()).abs() < 1e-6,
        "position 3, frequencies 1 and 0.1"
    );
    // Heads of 6 channels: 4 turn, 2 pass.
    let (x, xs) = random(10, &[2, 3, 12]);
    for interleaved in [false, true] {
        let op = Rope { heads: 2, interleaved };
        let mut want = xs.clone();
        for (r, row) in want.chunks_mut(12).enumerate() {
            for head in row.chunks_mut(6) {
                for j in 0..2 {
                    let (a, b) = if interleaved { (2 * j, 2 * j + 1) } else { (j, j + 2) };
                    let (c, s) = (c[r % 3 * 2 + j], s[r % 3 * 2 + j]);
                    (head[a], head[b]) = (head[a] * c - head[b] * s, head[b] * c + head[a] * s);
                }
            }
        }
        agree(
            &want,
            &[2, 3, 12],
            &ops::rope::rope::<Host>(&op, x.clone(), &cos, &sin),
            &Host::op_rope(&op, x.clone(), &cos, &sin),
        );
    }
}

/// Attention by its definition, in f64.
#[expect(clippy::too_many_arguments, reason = "the operands and sizes of one op, spelled out")]
fn attention(
    op: &Sdpa,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    batch: usize,
    seq: usize,
    width: usize,
    out: usize,
) -> Vec<f32> {
    let (heads, kv) = (op.heads as usize, op.kv_heads as usize);
    let mut y = Vec::new();
    for b in 0..batch {
        for i in 0..seq {
            for h in 0..heads {
                let g = h / (heads / kv);
                let mut weights = Vec::new();
                for j in 0..seq {
                    let dot: f64 = (0..width)
                        .map(|d| {
                            f64::from(q[((b * seq + i) * heads + h) * width + d])
                                * f64::from(k[((b * seq + j) * kv + g) * width + d])
                        })
                        .sum();
                    let mut score = dot * op.scale.unwrap_or(1.0 / (width as f64).sqrt());
                    if let Some(c) = op.softcap {
                        score = c * (score / c).tanh();
                    }
                    if let Some(a) = &op.alibi {
                        score -= a.scale * (-a.max * (h + 1) as f64 / heads as f64).exp2() * (i as f64 - j as f64);
                    }
                    let hidden = (op.causal && j > i) || op.window.is_some_and(|w| (j as u64) + w <= i as u64);
                    weights.push(if hidden { 0.0 } else { score.exp() });
                }
                let total: f64 = weights.iter().sum();
                for e in 0..out {
                    let sum: f64 =
                        (0..seq).map(|j| weights[j] * f64::from(v[((b * seq + j) * kv + g) * out + e])).sum();
                    y.push((sum / total) as f32);
                }
            }
        }
    }
    y
}

#[test]
fn sdpa() {
    // 70 positions: more than one block of query rows.
    let (batch, seq, heads, kv, width, out) = (2, 70, 4, 2, 5, 3);
    let (q, qs) = random(11, &[batch, seq, heads * width]);
    let (k, ks) = random(12, &[batch, seq, kv * width]);
    let (v, vs) = random(13, &[batch, seq, kv * out]);
    let base = Sdpa { causal: true, heads: 4, kv_heads: 2, scale: None, window: None, softcap: None, alibi: None };
    let variants = [
        base.clone(),
        Sdpa { causal: false, ..base.clone() },
        Sdpa { scale: Some(0.7), softcap: Some(2.0), ..base.clone() },
        Sdpa { window: Some(1), ..base.clone() },
        Sdpa { window: Some(9), ..base.clone() },
        Sdpa { alibi: Some(Alibi { max: 8.0, scale: 0.5 }), ..base.clone() },
        Sdpa { alibi: Some(Alibi { max: 4.0, scale: 1.0 }), window: Some(9), ..base.clone() },
        Sdpa { window: Some(9), causal: false, ..base },
    ];
    for op in variants {
        let want = attention(&op, &qs, &ks, &vs, batch, seq, width, out);
        let plain = ops::sdpa::sdpa::<Host>(&op, q.clone(), k.clone(), v.clone(), None).unwrap();
        let host = Host::op_sdpa(&op, q.clone(), k.clone(), v.clone(), None).unwrap();
        agree(&want, &[batch, seq, heads * out], &plain, &host);
        if op.causal {
            cached(&op, [&qs, &ks, &vs], [heads * width, kv * width, kv * out], &want, seq);
        }
    }
}

/// The first sequence in pieces through both caches.
fn cached(op: &Sdpa, qkv: [&[f32]; 3], widths: [usize; 3], want: &[f32], seq: usize) {
    let mut grown = GrowingCache::<Host>::default();
    let mut host = <Host as ExecBackend>::Cache::default();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let mut at = 0;
    for len in [5, 1, 1, 40, seq - 47] {
        let part = |i: usize| tensor(&[1, len, widths[i]], qkv[i][at * widths[i]..(at + len) * widths[i]].to_vec());
        a.extend(floats(&ops::sdpa::sdpa::<Host>(op, part(0), part(1), part(2), Some(&mut grown)).unwrap()).to_vec());
        b.extend(floats(&Host::op_sdpa(op, part(0), part(1), part(2), Some(&mut host)).unwrap()).to_vec());
        at += len;
    }
    assert!(diff(&a, &want[..a.len()]) < 1e-5);
    assert!(diff(&b, &want[..b.len()]) < 1e-5);
    let part = |i: usize| tensor(&[2, 1, widths[i]], vec![0.0; 2 * widths[i]]);
    assert!(Host::op_sdpa(op, part(0), part(1), part(2), Some(&mut host)).unwrap_err().contains("1 sequences"));
    let open = Sdpa { causal: false, ..op.clone() };
    let part = |i: usize| tensor(&[1, 1, widths[i]], vec![0.0; widths[i]]);
    assert!(Host::op_sdpa(&open, part(0), part(1), part(2), Some(&mut host)).is_err());
    assert!(ops::sdpa::sdpa::<Host>(&open, part(0), part(1), part(2), Some(&mut grown)).is_err());
}

#[test]
fn elementwise() {
    let shape = [2, 3, 5];
    let (x, xs) = random(14, &shape);
    let map = |f: &dyn Fn(f64) -> f64| xs.iter().map(|v| f(f64::from(*v)) as f32).collect::<Vec<_>>();
    let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
    agree(&map(&|v| v * sigmoid(v)), &shape, &ops::elementwise::silu::<Host>(x.clone()), &Host::op_silu(x.clone()));
    agree(&map(&sigmoid), &shape, &ops::elementwise::sigmoid::<Host>(x.clone()), &Host::op_sigmoid(x.clone()));
    agree(
        &map(&|v| v.clamp(-0.3, 0.3)),
        &shape,
        &ops::elementwise::clamp::<Host>(0.3, x.clone()),
        &Host::op_clamp(0.3, x.clone()),
    );
    agree(&map(&|v| v.max(0.0)), &shape, &ops::elementwise::relu::<Host>(x.clone()), &Host::op_relu(x.clone()));
    agree(
        &map(&|v| -1.5 * v),
        &shape,
        &ops::elementwise::scale::<Host>(-1.5, x.clone()),
        &Host::op_scale(-1.5, x.clone()),
    );
    agree(
        &map(&|v| 0.7 * (v / 0.7).tanh()),
        &shape,
        &ops::elementwise::softcap::<Host>(0.7, x.clone()),
        &Host::op_softcap(0.7, x.clone()),
    );
    let tanh = |v: f64| 0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh());
    agree(
        &map(&tanh),
        &shape,
        &ops::elementwise::gelu::<Host>(GeluForm::Tanh, x.clone()),
        &Host::op_gelu(GeluForm::Tanh, x.clone()),
    );
    let quick = |v: f64| v * sigmoid(1.702 * v);
    agree(
        &map(&quick),
        &shape,
        &ops::elementwise::gelu::<Host>(GeluForm::Quick, x.clone()),
        &Host::op_gelu(GeluForm::Quick, x.clone()),
    );
    // erf by its series.
    let erf = |v: f64| {
        (0..60)
            .fold((0.0, v), |(sum, term), n| (sum + term / (2.0 * n as f64 + 1.0), -term * v * v / (n as f64 + 1.0)))
            .0
            * 2.0
            / std::f64::consts::PI.sqrt()
    };
    let exact = |v: f64| 0.5 * v * (1.0 + erf(v / std::f64::consts::SQRT_2));
    agree(
        &map(&exact),
        &shape,
        &ops::elementwise::gelu::<Host>(GeluForm::Erf, x.clone()),
        &Host::op_gelu(GeluForm::Erf, x.clone()),
    );
}

#[test]
fn sums_and_products_broadcast() {
    let (a, left) = random(15, &[2, 3, 5]);
    for shape in [vec![2, 3, 5], vec![3, 5], vec![5]] {
        let (b, right) = random(16, &shape);
        let want: Vec<f32> = left.iter().enumerate().map(|(i, v)| v + right[i % right.len()]).collect();
        agree(&want, &[2, 3, 5], &ops::elementwise::add::<Host>(a.clone(), &b), &Host::op_add(a.clone(), &b));
    }
    let (b, right) = random(17, &[2, 3, 5]);
    let want: Vec<f32> = left.iter().zip(&right).map(|(a, b)| a * b).collect();
    agree(&want, &[2, 3, 5], &ops::elementwise::mul::<Host>(a.clone(), &b), &Host::op_mul(a, &b));
}

#[test]
fn split_and_concat() {
    let (x, xs) = random(18, &[2, 3, 7]);
    let parts = Host::op_split(&Split::new(vec![2, 4, 1]), x.clone());
    let plain = ops::shape::split::<Host>(&Split::new(vec![2, 4, 1]), x);
    for (i, (start, len)) in [(0, 2), (2, 4), (6, 1)].into_iter().enumerate() {
        let want: Vec<f32> = xs.chunks(7).flat_map(|r| r[start..start + len].to_vec()).collect();
        agree(&want, &[2, 3, len], &plain[i], &parts[i]);
    }
    agree(&xs, &[2, 3, 7], &ops::shape::concat::<Host>(1, plain), &Host::op_concat(1, parts));
}

#[test]
fn nan_passes_through() {
    let x = || tensor(&[1, 1, 2], vec![f32::NAN, -1.0]);
    for y in [
        Host::op_relu(x()),
        Host::op_silu(x()),
        Host::op_gelu(GeluForm::Tanh, x()),
        Host::op_softcap(3.0, x()),
        Host::op_clamp(3.0, x()),
    ] {
        assert!(floats(&y)[0].is_nan());
    }
}

#[test]
fn experts_see_their_tokens_and_are_added_up() {
    let (batch, seq, width, experts, k) = (2, 3, 4, 3, 2);
    let (x, xs) = random(20, &[batch, seq, width]);
    let (w, ws) = random(21, &[experts, 5, width]);
    let (p, ps) = random(22, &[batch, seq, k]);
    // Expert 1 gets nothing.
    let chosen = [0, 2, 2, 0, 0, 2, 2, 0, 0, 2, 0, 2];
    let ids = || match Val::<Host>::ints(chosen.to_vec(), &[batch, seq, k], &Default::default()) {
        Val::Int(t) => t,
        Val::Float(_) | Val::Routed(_) => unreachable!(),
    };
    let device = Default::default();
    let sent = ops::routing::dispatch::<Host>(experts, x, ids(), &device).unwrap();
    assert_eq!(sent.shape(), [experts, batch, seq, width]);
    assert_eq!(sent.route.ends, [6, 6, 12]);
    let rows = ops::routing::experts::<Host>(sent.rows.clone(), sent.route.ranges(), &w);
    let host = Host::op_experts(sent.rows.clone(), sent.route.ranges().collect(), &w);
    assert!(diff(&floats(&rows), &floats(&host)) < 1e-5);
    let routed = Val::Routed(Routed { rows, route: sent.route.clone() });
    let y = ops::routing::combine::<Host>(routed, p, ids(), &device).unwrap();
    let mut want = vec![0.0f32; batch * seq * 5];
    for (at, e) in chosen.iter().enumerate() {
        let t = at / k;
        for o in 0..5 {
            let dot: f32 = (0..width).map(|c| xs[t * width + c] * ws[(*e as usize * 5 + o) * width + c]).sum();
            want[t * 5 + o] += ps[at] * dot;
        }
    }
    agree(&want, &[batch, seq, 5], &y, &y);
    // A value as a whole: rows of other tokens are 0.
    let whole = Val::Routed(sent).to_tensor().unwrap();
    assert_eq!(whole.data[width * 6..width * 12], vec![0.0; width * 6]);
    assert_eq!(whole.data[..width], xs[..width]);
    let other = Val::<Host>::ints(vec![7; 12], &[batch, seq, k], &device);
    let Val::Int(other) = other else { unreachable!() };
    let error = ops::routing::dispatch::<Host>(experts, random(20, &[batch, seq, width]).0, other, &device);
    assert!(error.unwrap_err().contains("no expert 7"));
}

#[test]
fn experts_are_chosen_as_published() {
    let plain = TopK { k: 2, groups: None, normalize: false, scale: None, near: None };
    let scores = [0.1, 0.4, 0.3, 0.4];
    let pick = |op: &TopK, choice: &[f32]| ops::routing::choose(op, &scores, choice.to_vec());
    assert_eq!(pick(&plain, &scores), [(0.4, 1), (0.4, 3)]);
    // A bias decides the choice and not the weight.
    assert_eq!(pick(&plain, &[1.1, 0.4, 1.3, 0.4]), [(0.3, 2), (0.1, 0)]);
    let whole = TopK { normalize: true, scale: Some(2.0), ..plain.clone() };
    assert_eq!(pick(&whole, &scores), [(1.0, 1), (1.0, 3)]);
    let grouped = |by| TopK { groups: Some(Groups { count: 2, keep: 1, by }), ..plain.clone() };
    assert_eq!(pick(&grouped(GroupScore::Best), &[0.9, 0.0, 0.5, 0.5]), [(0.1, 0), (0.4, 1)]);
    assert_eq!(pick(&grouped(GroupScore::TwoBest), &[0.9, 0.0, 0.5, 0.5]), [(0.3, 2), (0.4, 3)]);
    // Near the best: 1.0 and 0.9 share, 0.1 is far; then 0.9 is alone.
    let near = TopK { near: Some(0.1), ..plain };
    let got = ops::routing::choose(&near, &[0.1, 1.0, 0.9], vec![0.1, 1.0, 0.9]);
    assert_eq!((got[0].1, got[1].1), (1, 2));
    assert!((got[0].0 - 1.0 / (1.0 + (-0.1f32).exp())).abs() < 1e-6 && (got[1].0 - 1.0).abs() < 1e-6, "{got:?}");
}

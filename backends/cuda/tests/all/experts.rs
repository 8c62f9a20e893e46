//! Mixtures of experts: the choice, the order of the rows, products with stacked weights, and the sum of what experts
//! say.

use awqc_cuda::arch::Arch;
use awqc_cuda::driver::Buffer;
use awqc_cuda::emit::Source;
use awqc_cuda::kernels::routed::{Routed, Stack};
use awqc_cuda::kernels::rows::{Choice, Kind, Out, Row, Rows, Step};
use awqc_cuda::kernels::{Float, dense, gemm, gemv, route};
use awqc_cuda::plan::Extent;
use awqc_exec::interp::ops::routing;
use awqc_exec::layout::mma16;
use awqc_ir::Group;
use awqc_ir::op::{GroupScore, Groups, TopK};
use awqc_ir::tiles::Tiles;
use awqc_passes::rtn::Codes;

use crate::support::{Bench, Random, codes, decode, error, rounded};

fn arch() -> &'static Arch {
    Arch::find(89).expect("an architecture")
}

/// Different experts for each token. Every token goes to one of them; nobody goes to the last, if there are enough.
fn choices(experts: usize, each: usize, tokens: usize) -> Vec<u32> {
    let mut random = Random::new((experts * 100 + tokens) as u64);
    let all_go_to = 1.min(experts as u32 - 1);
    let open = if experts > each + 1 { experts - 1 } else { experts };
    let mut out = Vec::new();
    for _ in 0..tokens {
        let mut all: Vec<u32> = (0..open as u32).filter(|e| *e != all_go_to).collect();
        let mut own = vec![all_go_to];
        while own.len() < each {
            own.push(all.swap_remove(random.below(all.len() as u64) as usize));
        }
        own.swap(0, random.below(each as u64) as usize);
        out.extend(own);
    }
    out
}

/// The records of tokens, with weights that nobody reads.
fn records(bench: &Bench, chosen: &[u32], each: usize) -> Buffer {
    let words = |token: &[u32]| [vec![u32::MAX; each], token.to_vec()].concat();
    bench.u32(&chosen.chunks(each).flat_map(words).collect::<Vec<_>>())
}

/// What a kernel leaves of the order of rows: the rows, and the runs.
fn read(bench: &Bench, out: &Buffer, rows: usize) -> (Vec<u32>, Vec<[u32; 3]>) {
    let words: Vec<u32> = bench.read_f32(out).iter().map(|v| v.to_bits()).collect();
    let runs = words[1 + rows..].chunks_exact(3).take(words[0] as usize).map(|r| [r[0], r[1], r[2]]);
    (words[1..][..rows].to_vec(), runs.collect())
}

#[test]
fn rows_are_sorted_by_expert_in_runs() {
    let cases = [(4, 2, 8), (5, 2, 64), (60, 4, 16), (1, 1, 64), (300, 8, 32), (1000, 3, 8)];
    let kernels = cases.map(|(experts, each, tile)| route::source(arch(), experts, each, tile).expect("a kernel"));
    let bench = Bench::new(&kernels);
    for ((experts, each, tile), kernel) in cases.into_iter().zip(&kernels) {
        for tokens in [1, 9, 70, 512] {
            let (each, tile) = (each as usize, tile as usize);
            let chosen = choices(experts as usize, each, tokens);
            let (records, call) = (records(&bench, &chosen, each), bench.call(tokens, 0));
            let out = bench.u32(&vec![u32::MAX; tokens * route::words(each)]);
            bench.launch(kernel, [1, 1, 1], &[records.address(), out.address(), call.address()]);
            let (order, runs) = read(&bench, &out, chosen.len());
            let mut want: Vec<u32> = (0..chosen.len() as u32).collect();
            want.sort_by_key(|row| chosen[*row as usize]);
            assert_eq!(order, want, "{}, {tokens} tokens", kernel.name);
            let mut expected = Vec::new();
            for expert in 0..experts {
                let first = want.iter().filter(|r| chosen[**r as usize] < expert).count();
                let end = want.iter().filter(|r| chosen[**r as usize] <= expert).count();
                let ends = (first..end).step_by(tile).map(|at| [expert, at as u32, (at + tile).min(end) as u32]);
                expected.extend(ends);
            }
            assert_eq!(runs, expected, "{}, {tokens} tokens", kernel.name);
            let most = Extent::Runs { experts, each: each as u32, tile: tile as u32 }.blocks(tokens);
            assert!(runs.len() <= most as usize, "{} runs, {most} blocks", runs.len());
        }
    }
}

struct Case {
    codes: Codes,
    shape: Tiles,
    stack: Stack,
    tile: u32,
    few: Source,
    many: Source,
    route: Source,
}

/// All bits, groups of 16 to a whole row, matrices that end within a panel, runs of each length.
fn cases() -> Vec<Case> {
    let size = Group::Size;
    [
        (4, false, size(128), 5, 2, 32, 256, false, 64),
        (4, false, size(32), 4, 2, 24, 132, true, 16),
        (4, true, size(16), 6, 3, 20, 68, false, 32),
        (3, false, size(64), 4, 1, 17, 192, true, 16),
        (3, true, Group::Row, 3, 3, 16, 100, false, 64),
        (2, false, size(64), 5, 2, 40, 200, true, 32),
        (8, false, size(48), 4, 2, 5, 144, false, 16),
        (8, true, size(128), 9, 4, 144, 64, true, 16),
    ]
    .into_iter()
    .map(|(bits, symmetric, group, experts, each, rows, cols, shared, tile)| {
        let codes = codes(bits, symmetric, group, experts as usize * rows, cols);
        let shape = mma16::shape(codes.quant, experts as usize * rows, cols).expect("a shape");
        let stack = Stack { experts, each, shared };
        Case {
            codes,
            shape,
            stack,
            tile,
            few: gemv::routed_source(arch(), &shape, Routed::Few(stack)).expect("a kernel"),
            many: gemm::routed_source(arch(), &shape, Routed::Many(stack), tile).expect("a kernel"),
            route: route::source(arch(), experts, each, tile).expect("a kernel"),
        }
    })
    .collect()
}

/// `y` of every row, from the numbers of all matrices.
fn multiply(x: &[f32], weights: &[f64], chosen: &[u32], stack: Stack, cols: usize) -> Vec<f64> {
    let rows = weights.len() / cols / stack.experts as usize;
    let mut want = Vec::new();
    for (row, expert) in chosen.iter().enumerate() {
        let x = &x[if stack.shared { row / stack.each as usize } else { row } * cols..][..cols];
        for r in 0..rows {
            let w = &weights[(*expert as usize * rows + r) * cols..][..cols];
            want.push(x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum());
        }
    }
    want
}

/// The order of tokens' rows.
fn sort(bench: &Bench, kernel: &Source, records: &Buffer, call: &Buffer, tokens: usize, each: usize) -> Buffer {
    let out = bench.u32(&vec![u32::MAX; tokens * route::words(each)]);
    bench.launch(kernel, [1, 1, 1], &[records.address(), out.address(), call.address()]);
    out
}

#[test]
fn stacked_products_are_those_of_each_rows_expert() {
    let cases = cases();
    let bench = Bench::new(cases.iter().flat_map(|c| [&c.few, &c.many, &c.route]));
    for Case { codes, shape, stack, tile, few, many, route } in &cases {
        let (cols, each) = (codes.cols, stack.each as usize);
        let rows = codes.rows / stack.experts as usize;
        let weight = bench.bytes(&mma16::panels(codes).expect("panels"));
        let numbers = decode(codes);
        let panels = stack.span(rows);
        assert!(panels <= shape.panels() + 1);
        for tokens in [1, 8, 9, 70] {
            let chosen = choices(stack.experts as usize, each, tokens);
            let count = if stack.shared { tokens } else { tokens * each };
            let x = rounded(&Random::new(tokens as u64).floats(count * cols));
            let (bx, call) = (bench.f16(&x), bench.call(tokens, 0));
            let records = records(&bench, &chosen, each);
            let order = sort(&bench, route, &records, &call, tokens, each);
            let want = multiply(&x, &numbers, &chosen, *stack, cols);
            let runs = Extent::Runs { experts: stack.experts, each: stack.each, tile: *tile }.blocks(tokens);
            let few = (tokens <= 8).then_some((few, panels, (tokens * each) as u32, &records));
            for (kernel, panels, blocks, route) in few.into_iter().chain([(many, panels.div_ceil(8), runs, &order)]) {
                let run = || {
                    let y = bench.f32(&vec![f32::NAN; tokens * each * rows]);
                    let args = [&weight, &weight, &bx, &y, &call, route].map(Buffer::address);
                    bench.launch(kernel, [panels as u32, blocks, 1], &args);
                    bench.read_f32(&y)
                };
                // The emulator takes blocks forwards, then backwards.
                let (one, other) = (run(), run());
                assert_eq!(one, other, "{}, {tokens} tokens", kernel.name);
                let error = error(&one, &want);
                assert!(error < 2e-6, "{}, {tokens} tokens: {error}", kernel.name);
            }
        }
    }
}

#[test]
fn float_stacks_are_multiplied_too() {
    let cases = [(Float::F32, 4, 2, 20, 36, false), (Float::F16, 6, 3, 9, 64, true), (Float::F32, 3, 1, 16, 7, true)];
    let kernels = cases.map(|(of, experts, each, rows, cols, shared)| {
        let stack = Stack { experts, each, shared };
        let [few, many] = [Routed::Few(stack), Routed::Many(stack)]
            .map(|routed| dense::routed_source(arch(), of, rows, cols, routed).expect("a kernel"));
        (stack, few, many, route::source(arch(), experts, each, dense::TOKENS).expect("a kernel"))
    });
    let bench = Bench::new(kernels.iter().flat_map(|(_, few, many, route)| [few, many, route]));
    for ((of, experts, each, rows, cols, shared), (stack, few, many, route)) in cases.into_iter().zip(&kernels) {
        let each = each as usize;
        let weights = rounded(&Random::new(9).floats(experts as usize * rows * cols));
        let weight = if of == Float::F32 { bench.f32(&weights) } else { bench.f16(&weights) };
        let numbers: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
        for tokens in [1, 8, 9, 70] {
            let chosen = choices(experts as usize, each, tokens);
            let x = Random::new(tokens as u64).floats(if shared { tokens } else { tokens * each } * cols);
            let (bx, call) = (bench.f32(&x), bench.call(tokens, 0));
            let records = records(&bench, &chosen, each);
            let order = sort(&bench, route, &records, &call, tokens, each);
            let want = multiply(&x, &numbers, &chosen, *stack, cols);
            let runs = Extent::Runs { experts, each: each as u32, tile: dense::TOKENS }.blocks(tokens);
            let few = (tokens <= 8).then_some((few, (tokens * each) as u32, &records));
            for (kernel, blocks, route) in few.into_iter().chain([(many, runs, &order)]) {
                let y = bench.f32(&vec![f32::NAN; tokens * each * rows]);
                let args = [&weight, &bx, &y, &call, route].map(Buffer::address);
                bench.launch(kernel, [rows.div_ceil(8) as u32, blocks, 1], &args);
                let error = error(&bench.read_f32(&y), &want);
                assert!(error < 2e-6, "{}, {tokens} tokens: {error}", kernel.name);
            }
        }
    }
}

fn row(arg: usize, pitch: usize, col: usize) -> Row {
    Row { arg, pitch, col }
}

#[test]
fn experts_are_chosen_as_the_reference_does() {
    let plain = TopK { k: 2, groups: None, normalize: false, scale: None, near: None };
    let groups = |count, keep, by| Some(Groups { count, keep, by });
    let cases = [
        (4, false, TopK { normalize: true, ..plain.clone() }),
        (60, false, TopK { k: 4, ..plain.clone() }),
        (16, false, TopK { near: Some(0.2), ..plain.clone() }),
        (16, true, TopK { near: Some(0.01), normalize: true, ..plain.clone() }),
        (8, true, TopK { k: 3, groups: groups(4, 2, GroupScore::Best), scale: Some(1.5), ..plain.clone() }),
        (
            256,
            true,
            TopK { k: 8, groups: groups(8, 4, GroupScore::TwoBest), normalize: true, scale: Some(2.5), ..plain },
        ),
        (1000, false, TopK { k: 64, groups: None, normalize: true, scale: None, near: None }),
    ];
    let kernels = cases.clone().map(|(experts, biased, op)| {
        let each = op.k as usize;
        let of = Choice::of(&op, experts).expect("a choice");
        // Scores lie behind other columns, and so does the result.
        let scores = row(0, experts + 3, 3);
        let out = Out::F32(row(1, 2 * each + 5, 5));
        let steps = vec![Step::Choose { scores, bias: biased.then_some(2), of, out }];
        let rows = Rows { steps, args: vec![Kind::F32, Kind::F32, Kind::Parameter] };
        assert_eq!(rows.blocks(), 1);
        rows.source(arch()).expect("a kernel")
    });
    let bench = Bench::new(&kernels);
    for ((experts, biased, op), kernel) in cases.iter().zip(&kernels) {
        let (experts, each, tokens) = (*experts, op.k as usize, 5);
        let mut random = Random::new(experts as u64);
        let mut scores = random.floats(tokens * (experts + 3));
        // Equal scores: the smaller number comes first. Of one token all are.
        scores.iter_mut().enumerate().for_each(|(i, s)| *s = if i % 3 == 0 { 0.25 } else { *s });
        scores[..experts + 3].fill(0.5);
        let bias = random.floats(experts);
        let (bs, bb, call) = (bench.f32(&scores), bench.f32(&bias), bench.call(tokens, 0));
        let out = bench.f32(&vec![f32::NAN; tokens * (2 * each + 5)]);
        let args = [&bs, &out, &bb, &call].map(Buffer::address);
        bench.launch(kernel, [1, tokens as u32, 1], &args);
        for (got, scores) in bench.read_f32(&out).chunks(2 * each + 5).zip(scores.chunks(experts + 3)) {
            let scores = &scores[3..];
            let by = scores.iter().zip(&bias).map(|(s, b)| if *biased { s + b } else { *s }).collect();
            let (weights, chosen): (Vec<f32>, Vec<usize>) = routing::choose(op, scores, by).into_iter().unzip();
            let found: Vec<usize> = got[5 + each..].iter().map(|e| e.to_bits() as usize).collect();
            assert_eq!(found, chosen, "{}", kernel.name);
            let want: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
            let error = error(&got[5..][..each], &want);
            assert!(error < 1e-6, "{}: {error}", kernel.name);
        }
    }
    let many = TopK { k: 65, groups: None, normalize: false, scale: None, near: None };
    assert!(Choice::of(&many, 100).expect_err("too many").contains("65 of 100 experts"));
}

#[test]
fn scores_and_sums_of_experts() {
    let (experts, each, width, tokens) = (300, 3, 700, 4);
    let softmax = Rows {
        steps: vec![Step::Softmax { x: row(0, experts, 0), width: experts, out: Out::F32(row(1, experts, 0)) }],
        args: vec![Kind::F32, Kind::F32],
    };
    // What experts say lies in the last columns of wider rows.
    let stride = width + 11;
    let combine = Rows {
        steps: vec![Step::Combine {
            y: row(0, each * stride, 11),
            w: row(1, 2 * each, 0),
            each,
            stride,
            width,
            out: Out::F32(row(2, width, 0)),
        }],
        args: vec![Kind::F32; 3],
    };
    let repeat = Rows {
        steps: vec![Step::Repeat { x: row(0, 8, 2), width: 5, times: 130, out: Out::F16(row(1, 650, 0)) }],
        args: vec![Kind::F32, Kind::F16],
    };
    let kernels = [&softmax, &combine, &repeat].map(|rows| rows.source(arch()).expect("a kernel"));
    let bench = Bench::new(&kernels);
    let mut random = Random::new(5);
    let call = bench.call(tokens, 0);
    let launch = |i: usize, rows: &Rows, args: &[&Buffer]| {
        let args: Vec<_> = args.iter().map(|b| b.address()).chain([call.address()]).collect();
        bench.launch(&kernels[i], [rows.blocks(), tokens as u32, 1], &args);
    };

    let x: Vec<f32> = random.floats(tokens * experts).iter().map(|v| 40.0 * v).collect();
    let out = bench.f32(&vec![f32::NAN; x.len()]);
    launch(0, &softmax, &[&bench.f32(&x), &out]);
    let mut want = Vec::new();
    for x in x.chunks(experts) {
        let best = x.iter().fold(f32::MIN, |m, v| m.max(*v));
        let powers: Vec<f64> = x.iter().map(|v| f64::from(v - best).exp()).collect();
        let sum: f64 = powers.iter().sum();
        want.extend(powers.iter().map(|p| p / sum));
    }
    assert!(error(&bench.read_f32(&out), &want) < 1e-6);

    let (y, w) = (random.floats(tokens * each * stride), random.floats(tokens * 2 * each));
    let out = bench.f32(&vec![f32::NAN; tokens * width]);
    launch(1, &combine, &[&bench.f32(&y), &bench.f32(&w), &out]);
    let sum = |i: usize| {
        let (t, c) = (i / width, i % width);
        let term = |j: usize| f64::from(w[t * 2 * each + j]) * f64::from(y[(t * each + j) * stride + 11 + c]);
        (0..each).map(term).sum()
    };
    assert!(error(&bench.read_f32(&out), &(0..tokens * width).map(sum).collect::<Vec<_>>()) < 1e-6);

    let x = rounded(&random.floats(tokens * 8));
    let out = bench.f16(&vec![f32::NAN; tokens * 650]);
    launch(2, &repeat, &[&bench.f32(&x), &out]);
    let want: Vec<f32> = (0..tokens * 650).map(|i| x[i / 650 * 8 + 2 + i % 650 % 5]).collect();
    assert_eq!(bench.read_f16(&out), want);
}

//! The products with packed weights against the numbers that the codes stand for.

use awqc_cuda::arch::Arch;
use awqc_cuda::emit::Source;
use awqc_cuda::kernels::{Call, dequantize, gemm, gemv};
use awqc_exec::layout::mma16;
use awqc_ir::Group;
use awqc_ir::tiles::Tiles;
use awqc_passes::rtn::Codes;

use crate::support::{Bench, Random, codes, decode, error, rounded};

struct Case {
    codes: Codes,
    shape: Tiles,
    bias: bool,
    gemv: Source,
    gemm: Source,
    dequantize: Source,
}

/// Odd shapes, all bits, groups of 16 to a whole row.
fn cases() -> Vec<Case> {
    let arch = Arch::find(89).expect("an architecture");
    let size = Group::Size;
    [
        (4, false, size(128), 48, 256, true),
        (4, false, size(128), 37, 132, false),
        (4, false, size(64), 20, 1088, false),
        (4, true, size(32), 33, 100, true),
        (4, false, size(16), 17, 52, false),
        (4, false, Group::Row, 5, 68, true),
        (3, false, size(128), 40, 384, false),
        (3, true, size(32), 21, 92, true),
        (2, false, size(64), 33, 200, false),
        (2, true, Group::Row, 16, 64, false),
        (8, false, size(128), 150, 320, true),
        (8, true, size(48), 19, 4, false),
    ]
    .into_iter()
    .map(|(bits, symmetric, group, rows, cols, bias)| {
        let codes = codes(bits, symmetric, group, rows, cols);
        let shape = mma16::shape(codes.quant, rows, cols).expect("a shape");
        let gemv = gemv::source(arch, &shape, bias).expect("a kernel");
        let gemm = gemm::source(arch, &shape, bias).expect("a kernel");
        let dequantize = dequantize::source(arch, &shape).expect("a kernel");
        Case { codes, shape, bias, gemv, gemm, dequantize }
    })
    .collect()
}

#[test]
fn products_are_those_of_the_decoded_weights() {
    let cases = cases();
    let bench = Bench::new(cases.iter().flat_map(|c| [&c.gemv, &c.gemm]));
    for case in &cases {
        let (rows, cols) = (case.codes.rows, case.codes.cols);
        let weight = bench.bytes(&mma16::panels(&case.codes).expect("panels"));
        let numbers = decode(&case.codes);
        let mut random = Random::new(cols as u64);
        let bias = random.floats(rows);
        for (kernel, tokens, block, panels) in [
            (&case.gemv, 1, 8, 1),
            (&case.gemv, 3, 8, 1),
            (&case.gemv, 9, 8, 1),
            (&case.gemm, 7, 64, 8),
            (&case.gemm, 70, 64, 8),
        ] {
            let x = rounded(&random.floats(tokens * cols));
            let y = bench.f32(&vec![f32::NAN; tokens * rows]);
            let (bx, bb, call) = (bench.f16(&x), bench.f32(&bias), bench.call(tokens, 0));
            let mut args = vec![weight.address(), weight.address(), bx.address()];
            args.extend(case.bias.then(|| bb.address()));
            args.extend([y.address(), call.address()]);
            let grid = [case.shape.panels().div_ceil(panels) as u32, tokens.div_ceil(block) as u32, 1];
            bench.launch(kernel, grid, &args);
            let mut want = vec![0.0; tokens * rows];
            for (i, want) in want.iter_mut().enumerate() {
                let (t, r) = (i / rows, i % rows);
                let products = x[t * cols..][..cols].iter().zip(&numbers[r * cols..][..cols]);
                *want = products.map(|(x, w)| f64::from(*x) * w).sum();
                *want += if case.bias { f64::from(bias[r]) } else { 0.0 };
            }
            // Sums are in f32, nothing else is rounded.
            let error = error(&bench.read_f32(&y), &want);
            assert!(error < 2e-6, "{}, {tokens} tokens: {error}", kernel.name);
        }
    }
}

#[test]
fn packed_weights_are_the_numbers_of_their_codes() {
    let cases = cases();
    let bench = Bench::new(cases.iter().map(|c| &c.dequantize));
    for case in &cases {
        let weight = bench.bytes(&mma16::panels(&case.codes).expect("panels"));
        let numbers = decode(&case.codes);
        let out = bench.f32(&vec![f32::NAN; numbers.len()]);
        let args = [weight.address(), weight.address(), out.address()];
        bench.launch(&case.dequantize, [case.shape.panels() as u32, 1, 1], &args);
        let got: Vec<f64> = bench.read_f32(&out).into_iter().map(f64::from).collect();
        // Eleven bits of a scale times eight of a code: nothing is rounded.
        assert!(got == numbers, "{}", case.dequantize.name);
    }
}

/// Several blocks share rows; which of them is last must not matter.
#[test]
fn columns_divided_among_blocks_add_up_in_order() {
    let arch = Arch::find(90).expect("an architecture");
    let size = Group::Size;
    let cases: Vec<_> = [
        (4, false, size(128), 37, 1152, true, 2),
        (4, true, size(32), 20, 836, false, 7),
        (4, false, size(16), 17, 200, true, 4),
        (3, false, size(128), 16, 640, false, 5),
        (2, true, Group::Row, 50, 320, true, 3),
        (8, false, size(64), 33, 1088, false, 2),
    ]
    .into_iter()
    .map(|(bits, symmetric, group, rows, cols, bias, splits)| {
        let codes = codes(bits, symmetric, group, rows, cols);
        let shape = mma16::shape(codes.quant, rows, cols).expect("a shape");
        let kernel = gemv::split_source(arch, &shape, bias, splits).expect("a kernel");
        (codes, shape, bias, splits, kernel)
    })
    .collect();
    let bench = Bench::new(cases.iter().map(|c| &c.4));
    for (codes, shape, has_bias, splits, kernel) in &cases {
        let (rows, cols) = (codes.rows, codes.cols);
        let weight = bench.bytes(&mma16::panels(codes).expect("panels"));
        let numbers = decode(codes);
        let mut random = Random::new(cols as u64);
        let bias = random.floats(rows);
        for tokens in [1, 3, 8] {
            let x = rounded(&random.floats(tokens * cols));
            let (bx, bb, call) = (bench.f16(&x), bench.f32(&bias), bench.call(tokens, 0));
            let partials = bench.f32(&vec![f32::NAN; gemv::partials(shape, *splits)]);
            let grid = [shape.panels() as u32, 1, *splits as u32];
            let run = || {
                let y = bench.f32(&vec![f32::NAN; tokens * rows]);
                let mut args = vec![weight.address(), weight.address(), bx.address()];
                args.extend(has_bias.then(|| bb.address()));
                args.extend([y.address(), call.address(), partials.address(), call.address()]);
                bench.launch(kernel, grid, &args);
                bench.read_f32(&y)
            };
            // The emulator takes blocks forwards, then backwards.
            let (one, other) = (run(), run());
            assert_eq!(one, other, "{}, {tokens} tokens", kernel.name);
            let words = bench.read_f32(&call);
            assert!(
                words[Call::Counters as usize..].iter().all(|w| w.to_bits() == 0),
                "{}: counters stay",
                kernel.name
            );
            let want: Vec<f64> = (0..tokens * rows)
                .map(|i| {
                    let (t, r) = (i / rows, i % rows);
                    let products = x[t * cols..][..cols].iter().zip(&numbers[r * cols..][..cols]);
                    let sum: f64 = products.map(|(x, w)| f64::from(*x) * w).sum();
                    sum + if *has_bias { f64::from(bias[r]) } else { 0.0 }
                })
                .collect();
            let error = error(&one, &want);
            assert!(error < 2e-6, "{}, {tokens} tokens: {error}", kernel.name);
        }
    }
}

#[test]
fn equal_input_gives_equal_text() {
    let (one, other) = (cases(), cases());
    for (a, b) in one.iter().zip(&other) {
        assert_eq!(a.gemv, b.gemv);
        assert_eq!(a.gemm, b.gemm);
        assert_eq!(a.dequantize, b.dequantize);
    }
}

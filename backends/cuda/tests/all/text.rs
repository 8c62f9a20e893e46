//! The text of the kernels: one is kept for people to read, and NVRTC compiles all where it can be found.

use std::path::PathBuf;

use awqc_cuda::arch::{ARCHS, Arch};
use awqc_cuda::emit::Source;
use awqc_cuda::kernels::routed::{Routed, Stack};
use awqc_cuda::kernels::rows::{Choice, Kind, Map, Out, Row, Rows, Step, Zip};
use awqc_cuda::kernels::{Float, argmax, attend, dense, dequantize, flash, gemm, gemv, route, top};
use awqc_cuda::{CudaError, Nvrtc};
use awqc_ir::op::{Alibi, GroupScore, Groups, Sdpa, TopK};
use awqc_ir::tiles::Tiles;
use awqc_ir::{Group, Quant};

/// `silu(gate) · up` of a 7B model, as a packed product reads it.
fn gate(arch: &Arch) -> Source {
    let (width, pitch) = (11008, 22016);
    let row = |col| Row { arg: 0, pitch, col };
    let out = Out::F16(Row { arg: 1, pitch: width, col: 0 });
    let step = Step::Zip { a: row(0), f: Map::Silu, b: row(width), zip: Zip::Mul, width, out };
    Rows { steps: vec![step], args: vec![Kind::F32, Kind::F16] }.source(arch).expect("a kernel")
}

#[test]
fn a_kernel_to_read() {
    let source = gate(Arch::find(89).expect("an architecture"));
    insta::assert_snapshot!(source.text);
}

/// The experts of a token of a large model, from the scores that its router gives.
fn choose(arch: &Arch) -> Source {
    let row = |arg, pitch| Row { arg, pitch, col: 0 };
    let op = TopK {
        k: 8,
        groups: Some(Groups { count: 8, keep: 4, by: GroupScore::TwoBest }),
        normalize: true,
        scale: Some(2.5),
        near: Some(0.01),
    };
    let (scores, of) = (row(1, 256), Choice::of(&op, 256).expect("a choice"));
    let steps = vec![
        Step::Softmax { x: row(0, 256), width: 256, out: Out::F32(scores) },
        Step::Choose { scores, bias: Some(2), of, out: Out::F32(row(3, 16)) },
        Step::Combine {
            y: row(4, 8 * 7168),
            w: row(3, 16),
            each: 8,
            stride: 7168,
            width: 7168,
            out: Out::F32(row(5, 7168)),
        },
        Step::Repeat { x: row(3, 16), width: 1, times: 7168, out: Out::F32(row(6, 7168)) },
    ];
    let args = vec![Kind::F32, Kind::F32, Kind::Parameter, Kind::F32, Kind::F32, Kind::F32, Kind::F32];
    Rows { steps, args }.source(arch).expect("a kernel")
}

/// One kernel of each kind and bit width, of sizes of a 7B model.
fn kernels(arch: &Arch) -> Vec<Source> {
    let mut out = vec![gate(arch)];
    for (bits, symmetric, group) in
        [(4, false, 128), (4, true, 32), (3, false, 128), (2, false, 64), (8, false, 128), (4, false, 16)]
    {
        let quant = Quant { bits, symmetric, group: Group::Size(group) };
        let shape = Tiles::of(quant, 4096, 4096).expect("a shape");
        out.push(gemv::source(arch, &shape, bits == 4).expect("a kernel"));
        out.push(dequantize::source(arch, &shape).expect("a kernel"));
        out.push(gemm::source(arch, &shape, bits == 4).expect("a kernel"));
        let narrow = Tiles::of(quant, 1536, 8960).expect("a shape");
        out.push(gemv::split_source(arch, &narrow, bits == 4, 5).expect("a kernel"));
        let stacked = Tiles::of(quant, 8 * 4096, 4096).expect("a shape");
        for shared in [true, false] {
            let stack = Stack { experts: 8, each: 2, shared };
            out.push(gemv::routed_source(arch, &stacked, Routed::Few(stack)).expect("a kernel"));
            let many = |tile| gemm::routed_source(arch, &stacked, Routed::Many(stack), tile).expect("a kernel");
            out.extend([16, 64].map(many));
        }
    }
    let stack = Stack { experts: 60, each: 4, shared: false };
    for routed in [Routed::Few(stack), Routed::Many(stack)] {
        out.push(dense::routed_source(arch, Float::F16, 1408, 2048, routed).expect("a kernel"));
    }
    out.push(route::source(arch, 60, 4, 64).expect("a kernel"));
    out.push(choose(arch));
    let op = |window, softcap| Sdpa { causal: true, heads: 32, kv_heads: 8, scale: None, window, softcap, alibi: None };
    for (op, columns, splits) in
        [(op(None, None), 128, 8), (op(Some(4096), Some(50.0)), 256, 1), (op(None, None), 64, 1)]
    {
        let shape = attend::Shape::of(&op, columns, columns, true, splits).expect("a shape");
        out.push(attend::source(arch, &shape).expect("a kernel"));
        out.extend((splits > 1).then(|| attend::join_source(arch, &shape).expect("a kernel")));
    }
    let alibi = Sdpa { alibi: Some(Alibi { max: 8.0, scale: 1.0 }), ..op(None, None) };
    let every = [
        (op(None, None), 64, 64),
        (op(None, None), 80, 80),
        (op(None, None), 96, 96),
        (op(None, None), 128, 128),
        (alibi.clone(), 128, 128),
        (op(Some(4096), Some(50.0)), 128, 128),
        (op(None, None), 192, 128),
        (op(None, None), 224, 224),
        (op(None, None), 256, 256),
        (op(Some(4096), None), 256, 256),
        (op(Some(4096), Some(50.0)), 256, 256),
        (alibi, 256, 256),
    ];
    for (op, key, value) in every {
        let shape = attend::Shape::of(&op, key, value, true, 1).expect("a shape");
        out.push(flash::source(arch, &shape).expect("a kernel"));
    }
    for of in [Float::F32, Float::F16, Float::Bf16] {
        out.push(dense::source(arch, of, 32000, 4096, false).expect("a kernel"));
    }
    out.push(argmax::source(arch, 32000).expect("a kernel"));
    out.extend([true, false].map(|first| top::source(arch, 32000, first).expect("a kernel")));
    let row = |arg, pitch| Row { arg, pitch, col: 0 };
    let args = vec![Kind::F32, Kind::F32, Kind::Parameter, Kind::F16, Kind::Table(Float::Bf16), Kind::Ints, Kind::F32];
    let x = row(0, 4096);
    let steps = vec![
        Step::Embed { table: 4, of: Float::Bf16, index: 5, offset: 0, width: 4096, out: Out::F32(x) },
        Step::Image { x, images: 2, index: 5, width: 4096, out: Out::F32(x) },
        Step::Zip { a: x, f: Map::GeluTanh, b: row(1, 4096), zip: Zip::Add, width: 4096, out: Out::F32(x) },
        Step::RmsNorm { x, gain: Some(2), heads: 32, width: 128, eps: 1e-6, out: Out::F32(x) },
        Step::Rope {
            x,
            cos: row(6, 64),
            sin: row(6, 64),
            heads: 32,
            width: 128,
            pairs: 64,
            interleaved: false,
            out: Out::F32(row(1, 4096)),
        },
        Step::LayerNorm {
            x,
            gain: Some(2),
            bias: Some(2),
            width: 4096,
            heads: 1,
            each: false,
            eps: 1e-5,
            out: Out::F16(row(3, 4096)),
        },
    ];
    out.push(Rows { steps, args }.source(arch).expect("a kernel"));
    out
}

/// Sums are written, then seen by all, then counted; and counted before they are read.
#[test]
fn blocks_that_share_rows_are_ordered_by_fences() {
    let quant = Quant { bits: 4, symmetric: false, group: Group::Size(128) };
    let shape = Tiles::of(quant, 896, 4864).expect("a shape");
    let arch = Arch::find(90).expect("an architecture");
    let text = gemv::split_source(arch, &shape, false, 3).expect("a kernel").text;
    let mut rest = text.as_str();
    let (fence, sync) = ("__threadfence();", "__syncthreads();");
    let all = ["partials[", fence, sync, "atomicAdd(", sync, fence, "partials[", "y["];
    for word in all {
        rest = rest.split_once(word).unwrap_or_else(|| panic!("{word} is missing in\n{text}")).1;
    }
}

/// The code generator keeps tables in an order that differs from one to the next, also within a process.
#[test]
fn every_kernel_is_the_same_each_time() {
    let arch = Arch::find(86).expect("an architecture");
    let first = kernels(arch);
    for _ in 0..4 {
        assert_eq!(first, kernels(arch));
    }
}

#[test]
fn nvrtc_compiles_every_kernel_for_every_architecture_without_spills() {
    let folders: Vec<PathBuf> =
        std::env::var_os("AWQC_NVRTC").map(|f| std::env::split_paths(&f).collect()).unwrap_or_default();
    let nvrtc = match Nvrtc::open(&folders) {
        Ok(nvrtc) => nvrtc,
        Err(CudaError::NoNvrtc(why)) if folders.is_empty() => {
            eprintln!("note: NVRTC was not found, the kernels are not compiled: {why}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    eprintln!("NVRTC {}.{}", nvrtc.version().0, nvrtc.version().1);
    let mut spilled = Vec::new();
    for arch in ARCHS {
        for source in kernels(arch) {
            let compiled = nvrtc.compile(&source, arch).unwrap_or_else(|e| panic!("{e}"));
            let r = &compiled.resources;
            eprintln!(
                "{} {:<48} {:>3} registers, {:>5} bytes shared, {:>2} warps",
                arch.name(),
                r.kernel,
                r.registers,
                r.shared_bytes,
                r.warps_per_multiprocessor
            );
            // Arrays of threads must become registers, too.
            let memory = (r.stack, r.spill_stores, r.spill_loads);
            spilled.extend((memory != (0, 0, 0)).then(|| format!("{} for {}: {memory:?}", r.kernel, arch.name())));
            assert!(r.registers > 0 && r.registers <= arch.registers_thread, "{r:?}");
            assert!(compiled.cubin.starts_with(b"\x7fELF"), "{}", r.kernel);
            assert!(String::from_utf8_lossy(&compiled.ptx).contains(&format!(".target sm_{}", arch.sm)));
        }
    }
    assert!(spilled.is_empty(), "stack and spills:\n{}", spilled.join("\n"));
}

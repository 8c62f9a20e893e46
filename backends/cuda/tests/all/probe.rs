//! Single products that are checked and timed.

use awqc_cuda::arch::Arch;
use awqc_cuda::emit::Source;
use awqc_cuda::kernels::dequantize;
use awqc_cuda::probe::{Probe, Repeats};
use awqc_cuda::{CudaError, product};
use awqc_exec::layout::mma16;
use awqc_ir::{Group, Quant};

use crate::emulator::arch;
use crate::support::Bench;

const FEW: Repeats = Repeats { products: 3, samples: 2 };
const TOKENS: [usize; 4] = [1, 8, 9, 70];

fn quants() -> [Quant; 3] {
    [4, 3, 2].map(|bits| Quant { bits, symmetric: bits == 3, group: Group::Size(128) })
}

fn decoder(quant: Quant, rows: usize, cols: usize) -> Source {
    dequantize::source(arch(), &mma16::shape(quant, rows, cols).expect("a shape")).expect("a kernel")
}

#[test]
fn products_are_checked_and_measured() {
    let (rows, cols) = (40, 260);
    let arch = arch();
    let kernels = quants().map(|quant| {
        let shape = mma16::shape(quant, rows, cols).expect("a shape");
        TOKENS.map(|tokens| product(arch, &shape, tokens).expect("a product").kernels)
    });
    let numbers = quants().map(|quant| decoder(quant, rows, cols));
    let all: Vec<Source> = kernels.into_iter().flatten().flatten().chain(numbers).collect();
    let bench = Bench::new(&all);
    for quant in quants() {
        let probe = Probe::new(&bench.device, quant, rows, cols).expect("a weight");
        probe.check(&|source, _| bench.image(source)).unwrap_or_else(|e| panic!("{quant}: {e}"));
        for tokens in TOKENS {
            let timing = probe
                .measure(tokens, FEW, &|source, _| {
                    assert!(all.contains(source));
                    bench.image(source)
                })
                .unwrap_or_else(|e| panic!("{quant}, {tokens} tokens: {e}"));
            assert_eq!(timing.bytes, mma16::shape(quant, rows, cols).expect("a shape").total_bytes());
            assert!(timing.seconds > 0.0 && timing.error < 1e-5, "{timing:?}");
        }
    }
}

#[test]
fn a_wrong_kernel_is_found() {
    let quant = Quant { bits: 4, symmetric: false, group: Group::Size(128) };
    let shape = mma16::shape(quant, 16, 128).expect("a shape");
    let arch = arch();
    let mut kernels = product(arch, &shape, 1).expect("a product").kernels;
    for kernel in &mut kernels {
        // The eighth of the rows, and of the tokens, is not written.
        let text = kernel.text.replacen("    y[", "    if (threadIdx.x != 7) y[", 1);
        assert_ne!(text, kernel.text, "{text}");
        kernel.text = text;
    }
    let mut numbers = decoder(quant, 16, 128);
    let text = numbers.text.replacen("    out[", "    if (threadIdx.x != 7) out[", 1);
    assert_ne!(text, numbers.text, "{text}");
    numbers.text = text;
    kernels.push(numbers);
    let bench = Bench::new(&kernels);
    let probe = Probe::new(&bench.device, quant, 16, 128).expect("a weight");
    let image =
        |source: &Source, _: &Arch| bench.image(kernels.iter().find(|k| k.name == source.name).expect("a kernel"));
    let error = probe.check(&image).expect_err("a number is missing");
    assert!(matches!(&error, CudaError::Wrong { error, .. } if *error > 0.0), "{error}");
    let error = probe.measure(1, FEW, &image).expect_err("the result is wrong");
    assert!(matches!(&error, CudaError::Wrong { error, .. } if *error > 1.0), "{error}");
    assert!(error.to_string().contains("u4g128[16,128] with 1 tokens wrongly"), "{error}");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let bench = Bench::new([]);
    let quant = |bits, group| Quant { bits, symmetric: false, group: Group::Size(group) };
    for (quant, rows, cols) in [(quant(4, 20), 16, 64), (quant(4, 128), 16, 63), (quant(5, 128), 16, 64)] {
        let error = Probe::new(&bench.device, quant, rows, cols).err().expect("no such weight");
        assert!(matches!(error, CudaError::Unsupported(_)), "{error}");
    }
}

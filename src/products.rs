//! Single products on a device: how fast packed weights are multiplied there.

use awqc_cuda::CudaError;
use awqc_cuda::arch::Arch;
use awqc_cuda::driver::Device;
use awqc_cuda::emit::Source;
use awqc_cuda::probe::{Compile, Probe, Repeats};
use awqc_ir::Quant;
use serde::Serialize;

use crate::device::{bandwidth, nvrtc};
use crate::failure::Failure;
use crate::interrupt::Interrupt;

/// One product on a device.
#[derive(Clone, Debug, Serialize)]
pub struct Product {
    /// The weight's type, such as `u4g128`.
    #[serde(rename = "type")]
    pub quant: String,
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub cols: usize,
    /// Tokens.
    pub tokens: usize,
    /// Median time in microseconds.
    pub microseconds: f64,
    /// Gigabytes of weights a second.
    pub gigabytes_per_second: f64,
    /// The same as a share of what copying memory reaches.
    pub bandwidth_share: f64,
    /// 10¹² operations a second; a multiplication and an addition are two.
    pub teraops: f64,
    /// The largest difference from what the processor computes, relative to the largest result.
    pub error: f64,
}

/// What was measured on a device.
#[derive(Clone, Debug, Serialize)]
pub struct Products {
    /// The device's name.
    pub device: String,
    /// Its compute capability, such as `9.0`.
    pub compute_capability: String,
    /// Gigabytes a second that it copies from its memory to its memory: what is read plus what is written.
    pub copy_gigabytes_per_second: f64,
    /// The products.
    pub products: Vec<Product>,
}

/// What to measure: weights of all these types and shapes with all these numbers of tokens.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Types of weights.
    pub quants: Vec<Quant>,
    /// Rows (output channels) and columns (input channels).
    pub shapes: Vec<(usize, usize)>,
    /// Numbers of tokens.
    pub tokens: Vec<usize>,
    /// How often each is repeated.
    pub repeats: Repeats,
}

/// Measures products on the machine's device. Each is checked first.
///
/// # Errors
/// When there is no device or no NVRTC, or the device computes something else than the processor.
pub fn products(wanted: &Wanted, interrupt: &Interrupt) -> Result<Products, Failure> {
    let device = Device::open(None).map_err(|e| {
        let none = matches!(e, CudaError::NoDriver(_) | CudaError::NoDevice);
        let help = "run it on a machine with an NVIDIA GPU and its driver; without --device cuda, the processor's kernels \
                    are measured";
        if none { Failure::from(e).help(help) } else { e.into() }
    })?;
    let nvrtc = nvrtc(&[])?;
    let image = |source: &Source, arch: &Arch| nvrtc.compile_text(&source.name, &source.text, arch);
    products_on(&device, &image, wanted, interrupt)
}

/// The same on this device; `image` gives the machine code of a kernel.
///
/// # Errors
/// As [`products`].
pub fn products_on(
    device: &Device,
    image: &Compile<'_>,
    wanted: &Wanted,
    interrupt: &Interrupt,
) -> Result<Products, Failure> {
    let limit = bandwidth(device)?;
    let (major, minor) = device.capability();
    let mut out = Products {
        device: device.name().to_owned(),
        compute_capability: format!("{major}.{minor}"),
        copy_gigabytes_per_second: limit,
        products: Vec::new(),
    };
    for quant in &wanted.quants {
        for (rows, cols) in wanted.shapes.iter().copied() {
            interrupt.check()?;
            let probe = Probe::new(device, *quant, rows, cols)?;
            probe.check(image)?;
            for tokens in wanted.tokens.iter().copied() {
                interrupt.check()?;
                let timing = probe.measure(tokens, wanted.repeats, image)?;
                let rate = 1e-9 * timing.bytes as f64 / timing.seconds;
                out.products.push(Product {
                    quant: quant.to_string(),
                    rows,
                    cols,
                    tokens,
                    microseconds: 1e6 * timing.seconds,
                    gigabytes_per_second: rate,
                    bandwidth_share: rate / limit,
                    teraops: 2e-12 * rows as f64 * cols as f64 * tokens as f64 / timing.seconds,
                    error: timing.error,
                });
            }
        }
    }
    Ok(out)
}

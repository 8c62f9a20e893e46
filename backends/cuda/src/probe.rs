//! Measuring single products on a device, with weights that no cache holds.

use awqc_ir::tiles::Tiles;

use crate::CudaError;
use crate::arch::Arch;
use crate::driver::{Address, Device, Launch};
use crate::emit::Source;
use crate::kernels::{Call, gemm, gemv};
use crate::plan::FEW;

/// Bytes of weights that are used in turn: more than caches hold.
const ROTATION: usize = 512 << 20;
/// The most copies of a weight.
const MOST: usize = 64;
/// Times that all copies are used.
const ROUNDS: usize = 10;

/// What a product took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Seconds of one product: the mean over launches that follow each other in one captured graph.
    pub seconds: f64,
    /// Bytes of the weight.
    pub bytes: usize,
}

/// Times `y = x Wᵀ` for a packed weight of this shape. `image` gives the machine code of a kernel's text.
///
/// # Errors
/// When the device is of an unknown architecture, lacks memory, or fails.
pub fn product(
    device: &Device,
    shape: &Tiles,
    tokens: usize,
    mut image: impl FnMut(&Source, &Arch) -> Result<Vec<u8>, CudaError>,
) -> Result<Timing, CudaError> {
    let (major, minor) = device.capability();
    let arch = Arch::find(10 * major + minor)?;
    let few = tokens <= FEW;
    let source = if few { gemv::source(arch, shape, false)? } else { gemm::source(arch, shape, false)? };
    let code = device.load(&image(&source, arch)?)?;
    let function = device.function(&code, &source.name, source.shared_bytes)?;
    let bytes = shape.total_bytes();
    let copies = ROTATION.div_ceil(bytes).clamp(2, MOST);
    let stride = bytes.next_multiple_of(256);
    let weights = device.alloc("weights to measure with", stride * copies)?;
    // Any numbers will do, but zeros would cost less power than weights.
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8 & 0x3f
    })
    .take(bytes)
    .collect();
    for copy in 0..copies {
        device.upload(&weights, copy * stride, &noise)?;
    }
    let x = device.alloc("activations to measure with", tokens * shape.cols() * 2)?;
    device.upload(&x, 0, &vec![0x2c; tokens * shape.cols() * 2])?;
    let y = device.alloc("results to measure with", tokens * shape.rows() * 4)?;
    let call = device.alloc("a call", 4 * Call::WORDS)?;
    let mut words = vec![0u8; 4 * Call::WORDS];
    words[4 * Call::Tokens as usize..][..4].copy_from_slice(&(tokens as u32).to_le_bytes());
    device.upload(&call, 0, &words)?;
    let grid = match few {
        true => [shape.panels() as u32, (tokens as u32).div_ceil(gemv::TOKENS), 1],
        false => [(shape.panels() as u32).div_ceil(gemm::WARPS), (tokens as u32).div_ceil(gemm::TOKENS), 1],
    };
    let round = || {
        for copy in 0..copies {
            let weight = weights.address() + (copy * stride) as Address;
            let args = [weight, weight, x.address(), y.address(), call.address()];
            let launch = Launch {
                function: &function,
                grid,
                threads: source.threads,
                shared_bytes: source.shared_bytes,
                args: &args,
            };
            device.launch(&launch)?;
        }
        Ok(())
    };
    let graph = device.capture(round)?;
    device.replay(&graph)?;
    let seconds = device.time(|| (0..ROUNDS).try_for_each(|_| device.replay(&graph)))?;
    Ok(Timing { seconds: seconds / (ROUNDS * copies) as f64, bytes })
}

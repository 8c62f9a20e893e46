//! A product with a packed weight by itself, launched as a plan would launch it: to measure it and to check it.

use awqc_ir::tiles::Tiles;

use super::flat::{FlatOp, FlatProgram, Home};
use super::schedule::{Kernels, schedule};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::Source;
use crate::plan::{FEW, Launch};

/// `y = x Wᵀ` for one packed weight, which is constant 0.
#[derive(Clone, Debug)]
pub struct Product {
    /// The launches, in order; arguments are constant 0, places in the arena, and the call.
    pub launches: Vec<Launch>,
    /// The kernels; some may be for other numbers of tokens.
    pub kernels: Vec<Source>,
    /// Bytes of activations.
    pub arena_bytes: usize,
    /// Where `x` lies in them: f16 `[tokens, cols]`.
    pub x: usize,
    /// Where `y` lies: f32 `[tokens, rows]`.
    pub y: usize,
}

/// The launches of a product for so many tokens.
///
/// # Errors
/// When the code generator refuses a kernel.
pub fn product(arch: &Arch, shape: &Tiles, tokens: usize) -> Result<Product, CudaError> {
    let mut flat = FlatProgram::default();
    let x = flat.value(shape.cols(), Home::F16);
    let out = flat.value(shape.rows(), Home::F32);
    flat.given = vec![x];
    flat.push(FlatOp::Packed { weight: 0, shape: *shape, bias: None, x }, out);
    flat.results = vec![out];
    let mut kernels = Kernels::new(arch);
    let base = (2 * tokens * shape.cols()).next_multiple_of(super::schedule::ALIGN);
    let done = schedule(&flat, tokens, base, &[(0, shape.cols())], &mut kernels)?;
    Ok(Product {
        launches: if tokens > FEW { done.part.many } else { done.part.few },
        kernels: kernels.sources,
        arena_bytes: base + done.bytes,
        x: 0,
        y: done.results.first().map_or(base, |r| r.0),
    })
}

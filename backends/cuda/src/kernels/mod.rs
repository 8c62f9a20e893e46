//! The kernels, one a file: the code in `#[cube]` Rust, and the function that emits it for given sizes.
//!
//! A kernel's arguments are listed at its `source` function, in order; all are addresses on the device. What changes
//! from call to call is in a small array of 32-bit words, [`Call`].

pub mod gemm;
pub mod gemv;
pub(crate) mod tile;

/// Words of the array that describes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Tokens of this call.
    Tokens = 0,
    /// Position of the first of them: tokens that the caches hold.
    Past = 1,
}

impl Call {
    /// Words of the array.
    pub const WORDS: usize = 4;
}

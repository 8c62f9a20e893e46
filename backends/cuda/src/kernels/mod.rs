//! The kernels, one a file: the code in `#[cube]` Rust, and the function that emits it for given sizes.
//!
//! A kernel's arguments are listed at its `source` function, in order; all are addresses on the device. What changes
//! from call to call is in a small array of 32-bit words, [`Call`].

#![allow(
    clippy::collapsible_if,
    clippy::manual_is_multiple_of,
    reason = "code of kernels: choices at compile time stand apart from those at run time, and only operators are known"
)]

pub mod argmax;
pub mod attend;
pub mod dense;
pub mod dequantize;
pub mod divide;
pub mod flash;
pub mod gemm;
pub mod gemv;
pub mod route;
pub mod routed;
pub mod rows;
pub(crate) mod tile;
pub mod top;

/// The type of stored floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// 32 bits.
    F32,
    /// 16 bits.
    F16,
    /// 16 bits with the range of f32.
    Bf16,
}

impl Float {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::Bf16 => 2,
        }
    }

    /// Word for names of kernels.
    fn word(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::Bf16 => "bf16",
        }
    }
}

/// Words of the array that describes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Tokens of this call.
    Tokens = 0,
    /// Position of the first of them: tokens that the caches hold.
    Past = 1,
    /// The first of the counters of [`gemv::split_source`]: blocks of 16 rows that are done, 0 before and after each
    /// launch.
    Counters = 4,
}

impl Call {
    /// Words of the array.
    pub const WORDS: usize = Call::Counters as usize + divide::PANELS;
}

//! Products with packed weights on CPUs.
//!
//! Weights are in the layout `r16` of [`awqc_ir::panels`], activations in blocks that follow it ([`Acts`] with eight
//! bits, [`FloatActs`] for exact results). The instruction set is chosen at run time ([`Isa`]); all of them give the
//! results of the scalar specification to the last bit. With AMX there is one product more, in bf16 ([`Bf16Acts`]),
//! which no other has. The products of attention are with panels of numbers ([`Lines`], [`Stacked`]).

mod act;
#[cfg(target_arch = "aarch64")]
mod arm;
mod attention;
mod dispatch;
mod isa;
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
mod kernel;
mod out;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use act::{Acts, Bf16Acts, FloatActs, Line, TILE, TileMut};
pub use attention::{Lines, Numbers, Stacked};
pub use dispatch::{dequantize, matmul_bf16, matmul_f32, matmul_i8, times_panels, widen};
pub use isa::{Isa, UnknownIsa};
pub use out::OutTile;

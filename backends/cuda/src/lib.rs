//! Compiles modules to CUDA kernels without a GPU, and runs them where there is one.
//!
//! [`lower`] turns an artefact's module into a launch plan ([`plan`]) and the text of its kernels ([`kernels`], written
//! once in Rust, printed by [`emit`]); [`nvrtc`] turns the text into PTX and machine code where NVIDIA's run-time
//! compiler can be found. [`session`] carries the plan out on a device, which it reaches through the CUDA driver
//! ([`driver`]), found at run time too: nothing here links to CUDA.

pub mod arch;
pub mod driver;
pub mod emit;
mod error;
pub mod kernels;
mod library;
mod lower;
pub mod nvrtc;
pub mod plan;
pub mod probe;
pub mod session;

pub use error::CudaError;
pub use lower::{Lowered, Product, check, lower, product};
pub use nvrtc::Nvrtc;
pub use session::Session;

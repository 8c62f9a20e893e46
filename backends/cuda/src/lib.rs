//! Compiles modules to CUDA kernels without a GPU, and runs them where there is one.

pub mod arch;
pub mod driver;
pub mod emit;
mod error;
pub mod kernels;

pub use error::CudaError;

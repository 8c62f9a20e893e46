//! Kernels for 64-bit ARM.

mod neon;

pub(crate) use neon::{dequantize, matmul_f32, matmul_i8, matmul_i8_dotprod, matmul_i8_i8mm, times_panels, widen};

/// What the base kernels are compiled for.
pub(crate) fn has_neon() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

/// What the dot product kernel is compiled for.
pub(crate) fn has_dotprod() -> bool {
    has_neon() && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// What the matrix product kernel is compiled for.
pub(crate) fn has_i8mm() -> bool {
    has_dotprod() && std::arch::is_aarch64_feature_detected!("i8mm")
}

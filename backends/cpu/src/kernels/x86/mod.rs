//! Kernels for x86-64.

mod amx;
mod avx2;
mod avx512;

pub(crate) use amx::{has_amx, matmul_bf16};
pub(crate) use avx2::{
    dequantize as dequantize_avx2, matmul_f32 as matmul_f32_avx2, matmul_i8 as matmul_i8_avx2,
    quantize as quantize_avx2, times_panels as times_panels_avx2, widen as widen_avx2,
};
pub(crate) use avx512::{
    dequantize as dequantize_avx512, matmul_f32 as matmul_f32_avx512, matmul_i8_madd as matmul_i8_avx512,
    matmul_i8_vnni as matmul_i8_avx512vnni, quantize as quantize_avx512, times_panels as times_panels_avx512,
    widen as widen_avx512,
};

/// What the AVX2 kernels are compiled for.
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// What the AVX-512 kernels are compiled for.
pub(crate) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// What the VNNI kernel is compiled for.
pub(crate) fn has_avx512vnni() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512vnni")
}

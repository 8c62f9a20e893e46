//! AVX2: registers of eight rows.
//!
//! `maddubs` multiplies unsigned codes with signed activations and adds neighbours with 16-bit saturation. Nibbles keep
//! below it: a pair is 15 · 127 · 2 at most, and eight of them still fit 16 bits.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics")]
use std::arch::x86_64::*;

use half::f16;

use crate::kernels::act::{Acts, FloatActs, TileMut};
use crate::kernels::attention::{Lines, Stacked};
use crate::kernels::kernel::{self, Simd, Weights};
use crate::kernels::out::OutTile;

pub(crate) struct Avx2;

/// The number whose last bits are the units: a byte below it in the same register is added to it.
const UNITS: f32 = 8_388_608.0; // 2²³

#[rustfmt::skip]
macro_rules! shifted {
    ($v:ident, $n:ident, $left:ident, $right:ident) => {
        match $n {
            -2 => $left::<2>($v), -1 => $left::<1>($v), 1 => $right::<1>($v), 2 => $right::<2>($v),
            3 => $right::<3>($v), 4 => $right::<4>($v), 5 => $right::<5>($v), 6 => $right::<6>($v),
            7 => $right::<7>($v), _ => $v,
        }
    };
}
pub(super) use shifted;

// SAFETY (of every block below): whoever calls a method of `Simd` has the instruction set, and promises what the method
// says of its pointers.
impl Simd for Avx2 {
    const ROWS: usize = 8;
    const WIDE: bool = false;
    const PAIRS: bool = false;

    type Codes = __m256i;
    type Acts = *const i8;
    type Products = __m256i;
    type Ints = __m256i;
    type Floats = __m256;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m256i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut u8, codes: __m256i) {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_storeu_si256(to.cast(), codes) }
    }

    #[inline(always)]
    unsafe fn shift<const RIGHT: i32>(codes: __m256i) -> __m256i {
        // SAFETY: see the top of the implementation.
        unsafe { shifted!(codes, RIGHT, _mm256_slli_epi16, _mm256_srli_epi16) }
    }

    #[inline(always)]
    unsafe fn and(codes: __m256i, mask: u8) -> __m256i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_and_si256(codes, _mm256_set1_epi8(mask as i8)) }
    }

    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        crate::memory::prefetch(at);
    }

    #[inline(always)]
    unsafe fn acts(from: *const i8) -> *const i8 {
        from
    }

    #[inline(always)]
    unsafe fn no_products() -> __m256i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn step<const P: usize>(sums: __m256i, codes: __m256i, acts: *const i8) -> __m256i {
        // SAFETY: see the top of the implementation; a block of activations has eight times four bytes.
        unsafe {
            let x = _mm256_set1_epi32(acts.cast::<i32>().add(P).read_unaligned());
            _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x))
        }
    }

    #[inline(always)]
    unsafe fn ints(sums: __m256i) -> __m256i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) }
    }

    #[inline(always)]
    unsafe fn with_high(low: __m256i, high: __m256i) -> __m256i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_add_epi32(low, _mm256_slli_epi32::<4>(high)) }
    }

    #[inline(always)]
    unsafe fn float(ints: __m256i) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_cvtepi32_ps(ints) }
    }

    #[inline(always)]
    unsafe fn splat(v: f32) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_set1_ps(v) }
    }

    #[inline(always)]
    unsafe fn load_floats(from: *const f32) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store_floats(to: *mut f32, v: __m256) {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn load_halves(from: *const u8) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_zeros(from: *const u8) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn neg_mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn offset(zeros: __m256) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm256_add_ps(zeros, _mm256_set1_ps(UNITS)) }
    }

    #[inline(always)]
    unsafe fn centered<const I: usize>(codes: __m256i, offset: __m256) -> __m256 {
        // SAFETY: see the top of the implementation.
        unsafe {
            // The byte of column `I` to the lowest of each row's four, zeros to the others.
            let n = -128 << 24 | 0x80 << 16 | 0x80 << 8 | I as i32;
            let pick = _mm256_setr_epi32(n, n + 4, n + 8, n + 12, n, n + 4, n + 8, n + 12);
            let byte = _mm256_shuffle_epi8(codes, pick);
            let number = _mm256_or_si256(byte, _mm256_castps_si256(_mm256_set1_ps(UNITS)));
            _mm256_sub_ps(_mm256_castsi256_ps(number), offset)
        }
    }
}

/// # Safety
/// The machine has AVX2, FMA and F16C; see [`kernel::matmul_i8`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn matmul_i8(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_i8::<Avx2>(weights, acts, out) }
}

/// # Safety
/// The machine has AVX2, FMA and F16C; see [`kernel::matmul_f32`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn matmul_f32(weights: Weights<'_>, acts: &FloatActs, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_f32::<Avx2, 1, 2, 3>(weights, acts, out) }
}

/// # Safety
/// The machine has AVX2, FMA and F16C; see [`kernel::times_panels`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn times_panels(rows: usize, a: Lines<'_>, b: &Stacked<'_>, factor: f32, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::times_panels::<Avx2>(rows, a, b, factor, out) }
}

/// # Safety
/// The machine has AVX2, FMA and F16C; see [`kernel::widen`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn widen(from: &[f16], to: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::widen::<Avx2>(from, to) }
}

/// # Safety
/// The machine has AVX2, FMA and F16C; see [`kernel::dequantize`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn dequantize(weights: Weights<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::dequantize::<Avx2>(weights, out) }
}

/// [`TileMut::fill`] with AVX2.
#[target_feature(enable = "avx2")]
pub(crate) fn quantize(tile: &mut TileMut<'_>, x: &[f32]) {
    tile.fill(x);
}

//! AVX-512: one register holds the 16 rows of a panel.
//!
//! With and without VNNI the kernels differ in [`Dot`] only, how codes and activations are multiplied.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics")]
use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::avx2::shifted;
use half::f16;

use crate::kernels::act::{Acts, FloatActs, TileMut};
use crate::kernels::attention::{Lines, Stacked};
use crate::kernels::kernel::{self, Simd, Weights};
use crate::kernels::out::OutTile;

pub(crate) struct Avx512<D>(PhantomData<D>);

/// The products of a quad; the methods are those of [`Simd`].
pub(crate) trait Dot {
    const WIDE: bool;
    unsafe fn step(sums: __m512i, codes: __m512i, x: __m512i) -> __m512i;
    unsafe fn ints(sums: __m512i) -> __m512i;
}

/// With AVX-512 BW: 16-bit sums of pairs, as in AVX2.
pub(crate) struct Madd;

impl Dot for Madd {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn step(sums: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        // SAFETY: whoever calls a method of `Dot` has the instruction set.
        unsafe { _mm512_add_epi16(sums, _mm512_maddubs_epi16(codes, x)) }
    }

    #[inline(always)]
    unsafe fn ints(sums: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_madd_epi16(sums, _mm512_set1_epi16(1)) }
    }
}

/// With VNNI: 32-bit sums of fours.
pub(crate) struct Vnni;

impl Dot for Vnni {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn step(sums: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sums, codes, x) }
    }

    #[inline(always)]
    unsafe fn ints(sums: __m512i) -> __m512i {
        sums
    }
}

const UNITS: f32 = 8_388_608.0; // 2²³, as in AVX2

// SAFETY (of every block below): whoever calls a method of `Simd` has the instruction set, and promises what the method
// says of its pointers.
impl<D: Dot> Simd for Avx512<D> {
    const ROWS: usize = 16;
    const WIDE: bool = D::WIDE;
    const PAIRS: bool = true;

    type Codes = __m512i;
    type Acts = *const i8;
    type Products = __m512i;
    type Ints = __m512i;
    type Floats = __m512;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut u8, codes: __m512i) {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_storeu_si512(to.cast(), codes) }
    }

    #[inline(always)]
    unsafe fn shift<const RIGHT: i32>(codes: __m512i) -> __m512i {
        // SAFETY: see the top of the implementation.
        unsafe { shifted!(codes, RIGHT, _mm512_slli_epi16, _mm512_srli_epi16) }
    }

    #[inline(always)]
    unsafe fn and(codes: __m512i, mask: u8) -> __m512i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_and_si512(codes, _mm512_set1_epi8(mask as i8)) }
    }

    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_or_si512(a, b) }
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
    unsafe fn no_products() -> __m512i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn step<const P: usize>(sums: __m512i, codes: __m512i, acts: *const i8) -> __m512i {
        // SAFETY: see the top of the implementation; a block of activations has eight times four bytes.
        unsafe { D::step(sums, codes, _mm512_set1_epi32(acts.cast::<i32>().add(P).read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn ints(sums: __m512i) -> __m512i {
        // SAFETY: see the top of the implementation.
        unsafe { D::ints(sums) }
    }

    #[inline(always)]
    unsafe fn with_high(low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_add_epi32(low, _mm512_slli_epi32::<4>(high)) }
    }

    #[inline(always)]
    unsafe fn float(ints: __m512i) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_cvtepi32_ps(ints) }
    }

    #[inline(always)]
    unsafe fn splat(v: f32) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_set1_ps(v) }
    }

    #[inline(always)]
    unsafe fn load_floats(from: *const f32) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store_floats(to: *mut f32, v: __m512) {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn load_halves(from: *const u8) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_zeros(from: *const u8) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn offset(zeros: __m512) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe { _mm512_add_ps(zeros, _mm512_set1_ps(UNITS)) }
    }

    #[inline(always)]
    unsafe fn centered<const I: usize>(codes: __m512i, offset: __m512) -> __m512 {
        // SAFETY: see the top of the implementation.
        unsafe {
            // The byte of column `I` to the lowest of each row's four; the others are those of 2²³ already.
            let n = I as i32;
            let pick = _mm512_broadcast_i32x4(_mm_setr_epi32(n, n + 4, n + 8, n + 12));
            let units = _mm512_castps_si512(_mm512_set1_ps(UNITS));
            let number = _mm512_mask_shuffle_epi8(units, 0x1111_1111_1111_1111, codes, pick);
            _mm512_sub_ps(_mm512_castsi512_ps(number), offset)
        }
    }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL; see [`kernel::matmul_i8`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn matmul_i8_madd(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_i8::<Avx512<Madd>>(weights, acts, out) }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and VNNI; see [`kernel::matmul_i8`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn matmul_i8_vnni(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_i8::<Avx512<Vnni>>(weights, acts, out) }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL; see [`kernel::matmul_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn matmul_f32(weights: Weights<'_>, acts: &FloatActs, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_f32::<Avx512<Madd>, 2, 2, 6>(weights, acts, out) }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL; see [`kernel::times_panels`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn times_panels(rows: usize, a: Lines<'_>, b: &Stacked<'_>, factor: f32, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::times_panels::<Avx512<Madd>>(rows, a, b, factor, out) }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL; see [`kernel::widen`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn widen(from: &[f16], to: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::widen::<Avx512<Madd>>(from, to) }
}

/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL; see [`kernel::dequantize`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) unsafe fn dequantize(weights: Weights<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::dequantize::<Avx512<Madd>>(weights, out) }
}

/// [`TileMut::fill`] with AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn quantize(tile: &mut TileMut<'_>, x: &[f32]) {
    tile.fill(x);
}

#[cfg(test)]
mod tests {
    use awqc_exec::layout::r16::pack_codes;
    use awqc_ir::panels::Panels;
    use half::f16;

    use super::*;
    use crate::kernels::{Isa, matmul_i8};

    /// The VNNI instruction in terms of others, so that all but that one instruction of its kernel runs everywhere.
    struct Emulated;

    impl Dot for Emulated {
        const WIDE: bool = true;

        #[inline(always)]
        unsafe fn step(sums: __m512i, codes: __m512i, x: __m512i) -> __m512i {
            // SAFETY: as above.
            unsafe {
                let even = _mm512_and_si512(codes, _mm512_set1_epi16(255));
                let odd = _mm512_srli_epi16::<8>(codes);
                let even_x = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
                let odd_x = _mm512_srai_epi16::<8>(x);
                let products = _mm512_add_epi32(_mm512_madd_epi16(even, even_x), _mm512_madd_epi16(odd, odd_x));
                _mm512_add_epi32(sums, products)
            }
        }

        #[inline(always)]
        unsafe fn ints(sums: __m512i) -> __m512i {
            sums
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn emulated(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
        // SAFETY: the caller's promise.
        unsafe { kernel::matmul_i8::<Avx512<Emulated>>(weights, acts, out) }
    }

    #[test]
    fn the_vnni_kernel_with_its_instruction_emulated() {
        if !Isa::Avx512.is_available() {
            println!("skipped: no avx512");
            return;
        }
        for (bits, tokens) in [(2, 1), (3, 2), (4, 1), (4, 5), (8, 1), (8, 3)] {
            let shape = Panels::new(37, 150, bits, false, 64).unwrap();
            let codes: Vec<u8> = (0..37 * 150u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> (32 - bits)) as u8).collect();
            let scales: Vec<f16> = (0..37 * 3).map(|i| f16::from_f32(0.01 + i as f32 * 1e-3)).collect();
            let zeros: Vec<u8> = (0..37 * 3).map(|i| (i % (1 << bits)) as u8).collect();
            let bytes = pack_codes(&shape, &codes, &scales, &zeros);
            let x: Vec<f32> = (0..tokens * 150).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            let mut acts = Acts::default();
            acts.quantize(Isa::Scalar, &shape, tokens, &x);
            let (mut expected, mut found) = (vec![0.0; tokens * 37], vec![0.0; tokens * 37]);
            let out = OutTile::new(&mut expected, tokens, 37, 37);
            matmul_i8(Isa::Scalar, &shape, &bytes, 0..3, &acts, out);
            let weights = Weights { shape: &shape, bytes: &bytes, panels: 0..3 };
            // SAFETY: the machine has AVX-512, and the arguments fit each other.
            unsafe { emulated(weights, &acts, OutTile::new(&mut found, tokens, 37, 37)) };
            assert_eq!(found, expected, "{bits} bits, {tokens} tokens");
        }
    }
}

//! NEON: pairs of registers, eight rows.
//!
//! The kernels with plain instructions, dot products and matrix products differ in [`Dot`] only. All multiply signed
//! bytes, so codes of eight bits go as two nibbles.

#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics")]
use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use half::f16;

use crate::kernels::act::{Acts, FloatActs};
use crate::kernels::attention::{Lines, Stacked};
use crate::kernels::kernel::{self, Simd, Weights};
use crate::kernels::out::OutTile;

pub(crate) struct Neon<D>(PhantomData<D>);

/// The products of a quad; the methods are those of [`Simd`].
pub(crate) trait Dot: Sized {
    type Products: Copy;
    unsafe fn no_products() -> Self::Products;
    /// `x` holds the activations of four quads, of which this is number `LANE`.
    unsafe fn step<const LANE: usize>(sums: Self::Products, codes: [uint8x16_t; 2], x: int8x16_t) -> Self::Products;
    unsafe fn ints(sums: Self::Products) -> [int32x4_t; 2];

    /// See [`Simd::TOKENS`].
    const TOKENS: usize = 1;
    /// See [`Simd::paired`].
    #[inline(always)]
    unsafe fn paired(quads: [[uint8x16_t; 2]; 8]) -> [[uint8x16_t; 2]; 8] {
        quads
    }
    /// See [`Simd::pair`].
    #[inline(always)]
    unsafe fn pair(quads: &[[uint8x16_t; 2]; 8], x: *const i8, y: *const i8) -> [[int32x4_t; 2]; 2] {
        // SAFETY: the caller's promise.
        unsafe { [x, y].map(|at| Neon::<Self>::block(quads, Neon::<Self>::acts(at))) }
    }
}

/// Every NEON: 16-bit sums, one for each column of a quad. A sum is 8 · 15 · 127 at most, so two of them still fit.
pub(crate) struct Base;

impl Dot for Base {
    type Products = [int16x8_t; 4];

    #[inline(always)]
    unsafe fn no_products() -> Self::Products {
        // SAFETY: whoever calls a method of `Dot` has the instruction set.
        unsafe { [vdupq_n_s16(0); 4] }
    }

    #[inline(always)]
    unsafe fn step<const LANE: usize>(sums: Self::Products, codes: [uint8x16_t; 2], x: int8x16_t) -> Self::Products {
        // SAFETY: as above.
        unsafe {
            let x = vreinterpretq_s32_s8(x);
            let x = match LANE {
                0 => vdupq_laneq_s32::<0>(x),
                1 => vdupq_laneq_s32::<1>(x),
                2 => vdupq_laneq_s32::<2>(x),
                _ => vdupq_laneq_s32::<3>(x),
            };
            let x = vreinterpretq_s8_s32(x);
            let [a, b] = [vreinterpretq_s8_u8(codes[0]), vreinterpretq_s8_u8(codes[1])];
            [
                vmlal_s8(sums[0], vget_low_s8(a), vget_low_s8(x)),
                vmlal_high_s8(sums[1], a, x),
                vmlal_s8(sums[2], vget_low_s8(b), vget_low_s8(x)),
                vmlal_high_s8(sums[3], b, x),
            ]
        }
    }

    #[inline(always)]
    unsafe fn ints(sums: Self::Products) -> [int32x4_t; 2] {
        // SAFETY: as above.
        unsafe { [vpaddlq_s16(vpaddq_s16(sums[0], sums[1])), vpaddlq_s16(vpaddq_s16(sums[2], sums[3]))] }
    }
}

/// With the dot product instructions: 32-bit sums of fours.
pub(crate) struct Dotprod;

impl Dot for Dotprod {
    type Products = [int32x4_t; 2];

    #[inline(always)]
    unsafe fn no_products() -> Self::Products {
        // SAFETY: as above.
        unsafe { [vdupq_n_s32(0); 2] }
    }

    #[inline(always)]
    unsafe fn step<const LANE: usize>(sums: Self::Products, codes: [uint8x16_t; 2], x: int8x16_t) -> Self::Products {
        // SAFETY: as above.
        unsafe { [sdot::<LANE>(sums[0], codes[0], x), sdot::<LANE>(sums[1], codes[1], x)] }
    }

    #[inline(always)]
    unsafe fn ints(sums: Self::Products) -> [int32x4_t; 2] {
        sums
    }
}

/// With matrix products too: two rows times two tokens, eight columns at once.
pub(crate) struct Matmul;

impl Dot for Matmul {
    type Products = [int32x4_t; 2];

    #[inline(always)]
    unsafe fn no_products() -> Self::Products {
        // SAFETY: as above.
        unsafe { Dotprod::no_products() }
    }

    #[inline(always)]
    unsafe fn step<const LANE: usize>(sums: Self::Products, codes: [uint8x16_t; 2], x: int8x16_t) -> Self::Products {
        // SAFETY: as above.
        unsafe { Dotprod::step::<LANE>(sums, codes, x) }
    }

    #[inline(always)]
    unsafe fn ints(sums: Self::Products) -> [int32x4_t; 2] {
        sums
    }

    const TOKENS: usize = 2;

    /// Of two quads of eight rows, registers of eight columns each: rows 0 and 1, 2 and 3; 4 and 5, 6 and 7.
    #[inline(always)]
    unsafe fn paired(mut quads: [[uint8x16_t; 2]; 8]) -> [[uint8x16_t; 2]; 8] {
        for pair in quads.as_chunks_mut::<2>().0 {
            let quads = *pair;
            // SAFETY: as above.
            *pair = std::array::from_fn(|half| unsafe {
                let [a, b] = quads.map(|quad| vreinterpretq_u32_u8(quad[half]));
                [vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))]
            });
        }
        quads
    }

    #[inline(always)]
    unsafe fn pair(quads: &[[uint8x16_t; 2]; 8], x: *const i8, y: *const i8) -> [[int32x4_t; 2]; 2] {
        // SAFETY: as above; 32 activations are at `x` and at `y`.
        unsafe {
            // Of rows 2 i and 2 i + 1: the first with x and y, the second with x and y.
            let mut sums = [vdupq_n_s32(0); 4];
            for (p, [first, last]) in quads.as_chunks::<2>().0.iter().enumerate() {
                let both = vcombine_s8(vld1_s8(x.add(8 * p)), vld1_s8(y.add(8 * p)));
                for (sum, codes) in sums.iter_mut().zip([first[0], first[1], last[0], last[1]]) {
                    *sum = smmla(*sum, codes, both);
                }
            }
            [
                [vuzp1q_s32(sums[0], sums[1]), vuzp1q_s32(sums[2], sums[3])],
                [vuzp2q_s32(sums[0], sums[1]), vuzp2q_s32(sums[2], sums[3])],
            ]
        }
    }
}

/// Adds the 2 × 2 products of the rows of `codes` and of `x`, eight bytes each. In assembly, because the intrinsic is
/// not stable.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut sums: int32x4_t, codes: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes nothing but these registers.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Adds to every lane the products of its four bytes with the four bytes of lane `LANE` of `x`. In assembly, because
/// the intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const LANE: usize>(mut sums: int32x4_t, codes: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes nothing but these registers.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

#[rustfmt::skip]
macro_rules! shifted {
    ($v:expr, $n:ident) => {
        match $n {
            -2 => vshlq_n_u8::<2>($v), -1 => vshlq_n_u8::<1>($v), 1 => vshrq_n_u8::<1>($v), 2 => vshrq_n_u8::<2>($v),
            3 => vshrq_n_u8::<3>($v), 4 => vshrq_n_u8::<4>($v), 5 => vshrq_n_u8::<5>($v), 6 => vshrq_n_u8::<6>($v),
            7 => vshrq_n_u8::<7>($v), _ => $v,
        }
    };
}

// SAFETY (of every block below): whoever calls a method of `Simd` has the instruction set, and promises what the method
// says of its pointers.
impl<D: Dot> Simd for Neon<D> {
    const ROWS: usize = 8;
    const WIDE: bool = false;
    const PAIRS: bool = false;
    const TOKENS: usize = D::TOKENS;

    type Codes = [uint8x16_t; 2];
    type Acts = [int8x16_t; 2];
    type Products = D::Products;
    type Ints = [int32x4_t; 2];
    type Floats = [float32x4_t; 2];

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Codes {
        // SAFETY: see the top of the implementation.
        unsafe { [vld1q_u8(from), vld1q_u8(from.add(16))] }
    }

    #[inline(always)]
    unsafe fn store(to: *mut u8, codes: Self::Codes) {
        // SAFETY: see the top of the implementation.
        unsafe {
            vst1q_u8(to, codes[0]);
            vst1q_u8(to.add(16), codes[1]);
        }
    }

    #[inline(always)]
    unsafe fn shift<const RIGHT: i32>(codes: Self::Codes) -> Self::Codes {
        // SAFETY: see the top of the implementation.
        unsafe { [shifted!(codes[0], RIGHT), shifted!(codes[1], RIGHT)] }
    }

    #[inline(always)]
    unsafe fn and(codes: Self::Codes, mask: u8) -> Self::Codes {
        // SAFETY: see the top of the implementation.
        unsafe { [vandq_u8(codes[0], vdupq_n_u8(mask)), vandq_u8(codes[1], vdupq_n_u8(mask))] }
    }

    #[inline(always)]
    unsafe fn or(a: Self::Codes, b: Self::Codes) -> Self::Codes {
        // SAFETY: see the top of the implementation.
        unsafe { [vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        crate::memory::prefetch(at);
    }

    #[inline(always)]
    unsafe fn acts(from: *const i8) -> Self::Acts {
        // SAFETY: see the top of the implementation.
        unsafe { [vld1q_s8(from), vld1q_s8(from.add(16))] }
    }

    #[inline(always)]
    unsafe fn no_products() -> Self::Products {
        // SAFETY: see the top of the implementation.
        unsafe { D::no_products() }
    }

    #[inline(always)]
    unsafe fn step<const P: usize>(sums: Self::Products, codes: Self::Codes, acts: Self::Acts) -> Self::Products {
        // SAFETY: see the top of the implementation.
        unsafe {
            match P % 4 {
                0 => D::step::<0>(sums, codes, acts[P / 4]),
                1 => D::step::<1>(sums, codes, acts[P / 4]),
                2 => D::step::<2>(sums, codes, acts[P / 4]),
                _ => D::step::<3>(sums, codes, acts[P / 4]),
            }
        }
    }

    #[inline(always)]
    unsafe fn ints(sums: Self::Products) -> Self::Ints {
        // SAFETY: see the top of the implementation.
        unsafe { D::ints(sums) }
    }

    #[inline(always)]
    unsafe fn paired(quads: [Self::Codes; 8]) -> [Self::Codes; 8] {
        // SAFETY: see the top of the implementation.
        unsafe { D::paired(quads) }
    }

    #[inline(always)]
    unsafe fn pair(quads: &[Self::Codes; 8], x: *const i8, y: *const i8) -> [Self::Ints; 2] {
        // SAFETY: see the top of the implementation.
        unsafe { D::pair(quads, x, y) }
    }

    #[inline(always)]
    unsafe fn with_high(low: Self::Ints, high: Self::Ints) -> Self::Ints {
        // SAFETY: see the top of the implementation.
        unsafe { [vaddq_s32(low[0], vshlq_n_s32::<4>(high[0])), vaddq_s32(low[1], vshlq_n_s32::<4>(high[1]))] }
    }

    #[inline(always)]
    unsafe fn float(ints: Self::Ints) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe { [vcvtq_f32_s32(ints[0]), vcvtq_f32_s32(ints[1])] }
    }

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe { [vdupq_n_f32(v); 2] }
    }

    #[inline(always)]
    unsafe fn load_floats(from: *const f32) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
    }

    #[inline(always)]
    unsafe fn store_floats(to: *mut f32, v: Self::Floats) {
        // SAFETY: see the top of the implementation.
        unsafe {
            vst1q_f32(to, v[0]);
            vst1q_f32(to.add(4), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_halves(from: *const u8) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe {
            let halves = vld1q_u16(from.cast());
            let [low, high] = [vget_low_u16(halves), vget_high_u16(halves)];
            [vcvt_f32_f16(vreinterpret_f16_u16(low)), vcvt_f32_f16(vreinterpret_f16_u16(high))]
        }
    }

    #[inline(always)]
    unsafe fn load_zeros(from: *const u8) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe {
            let halves = vmovl_u8(vld1_u8(from));
            let [low, high] = [vmovl_u16(vget_low_u16(halves)), vmovl_high_u16(halves)];
            [vcvtq_f32_u32(low), vcvtq_f32_u32(high)]
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe { [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn neg_mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe { [vfmsq_f32(c[0], a[0], b[0]), vfmsq_f32(c[1], a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn offset(zeros: Self::Floats) -> Self::Floats {
        zeros
    }

    #[inline(always)]
    unsafe fn centered<const I: usize>(codes: Self::Codes, offset: Self::Floats) -> Self::Floats {
        // SAFETY: see the top of the implementation.
        unsafe {
            let [a, b] = [vreinterpretq_u32_u8(codes[0]), vreinterpretq_u32_u8(codes[1])];
            let [a, b] = match I {
                0 => [a, b],
                1 => [vshrq_n_u32::<8>(a), vshrq_n_u32::<8>(b)],
                2 => [vshrq_n_u32::<16>(a), vshrq_n_u32::<16>(b)],
                _ => [vshrq_n_u32::<24>(a), vshrq_n_u32::<24>(b)],
            };
            let byte = vdupq_n_u32(255);
            let [a, b] = [vcvtq_f32_u32(vandq_u32(a, byte)), vcvtq_f32_u32(vandq_u32(b, byte))];
            [vsubq_f32(a, offset[0]), vsubq_f32(b, offset[1])]
        }
    }
}

/// # Safety
/// The machine has NEON; see [`kernel::matmul_i8`].
#[target_feature(enable = "neon")]
pub(crate) unsafe fn matmul_i8(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_i8::<Neon<Base>>(weights, acts, out) }
}

/// # Safety
/// The machine has NEON with the dot product instructions; see [`kernel::matmul_i8`].
#[target_feature(enable = "neon,dotprod")]
pub(crate) unsafe fn matmul_i8_dotprod(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_i8::<Neon<Dotprod>>(weights, acts, out) }
}

/// # Safety
/// The machine has NEON with the dot and matrix product instructions; see [`kernel::matmul_i8`].
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(crate) unsafe fn matmul_i8_i8mm(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_i8::<Neon<Matmul>>(weights, acts, out) }
}

/// # Safety
/// The machine has NEON; see [`kernel::matmul_f32`].
#[target_feature(enable = "neon")]
pub(crate) unsafe fn matmul_f32(weights: Weights<'_>, acts: &FloatActs, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe { kernel::matmul_f32::<Neon<Base>, 1, 1, 6>(weights, acts, out) }
}

/// # Safety
/// The machine has NEON; see [`kernel::times_panels`].
#[target_feature(enable = "neon")]
pub(crate) unsafe fn times_panels(rows: usize, a: Lines<'_>, b: &Stacked<'_>, factor: f32, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::times_panels::<Neon<Base>>(rows, a, b, factor, out) }
}

/// # Safety
/// The machine has NEON; see [`kernel::widen`].
#[target_feature(enable = "neon")]
pub(crate) unsafe fn widen(from: &[f16], to: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::widen::<Neon<Base>>(from, to) }
}

/// # Safety
/// The machine has NEON; see [`kernel::dequantize`].
#[target_feature(enable = "neon")]
pub(crate) unsafe fn dequantize(weights: Weights<'_>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { kernel::dequantize::<Neon<Base>>(weights, out) }
}

//! The kernels, written once for every instruction set.
//!
//! An instruction set is a [`Simd`]: registers that hold four columns of some rows of a panel. A row keeps to its lane
//! from the load of the packed codes to the store of the result, so nothing is ever summed across lanes, and the order
//! of a row's additions is that of the scalar specification whatever the width of the registers.

mod dequantize;
mod float;
pub(crate) mod int8;
mod panels;
pub(crate) mod unpack;

use std::ops::Range;

pub(crate) use dequantize::dequantize;
pub(crate) use float::matmul_f32;
pub(crate) use int8::matmul_i8;
pub(crate) use panels::{times_panels, widen};

use crate::kernels::act::TILE;
use awqc_ir::panels::{PANEL_ROWS, Panels};

/// A packed weight and the panels to work on.
#[derive(Clone)]
pub(crate) struct Weights<'a> {
    pub(crate) shape: &'a Panels,
    /// All panels, `shape.total_bytes()` long.
    pub(crate) bytes: &'a [u8],
    /// At most `shape.panels()`.
    pub(crate) panels: Range<usize>,
}

/// Numbers of one tile of tokens and the 16 rows of `U` panels.
#[repr(align(64))]
struct Sums<const U: usize>([[[f32; PANEL_ROWS]; U]; TILE]);

impl<const U: usize> Sums<U> {
    const ZERO: Self = Self([[[0.0; PANEL_ROWS]; U]; TILE]);
}

/// The operations of one instruction set. A register of codes holds [`ROWS`](Self::ROWS) rows of four columns, a
/// register of numbers one number for each of these rows.
///
/// # Safety
/// Calling any of them needs a machine that has the instruction set. Pointers must be readable (or writable) for as
/// many bytes as a function says; they need no alignment.
pub(crate) trait Simd {
    /// Rows of a register, a divisor of 16.
    const ROWS: usize;
    /// Whether [`step`](Self::step) takes codes above 15. If not, 8-bit codes go through it as two nibbles.
    const WIDE: bool;
    /// Whether there are registers for the quads of two panels at once.
    const PAIRS: bool;

    /// Tokens whose products are taken together where there are many: 1, or 2 by [`pair`](Self::pair).
    const TOKENS: usize = 1;

    /// Codes: byte `4 r + i` belongs to row `r` and column `i`.
    type Codes: Copy;
    /// Rounded activations of a block.
    type Acts: Copy;
    /// Sums of products on their way to one integer a row.
    type Products: Copy;
    /// An i32 a row.
    type Ints: Copy;
    /// An f32 a row.
    type Floats: Copy;

    /// Reads `4 ROWS` bytes.
    unsafe fn load(from: *const u8) -> Self::Codes;
    /// Writes `4 ROWS` bytes.
    unsafe fn store(to: *mut u8, codes: Self::Codes);
    /// Every byte shifted right by `RIGHT` bits, to the left if negative, in -2..=7. The bits that come in may be those
    /// of a neighbour byte.
    unsafe fn shift<const RIGHT: i32>(codes: Self::Codes) -> Self::Codes;
    /// Every byte and `mask`.
    unsafe fn and(codes: Self::Codes, mask: u8) -> Self::Codes;
    unsafe fn or(a: Self::Codes, b: Self::Codes) -> Self::Codes;
    /// Asks for the cache line of an address, which need not be valid.
    unsafe fn prefetch(at: *const u8);

    /// The 32 activations at `from`.
    unsafe fn acts(from: *const i8) -> Self::Acts;
    unsafe fn no_products() -> Self::Products;
    /// Adds the products of quad `P` with activations `4 P..4 P + 4`; eight times at most.
    unsafe fn step<const P: usize>(sums: Self::Products, codes: Self::Codes, acts: Self::Acts) -> Self::Products;
    unsafe fn ints(sums: Self::Products) -> Self::Ints;
    /// The products of a block's quads with a block of activations.
    #[inline(always)]
    unsafe fn block(quads: &[Self::Codes; 8], x: Self::Acts) -> Self::Ints {
        // SAFETY: whoever calls a method has the instruction set.
        unsafe {
            let s = Self::step::<0>(Self::no_products(), quads[0], x);
            let s = Self::step::<1>(s, quads[1], x);
            let s = Self::step::<2>(s, quads[2], x);
            let s = Self::step::<3>(s, quads[3], x);
            let s = Self::step::<4>(s, quads[4], x);
            let s = Self::step::<5>(s, quads[5], x);
            let s = Self::step::<6>(s, quads[6], x);
            Self::ints(Self::step::<7>(s, quads[7], x))
        }
    }
    /// A block's quads as [`pair`](Self::pair) takes them.
    #[inline(always)]
    unsafe fn paired(quads: [Self::Codes; 8]) -> [Self::Codes; 8] {
        quads
    }
    /// The products of a block with the 32 activations at `x` and those at `y`.
    #[inline(always)]
    unsafe fn pair(quads: &[Self::Codes; 8], x: *const i8, y: *const i8) -> [Self::Ints; 2] {
        // SAFETY: the caller's promise.
        unsafe { [Self::block(quads, Self::acts(x)), Self::block(quads, Self::acts(y))] }
    }
    /// `low + 16 high`.
    unsafe fn with_high(low: Self::Ints, high: Self::Ints) -> Self::Ints;
    /// Integers below 2²⁴, exactly.
    unsafe fn float(ints: Self::Ints) -> Self::Floats;

    unsafe fn splat(v: f32) -> Self::Floats;
    /// Reads `ROWS` numbers.
    unsafe fn load_floats(from: *const f32) -> Self::Floats;
    /// Writes `ROWS` numbers.
    unsafe fn store_floats(to: *mut f32, v: Self::Floats);
    /// Reads `ROWS` f16.
    unsafe fn load_halves(from: *const u8) -> Self::Floats;
    /// Reads `ROWS` bytes.
    unsafe fn load_zeros(from: *const u8) -> Self::Floats;
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a b + c`, rounded once.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// `c - a b`, rounded once.
    unsafe fn neg_mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;

    /// What [`centered`](Self::centered) wants to know of zero points.
    unsafe fn offset(zeros: Self::Floats) -> Self::Floats;
    /// The codes of column `I` of the four, less the zero points, exactly.
    unsafe fn centered<const I: usize>(codes: Self::Codes, offset: Self::Floats) -> Self::Floats;
}

/// The scales and zero points of rows `row..row + ROWS` of a panel in group `g`.
///
/// # Safety
/// As [`Simd`]; `panel` is the start of a panel of this shape, `row + ROWS <= 16`, `g` is one of its groups.
#[inline(always)]
pub(crate) unsafe fn grid<S: Simd>(shape: &Panels, panel: *const u8, g: usize, row: usize) -> (S::Floats, S::Floats) {
    // SAFETY: the header holds 16 scales and, unless symmetric, 16 zero points of each group at these places.
    unsafe {
        let scales = S::load_halves(panel.add(shape.scales_at(g) + 2 * row));
        let zeros = if shape.symmetric() {
            S::splat(f32::from(shape.middle()))
        } else {
            S::load_zeros(panel.add(shape.zeros_at(g) + row))
        };
        (scales, zeros)
    }
}

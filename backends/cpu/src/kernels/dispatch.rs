//! The public products: arguments are checked here, then the instruction set's kernel runs.

use std::ops::Range;

use crate::kernels::act::{Acts, Bf16Acts, FloatActs, Line};
use crate::kernels::attention::{Lines, Stacked};
use crate::kernels::isa::Isa;
use crate::kernels::kernel::Weights;
use crate::kernels::out::OutTile;
use crate::kernels::scalar;
use awqc_ir::panels::{PANEL_ROWS, Panels};
use half::f16;

/// Runs one of the kernels that an instruction set has.
macro_rules! run {
    ($isa:ident, $scalar:expr, $args:tt, $avx2:ident, $avx512:ident, $vnni:ident, $neon:ident, $dotprod:ident, $i8mm:ident) => {
        match $isa {
            // SAFETY: the machine has the instruction set, and the arguments fit each other: see `check`.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { crate::kernels::x86::$avx2 $args },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { crate::kernels::x86::$avx512 $args },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni | Isa::Amx => unsafe { crate::kernels::x86::$vnni $args },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { crate::kernels::arm::$neon $args },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => unsafe { crate::kernels::arm::$dotprod $args },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => unsafe { crate::kernels::arm::$i8mm $args },
            _ => $scalar,
        }
    };
}

/// Decodes panels: `(code − zero) · scale`, `[16 panels, cols]`; rows that the weight has not are 0. The same to the
/// last bit for every `isa`.
///
/// # Panics
/// When the machine lacks `isa`, or a size is not what the shape says.
pub fn dequantize(isa: Isa, shape: &Panels, weights: &[u8], panels: Range<usize>, out: &mut [f32]) {
    check(isa, shape, weights, &panels);
    assert_eq!(out.len(), panels.len() * PANEL_ROWS * shape.cols(), "decoded panels {panels:?} of {shape:?}");
    let w = Weights { shape, bytes: weights, panels: panels.clone() };
    run!(
        isa,
        scalar::dequantize(shape, weights, panels, out),
        (w, out),
        dequantize_avx2,
        dequantize_avx512,
        dequantize_avx512,
        dequantize,
        dequantize,
        dequantize
    );
}

/// The product of rounded activations with the rows of some panels, for all tokens: `out = acts · weightsᵀ`. `out` has
/// the activations' tokens and the panels' rows. The same to the last bit for every `isa`, however panels are shared
/// out, and for a token alone or among others.
///
/// # Panics
/// When the machine lacks `isa`, or a size is not what the shape says.
pub fn matmul_i8(isa: Isa, shape: &Panels, weights: &[u8], panels: Range<usize>, acts: &Acts, out: OutTile<'_>) {
    check(isa, shape, weights, &panels);
    assert!(acts.serves(shape), "activations for other columns or groups than those of {shape:?}");
    check_out(shape, &panels, acts.tokens(), &out);
    let w = Weights { shape, bytes: weights, panels: panels.clone() };
    run!(
        isa,
        scalar::matmul_i8(shape, weights, panels, acts, out),
        (w, acts, out),
        matmul_i8_avx2,
        matmul_i8_avx512,
        matmul_i8_avx512vnni,
        matmul_i8,
        matmul_i8_dotprod,
        matmul_i8_i8mm
    );
}

/// As [`matmul_i8`], with activations and weights rounded to bf16, for the tokens of all `acts` together: on machines
/// with AMX the fastest for many tokens. Sums are made in f32, in the order of the machine. `room` is memory for
/// weights.
///
/// # Panics
/// When the machine has no AMX, or a size is not what the shape says.
pub fn matmul_bf16(
    shape: &Panels,
    weights: &[u8],
    panels: Range<usize>,
    acts: &[&Bf16Acts],
    room: &mut Vec<Line>,
    out: OutTile<'_>,
) {
    check(Isa::Amx, shape, weights, &panels);
    assert!(acts.iter().all(|a| a.serves(shape)), "activations for other columns or groups than those of {shape:?}");
    check_out(shape, &panels, acts.iter().map(|a| a.tokens()).sum(), &out);
    let w = Weights { shape, bytes: weights, panels };
    // SAFETY: the machine has the instruction set, and the arguments fit each other.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        crate::kernels::x86::matmul_bf16(w, acts, room, out);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (w, room, out);
}

/// As [`matmul_i8`], with activations in f32: the exact mode.
///
/// # Panics
/// When the machine lacks `isa`, or a size is not what the shape says.
pub fn matmul_f32(isa: Isa, shape: &Panels, weights: &[u8], panels: Range<usize>, acts: &FloatActs, out: OutTile<'_>) {
    check(isa, shape, weights, &panels);
    assert!(acts.serves(shape), "activations for other columns or groups than those of {shape:?}");
    check_out(shape, &panels, acts.tokens(), &out);
    let w = Weights { shape, bytes: weights, panels: panels.clone() };
    run!(
        isa,
        scalar::matmul_f32(shape, weights, panels, acts, out),
        (w, acts, out),
        matmul_f32_avx2,
        matmul_f32_avx512,
        matmul_f32_avx512,
        matmul_f32,
        matmul_f32,
        matmul_f32
    );
}

/// The product of `rows` rows with panels of numbers: `out[r][16 p + i] = factor · Σ_k a[r][k] · b[p][k][i]`, whose
/// lines are `16 panels` numbers long. The same to the last bit for every `isa`, and for a row alone or among others.
///
/// # Panics
/// When the machine lacks `isa`, or an operand is too short.
pub fn times_panels(isa: Isa, rows: usize, a: Lines<'_>, b: &Stacked<'_>, factor: f32, out: &mut [f32]) {
    isa.expect_available();
    assert!(b.fits(rows, &a, out), "{rows} rows of {} numbers and {} panels", b.depth, b.panels);
    run!(
        isa,
        scalar::times_panels(rows, a, b, factor, out),
        (rows, a, b, factor, out),
        times_panels_avx2,
        times_panels_avx512,
        times_panels_avx512,
        times_panels,
        times_panels,
        times_panels
    );
}

/// The numbers in f32.
///
/// # Panics
/// When the machine lacks `isa`, the lengths differ, or 16 does not divide them.
pub fn widen(isa: Isa, from: &[f16], to: &mut [f32]) {
    isa.expect_available();
    assert!(from.len() == to.len() && from.len().is_multiple_of(PANEL_ROWS), "{} numbers to {}", from.len(), to.len());
    run!(
        isa,
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32()),
        (from, to),
        widen_avx2,
        widen_avx512,
        widen_avx512,
        widen,
        widen,
        widen
    );
}

fn check(isa: Isa, shape: &Panels, weights: &[u8], panels: &Range<usize>) {
    isa.expect_available();
    assert_eq!(weights.len(), shape.total_bytes(), "bytes of {shape:?}");
    assert!(panels.start <= panels.end && panels.end <= shape.panels(), "panels {panels:?} of {}", shape.panels());
}

fn check_out(shape: &Panels, panels: &Range<usize>, tokens: usize, out: &OutTile<'_>) {
    let rows = shape.panel_rows(panels.clone()).len();
    assert_eq!((out.tokens(), out.rows()), (tokens, rows), "tokens and rows of the output");
}

//! AMX: one instruction multiplies 16 tokens with 32 columns of 16 rows, numbers of bf16 with sums in f32.
//!
//! Weights become bf16 numbers, scale and zero point and all, a few panels at a time; then all tokens meet them, and
//! their sums stay in tile registers from the first column to the last. (Eight-bit products are no alternative: with a
//! scale for every 32 activations, each result leaves the tiles for each block, which takes longer than all products.)
//!
//! Rust has neither types nor intrinsics for tiles yet, so their instructions are assembly. Nothing else uses tile
//! registers: they are not named as clobbered, for which there is no stable way either.

use std::arch::asm;
#[allow(clippy::wildcard_imports, reason = "dozens of intrinsics")]
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::avx512::{Avx512, Vnni};
use crate::kernels::act::{Bf16Acts, Line};
use crate::kernels::kernel::int8::ask_ahead;
use crate::kernels::kernel::unpack::unpack;
use crate::kernels::kernel::{self, Simd, Weights};
use crate::kernels::out::OutTile;
use awqc_ir::panels::{BLOCK, PANEL_ROWS, Panels, QUAD};

/// Tokens of a tile register, and bytes of one of its lines.
const LINES: usize = Bf16Acts::LINES;
const LINE_BYTES: usize = size_of::<Line>();
/// Panels, and tile registers of tokens, whose products are made together.
const PANELS: usize = 2;
const TOKENS: usize = 2;
/// Lines of weights that are decoded at once, unless two panels have more: 768 KiB.
const ROOM: usize = (768 << 10) / size_of::<Line>();
/// Lines of a block of a panel: two columns of every row each.
const BLOCK_LINES: usize = BLOCK / 2;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// All eight registers whole. 0 to 3 take sums, 4 and 5 activations, 6 and 7 weights.
static WHOLE: Config = Config {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Tile registers in use.
struct Tiles;

impl Tiles {
    /// # Safety
    /// The machine has AMX, see [`has_amx`].
    #[inline(always)]
    unsafe fn begin() -> Self {
        // SAFETY: the caller's promise; this shape of tiles is one that there is.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const WHOLE, options(nostack, preserves_flags, readonly)) }
        Self
    }

    /// The sums of `blocks` blocks: of 16 tokens at each of `x` with a panel at each of `w`. A token's blocks are
    /// `apart` lines apart, a panel's follow each other.
    ///
    /// # Safety
    /// As many blocks of 16 lines can be read at all four places.
    #[inline(always)]
    unsafe fn multiply(
        &mut self,
        blocks: usize,
        x: [*const Line; TOKENS],
        apart: usize,
        w: [*const Line; PANELS],
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promise; the sums are four times sixteen lines of 64 bytes.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "test {blocks}, {blocks}",
                "jz 3f",
                "2:",
                "tileloadd tmm6, [{w} + {line} * 1]",
                "tileloadd tmm4, [{x} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{v} + {line} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{y} + {line} * 1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {x}, {apart}",
                "add {y}, {apart}",
                "add {w}, {block}",
                "add {v}, {block}",
                "dec {blocks}",
                "jnz 2b",
                "3:",
                "tilestored [{out} + {line} * 1], tmm0",
                "tilestored [{out} + {line} * 1 + 1024], tmm1",
                "tilestored [{out} + {line} * 1 + 2048], tmm2",
                "tilestored [{out} + {line} * 1 + 3072], tmm3",
                blocks = inout(reg) blocks => _,
                x = inout(reg) x[0] => _,
                y = inout(reg) x[1] => _,
                w = inout(reg) w[0] => _,
                v = inout(reg) w[1] => _,
                apart = in(reg) apart * LINE_BYTES,
                block = const BLOCK_LINES * LINE_BYTES,
                line = in(reg) LINE_BYTES,
                out = in(reg) sums.0.as_mut_ptr(),
                options(nostack)
            );
        }
    }
}

impl Drop for Tiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: `begin` found the instructions. Without tiles in use, the system has less to save of a thread.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

/// Sums of some tokens and panels.
#[repr(C, align(64))]
struct Sums([[[[f32; PANEL_ROWS]; LINES]; PANELS]; TOKENS]);

/// `out = acts · weightsᵀ` for the rows of the panels, with numbers rounded to bf16. `acts` are the tiles of all tokens;
/// `room` is memory for weights.
///
/// # Safety
/// The machine has AMX, see [`has_amx`]; `acts` serve the weight's shape, `out` has their tokens and the
/// panels' rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(crate) unsafe fn matmul_bf16(weights: Weights<'_>, acts: &[&Bf16Acts], room: &mut Vec<Line>, mut out: OutTile<'_>) {
    let Weights { shape, bytes, panels } = weights;
    let skipped = shape.panel_rows(panels.clone()).start;
    let panel_lines = shape.blocks() * BLOCK_LINES;
    // All tokens pass by as many panels as the second-level cache holds beside them.
    let most = (ROOM / panel_lines.max(1)).max(PANELS).next_multiple_of(PANELS);
    room.resize(most.min(panels.len().next_multiple_of(PANELS)) * panel_lines, Line::default());
    let mut sums = Sums([[[[0.0; PANEL_ROWS]; LINES]; PANELS]; TOKENS]);
    // SAFETY: the caller's promise. Blocks are those of the shape; activations have whole tiles of lines.
    unsafe {
        let mut tiles = Tiles::begin();
        for p in panels.clone().step_by(most) {
            let here = p..(p + most).min(panels.end);
            for (p, to) in here.clone().zip(room.chunks_exact_mut(panel_lines.max(1))) {
                let panel = &bytes[p * shape.panel_bytes()..(p + 1) * shape.panel_bytes()];
                match shape.bits() {
                    2 => decode::<2>(shape, panel, to),
                    3 => decode::<3>(shape, panel, to),
                    4 => decode::<4>(shape, panel, to),
                    _ => decode::<8>(shape, panel, to),
                }
            }
            let mut first = 0;
            for acts in acts {
                let lines = acts.lines();
                for line in (0..lines).step_by(LINES * TOKENS) {
                    let count = (acts.tokens() - line).min(LINES * TOKENS);
                    // Tokens that fill one register only are multiplied twice, and so is one panel alone.
                    let more = if line + LINES < lines { LINES } else { 0 };
                    let x = acts.values().as_ptr().add(line);
                    for p in here.clone().step_by(PANELS) {
                        let own = p..(p + PANELS).min(here.end);
                        let w = room.as_ptr().add((p - here.start) * panel_lines);
                        let next = (own.len() - 1) * panel_lines;
                        tiles.multiply(shape.blocks(), [x, x.add(more)], lines, [w, w.add(next)], &mut sums);
                        let rows = shape.panel_rows(own);
                        for t in 0..count {
                            let to = out.line(first + line + t, rows.start - skipped, rows.len());
                            for (u, to) in to.chunks_mut(PANEL_ROWS).enumerate() {
                                to.copy_from_slice(&sums.0[t / LINES][u][t % LINES][..to.len()]);
                            }
                        }
                    }
                }
                first += acts.tokens();
            }
        }
    }
}

/// A panel in bf16, as tiles take it: for each block 16 lines, each with two columns of every row.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ, VL and BF16; the panel is as long as its shape says.
#[inline(always)]
unsafe fn decode<const BITS: u32>(shape: &Panels, panel: &[u8], to: &mut [Line]) {
    type S = Avx512<Vnni>;
    for g in 0..shape.groups() {
        let blocks: Range<usize> = shape.group_blocks(g);
        // SAFETY: blocks and groups are those of the shape.
        unsafe {
            let (scales, zeros) = kernel::grid::<S>(shape, panel.as_ptr(), g, 0);
            let offset = S::offset(zeros);
            for b in blocks {
                let block = panel.as_ptr().add(shape.block_at(b));
                ask_ahead::<S>(block, BITS as usize * QUAD);
                let to = to[b * BLOCK_LINES..(b + 1) * BLOCK_LINES].as_chunks_mut::<2>().0;
                for (codes, [low, high]) in unpack::<S, BITS>(block, &[]).into_iter().zip(to) {
                    let first = pair(
                        _mm512_mul_ps(S::centered::<0>(codes, offset), scales),
                        _mm512_mul_ps(S::centered::<1>(codes, offset), scales),
                    );
                    let second = pair(
                        _mm512_mul_ps(S::centered::<2>(codes, offset), scales),
                        _mm512_mul_ps(S::centered::<3>(codes, offset), scales),
                    );
                    _mm512_store_si512(low.0.as_mut_ptr().cast(), first);
                    _mm512_store_si512(high.0.as_mut_ptr().cast(), second);
                }
            }
        }
    }
}

/// Two numbers of each row as bf16, the first in the low half: rounded to nearest, halves to even.
///
/// # Safety
/// The machine has AVX-512 F, BW and BF16.
#[inline(always)]
unsafe fn pair(first: __m512, second: __m512) -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut row = 0;
        while row < PANEL_ROWS {
            (order[2 * row], order[2 * row + 1]) = (row as u16, (PANEL_ROWS + row) as u16);
            row += 1;
        }
        order
    };
    // SAFETY: the caller's promise. The conversion has sixteen numbers for the registers' sixteen rows each.
    unsafe {
        let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
        _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), both)
    }
}

/// Whether there are tile registers, with products of bf16, and the system lets this process use them.
pub(crate) fn has_amx() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        super::has_avx512vnni() && is_x86_feature_detected!("avx512bf16") && processor_has_tiles() && system_lets_us()
    })
}

/// Whether the processor has tiles and their products of bf16, and the system keeps their contents.
fn processor_has_tiles() -> bool {
    const PRODUCTS: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    const XSAVE_IN_USE: u32 = 1 << 27;
    const STATE: u64 = 3 << 17; // of tiles and of their shapes

    #[target_feature(enable = "xsave")]
    fn kept() -> u64 {
        // SAFETY: the processor has the instruction.
        unsafe { _xgetbv(0) }
    }

    if __cpuid(0).eax < 7 || __cpuid(1).ecx & XSAVE_IN_USE == 0 {
        return false;
    }
    // SAFETY: the system has enabled `xsave`, and with it `xgetbv`.
    let kept = unsafe { kept() };
    __cpuid_count(7, 0).edx & (TILES | PRODUCTS) == (TILES | PRODUCTS) && kept & STATE == STATE
}

/// Asks Linux for tile registers, which a process has to do once, before its threads use them: they make what is saved
/// of a thread eight kilobytes larger.
#[cfg(target_os = "linux")]
fn system_lets_us() -> bool {
    const REQUEST: libc::c_ulong = 0x1023; // ARCH_REQ_XCOMP_PERM
    const TILES: libc::c_ulong = 18; // XFEATURE_XTILEDATA
    // SAFETY: the call reads no memory of this process; a kernel that does not know it says so.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILES) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn system_lets_us() -> bool {
    false
}

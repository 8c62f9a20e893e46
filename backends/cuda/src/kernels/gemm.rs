//! `y = x Wᵀ + b` for packed `W` and many tokens: reading a prompt.
//!
//! Blocks take 16 rows for each of their warps and 64 tokens. The activations of 64 columns lie in shared memory, twice:
//! while one copy is multiplied, the next is on its way. Each warp unpacks its own rows into registers, in the form that
//! the tensor cores take, and multiplies them with eight blocks of eight tokens before it goes on: codes never lie in
//! memory as floats. Sums of a group are in f32, scales are applied in f32.

use awqc_ir::tiles::Tiles;
use cubecl::prelude::*;

use super::Call;
use super::gemv::grid_of;
use super::tile::{Operands, ROWS, Spec, Sums, WARP, flush, left, load_codes, product, put, right, zero};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Tokens of a block.
pub const TOKENS: u32 = 64;
/// Warps of a block, each with 16 rows.
pub const WARPS: u32 = 8;

/// 8-byte loads of activations that a thread makes for one tile.
const LOADS: u32 = TOKENS * 16 / (WARPS * WARP);
/// Distance of two tokens in shared memory, in units of 8 bytes: 16, and 4 more so that the lanes of half a warp meet
/// different banks.
const PITCH: u32 = 20;

/// The kernel for weights of this shape. The grid is `[panels / 8, tokens / 64]`, rounded up.
///
/// Arguments: as those of [`super::gemv::source`].
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, shape: &Tiles, bias: bool) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    emit(arch, &format!("gemm_{}", spec.label()), WARPS * WARP, |args| {
        if spec.load == 2 { body::<Const<2>>(args, spec, bias) } else { body::<Const<4>>(args, spec, bias) }
    })
}

fn body<N: Size>(args: &mut Args, spec: Spec, has_bias: bool) {
    let o = Operands::<N>::of(args, has_bias);
    gemm::expand::<N>(args.scope(), o.words, o.codes, o.x, o.bias, o.y, o.call, spec, has_bias);
}

#[cube]
fn gemm<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    x: &Array<Vector<u32, Const<2>>>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    call: &Array<u32>,
    #[comptime] spec: Spec,
    #[comptime] has_bias: bool,
) {
    let lane = UNIT_POS_X % WARP;
    let warp = UNIT_POS_X / WARP;
    let first = CUBE_POS_Y * TOKENS;
    let tokens = call[comptime!(Call::Tokens as usize)];
    let own = CUBE_POS_X * WARPS + warp;
    // Warps without rows of their own help to load activations; what they compute is thrown away.
    let panel = clamp_max(own, comptime!(spec.panels - 1));
    let row = lane / 4;
    let quarter = lane % 4;

    let mut total = Sequence::<Array<Sums>>::new();
    #[unroll]
    for _ in 0..comptime!(TOKENS / 8) {
        total.push(zero());
    }
    let mut shared = SharedMemory::<Vector<u32, Const<2>>>::new(comptime!((2 * TOKENS * PITCH) as usize));
    let mut next = Array::<Vector<u32, Const<2>>>::new(comptime!(LOADS as usize));
    load_x(x, &mut next, 0u32, first, tokens, spec);
    store_x(&mut shared, &next, 0u32);
    sync_cube();
    for t in 0..comptime!(spec.tiles) {
        let mine = load_codes::<N>(words, codes, panel, t, lane, spec);
        let more = t + 1 < comptime!(spec.tiles);
        if more {
            load_x(x, &mut next, t + 1, first, tokens, spec);
        }
        let half = (t % 2) * comptime!(TOKENS * PITCH);
        #[unroll]
        for part in 0..comptime!(4 / spec.run) {
            let grid = grid_of(words, panel, t, part, row, spec);
            let mut sums = Sequence::<Array<Sums>>::new();
            #[unroll]
            for _ in 0..comptime!(TOKENS / 8) {
                sums.push(zero());
            }
            #[unroll]
            for i in 0..comptime!(spec.run) {
                let s = comptime!(part * spec.run + i);
                let a = left(&mine, &grid, s, comptime!(spec.bits));
                #[unroll]
                for n in 0..comptime!(TOKENS / 8) {
                    let at = half + (comptime!(n * 8) + row) * PITCH + comptime!(s * 4) + quarter;
                    let b = right(shared[at as usize]);
                    product(&a, &b, sums.index_mut(comptime!(n as usize)));
                }
            }
            #[unroll]
            for n in 0..comptime!(TOKENS / 8) {
                flush(total.index_mut(comptime!(n as usize)), &sums[comptime!(n as usize)], &grid);
            }
        }
        if more {
            store_x(&mut shared, &next, ((t + 1) % 2) * comptime!(TOKENS * PITCH));
        }
        sync_cube();
    }

    if own < comptime!(spec.panels) {
        #[unroll]
        for n in 0..comptime!(TOKENS / 8) {
            #[unroll]
            for half in 0..2u32 {
                let channel = own * ROWS + row + comptime!(half * 8);
                let sums = total[comptime!(n as usize)][comptime!(half as usize)];
                #[unroll]
                for i in 0..2u32 {
                    let token = first + comptime!(n * 8 + i) + quarter * 2;
                    put(y, bias, token, tokens, channel, sums[comptime!(i as usize)], has_bias, spec);
                }
            }
        }
    }
}

/// This thread's part of the activations of tile `t`: 0 beyond the last token and the last column.
#[cube]
fn load_x(
    x: &Array<Vector<u32, Const<2>>>,
    out: &mut Array<Vector<u32, Const<2>>>,
    t: u32,
    first: u32,
    tokens: u32,
    #[comptime] spec: Spec,
) {
    #[unroll]
    for i in 0..LOADS {
        let at = UNIT_POS_X + comptime!(i * WARPS * WARP);
        let token = first + at / 16;
        let quad = t * 16 + at % 16;
        let mut xs = Vector::<u32, Const<2>>::new(0u32);
        if token < tokens && quad < comptime!(spec.cols / 4) {
            xs = x[(token * comptime!(spec.cols / 4) + quad) as usize];
        }
        out[comptime!(i as usize)] = xs;
    }
}

#[cube]
fn store_x(shared: &mut SharedMemory<Vector<u32, Const<2>>>, part: &Array<Vector<u32, Const<2>>>, half: u32) {
    #[unroll]
    for i in 0..LOADS {
        let at = UNIT_POS_X + comptime!(i * WARPS * WARP);
        shared[(half + at / 16 * PITCH + at % 16) as usize] = part[comptime!(i as usize)];
    }
}

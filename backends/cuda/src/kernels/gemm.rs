//! `y = x Wᵀ + b` for packed `W` and many tokens: reading a prompt.
//!
//! Blocks take 16 rows for each of their warps and 64 tokens. The activations of 64 columns lie in shared memory,
//! twice: while one copy is multiplied, the next is on its way. Each warp unpacks its own rows into registers, in the
//! form that the tensor cores take, and multiplies them with eight blocks of eight tokens before it goes on: codes
//! never lie in memory as floats. Sums of a group are in f32, scales are applied in f32.

use awqc_ir::tiles::Tiles;
use cubecl::prelude::*;

use super::Call;
use super::gemv::grid_of;
use super::routed::{Routed, Run, limit_of, row_at, run_of, source_at};
use super::tile::{Operands, ROWS, Spec, Sums, WARP, flush, left, load_codes, panel_of, product, put, right, zero};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Tokens of a block.
pub const TOKENS: u32 = 64;
/// Warps of a block, each with 16 rows.
pub const WARPS: u32 = 8;

/// The fewest tokens of a block: every thread loads activations.
const LEAST: u32 = WARPS * WARP / 16;
/// Distance of two tokens in shared memory, in units of 8 bytes: 16, and 4 more so that the lanes of half a warp meet
/// different banks.
const PITCH: u32 = 20;

/// How the work is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    /// Tokens of a block.
    tokens: u32,
    bias: bool,
}

impl Plan {
    /// 8-byte loads of activations that a thread makes for one tile.
    fn loads(&self) -> u32 {
        self.tokens / LEAST
    }
}

/// The kernel for weights of this shape. The grid is `[panels / 8, tokens / 64]`, rounded up.
///
/// Arguments: as those of [`super::gemv::source`].
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, shape: &Tiles, bias: bool) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    whole_source(arch, &format!("gemm_{}", spec.label()), spec, Plan { tokens: TOKENS, bias })
}

/// The same for the matrices of experts, one below the other, and runs of up to `tile` rows, see [`tile`]. The grid is
/// `[panels / 8, runs]`, with the panels of [`super::routed::Stack::span`] and at least as many blocks as there are runs.
///
/// Arguments: as those of [`super::gemv::routed_source`], with the result of [`super::route`] for `tile` in the place
/// of the records.
///
/// # Errors
/// When the code generator refuses it.
pub fn routed_source(arch: &Arch, shape: &Tiles, routed: Routed, tile: u32) -> Result<Source, CudaError> {
    let spec = Spec::stacked(shape, routed);
    whole_source(arch, &format!("gemm{tile}_{}", spec.label()), spec, Plan { tokens: tile, bias: false })
}

/// Rows of a block where an expert has about so many: twice as many, so that most experts need one block and their
/// weights are unpacked once; at most 64.
pub fn tile(rows: usize) -> u32 {
    (2 * rows as u32).next_power_of_two().clamp(LEAST, TOKENS)
}

fn whole_source(arch: &Arch, name: &str, spec: Spec, plan: Plan) -> Result<Source, CudaError> {
    emit(arch, name, WARPS * WARP, |args| {
        if spec.load == 2 { body::<Const<2>>(args, spec, plan) } else { body::<Const<4>>(args, spec, plan) }
    })
}

fn body<N: Size>(args: &mut Args, spec: Spec, plan: Plan) {
    let o = Operands::<N>::of(args, plan.bias, spec.routed.is_some());
    gemm::expand::<N>(args.scope(), o.words, o.codes, o.x, o.bias, o.y, o.call, o.route, spec, plan);
}

#[cube]
fn gemm<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    x: &Array<Vector<u32, Const<2>>>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    call: &Array<u32>,
    route: &Array<u32>,
    #[comptime] spec: Spec,
    #[comptime] plan: Plan,
) {
    let tokens = call[comptime!(Call::Tokens as usize)];
    if let Some(routed) = comptime!(spec.routed) {
        let run = run_of(route, tokens, routed);
        if run.works {
            multiply_run::<N>(words, codes, x, bias, y, route, run, spec, plan);
        }
    } else {
        let run = Run { expert: 0u32, first: CUBE_POS_Y * comptime!(plan.tokens), end: tokens, works: true };
        multiply_run::<N>(words, codes, x, bias, y, route, run, spec, plan);
    }
}

/// A block's panels with the rows of a run.
#[cube]
fn multiply_run<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    x: &Array<Vector<u32, Const<2>>>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    route: &Array<u32>,
    run: Run,
    #[comptime] spec: Spec,
    #[comptime] plan: Plan,
) {
    let lane = UNIT_POS_X % WARP;
    let warp = UNIT_POS_X / WARP;
    let own = panel_of(run.expert, CUBE_POS_X * WARPS + warp, spec);
    // Warps without rows of their own help to load activations; what they compute is thrown away.
    let panel = clamp_max(own, comptime!(spec.panels - 1));
    let row = lane / 4;
    let quarter = lane % 4;

    let mut total = Sequence::<Array<Sums>>::new();
    #[unroll]
    for _ in 0..comptime!(plan.tokens / 8) {
        total.push(zero());
    }
    let mut shared = SharedMemory::<Vector<u32, Const<2>>>::new(comptime!((2 * plan.tokens * PITCH) as usize));
    let mut next = Array::<Vector<u32, Const<2>>>::new(comptime!(plan.loads() as usize));
    // The rows that this thread loads.
    let mut rows = Sequence::<u32>::new();
    #[unroll]
    for i in 0..comptime!(plan.loads()) {
        rows.push(row_at(route, run, (UNIT_POS_X + comptime!(i * WARPS * WARP)) / 16, spec.routed));
    }
    load_x(x, &mut next, 0u32, &rows, run, spec, plan);
    store_x(&mut shared, &next, 0u32, plan);
    sync_cube();
    for t in 0..comptime!(spec.tiles) {
        let mine = load_codes::<N>(words, codes, panel, t, lane, spec);
        let more = t + 1 < comptime!(spec.tiles);
        if more {
            load_x(x, &mut next, t + 1, &rows, run, spec, plan);
        }
        let half = (t % 2) * comptime!(plan.tokens * PITCH);
        #[unroll]
        for part in 0..comptime!(4 / spec.run) {
            let grid = grid_of(words, panel, t, part, row, spec);
            let mut sums = Sequence::<Array<Sums>>::new();
            #[unroll]
            for _ in 0..comptime!(plan.tokens / 8) {
                sums.push(zero());
            }
            #[unroll]
            for i in 0..comptime!(spec.run) {
                let s = comptime!(part * spec.run + i);
                let a = left(&mine, &grid, s, comptime!(spec.bits));
                #[unroll]
                for n in 0..comptime!(plan.tokens / 8) {
                    let at = half + (comptime!(n * 8) + row) * PITCH + comptime!(s * 4) + quarter;
                    let b = right(shared[at as usize]);
                    product(&a, &b, sums.index_mut(comptime!(n as usize)));
                }
            }
            #[unroll]
            for n in 0..comptime!(plan.tokens / 8) {
                flush(total.index_mut(comptime!(n as usize)), &sums[comptime!(n as usize)], &grid);
            }
        }
        if more {
            store_x(&mut shared, &next, ((t + 1) % 2) * comptime!(plan.tokens * PITCH), plan);
        }
        sync_cube();
    }

    // Rows of the expert before wrap around, and do not exist either.
    let channel = own * ROWS + row - run.expert * comptime!(spec.rows);
    let limit = limit_of(run, spec.routed);
    #[unroll]
    for n in 0..comptime!(plan.tokens / 8) {
        #[unroll]
        for half in 0..2u32 {
            let sums = total[comptime!(n as usize)][comptime!(half as usize)];
            #[unroll]
            for i in 0..2u32 {
                let to = row_at(route, run, comptime!(n * 8 + i) + quarter * 2, spec.routed);
                let channel = channel + comptime!(half * 8);
                put(y, bias, to, limit, channel, sums[comptime!(i as usize)], comptime!(plan.bias), spec);
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
    rows: &Sequence<u32>,
    run: Run,
    #[comptime] spec: Spec,
    #[comptime] plan: Plan,
) {
    let limit = limit_of(run, spec.routed);
    #[unroll]
    for i in 0..comptime!(plan.loads()) {
        let at = UNIT_POS_X + comptime!(i * WARPS * WARP);
        let row = rows[comptime!(i as usize)];
        let quad = t * 16 + at % 16;
        let mut xs = Vector::<u32, Const<2>>::new(0u32);
        if row < limit && quad < comptime!(spec.cols / 4) {
            xs = x[(source_at(row, spec.routed) * comptime!(spec.cols / 4) + quad) as usize];
        }
        out[comptime!(i as usize)] = xs;
    }
}

#[cube]
fn store_x(
    shared: &mut SharedMemory<Vector<u32, Const<2>>>,
    part: &Array<Vector<u32, Const<2>>>,
    half: u32,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for i in 0..comptime!(plan.loads()) {
        let at = UNIT_POS_X + comptime!(i * WARPS * WARP);
        shared[(half + at / 16 * PITCH + at % 16) as usize] = part[comptime!(i as usize)];
    }
}

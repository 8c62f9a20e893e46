//! `y = x Wᵀ + b` for packed `W` and few tokens: decoding.
//!
//! Blocks take a panel of 16 rows and eight tokens; the warps of a block share the panel's tiles among them and add up
//! their sums at the end. A lane loads its codes of several tiles before it uses the first, so that many loads are
//! under way. Codes become f16 by bit operations alone, exactly, also after their zero points are taken off; products
//! of a group are summed in f32 by the tensor cores, and multiplied by the scale in f32.
//!
//! Where a weight has too few panels for a device ([`super::divide`]), several blocks share a panel, each with a part
//! of the tiles. All write their sums to memory and count themselves; the last one adds up the sums of all, in order.

use awqc_ir::tiles::Tiles;
use cubecl::prelude::*;

use super::Call;
use super::routed::{Routed, Run, limit_of, row_at, run_of, source_at};
use super::tile::{
    self, Grid, Operands, ROWS, Spec, Sums, WARP, flush, left, load_codes, load_grid, panel_of, product, put, right,
    zero,
};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit, fence};

/// Tokens of a block.
pub const TOKENS: u32 = 8;
// Blocks that share a panel have one counter, so they must be of the same tokens.
const _: () = assert!(crate::plan::FEW <= TOKENS as usize);

/// f32 numbers that a block leaves for the one that joins them.
const SUMS: u32 = ROWS * TOKENS;

/// How the work is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    warps: u32,
    /// Tiles whose codes a warp loads at once.
    ahead: u32,
    bias: bool,
    /// Blocks that share a panel.
    splits: u32,
    /// Tiles of each of them; the last one may have fewer.
    each: u32,
}

impl Plan {
    fn of(spec: &Spec, bias: bool, splits: u32) -> Self {
        let each = spec.tiles.div_ceil(splits.max(1));
        let warps = each.clamp(1, 8);
        // Wide codes, and the scales of several small groups, need registers too.
        let most = if spec.bits == 8 || spec.run <= 2 { 2 } else { 4 };
        let ahead = each.div_ceil(warps).clamp(1, most);
        Self { warps, ahead, bias, splits, each }
    }
}

/// The warps of a block when `splits` blocks share a panel, and the times that they load tiles.
pub(super) fn rounds(shape: &Tiles, splits: usize) -> (u32, u32) {
    let plan = Plan::of(&Spec::of(shape), false, splits as u32);
    (plan.warps, plan.each.div_ceil(plan.warps * plan.ahead))
}

/// The kernel for weights of this shape. The grid is `[panels, tokens / 8]`, rounded up.
///
/// Arguments: the weight; the weight again, as loads of codes; `x`, f16 `[tokens, cols]`; the bias, f32 `[rows]`, if
/// there is one; `y`, f32 `[tokens, rows]`; the call.
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, shape: &Tiles, bias: bool) -> Result<Source, CudaError> {
    whole_source(arch, Spec::of(shape), bias)
}

/// The same for the matrices of experts, one below the other, and up to eight tokens. The grid is `[panels, rows]`,
/// with the panels of [`super::routed::Stack::span`] and a row for each token and choice. There is no bias.
///
/// Arguments: as those of [`source`], with `x` f16 `[rows, cols]`, or `[tokens, cols]` if it is shared, and `y` f32
/// `[rows, rows of a matrix]`; and behind the call the records, see [`super::routed`].
///
/// # Errors
/// When the code generator refuses it.
pub fn routed_source(arch: &Arch, shape: &Tiles, routed: Routed) -> Result<Source, CudaError> {
    whole_source(arch, Spec::stacked(shape, routed), false)
}

fn whole_source(arch: &Arch, spec: Spec, bias: bool) -> Result<Source, CudaError> {
    let plan = Plan::of(&spec, bias, 1);
    emit(arch, &format!("gemv_{}", spec.label()), plan.warps * WARP, |args| {
        if spec.load == 2 { body::<Const<2>>(args, spec, plan) } else { body::<Const<4>>(args, spec, plan) }
    })
}

/// The same with `splits` blocks, more than one, that share a panel: of up to eight tokens, and at most 1024 panels.
/// The grid is `[panels, 1, splits]`.
///
/// Arguments: as those of [`source`], and behind them [`partials`] f32 numbers, and the call again, for its counters.
///
/// # Errors
/// When the code generator refuses it.
pub fn split_source(arch: &Arch, shape: &Tiles, bias: bool, splits: usize) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    let plan = Plan::of(&spec, bias, splits as u32);
    emit(arch, &format!("gemv_{}_split{splits}", spec.label()), plan.warps * WARP, |args| {
        if spec.load == 2 { split_body::<Const<2>>(args, spec, plan) } else { split_body::<Const<4>>(args, spec, plan) }
    })
}

/// f32 numbers that `splits` blocks of each panel leave for those that join them.
pub fn partials(shape: &Tiles, splits: usize) -> usize {
    if splits == 1 { 0 } else { shape.panels() * splits * SUMS as usize }
}

fn body<N: Size>(args: &mut Args, spec: Spec, plan: Plan) {
    let o = Operands::<N>::of(args, plan.bias, spec.routed.is_some());
    gemv::expand::<N>(args.scope(), o.words, o.codes, o.x, o.bias, o.y, o.call, o.route, spec, plan);
}

fn split_body<N: Size>(args: &mut Args, spec: Spec, plan: Plan) {
    let o = Operands::<N>::of(args, plan.bias, false);
    let partials = args.output::<f32>("partials");
    let counters = args.output::<Atomic<u32>>("counters");
    let scope = args.scope();
    split::expand::<N>(scope, o.words, o.codes, o.x, o.bias, o.y, o.call, partials, counters, spec, plan);
}

#[cube]
fn gemv<N: Size>(
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
        let run = Run { expert: 0u32, first: CUBE_POS_Y * TOKENS, end: tokens, works: true };
        multiply_run::<N>(words, codes, x, bias, y, route, run, spec, plan);
    }
}

/// A panel with up to eight rows of activations.
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
    let own = panel_of(run.expert, CUBE_POS_X, spec);
    let mut shared = SharedMemory::<f32>::new(comptime!((plan.warps * SUMS) as usize));
    let high = comptime!(spec.tiles).runtime();
    multiply_tiles::<N>(words, codes, x, &mut shared, route, run, own, 0u32, high, spec, plan);
    sync_cube();
    let limit = limit_of(run, spec.routed);
    let mut at = UNIT_POS_X;
    while at < SUMS {
        let sum = sum_of_warps(&shared, at, plan);
        // Rows of the expert before wrap around, and do not exist either.
        let channel = own * ROWS + at % ROWS - run.expert * comptime!(spec.rows);
        let to = row_at(route, run, at / ROWS, spec.routed);
        put(y, bias, to, limit, channel, sum, comptime!(plan.bias), spec);
        at += comptime!(plan.warps * WARP);
    }
}

#[cube]
fn split<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    x: &Array<Vector<u32, Const<2>>>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    call: &Array<u32>,
    partials: &mut Array<f32>,
    counters: &mut Array<Atomic<u32>>,
    #[comptime] spec: Spec,
    #[comptime] plan: Plan,
) {
    let panel = CUBE_POS_X;
    let tokens = call[comptime!(Call::Tokens as usize)];
    let low = CUBE_POS_Z * comptime!(plan.each);
    let high = min(low + comptime!(plan.each), comptime!(spec.tiles));
    let mut shared = SharedMemory::<f32>::new(comptime!((plan.warps * SUMS) as usize));
    let run = Run { expert: 0u32, first: 0u32, end: tokens, works: true };
    multiply_tiles::<N>(words, codes, x, &mut shared, call, run, panel, low, high, spec, plan);
    sync_cube();
    let own = panel * comptime!(plan.splits) + CUBE_POS_Z;
    let mut at = UNIT_POS_X;
    while at < SUMS {
        partials[(own * SUMS + at) as usize] = sum_of_warps(&shared, at, plan);
        at += comptime!(plan.warps * WARP);
    }
    // What this block wrote is seen by all before its number is.
    fence();
    sync_cube();
    let mut done = SharedMemory::<u32>::new(1usize);
    if UNIT_POS_X == 0 {
        let counter = &counters[(panel + comptime!(Call::Counters as u32)) as usize];
        let before = counter.fetch_add(1u32);
        if before == comptime!(plan.splits - 1) {
            counter.store(0u32);
        }
        done[0usize] = before;
    }
    sync_cube();
    if done[0usize] == comptime!(plan.splits - 1) {
        fence();
        let mut at = UNIT_POS_X;
        while at < SUMS {
            let token = at / ROWS;
            let channel = panel * ROWS + at % ROWS;
            // Not by `put`: for small groups `ptxas` then spills a register.
            if token < tokens && channel < comptime!(spec.rows) {
                let mut sum = 0.0f32;
                #[unroll]
                for part in 0..comptime!(plan.splits) {
                    sum += partials[((panel * comptime!(plan.splits) + part) * SUMS + at) as usize];
                }
                if comptime!(plan.bias) {
                    sum += bias[channel as usize];
                }
                y[(token * comptime!(spec.rows) + channel) as usize] = sum;
            }
            at += comptime!(plan.warps * WARP);
        }
    }
}

/// The sums of every warp over its share of the tiles from `low` to `high`, for eight rows of activations: `shared`
/// gets them as `[warps, tokens, rows]`.
#[cube]
fn multiply_tiles<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    x: &Array<Vector<u32, Const<2>>>,
    shared: &mut SharedMemory<f32>,
    route: &Array<u32>,
    run: Run,
    own: u32,
    low: u32,
    high: u32,
    #[comptime] spec: Spec,
    #[comptime] plan: Plan,
) {
    let lane = UNIT_POS_X % WARP;
    let warp = UNIT_POS_X / WARP;
    let panel = if comptime!(spec.routed.is_some()) { clamp_max(own, comptime!(spec.panels - 1)) } else { own };
    let row = lane / 4;
    let quarter = lane % 4;
    // As right operand, a lane holds the activations of one of the eight.
    let from = row_at(route, run, row, spec.routed);
    let there = from < limit_of(run, spec.routed);
    let from = source_at(from, spec.routed);
    let mut total = zero();
    let mut t = low + warp;
    while t < high {
        let mut loaded = Sequence::<Array<u32>>::new();
        #[unroll]
        for u in 0..comptime!(plan.ahead) {
            // Beyond the last tile, the last one is loaded once more and not used.
            let at = min(t + comptime!(u * plan.warps), high - 1);
            loaded.push(load_codes::<N>(words, codes, panel, at, lane, spec));
        }
        #[unroll]
        for u in 0..comptime!(plan.ahead) {
            let at = t + comptime!(u * plan.warps);
            if at < high {
                multiply(words, x, &loaded[comptime!(u as usize)], &mut total, panel, at, lane, from, there, spec);
            }
        }
        t += comptime!(plan.ahead * plan.warps);
    }
    // Lane `l` holds rows `l/4` and `l/4 + 8`, tokens `2 (l mod 4)` and the next.
    #[unroll]
    for half in 0..2u32 {
        let sums = total[comptime!(half as usize)];
        #[unroll]
        for i in 0..2u32 {
            let at = warp * SUMS + (quarter * 2 + i) * ROWS + row + comptime!(half * 8);
            shared[at as usize] = sums[comptime!(i as usize)];
        }
    }
}

/// Sum `at` of all warps together.
#[cube]
fn sum_of_warps(shared: &SharedMemory<f32>, at: u32, #[comptime] plan: Plan) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for w in 0..comptime!(plan.warps) {
        sum += shared[(at + comptime!(w * SUMS)) as usize];
    }
    sum
}

/// `total +=` the product of one tile with the activations of eight tokens.
#[cube]
fn multiply(
    words: &Array<u32>,
    x: &Array<Vector<u32, Const<2>>>,
    codes: &Array<u32>,
    total: &mut Array<Sums>,
    panel: u32,
    t: u32,
    lane: u32,
    token: u32,
    there: bool,
    #[comptime] spec: Spec,
) {
    let quarter = lane % 4;
    #[unroll]
    for part in 0..comptime!(4 / spec.run) {
        let grid = grid_of(words, panel, t, part, lane / 4, spec);
        let mut sums = zero();
        #[unroll]
        for i in 0..comptime!(spec.run) {
            let s = comptime!(part * spec.run + i);
            let col = t * 64 + comptime!(s * 16) + quarter * 4;
            let mut xs = Vector::<u32, Const<2>>::new(0u32);
            if there && col < comptime!(spec.cols) {
                xs = x[(token * comptime!(spec.cols / 4) + col / 4) as usize];
            }
            product(&left(codes, &grid, s, comptime!(spec.bits)), &right(xs), &mut sums);
        }
        flush(total, &sums, &grid);
    }
}

/// The scales and zero points of run `part` of a tile.
#[cube]
pub(crate) fn grid_of(
    words: &Array<u32>,
    panel: u32,
    t: u32,
    #[comptime] part: u32,
    row: u32,
    #[comptime] spec: Spec,
) -> Grid {
    if comptime!(spec.groups == 1) {
        load_grid(words, panel, 0u32, row, spec)
    } else {
        // Padding behind the last column has no group of its own.
        let col = t * 64 + comptime!(part * spec.run * 16);
        let group = clamp_max(col / comptime!(spec.group), comptime!(spec.groups - 1));
        load_grid(words, panel, group, row, spec)
    }
}

/// Bytes of weights that one call of the kernel reads.
pub fn bytes(shape: &Tiles) -> usize {
    shape.panels() * (shape.tiles() * tile_bytes(shape) + shape.header_bytes())
}

fn tile_bytes(shape: &Tiles) -> usize {
    tile::Spec::of(shape).tile as usize * 4
}

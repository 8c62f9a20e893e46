//! `y = x Wᵀ + b` for packed `W` and few tokens: decoding.
//!
//! Blocks take a panel of 16 rows and eight tokens; the warps of a block share the panel's tiles among them and add up
//! their sums at the end. A lane loads its codes of several tiles before it uses the first, so that many loads are
//! under way. Codes become f16 by bit operations alone, exactly, also after their zero points are taken off; products
//! of a group are summed in f32 by the tensor cores, and multiplied by the scale in f32.

use awqc_ir::tiles::Tiles;
use cubecl::prelude::*;

use super::Call;
use super::tile::{
    self, Grid, Operands, ROWS, Spec, Sums, WARP, flush, left, load_codes, load_grid, product, right, zero,
};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Tokens of a block.
pub const TOKENS: u32 = 8;

/// How the work of a block is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    warps: u32,
    /// Tiles whose codes a warp loads at once.
    ahead: u32,
    bias: bool,
}

/// The kernel for weights of this shape. The grid is `[panels, tokens / 8]`, rounded up.
///
/// Arguments: the weight; the weight again, as loads of codes; `x`, f16 `[tokens, cols]`; the bias, f32 `[rows]`, if
/// there is one; `y`, f32 `[tokens, rows]`; the call.
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, shape: &Tiles, bias: bool) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    let warps = spec.tiles.clamp(1, 8);
    // Wide codes, and the scales of several small groups, need registers too.
    let most = if spec.bits == 8 || spec.run <= 2 { 2 } else { 4 };
    let ahead = spec.tiles.div_ceil(warps).clamp(1, most);
    let plan = Plan { warps, ahead, bias };
    emit(arch, &format!("gemv_{}", spec.label()), warps * WARP, |args| {
        if spec.load == 2 { body::<Const<2>>(args, spec, plan) } else { body::<Const<4>>(args, spec, plan) }
    })
}

fn body<N: Size>(args: &mut Args, spec: Spec, plan: Plan) {
    let o = Operands::<N>::of(args, plan.bias);
    gemv::expand::<N>(args.scope(), o.words, o.codes, o.x, o.bias, o.y, o.call, spec, plan);
}

#[cube]
fn gemv<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    x: &Array<Vector<u32, Const<2>>>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    call: &Array<u32>,
    #[comptime] spec: Spec,
    #[comptime] plan: Plan,
) {
    let lane = UNIT_POS_X % WARP;
    let warp = UNIT_POS_X / WARP;
    let panel = CUBE_POS_X;
    let first = CUBE_POS_Y * TOKENS;
    let tokens = call[comptime!(Call::Tokens as usize)];
    let row = lane / 4;
    let quarter = lane % 4;
    // As right operand, a lane holds the activations of token `row`.
    let there = first + row < tokens;
    let mut total = zero();
    let mut t = warp;
    while t < comptime!(spec.tiles) {
        let mut loaded = Sequence::<Array<u32>>::new();
        #[unroll]
        for u in 0..comptime!(plan.ahead) {
            // Beyond the last tile, the last one is loaded once more and not used.
            let at = clamp_max(t + comptime!(u * plan.warps), comptime!(spec.tiles - 1));
            loaded.push(load_codes::<N>(words, codes, panel, at, lane, spec));
        }
        #[unroll]
        for u in 0..comptime!(plan.ahead) {
            let at = t + comptime!(u * plan.warps);
            if at < comptime!(spec.tiles) {
                multiply(
                    words,
                    x,
                    &loaded[comptime!(u as usize)],
                    &mut total,
                    panel,
                    at,
                    lane,
                    first + row,
                    there,
                    spec,
                );
            }
        }
        t += comptime!(plan.ahead * plan.warps);
    }

    // The sums of all warps meet: lane `l` holds rows `l/4` and `l/4 + 8`, tokens `2 (l mod 4)` and the next.
    let mut shared = SharedMemory::<f32>::new(comptime!((plan.warps * ROWS * TOKENS) as usize));
    #[unroll]
    for half in 0..2u32 {
        let sums = total[comptime!(half as usize)];
        #[unroll]
        for i in 0..2u32 {
            let at = warp * comptime!(ROWS * TOKENS) + (quarter * 2 + i) * ROWS + row + comptime!(half * 8);
            shared[at as usize] = sums[comptime!(i as usize)];
        }
    }
    sync_cube();
    let mut out = UNIT_POS_X;
    while out < comptime!(ROWS * TOKENS) {
        let token = first + out / ROWS;
        let channel = panel * ROWS + out % ROWS;
        if token < tokens && channel < comptime!(spec.rows) {
            let mut sum = 0.0f32;
            #[unroll]
            for w in 0..comptime!(plan.warps) {
                sum += shared[(out + comptime!(w * ROWS * TOKENS)) as usize];
            }
            if comptime!(plan.bias) {
                sum += bias[channel as usize];
            }
            y[(token * comptime!(spec.rows) + channel) as usize] = sum;
        }
        out += comptime!(plan.warps * WARP);
    }
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

//! A packed weight as the numbers that it stands for. No plan launches this: products unpack codes in registers. It
//! says on a device what the layout means, exactly, so that products there can be told from what they are given.

use awqc_ir::tiles::{TILE_COLS, Tiles};
use cubecl::prelude::*;

use super::gemv::grid_of;
use super::tile::{Pair, ROWS, Spec, WARP, left, load_codes};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Warps of a block: they share its tiles.
const WARPS: u32 = 4;

/// The kernel for weights of this shape. The grid is `[panels]`.
///
/// Arguments: the weight; the weight again, as loads of codes; the numbers, f32 `[rows, cols]`.
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, shape: &Tiles) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    emit(arch, &format!("dequantize_{}", spec.label()), WARPS * WARP, |args| {
        if spec.load == 2 { body::<Const<2>>(args, spec) } else { body::<Const<4>>(args, spec) }
    })
}

fn body<N: Size>(args: &mut Args, spec: Spec) {
    let words = args.input("weight");
    let codes = args.input("codes");
    let out = args.output("out");
    dequantize::expand::<N>(args.scope(), words, codes, out, spec);
}

#[cube]
fn dequantize<N: Size>(
    words: &Array<u32>,
    codes: &Array<Vector<u32, N>>,
    out: &mut Array<f32>,
    #[comptime] spec: Spec,
) {
    let lane = UNIT_POS_X % WARP;
    let (row, quarter) = (lane / 4, lane % 4);
    let channel = CUBE_POS_X * ROWS + row;
    let mut t = UNIT_POS_X / WARP;
    while t < comptime!(spec.tiles) {
        let loaded = load_codes::<N>(words, codes, CUBE_POS_X, t, lane, spec);
        #[unroll]
        for part in 0..comptime!(4 / spec.run) {
            let grid = grid_of(words, CUBE_POS_X, t, part, row, spec);
            #[unroll]
            for i in 0..comptime!(spec.run) {
                let s = comptime!(part * spec.run + i);
                // As left operand of a product, a lane holds four neighbouring columns of two rows.
                let a = left(&loaded, &grid, s, comptime!(spec.bits));
                let col = t * comptime!(TILE_COLS as u32) + comptime!(s * 16) + quarter * 4;
                if col < comptime!(spec.cols) {
                    put(out, channel, col, a[0usize], grid.s0, spec);
                    put(out, channel + 8, col, a[1usize], grid.s1, spec);
                    put(out, channel, col + 2, a[2usize], grid.s0, spec);
                    put(out, channel + 8, col + 2, a[3usize], grid.s1, spec);
                }
            }
        }
        t += WARPS;
    }
}

/// Writes two neighbouring numbers of a channel, if there is one.
#[cube]
fn put(out: &mut Array<f32>, channel: u32, col: u32, codes: Pair, scale: f32, #[comptime] spec: Spec) {
    if channel < comptime!(spec.rows) {
        let at = channel * comptime!(spec.cols) + col;
        out[at as usize] = f32::cast_from(codes[0usize]) * scale;
        out[(at + 1) as usize] = f32::cast_from(codes[1usize]) * scale;
    }
}

//! `y = x Wᵀ + b` for float `W`: heads and layers that are not quantized.
//!
//! A warp takes a row of `W` and up to eight tokens, and reads the row once for them, 16 bytes a lane where the columns
//! allow it. Factors are widened to f32. For many tokens this is far from what tensor cores reach.

use cubecl::prelude::*;
use half::{bf16, f16};

use super::routed::{Routed, Run, limit_of, row_at, run_of, source_at};
use super::tile::WARP;
use super::{Call, Float};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Rows of a block: one for each warp.
pub const ROWS: u32 = 8;
/// Tokens of a block.
pub const TOKENS: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spec {
    rows: u32,
    cols: u32,
    /// Columns of one load.
    load: u32,
    bias: bool,
    /// How rows find their experts, if there are any: `rows` are those of one expert then.
    routed: Option<Routed>,
}

/// The kernel for a `[rows, cols]` weight of this type. The grid is `[rows / 8, tokens / 8]`, rounded up.
///
/// Arguments: the weight; `x`, f32 `[tokens, cols]`; the bias, f32 `[rows]`, if there is one; `y`, f32
/// `[tokens, rows]`; the call.
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, of: Float, rows: usize, cols: usize, bias: bool) -> Result<Source, CudaError> {
    whole_source(arch, of, (rows, cols), bias, None)
}

/// The same for the matrices of experts, `[rows, cols]` each, one below the other. The grid is `[rows / 8, blocks]`: a
/// block for each row of up to eight tokens, or at least as many as there are runs of eight rows.
///
/// Arguments: as those of [`source`], with `x` f32 `[rows, cols]`, or `[tokens, cols]` if it is shared; and behind the
/// call the records, see [`super::routed`], or the result of [`super::route`] for runs of eight rows. There is no bias.
///
/// # Errors
/// When the code generator refuses it.
pub fn routed_source(arch: &Arch, of: Float, rows: usize, cols: usize, routed: Routed) -> Result<Source, CudaError> {
    whole_source(arch, of, (rows, cols), false, Some(routed))
}

fn whole_source(
    arch: &Arch,
    of: Float,
    (rows, cols): (usize, usize),
    bias: bool,
    routed: Option<Routed>,
) -> Result<Source, CudaError> {
    let most = 16 / of.bytes();
    let load = [8, 4, 2, 1].into_iter().find(|n| *n <= most && cols.is_multiple_of(*n)).unwrap_or(1);
    // Kernels count loads in 32 bits.
    let stack = routed.map_or(1, |r| r.stack().experts as usize);
    if stack.checked_mul(rows).and_then(|rows| rows.checked_mul(cols / load)).is_none_or(|n| n > u32::MAX as usize) {
        return Err(CudaError::Unsupported(format!("no kernel covers a float weight [{stack},{rows},{cols}]")));
    }
    let spec = Spec { rows: rows as u32, cols: cols as u32, load: load as u32, bias, routed };
    let label = routed.map(Routed::label).unwrap_or_default();
    emit(arch, &format!("dense_{}_{rows}x{cols}{label}", of.word()), ROWS * WARP, |args| match of {
        Float::F32 => sized::<f32>(args, spec),
        Float::F16 => sized::<f16>(args, spec),
        Float::Bf16 => sized::<bf16>(args, spec),
    })
}

fn sized<E: cubecl::prelude::Float>(args: &mut Args, spec: Spec) {
    match spec.load {
        8 => body::<E, Const<8>>(args, spec),
        4 => body::<E, Const<4>>(args, spec),
        2 => body::<E, Const<2>>(args, spec),
        _ => body::<E, Const<1>>(args, spec),
    }
}

fn body<E: cubecl::prelude::Float, N: Size>(args: &mut Args, spec: Spec) {
    let weight = args.input::<Vector<E, N>>("weight");
    let x = args.input::<Vector<f32, N>>("x");
    let bias = spec.bias.then(|| args.input::<f32>("bias"));
    let y = args.output::<f32>("y");
    let call = args.input::<u32>("call");
    let route = if spec.routed.is_some() { args.input::<u32>("route") } else { call.clone() };
    let bias = bias.unwrap_or_else(|| y.clone());
    dense::expand::<E, N>(args.scope(), weight, x, bias, y, call, route, spec);
}

#[cube]
fn dense<E: cubecl::prelude::Float, N: Size>(
    weight: &Array<Vector<E, N>>,
    x: &Array<Vector<f32, N>>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    call: &Array<u32>,
    route: &Array<u32>,
    #[comptime] spec: Spec,
) {
    let tokens = call[comptime!(Call::Tokens as usize)];
    if let Some(routed) = comptime!(spec.routed) {
        let run = run_of(route, tokens, routed);
        if run.works {
            multiply::<E, N>(weight, x, bias, y, route, run, spec);
        }
    } else {
        let run = Run { expert: 0u32, first: CUBE_POS_Y * TOKENS, end: tokens, works: true };
        multiply::<E, N>(weight, x, bias, y, route, run, spec);
    }
}

/// A block's rows of a matrix with up to eight rows of `x`.
#[cube]
fn multiply<E: cubecl::prelude::Float, N: Size>(
    weight: &Array<Vector<E, N>>,
    x: &Array<Vector<f32, N>>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    route: &Array<u32>,
    run: Run,
    #[comptime] spec: Spec,
) {
    let lane = UNIT_POS_X % WARP;
    let own = CUBE_POS_X * ROWS + UNIT_POS_X / WARP;
    let row = run.expert * comptime!(spec.rows) + clamp_max(own, comptime!(spec.rows - 1));
    let loads = comptime!(spec.cols / spec.load);
    let limit = limit_of(run, spec.routed);
    let mut rows = Sequence::<u32>::new();
    #[unroll]
    for t in 0..TOKENS {
        rows.push(row_at(route, run, t, spec.routed));
    }
    let mut sums = Array::<f32>::new(comptime!(TOKENS as usize));
    #[unroll]
    for t in 0..TOKENS {
        sums[comptime!(t as usize)] = 0.0f32;
    }
    let mut k = lane;
    while k < loads {
        let w = Vector::<f32, N>::cast_from(weight[(row * loads + k) as usize]);
        #[unroll]
        for t in 0..TOKENS {
            let token = rows[comptime!(t as usize)];
            if token < limit {
                let products = w * x[(source_at(token, spec.routed) * loads + k) as usize];
                let mut sum = sums[comptime!(t as usize)];
                #[unroll]
                for i in 0..comptime!(spec.load) {
                    sum += products[comptime!(i as usize)];
                }
                sums[comptime!(t as usize)] = sum;
            }
        }
        k += WARP;
    }
    #[unroll]
    for t in 0..TOKENS {
        let token = rows[comptime!(t as usize)];
        let sum = plane_sum(sums[comptime!(t as usize)]);
        if lane == 0 && own < comptime!(spec.rows) && token < limit {
            let mut sum = sum;
            if comptime!(spec.bias) {
                sum += bias[own as usize];
            }
            y[(token * comptime!(spec.rows) + own) as usize] = sum;
        }
    }
}

//! Many tokens in the order of the experts that they go to.
//!
//! One block counts and sorts: the rows are cut into pieces, and each thread looks for one expert in one piece. Sums
//! over the threads, in their order, are the places of the rows. So rows of an expert stay in the order of the tokens,
//! whichever thread is first.

use cubecl::prelude::*;

use super::Call;
use super::routed::expert_of;
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Source, emit};

/// Threads of the block, and the most experts.
pub const THREADS: u32 = 1024;

/// 32-bit words of the result for each token.
pub fn words(each: usize) -> usize {
    // The number of runs, the order of the rows, and at most two runs for a row, of three words.
    1 + each + 2 * each * 3
}

/// The kernel for layers of so many experts, of which a token has `each`, and runs of up to `tile` rows. The grid is
/// one block.
///
/// Arguments: the records, u32 `[tokens, 2 each]`, see [`super::routed`]; the result, u32: the number of runs, the rows
/// in the order of their experts, and for every run its expert and where its rows begin and end in that order; the
/// call.
///
/// # Errors
/// When the code generator refuses it, or there are too many experts.
pub fn source(arch: &Arch, experts: u32, each: u32, tile: u32) -> Result<Source, CudaError> {
    if experts == 0 || experts > THREADS {
        return Err(CudaError::Unsupported(format!("no kernel sorts the rows of {experts} experts")));
    }
    emit(arch, &format!("route_{each}of{experts}_{tile}"), THREADS, |args| {
        let records = args.input::<u32>("records");
        let out = args.output::<u32>("out");
        let call = args.input::<u32>("call");
        route::expand(args.scope(), records, out, call, experts, each, tile);
    })
}

#[cube]
fn route(
    records: &Array<u32>,
    out: &mut Array<u32>,
    call: &Array<u32>,
    #[comptime] experts: u32,
    #[comptime] each: u32,
    #[comptime] tile: u32,
) {
    let rows = call[comptime!(Call::Tokens as usize)] * each;
    let pieces = comptime!(THREADS / experts);
    let expert = UNIT_POS_X / pieces;
    let piece = UNIT_POS_X % pieces;
    let length = rows.div_ceil(pieces);
    let low = min(piece * length, rows);
    let mut high = min(low + length, rows);
    // Threads without an expert have no rows.
    if expert >= experts {
        high = low;
    }
    let mut count = 0u32;
    for row in low..high {
        if expert_of(records, row, each) == expert {
            count += 1;
        }
    }
    let mut sums = SharedMemory::<u32>::new(comptime!(THREADS as usize));
    add_up(&mut sums, count);
    let mut at = sums[UNIT_POS_X as usize] - count;
    for row in low..high {
        if expert_of(records, row, each) == expert {
            out[(1 + at) as usize] = row;
            at += 1;
        }
    }
    // The rows of this thread's expert, and their runs.
    let mut first = 0u32;
    let mut runs = 0u32;
    let mut end = 0u32;
    if expert < experts {
        end = sums[((expert + 1) * pieces - 1) as usize];
        if expert > 0 {
            first = sums[(expert * pieces - 1) as usize];
        }
        runs = (end - first).div_ceil(tile);
    }
    let mut ends = SharedMemory::<u32>::new(comptime!(THREADS as usize));
    add_up(&mut ends, select(piece == 0, runs, 0u32));
    let own = ends[UNIT_POS_X as usize] - runs;
    let mut run = piece;
    while run < runs {
        let to = 1 + rows + 3 * (own + run);
        out[to as usize] = expert;
        out[(to + 1) as usize] = first + run * tile;
        out[(to + 2) as usize] = min(first + (run + 1) * tile, end);
        run += pieces;
    }
    if UNIT_POS_X == 0 {
        out[0usize] = ends[comptime!((THREADS - 1) as usize)];
    }
}

/// The sums of the values of all threads up to each.
#[cube]
fn add_up(sums: &mut SharedMemory<u32>, value: u32) {
    sums[UNIT_POS_X as usize] = value;
    sync_cube();
    let mut step = 1u32;
    while step < THREADS {
        let mut sum = sums[UNIT_POS_X as usize];
        if UNIT_POS_X >= step {
            sum += sums[(UNIT_POS_X - step) as usize];
        }
        sync_cube();
        sums[UNIT_POS_X as usize] = sum;
        sync_cube();
        step *= 2;
    }
}

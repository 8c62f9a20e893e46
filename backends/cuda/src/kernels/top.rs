//! The largest logits of a token, in order: what a sampler needs of a vocabulary.
//!
//! A block sorts a part of the candidates in shared memory (a bitonic network) and keeps the first ones, so that a few
//! launches, each on what the last one kept, leave the largest of all. Larger comes first, and of equals the one with
//! the smaller id: an order without ties, which IEEE 754's total order of the numbers makes defined for all values.

use cubecl::prelude::*;

use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Source, emit};

/// Logits that are found.
pub const KEPT: u32 = 64;
/// Threads of a block.
const THREADS: u32 = 1024;
/// Candidates of a block.
const PART: u32 = 2 * THREADS;

/// Candidates of each launch, of `width` logits: the last one is a single block.
pub fn rounds(width: usize) -> Vec<usize> {
    let mut out = vec![width];
    let mut left = width;
    while blocks(left) > 1 {
        left = blocks(left) * KEPT as usize;
        out.push(left);
    }
    out
}

/// Blocks for so many candidates.
pub fn blocks(count: usize) -> usize {
    count.div_ceil(PART as usize)
}

/// The kernel for `count` candidates. The grid is `[blocks(count)]`.
///
/// Arguments: values, f32 `[count]`; their ids, u32 `[count]`, unless this is the `first` launch, where a logit's place
/// is its id; the values that are kept, f32 `[blocks, 64]`; their ids, u32 `[blocks, 64]`. Where there are fewer
/// candidates, the last ids are `u32::MAX`.
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, count: usize, first: bool) -> Result<Source, CudaError> {
    emit(arch, &format!("top{KEPT}_{count}"), THREADS, |args| {
        let values = args.input::<f32>("values");
        let ids = (!first).then(|| args.input::<u32>("ids"));
        let kept_values = args.output::<f32>("kept_values");
        let kept_ids = args.output::<u32>("kept_ids");
        // Ids that are not there are not read.
        let ids = ids.unwrap_or_else(|| kept_ids.clone());
        top::expand(args.scope(), values, ids, kept_values, kept_ids, count as u32, first);
    })
}

#[cube]
fn top(
    values: &Array<f32>,
    ids: &Array<u32>,
    kept_values: &mut Array<f32>,
    kept_ids: &mut Array<u32>,
    #[comptime] count: u32,
    #[comptime] first: bool,
) {
    let mut keys = SharedMemory::<u32>::new(comptime!(PART as usize));
    let mut places = SharedMemory::<u32>::new(comptime!(PART as usize));
    #[unroll]
    for half in 0..2u32 {
        let own = UNIT_POS_X + comptime!(half * THREADS);
        let at = CUBE_POS_X * PART + own;
        let mut key = 0u32;
        let mut id = 0xffff_ffffu32;
        if at < count {
            key = to_key(values[at as usize]);
            id = if comptime!(first) { at } else { ids[at as usize] };
        }
        keys[own as usize] = key;
        places[own as usize] = id;
    }
    sync_cube();
    let mut size = 2u32;
    while size <= PART {
        let mut stride = size / 2;
        while stride > 0 {
            let a = UNIT_POS_X / stride * stride * 2 + UNIT_POS_X % stride;
            let b = a + stride;
            let (key_a, key_b) = (keys[a as usize], keys[b as usize]);
            let (id_a, id_b) = (places[a as usize], places[b as usize]);
            let ordered = key_a > key_b || (key_a == key_b && id_a <= id_b);
            // Every other run is sorted backwards, until there is only one.
            let forwards = (a & size) == 0;
            if ordered != forwards {
                keys[a as usize] = key_b;
                keys[b as usize] = key_a;
                places[a as usize] = id_b;
                places[b as usize] = id_a;
            }
            sync_cube();
            stride /= 2;
        }
        size *= 2;
    }
    if UNIT_POS_X < KEPT {
        let at = CUBE_POS_X * KEPT + UNIT_POS_X;
        kept_values[at as usize] = from_key(keys[UNIT_POS_X as usize]);
        kept_ids[at as usize] = places[UNIT_POS_X as usize];
    }
}

/// Bits whose order as integers is that of the number.
#[cube]
pub(super) fn to_key(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    select(bits >> 31u32 == 1u32, !bits, bits | 0x8000_0000u32)
}

#[cube]
pub(super) fn from_key(key: u32) -> f32 {
    f32::reinterpret(select(key >> 31u32 == 1u32, key & 0x7fff_ffffu32, !key))
}

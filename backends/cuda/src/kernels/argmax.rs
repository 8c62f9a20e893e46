//! The token with the largest logit; of equal ones, the first.

use cubecl::prelude::*;

use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Source, emit};

/// Threads of a block.
pub const THREADS: u32 = 1024;

/// The kernel for rows of `width` logits. The grid is `[1, tokens]`.
///
/// Arguments: logits, f32 `[tokens, width]`; the result, u32 `[tokens]`.
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, width: usize) -> Result<Source, CudaError> {
    emit(arch, &format!("argmax_{width}"), THREADS, |args| {
        let logits = args.input::<f32>("logits");
        let out = args.output::<u32>("out");
        argmax::expand(args.scope(), logits, out, width as u32);
    })
}

#[cube]
fn argmax(logits: &Array<f32>, out: &mut Array<u32>, #[comptime] width: u32) {
    let row = CUBE_POS_Y * width;
    let mut best = f32::new(-3.0e38);
    let mut at = 0u32;
    let mut c = UNIT_POS_X;
    while c < width {
        let v = logits[(row + c) as usize];
        if v > best {
            best = v;
            at = c;
        }
        c += THREADS;
    }
    let mut values = SharedMemory::<f32>::new(comptime!(THREADS as usize));
    let mut places = SharedMemory::<u32>::new(comptime!(THREADS as usize));
    values[UNIT_POS_X as usize] = best;
    places[UNIT_POS_X as usize] = at;
    sync_cube();
    let mut half = comptime!(THREADS / 2).runtime();
    while half > 0 {
        if UNIT_POS_X < half {
            let (own, other) = (values[UNIT_POS_X as usize], values[(UNIT_POS_X + half) as usize]);
            let (own_at, other_at) = (places[UNIT_POS_X as usize], places[(UNIT_POS_X + half) as usize]);
            if other > own || (other == own && other_at < own_at) {
                values[UNIT_POS_X as usize] = other;
                places[UNIT_POS_X as usize] = other_at;
            }
        }
        sync_cube();
        half /= 2;
    }
    if UNIT_POS_X == 0 {
        out[CUBE_POS_Y as usize] = places[0usize];
    }
}

//! Rows of a table, and those of images in their place.

use cubecl::prelude::*;

use super::{From, Grid, NO_IMAGE, THREADS, first, start};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    /// Columns of the table.
    pub(super) width: u32,
    /// Added to every index.
    pub(super) offset: u32,
}

#[cube]
pub(super) fn embed<E: Float, O: Float>(
    table: &Array<E>,
    index: &Array<u32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
    #[comptime] grid: Grid,
) {
    let row = index[CUBE_POS_Y as usize] + comptime!(spec.offset);
    let mut c = first();
    while c < comptime!(spec.width) {
        let value = f32::cast_from(table[(row * comptime!(spec.width) + c) as usize]);
        out[(base + c) as usize] = O::cast_from(value);
        c += comptime!(THREADS * grid.blocks);
    }
}

/// Rows of images where one stands, and `x` elsewhere.
#[cube]
pub(super) fn image<O: Float>(
    x: &Array<f32>,
    images: &Array<f32>,
    index: &Array<u32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] from: From,
    #[comptime] width: u32,
    #[comptime] grid: Grid,
) {
    let row = index[CUBE_POS_Y as usize];
    let mut c = first();
    while c < width {
        if row == NO_IMAGE {
            out[(base + c) as usize] = O::cast_from(x[(start(from) + c) as usize]);
        } else {
            out[(base + c) as usize] = O::cast_from(images[(row * width + c) as usize]);
        }
        c += comptime!(THREADS * grid.blocks);
    }
}

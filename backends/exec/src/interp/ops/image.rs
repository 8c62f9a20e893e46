//! `patches`, `merge` and `place` in burn's primitives.

use awqc_ir::op::{Merge, Patches, Place};
use awqc_passes::Tensor;
use burn_backend::Backend;
use burn_backend::tensor::{FloatTensor, IntTensor};

use super::embedding::read_ints;
use super::routing::indices;
use super::shape::narrow;
use super::{dims, last, reshape};
use crate::interp::upload;

/// See [`Patches`].
pub fn patches<B: Backend>(op: &Patches, pixels: FloatTensor<B>) -> FloatTensor<B> {
    let (shape, k) = (dims::<B>(&pixels), op.size as usize);
    let (n, c, down, across) = (shape[0], shape[1], shape[2] / k, shape[3] / k);
    let whole = narrow::<B>(narrow::<B>(pixels, 2, 0, down * k), 3, 0, across * k);
    let squares = B::float_permute(reshape::<B>(whole, &[n, c, down, k, across, k]), &[0, 2, 4, 1, 3, 5]);
    reshape::<B>(squares, &[n, down * across, c * k * k])
}

/// See [`Merge`].
pub fn merge<B: Backend>(op: &Merge, x: FloatTensor<B>) -> FloatTensor<B> {
    let (n, c) = (dims::<B>(&x)[0], last(&dims::<B>(&x)));
    let (side, by) = (op.side as usize, op.by as usize);
    let squares = side.div_ceil(by);
    let more = squares * by - side;
    let device = B::float_device(&x);
    let zeros = |shape: [usize; 4]| {
        upload::<B>(Tensor { shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }, &device)
    };
    let mut grid = reshape::<B>(x, &[n, side, side, c]);
    if more > 0 {
        grid = B::float_cat(vec![grid, zeros([n, side, more, c])], 2);
        grid = B::float_cat(vec![grid, zeros([n, more, side + more, c])], 1);
    }
    let grid = reshape::<B>(grid, &[n, squares, by, squares, by, c]);
    reshape::<B>(B::float_permute(grid, &[0, 1, 3, 2, 4, 5]), &[n, squares * squares, by * by * c])
}

/// See [`Place`].
///
/// # Errors
/// When the tokens are not as many as the rows, or the device cannot be read.
pub fn place<B: Backend>(
    op: &Place,
    x: FloatTensor<B>,
    ids: IntTensor<B>,
    rows: FloatTensor<B>,
) -> Result<FloatTensor<B>, String> {
    let (shape, of) = (dims::<B>(&x), dims::<B>(&rows));
    let ids = read_ints::<B>(ids)?;
    let (there, after) = (of[0] * of[1], ids.len());
    let places = places(op.token, &ids, (of[0], of[1]))?;
    if places.is_empty() {
        return Ok(x);
    }
    let order: Vec<usize> = places.into_iter().enumerate().map(|(at, row)| row.map_or(at, |row| after + row)).collect();
    let device = B::float_device(&x);
    let width = last(&shape);
    let all = vec![reshape::<B>(x, &[ids.len(), width]), reshape::<B>(rows, &[there, width])];
    Ok(reshape::<B>(B::float_select(B::float_cat(all, 0), 0, indices::<B>(&order, &device)), &shape))
}

/// The row of an image that stands at each token, if one does: the rows of `(images, rows)` one after the other where
/// the tokens are `token`. Nothing if there is no such token.
///
/// # Errors
/// When there are such tokens, but not as many as rows.
pub fn places<I: Copy + Into<i64>>(
    token: u32,
    ids: &[I],
    (images, rows): (usize, usize),
) -> Result<Vec<Option<usize>>, String> {
    let is_place = |id: &I| (*id).into() == i64::from(token);
    let (found, there) = (ids.iter().filter(|id| is_place(id)).count(), images * rows);
    if found == 0 {
        return Ok(Vec::new());
    }
    if found != there {
        let needed = if images == 0 { " are given".into() } else { format!(" of {rows} rows need {there}") };
        return Err(format!(
            "the text holds {found} image tokens ({token}), {images} images{needed}: \
             give as many images as the text has places for"
        ));
    }
    let mut next = 0..there;
    Ok(ids.iter().map(|id| is_place(id).then(|| next.next()).flatten()).collect())
}

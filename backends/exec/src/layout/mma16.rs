//! `mma16`: tiles of 16 rows and 64 columns, as tensor cores take them. The shape and the order of codes are those of
//! [`awqc_ir::tiles`].

use awqc_ir::tiles::{TILE_COLS, TILE_ROWS, Tiles};
use awqc_ir::{Quant, RawTensor, Stored};
use awqc_passes::rtn::Codes;
use half::f16;
use rayon::prelude::*;

use super::{LayoutError, Part, expect, tensor};

/// What the one part's name ends in.
pub const SUFFIX: &str = ".mma16";

/// The shape of a `[rows, cols]` weight in this layout.
///
/// # Errors
/// When the layout cannot hold it; the message says why.
pub fn shape(quant: Quant, rows: usize, cols: usize) -> Result<Tiles, LayoutError> {
    Tiles::of(quant, rows, cols).map_err(LayoutError)
}

/// The panels of a weight.
///
/// # Errors
/// When the layout cannot hold it, or a scale does not fit f16.
pub fn panels(c: &Codes) -> Result<Vec<u8>, LayoutError> {
    let shape = shape(c.quant, c.rows, c.cols)?;
    if let Some(s) = c.scales.iter().find(|s| f16::from_f32(**s).to_f32() != **s) {
        return Err(LayoutError(format!("the scale {s} is not an f16 number")));
    }
    let mut out = vec![0; shape.total_bytes()];
    out.par_chunks_exact_mut(shape.panel_bytes()).enumerate().for_each(|(p, panel)| pack_panel(&shape, p, c, panel));
    Ok(out)
}

pub(super) fn pack(c: &Codes) -> Result<Vec<Part>, LayoutError> {
    let shape = shape(c.quant, c.rows, c.cols)?;
    let bytes = panels(c)?;
    Ok(vec![Part { suffix: SUFFIX, tensor: tensor(Stored::U8, [shape.panels(), shape.panel_bytes()], bytes) }])
}

pub(super) fn unpack(
    quant: Quant,
    rows: usize,
    cols: usize,
    mut part: impl FnMut(&'static str) -> Result<RawTensor, LayoutError>,
) -> Result<Codes, LayoutError> {
    let shape = shape(quant, rows, cols)?;
    let stored = part(SUFFIX)?;
    expect(SUFFIX, &stored, Stored::U8, &[shape.panels(), shape.panel_bytes()])?;
    let groups = shape.groups();
    let (mut scales, mut zeros) = (Vec::with_capacity(rows * groups), Vec::with_capacity(rows * groups));
    let mut codes = vec![0; rows * cols];
    for row in 0..rows {
        let panel = &stored.bytes[row / TILE_ROWS * shape.panel_bytes()..][..shape.panel_bytes()];
        let r = row % TILE_ROWS;
        for g in 0..groups {
            let at = shape.scale_at(g, r);
            scales.push(f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32());
            zeros.push(if shape.symmetric() { shape.middle() } else { panel[shape.zero_at(g, r)] });
        }
    }
    codes.par_chunks_exact_mut(cols).enumerate().for_each(|(row, codes)| {
        let panel = &stored.bytes[row / TILE_ROWS * shape.panel_bytes()..][..shape.panel_bytes()];
        for (c, code) in codes.iter_mut().enumerate() {
            *code = get(&shape, &panel[shape.tile_at(c / TILE_COLS)..], row % TILE_ROWS, c % TILE_COLS);
        }
    });
    if let Some(s) = scales.iter().find(|s| !s.is_finite()) {
        return Err(LayoutError(format!("a scale is {s}: the checkpoint is damaged")));
    }
    let largest = quant.code_range().1 - quant.code_range().0;
    if let Some(z) = zeros.iter().find(|z| i32::from(**z) > largest) {
        return Err(LayoutError(format!("a zero point is {z}, the largest of {} bits is {largest}", quant.bits)));
    }
    Ok(Codes { quant, rows, cols, codes, scales, zeros })
}

/// One panel of a weight, into bytes that are 0.
fn pack_panel(shape: &Tiles, panel: usize, c: &Codes, out: &mut [u8]) {
    let first = panel * TILE_ROWS;
    for r in 0..TILE_ROWS.min(shape.rows() - first) {
        let row = first + r;
        for g in 0..shape.groups() {
            let (at, from) = (shape.scale_at(g, r), row * shape.groups() + g);
            out[at..at + 2].copy_from_slice(&f16::from_f32(c.scales[from]).to_le_bytes());
            if !shape.symmetric() {
                out[shape.zero_at(g, r)] = c.zeros[from];
            }
        }
        let codes = &c.codes[row * shape.cols()..][..shape.cols()];
        for (t, codes) in codes.chunks(TILE_COLS).enumerate() {
            let tile = &mut out[shape.tile_at(t)..][..shape.tile_bytes()];
            codes.iter().enumerate().for_each(|(c, code)| put(shape, tile, r, c, *code));
        }
    }
}

/// The byte of a tile in which this bit of this word lies, and its place there.
fn byte(word: usize, bit: u32) -> (usize, u32) {
    (4 * word + bit as usize / 8, bit % 8)
}

/// Writes a code into a tile of zeros.
fn put(shape: &Tiles, tile: &mut [u8], r: usize, c: usize, code: u8) {
    let at = shape.code_at(r, c);
    let (byte_at, shift) = byte(at.word, at.shift);
    match at.top {
        None => tile[byte_at] |= code << shift,
        Some((word, bit)) => {
            tile[byte_at] |= (code & 3) << shift;
            let (byte_at, shift) = byte(word, bit);
            tile[byte_at] |= (code >> 2) << shift;
        }
    }
}

/// The code of row `r` and column `c` of a tile.
fn get(shape: &Tiles, tile: &[u8], r: usize, c: usize) -> u8 {
    let at = shape.code_at(r, c);
    let (byte_at, shift) = byte(at.word, at.shift);
    match at.top {
        None => (u32::from(tile[byte_at]) >> shift & ((1 << shape.bits()) - 1)) as u8,
        Some((word, bit)) => {
            let low = tile[byte_at] >> shift & 3;
            let (byte_at, shift) = byte(word, bit);
            low | (tile[byte_at] >> shift & 1) << 2
        }
    }
}

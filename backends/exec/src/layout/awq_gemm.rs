//! `awq_gemm`: the four-bit format of AutoAWQ's GEMM kernels, which transformers, vLLM and SGLang load.

use awqc_ir::{Group, Quant, RawTensor, Stored};
use awqc_passes::rtn::Codes;
use rayon::prelude::*;

use super::{LayoutError, Part, expect, read_scales, scale_bytes, tensor};

/// Nibble `i` of a word holds this one of the word's eight columns.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

pub(super) fn fits(quant: Quant, rows: usize, cols: usize) -> Result<(), LayoutError> {
    if quant.bits != 4 || quant.symmetric {
        return Err(LayoutError(format!("the awq_gemm layout holds asymmetric 4-bit codes, this is {quant}")));
    }
    if !rows.is_multiple_of(8) {
        return Err(LayoutError(format!("the awq_gemm layout packs 8 output channels to a word, {rows} do not divide by 8")));
    }
    if let Group::Size(g) = quant.group
        && !cols.is_multiple_of(g as usize)
    {
        return Err(LayoutError(format!("the awq_gemm layout needs whole groups, {cols} input channels do not divide by {g}")));
    }
    Ok(())
}

/// Packs `[rows, cols]` bytes, transposed, eight rows to a word: `[cols, rows/8]`.
fn pack_words(values: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let words = rows / 8;
    let mut out = vec![0u8; cols * words * 4];
    out.par_chunks_mut((words * 4).max(1)).enumerate().for_each(|(c, line)| {
        for (w, bytes) in line.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let nibble = |(i, r): (usize, &usize)| u32::from(values[(w * 8 + r) * cols + c]) << (4 * i);
            *bytes = ORDER.iter().enumerate().map(nibble).fold(0, |a, b| a | b).to_le_bytes();
        }
    });
    out
}

fn unpack_words(bytes: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let words = rows / 8;
    let stored = bytes.as_chunks::<4>().0;
    let mut out = vec![0u8; rows * cols];
    out.par_chunks_mut((8 * cols).max(1)).enumerate().for_each(|(w, block)| {
        for c in 0..cols {
            let word = u32::from_le_bytes(stored[c * words + w]);
            for (i, r) in ORDER.iter().enumerate() {
                block[r * cols + c] = (word >> (4 * i) & 15) as u8;
            }
        }
    });
    out
}

pub(super) fn pack(c: &Codes) -> Result<Vec<Part>, LayoutError> {
    fits(c.quant, c.rows, c.cols)?;
    let (rows, cols, groups) = (c.rows, c.cols, c.groups());
    let transposed = (0..groups).flat_map(|g| (0..rows).map(move |r| c.scales[r * groups + g]));
    Ok(vec![
        Part { suffix: ".qweight", tensor: tensor(Stored::I32, [cols, rows / 8], pack_words(&c.codes, rows, cols)) },
        Part { suffix: ".qzeros", tensor: tensor(Stored::I32, [groups, rows / 8], pack_words(&c.zeros, rows, groups)) },
        Part { suffix: ".scales", tensor: tensor(Stored::F16, [groups, rows], scale_bytes(transposed)?) },
    ])
}

pub(super) fn unpack(
    quant: Quant,
    rows: usize,
    cols: usize,
    mut part: impl FnMut(&'static str) -> Result<RawTensor, LayoutError>,
) -> Result<Codes, LayoutError> {
    fits(quant, rows, cols)?;
    let groups = quant.group.count(cols);
    let qweight = part(".qweight")?;
    expect(".qweight", &qweight, Stored::I32, &[cols, rows / 8])?;
    let qzeros = part(".qzeros")?;
    expect(".qzeros", &qzeros, Stored::I32, &[groups, rows / 8])?;
    let scales = part(".scales")?;
    expect(".scales", &scales, Stored::F16, &[groups, rows])?;
    let stored = read_scales(&scales.bytes)?;
    let scales = (0..rows).flat_map(|r| (0..groups).map(move |g| (r, g))).map(|(r, g)| stored[g * rows + r]).collect();
    Ok(Codes {
        quant,
        rows,
        cols,
        codes: unpack_words(&qweight.bytes, rows, cols),
        scales,
        zeros: unpack_words(&qzeros.bytes, rows, groups),
    })
}

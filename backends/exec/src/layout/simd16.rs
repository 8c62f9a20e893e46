//! `simd16`: four-bit codes in the order of the AWQ paper for 128-bit registers (arXiv 2306.00978, section 4.2): in a
//! block of 32 columns byte `e` holds column `e` in its low nibble and column `e + 16` in its high one.
//!
//! So the block reads w0, w16, w1, w17, … and one load, an AND and a shift give sixteen neighbours each, with nothing
//! to interleave. A row is padded to whole blocks with code 0. Scales and zero points are those of `rows`.

use awqc_ir::{Quant, RawTensor, Stored};
use awqc_passes::rtn::Codes;

use super::{LayoutError, Part, expect, rows, tensor};

/// Columns of a block.
const BLOCK: usize = 32;

pub(super) fn fits(quant: Quant) -> Result<(), LayoutError> {
    if quant.bits != 4 {
        return Err(LayoutError(format!("the simd16 layout holds 4-bit codes, this is {quant}")));
    }
    Ok(())
}

pub(super) fn pack(c: &Codes) -> Result<Vec<Part>, LayoutError> {
    fits(c.quant)?;
    let width = c.cols.div_ceil(BLOCK) * BLOCK / 2;
    let mut bytes = vec![0; c.rows * width];
    for (row, line) in c.codes.chunks(c.cols.max(1)).zip(bytes.chunks_mut(width.max(1))) {
        for (block, out) in row.chunks(BLOCK).zip(line.chunks_mut(BLOCK / 2)) {
            let (low, high) = block.split_at(block.len().min(BLOCK / 2));
            low.iter().zip(&mut *out).for_each(|(code, byte)| *byte |= code);
            high.iter().zip(out).for_each(|(code, byte)| *byte |= code << 4);
        }
    }
    let codes = Part { suffix: ".codes", tensor: tensor(Stored::U8, [c.rows, width], bytes) };
    Ok([codes].into_iter().chain(rows::grid(c)?).collect())
}

pub(super) fn unpack(
    quant: Quant,
    rows: usize,
    cols: usize,
    mut part: impl FnMut(&'static str) -> Result<RawTensor, LayoutError>,
) -> Result<Codes, LayoutError> {
    fits(quant)?;
    let width = cols.div_ceil(BLOCK) * BLOCK / 2;
    let stored = part(".codes")?;
    expect(".codes", &stored, Stored::U8, &[rows, width])?;
    let mut codes = Vec::with_capacity(rows * cols);
    for line in stored.bytes.chunks(width.max(1)) {
        let row = line.chunks(BLOCK / 2).flat_map(|bytes| {
            let low = bytes.iter().map(|b| b & 15);
            low.chain(bytes.iter().map(|b| b >> 4))
        });
        codes.extend(row.take(cols));
    }
    let (scales, zeros) = rows::read_grid(quant, rows, cols, part)?;
    Ok(Codes { quant, rows, cols, codes, scales, zeros })
}

#[cfg(test)]
mod tests {
    use awqc_ir::Group;

    use super::*;

    #[test]
    fn a_block_reads_w0_w16_w1_w17() {
        let quant = Quant { bits: 4, symmetric: true, group: Group::Row };
        let codes = (0..34).map(|c| if c < 32 { c / 2 } else { 15 - (c - 32) }).collect();
        let c = Codes { quant, rows: 1, cols: 34, codes, scales: vec![1.0], zeros: vec![8] };
        let parts = pack(&c).unwrap();
        let bytes = &parts[0].tensor.bytes;
        // Columns 0 and 16 hold 0 and 8, columns 1 and 17 hold 0 and 8, columns 2 and 18 hold 1 and 9, …
        assert_eq!(bytes[..4], [0x80, 0x80, 0x91, 0x91]);
        assert_eq!(bytes[16..], [15, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}

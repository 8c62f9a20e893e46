//! `r16`: panels of 16 rows, as CPU kernels stream them. The shape and the order of codes are those of
//! [`awqc_ir::panels`].

use awqc_ir::panels::{BLOCK, PANEL_ROWS, Panels, QUAD};
use awqc_ir::{Quant, RawTensor, Stored};
use awqc_passes::rtn::Codes;
use half::f16;
use rayon::prelude::*;

use super::{LayoutError, Part, expect, tensor};

/// What the one part's name ends in.
pub const SUFFIX: &str = ".r16";

/// The shape of a `[rows, cols]` weight in this layout.
///
/// # Errors
/// When it cannot be addressed.
pub fn shape(quant: Quant, rows: usize, cols: usize) -> Result<Panels, LayoutError> {
    Panels::of(quant, rows, cols).ok_or_else(|| LayoutError(format!("{quant}[{rows},{cols}] is too large")))
}

/// The panels of a weight.
///
/// # Errors
/// When it cannot be addressed, or a scale does not fit f16.
pub fn panels(c: &Codes) -> Result<Vec<u8>, LayoutError> {
    let shape = shape(c.quant, c.rows, c.cols)?;
    if let Some(s) = c.scales.iter().find(|s| f16::from_f32(**s).to_f32() != **s) {
        return Err(LayoutError(format!("the scale {s} is not an f16 number")));
    }
    let scales: Vec<f16> = c.scales.iter().map(|s| f16::from_f32(*s)).collect();
    Ok(pack_codes(&shape, &c.codes, &scales, &c.zeros))
}

/// The panels of `codes`, `[rows, cols]`, with `scales` and `zeros`, `[rows, groups]`. Symmetric codes have one zero
/// point, whatever `zeros` holds; it may be empty then.
///
/// # Panics
/// When a slice is not as long as the shape says.
pub fn pack_codes(shape: &Panels, codes: &[u8], scales: &[f16], zeros: &[u8]) -> Vec<u8> {
    assert_eq!(codes.len(), shape.rows() * shape.cols(), "codes of {shape:?}");
    assert_eq!(scales.len(), shape.rows() * shape.groups(), "scales of {shape:?}");
    assert!(shape.symmetric() || zeros.len() == scales.len(), "zero points of {shape:?}");
    let mut out = vec![0; shape.total_bytes()];
    let panels = out.par_chunks_exact_mut(shape.panel_bytes().max(1)).enumerate();
    panels.for_each(|(panel, out)| pack_panel(shape, panel, codes, scales, zeros, out));
    out
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
    let count = rows * shape.groups();
    let (mut codes, mut scales) = (Vec::with_capacity(rows * cols), Vec::with_capacity(count));
    let mut zeros = Vec::with_capacity(count);
    for row in 0..rows {
        let at = row / PANEL_ROWS * shape.panel_bytes();
        let panel = Panel { shape: &shape, bytes: &stored.bytes[at..at + shape.panel_bytes()] };
        let r = row % PANEL_ROWS;
        for g in 0..shape.groups() {
            scales.push(panel.scale(g, r).to_f32());
            zeros.push(panel.zero(g, r));
            let first = shape.group_blocks(g).start;
            codes.extend((0..shape.group_columns(g).len()).map(|c| panel.code(first + c / BLOCK, r, c % BLOCK)));
        }
    }
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
fn pack_panel(shape: &Panels, panel: usize, codes: &[u8], scales: &[f16], zeros: &[u8], out: &mut [u8]) {
    let (cols, groups) = (shape.cols(), shape.groups());
    let (header, blocks) = out.split_at_mut(shape.header_bytes());
    for (r, row) in shape.panel_rows(panel..panel + 1).enumerate() {
        for g in 0..groups {
            let at = shape.scales_at(g) + 2 * r;
            header[at..at + 2].copy_from_slice(&scales[row * groups + g].to_le_bytes());
            if !shape.symmetric() {
                header[shape.zeros_at(g) + r] = zeros[row * groups + g];
            }
            let (columns, first) = (shape.group_columns(g), shape.group_blocks(g).start);
            let codes = &codes[row * cols + columns.start..row * cols + columns.end];
            for (b, codes) in codes.chunks(BLOCK).enumerate() {
                let at = (first + b) * shape.block_bytes();
                let block = &mut blocks[at..at + shape.block_bytes()];
                for (c, code) in codes.iter().enumerate() {
                    put(block, shape.bits(), r, c, *code);
                }
            }
        }
    }
}

/// One panel, read number by number.
pub struct Panel<'a> {
    /// Its shape.
    pub shape: &'a Panels,
    /// The whole panel.
    pub bytes: &'a [u8],
}

impl Panel<'_> {
    /// The scale of row `r` of the panel in group `g`.
    pub fn scale(&self, g: usize, r: usize) -> f16 {
        let at = self.shape.scales_at(g) + 2 * r;
        f16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The zero point of row `r` of the panel in group `g`.
    pub fn zero(&self, g: usize, r: usize) -> u8 {
        if self.shape.symmetric() { self.shape.middle() } else { self.bytes[self.shape.zeros_at(g) + r] }
    }

    /// The code of row `r` of the panel at column `c` of block `b`.
    pub fn code(&self, b: usize, r: usize, c: usize) -> u8 {
        get(&self.bytes[self.shape.block_at(b)..], self.shape.bits(), r, c)
    }
}

/// Writes the code of row `r` and column `c` of a block of zeros.
fn put(block: &mut [u8], bits: u32, r: usize, c: usize, code: u8) {
    let (quad, byte) = (c / 4, 4 * r + c % 4);
    match bits {
        8 => block[QUAD * quad + byte] = code,
        4 => block[QUAD * (quad / 2) + byte] |= code << (4 * (quad % 2)),
        _ => {
            block[QUAD * (quad / 4) + byte] |= (code & 3) << (2 * (quad % 4));
            if bits == 3 {
                block[QUAD * 2 + byte] |= (code >> 2) << quad;
            }
        }
    }
}

/// The code of row `r` and column `c` of a block.
fn get(block: &[u8], bits: u32, r: usize, c: usize) -> u8 {
    let (quad, byte) = (c / 4, 4 * r + c % 4);
    match bits {
        8 => block[QUAD * quad + byte],
        4 => block[QUAD * (quad / 2) + byte] >> (4 * (quad % 2)) & 15,
        _ => {
            let low = block[QUAD * (quad / 4) + byte] >> (2 * (quad % 4)) & 3;
            if bits == 3 { low | (block[QUAD * 2 + byte] >> quad & 1) << 2 } else { low }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte `4 r + i` of quad `p` is row `r` at column `4 p + i`, whatever the bits.
    #[test]
    fn the_bytes_of_a_block() {
        for bits in [2, 3, 4, 8] {
            let shape = Panels::new(PANEL_ROWS, 32, bits, false, 32).unwrap();
            let mask = (1u32 << bits) - 1;
            let code = |r: usize, c: usize| ((r as u32 * 37 + c as u32 * 11) & mask) as u8;
            let codes: Vec<u8> = (0..16).flat_map(|r| (0..32).map(move |c| code(r, c))).collect();
            let scales: Vec<f16> = (0..16).map(|r| f16::from_f32(r as f32)).collect();
            let zeros: Vec<u8> = (0..16).collect();
            let bytes = pack_codes(&shape, &codes, &scales, &zeros);
            let (header, block) = bytes.split_at(64);
            assert_eq!(header[..6], [0, 0, 0x00, 0x3c, 0x00, 0x40]);
            assert_eq!(header[32..48], zeros);
            assert_eq!(header[48..], [0; 16]);
            for (at, byte) in block.iter().enumerate() {
                let (register, r, i) = (at / 64, at % 64 / 4, at % 4);
                let quad = |p: usize| code(r, 4 * p + i);
                let expected = match (bits, register) {
                    (8, l) => quad(l),
                    (4, l) => quad(2 * l) | quad(2 * l + 1) << 4,
                    (3, 2) => (0..8).fold(0, |byte, p| byte | (quad(p) >> 2) << p),
                    (_, l) => (0..4).fold(0, |byte, p| byte | (quad(4 * l + p) & 3) << (2 * p)),
                };
                assert_eq!(*byte, expected, "{bits} bits, byte {at}");
            }
        }
    }
}

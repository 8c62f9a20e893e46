//! The shape of a weight packed for tensor cores, and the sizes that follow from it.
//!
//! The layout `mma16` cuts the rows (output channels) into panels of [`TILE_ROWS`] and the columns into tiles of
//! [`TILE_COLS`]. The 32 lanes of a warp take a tile in one load each, and hold it then as the instruction
//! `mma.m16n8k16` wants its left operand: nothing moves between lanes.
//!
//! **A panel** is a header and its tiles, in order. The header holds for every group eight 32-bit words: word `g` is the
//! f16 scale of row `g` in its low half and that of row `g + 8` in its high half. For asymmetric codes, 16 bytes for
//! every group follow: byte `2 g` is the zero point of row `g`, byte `2 g + 1` that of row `g + 8`. The header is
//! padded to [`ALIGN`] bytes.
//!
//! **A tile** of 16 rows and 64 columns takes `128 · bits` bytes. Lane `l` owns the rows `g = l / 4` and `g + 8`, and 16
//! pairs of neighbouring columns: with `q = l mod 4`, pair `p = 4 s + i` is
//!
//! | `i` | row | columns |
//! |-|-|-|
//! | 0 | `g` | `16 s + 4 q`, `16 s + 4 q + 1` |
//! | 1 | `g + 8` | the same |
//! | 2 | `g` | `16 s + 4 q + 2`, `16 s + 4 q + 3` |
//! | 3 | `g + 8` | the same |
//!
//! So step `s` of a product is one instruction over columns `16 s .. 16 s + 16` of the tile, and the right operand of a
//! lane is the four neighbours `16 s + 4 q ..` of an activation row. A 32-bit word of codes has the first code of a
//! pair in its low half and the second in its high half, at the same place:
//!
//! | bits | words a lane | pair `p` | order in the tile |
//! |-|-|-|-|
//! | 4 | 4 | word `p / 4`, bits `4 (p mod 4)` | `[lane][4]` |
//! | 8 | 8 | word `p / 2`, bits `8 (p mod 2)` | `[2][lane][4]`: words 0 to 3 of all lanes, then 4 to 7 |
//! | 2 | 2 | word `p / 8`, bits `2 (p mod 8)` | `[lane][2]` |
//! | 3 | 2 + 1 | low two bits as with 2 bits; the top bit is bit `p` of the last word | `[lane][2]`, then `[lane]` |
//!
//! Missing rows and columns have code 0, missing rows scale 0. Groups begin at multiples of 16 columns, so that a step
//! lies in one group; columns come in multiples of 4, so that the activations of a lane are there or not.

use crate::ty::Quant;

/// Rows of a panel.
pub const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub const TILE_COLS: usize = 64;
/// Columns of a step of the product.
pub const STEP: usize = 16;
/// Headers are padded to this many bytes.
pub const ALIGN: usize = 128;
/// Lanes of a warp.
pub const LANES: usize = 32;

/// Where a code lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Word of the tile, counted from its first byte in units of 32 bits.
    pub word: usize,
    /// First bit in the word of the code, or of its low two bits.
    pub shift: u32,
    /// Word and bit of the top bit of a 3-bit code.
    pub top: Option<(usize, u32)>,
}

/// The shape of a weight in the layout `mma16`. All sizes that its methods give fit an `isize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tiles {
    rows: usize,
    cols: usize,
    bits: u32,
    symmetric: bool,
    group: usize,
    groups: usize,
}

impl Tiles {
    /// The shape of a `[rows, cols]` weight of this element.
    ///
    /// # Errors
    /// A sentence that says which size has no place in this layout.
    pub fn of(quant: Quant, rows: usize, cols: usize) -> Result<Self, String> {
        let bits = u32::from(quant.bits);
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(format!("the layout mma16 holds codes of 2, 3, 4 or 8 bits, not {bits}"));
        }
        if rows == 0 || cols == 0 || !cols.is_multiple_of(4) {
            return Err(format!("the layout mma16 needs a multiple of 4 columns, [{rows},{cols}] has {cols}"));
        }
        let group = quant.group.len(cols).min(cols);
        if group == 0 || (group < cols && !group.is_multiple_of(STEP)) {
            return Err(format!(
                "the layout mma16 needs groups of a multiple of {STEP} columns, or of a whole row, not of {group}"
            ));
        }
        let shape = Self { rows, cols, bits, symmetric: quant.symmetric, group, groups: cols.div_ceil(group) };
        let bytes = shape.tiles().checked_mul(shape.tile_bytes()).and_then(|b| b.checked_add(shape.header_bytes()));
        let total = bytes.and_then(|b| b.checked_mul(shape.panels()));
        // Kernels count words in 32 bits.
        match total {
            Some(total) if total / 4 <= u32::MAX as usize => Ok(shape),
            Some(_) | None => Err(format!("{quant}[{rows},{cols}] is too large for one buffer")),
        }
    }

    /// Output channels.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input channels.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Whether every zero point is `2^(bits-1)`, and so none is stored.
    pub fn symmetric(&self) -> bool {
        self.symmetric
    }

    /// Columns of a group; the last may have fewer.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Panels of all rows.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Tiles of a panel.
    pub fn tiles(&self) -> usize {
        self.cols.div_ceil(TILE_COLS)
    }

    /// Bytes of a tile.
    pub fn tile_bytes(&self) -> usize {
        LANES * 4 * self.bits as usize
    }

    /// Bytes of a panel's header.
    pub fn header_bytes(&self) -> usize {
        (self.groups * if self.symmetric { 32 } else { 48 }).next_multiple_of(ALIGN)
    }

    /// Bytes of a panel.
    pub fn panel_bytes(&self) -> usize {
        self.header_bytes() + self.tiles() * self.tile_bytes()
    }

    /// Bytes of all panels.
    pub fn total_bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// The zero point of symmetric codes.
    pub fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Where a panel holds the scale of its row `r` in group `g`, in bytes.
    pub fn scale_at(&self, g: usize, r: usize) -> usize {
        g * 32 + 4 * (r % 8) + 2 * (r / 8)
    }

    /// Where a panel holds the zero point of its row `r` in group `g`, if it holds any.
    pub fn zero_at(&self, g: usize, r: usize) -> usize {
        self.groups * 32 + g * 16 + 2 * (r % 8) + r / 8
    }

    /// Where a panel holds tile `t`.
    pub fn tile_at(&self, t: usize) -> usize {
        self.header_bytes() + t * self.tile_bytes()
    }

    /// Where a tile holds the code of its row `r` and column `c`.
    pub fn code_at(&self, r: usize, c: usize) -> At {
        let lane = 4 * (r % 8) + c % STEP / 4;
        let pair = 4 * (c / STEP) + r / 8 + 2 * (c % 4 / 2);
        let half = 16 * (c % 2) as u32;
        let (word, shift) = match self.bits {
            4 => (4 * lane + pair / 4, 4 * (pair % 4)),
            8 => (pair / 8 * 4 * LANES + 4 * lane + pair / 2 % 4, 8 * (pair % 2)),
            _ => (2 * lane + pair / 8, 2 * (pair % 8)),
        };
        let top = (self.bits == 3).then_some((2 * LANES + lane, half + pair as u32));
        At { word, shift: half + shift as u32, top }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::ty::Group;

    fn quant(bits: u8, symmetric: bool, group: u32) -> Quant {
        Quant { bits, symmetric, group: Group::Size(group) }
    }

    #[test]
    fn sizes_of_a_shape() {
        let s = Tiles::of(quant(4, false, 128), 40, 576).unwrap();
        assert_eq!((s.panels(), s.tiles(), s.groups()), (3, 9, 5));
        assert_eq!((s.header_bytes(), s.tile_bytes()), (256, 512));
        assert_eq!(s.total_bytes(), 3 * (256 + 9 * 512));
        assert_eq!((s.scale_at(2, 9), s.zero_at(2, 9)), (64 + 4 + 2, 160 + 32 + 3));
    }

    /// Every bit of a tile belongs to one code.
    #[test]
    fn the_codes_fill_a_tile() {
        for bits in [2, 3, 4, 8] {
            let s = Tiles::of(quant(bits, true, 64), 16, 64).unwrap();
            let mut seen = BTreeSet::new();
            for (r, c) in (0..16).flat_map(|r| (0..64).map(move |c| (r, c))) {
                let at = s.code_at(r, c);
                let low = if bits == 3 { 2 } else { u32::from(bits) };
                for bit in 0..low {
                    assert!(seen.insert((at.word, at.shift + bit)), "{bits} bits, row {r}, column {c}");
                }
                at.top.into_iter().for_each(|top| assert!(seen.insert(top), "{bits} bits, row {r}, column {c}"));
            }
            assert_eq!(seen.len(), 8 * s.tile_bytes());
            assert_eq!(seen.last().map(|(w, b)| (*w, *b)), Some((s.tile_bytes() / 4 - 1, 31)));
        }
    }

    /// Lane 6 (rows 1 and 9, third quarter) at 4 bits: its second word is step 1.
    #[test]
    fn a_lane_of_a_tile() {
        let s = Tiles::of(quant(4, false, 64), 16, 64).unwrap();
        let at = |word, shift| At { word, shift, top: None };
        assert_eq!(s.code_at(1, 24), at(4 * 6 + 1, 0));
        assert_eq!(s.code_at(1, 25), at(4 * 6 + 1, 16));
        assert_eq!(s.code_at(9, 24), at(4 * 6 + 1, 4));
        assert_eq!(s.code_at(1, 26), at(4 * 6 + 1, 8));
        assert_eq!(s.code_at(9, 27), at(4 * 6 + 1, 28));
    }

    #[test]
    fn what_cannot_be() {
        for (bits, group, rows, cols) in
            [(5, 64, 16, 64), (4, 20, 16, 64), (4, 64, 16, 66), (4, 0, 16, 64), (4, 64, 0, 64)]
        {
            assert!(Tiles::of(quant(bits, false, group), rows, cols).is_err(), "{bits} {group} {rows} {cols}");
        }
        assert!(Tiles::of(quant(4, false, 20), 16, 20).is_ok());
        assert!(Tiles::of(quant(4, false, 128), 1 << 40, 1 << 40).is_err());
        assert!(Tiles::of(quant(4, false, 128), 16, usize::MAX - 3).is_err());
    }
}

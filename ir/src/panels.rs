//! The shape of a packed weight and the sizes that follow from it.
//!
//! The layout `r16` cuts the rows (output channels) into panels of [`PANEL_ROWS`] and the columns of every group into
//! blocks of [`BLOCK`]. A group whose length is no multiple of a block is padded to one, so that no block straddles two
//! groups; missing rows and columns have code 0.
//!
//! A panel is a header and its blocks, in order. The header holds every group's scales (16 f16 a group), then, for
//! asymmetric codes, every group's zero points (16 bytes a group), and is padded to [`ALIGN`] bytes. A block of 32
//! columns and 16 rows takes `64 · bits` bytes. It is made of eight quads: quad `p` is 64 bytes, of which byte
//! `4 r + i` is the code of row `r` at column `4 p + i`. How the quads of narrow codes share bytes is told below.
//!
//! | bits | 64-byte registers | register `l` holds |
//! |-|-|-|
//! | 8 | 8 | quad `l` |
//! | 4 | 4 | quad `2l` in the low nibbles, `2l+1` in the high ones |
//! | 2 | 2 | quads `4l..4l+4` at bits 0, 2, 4 and 6 |
//! | 3 | 2 + 1 | the two low bits as with 2 bits; in the last one, bit `p` is the top bit of quad `p` |
//!
//! So one load, a shift and a mask give a quad in the order in which kernels use it, with nothing to interleave.

use std::ops::Range;

use crate::ty::Quant;

/// Rows of a panel.
pub const PANEL_ROWS: usize = 16;
/// Columns of a block.
pub const BLOCK: usize = 32;
/// Headers are padded to this many bytes, so that every block starts at a multiple of it from the buffer's start.
pub const ALIGN: usize = 64;

/// Bytes of a quad: one code of 16 rows and 4 columns each.
pub const QUAD: usize = 64;

/// The shape of a packed weight. All sizes that its methods give fit an `isize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Panels {
    rows: usize,
    cols: usize,
    bits: u32,
    symmetric: bool,
    group: usize,
    groups: usize,
    blocks: usize,
    header: usize,
    panel_bytes: usize,
}

impl Panels {
    /// The shape of a `[rows, cols]` weight with codes of `bits` bits and groups of `group` columns; the last group may
    /// be shorter, a group longer than a row is the row.
    ///
    /// `None` when there are no kernels for `bits` (there are for 2, 3, 4 and 8), `group` is 0, or a size overflows.
    pub fn new(rows: usize, cols: usize, bits: u32, symmetric: bool, group: usize) -> Option<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) || group == 0 {
            return None;
        }
        let group = group.min(cols.max(1));
        let groups = cols.div_ceil(group);
        let last = cols.checked_sub(groups.saturating_sub(1).checked_mul(group)?)?;
        let blocks = groups.saturating_sub(1).checked_mul(group.div_ceil(BLOCK))?.checked_add(last.div_ceil(BLOCK))?;
        let group_header = PANEL_ROWS * if symmetric { 2 } else { 3 };
        let header = groups.checked_mul(group_header)?.checked_next_multiple_of(ALIGN)?;
        let panel_bytes = blocks.checked_mul(QUAD * bits as usize)?.checked_add(header)?;
        // The decoded matrix, padding and all, is the largest thing that has this shape.
        let padded = rows.checked_next_multiple_of(PANEL_ROWS)?.checked_mul(blocks.checked_mul(BLOCK)?)?;
        let total = rows.div_ceil(PANEL_ROWS).checked_mul(panel_bytes)?;
        if padded.checked_mul(size_of::<f32>())?.max(total) > isize::MAX as usize {
            return None;
        }
        Some(Self { rows, cols, bits, symmetric, group, groups, blocks, header, panel_bytes })
    }

    /// The shape of a `[rows, cols]` weight of this element; `None` when a size overflows.
    pub fn of(quant: Quant, rows: usize, cols: usize) -> Option<Self> {
        Self::new(rows, cols, u32::from(quant.bits), quant.symmetric, quant.group.len(cols))
    }

    /// Output channels.
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input channels.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bits of a code.
    #[inline]
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Whether every zero point is `2^(bits-1)`, and so none is stored.
    #[inline]
    pub fn symmetric(&self) -> bool {
        self.symmetric
    }

    /// Columns of a group; the last may have fewer.
    #[inline]
    pub fn group(&self) -> usize {
        self.group
    }

    /// Groups in a row.
    #[inline]
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// The columns of group `g`.
    #[inline]
    pub fn group_columns(&self, g: usize) -> Range<usize> {
        g * self.group..((g + 1) * self.group).min(self.cols)
    }

    /// Blocks in a row, over all groups.
    #[inline]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The blocks of group `g`.
    #[inline]
    pub fn group_blocks(&self, g: usize) -> Range<usize> {
        let each = self.group.div_ceil(BLOCK);
        g * each..((g + 1) * each).min(self.blocks)
    }

    /// Columns of a row with the padding of its groups.
    #[inline]
    pub fn padded_cols(&self) -> usize {
        self.blocks * BLOCK
    }

    /// Panels of all rows.
    #[inline]
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// The rows of these panels that are not padding.
    #[inline]
    pub fn panel_rows(&self, panels: Range<usize>) -> Range<usize> {
        let row = |panel: usize| panel.saturating_mul(PANEL_ROWS).min(self.rows);
        row(panels.start)..row(panels.end)
    }

    /// Bytes of a block.
    #[inline]
    pub fn block_bytes(&self) -> usize {
        QUAD * self.bits as usize
    }

    /// Bytes of a panel's header.
    #[inline]
    pub fn header_bytes(&self) -> usize {
        self.header
    }

    /// Bytes of a panel.
    #[inline]
    pub fn panel_bytes(&self) -> usize {
        self.panel_bytes
    }

    /// Bytes of all panels.
    #[inline]
    pub fn total_bytes(&self) -> usize {
        self.panels() * self.panel_bytes
    }

    /// The zero point of symmetric codes.
    #[inline]
    pub fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Where a panel's header holds the scales of group `g`.
    #[inline]
    pub fn scales_at(&self, g: usize) -> usize {
        g * 2 * PANEL_ROWS
    }

    /// Where a panel's header holds the zero points of group `g`, if it holds any.
    #[inline]
    pub fn zeros_at(&self, g: usize) -> usize {
        (2 * self.groups + g) * PANEL_ROWS
    }

    /// Where a panel holds block `b`.
    #[inline]
    pub fn block_at(&self, b: usize) -> usize {
        self.header + b * self.block_bytes()
    }

    /// Whether activations laid out for `other` serve this shape as well: they depend on the columns only.
    #[inline]
    pub fn same_columns(&self, other: &Self) -> bool {
        self.cols == other.cols && self.group == other.group
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_an_even_shape() {
        let s = Panels::new(32, 256, 4, false, 128).unwrap();
        assert_eq!((s.groups(), s.blocks(), s.padded_cols(), s.panels()), (2, 8, 256, 2));
        assert_eq!((s.header_bytes(), s.block_bytes()), (128, 256));
        assert_eq!(s.panel_bytes(), 128 + 8 * 256);
        assert_eq!(s.total_bytes(), 2 * s.panel_bytes());
        assert_eq!(s.group_blocks(1), 4..8);
    }

    #[test]
    fn groups_are_padded_apart() {
        let s = Panels::new(17, 50, 3, true, 20).unwrap();
        assert_eq!((s.groups(), s.blocks(), s.panels()), (3, 3, 2));
        assert_eq!((s.group_columns(2), s.group_blocks(2)), (40..50, 2..3));
        assert_eq!(s.header_bytes(), 128);
        assert_eq!((s.panel_rows(1..2), s.panel_rows(0..2)), (16..17, 0..17));
        let s = Panels::new(1, 100, 2, false, 48).unwrap();
        assert_eq!((s.groups(), s.blocks(), s.group_blocks(1), s.group_blocks(2)), (3, 5, 2..4, 4..5));
    }

    #[test]
    fn a_long_group_is_the_row() {
        let s = Panels::new(16, 70, 8, false, usize::MAX).unwrap();
        assert_eq!((s.group(), s.groups(), s.blocks()), (70, 1, 3));
        let empty = Panels::new(0, 0, 4, false, 128).unwrap();
        assert_eq!((empty.groups(), empty.blocks(), empty.total_bytes()), (0, 0, 0));
    }

    #[test]
    fn what_cannot_be() {
        assert!(Panels::new(16, 64, 5, false, 32).is_none());
        assert!(Panels::new(16, 64, 4, false, 0).is_none());
        assert!(Panels::new(usize::MAX, 64, 4, false, 32).is_none());
        assert!(Panels::new(1 << 40, 1 << 40, 4, false, 32).is_none());
        assert!(Panels::new(16, usize::MAX, 4, false, 1).is_none());
    }
}

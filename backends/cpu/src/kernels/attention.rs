//! The operands of attention's products.

use awqc_ir::panels::PANEL_ROWS;
use half::f16;

/// Rows of a left operand. Row `r` begins at `(r / heads) · token + (r % heads) · head`: those of some heads of a token
/// follow each other.
#[derive(Clone, Copy, Debug)]
pub struct Lines<'a> {
    /// The numbers.
    pub data: &'a [f32],
    /// Heads that are taken together; 1 if lines lie one `token` apart.
    pub heads: usize,
    /// Distance of tokens.
    pub token: usize,
    /// Distance of heads.
    pub head: usize,
}

impl Lines<'_> {
    /// Where a row begins.
    #[inline(always)]
    pub(crate) fn at(&self, row: usize) -> usize {
        row / self.heads * self.token + row % self.heads * self.head
    }
}

/// Numbers of a cache.
#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    /// In 16 bits.
    F16(&'a [f16]),
    /// In 32 bits.
    F32(&'a [f32]),
}

impl Numbers<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(data) => data.len(),
            Self::F32(data) => data.len(),
        }
    }

    /// One of them.
    pub(crate) fn get(&self, i: usize) -> f32 {
        match self {
            Self::F16(data) => data[i].to_f32(),
            Self::F32(data) => data[i],
        }
    }
}

/// A right operand: panels of 16 columns. Column `i` of panel `p` has its number `k` at
/// `p · panel_step + k · step + i`.
#[derive(Clone, Copy, Debug)]
pub struct Stacked<'a> {
    /// The numbers.
    pub data: Numbers<'a>,
    /// Panels.
    pub panels: usize,
    /// Numbers of a column.
    pub depth: usize,
    /// Distance of panels.
    pub panel_step: usize,
    /// Distance of a column's numbers.
    pub step: usize,
}

impl Stacked<'_> {
    /// One behind the last number that is read.
    fn end(&self) -> Option<usize> {
        let last = self.panels.checked_sub(1)?.checked_mul(self.panel_step)?;
        last.checked_add(self.depth.checked_sub(1)?.checked_mul(self.step)?)?.checked_add(PANEL_ROWS)
    }

    /// Whether everything that a product with `rows` rows of `a` reads and writes is there.
    pub(crate) fn fits(&self, rows: usize, a: &Lines<'_>, out: &[f32]) -> bool {
        let lines = || (0..rows).all(|r| a.at(r).checked_add(self.depth).is_some_and(|end| end <= a.data.len()));
        let written = rows.checked_mul(self.panels).and_then(|n| n.checked_mul(PANEL_ROWS));
        let read = self.panels == 0 || self.depth == 0 || self.end().is_some_and(|end| end <= self.data.len());
        a.heads > 0 && read && lines() && written.is_some_and(|n| n <= out.len())
    }
}

//! The part of an output matrix that one call writes.

use std::marker::PhantomData;

/// Exclusive access to a run of rows (output channels) of an output `[tokens, stride]`, for all tokens.
///
/// Tiles are cut by [`split_at`](Self::split_at), as slices are by `split_at_mut`, so that threads can each write their
/// rows of one output: no two tiles made from one borrow share a number.
#[derive(Debug)]
pub struct OutTile<'a> {
    /// The first row's number for token 0.
    start: *mut f32,
    tokens: usize,
    rows: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile is an exclusive borrow of the numbers it reaches, as `&mut [f32]` is.
unsafe impl Send for OutTile<'_> {}
// SAFETY: nothing can be reached through a shared tile.
unsafe impl Sync for OutTile<'_> {}

impl<'a> OutTile<'a> {
    /// The first `rows` numbers of every line of `out`, `[tokens, stride]`; the last line may be cut after them.
    ///
    /// # Panics
    /// When `out` is too short, or a line is shorter than `rows`.
    pub fn new(out: &'a mut [f32], tokens: usize, stride: usize, rows: usize) -> Self {
        assert!(rows <= stride || tokens <= 1, "{rows} rows in lines of {stride}");
        let needed = tokens.saturating_sub(1).checked_mul(stride).and_then(|n| n.checked_add(rows));
        assert!(
            tokens == 0 || needed.is_some_and(|n| n <= out.len()),
            "{tokens} lines of {stride} numbers in an output of {}",
            out.len()
        );
        Self { start: out.as_mut_ptr(), tokens, rows, stride, borrow: PhantomData }
    }

    /// A tile of lines that begin at `start` and are `stride` apart.
    ///
    /// # Safety
    /// The lines must be inside of one live allocation, and nothing else may read or write their first `rows` numbers
    /// while the tile lives.
    pub(crate) unsafe fn from_raw(start: *mut f32, tokens: usize, stride: usize, rows: usize) -> Self {
        Self { start, tokens, rows, stride, borrow: PhantomData }
    }

    /// Tokens: the lines of the output.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Rows that the tile reaches.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The tile's rows before `row`, and from there.
    ///
    /// # Panics
    /// When the tile has fewer rows.
    pub fn split_at(self, row: usize) -> (OutTile<'a>, OutTile<'a>) {
        assert!(row <= self.rows, "row {row} of {}", self.rows);
        // Without tokens there may be no numbers at all.
        let skip = if self.tokens == 0 { 0 } else { row };
        // SAFETY: with a token, the first line has `rows >= row` numbers behind `start`.
        let start = unsafe { self.start.add(skip) };
        (OutTile { rows: row, ..self }, OutTile { start, rows: self.rows - row, ..self })
    }

    /// The tile's first `tokens` tokens, and the others.
    ///
    /// # Panics
    /// When the tile has fewer tokens.
    pub fn split_tokens(self, tokens: usize) -> (OutTile<'a>, OutTile<'a>) {
        assert!(tokens <= self.tokens, "token {tokens} of {}", self.tokens);
        let others = self.tokens - tokens;
        // Behind the last token there may be no numbers at all.
        let skip = if others == 0 { 0 } else { tokens * self.stride };
        // SAFETY: with a token left, its line is inside of what is borrowed.
        let start = unsafe { self.start.add(skip) };
        (OutTile { tokens, ..self }, OutTile { start, tokens: others, ..self })
    }

    /// The same tile for a shorter time.
    pub fn reborrow(&mut self) -> OutTile<'_> {
        OutTile { borrow: PhantomData, ..*self }
    }

    /// Where `rows` numbers of `token` from `row` lie, for writing; exclusively, as long as the tile is borrowed.
    ///
    /// # Panics
    /// When they are not in the tile.
    #[inline(always)]
    pub(crate) fn line(&mut self, token: usize, row: usize, rows: usize) -> &mut [f32] {
        assert!(token < self.tokens && row <= self.rows && rows <= self.rows - row, "numbers outside of the tile");
        // SAFETY: checked above; the tile is an exclusive borrow of these numbers, and they are initialised, as the
        // slice was.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(token * self.stride + row), rows) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_disjoint_and_cover() {
        let mut out = vec![0.0; 3 * 10];
        let (mut a, b) = OutTile::new(&mut out, 3, 10, 7).split_at(2);
        let (mut b, mut c) = b.split_at(5);
        assert_eq!((a.rows(), b.rows(), c.rows()), (2, 5, 0));
        for t in 0..3 {
            a.line(t, 0, 2).fill(1.0);
            b.reborrow().line(t, 1, 4).fill(2.0);
            c.line(t, 0, 0).fill(3.0);
        }
        for line in out.chunks(10) {
            assert_eq!(line, [1.0, 1.0, 0.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]);
        }
    }

    #[test]
    fn tokens_are_split_too() {
        let mut out = vec![0.0; 3 * 4];
        let (mut a, b) = OutTile::new(&mut out, 3, 4, 2).split_tokens(1);
        let (mut b, c) = b.split_tokens(2);
        assert_eq!((a.tokens(), b.tokens(), c.tokens()), (1, 2, 0));
        a.line(0, 0, 2).fill(1.0);
        b.line(1, 1, 1).fill(2.0);
        assert_eq!(out, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn a_short_last_line_is_enough() {
        OutTile::new(&mut [0.0; 13], 2, 10, 3).line(1, 0, 3).fill(1.0);
        assert_eq!(OutTile::new(&mut [], 0, 10, 3).split_at(3).0.tokens(), 0);
    }

    #[test]
    #[should_panic(expected = "2 lines of 10")]
    fn a_short_output_is_refused() {
        OutTile::new(&mut [0.0; 12], 2, 10, 3);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn nothing_outside() {
        OutTile::new(&mut [0.0; 20], 2, 10, 3).line(1, 1, 3);
    }
}

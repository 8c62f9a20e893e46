//! Small integers in the words of checkpoints.

/// Integers of a few bits in words of 32 bits, one after the other from the lowest bit up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fields {
    pub(super) bits: u8,
    /// Runs of integers: rows of words, or columns of them.
    pub(super) lines: usize,
    /// Integers in a run.
    pub(super) len: usize,
    /// Whether a run goes down a column of words.
    pub(super) down: bool,
    /// Whether no integer runs across words: what is left of a word is empty.
    pub(super) whole: bool,
}

impl Fields {
    fn words(&self) -> usize {
        let bits = usize::from(self.bits);
        if self.whole { self.len.div_ceil(32 / bits) } else { self.len.saturating_mul(bits).div_ceil(32) }
    }

    /// The shape of the words.
    pub(super) fn shape(&self) -> Vec<usize> {
        if self.down { vec![self.words(), self.lines] } else { vec![self.lines, self.words()] }
    }

    /// The integers, `[lines, len]`. There are as many words as the shape says.
    pub(super) fn unpack(&self, words: &[u32]) -> Vec<u8> {
        let (bits, per_line) = (usize::from(self.bits), self.words());
        let mask = (1u64 << bits) - 1;
        let word = |line: usize, w: usize| {
            let at = if self.down { w * self.lines + line } else { line * per_line + w };
            u64::from(words.get(at).copied().unwrap_or(0))
        };
        let mut out = Vec::with_capacity(self.lines * self.len);
        for line in 0..self.lines {
            for i in 0..self.len {
                let (w, shift) =
                    if self.whole { (i / (32 / bits), i % (32 / bits) * bits) } else { (i * bits / 32, i * bits % 32) };
                let mut window = word(line, w) >> shift;
                if shift + bits > 32 {
                    window |= word(line, w + 1) << (32 - shift);
                }
                out.push((window & mask) as u8);
            }
        }
        out
    }

    /// Words with a 1 in every field: what they differ by when each field differs by one. For widths that divide a
    /// word.
    pub(super) fn ones(&self) -> u32 {
        (0..32 / u32::from(self.bits)).fold(0, |ones, i| ones | 1 << (i * u32::from(self.bits)))
    }
}

/// The codes of `gemv_fast`, `[rows, cols]`, out of halfwords `[rows/4, cols]`: four rows lie interleaved in blocks of
/// 64 columns, and a halfword holds columns that are 8 apart.
pub(super) fn unpack_fast(words: &[u16], rows: usize, cols: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows * cols);
    for n in 0..rows {
        for k in 0..cols {
            let word = 64 * (k / 64) + 16 * (n % 4) + 8 * (k % 64 / 32) + k % 8;
            let halfword = words.get(n / 4 * cols + word).copied().unwrap_or(0);
            out.push((halfword >> (4 * (k % 32 / 8)) & 15) as u8);
        }
    }
    out
}

/// `[rows, cols]` from `[cols, rows]`.
pub(super) fn transpose<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..rows)
        .flat_map(|r| (0..cols).map(move |c| (r, c)))
        .filter_map(|(r, c)| values.get(c * rows + r).copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(bits: u8, len: usize) -> Fields {
        Fields { bits, lines: 1, len, down: false, whole: false }
    }

    #[test]
    fn words_of_counting_codes() {
        let counting = |modulus: u8, len: usize| (0..len).map(|i| i as u8 % modulus).collect::<Vec<_>>();
        assert_eq!(fields(4, 8).unpack(&[0x7654_3210]), counting(8, 8));
        assert_eq!(fields(2, 16).unpack(&[0xe4e4_e4e4]), counting(4, 16));
        // Dense: 32 codes of three bits in three words.
        let dense = [0x88fa_c688, 0xc688_fac6, 0xfac6_88fa];
        assert_eq!(fields(3, 32).unpack(&dense), counting(8, 32));
        assert_eq!(fields(3, 32).shape(), [1, 3]);
        // Whole: ten codes in a word.
        let whole = Fields { whole: true, ..fields(3, 12) };
        assert_eq!(whole.shape(), [1, 2]);
        assert_eq!(whole.unpack(&[0o10_7654_3210, 0o32]), counting(8, 12));
        assert_eq!((fields(4, 8).ones(), fields(8, 4).ones()), (0x1111_1111, 0x0101_0101));
    }

    #[test]
    fn columns_of_words() {
        let down = Fields { lines: 2, down: true, ..fields(4, 16) };
        assert_eq!(down.shape(), [2, 2]);
        let codes = down.unpack(&[0x7654_3210, 0x0123_4567, 0xfedc_ba98, 0x89ab_cdef]);
        assert_eq!(codes[..16], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(codes[16..], [7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8]);
        assert_eq!(transpose(&[1, 2, 3, 4, 5, 6], 2, 3), [1, 3, 5, 2, 4, 6]);
    }
}

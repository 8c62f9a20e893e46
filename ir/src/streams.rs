//! Rows of integers of a few bits as little-endian bit streams: the codes of [`crate::Layout::Rows`].

/// Bytes of a row of `cols` integers.
pub fn row_bytes(cols: usize, bits: u8) -> usize {
    cols.saturating_mul(usize::from(bits)).div_ceil(8)
}

/// The streams, row after row, of `[rows, cols]` integers of at most 8 bits. Each row begins at a byte.
pub fn pack(values: &[u8], cols: usize, bits: u8) -> Vec<u8> {
    let rows = values.len() / cols.max(1);
    let mut out = Vec::with_capacity(rows * row_bytes(cols, bits));
    for row in values.chunks(cols.max(1)) {
        // Integers enter at the top of the window, whole bytes leave at the bottom.
        let (mut window, mut filled) = (0u32, 0u8);
        for value in row {
            window |= u32::from(*value) << filled;
            filled += bits;
            while filled >= 8 {
                out.push(window as u8);
                window >>= 8;
                filled -= 8;
            }
        }
        if filled > 0 {
            out.push(window as u8);
        }
    }
    out
}

/// The integers, `[rows, cols]`, that [`pack`] wrote.
pub fn unpack(bytes: &[u8], cols: usize, bits: u8) -> Vec<u8> {
    let mask = (1u32 << bits) - 1;
    let width = row_bytes(cols, bits).max(1);
    let mut out = Vec::with_capacity(bytes.len() / width * cols);
    for row in bytes.chunks(width) {
        let (mut window, mut filled) = (0u32, 0u8);
        let mut bytes = row.iter();
        for _ in 0..cols {
            if filled < bits {
                window |= u32::from(bytes.next().copied().unwrap_or(0)) << filled;
                filled += 8;
            }
            out.push((window & mask) as u8);
            window >>= bits;
            filled -= bits;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_run_across_bytes() {
        // 5 | 4 | 3 | 2 | 1 from the top: 101 100 011 010 001.
        assert_eq!(pack(&[1, 2, 3, 4, 5], 5, 3), [0b1101_0001, 0b0101_1000]);
        assert_eq!(pack(&[1, 2, 3, 15], 2, 4), [0x21, 0xf3]);
    }

    #[test]
    fn packing_loses_nothing() {
        for bits in [2, 3, 4, 5, 8] {
            for cols in [1, 5, 8, 13] {
                let mask = (1u32 << bits) - 1;
                let values: Vec<u8> = (0..3 * cols as u32).map(|i| ((i * 37) & mask) as u8).collect();
                let bytes = pack(&values, cols, bits);
                assert_eq!(bytes.len(), 3 * row_bytes(cols, bits));
                assert_eq!(unpack(&bytes, cols, bits), values);
            }
        }
    }
}

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
        return Err(LayoutError(format!(
            "the awq_gemm layout packs 8 output channels to a word, {rows} do not divide by 8"
        )));
    }
    if let Group::Size(g) = quant.group
        && !cols.is_multiple_of(g as usize)
    {
        return Err(LayoutError(format!(
            "the awq_gemm layout needs whole groups, {cols} input channels do not divide by {g}"
        )));
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

#[cfg(test)]
mod tests {
    use awqc_ir::TensorInfo;

    use super::*;

    const QUANT: Quant = Quant { bits: 4, symmetric: false, group: Group::Size(2) };

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    #[test]
    fn a_word_of_counting_columns() {
        let c = Codes {
            quant: QUANT,
            rows: 8,
            cols: 2,
            codes: (0..8).flat_map(|r| [r, 15 - r]).collect(),
            scales: vec![1.0; 8],
            zeros: (0..8).collect(),
        };
        let parts = pack(&c).unwrap();
        assert_eq!(parts[0].tensor.bytes, bytes(&[0x7531_6420, 0x8ace_9bdf]));
        assert_eq!(parts[1].tensor.bytes, bytes(&[0x7531_6420]));
    }

    /// Sixteen output and four input channels, two groups, cut out of a tensor that AutoAWQ 0.2.9 packed, with the
    /// codes that went in and the numbers that its formula gives.
    #[test]
    fn agrees_with_autoawq() {
        let (words, zeros, scales, codes, numbers) = (QWEIGHT, QZEROS, SCALES, CODES, NUMBERS);
        let part = |suffix: &'static str| {
            let (stored, shape, bytes) = match suffix {
                ".qweight" => (Stored::I32, vec![4, 2], bytes(&words)),
                ".qzeros" => (Stored::I32, vec![2, 2], bytes(&zeros)),
                _ => (Stored::F16, vec![2, 16], scales.iter().flat_map(|s| s.to_le_bytes()).collect()),
            };
            Ok(RawTensor { info: TensorInfo { stored, shape }, bytes })
        };
        let c = unpack(QUANT, 16, 4, part).unwrap();
        assert_eq!(c.codes, codes);
        assert_eq!(c.decode(), numbers.map(f32::from_bits));
        let parts = pack(&c).unwrap();
        for stored in parts {
            assert_eq!(stored.tensor.bytes, part(stored.suffix).unwrap().bytes, "{}", stored.suffix);
        }
    }

    const QWEIGHT: [u32; 8] =
        [0x77856965, 0xa5198557, 0xa9d48948, 0x6647b095, 0x40344efe, 0xd6b27779, 0x76596d9d, 0xa6b7b934];
    const QZEROS: [u32; 4] = [0x77757798, 0x987774a7, 0x67886bac, 0x96a67759];
    const SCALES: [u16; 32] = [
        0x231f, 0x25a2, 0x2379, 0x2580, 0x23c9, 0x2659, 0x2339, 0x229e, 0x258f, 0x270c, 0x2419, 0x20cf, 0x2187, 0x24e0,
        0x21da, 0x2417, 0x28d1, 0x21f0, 0x2353, 0x26ab, 0x26c0, 0x24ea, 0x2593, 0x23e4, 0x28ce, 0x24dc, 0x25a2, 0x22fe,
        0x20d4, 0x254b, 0x246d, 0x20f5,
    ];
    const CODES: [u8; 64] = [
        5, 8, 14, 13, 5, 4, 4, 9, 6, 4, 15, 9, 8, 13, 3, 5, 9, 9, 14, 13, 7, 9, 0, 6, 6, 8, 4, 6, 7, 10, 4, 7, 7, 5, 9,
        4, 9, 7, 2, 7, 5, 9, 7, 3, 1, 4, 11, 11, 5, 0, 7, 9, 5, 6, 6, 6, 8, 11, 7, 11, 10, 6, 13, 10,
    ];
    const NUMBERS: [u32; 64] = [
        0xbd2ae800, 0x00000000, 0x3d9a2000, 0x3d1a2000, 0x00000000, 0xbcb44000, 0xbd3e0000, 0x3c3e0000, 0xbd335800,
        0xbd957400, 0x3d927c00, 0xbc6a6000, 0x3cb00000, 0x3e040000, 0xbe055c00, 0xbda00800, 0x3cf92000, 0x3cf92000,
        0x3da20000, 0x3d580000, 0x00000000, 0x3d4b2000, 0xbe099800, 0xbc9d4000, 0xbc672000, 0x3c672000, 0xbd326000,
        0x00000000, 0x00000000, 0x3d1ed000, 0xbcfc8000, 0x3c7c8000, 0x00000000, 0xbd31e000, 0x00000000, 0xbe403000,
        0x3d618000, 0x00000000, 0xbd9b8000, 0x3c9b8000, 0xbda3e800, 0xbc832000, 0x3d344000, 0xbd344000, 0xbd66d000,
        0xbce6d000, 0x3c5fc000, 0x3c5fc000, 0x3c30e000, 0xbd30e000, 0x00000000, 0x3c9a8000, 0xbd6a0000, 0xbd1c0000,
        0x00000000, 0x00000000, 0x3c3b4000, 0x3d3b4000, 0x00000000, 0x3d8da000, 0x3c82e000, 0xbd445000, 0x3d1ea000,
        0x3c1ea000,
    ];

    #[test]
    fn what_does_not_fit_is_refused() {
        let symmetric = Quant { symmetric: true, ..QUANT };
        assert!(fits(symmetric, 8, 4).unwrap_err().0.contains("asymmetric"));
        assert!(fits(Quant { bits: 3, ..QUANT }, 8, 4).is_err());
        assert!(fits(QUANT, 12, 4).unwrap_err().0.contains("12"));
        assert!(fits(QUANT, 8, 5).unwrap_err().0.contains("whole groups"));
        assert!(fits(Quant { group: Group::Row, ..QUANT }, 8, 5).is_ok());
    }
}

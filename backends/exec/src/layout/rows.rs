//! `rows`: each row one little-endian bit stream along the input axis.

use awqc_ir::{Quant, RawTensor, Stored, streams};
use awqc_passes::rtn::Codes;

use super::{LayoutError, Part, expect, read_scales, scale_bytes, tensor};

pub(super) fn pack(c: &Codes) -> Result<Vec<Part>, LayoutError> {
    let bytes = streams::pack(&c.codes, c.cols, c.quant.bits);
    let width = streams::row_bytes(c.cols, c.quant.bits);
    let codes = Part { suffix: ".codes", tensor: tensor(Stored::U8, [c.rows, width], bytes) };
    Ok([codes].into_iter().chain(grid(c)?).collect())
}

/// Scales and, if asymmetric, zero points, row by row.
pub(super) fn grid(c: &Codes) -> Result<Vec<Part>, LayoutError> {
    let shape = [c.rows, c.groups()];
    let scales = scale_bytes(c.scales.iter().copied())?;
    let mut parts = vec![Part { suffix: ".scales", tensor: tensor(Stored::F16, shape, scales) }];
    if !c.quant.symmetric {
        parts.push(Part { suffix: ".zeros", tensor: tensor(Stored::U8, shape, c.zeros.clone()) });
    }
    Ok(parts)
}

pub(super) fn unpack(
    quant: Quant,
    rows: usize,
    cols: usize,
    mut part: impl FnMut(&'static str) -> Result<RawTensor, LayoutError>,
) -> Result<Codes, LayoutError> {
    let stored = part(".codes")?;
    expect(".codes", &stored, Stored::U8, &[rows, streams::row_bytes(cols, quant.bits)])?;
    let codes = streams::unpack(&stored.bytes, cols, quant.bits);
    let (scales, zeros) = read_grid(quant, rows, cols, part)?;
    Ok(Codes { quant, rows, cols, codes, scales, zeros })
}

/// The scales and zero points that [`grid`] wrote.
pub(super) fn read_grid(
    quant: Quant,
    rows: usize,
    cols: usize,
    mut part: impl FnMut(&'static str) -> Result<RawTensor, LayoutError>,
) -> Result<(Vec<f32>, Vec<u8>), LayoutError> {
    let (bits, groups) = (u32::from(quant.bits), quant.group.count(cols));
    let scales = part(".scales")?;
    expect(".scales", &scales, Stored::F16, &[rows, groups])?;
    let zeros = if quant.symmetric {
        vec![1 << (quant.bits - 1); rows * groups]
    } else {
        let zeros = part(".zeros")?;
        expect(".zeros", &zeros, Stored::U8, &[rows, groups])?;
        if let Some(z) = zeros.bytes.iter().find(|z| u32::from(**z) >> bits != 0) {
            return Err(LayoutError(format!(
                "part `.zeros` holds {z}, the largest zero point of {bits} bits is {}",
                (1u32 << bits) - 1
            )));
        }
        zeros.bytes
    };
    Ok((read_scales(&scales.bytes)?, zeros))
}

#[cfg(test)]
mod tests {
    use awqc_ir::Group;

    use super::*;

    #[test]
    fn three_bit_codes_run_across_bytes() {
        let quant = Quant { bits: 3, symmetric: false, group: Group::Row };
        let c = Codes { quant, rows: 1, cols: 5, codes: vec![1, 2, 3, 4, 5], scales: vec![1.0], zeros: vec![7] };
        let parts = pack(&c).unwrap();
        // 5 | 4 | 3 | 2 | 1 from the top: 101 100 011 010 001.
        assert_eq!(parts[0].tensor.bytes, [0b1101_0001, 0b0101_1000]);
        assert_eq!(parts[0].tensor.info.shape, [1, 2]);
        assert_eq!(parts[2].tensor.bytes, [7]);
    }

    #[test]
    fn symmetric_weights_have_no_zeros() {
        let quant = Quant { bits: 4, symmetric: true, group: Group::Size(2) };
        let c = Codes { quant, rows: 1, cols: 3, codes: vec![15, 0, 8], scales: vec![1.0, 0.5], zeros: vec![8, 8] };
        let parts = pack(&c).unwrap();
        assert_eq!(parts.iter().map(|p| p.suffix).collect::<Vec<_>>(), [".codes", ".scales"]);
        assert_eq!(parts[0].tensor.bytes, [0x0f, 0x08]);
    }
}

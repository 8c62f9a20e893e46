//! AutoAWQ and llm-awq: four bits with zero points, in three layouts. `gemm`: words of eight outputs; it is a layout of
//! the language. `gemv`: words of eight inputs, in order. `gemv_fast` (llm-awq's second): four rows interleaved in
//! halfwords, and products of scale and zero point in place of zero points.

use awqc_ir::{Group, Layout, Quant, Stored};

use super::fields::Fields;
use super::recoded::{Codes, Order, Recoded, Table, Zeros};
use super::settings::Settings;
use super::{FLOATS, Held, Matrix, Packed};
use crate::error::ImportError;

/// See the module documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Awq {
    pub(super) quant: Quant,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Gemm,
    Gemv,
    GemvFast,
}

/// Codes in a word.
const PER_WORD: usize = 8;

impl Awq {
    pub(super) fn read(settings: Settings<'_>) -> Result<Self, ImportError> {
        let version = match settings.text("version")?.as_deref() {
            None | Some("gemm") => Version::Gemm,
            Some("gemv") => Version::Gemv,
            Some("gemv_fast") => Version::GemvFast,
            Some(other) => return Err(settings.refuse(format!("the model is quantized in the `{other}` layout"))),
        };
        let bits = settings.bits(&["bits", "w_bit"], &[4])?.unwrap_or(4);
        if settings.flag("zero_point")? == Some(false) {
            return Err(settings.refuse("the model is quantized by `awq` without zero points"));
        }
        let group = settings.group(&["group_size", "q_group_size"])?.unwrap_or(Group::Size(128));
        Ok(Self { quant: Quant { bits, symmetric: false, group }, version })
    }

    pub(super) fn packed(&self, m: Matrix<'_>) -> Result<Packed, String> {
        let Matrix { stem, rows, cols, source } = m;
        let group = self.quant.group;
        if let Group::Size(g) = group
            && !cols.is_multiple_of(g as usize)
        {
            return Err(format!("`{stem}`: {cols} inputs are no multiple of the group size {g}"));
        }
        let groups = group.count(cols);
        let mut tensors: Vec<String> = [".qweight", ".qzeros", ".scales"].map(|s| m.name(s)).into();
        let held = match self.version {
            Version::Gemm => {
                if !rows.is_multiple_of(PER_WORD) {
                    return Err(format!("`{stem}`: {rows} outputs are no multiple of {PER_WORD}"));
                }
                for (suffix, stored, shape) in Layout::AwqGemm.parts(self.quant, rows, cols) {
                    m.expect(suffix, &[stored], &shape)?;
                }
                Held::AsIs(self.quant, Layout::AwqGemm)
            }
            Version::Gemv => {
                let codes = Fields { bits: 4, lines: rows, len: cols, down: false, whole: false };
                m.expect(".qweight", &[Stored::I32], &codes.shape())?;
                // Rows of zero points are padded to what the kernel loads at once; any padding is read.
                let padded = width(m, ".scales", 1).filter(|w| *w >= groups && w.is_multiple_of(PER_WORD));
                let padded = padded.unwrap_or_else(|| groups.next_multiple_of(PER_WORD));
                let zeros = Fields { bits: 4, lines: rows, len: padded, down: false, whole: false };
                m.expect(".scales", &FLOATS, &[rows, padded])?;
                m.expect(".qzeros", &[Stored::I32], &zeros.shape())?;
                Held::Recoded(Recoded {
                    quant: self.quant,
                    rows,
                    cols,
                    scattered: None,
                    codes: Codes::Fields(m.name(".qweight"), codes),
                    scales: Table { name: m.name(".scales"), order: Order::Rows(padded) },
                    zeros: Zeros::Fields { name: m.name(".qzeros"), fields: zeros, by_group: false, less_one: false },
                })
            }
            Version::GemvFast => {
                if !rows.is_multiple_of(4) || !cols.is_multiple_of(64) {
                    return Err(format!(
                        "`{stem}`: gemv_fast needs a multiple of 4 outputs and of 64 inputs, not {rows} and {cols}"
                    ));
                }
                // llm-awq's name for the same.
                let zeros = if source.info(&m.name(".qzeros")).is_none() && m.has(".scaled_zeros") {
                    ".scaled_zeros"
                } else {
                    ".qzeros"
                };
                tensors[1] = m.name(zeros);
                m.expect(".qweight", &[Stored::I16], &[rows / 4, cols])?;
                let padded = width(m, ".scales", 0).filter(|w| *w >= groups).unwrap_or(groups);
                m.expect(".scales", &FLOATS, &[padded, rows])?;
                m.expect(zeros, &FLOATS, &[padded, rows])?;
                Held::Recoded(Recoded {
                    quant: self.quant,
                    rows,
                    cols,
                    scattered: None,
                    codes: Codes::Fast(m.name(".qweight")),
                    scales: Table { name: m.name(".scales"), order: Order::Groups(padded) },
                    zeros: Zeros::Scaled(Table { name: m.name(zeros), order: Order::Groups(padded) }),
                })
            }
        };
        Ok(Packed { tensors, held })
    }
}

/// The length of an axis of a part.
fn width(m: Matrix<'_>, suffix: &str, axis: usize) -> Option<usize> {
    m.source.info(&m.name(suffix))?.shape.get(axis).copied()
}

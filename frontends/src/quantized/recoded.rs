//! A packed weight of another program's format: where its codes, scales and zero points are, and how they read as the
//! `rows` layout of the language, or as floats.

use awqc_ir::{Quant, RawTensor, Stored, TensorError, TensorInfo, TensorSource, streams};
use half::f16;

use super::fields::{Fields, transpose, unpack_fast};

/// Where the parts of a `[rows, cols]` weight are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Recoded {
    pub(crate) quant: Quant,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// The group of each column, where groups are not runs of neighbours. Such a weight is read as floats.
    pub(crate) scattered: Option<Vec<u32>>,
    pub(super) codes: Codes,
    pub(super) scales: Table,
    pub(super) zeros: Zeros,
}

/// Codes from 0.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Codes {
    /// Runs of them are rows of the weight.
    Fields(String, Fields),
    /// The halfwords of `gemv_fast`.
    Fast(String),
}

/// One number a row and group.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Table {
    pub(super) name: String,
    pub(super) order: Order,
}

/// How the numbers of a table lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// `[rows, width]`, the first `groups` of each row in use.
    Rows(usize),
    /// `[width, rows]`, the first `groups` lines in use.
    Groups(usize),
    /// One number for all.
    One,
}

/// Zero points.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Zeros {
    /// The middle of the codes: a symmetric weight.
    Middle,
    /// In words: runs are groups (`[groups, rows]`) or rows (`[rows, width]`). `less_one`: each word was stored with 1
    /// taken from every field.
    Fields { name: String, fields: Fields, by_group: bool, less_one: bool },
    /// `-scale * zero`.
    Scaled(Table),
    /// Signed, counted from the middle of the codes.
    Signed(Table),
}

impl Recoded {
    fn groups(&self) -> usize {
        self.quant.group.count(self.cols)
    }

    /// The parts of the layout `rows`, by suffix.
    pub(super) fn parts(&self) -> Vec<(&'static str, TensorInfo)> {
        let parts = awqc_ir::Layout::Rows.parts(self.quant, self.rows, self.cols);
        parts.into_iter().map(|(suffix, stored, shape)| (suffix, TensorInfo { stored, shape })).collect()
    }

    /// One of these parts.
    pub(super) fn part(
        &self,
        suffix: &str,
        info: TensorInfo,
        source: &dyn TensorSource,
    ) -> Result<RawTensor, TensorError> {
        let bytes = match suffix {
            ".codes" => streams::pack(&self.codes(source)?, self.cols, self.quant.bits),
            ".scales" => self.scales(source)?.into_iter().flat_map(f16::to_le_bytes).collect(),
            _ => self.zeros(source)?,
        };
        Ok(RawTensor { info, bytes })
    }

    /// The weight as f32 `[rows, cols]`: `(code - zero) * scale`, which f32 holds exactly.
    pub(super) fn floats(&self, source: &dyn TensorSource) -> Result<RawTensor, TensorError> {
        let (codes, scales, zeros) = (self.codes(source)?, self.scales(source)?, self.zeros(source)?);
        let groups = self.groups();
        let len = self.quant.group.len(self.cols);
        let middle = 1u8 << (self.quant.bits - 1);
        let mut bytes = Vec::with_capacity(codes.len() * 4);
        for (at, code) in codes.iter().enumerate() {
            let (row, col) = (at / self.cols, at % self.cols);
            let group = match &self.scattered {
                Some(of) => of.get(col).map_or(0, |g| *g as usize),
                None => col / len,
            };
            let zero = zeros.get(row * groups + group).copied().unwrap_or(middle);
            let scale = scales.get(row * groups + group).map_or(0.0, |s| s.to_f32());
            bytes.extend(((f32::from(*code) - f32::from(zero)) * scale).to_le_bytes());
        }
        Ok(RawTensor { info: TensorInfo { stored: Stored::F32, shape: vec![self.rows, self.cols] }, bytes })
    }

    fn codes(&self, source: &dyn TensorSource) -> Result<Vec<u8>, TensorError> {
        Ok(match &self.codes {
            Codes::Fields(name, fields) => fields.unpack(&words(source, name)?),
            Codes::Fast(name) => {
                let raw = source.read(name)?;
                let halfwords: Vec<u16> = raw.bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
                unpack_fast(&halfwords, self.rows, self.cols)
            }
        })
    }

    /// Scales `[rows, groups]`, rounded to f16 where they are stored in another type.
    fn scales(&self, source: &dyn TensorSource) -> Result<Vec<f16>, TensorError> {
        let round = |s: f32| {
            let h = f16::from_f32(s);
            if !h.is_finite() || (s != 0.0 && h.to_f32() == 0.0) {
                let name = &self.scales.name;
                return Err(TensorError(format!(
                    "`{name}` holds {s}; scales are kept as f16, which cannot hold it: use the float model"
                )));
            }
            Ok(h)
        };
        self.table(&self.scales, source.read_f32(&self.scales.name)?).into_iter().map(round).collect()
    }

    /// Zero points `[rows, groups]`; empty for a symmetric weight.
    fn zeros(&self, source: &dyn TensorSource) -> Result<Vec<u8>, TensorError> {
        let (rows, groups, largest) = (self.rows, self.groups(), (1i64 << self.quant.bits) - 1);
        let fits = |name: &str, zero: f64| {
            if zero.fract() == 0.0 && zero >= 0.0 && zero <= largest as f64 {
                return Ok(zero as u8);
            }
            Err(TensorError(format!(
                "`{name}` holds a zero point of {zero}; an integer from 0 to {largest} is needed: use the float model"
            )))
        };
        match &self.zeros {
            Zeros::Middle => Ok(Vec::new()),
            Zeros::Fields { name, fields, by_group, less_one } => {
                let mut words = words(source, name)?;
                if *less_one {
                    words.iter_mut().for_each(|w| *w = w.wrapping_add(fields.ones()));
                }
                let zeros = fields.unpack(&words);
                Ok(if *by_group {
                    transpose(&zeros, rows, groups)
                } else {
                    zeros.chunks(fields.len.max(1)).flat_map(|row| row.iter().take(groups).copied()).collect()
                })
            }
            Zeros::Scaled(table) => {
                let scaled = self.table(table, source.read_f32(&table.name)?);
                let zero = |(scale, scaled): (f16, f32)| {
                    // The product was rounded, so the quotient is only near an integer.
                    let zero = -f64::from(scaled) / f64::from(scale.to_f32());
                    let whole = if scale.to_f32() == 0.0 { 0.0 } else { zero.round() };
                    let near = (zero - whole).abs() <= 0.05 || scale.to_f32() == 0.0;
                    fits(&table.name, if near { whole } else { zero })
                };
                self.scales(source)?.into_iter().zip(scaled).map(zero).collect()
            }
            Zeros::Signed(table) => {
                let raw = source.read(&table.name)?;
                let values = raw.to_i32().ok_or_else(|| TensorError(format!("`{}` holds no integers", table.name)))?;
                let middle = 1 << (self.quant.bits - 1);
                self.table(table, values)
                    .into_iter()
                    .map(|z| fits(&table.name, f64::from(z) + f64::from(middle)))
                    .collect()
            }
        }
    }

    /// The numbers of a table as `[rows, groups]`.
    fn table<T: Copy>(&self, table: &Table, values: Vec<T>) -> Vec<T> {
        let (rows, groups) = (self.rows, self.groups());
        match table.order {
            Order::Rows(width) => values.chunks(width.max(1)).flat_map(|r| r.iter().take(groups).copied()).collect(),
            Order::Groups(_) => transpose(&values[..values.len().min(rows * groups)], rows, groups),
            Order::One => values.iter().take(1).flat_map(|v| std::iter::repeat_n(*v, rows * groups)).collect(),
        }
    }
}

fn words(source: &dyn TensorSource, name: &str) -> Result<Vec<u32>, TensorError> {
    Ok(source.read(name)?.bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
}

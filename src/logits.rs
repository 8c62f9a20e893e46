//! Saved logits: what a base model says of a text, so that others are compared with it without running it again.
//!
//! A safetensors file. For `n` windows of `len` tokens and a vocabulary of `v` there is a row for every target, all
//! positions of a window but its last, `n·(len−1)` in all:
//!
//! | tensor | | |
//! |---|---|---|
//! | `input_ids` | i32 `[n,len]` | the tokens, by which another text is noticed |
//! | `rows` | f32 `[rows,3]` | largest log-probability, step of the codes, negative log likelihood of the target |
//! | `checks` | u32 `[rows,2]` | the most probable token, CRC-32 of the row's codes |
//! | `codes` | u16 `[rows,v]` | log-probability = largest − (65535 − code)·step |
//!
//! The codes of a row span what lies within [`SPAN`] nats of its most probable token (less probable ones get code 0),
//! so a log-probability is off by 0.0003 nats at most, half the bytes of f32 for an error of the divergence far below
//! its own standard error; log likelihoods and top tokens are exact. Written and read row by row.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use awqc_exec::host::math::log_sum_exp;
use serde_json::{Value as Json, json};
use tempfile::NamedTempFile;

use crate::failure::{Exit, Failure};
use crate::files;
use crate::metrics::{Expected, top};

/// Log-probabilities further than this below a row's largest are not told apart: e⁻⁴⁰ of the most probable token.
pub const SPAN: f32 = 40.0;

/// Name and version of the format.
const FORMAT: &str = "awqc-logits 1";

/// Largest header that is believed.
const MAX_HEADER: u64 = 1 << 16;

/// One row as it lies in a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    largest: f32,
    step: f32,
    nll: f32,
    top: u32,
    /// Little-endian u16.
    codes: Vec<u8>,
}

impl Row {
    /// The row of these logits; `None` if there is no such target.
    pub fn of(logits: &[f32], target: usize) -> Option<Self> {
        let z = log_sum_exp(logits);
        let nll = (z - f64::from(*logits.get(target)?)) as f32;
        let (lo, hi) = logits.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
        let step = (hi - lo.max(hi - SPAN)) / 65535.0;
        let code = |v: &f32| if step > 0.0 { 65535 - ((hi - v) / step).round().min(65535.0) as u16 } else { 65535 };
        let codes = logits.iter().flat_map(|v| code(v).to_le_bytes()).collect();
        let largest = (f64::from(hi) - z) as f32;
        Some(Self { largest, step, nll, top: u32::try_from(top(logits)).ok()?, codes })
    }

    /// What the row says; its log-probabilities go to `into`.
    pub fn decode<'a>(&self, into: &'a mut Vec<f32>) -> Expected<'a> {
        let value = |b: &[u8; 2]| self.largest - f32::from(65535 - u16::from_le_bytes(*b)) * self.step;
        into.clear();
        into.extend(self.codes.as_chunks::<2>().0.iter().map(value));
        Expected { logits: into, nll: f64::from(self.nll), top: self.top as usize }
    }
}

/// Where everything lies, which follows from the sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    windows: u64,
    length: u64,
    vocabulary: u64,
}

/// Name, type, shape and bytes of a tensor.
type Entry = (&'static str, &'static str, [u64; 2], u64);

impl Layout {
    fn rows(self) -> u64 {
        self.windows * (self.length - 1)
    }

    /// The tensors, in order; `None` if no file could be so large.
    fn tensors(self) -> Option<[Entry; 4]> {
        let (rows, v) = (self.windows.checked_mul(self.length.checked_sub(1)?)?, self.vocabulary);
        let bytes = |a: u64, b: u64, size: u64| a.checked_mul(b)?.checked_mul(size);
        Some([
            ("input_ids", "I32", [self.windows, self.length], bytes(self.windows, self.length, 4)?),
            ("rows", "F32", [rows, 3], bytes(rows, 3, 4)?),
            ("checks", "U32", [rows, 2], bytes(rows, 2, 4)?),
            ("codes", "U16", [rows, v], bytes(rows, v, 2)?),
        ])
    }

    /// The header with its length in front, and where each tensor begins, with the file's length last.
    fn header(self, model: &str) -> Option<(Vec<u8>, [u64; 5])> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), json!({ "format": FORMAT, "model": model }));
        let mut starts = [0u64; 5];
        for (i, (name, dtype, shape, bytes)) in self.tensors()?.into_iter().enumerate() {
            let end = starts[i].checked_add(bytes)?;
            header.insert(name.into(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [starts[i], end] }));
            starts[i + 1] = end;
        }
        let mut text = Json::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let base = text.len() as u64 + 8;
        let out = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        starts.iter_mut().for_each(|s| *s = s.saturating_add(base));
        Some((out, starts))
    }
}

/// Saved logits being written.
pub struct Saving {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    layout: Layout,
    starts: [u64; 5],
    rows: Vec<u8>,
    checks: Vec<u8>,
}

impl Saving {
    /// A file for the logits of these windows, which must be of one length. `model` is what people call the model.
    ///
    /// # Errors
    /// When the windows differ in length, or the file cannot be made.
    pub fn create(path: &Path, model: &str, windows: &[Vec<i32>], vocabulary: usize) -> Result<Self, Failure> {
        let length = windows.first().map_or(0, Vec::len);
        if length < 2 || windows.iter().any(|w| w.len() != length) {
            return Err(Failure::new(Exit::BadInput, "logits can be saved for windows of one length only"));
        }
        let layout = Layout { windows: windows.len() as u64, length: length as u64, vocabulary: vocabulary as u64 };
        let (header, starts) = layout
            .header(model)
            .ok_or_else(|| Failure::new(Exit::BadInput, "the logits are more than a file can hold"))?;
        let mut file = BufWriter::with_capacity(1 << 20, files::beside(path)?);
        let ids: Vec<u8> = windows.iter().flatten().flat_map(|id| id.to_le_bytes()).collect();
        file.write_all(&header)
            .and_then(|()| file.write_all(&ids))
            .and_then(|()| file.seek(SeekFrom::Start(starts[3])))
            .map_err(|e| Failure::io(path, &e))?;
        Ok(Self { path: path.to_owned(), file, layout, starts, rows: Vec::new(), checks: Vec::new() })
    }

    /// Appends the row of the next target.
    ///
    /// # Errors
    /// When it cannot be written, or is not of the vocabulary that the file is for.
    pub fn push(&mut self, row: &Row) -> Result<(), Failure> {
        if row.codes.len() as u64 != 2 * self.layout.vocabulary {
            return Err(Failure::new(Exit::Failed, "the model's logits changed their number"));
        }
        self.rows.extend([row.largest, row.step, row.nll].iter().flat_map(|v| v.to_le_bytes()));
        self.checks.extend([row.top, crc32fast::hash(&row.codes)].iter().flat_map(|v| v.to_le_bytes()));
        self.file.write_all(&row.codes).map_err(|e| Failure::io(&self.path, &e))
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// When rows are missing, or it cannot be written.
    pub fn finish(mut self) -> Result<(), Failure> {
        if self.checks.len() as u64 != 8 * self.layout.rows() {
            return Err(Failure::new(Exit::Failed, format!("{}: not every target was saved", self.path.display())));
        }
        let path = &self.path;
        self.file
            .seek(SeekFrom::Start(self.starts[1]))
            .and_then(|_| self.file.write_all(&self.rows))
            .and_then(|()| self.file.write_all(&self.checks))
            .map_err(|e| Failure::io(path, &e))?;
        let file = self.file.into_inner().map_err(|e| Failure::io(path, e.error()))?;
        files::persist(file, path)
    }
}

/// Saved logits being read, in order.
pub struct Saved {
    path: PathBuf,
    codes: BufReader<File>,
    layout: Layout,
    rows: Vec<u8>,
    checks: Vec<u8>,
    next: usize,
    /// The model that they are of.
    pub model: String,
}

impl Saved {
    /// Opens the logits of windows that begin with these.
    ///
    /// # Errors
    /// When the file is missing, damaged, no file of saved logits, or of other tokens.
    pub fn open(path: &Path, windows: &[Vec<i32>]) -> Result<Self, Failure> {
        let help = "write it again: awqc eval BASE --save-logits FILE, with the same text and --context";
        let bad = |why: String| Failure::new(Exit::BadInput, format!("{}: {why}", path.display())).help(help);
        let io = |e: std::io::Error| Failure::io(path, &e).help(help);
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut prefix = [0; 8];
        let no_header = || bad(format!("{size} bytes, which hold no header of saved logits"));
        file.read_exact(&mut prefix).map_err(|_| no_header())?;
        let length = u64::from_le_bytes(prefix);
        if length > MAX_HEADER || length > size - 8 {
            return Err(no_header());
        }
        let mut text = vec![0; usize::try_from(length).map_err(|_| no_header())?];
        file.read_exact(&mut text).map_err(io)?;
        let header: Json = serde_json::from_slice(&text).map_err(|e| bad(format!("damaged: its header: {e}")))?;
        if header["__metadata__"]["format"] != FORMAT {
            return Err(bad(format!("not a file of saved logits ({FORMAT})")));
        }
        let number = |tensor: &str, axis: usize| header[tensor]["shape"][axis].as_u64();
        let layout = || {
            let (windows, length) = (number("input_ids", 0)?, number("input_ids", 1)?);
            Some(Layout { windows, length, vocabulary: number("codes", 1)? })
        };
        let layout =
            layout().filter(|l| l.length > 1).ok_or_else(|| bad("damaged: its header lacks a shape".into()))?;
        let model = header["__metadata__"]["model"].as_str().unwrap_or_default().to_owned();
        let (want, starts) = layout.header(&model).ok_or_else(|| bad("damaged: impossible shapes".into()))?;
        if want.get(8..) != Some(&text[..]) {
            return Err(bad("damaged: its header contradicts itself".into()));
        }
        if size != starts[4] {
            return Err(bad(format!("damaged: {size} bytes long, its header describes {}", starts[4])));
        }
        // Sizes are believed now: the file has them.
        let mut part = |i: usize| -> Result<Vec<u8>, Failure> {
            let mut bytes = vec![0; (starts[i + 1] - starts[i]) as usize];
            file.read_exact(&mut bytes).map_err(io)?;
            Ok(bytes)
        };
        let (ids, rows, checks) = (part(0)?, part(1)?, part(2)?);
        let ids: Vec<i32> = ids.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        let length = layout.length as usize;
        if let Some(window) = windows.first().filter(|w| w.len() != length) {
            return Err(bad(format!("its windows have {length} tokens, those to evaluate have {}", window.len())));
        }
        if windows.len() as u64 > layout.windows {
            return Err(bad(format!("it holds {} windows, there are {} to evaluate", layout.windows, windows.len())));
        }
        let differs = |(a, b): (&[i32], &Vec<i32>)| a != b.as_slice();
        if let Some(at) = ids.chunks(length).zip(windows).position(differs) {
            return Err(bad(format!("it is of another text or tokenizer: window {at} holds other tokens")));
        }
        let codes = BufReader::with_capacity(1 << 20, file);
        Ok(Self { path: path.to_owned(), codes, layout, rows, checks, next: 0, model })
    }

    /// The number of tokens that the base model knows.
    pub fn vocabulary(&self) -> u64 {
        self.layout.vocabulary
    }

    /// The row of the next target.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn row(&mut self) -> Result<Row, Failure> {
        let bad = |why: String| {
            Failure::new(Exit::BadInput, format!("{}: damaged: {why}", self.path.display()))
                .help("write it again: awqc eval BASE --save-logits FILE")
        };
        let i = self.next;
        self.next += 1;
        let (Some([largest, step, nll]), Some([top, crc])) = (
            self.rows.as_chunks::<4>().0.as_chunks::<3>().0.get(i),
            self.checks.as_chunks::<4>().0.as_chunks::<2>().0.get(i),
        ) else {
            return Err(bad(format!("there is no row {i}")));
        };
        let (largest, step, nll) = (f32::from_le_bytes(*largest), f32::from_le_bytes(*step), f32::from_le_bytes(*nll));
        let mut codes = vec![0; 2 * self.layout.vocabulary as usize];
        self.codes.read_exact(&mut codes).map_err(|e| bad(format!("row {i} cannot be read: {e}")))?;
        if crc32fast::hash(&codes) != u32::from_le_bytes(*crc) {
            return Err(bad(format!("the checksum of row {i} differs")));
        }
        if !(largest.is_finite() && nll.is_finite() && (0.0..=SPAN).contains(&step)) {
            return Err(bad(format!("row {i} holds impossible numbers")));
        }
        Ok(Row { largest, step, nll, top: u32::from_le_bytes(*top), codes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_keeps_what_matters() {
        let logits = [3.0f32, -2.0, 3.0, -60.0, 1.25];
        let row = Row::of(&logits, 4).expect("the target exists");
        let exact = Expected::of(&logits, 4).expect("the target exists");
        let mut scratch = Vec::new();
        let got = row.decode(&mut scratch);
        assert_eq!(got.top, 0, "the first of two equal");
        assert!((got.nll - exact.nll).abs() < 1e-6);
        let z = log_sum_exp(&logits);
        for (i, (log, v)) in got.logits.iter().zip(&logits).enumerate().filter(|(i, _)| *i != 3) {
            let want = (f64::from(*v) - z) as f32;
            assert!((log - want).abs() < 4e-4, "{i}: {log} for {want}");
        }
        assert!((got.logits[3] - (got.logits[0] - SPAN)).abs() < 1e-4, "beyond the span is its end");
        assert!(Row::of(&logits, 5).is_none());
        // A row of equal logits has no step.
        let flat = Row::of(&[2.0; 4], 0).expect("the target exists");
        assert!(flat.decode(&mut scratch).logits.iter().all(|v| (v + 4f32.ln()).abs() < 1e-6));
    }
}

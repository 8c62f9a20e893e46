//! The GGUF container, versions 2 and 3: metadata, the tensor table, and where each tensor's bytes lie.
//!
//! Counts and lengths are compared with what is left of the file before anything is allocated for them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::blocks::GgmlType;
use crate::error::ImportError;
use crate::file::DataFile;

/// A metadata value. Arrays of numbers keep their type; arrays of strings are one text and the ends of its pieces.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    U64(u64),
    /// Any signed integer.
    I64(i64),
    /// 4-byte float.
    F32(f32),
    /// 8-byte float.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Str(String),
    /// An array of strings.
    Strs(Strings),
    /// An array of integers of at most 4 bytes; unsigned ones as the same bits.
    Ints(Vec<i32>),
    /// An array of 8-byte integers; unsigned ones as the same bits.
    Longs(Vec<i64>),
    /// An array of floats of 4 bytes.
    Floats(Vec<f32>),
    /// An array of floats of 8 bytes.
    Doubles(Vec<f64>),
    /// An array of bytes or truth values.
    Bytes(Vec<u8>),
}

/// Many strings in one allocation: a vocabulary.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Strings {
    text: String,
    ends: Vec<usize>,
}

impl Strings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).filter_map(|i| self.get(i))
    }

    /// The one at `index`.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).map_or(Some(0), |i| self.ends.get(i).copied())?;
        self.text.get(start..end)
    }

    fn push(&mut self, s: &str) {
        self.text.push_str(s);
        self.ends.push(self.text.len());
    }
}

impl<'a> FromIterator<&'a str> for Strings {
    fn from_iter<T: IntoIterator<Item = &'a str>>(iter: T) -> Self {
        let mut out = Strings::default();
        iter.into_iter().for_each(|s| out.push(s));
        out
    }
}

/// A tensor as the table describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Outermost axis first: the reverse of the file's order.
    pub shape: Vec<u64>,
    /// Element storage.
    pub ty: GgmlType,
    /// Position in the file.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// What the head of a file says.
#[derive(Debug)]
pub struct Header {
    /// By key.
    pub metadata: BTreeMap<String, Value>,
    /// By name.
    pub tensors: BTreeMap<String, Entry>,
}

/// Bytes read from the file at once.
const WINDOW: u64 = 1 << 20;
/// ggml tensors have at most this many axes.
const MAX_AXES: u32 = 4;

struct Cursor<'a> {
    file: &'a DataFile,
    at: u64,
    window: Vec<u8>,
    start: u64,
}

impl Cursor<'_> {
    fn bad(&self, problem: impl std::fmt::Display) -> ImportError {
        ImportError::malformed(
            &self.file.path,
            format!("at byte {}: {problem}; the file is damaged or incomplete: download it again", self.at),
        )
    }

    fn left(&self) -> u64 {
        self.file.len.saturating_sub(self.at)
    }

    /// Fails unless `count` things of at least `size` bytes can still follow.
    fn expect(&self, what: &str, count: u64, size: u64) -> Result<usize, ImportError> {
        let fits = count.checked_mul(size).is_some_and(|n| n <= self.left());
        let count_usize = usize::try_from(count).ok().filter(|_| fits);
        count_usize
            .ok_or_else(|| self.bad(format!("{count} {what} do not fit the {} bytes that are left", self.left())))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ImportError> {
        let offset = usize::try_from(self.at - self.start).unwrap_or(usize::MAX);
        let end = offset.saturating_add(N);
        if let Some(bytes) = self.window.get(offset..end).and_then(|b| b.first_chunk::<N>()) {
            self.at += N as u64;
            return Ok(*bytes);
        }
        self.expect("bytes", N as u64, 1)?;
        self.start = self.at;
        self.window =
            self.file.read(self.at, self.left().min(WINDOW)).map_err(|e| ImportError::io(&self.file.path, e))?;
        match self.window.first_chunk::<N>() {
            Some(bytes) => {
                self.at += N as u64;
                Ok(*bytes)
            }
            None => Err(self.bad("the file ends")),
        }
    }

    fn u32(&mut self) -> Result<u32, ImportError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, ImportError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn text(&mut self, what: &str) -> Result<String, ImportError> {
        let len = self.u64()?;
        self.expect(&format!("bytes of {what}"), len, 1)?;
        let offset = usize::try_from(self.at - self.start).unwrap_or(usize::MAX);
        let end = usize::try_from(len).ok().and_then(|n| offset.checked_add(n));
        let bytes = match end.and_then(|end| self.window.get(offset..end)) {
            Some(bytes) => bytes.to_vec(),
            None => self.file.read(self.at, len).map_err(|e| ImportError::io(&self.file.path, e))?,
        };
        self.at += len;
        String::from_utf8(bytes).map_err(|_| self.bad(format!("{what} is not UTF-8")))
    }

    fn many<const N: usize, T>(&mut self, count: u64, from: impl Fn([u8; N]) -> T) -> Result<Vec<T>, ImportError> {
        let count = self.expect("array elements", count, N as u64)?;
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            out.push(from(self.take()?));
        }
        Ok(out)
    }

    fn value(&mut self, ty: u32, key: &str) -> Result<Value, ImportError> {
        Ok(match ty {
            0 => Value::U64(u64::from(self.take::<1>()?[0])),
            1 => Value::I64(i64::from(self.take::<1>()?[0].cast_signed())),
            2 => Value::U64(u64::from(u16::from_le_bytes(self.take()?))),
            3 => Value::I64(i64::from(i16::from_le_bytes(self.take()?))),
            4 => Value::U64(u64::from(self.u32()?)),
            5 => Value::I64(i64::from(i32::from_le_bytes(self.take()?))),
            6 => Value::F32(f32::from_le_bytes(self.take()?)),
            7 => Value::Bool(self.take::<1>()?[0] != 0),
            8 => Value::Str(self.text(&format!("the value of `{key}`"))?),
            9 => self.array(key)?,
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.take()?)),
            12 => Value::F64(f64::from_le_bytes(self.take()?)),
            other => return Err(self.bad(format!("`{key}` has the unknown value type {other}"))),
        })
    }

    fn array(&mut self, key: &str) -> Result<Value, ImportError> {
        let (ty, count) = (self.u32()?, self.u64()?);
        Ok(match ty {
            0 | 1 | 7 => Value::Bytes(self.many(count, |[b]| b)?),
            2 => Value::Ints(self.many(count, |b| i32::from(u16::from_le_bytes(b)))?),
            3 => Value::Ints(self.many(count, |b| i32::from(i16::from_le_bytes(b)))?),
            4 | 5 => Value::Ints(self.many(count, i32::from_le_bytes)?),
            6 => Value::Floats(self.many(count, f32::from_le_bytes)?),
            8 => {
                let count = self.expect("strings", count, 8)?;
                let mut strings = Strings { text: String::new(), ends: Vec::with_capacity(count) };
                for _ in 0..count {
                    strings.push(&self.text(&format!("a string of `{key}`"))?);
                }
                Value::Strs(strings)
            }
            10 | 11 => Value::Longs(self.many(count, i64::from_le_bytes)?),
            12 => Value::Doubles(self.many(count, f64::from_le_bytes)?),
            9 => return Err(self.bad(format!("`{key}` is an array of arrays, which is not supported"))),
            other => return Err(self.bad(format!("`{key}` is an array of the unknown type {other}"))),
        })
    }
}

/// Reads and checks the head of a GGUF file.
///
/// # Errors
/// When it is no GGUF file, of another version, or damaged.
pub(crate) fn read_header(file: &DataFile) -> Result<Header, ImportError> {
    let mut c = Cursor { file, at: 0, window: Vec::new(), start: 0 };
    if c.take::<4>()? != *b"GGUF" {
        return Err(ImportError::malformed(&file.path, "does not begin with the letters GGUF: it is no GGUF file"));
    }
    match c.u32()? {
        2 | 3 => {}
        v if v.swap_bytes() <= 3 => {
            return Err(ImportError::unsupported(&file.path, "is a big-endian GGUF file; convert it to little-endian"));
        }
        v => {
            return Err(ImportError::unsupported(
                &file.path,
                format!("is GGUF version {v}; versions 2 and 3 are read: convert the model again"),
            ));
        }
    }
    let (tensors, keys) = (c.u64()?, c.u64()?);
    // The shortest entries: key length + type + one byte; name length + axes + type + offset.
    c.expect("metadata entries", keys, 13)?;
    c.expect("tensors", tensors, 24)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..keys {
        let key = c.text("a key")?;
        let ty = c.u32()?;
        let value = c.value(ty, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(c.bad(format!("the key `{key}` occurs twice")));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::U64(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(other) => {
            return Err(ImportError::config(
                &file.path,
                "general.alignment",
                format!("is {other:?}; a power of two is needed"),
            ));
        }
    };
    let mut table = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..tensors {
        let (name, shape, ty, offset) = read_entry(&mut c)?;
        if !names.insert(name.clone()) {
            return Err(c.bad(format!("tensor `{name}` occurs twice")));
        }
        table.push((name, shape, ty, offset));
    }
    let base = c.at.div_ceil(alignment) * alignment;
    let mut out = BTreeMap::new();
    for (name, shape, ty, offset) in table {
        let entry = place(&file.path, &name, shape, ty, base, offset, alignment, file.len)?;
        out.insert(name, entry);
    }
    no_overlap(&file.path, &out)?;
    Ok(Header { metadata, tensors: out })
}

fn read_entry(c: &mut Cursor<'_>) -> Result<(String, Vec<u64>, GgmlType, u64), ImportError> {
    let name = c.text("a tensor's name")?;
    let axes = c.u32()?;
    if axes > MAX_AXES {
        return Err(c.bad(format!("tensor `{name}` has {axes} axes, at most {MAX_AXES} are possible")));
    }
    let mut shape = Vec::new();
    for _ in 0..axes {
        shape.push(c.u64()?);
    }
    shape.reverse();
    let ty = GgmlType::from_id(c.u32()?).map_err(|id| {
        let known = GgmlType::known();
        ImportError::unsupported(
            &c.file.path,
            format!("tensor `{name}` is stored as {id}; {known} are read: convert the model to one of these"),
        )
    })?;
    Ok((name, shape, ty, c.u64()?))
}

#[expect(clippy::too_many_arguments, reason = "the numbers of one table entry and of the file that must hold it")]
fn place(
    path: &Path,
    name: &str,
    shape: Vec<u64>,
    ty: GgmlType,
    base: u64,
    offset: u64,
    alignment: u64,
    file: u64,
) -> Result<Entry, ImportError> {
    let bad = |problem: String| {
        ImportError::malformed(
            path,
            format!("tensor `{name}` {problem}; the file is damaged or incomplete: download it again"),
        )
    };
    let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    let len = elements.and_then(|n| ty.bytes(n, shape.last().copied().unwrap_or(1)));
    let Some(len) = len else {
        return Err(bad(format!("of shape {shape:?} is not a whole number of {ty} blocks")));
    };
    if !offset.is_multiple_of(alignment) {
        return Err(bad(format!("begins at offset {offset}, which is not a multiple of {alignment}")));
    }
    let at = base.checked_add(offset).filter(|at| at.checked_add(len).is_some_and(|end| end <= file));
    let Some(at) = at else {
        return Err(bad(format!(
            "needs {len} bytes at offset {offset}, the file has {} bytes of data",
            file.saturating_sub(base)
        )));
    };
    Ok(Entry { shape, ty, at, len })
}

fn no_overlap(path: &Path, tensors: &BTreeMap<String, Entry>) -> Result<(), ImportError> {
    let mut spans: Vec<_> = tensors.iter().filter(|(_, e)| e.len > 0).map(|(name, e)| (e.at, e.len, name)).collect();
    spans.sort();
    for pair in spans.windows(2) {
        if let [(at, len, name), (next, _, other)] = pair
            && at + len > *next
        {
            return Err(ImportError::malformed(
                path,
                format!("tensors `{name}` and `{other}` overlap; the file is damaged: download it again"),
            ));
        }
    }
    Ok(())
}

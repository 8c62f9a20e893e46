//! Protobuf's wire format: numbered fields, each an integer, four or eight bytes, or a span of bytes.

use crate::file::DataFile;

/// Bytes that are fetched at a time.
const WINDOW: u64 = 4096;

/// A field of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// An integer.
    Varint(u64),
    /// Four bytes.
    Fixed32(u32),
    /// Eight bytes.
    Fixed64(u64),
    /// Bytes of the file: a text, a message, or packed numbers.
    Span { at: u64, len: u64 },
}

impl Field {
    /// Where the field's bytes are.
    pub(super) fn span(&self) -> Result<(u64, u64), String> {
        match self {
            Field::Span { at, len } => Ok((*at, *len)),
            Field::Varint(_) | Field::Fixed32(_) | Field::Fixed64(_) => {
                Err("a number stands where text or a message is expected".into())
            }
        }
    }
}

/// A message in a file, read field by field. Spans are passed over, not read.
pub(super) struct Wire<'f> {
    file: &'f DataFile,
    at: u64,
    end: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'f> Wire<'f> {
    /// The message of `len` bytes from `at`.
    pub(super) fn new(file: &'f DataFile, at: u64, len: u64) -> Self {
        Self { file, at, end: at.saturating_add(len).min(file.len), window: Vec::new(), window_at: at }
    }

    fn byte(&mut self) -> Result<u8, String> {
        if self.at >= self.end {
            return Err(format!("a field is cut off at byte {}", self.at));
        }
        let held = |wire: &Self| {
            let i = usize::try_from(wire.at.checked_sub(wire.window_at)?).ok()?;
            wire.window.get(i).copied()
        };
        let byte = match held(self) {
            Some(byte) => byte,
            None => {
                let len = WINDOW.min(self.end - self.at);
                self.window = self.file.read(self.at, len).map_err(|e| format!("cannot read byte {}: {e}", self.at))?;
                self.window_at = self.at;
                held(self).ok_or_else(|| format!("byte {} is not there", self.at))?
            }
        };
        self.at += 1;
        Ok(byte)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        for b in &mut bytes {
            *b = self.byte()?;
        }
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64, String> {
        let start = self.at;
        let mut out = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            out |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte < 0x80 {
                return Ok(out);
            }
        }
        Err(format!("the integer at byte {start} does not end"))
    }

    /// The next of packed integers.
    pub(super) fn varint(&mut self) -> Result<Option<u64>, String> {
        if self.at < self.end { self.number().map(Some) } else { Ok(None) }
    }

    /// The next field and its number.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Field)>, String> {
        if self.at >= self.end {
            return Ok(None);
        }
        let start = self.at;
        let key = self.number()?;
        let field = match key & 7 {
            0 => Field::Varint(self.number()?),
            1 => Field::Fixed64(u64::from_le_bytes(self.fixed()?)),
            5 => Field::Fixed32(u32::from_le_bytes(self.fixed()?)),
            2 => {
                let len = self.number()?;
                let at = self.at;
                match at.checked_add(len) {
                    Some(end) if end <= self.end => self.at = end,
                    Some(_) | None => return Err(format!("the field at byte {start} is longer than what it is in")),
                }
                Field::Span { at, len }
            }
            form => return Err(format!("the field at byte {start} has the unknown form {form}")),
        };
        Ok(Some((key >> 3, field)))
    }
}

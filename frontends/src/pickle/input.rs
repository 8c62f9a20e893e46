//! A part of a file, read from its beginning in pieces.

use super::PickleError;
use crate::file::DataFile;

/// Bytes that are read at once.
const PIECE: u64 = 1 << 16;

/// Reads a range of a file byte after byte.
pub(super) struct Input<'a> {
    file: &'a DataFile,
    /// Where the next piece begins.
    at: u64,
    end: u64,
    piece: Vec<u8>,
    /// Bytes of the piece that are used up.
    used: usize,
}

impl<'a> Input<'a> {
    /// The bytes of `file` from `at` to before `end`.
    pub(super) fn new(file: &'a DataFile, at: u64, end: u64) -> Self {
        Self { file, at, end: end.min(file.len), piece: Vec::new(), used: 0 }
    }

    /// The position in the file of what is read next.
    pub(super) fn position(&self) -> u64 {
        self.at - (self.piece.len() - self.used) as u64
    }

    pub(super) fn byte(&mut self) -> Result<u8, PickleError> {
        self.array::<1>().map(|b| b[0])
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let mut out = [0; N];
        for byte in &mut out {
            if self.used == self.piece.len() {
                self.refill()?;
            }
            *byte = self.piece.get(self.used).copied().ok_or_else(PickleError::short)?;
            self.used += 1;
        }
        Ok(out)
    }

    /// `len` bytes; nothing is allocated where the file has fewer.
    pub(super) fn bytes(&mut self, len: u64) -> Result<Vec<u8>, PickleError> {
        if len > self.end.saturating_sub(self.position()) {
            return Err(PickleError::short());
        }
        let len = usize::try_from(len).map_err(|_| PickleError::short())?;
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            if self.used == self.piece.len() {
                self.refill()?;
            }
            let rest = self.piece.get(self.used..).unwrap_or(&[]);
            let take = rest.len().min(len - out.len());
            out.extend_from_slice(&rest[..take]);
            self.used += take;
        }
        Ok(out)
    }

    /// The bytes up to a line's end, which is left out.
    pub(super) fn line(&mut self) -> Result<Vec<u8>, PickleError> {
        let mut out = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => return Ok(out),
                byte => out.push(byte),
            }
        }
    }

    fn refill(&mut self) -> Result<(), PickleError> {
        let len = PIECE.min(self.end.saturating_sub(self.at));
        if len == 0 {
            return Err(PickleError::short());
        }
        self.piece = self.file.read(self.at, len).map_err(PickleError::Io)?;
        self.at += len;
        self.used = 0;
        Ok(())
    }
}

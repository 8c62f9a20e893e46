//! The directory of a zip archive whose entries are stored as they are: where each lies in the file. That is the form
//! in which PyTorch saves (APPNOTE.TXT 6.3.10 of the zip format, sections 4.3 and 4.5.3).

use std::collections::BTreeMap;

use super::PickleError;
use crate::file::DataFile;

/// Where an entry's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) at: u64,
    pub(super) len: u64,
}

const END: [u8; 4] = *b"PK\x05\x06";
const END_64: [u8; 4] = *b"PK\x06\x06";
const LOCATOR_64: [u8; 4] = *b"PK\x06\x07";
const CENTRAL: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";

/// Largest directory that is read. PyTorch needs a hundred bytes a tensor.
const MAX_DIRECTORY: u64 = 1 << 26;

/// Every entry by name.
pub(super) fn entries(file: &DataFile) -> Result<BTreeMap<String, Entry>, PickleError> {
    let (start, size) = directory(file)?;
    if size > MAX_DIRECTORY {
        return Err(PickleError::broken(format!("has a directory of {size} bytes; at most {MAX_DIRECTORY} are read")));
    }
    let bytes = file.read(start, size).map_err(|_| PickleError::short())?;
    let mut rest = Fields(&bytes);
    let mut out = BTreeMap::new();
    while !rest.0.is_empty() {
        let (name, entry) = central(file, &mut rest)?;
        if out.insert(name.clone(), entry).is_some() {
            return Err(PickleError::broken(format!("has two entries `{name}`")));
        }
    }
    Ok(out)
}

/// Little-endian fields, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], PickleError> {
        let (head, tail) = self.0.split_at_checked(len).ok_or_else(PickleError::short)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        self.take(N)?.first_chunk::<N>().copied().ok_or_else(PickleError::short)
    }

    fn u16(&mut self) -> Result<u16, PickleError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, PickleError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, PickleError> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Position and size of the central directory.
fn directory(file: &DataFile) -> Result<(u64, u64), PickleError> {
    // The last record has 22 bytes and a comment of at most 65535.
    let tail = file.len.min(22 + 0xffff);
    let base = file.len - tail;
    let bytes = file.read(base, tail).map_err(PickleError::Io)?;
    let found = bytes.windows(4).rposition(|w| w == END).ok_or_else(|| {
        PickleError::broken("has no zip directory at its end: the file is incomplete; download it again")
    })?;
    let mut end = Fields(&bytes[found + 4..]);
    end.take(8)?;
    let (size, start) = (end.u32()?, end.u32()?);
    let at = base + found as u64;
    if size != u32::MAX && start != u32::MAX {
        return Ok((start.into(), size.into()));
    }
    // Larger archives have a record of 64-bit numbers, and right before the last one where it is.
    let locator = at.checked_sub(20).ok_or_else(PickleError::short)?;
    let bytes = file.read(locator, 20).map_err(PickleError::Io)?;
    let mut locator = Fields(&bytes);
    if locator.array()? != LOCATOR_64 {
        return Err(PickleError::broken("has a zip64 directory that nothing points to"));
    }
    locator.u32()?;
    let bytes = file.read(locator.u64()?, 56).map_err(|_| PickleError::short())?;
    let mut end = Fields(&bytes);
    if end.array()? != END_64 {
        return Err(PickleError::broken("has no zip64 directory where it should be"));
    }
    end.take(36)?;
    let size = end.u64()?;
    Ok((end.u64()?, size))
}

/// One entry of the central directory.
fn central(file: &DataFile, rest: &mut Fields<'_>) -> Result<(String, Entry), PickleError> {
    if rest.array()? != CENTRAL {
        return Err(PickleError::broken("has a damaged zip directory; download it again"));
    }
    rest.take(4)?;
    let (flags, method) = (rest.u16()?, rest.u16()?);
    rest.take(8)?;
    let (mut packed, mut len) = (u64::from(rest.u32()?), u64::from(rest.u32()?));
    let (name, extra, comment) = (rest.u16()?, rest.u16()?, rest.u16()?);
    rest.take(8)?;
    let mut local = u64::from(rest.u32()?);
    let name = String::from_utf8_lossy(rest.take(name.into())?).into_owned();
    let mut extra = Fields(rest.take(extra.into())?);
    rest.take(comment.into())?;
    // Numbers that do not fit 32 bits are in an extra field, in this order.
    let too_large = |v: u64| v == u64::from(u32::MAX);
    while extra.0.len() >= 4 {
        let (id, size) = (extra.u16()?, extra.u16()?);
        let mut body = Fields(extra.take(size.into())?);
        if id == 1 {
            for number in [&mut len, &mut packed, &mut local] {
                if too_large(*number) {
                    *number = body.u64()?;
                }
            }
        }
    }
    if method != 0 || flags & 1 != 0 || packed != len {
        return Err(PickleError::refused(format!(
            "has the entry `{name}` compressed or encrypted; PyTorch stores entries as they are: save the model again"
        )));
    }
    let header = file.read(local, 30).map_err(|_| PickleError::short())?;
    let mut header = Fields(&header);
    if header.array()? != LOCAL {
        return Err(PickleError::broken(format!("has no entry `{name}` where its directory says; download it again")));
    }
    header.take(22)?;
    let skip = u64::from(header.u16()?) + u64::from(header.u16()?);
    let at = (local + 30).checked_add(skip).ok_or_else(PickleError::short)?;
    if at.checked_add(len).is_none_or(|end| end > file.len) {
        return Err(PickleError::broken(format!("ends inside of the entry `{name}`; download it again")));
    }
    Ok((name, Entry { at, len }))
}

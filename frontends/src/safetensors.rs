//! Safetensors checkpoints: one file, or shards with an index. Headers are checked before anything is believed; tensors
//! are read one at a time at their position in the file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use awqc_ir::{Stored, TensorInfo};
use safetensors::tensor::{Dtype, TensorInfo as Entry};
use serde::de::{Deserializer as _, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::ImportError;
use crate::file::DataFile;
use crate::shards::{Format, Shards};

/// The index of a sharded checkpoint.
pub const INDEX: &str = "model.safetensors.index.json";

/// Largest header that is believed, as in the format's reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// The format.
#[derive(Debug)]
pub enum SafetensorsFormat {}

/// Tensors of one or more safetensors files.
pub type Safetensors = Shards<SafetensorsFormat>;

/// A tensor in its file.
#[derive(Debug)]
pub struct Place {
    at: u64,
    len: u64,
    info: TensorInfo,
}

impl Safetensors {
    /// As [`Shards::open`], with the file mapped into memory: [`awqc_ir::TensorSource::mapped`] then gives every
    /// tensor.
    ///
    /// # Errors
    /// As there, and when the file cannot be mapped.
    pub fn open_mapped(path: &Path) -> Result<Self, ImportError> {
        let mut out = Self::open(path)?;
        out.map()?;
        Ok(out)
    }

    /// The CRC-32 of a tensor's bytes; `None` if there is no such tensor.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn crc32(&self, name: &str) -> Result<Option<u32>, ImportError> {
        let Some((file, place)) = self.find(name) else { return Ok(None) };
        file.crc32(place.at, place.len).map(Some).map_err(|e| ImportError::io(&file.path, e))
    }
}

impl Format for SafetensorsFormat {
    type Place = Place;

    fn entries(file: &DataFile) -> Result<Vec<(String, Place)>, ImportError> {
        let place = |(name, entry, at): (String, Entry, u64)| {
            let Some(stored) = stored(entry.dtype) else {
                return Err(ImportError::unsupported(
                    &file.path,
                    format!(
                        "tensor `{name}` is stored as {:?}; F32, F16, BF16, F64, I64, I32, I16, I8 and U8 are read",
                        entry.dtype
                    ),
                ));
            };
            let len = (entry.data_offsets.1 - entry.data_offsets.0) as u64;
            Ok((name, Place { at, len, info: TensorInfo { stored, shape: entry.shape } }))
        };
        read_header(file)?.into_iter().map(place).collect()
    }

    fn info(place: &Place) -> &TensorInfo {
        &place.info
    }

    fn read(file: &DataFile, place: &Place) -> Result<Vec<u8>, std::io::Error> {
        file.read(place.at, place.len)
    }

    fn mapped<'f>(file: &'f DataFile, place: &Place) -> Option<&'f [u8]> {
        file.mapped(place.at, place.len)
    }
}

fn stored(dtype: Dtype) -> Option<Stored> {
    // The list of the crate may grow: what is not named here is not read.
    Some(match dtype {
        Dtype::F32 => Stored::F32,
        Dtype::F16 => Stored::F16,
        Dtype::BF16 => Stored::Bf16,
        Dtype::F64 => Stored::F64,
        Dtype::I32 => Stored::I32,
        Dtype::I64 => Stored::I64,
        Dtype::I16 => Stored::I16,
        Dtype::U8 | Dtype::BOOL => Stored::U8,
        Dtype::I8 => Stored::I8,
        _ => return None,
    })
}

/// The entries of a header with the position of each in the file. Every tensor lies inside the file, has the bytes
/// that its shape and type need, and begins where the one before it ends.
fn read_header(file: &DataFile) -> Result<Vec<(String, Entry, u64)>, ImportError> {
    let bad = |problem: String| ImportError::malformed(&file.path, problem);
    let short = "the file is damaged or incomplete; download or compile it again";
    if file.len < 8 {
        return Err(bad(format!("is {} bytes long, too short for a safetensors header: {short}", file.len)));
    }
    let prefix = file.read(0, 8).map_err(|e| ImportError::io(&file.path, e))?;
    let size = prefix.first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b));
    if size > MAX_HEADER || size > file.len - 8 {
        return Err(bad(format!(
            "claims a header of {size} bytes, the file has {} after its first 8: {short}, or is no safetensors file",
            file.len - 8
        )));
    }
    let json = file.read(8, size).map_err(|e| ImportError::io(&file.path, e))?;
    let entries =
        parse_header(&json).map_err(|e| bad(format!("the header is not a safetensors header: {e}; {short}")))?;
    let (base, data) = (8 + size, file.len - 8 - size);
    let mut out = Vec::with_capacity(entries.len());
    let mut end = 0u64;
    let mut entries: Vec<(String, Entry)> = entries.into_iter().collect();
    entries.sort_by_key(|(_, e)| e.data_offsets);
    for (name, entry) in entries {
        let (start, stop) = (entry.data_offsets.0 as u64, entry.data_offsets.1 as u64);
        let elements = entry.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64));
        let want = elements
            .and_then(|n| n.checked_mul(entry.dtype.bitsize() as u64))
            .filter(|bits| bits % 8 == 0)
            .map(|bits| bits / 8);
        if start > stop || stop > data {
            return Err(bad(format!("tensor `{name}` lies at bytes {start}..{stop} of {data}: {short}")));
        }
        if want != Some(stop - start) {
            let want = want.map_or_else(|| "more than any file".to_owned(), |w| format!("{w}"));
            return Err(bad(format!(
                "tensor `{name}` has {} bytes, its shape {:?} of {:?} needs {want}: {short}",
                stop - start,
                entry.shape,
                entry.dtype
            )));
        }
        if start != end {
            let what = if start < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(bad(format!("tensor `{name}` at byte {start} {what}, which ends at byte {end}: {short}")));
        }
        end = stop;
        out.push((name, entry, base + start));
    }
    if end != data {
        return Err(bad(format!("has {data} bytes of data, the header describes {end}: {short}")));
    }
    Ok(out)
}

/// Parses the JSON of a header. Unlike a map, it notices a name that occurs twice.
fn parse_header(json: &[u8]) -> Result<BTreeMap<String, Entry>, serde_json::Error> {
    struct Header;
    impl<'de> Visitor<'de> for Header {
        type Value = BTreeMap<String, Entry>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut out = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                if name == "__metadata__" {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                let entry = map.next_value::<Entry>().map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
                if out.insert(name.clone(), entry).is_some() {
                    return Err(A::Error::custom(format!("tensor `{name}` occurs twice")));
                }
            }
            Ok(out)
        }
    }
    let mut de = serde_json::Deserializer::from_slice(json);
    let entries = de.deserialize_map(Header)?;
    de.end()?;
    Ok(entries)
}

//! A safetensors file written as tensors come: bodies go to temporary files, the header in front at the end.
//!
//! Bodies are kept apart by element size and joined largest first, so that every tensor is aligned without padding,
//! which the format forbids. The bytes depend on the tensors and their order alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use awqc_ir::{RawTensor, Stored};
use serde_json::{Map, Value as Json, json};

use super::{EmitError, at};

/// Element sizes in the order in which bodies are joined.
const SIZES: [usize; 4] = [8, 4, 2, 1];

/// A file under construction.
pub struct Writer {
    bodies: Vec<Body>,
    entries: BTreeMap<String, Entry>,
}

struct Body {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    len: u64,
}

struct Entry {
    stored: Stored,
    shape: Vec<usize>,
    body: usize,
    start: u64,
    len: u64,
    checksum: u32,
}

impl Writer {
    /// A writer whose temporary files lie in `dir` and begin with `stem`.
    pub fn new(dir: &Path, stem: &str) -> Self {
        let body = |size: &usize| Body { path: dir.join(format!(".{stem}.{size}.body")), file: None, len: 0 };
        Self { bodies: SIZES.iter().map(body).collect(), entries: BTreeMap::new() }
    }

    /// Bytes of all tensors so far.
    pub fn bytes(&self) -> u64 {
        self.bodies.iter().map(|b| b.len).sum()
    }

    /// CRC-32 of every tensor so far, in hexadecimal, by name: `checksums.json` of an artefact.
    pub fn checksums(&self) -> Json {
        let pairs = self.entries.iter().map(|(name, e)| (name.clone(), Json::from(format!("{:08x}", e.checksum))));
        Json::Object(pairs.collect())
    }

    /// Names of all tensors so far, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Appends a tensor.
    ///
    /// # Errors
    /// When the name is taken or the body cannot be written.
    pub fn add(&mut self, name: &str, tensor: &RawTensor) -> Result<(), EmitError> {
        if self.entries.contains_key(name) || name == "__metadata__" {
            return Err(EmitError::Duplicate(name.to_owned()));
        }
        let size = tensor.info.stored.size();
        let index = SIZES.iter().position(|s| *s == size).unwrap_or(SIZES.len() - 1);
        let body = &mut self.bodies[index];
        let file = match &mut body.file {
            Some(file) => file,
            None => {
                body.file.insert(BufWriter::with_capacity(1 << 20, File::create(&body.path).map_err(at(&body.path))?))
            }
        };
        file.write_all(&tensor.bytes).map_err(at(&body.path))?;
        let len = tensor.bytes.len() as u64;
        let entry = Entry {
            stored: tensor.info.stored,
            shape: tensor.info.shape.clone(),
            body: index,
            start: body.len,
            len,
            checksum: crc32fast::hash(&tensor.bytes),
        };
        self.entries.insert(name.to_owned(), entry);
        body.len += len;
        Ok(())
    }

    /// Joins header and bodies at `path`, makes sure that they are on the disk, and removes the temporary files.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(self, path: &Path, metadata: &[(&str, &str)]) -> Result<(), EmitError> {
        let mut base = 0;
        let mut bases = Vec::with_capacity(self.bodies.len());
        for body in &self.bodies {
            bases.push(base);
            base += body.len;
        }
        let mut header = Map::new();
        if !metadata.is_empty() {
            let pairs = metadata.iter().map(|(k, v)| ((*k).to_owned(), Json::from(*v)));
            header.insert("__metadata__".into(), Json::Object(pairs.collect()));
        }
        for (name, e) in &self.entries {
            let start = bases[e.body] + e.start;
            header.insert(
                name.clone(),
                json!({"dtype": dtype(e.stored), "shape": e.shape, "data_offsets": [start, start + e.len]}),
            );
        }
        let mut header = Json::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut out = File::create(path).map_err(at(path))?;
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(at(path))?;
        out.write_all(&header).map_err(at(path))?;
        for body in self.bodies {
            let Some(file) = body.file else { continue };
            file.into_inner().map_err(|e| at(&body.path)(e.into_error()))?;
            let mut bytes = File::open(&body.path).map_err(at(&body.path))?;
            let copied = io::copy(&mut bytes, &mut out).map_err(at(path))?;
            if copied != body.len {
                return Err(at(&body.path)(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the temporary file was changed",
                )));
            }
            std::fs::remove_file(&body.path).map_err(at(&body.path))?;
        }
        out.sync_all().map_err(at(path))
    }
}

fn dtype(stored: Stored) -> &'static str {
    match stored {
        Stored::F32 => "F32",
        Stored::F16 => "F16",
        Stored::Bf16 => "BF16",
        Stored::F64 => "F64",
        Stored::U8 => "U8",
        Stored::I8 => "I8",
        Stored::I16 => "I16",
        Stored::I32 => "I32",
        Stored::I64 => "I64",
    }
}

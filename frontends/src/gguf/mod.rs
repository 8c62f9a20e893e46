//! GGUF checkpoints: one file with metadata, tokenizer and tensors, most of them in blocks of quantized integers. They
//! are presented as a checkpoint of the family's own tensor names, decoded to f32.

pub mod blocks;
mod config;
pub mod reader;
mod source;
mod tokenizer;

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::error::ImportError;
use crate::family::Family;
use crate::file::DataFile;
use crate::open::ExtraFile;

pub use source::GgufSource;

/// An open GGUF file whose head has been read and checked.
#[derive(Debug)]
pub struct Gguf {
    file: DataFile,
    header: reader::Header,
}

/// A GGUF file as a checkpoint of its family.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(crate) source: GgufSource,
    pub(crate) config: Map<String, Json>,
    pub(crate) files: Vec<ExtraFile>,
    pub(crate) notes: Vec<String>,
}

impl Gguf {
    /// Opens a file and checks its head.
    ///
    /// # Errors
    /// When it is no GGUF file, of an unknown version, or damaged.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let file = DataFile::open(path)?;
        let header = reader::read_header(&file)?;
        Ok(Self { file, header })
    }

    /// What the head of the file says.
    pub fn header(&self) -> &reader::Header {
        &self.header
    }

    /// The name of the architecture, `general.architecture`.
    ///
    /// # Errors
    /// When the file does not say.
    pub fn architecture(&self) -> Result<&str, ImportError> {
        match self.header.metadata.get("general.architecture") {
            Some(reader::Value::Str(s)) => Ok(s),
            Some(_) | None => Err(ImportError::config(
                &self.file.path,
                "general.architecture",
                "must be a text that names the model's family",
            )),
        }
    }

    /// Presents the file as a checkpoint of `family`, by the family's `gguf` section.
    pub(crate) fn map(self, family: &Family) -> Result<Mapped, ImportError> {
        let path = self.file.path.clone();
        let architecture = self.architecture()?.to_owned();
        let section = family.gguf.iter().find(|s| s.architecture == architecture).ok_or_else(|| {
            ImportError::unsupported(
                &path,
                format!("the family `{}` has no gguf section for `{architecture}`", family.name),
            )
        })?;
        let mut config = config::synthesise(&path, &self.header, section)?;
        let mut notes = Vec::new();
        let rounded: BTreeSet<String> =
            self.header.tensors.values().filter(|t| t.ty.is_quantized()).map(|t| t.ty.to_string()).collect();
        if !rounded.is_empty() {
            let types: Vec<String> = rounded.into_iter().collect();
            notes.push(format!(
                "{} holds rounded weights ({}): what they decode to is taken as the float model",
                path.display(),
                types.join(", ")
            ));
        }
        let files = tokenizer::synthesise(&path, &self.header, &mut config, &mut notes)?;
        let source = GgufSource::new(self.file, self.header, section, &mut config)?;
        Ok(Mapped { source, config, files, notes })
    }
}

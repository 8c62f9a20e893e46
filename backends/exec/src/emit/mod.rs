//! Emitters: from a compiled module to files. A region is written as soon as it is compiled, so that memory stays
//! bounded by one region; the folder appears under its name only when everything is in it.

mod encode;
mod hf_awq;
mod reference;
mod safetensors;
mod staging;

use std::io;
use std::path::{Path, PathBuf};

use awqc_ir::{FusedDef, Region, TensorSource, Verified};
use awqc_passes::ExecError;

pub use encode::encode;
pub use hf_awq::{HfAwq, check};
pub use reference::Reference;
pub use safetensors::Writer;
pub use staging::{Existing, Staging};

use crate::layout::LayoutError;

/// Why an artefact could not be written.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// A file could not be written.
    #[error("{path}: {source}{}", hint(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A weight could not be realized.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// A weight does not fit the layout.
    #[error("weight ${weight} of region {region}: {source}")]
    Layout {
        /// The region.
        region: String,
        /// The weight.
        weight: String,
        /// Why.
        source: LayoutError,
    },
    /// The format cannot express this module. The message names the tensor and says what to do.
    #[error("{0}")]
    Unsupported(String),
    /// Two tensors would get one name.
    #[error("two tensors are called `{0}`")]
    Duplicate(String),
    /// The folder is there already.
    #[error("{0} exists")]
    Exists(PathBuf),
    /// The folder is there and was not written by this program.
    #[error("{0} exists and is no output of awqc: it is not replaced")]
    Foreign(PathBuf),
    /// The path does not end in a name.
    #[error("{0} is not a name for a new folder")]
    Name(PathBuf),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": free some space, or give an output folder on another disk"
        }
        io::ErrorKind::PermissionDenied => ": give an output folder that you may write to",
        _ => "",
    }
}

/// Attaches the path to an I/O error.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> EmitError {
    let path = path.to_owned();
    move |source| EmitError::Io { path, source }
}

/// What an emitter needs besides the region.
#[derive(Clone, Copy)]
pub struct EmitCx<'a> {
    /// The checkpoint.
    pub source: &'a dyn TensorSource,
    /// The module's fused ops.
    pub fused: &'a [FusedDef],
}

/// A file that is copied into the artefact as it is: tokenizer, generation config, …
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtraFile {
    /// Its name in the folder: no path separators.
    pub name: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Emitted {
    /// File names in the folder, sorted.
    pub files: Vec<String>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
}

/// Writes one artefact.
pub trait Emitter {
    /// Writes the weights of a region. Regions come in the module's order, each once.
    ///
    /// # Errors
    /// When a weight cannot be realized, the format cannot express it, or a file cannot be written.
    fn region(&mut self, region: &Region, cx: &EmitCx<'_>) -> Result<(), EmitError>;

    /// Completes the artefact. `module` is the compiled module, all of whose regions were given.
    ///
    /// # Errors
    /// As [`Emitter::region`].
    fn finish(self: Box<Self>, module: Verified<'_>) -> Result<Emitted, EmitError>;
}

/// Writes a small file and makes sure that it is on the disk.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), EmitError> {
    use std::io::Write;
    let mut file = std::fs::File::create(path).map_err(at(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at(path))
}

/// Writes the extra files and returns their names.
pub(crate) fn write_extra(dir: &Path, extra: &[ExtraFile]) -> Result<Vec<String>, EmitError> {
    for file in extra {
        let plain = Path::new(&file.name).file_name().is_some_and(|n| n == file.name.as_str());
        if !plain {
            return Err(EmitError::Unsupported(format!("`{}` is not a plain file name", file.name)));
        }
        write(&dir.join(&file.name), &file.bytes)?;
    }
    Ok(extra.iter().map(|f| f.name.clone()).collect())
}

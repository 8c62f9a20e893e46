//! The tensors of an ONNX model, under the names that the module uses for them.

use std::collections::BTreeMap;

use awqc_ir::{RawTensor, TensorError, TensorInfo, TensorSource};

use super::proto::{Place, Tensor};
use crate::error::ImportError;
use crate::file::DataFile;

/// The files that hold a model's numbers.
#[derive(Debug)]
pub(super) struct Files {
    main: DataFile,
    beside: BTreeMap<String, DataFile>,
}

impl Files {
    /// Opens the files beside the model that tensors are in, and checks that they are long enough.
    pub(super) fn open<'t>(
        main: DataFile,
        tensors: impl Iterator<Item = (&'t String, &'t Tensor)>,
    ) -> Result<Self, ImportError> {
        let mut beside = BTreeMap::new();
        for (name, tensor) in tensors {
            let Place::Beside { file, at, .. } = &tensor.place else { continue };
            let plain = std::path::Path::new(file).file_name().is_some_and(|f| f == file.as_str());
            if !plain {
                return Err(ImportError::malformed(
                    &main.path,
                    format!("tensor `{name}` is in `{file}`, which is not the name of a file beside the model"),
                ));
            }
            if !beside.contains_key(file) {
                let path = main.path.parent().unwrap_or(std::path::Path::new(".")).join(file);
                beside.insert(file.clone(), DataFile::open(&path)?);
            }
            let end = tensor.size().and_then(|size| at.checked_add(size));
            let len = beside.get(file).map_or(0, |f| f.len);
            if end.is_none_or(|end| end > len) {
                return Err(ImportError::malformed(
                    &main.path,
                    format!("tensor `{name}` ends after byte {len} of `{file}`, its last: download that file again"),
                ));
            }
        }
        Ok(Self { main, beside })
    }

    /// The bytes of a tensor.
    pub(super) fn bytes(&self, tensor: &Tensor) -> Result<Vec<u8>, String> {
        let cannot = |file: &DataFile, e| format!("cannot read {}: {e}; was the file changed?", file.path.display());
        match &tensor.place {
            Place::Bytes(bytes) => Ok(bytes.clone()),
            Place::Here { at, len } => self.main.read(*at, *len).map_err(|e| cannot(&self.main, e)),
            Place::Beside { file, at, .. } => {
                let file = self.beside.get(file).ok_or_else(|| format!("there is no file `{file}`"))?;
                file.read(*at, tensor.size().unwrap_or(0)).map_err(|e| cannot(file, e))
            }
        }
    }
}

/// A tensor under its name in the module.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) tensor: Tensor,
    /// Exporters store the matrices of linears as `[in,out]`; under the name of the linear it is `[out,in]`.
    pub(super) transposed: bool,
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct OnnxSource {
    pub(super) files: Files,
    pub(super) tensors: BTreeMap<String, Named>,
}

impl TensorSource for OnnxSource {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|t| {
            let mut info = t.tensor.info();
            if t.transposed {
                info.shape.reverse();
            }
            info
        })
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        let missing = || TensorError(format!("there is no tensor `{name}` in the model"));
        let named = self.tensors.get(name).ok_or_else(missing)?;
        let info = self.info(name).ok_or_else(missing)?;
        let bytes = self.files.bytes(&named.tensor).map_err(|e| TensorError(format!("tensor `{name}`: {e}")))?;
        let bytes = match *named.tensor.shape.as_slice() {
            [rows, cols] if named.transposed => turned(&bytes, rows, cols, info.stored.size()),
            _ => bytes,
        };
        Ok(RawTensor { info, bytes })
    }
}

/// A matrix of `size`-byte elements with its axes exchanged.
fn turned(bytes: &[u8], rows: usize, cols: usize, size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for c in 0..cols {
        for r in 0..rows {
            let at = (r * cols + c) * size;
            out.extend_from_slice(bytes.get(at..at + size).unwrap_or(&[]));
        }
    }
    out
}

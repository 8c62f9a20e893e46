//! Which files of a folder hold the model's tensors: safetensors where there are any, otherwise pickled ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqc_ir::TensorSource;

use crate::error::ImportError;
use crate::pickle::{self, PickleFormat};
use crate::safetensors::{self, SafetensorsFormat};
use crate::shards::{Format, Shards};

/// Files that training leaves beside a model: no weights are in them.
const NO_MODEL: [&str; 4] = ["training_args", "optimizer", "scheduler", "rng_state"];

/// The tensors of a folder: of the index if there is one, otherwise of `model.safetensors`, otherwise of the only
/// `.safetensors` file there is; only then, in the same order, of pickled files.
///
/// # Errors
/// When there are none, or more than one and no index, or what there is cannot be opened.
pub(crate) fn open_folder(folder: &Path) -> Result<Arc<dyn TensorSource>, ImportError> {
    if let Some(found) = find(folder, safetensors::INDEX, "model.safetensors", &["safetensors"])? {
        return found.open::<SafetensorsFormat>();
    }
    match find(folder, pickle::INDEX, "pytorch_model.bin", &pickle::EXTENSIONS)? {
        Some(found) => found.open::<PickleFormat>(),
        None => Err(ImportError::path(
            folder,
            "has no model.safetensors, no pytorch_model.bin and no index of either: it is not a model folder",
        )),
    }
}

/// The tensors of one file; of all shards, if an index beside it names it as one of them.
///
/// # Errors
/// When it cannot be opened.
pub(crate) fn open_file(path: &Path, pickled: bool) -> Result<Arc<dyn TensorSource>, ImportError> {
    if pickled {
        shard_or_all::<PickleFormat>(path, pickle::INDEX)
    } else {
        shard_or_all::<SafetensorsFormat>(path, safetensors::INDEX)
    }
}

fn shard_or_all<F>(path: &Path, index: &str) -> Result<Arc<dyn TensorSource>, ImportError>
where
    F: Format,
    Shards<F>: TensorSource + 'static,
{
    let shard = Shards::<F>::open(path)?;
    let index = path.parent().unwrap_or(Path::new(".")).join(index);
    if index.is_file() {
        let all = Shards::<F>::open_index(&index)?;
        if all.paths().any(|p| p.file_name() == path.file_name()) {
            return Ok(Arc::new(all));
        }
    }
    Ok(Arc::new(shard))
}

/// What a folder has of one format.
enum Found {
    Index(PathBuf),
    File(PathBuf),
}

impl Found {
    fn open<F>(self) -> Result<Arc<dyn TensorSource>, ImportError>
    where
        F: Format,
        Shards<F>: TensorSource + 'static,
    {
        Ok(match self {
            Found::Index(path) => Arc::new(Shards::<F>::open_index(&path)?),
            Found::File(path) => Arc::new(Shards::<F>::open(&path)?),
        })
    }
}

fn find(folder: &Path, index: &str, usual: &str, extensions: &[&str]) -> Result<Option<Found>, ImportError> {
    let path = folder.join(index);
    if path.is_file() {
        return Ok(Some(Found::Index(path)));
    }
    let path = folder.join(usual);
    if path.is_file() {
        return Ok(Some(Found::File(path)));
    }
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| ImportError::io(folder, e))? {
        let path = entry.map_err(|e| ImportError::io(folder, e))?.path();
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if extensions.contains(&extension) && !NO_MODEL.iter().any(|n| stem.starts_with(n)) {
            found.push(path);
        }
    }
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(Found::File(one.clone()))),
        many => {
            let names: Vec<String> =
                many.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned()).collect();
            Err(ImportError::path(
                folder,
                format!(
                    "has several .{} files ({}) but no {index} that says what is where",
                    extensions.join("/."),
                    names.join(", ")
                ),
            ))
        }
    }
}

//! Checkpoints in one or more files. Of several, an index says which file holds which tensor, and both must agree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use awqc_ir::{RawTensor, TensorError, TensorInfo, TensorSource};

use crate::error::{ImportError, Problems};
use crate::file::{DataFile, read_small};

/// Largest index that is read.
const MAX_INDEX: u64 = 100_000_000;

/// A format of files that hold tensors.
pub trait Format {
    /// Where a tensor is in its file.
    type Place;

    /// The tensors of a file. Every place lies inside it.
    fn entries(file: &DataFile) -> Result<Vec<(String, Self::Place)>, ImportError>;

    /// Type and shape of the tensor there.
    fn info(place: &Self::Place) -> &TensorInfo;

    /// Its bytes, row-major.
    fn read(file: &DataFile, place: &Self::Place) -> Result<Vec<u8>, std::io::Error>;

    /// Its bytes, if the file is mapped and they lie there row-major.
    fn mapped<'f>(_file: &'f DataFile, _place: &Self::Place) -> Option<&'f [u8]> {
        None
    }
}

/// Tensors of one or more files of a format.
#[derive(Debug)]
pub struct Shards<F: Format> {
    files: Vec<DataFile>,
    /// Each with the number of its file.
    tensors: BTreeMap<String, (usize, F::Place)>,
}

impl<F: Format> Shards<F> {
    /// Opens a single file.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or holds anything else than tensors.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let mut out = Self { files: Vec::new(), tensors: BTreeMap::new() };
        out.add(path)?;
        Ok(out)
    }

    /// Opens every shard that an index names, and checks that index and shards agree.
    ///
    /// # Errors
    /// When the index is not understood, a shard or tensor is missing, or a shard is damaged.
    pub fn open_index(index: &Path) -> Result<Self, ImportError> {
        let map = read_index(index)?;
        let folder = index.parent().unwrap_or(Path::new("."));
        let mut out = Self { files: Vec::new(), tensors: BTreeMap::new() };
        let mut problems = Vec::new();
        let shards: BTreeSet<&String> = map.values().collect();
        for shard in shards {
            let path = folder.join(shard);
            if path.is_file() {
                out.add(&path)?;
            } else {
                problems.push(format!("shard `{shard}` is missing: the index names it; download it"));
            }
        }
        if problems.is_empty() {
            for (tensor, shard) in &map {
                match out.file_of(tensor) {
                    None => problems.push(format!("tensor `{tensor}` is not in `{shard}`, where the index says it is")),
                    Some(file) if file.file_name() != Path::new(shard).file_name() => {
                        problems.push(format!(
                            "tensor `{tensor}` is not in `{shard}`, where the index says it is, but in another shard"
                        ));
                    }
                    Some(_) => {}
                }
            }
            let extra = out.tensors.keys().filter(|t| !map.contains_key(*t));
            problems.extend(extra.map(|t| format!("tensor `{t}` is in a shard but not in the index")));
        }
        if problems.is_empty() {
            Ok(out)
        } else {
            Err(ImportError::Tensors { path: index.to_owned(), problems: Problems(problems) })
        }
    }

    /// The files, in order.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter().map(|f| &f.path)
    }

    /// Adds the tensors of one more file. No tensor may be in two.
    fn add(&mut self, path: &Path) -> Result<(), ImportError> {
        let file = DataFile::open(path)?;
        for (name, place) in F::entries(&file)? {
            if let Some(other) = self.file_of(&name) {
                return Err(ImportError::malformed(
                    path,
                    format!("tensor `{name}` is also in {}: remove one of the files", other.display()),
                ));
            }
            self.tensors.insert(name, (self.files.len(), place));
        }
        self.files.push(file);
        Ok(())
    }

    /// The file that holds a tensor.
    pub(crate) fn file_of(&self, tensor: &str) -> Option<&Path> {
        self.find(tensor).map(|(file, _)| file.path.as_path())
    }

    /// A tensor's file and its place there.
    pub(crate) fn find(&self, tensor: &str) -> Option<(&DataFile, &F::Place)> {
        let (file, place) = self.tensors.get(tensor)?;
        Some((self.files.get(*file)?, place))
    }

    /// Maps all files into memory.
    pub(crate) fn map(&mut self) -> Result<(), ImportError> {
        self.files.iter_mut().try_for_each(DataFile::map)
    }
}

impl<F: Format> TensorSource for Shards<F>
where
    Self: Send + Sync,
{
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.find(name).map(|(_, place)| F::info(place).clone())
    }

    fn mapped(&self, name: &str) -> Option<&[u8]> {
        self.find(name).and_then(|(file, place)| F::mapped(file, place))
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        let Some((file, place)) = self.find(name) else {
            return Err(TensorError(format!("there is no tensor `{name}` in the checkpoint")));
        };
        let info = F::info(place).clone();
        let bytes = F::read(file, place).map_err(|e| {
            let (path, stored, shape) = (file.path.display(), info.stored, &info.shape);
            TensorError(format!(
                "cannot read tensor `{name}`, {stored}{shape:?}, in {path}: {e}; was the file changed?"
            ))
        })?;
        Ok(RawTensor { info, bytes })
    }
}

/// Tensor name to shard file of an index.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, ImportError> {
    let bytes = read_small(path, MAX_INDEX)?;
    let bad = |problem: &str| ImportError::malformed(path, format!("{problem}; download it again"));
    let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| bad(&format!("is not JSON: {e}")))?;
    let map = json.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| bad("has no object `weight_map`"))?;
    let mut out = BTreeMap::new();
    for (tensor, shard) in map {
        let shard =
            shard.as_str().ok_or_else(|| bad(&format!("`weight_map` gives no file name for tensor `{tensor}`")))?;
        // A shard lies beside its index: a path that leads elsewhere is not followed.
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            return Err(bad(&format!(
                "`weight_map` puts tensor `{tensor}` in `{shard}`, which is not a plain file name"
            )));
        }
        out.insert(tensor.clone(), shard.to_owned());
    }
    Ok(out)
}

//! Checkpoints in several files: an index says which file holds which tensor, and both must agree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use awqc_ir::TensorSource;

use crate::error::{ImportError, Problems};
use crate::file::read_small;

/// Largest index that is read.
const MAX_INDEX: u64 = 100_000_000;

/// The tensors of any number of files of one format.
pub(crate) trait Files: TensorSource + Default {
    /// Adds those of one more file. No tensor may be in two.
    fn add(&mut self, path: &Path) -> Result<(), ImportError>;

    /// The file that holds a tensor.
    fn file_of(&self, tensor: &str) -> Option<&Path>;
}

/// Opens every shard that an index names, and checks that index and shards agree.
pub(crate) fn open_index<F: Files>(index: &Path) -> Result<F, ImportError> {
    let map = read_index(index)?;
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut out = F::default();
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
        let extra = out.names().into_iter().filter(|t| !map.contains_key(t));
        problems.extend(extra.map(|t| format!("tensor `{t}` is in a shard but not in the index")));
    }
    if problems.is_empty() {
        Ok(out)
    } else {
        Err(ImportError::Tensors { path: index.to_owned(), problems: Problems(problems) })
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

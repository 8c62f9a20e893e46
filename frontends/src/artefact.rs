//! Modules that are text already: compiled artefacts, and bare `.awqir` files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use awqc_ir::{Module, TensorSource, WeightExpr};
use serde_json::Map;

use crate::error::{ImportError, Problems};
use crate::file::read_small;
use crate::open::{Imported, Kind, MAX_TEXT, extra_files, read_config};
use crate::safetensors::Safetensors;
use crate::synthetic::Synthetic;

/// The module of an artefact.
pub const MODULE: &str = "module.awqir";
/// The checksums of its tensors.
const CHECKSUMS: &str = "checksums.json";
/// Its tensors.
pub const WEIGHTS: &str = "weights.safetensors";

/// Opens the folder that a compile has written.
pub(crate) fn open_folder(folder: &Path) -> Result<Imported, ImportError> {
    let path = folder.join(MODULE);
    let mut module = read_module(&path)?;
    read_data(&path, &mut module)?;
    let weights = folder.join(WEIGHTS);
    if !weights.is_file() {
        return Err(ImportError::path(
            &weights,
            format!("is missing: a compiled model has {MODULE} and {WEIGHTS}; compile it again"),
        ));
    }
    let source = Safetensors::open_mapped(&weights)?;
    let mut problems = missing(&module, &source);
    problems.extend(damaged(&folder.join(CHECKSUMS), &source)?);
    if !problems.is_empty() {
        return Err(ImportError::Tensors { path: weights, problems: Problems(problems) });
    }
    let config_path = folder.join("config.json");
    let config = if config_path.is_file() { read_config(&config_path)? } else { Map::new() };
    Ok(Imported {
        module,
        source: Arc::new(source),
        config,
        files: extra_files(folder),
        notes: Vec::new(),
        kind: Kind::Artefact,
    })
}

/// Opens a module without tensors. Tensors that are read all the same are made up, the same ones each time.
pub(crate) fn open_text(path: &Path) -> Result<Imported, ImportError> {
    let mut module = read_module(path)?;
    read_data(path, &mut module)?;
    let source = Arc::new(Synthetic::new(&module));
    Ok(Imported { module, source, config: Map::new(), files: Vec::new(), notes: Vec::new(), kind: Kind::Text })
}

fn read_module(path: &Path) -> Result<Module, ImportError> {
    let bytes = read_small(path, MAX_TEXT)?;
    let text = String::from_utf8(bytes).map_err(|_| ImportError::malformed(path, "is not UTF-8: it is no module"))?;
    awqc_ir::parse(&text).map_err(|e| ImportError::text(path, e.to_string()))
}

/// Fills in the data entries from `NAME.data.safetensors` beside `NAME.awqir`: f32 tensors called `REGION.ENTRY`,
/// where a layer's region is its number. Without the file, entries stay without numbers.
fn read_data(path: &Path, module: &mut Module) -> Result<(), ImportError> {
    let sidecar = path.with_extension("data.safetensors");
    if !sidecar.is_file() {
        return Ok(());
    }
    let source = Safetensors::open(&sidecar)?;
    let mut problems = Vec::new();
    for region in &mut module.regions {
        let region_name = region.name.to_string();
        let region_name = region_name.trim_start_matches('@');
        for id in region.data_ids() {
            let entry = region.data(id);
            let name = format!("{region_name}.{}", entry.name);
            let Some(info) = source.info(&name) else {
                problems.push(format!("`{name}` is missing"));
                continue;
            };
            if !info.shape.iter().map(|d| *d as u64).eq(entry.shape.iter().copied()) {
                problems.push(format!("`{name}` has the shape {:?}, the module says {:?}", info.shape, entry.shape));
                continue;
            }
            let values = source.read_f32(&name)?;
            region.set_data_values(id, Some(values.into()));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(ImportError::Tensors { path: sidecar, problems: Problems(problems) }) }
}

/// The tensors whose bytes are not those that were written. An artefact without checksums is believed.
fn damaged(path: &Path, source: &Safetensors) -> Result<Vec<String>, ImportError> {
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let bytes = read_small(path, MAX_TEXT)?;
    let sums: BTreeMap<String, String> = serde_json::from_slice(&bytes)
        .map_err(|e| ImportError::malformed(path, format!("is no list of checksums: {e}")))?;
    let mut problems = Vec::new();
    for (name, sum) in &sums {
        if source.crc32(name)?.is_some_and(|crc| format!("{crc:08x}") != *sum) {
            problems.push(format!("`{name}` is damaged: its checksum differs; compile the model again"));
        }
    }
    Ok(problems)
}

/// The tensors that the module names and the file lacks.
fn missing(module: &Module, source: &dyn TensorSource) -> Vec<String> {
    let mut problems = Vec::new();
    for region in &module.regions {
        for id in region.weight_closure(&region.used_weights()) {
            let weight = region.weight(id);
            let names: Vec<String> = match &weight.expr {
                WeightExpr::Source(name) => vec![region.tensor_name(name)],
                WeightExpr::Packed { tensor, layout } => {
                    let stem = region.tensor_name(tensor);
                    let (Some(quant), Some((rows, cols))) = (weight.ty.elem.quant(), weight.ty.matrix()) else {
                        continue;
                    };
                    let parts = layout.parts(quant, rows, cols);
                    parts.into_iter().map(|(suffix, _, _)| format!("{stem}{suffix}")).collect()
                }
                WeightExpr::Param(_)
                | WeightExpr::Mul { .. }
                | WeightExpr::Div { .. }
                | WeightExpr::Offset { .. }
                | WeightExpr::Cat { .. }
                | WeightExpr::Stack(_)
                | WeightExpr::Rows { .. }
                | WeightExpr::Transpose(_)
                | WeightExpr::Clip { .. }
                | WeightExpr::Codes { .. }
                | WeightExpr::Quant(_)
                | WeightExpr::Pack(_) => continue,
            };
            problems.extend(
                names
                    .into_iter()
                    .filter(|n| source.info(n).is_none())
                    .map(|n| format!("`{n}` is missing: compile the model again")),
            );
        }
    }
    problems.sort();
    problems.dedup();
    problems
}

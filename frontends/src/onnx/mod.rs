//! ONNX models: decoders that PyTorch exported, `input_ids` to logits. The file knows products, sums and reshapes; what
//! is read here is one region of such ops ([`awqc_ir::op::Foreign`]), in which positions, masks and the shapes of heads
//! have been worked out. Norms, rotations and attention are recognised in it by rewrites, which are not this crate's.

mod evaluate;
mod facts;
mod import;
mod numbers;
mod proto;
mod slices;
mod source;
mod values;
mod view;
mod wire;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use awqc_ir::{Module, TensorSource};
use serde_json::Map;

use crate::error::ImportError;
use crate::file::DataFile;
use crate::open::{CONFIG, Imported, Kind, extra_files, read_config};
use proto::{Attribute, Graph};
use source::{Files, Named, OnnxSource};

/// The file's name in a folder.
pub(crate) const FILE: &str = "model.onnx";

/// Opens a model. The configuration and the tokenizer are those beside it, if there are any.
pub(crate) fn open(path: &Path) -> Result<Imported, ImportError> {
    let main = DataFile::open(path)?;
    let mut graph = proto::read(&main)?;
    constants(&mut graph);
    let files = Files::open(main, graph.tensors.iter())?;
    let (region, named, elem) = import::Importer::new(path, &graph, &files)?.run()?;
    let mut tensors = BTreeMap::new();
    for (name, (tensor, transposed)) in named {
        if let Some(tensor) = graph.tensors.get(&tensor).cloned() {
            tensors.insert(name, Named { tensor, transposed });
        }
    }
    let mut module = Module::new("onnx", elem);
    module.regions.push(region);
    let folder = path.parent().unwrap_or(Path::new("."));
    let config = folder.join(CONFIG);
    let config = if config.is_file() { read_config(&config)? } else { Map::new() };
    let source: Arc<dyn TensorSource> = Arc::new(OnnxSource { files, tensors });
    Ok(Imported { module, source, config, files: extra_files(folder), notes: Vec::new(), kind: Kind::Onnx })
}

/// Matrices that are constants of the graph are tensors like the others.
fn constants(graph: &mut Graph) {
    let Graph { nodes, tensors, .. } = graph;
    nodes.retain_mut(|node| {
        let (Some(Attribute::Tensor(t)), [name], "Constant") = (node.attributes.get("value"), node.outputs.as_slice(), node.op.as_str()) else {
            return true;
        };
        let matrix = t.kind.is_float() && t.shape.iter().filter(|d| **d != 1).count() > 1;
        if matrix {
            tensors.insert(name.clone(), t.clone());
        }
        !matrix
    });
}

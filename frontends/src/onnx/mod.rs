//! ONNX models: decoders that PyTorch exported, `input_ids` to logits. The file knows products, sums and reshapes; what
//! is read here is one region of such ops ([`awqc_ir::op::Foreign`]), in which positions, masks and the shapes of heads
//! have been worked out. Norms, rotations and attention are recognised in it by rewrites, which are not this crate's.

mod channels;
mod evaluate;
mod facts;
mod import;
mod numbers;
mod pairs;
mod products;
mod proto;
mod slices;
mod source;
mod values;
mod view;
mod weights;
mod wire;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use awqc_ir::op::Foreign;
use awqc_ir::{Module, Op, TensorSource};
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
    let mut importer = import::Importer::new(path, &graph, &files)?;
    importer.run()?;
    if let Some(far) = importer.far {
        windows(path, &graph, &files, &mut importer, far)?;
    }
    let import::Importer { region, named, elem, .. } = importer;
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

/// A distance in place of one that is too long to be seen.
const SHORT: f64 = 5.0;

/// Windows that are wider than the samples are long: the model is read again with a short distance in the place of the
/// long one, and the masks in which that shows are windows of the long one.
fn windows(
    path: &Path,
    graph: &Graph,
    files: &Files,
    importer: &mut import::Importer<'_>,
    far: f64,
) -> Result<(), ImportError> {
    let mut short = import::Importer::new(path, graph, files)?;
    short.instead = Some((far, SHORT));
    short.run()?;
    if short.far.is_some() {
        return Err(ImportError::unsupported(
            path,
            format!("compares positions with more than one number as large as {far}"),
        ));
    }
    for id in importer.region.order().to_vec() {
        let mut node = importer.region.node(id).clone();
        let (Op::Foreign(long), Some(seen)) = (&mut node.op, short.region.get_node(id)) else { continue };
        let Op::Foreign(seen) = &seen.op else { continue };
        let width = |f: &Foreign| f.attributes.get("window").and_then(serde_json::Value::as_f64);
        if long.op == "Mask" && long.attributes.get("window") != seen.attributes.get("window") {
            let (None, Some(width)) = (width(long), width(seen)) else {
                return Err(ImportError::unsupported(
                    path,
                    "has attention masks that change with a large number in it",
                ));
            };
            long.attributes.insert("window".into(), ((width - SHORT + far) as u64).into());
            importer.region.set_op(id, node.op);
        }
    }
    Ok(())
}

/// Matrices that are constants of the graph are tensors like the others.
fn constants(graph: &mut Graph) {
    let Graph { nodes, tensors, .. } = graph;
    nodes.retain_mut(|node| {
        let (Some(Attribute::Tensor(t)), [name], "Constant") =
            (node.attributes.get("value"), node.outputs.as_slice(), node.op.as_str())
        else {
            return true;
        };
        let matrix = t.kind.is_float() && t.shape.iter().filter(|d| **d != 1).count() > 1;
        if matrix {
            tensors.insert(name.clone(), t.clone());
        }
        !matrix
    });
}

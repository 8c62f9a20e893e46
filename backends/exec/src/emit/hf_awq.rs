//! The target `hf-awq`: a checkpoint folder in AutoAWQ's GEMM format, which transformers, vLLM and SGLang load.
//!
//! Tensors keep the names that they have in the source checkpoint: each must derive from exactly one source tensor, so
//! passes that join weights are left out for this target.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use awqc_ir::tensor::reads_as;
use awqc_ir::{Elem, Group, Layout, Module, Op, Operand, Quant, Region, Verified, WeightExpr, WeightId};
use awqc_passes::analysis::linears::quantizable;
use serde_json::{Map, Value as Json, json};

use super::{EmitCx, EmitError, Emitted, Emitter, ExtraFile, Writer, encode, write, write_extra};
use crate::layout;
use crate::realize::{Realized, realize, rows};

/// Bytes of one shard, unless one tensor is more: what the format's other writers use.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes the `hf-awq` artefact.
pub struct HfAwq {
    dir: PathBuf,
    config: Map<String, Json>,
    extra: Vec<ExtraFile>,
    shard_bytes: u64,
    shards: Vec<Writer>,
    /// Tensors written, each with whether it is the source tensor unchanged.
    written: BTreeMap<String, Change>,
    quant: Option<Quant>,
    /// Modules of float linears, and tables of embeddings.
    float_linears: BTreeSet<String>,
    tables: BTreeSet<String>,
}

/// Whether a written tensor is the source tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    Some,
}

impl HfAwq {
    /// An emitter into the empty folder `dir`. `config` is the source's `config.json`; `extra` is copied.
    pub fn new(dir: &Path, config: Map<String, Json>, extra: Vec<ExtraFile>) -> Self {
        Self {
            dir: dir.to_owned(),
            config,
            extra,
            shard_bytes: SHARD_BYTES,
            shards: Vec::new(),
            written: BTreeMap::new(),
            quant: None,
            float_linears: BTreeSet::new(),
            tables: BTreeSet::new(),
        }
    }

    /// Begins a new shard before one would exceed this many bytes.
    #[must_use]
    pub fn with_shard_bytes(mut self, bytes: u64) -> Self {
        self.shard_bytes = bytes;
        self
    }

    fn add(&mut self, name: &str, tensor: &awqc_ir::RawTensor) -> Result<(), EmitError> {
        let full = |w: &Writer| w.bytes() > 0 && w.bytes() + tensor.bytes.len() as u64 > self.shard_bytes;
        if self.shards.last().is_none_or(full) {
            self.shards.push(Writer::new(&self.dir, &format!("shard{}", self.shards.len())));
        }
        match self.shards.last_mut() {
            Some(shard) => shard.add(name, tensor),
            None => Ok(()),
        }
    }

    fn weight(&mut self, region: &Region, id: WeightId, cx: &EmitCx<'_>) -> Result<(), EmitError> {
        let names = source_names(region, id)?;
        let [name] = names.as_slice() else {
            // A stack is written as the matrices, or vectors, that it was made of.
            let all = realize(region, id, cx.source)?;
            let count = match &all {
                Realized::Float { .. } => 1,
                Realized::Quant(codes) => codes.rows / names.len().max(1),
            };
            for (e, name) in names.into_iter().enumerate() {
                let part = match rows(&all, e * count, count) {
                    Some(Realized::Float { shape, data }) => Realized::Float { shape: shape[1..].to_vec(), data },
                    Some(codes @ Realized::Quant(_)) => codes,
                    None => return Err(EmitError::Unsupported(format!("tensor `{name}` is not in its stack"))),
                };
                self.written.insert(name.clone(), Change::Some);
                self.tensor(&name, part)?;
            }
            return Ok(());
        };
        let change = match region.weight(id).expr {
            WeightExpr::Source(_) => Change::None,
            WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
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
            | WeightExpr::Pack(_) => Change::Some,
        };
        match self.written.insert(name.clone(), change) {
            None => {}
            // Tied weights: one tensor serves both.
            Some(Change::None) if change == Change::None => return Ok(()),
            Some(_) => {
                return Err(EmitError::Unsupported(format!(
                    "tensor `{name}` is used twice and changed differently; this format has one tensor of that name: leave the shared weight unquantized and unscaled"
                )));
            }
        }
        let mut numbers = realize(region, id, cx.source)?;
        // What was read as a matrix goes back to the axes that it has in the checkpoint.
        if let (Realized::Float { shape, .. }, Some(info)) = (&mut numbers, cx.source.info(name))
            && reads_as(&info.shape, shape)
        {
            *shape = info.shape;
        }
        self.tensor(name, numbers)
    }

    fn tensor(&mut self, name: &str, numbers: Realized) -> Result<(), EmitError> {
        match numbers {
            Realized::Float { shape, data } => {
                let tensor = encode(Elem::F16, shape, &data).map_err(|at| {
                    EmitError::Unsupported(format!(
                        "tensor `{name}` holds {} at element {at}, which f16 cannot: this format stores f16, use the target `reference`",
                        data.get(at).copied().unwrap_or(f32::NAN)
                    ))
                })?;
                self.add(name, &tensor)
            }
            Realized::Quant(codes) => {
                let stem = module_name(name)?;
                match self.quant {
                    None => self.quant = Some(codes.quant),
                    Some(q) if q == codes.quant => {}
                    Some(q) => {
                        return Err(EmitError::Unsupported(format!(
                            "`{name}` is {}, others are {q}: this format has one quantization for all",
                            codes.quant
                        )));
                    }
                }
                let parts = layout::pack(&codes, Layout::AwqGemm)
                    .map_err(|e| EmitError::Unsupported(format!("tensor `{name}`: {}", e.0)))?;
                parts.iter().try_for_each(|part| self.add(&format!("{stem}{}", part.suffix), &part.tensor))
            }
        }
    }

    fn quantization_config(&self) -> Json {
        let group = match self.quant.map(|q| q.group) {
            Some(Group::Size(g)) => i64::from(g),
            Some(Group::Row) | None => -1,
        };
        // A tied head has no module of its own: loaders leave it alone.
        let skipped: Vec<&String> = self.float_linears.difference(&self.tables).collect();
        let skipped = if skipped.is_empty() { Json::Null } else { json!(skipped) };
        json!({
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": true,
            "version": "gemm",
            "modules_to_not_convert": skipped,
        })
    }
}

/// The module of a linear's weight: the tensor's name without `.weight`.
fn module_name(tensor: &str) -> Result<&str, EmitError> {
    tensor.strip_suffix(".weight").ok_or_else(|| {
        EmitError::Unsupported(format!(
            "tensor `{tensor}` is quantized but its name does not end in `.weight`, which this format requires"
        ))
    })
}

/// The full name of the one checkpoint tensor that a weight is made of, or of each one of a stack.
fn source_names(region: &Region, id: WeightId) -> Result<Vec<String>, EmitError> {
    let sources = region.sources(id);
    let names: Vec<String> = sources.iter().map(|s| format!("`{}`", region.tensor_name(s))).collect();
    let weight = region.weight(id).name.as_deref().unwrap_or("(unnamed)");
    let refuse = |why: String| EmitError::Unsupported(format!("weight ${weight} of region {}: {why}", region.name));
    let stacked =
        region.weight_closure(&[id]).into_iter().any(|w| matches!(region.weight(w).expr, WeightExpr::Stack(_)));
    let (([source], false) | ([source, ..], true)) = (sources.as_slice(), stacked) else {
        let why = format!(
            "it joins {} ({}); this format keeps the source's tensors: leave out the passes that join weights",
            names.len(),
            names.join(", ")
        );
        return Err(refuse(why));
    };
    let full = region.tensor_name(source);
    let mut offset = 0.0;
    for term in region.weight_closure(&[id]) {
        match &region.weight(term).expr {
            WeightExpr::Transpose(_) => {
                return Err(refuse(format!(
                    "tensor `{full}` is stored [in,out] (Conv1D), this format's loaders expect [out,in] linears: use the target `reference`"
                )));
            }
            WeightExpr::Rows { .. } | WeightExpr::Cat { .. } => {
                return Err(refuse(format!(
                    "it is a part of tensor `{full}`; this format keeps whole tensors: use the target `reference`"
                )));
            }
            WeightExpr::Offset { by, .. } => offset += by,
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
            | WeightExpr::Mul { .. }
            | WeightExpr::Div { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Clip { .. }
            | WeightExpr::Codes { .. }
            | WeightExpr::Quant(_)
            | WeightExpr::Pack(_) => {}
        }
    }
    if offset != 0.0 {
        return Err(refuse(format!(
            "tensor `{full}` is stored with another offset than it is used with: use the target `reference`"
        )));
    }
    Ok(sources.iter().map(|s| region.tensor_name(s)).collect())
}

/// Whether the linears of every layer can be written once they are quantized to `quant`: to be asked before a long
/// compile.
///
/// # Errors
/// The first weight that cannot, with the reason.
pub fn check(module: &Module, quant: Quant) -> Result<(), EmitError> {
    for region in module.regions.iter().filter(|r| r.name.is_layer()) {
        for linear in quantizable(region) {
            let names = source_names(region, linear.weight)?;
            names.iter().try_for_each(|n| module_name(n).map(|_| ()))?;
            if let (Some((rows, cols)), Some(name)) = (region.weight(linear.weight).ty.matrix(), names.first()) {
                let rows = rows / names.len();
                layout::fits(Layout::AwqGemm, quant, rows, cols)
                    .map_err(|e| EmitError::Unsupported(format!("tensor `{name}` [{rows},{cols}]: {}", e.0)))?;
            }
        }
    }
    Ok(())
}

impl Emitter for HfAwq {
    fn region(&mut self, region: &Region, cx: &EmitCx<'_>) -> Result<(), EmitError> {
        for (_, node) in region.nodes() {
            let Some(Operand::Weight(id)) = node.operands.get(1) else { continue };
            let module = |n: &String| n.strip_suffix(".weight").unwrap_or(n).to_owned();
            let modules = || source_names(region, *id).map(|all| all.iter().map(module).collect::<Vec<_>>());
            if matches!(node.op, Op::Linear(_)) && region.weight(*id).ty.elem.is_float() {
                self.float_linears.extend(modules()?);
            }
            if matches!(node.op, Op::Embedding(_)) {
                self.tables.extend(modules()?);
            }
        }
        region.used_weights().into_iter().try_for_each(|id| self.weight(region, id, cx))
    }

    fn finish(mut self: Box<Self>, _: Verified<'_>) -> Result<Emitted, EmitError> {
        let quantization = self.quantization_config();
        self.config.insert("quantization_config".into(), quantization);
        self.config.insert("torch_dtype".into(), "float16".into());
        if self.config.contains_key("dtype") {
            self.config.insert("dtype".into(), "float16".into());
        }
        let Self { dir, config, extra, shards, .. } = *self;
        let extra: Vec<ExtraFile> = extra.into_iter().filter(|f| f.name != "config.json").collect();
        let mut files = write_extra(&dir, &extra)?;
        let count = shards.len();
        let tensor_bytes = shards.iter().map(Writer::bytes).sum();
        let mut map = BTreeMap::new();
        for (i, shard) in shards.into_iter().enumerate() {
            let file = if count == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", i + 1)
            };
            map.extend(shard.names().map(|n| (n.to_owned(), Json::from(file.as_str()))));
            shard.finish(&dir.join(&file), &[("format", "pt")])?;
            files.push(file);
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": tensor_bytes}, "weight_map": Json::Object(map.into_iter().collect())});
            files.push("model.safetensors.index.json".into());
            write(&dir.join("model.safetensors.index.json"), format!("{index:#}\n").as_bytes())?;
        }
        write(&dir.join("config.json"), format!("{:#}\n", Json::Object(config)).as_bytes())?;
        files.push("config.json".into());
        files.sort();
        Ok(Emitted { files, tensor_bytes })
    }
}

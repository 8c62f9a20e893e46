//! GGUF metadata as a Hugging Face configuration, by the `config` lines of a family's `gguf` section.

use std::path::Path;

use awqc_ir::text::Env;
use serde_json::{Map, Value as Json, json};

use super::reader::{Header, Value};
use crate::error::ImportError;
use crate::family::env::evaluate;
use crate::family::gguf::GgufSection;

/// A float of the file as the shortest decimal that reads back the same: `1e-5`, not `0.00000999999974…`.
pub(super) fn shortest(v: f32) -> f64 {
    v.to_string().parse().unwrap_or_else(|_| f64::from(v))
}

/// The names that `config` lines may use: `gguf.KEY` is a metadata value (`none` if absent), `has.TENSOR` says whether
/// the file has a tensor, `block0.TENSOR` whether its first block has it, `rows.TENSOR` and `cols.TENSOR` are the
/// lengths of its first and last axis.
struct Names<'a>(&'a Header);

impl Env for Names<'_> {
    fn lookup(&self, name: &str) -> Option<Json> {
        let (space, key) = name.split_once('.')?;
        let tensor = self.0.tensors.get(key);
        match space {
            "gguf" => Some(self.0.metadata.get(key).map_or(Json::Null, json_of)),
            "has" => Some(tensor.is_some().into()),
            "block0" => Some(self.0.tensors.contains_key(&format!("blk.0.{key}")).into()),
            "rows" => Some(tensor.and_then(|t| t.shape.first()).map_or(Json::Null, |n| (*n).into())),
            "cols" => Some(tensor.and_then(|t| t.shape.last()).map_or(Json::Null, |n| (*n).into())),
            _ => None,
        }
    }

    fn tensor(&self, _: &str) -> bool {
        false
    }
}

/// A metadata value as JSON. An array of equal integers is that integer: files give per-layer values where most
/// models have one for all. Other arrays become lists.
fn json_of(value: &Value) -> Json {
    match value {
        Value::U64(n) => (*n).into(),
        Value::I64(n) => (*n).into(),
        Value::F32(x) => shortest(*x).into(),
        Value::F64(x) => (*x).into(),
        Value::Bool(b) => (*b).into(),
        Value::Str(s) => s.as_str().into(),
        Value::Ints(list) => match list.split_first() {
            Some((first, rest)) if rest.iter().all(|v| v == first) => (*first).into(),
            Some(_) | None => list.clone().into(),
        },
        Value::Longs(list) => list.clone().into(),
        Value::Floats(list) => list.iter().map(|v| Json::from(shortest(*v))).collect(),
        Value::Doubles(list) => list.clone().into(),
        Value::Bytes(list) => list.clone().into(),
        Value::Strs(list) => list.len().into(),
    }
}

/// The configuration that the section's lines compute from the file's head.
pub(super) fn synthesise(
    path: &Path,
    header: &Header,
    section: &GgufSection,
) -> Result<Map<String, Json>, ImportError> {
    let names = Names(header);
    let mut config = Map::new();
    config.insert("architectures".into(), json!([section.class]));
    for (key, expression) in &section.config {
        let value = evaluate(expression, &names).map_err(|e| {
            ImportError::config(path, key, format!("cannot be made from the file's metadata by `{expression}`: {e}"))
        })?;
        if !value.is_null() {
            config.insert(key.clone(), value);
        }
    }
    if let Some(scaling) = rope_scaling(path, header, &section.architecture)? {
        config.insert("rope_scaling".into(), scaling);
    }
    Ok(config)
}

/// `ARCH.rope.scaling.*` as the value of `rope_scaling`.
fn rope_scaling(path: &Path, header: &Header, architecture: &str) -> Result<Option<Json>, ImportError> {
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    let number = |name: &str| header.metadata.get(&key(name)).map(json_of);
    let kind = match header.metadata.get(&key("type")) {
        None => return Ok(None),
        Some(Value::Str(kind)) => kind.as_str(),
        Some(other) => return Err(ImportError::config(path, key("type"), format!("is {other:?}; a text is needed"))),
    };
    let mut out = Map::new();
    match kind {
        "none" => return Ok(None),
        "linear" | "yarn" => out.insert("rope_type".into(), kind.into()),
        other => {
            return Err(ImportError::unsupported(
                path,
                format!("`{}` is `{other}`; none, linear and yarn are known", key("type")),
            ));
        }
    };
    for (name, value) in
        [("factor", number("factor")), ("original_max_position_embeddings", number("original_context_length"))]
    {
        if let Some(value) = value {
            out.insert(name.into(), value);
        }
    }
    Ok(Some(Json::Object(out)))
}

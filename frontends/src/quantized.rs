//! Checkpoints that are quantized already: Hugging Face folders in AutoAWQ's GEMM layout. A weight that is stored as
//! `.qweight`, `.qzeros` and `.scales` becomes a packed term; no family knows of it.

use std::path::Path;

use awqc_ir::{Dim, Elem, Group, Layout, Quant, Stored, TensorInfo, TensorSource, Type};
use serde_json::{Map, Value as Json};

use crate::error::ImportError;
use crate::family::show;

/// How a checkpoint is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    pub(crate) quant: Quant,
}

/// The parts of a packed weight: suffix and storage.
const PARTS: [(&str, Stored); 3] = [(".qweight", Stored::I32), (".qzeros", Stored::I32), (".scales", Stored::F16)];

/// Codes in a word.
const PER_WORD: u64 = 8;

impl Scheme {
    /// Reads `quantization_config` of a configuration; `None` if the model is not quantized.
    pub(crate) fn of_config(path: &Path, config: &Map<String, Json>) -> Result<Option<Self>, ImportError> {
        match config.get("quantization_config") {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Object(q)) => Self::read(path, "quantization_config.", q).map(Some),
            Some(other) => Err(ImportError::config(
                path,
                "quantization_config",
                format!("is {}; an object is needed", show(other)),
            )),
        }
    }

    /// Reads the settings, in `config.json` or in the older file of their own.
    pub(crate) fn read(path: &Path, prefix: &str, q: &Map<String, Json>) -> Result<Self, ImportError> {
        let bad = |key: &str, value: &Json, want: &str| {
            ImportError::config(path, format!("{prefix}{key}"), format!("is {}; {want}", show(value)))
        };
        let text = |key: &str| match q.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(s)) => Ok(Some(s.to_lowercase())),
            Some(other) => Err(bad(key, other, "a text is needed")),
        };
        let refuse = |what: String| {
            ImportError::unsupported(path, format!("{what}; `awq` in the `gemm` layout is read: use the float model"))
        };
        match text("quant_method")?.as_deref() {
            None if prefix.is_empty() => {}
            Some("awq") => {}
            Some(other) => return Err(refuse(format!("the model is quantized by `{other}`"))),
            None => {
                return Err(refuse(
                    "the model is quantized by a method that `quantization_config` does not name".into(),
                ));
            }
        }
        match text("version")?.as_deref() {
            None | Some("gemm") => {}
            Some(other) => return Err(refuse(format!("the model is quantized in the `{other}` layout"))),
        }
        let either = |a: &'static str, b: &'static str| if q.contains_key(a) { (a, q.get(a)) } else { (b, q.get(b)) };
        match either("bits", "w_bit") {
            (_, None) => {}
            (_, Some(n)) if n.as_u64() == Some(4) => {}
            (key, Some(other)) => return Err(bad(key, other, "4 is needed")),
        }
        match q.get("zero_point") {
            None | Some(Json::Bool(true)) => {}
            Some(Json::Bool(false)) => return Err(refuse("the model is quantized without zero points".into())),
            Some(other) => return Err(bad("zero_point", other, "true or false is needed")),
        }
        let group = match either("group_size", "q_group_size") {
            (_, Some(n)) if n.as_i64() == Some(-1) => Group::Row,
            (key, Some(n)) => match n.as_u64().and_then(|g| u32::try_from(g).ok()).filter(|g| *g > 0) {
                Some(g) => Group::Size(g),
                None => return Err(bad(key, n, "a positive integer or -1 is needed")),
            },
            (_, None) => Group::Size(128),
        };
        Ok(Self { quant: Quant { bits: 4, symmetric: false, group } })
    }

    /// The stem whose parts hold the weight `name`, if the checkpoint has them instead of it.
    pub(crate) fn stem(name: &str, has: impl Fn(&str) -> bool) -> Option<&str> {
        name.strip_suffix(".weight").filter(|stem| has(&format!("{stem}.qweight")) && !has(name))
    }

    /// The names of a packed weight's parts.
    pub(crate) fn parts(stem: &str) -> impl Iterator<Item = String> {
        PARTS.iter().map(move |(suffix, _)| format!("{stem}{suffix}"))
    }

    /// The type of the packed weight at `stem`, of the logical shape of `float`.
    ///
    /// # Errors
    /// What is wrong with each part.
    pub(crate) fn packed_type(self, stem: &str, float: &Type, source: &dyn TensorSource) -> Result<Type, Vec<String>> {
        let Some([Dim::Const(out), Dim::Const(input)]) = float.shape.get(..) else {
            return Err(vec![format!("`{stem}` is packed, but {float} is no matrix")]);
        };
        let (out, input) = (*out, *input);
        let mut problems = Vec::new();
        if let Group::Size(g) = self.quant.group
            && input % u64::from(g) != 0
        {
            problems.push(format!("`{stem}`: {input} inputs are no multiple of the group size {g}"));
        }
        if out % PER_WORD != 0 {
            problems.push(format!("`{stem}`: {out} outputs are no multiple of {PER_WORD}"));
        }
        let groups = usize::try_from(input).map_or(0, |n| self.quant.group.count(n)) as u64;
        let shapes = [[input, out / PER_WORD], [groups, out / PER_WORD], [groups, out]];
        for ((suffix, stored), shape) in PARTS.iter().zip(shapes) {
            let name = format!("{stem}{suffix}");
            match source.info(&name) {
                None => {
                    problems.push(format!("`{name}` is missing: packed weights have .qweight, .qzeros and .scales"))
                }
                Some(TensorInfo { stored: s, shape: found }) => {
                    let same = found.iter().map(|d| *d as u64).eq(shape);
                    if s != *stored || !same {
                        problems.push(format!("`{name}` is {s} {found:?}; {stored} {shape:?} is needed for {out} outputs and {input} inputs"));
                    }
                }
            }
        }
        if problems.is_empty() {
            Ok(Type { elem: Elem::Quant(self.quant), layout: Some(Layout::AwqGemm), shape: float.shape.clone() })
        } else {
            Err(problems)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scheme(q: Json) -> Result<Option<Scheme>, ImportError> {
        Scheme::of_config(Path::new("config.json"), json!({"quantization_config": q}).as_object().unwrap())
    }

    #[test]
    fn gemm_is_read_and_others_are_refused_by_name() {
        let s =
            scheme(json!({"quant_method": "awq", "version": "GEMM", "bits": 4, "group_size": 64, "zero_point": true}))
                .unwrap();
        assert_eq!(s.unwrap().quant.group, Group::Size(64));
        assert_eq!(scheme(json!({"quant_method": "awq", "group_size": -1})).unwrap().unwrap().quant.group, Group::Row);
        for (q, word) in [
            (json!({"quant_method": "gptq", "bits": 4}), "gptq"),
            (json!({"quant_method": "compressed-tensors"}), "compressed-tensors"),
            (json!({"quant_method": "awq", "version": "gemv"}), "gemv"),
        ] {
            let e = scheme(q).unwrap_err();
            assert!(e.is_unsupported() && e.to_string().contains(word), "{e}");
        }
        let e = scheme(json!({"quant_method": "awq", "bits": "four"})).unwrap_err();
        assert!(!e.is_unsupported() && e.to_string().contains("`quantization_config.bits`"), "{e}");
    }

    #[test]
    fn the_older_file_has_other_keys() {
        let q = json!({"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"});
        let s = Scheme::read(Path::new("quant_config.json"), "", q.as_object().unwrap()).unwrap();
        assert_eq!(s.quant.group, Group::Size(32));
    }
}

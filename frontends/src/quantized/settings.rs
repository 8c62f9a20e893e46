//! The settings of a quantized checkpoint, as JSON, and what is said of those that are not understood.

use std::path::Path;

use awqc_ir::Group;
use serde_json::{Map, Value as Json};

use crate::error::ImportError;
use crate::family::show;

/// An object of settings in a file.
#[derive(Clone, Copy)]
pub(super) struct Settings<'a> {
    pub(super) path: &'a Path,
    /// What stands before its keys in messages: `quantization_config.`.
    pub(super) prefix: &'a str,
    pub(super) map: &'a Map<String, Json>,
}

impl Settings<'_> {
    /// A value that is set.
    pub(super) fn get(&self, key: &str) -> Option<&Json> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn bad(&self, key: &str, value: &Json, want: &str) -> ImportError {
        let key = format!("{}{key}", self.prefix);
        ImportError::config(self.path, key, format!("is {}; {want}", show(value)))
    }

    pub(super) fn refuse(&self, what: impl std::fmt::Display) -> ImportError {
        ImportError::unsupported(
            self.path,
            format!(
                "{what}. `awq` (gemm, gemv, gemv_fast), `gptq` and `compressed-tensors` (pack-quantized) are read: use one of them, or the float model"
            ),
        )
    }

    /// A text in lower case.
    pub(super) fn text(&self, key: &str) -> Result<Option<String>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::String(s)) => Ok(Some(s.to_lowercase())),
            Some(other) => Err(self.bad(key, other, "a text is needed")),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.bad(key, other, "true or false is needed")),
        }
    }

    /// The bits of a code, under the first of `keys` that is set.
    pub(super) fn bits(&self, keys: &[&str], known: &[u8]) -> Result<Option<u8>, ImportError> {
        let Some((key, value)) = keys.iter().find_map(|k| Some((*k, self.get(k)?))) else { return Ok(None) };
        let bits = value.as_u64().and_then(|b| u8::try_from(b).ok()).filter(|b| known.contains(b));
        let words: Vec<String> = known.iter().map(u8::to_string).collect();
        bits.map(Some).ok_or_else(|| self.bad(key, value, &format!("{} is needed", words.join(", "))))
    }

    /// The group size, under the first of `keys` that is set; -1 stands for the whole row.
    pub(super) fn group(&self, keys: &[&str]) -> Result<Option<Group>, ImportError> {
        let Some((key, value)) = keys.iter().find_map(|k| Some((*k, self.get(k)?))) else { return Ok(None) };
        if value.as_i64() == Some(-1) {
            return Ok(Some(Group::Row));
        }
        let size = value.as_u64().and_then(|g| u32::try_from(g).ok()).filter(|g| *g > 0);
        size.map(|g| Some(Group::Size(g))).ok_or_else(|| self.bad(key, value, "a positive integer or -1 is needed"))
    }

    /// The object under a key.
    pub(super) fn object(&self, key: &str) -> Result<Option<&Map<String, Json>>, ImportError> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.bad(key, other, "an object is needed")),
        }
    }
}

//! What templates and directives may ask: configuration values, a few values derived from them, and which tensors
//! there are.

use std::cell::RefCell;
use std::path::Path;

use awqc_ir::Elem;
use awqc_ir::text::{Env, parse_with};
use serde_json::{Map, Value as Json};

use super::{rope, show, value_at};
use crate::error::ImportError;

/// The value of a compile-time expression.
///
/// # Errors
/// The parser's message.
pub(crate) fn evaluate(expression: &str, env: &dyn Env) -> Result<Json, String> {
    // The header of a module is where the language has expressions without a region around them.
    let text = format!("awqir 1 model \"\" {{value=({expression})}}");
    let mut module = parse_with(&text, env).map_err(|e| e.to_string())?;
    Ok(module.header.shift_remove("value").unwrap_or(Json::Null))
}

/// The value of a condition.
///
/// # Errors
/// When it is wrong, or comes out as something else than true or false.
pub(super) fn truth(condition: &str, env: &ConfigEnv<'_>) -> Result<bool, ImportError> {
    match evaluate(condition, env) {
        Ok(Json::Bool(b)) => Ok(b),
        Ok(other) => {
            Err(ImportError::config(env.path, condition, format!("is {}; true or false is needed", show(&other))))
        }
        Err(e) => Err(ImportError::config(env.path, condition, format!("cannot be computed: {e}"))),
    }
}

/// The configuration alone, and the number that a pattern found in a tensor's name.
pub(super) struct ConfigEnv<'a> {
    pub(super) path: &'a Path,
    pub(super) config: &'a Map<String, Json>,
    pub(super) number: Option<u32>,
}

/// `config.a.b` of a configuration.
fn config_value(config: &Map<String, Json>, name: &str) -> Option<Json> {
    value_at(config, name.strip_prefix("config.")?).cloned()
}

impl Env for ConfigEnv<'_> {
    fn lookup(&self, name: &str) -> Option<Json> {
        match self.number {
            Some(i) if name == "number" => Some(i.into()),
            Some(_) | None => config_value(self.config, name),
        }
    }

    fn tensor(&self, _: &str) -> bool {
        false
    }
}

/// Everything that a template may ask.
///
/// | name | |
/// |---|---|
/// | `config.KEY…` | a configuration value |
/// | `dtype` | the element type that most of the checkpoint's floats have |
/// | `op.NAME` | the op for the activation of this name |
/// | `act.KEY` | the op for the activation that `config.KEY` names |
/// | `rope_theta`, `rope_theta.KIND` | the base of the rotary frequencies, for all layers, for those of a kind, or as the object KIND has it |
/// | `rope_scaling`, `rope_scaling.KIND` | the change to these frequencies, as the `rope_table` op has it |
pub(super) struct ModelEnv<'a> {
    path: &'a Path,
    config: &'a Map<String, Json>,
    dtype: Elem,
    has: &'a dyn Fn(&str) -> bool,
    /// The first thing that was asked for and is wrong; the language only knows values that are not there.
    error: RefCell<Option<ImportError>>,
}

impl<'a> ModelEnv<'a> {
    pub(super) fn new(
        path: &'a Path,
        config: &'a Map<String, Json>,
        dtype: Elem,
        has: &'a dyn Fn(&str) -> bool,
    ) -> Self {
        Self { path, config, dtype, has, error: RefCell::new(None) }
    }

    /// What went wrong in a look-up, if anything did.
    pub(super) fn into_error(self) -> Option<ImportError> {
        self.error.into_inner()
    }

    fn keep(&self, found: Result<Json, ImportError>) -> Json {
        found.unwrap_or_else(|e| {
            self.error.borrow_mut().get_or_insert(e);
            Json::Null
        })
    }

    /// Where the rotary settings of a kind are: an object of the configuration may have settings of its own.
    fn rotary<'k>(&self, kind: Option<&'k str>) -> (&'a Map<String, Json>, Option<&'k str>) {
        match kind.and_then(|k| self.config.get(k)?.as_object()) {
            Some(inner) => (inner, None),
            None => (self.config, kind),
        }
    }

    /// The op for the activation that a key names.
    fn activation(&self, key: &str) -> Result<Json, ImportError> {
        let name = match value_at(self.config, key) {
            None | Some(Json::Null) => return Ok(Json::Null),
            Some(Json::String(name)) => name.as_str(),
            Some(other) => {
                return Err(ImportError::config(
                    self.path,
                    key,
                    format!("is {}; the name of an activation is needed", show(other)),
                ));
            }
        };
        activation(name).map(Json::from).ok_or_else(|| {
            let problem = format!("`{key}` is `{name}`; {KNOWN} are known");
            ImportError::unsupported(self.path, problem)
        })
    }
}

/// The names that [`activation`] knows, for messages.
const KNOWN: &str = "silu, relu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast and quick_gelu";

/// The op for an activation of this name.
fn activation(name: &str) -> Option<&'static str> {
    Some(match name {
        "silu" | "swish" => "silu",
        "relu" => "relu",
        "gelu" => "gelu",
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" => "gelu {form=tanh}",
        "quick_gelu" => "gelu {form=quick}",
        _ => return None,
    })
}

impl Env for ModelEnv<'_> {
    fn lookup(&self, name: &str) -> Option<Json> {
        let (head, tail) = name.split_once('.').map_or((name, None), |(head, tail)| (head, Some(tail)));
        match (head, tail) {
            ("config", Some(_)) => config_value(self.config, name),
            ("dtype", None) => Some(self.dtype.to_string().into()),
            ("op", Some(name)) => activation(name).map(Json::from),
            ("act", Some(key)) => Some(self.keep(self.activation(key))),
            ("rope_theta", kind) => {
                let (config, kind) = self.rotary(kind);
                Some(self.keep(rope::theta(self.path, config, kind)))
            }
            ("rope_scaling", kind) => {
                let (config, kind) = self.rotary(kind);
                Some(self.keep(rope::scaling(self.path, config, kind)))
            }
            _ => None,
        }
    }

    fn tensor(&self, name: &str) -> bool {
        (self.has)(name)
    }
}

//! The rotary configuration of Hugging Face, `rope_theta` and `rope_scaling` or the later `rope_parameters`, as the
//! `rope_table` op has it.

use std::path::Path;

use awqc_ir::op::RopeScaling;
use serde_json::{Map, Value as Json};

use super::show;
use crate::error::ImportError;

/// The rotary configuration of a model, and the key that holds it.
struct Settings<'a> {
    path: &'a Path,
    key: &'static str,
    map: &'a Map<String, Json>,
}

/// The object that describes the scaling of layers of `kind`; `None` if there is none.
fn settings<'a>(
    path: &'a Path,
    config: &'a Map<String, Json>,
    kind: Option<&str>,
) -> Result<Option<Settings<'a>>, ImportError> {
    for key in ["rope_scaling", "rope_parameters"] {
        let map = match config.get(key) {
            None | Some(Json::Null) => continue,
            Some(Json::Object(map)) => map,
            Some(other) => {
                return Err(ImportError::config(path, key, format!("is {}; an object or null is needed", show(other))));
            }
        };
        // Models with two kinds of layers may have one object for each.
        let map = match kind.and_then(|k| map.get(k)) {
            None => map,
            Some(Json::Object(inner)) => inner,
            Some(Json::Null) => continue,
            Some(other) => {
                return Err(ImportError::config(path, key, format!("holds {}; an object is needed", show(other))));
            }
        };
        return Ok(Some(Settings { path, key, map }));
    }
    Ok(None)
}

impl Settings<'_> {
    fn error(&self, name: &str, problem: String) -> ImportError {
        ImportError::config(self.path, format!("{}.{name}", self.key), problem)
    }

    fn optional(&self, name: &str) -> Result<Option<f64>, ImportError> {
        match self.map.get(name) {
            None | Some(Json::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|v| v.is_finite() && *v > 0.0) {
                Some(v) => Ok(Some(v)),
                None => Err(self.error(name, format!("is {}; a positive number is needed", show(value)))),
            },
        }
    }

    fn number(&self, name: &str) -> Result<f64, ImportError> {
        self.optional(name)?.ok_or_else(|| self.error(name, "is missing; a positive number is needed".into()))
    }

    fn list(&self, name: &str) -> Result<Vec<f64>, ImportError> {
        let bad = |what: String| self.error(name, format!("{what}; a list of positive numbers is needed"));
        let value = self.map.get(name).ok_or_else(|| bad("is missing".into()))?;
        let items = value.as_array().ok_or_else(|| bad(format!("is {}", show(value))))?;
        let number = |v: &Json| {
            v.as_f64().filter(|v| v.is_finite() && *v > 0.0).ok_or_else(|| bad(format!("holds {}", show(v))))
        };
        items.iter().map(number).collect()
    }
}

fn top(path: &Path, config: &Map<String, Json>, key: &str) -> Result<Option<f64>, ImportError> {
    match config.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(value) => match value.as_f64().filter(|v| v.is_finite() && *v > 0.0) {
            Some(v) => Ok(Some(v)),
            None => Err(ImportError::config(path, key, format!("is {}; a positive number is needed", show(value)))),
        },
    }
}

/// The base of the frequencies; null if the configuration has none.
pub(super) fn theta(path: &Path, config: &Map<String, Json>, kind: Option<&str>) -> Result<Json, ImportError> {
    let inner = match settings(path, config, kind)? {
        Some(s) => s.optional("rope_theta")?,
        None => None,
    };
    let found = match inner {
        Some(v) => Some(v),
        None => top(path, config, "rope_theta")?,
    };
    Ok(found.map_or(Json::Null, Json::from))
}

/// The change to the frequencies; null for none.
///
/// Defaults follow transformers 4.51: the context length of training is `original_max_position_embeddings` where it is
/// given, inside the object or beside it, otherwise `max_position_embeddings`.
pub(super) fn scaling(path: &Path, config: &Map<String, Json>, kind: Option<&str>) -> Result<Json, ImportError> {
    let Some(s) = settings(path, config, kind)? else { return Ok(Json::Null) };
    let name = match s.map.get("rope_type").or_else(|| s.map.get("type")) {
        None | Some(Json::Null) => return Ok(Json::Null),
        Some(Json::String(name)) => name.as_str(),
        Some(other) => return Err(s.error("rope_type", format!("is {}; a text is needed", show(other)))),
    };
    let longest = || {
        let found = top(path, config, "max_position_embeddings")?;
        found.ok_or_else(|| {
            ImportError::config(path, "max_position_embeddings", format!("is missing; `{}` needs it", s.key))
        })
    };
    let original = || match s.optional("original_max_position_embeddings")? {
        Some(n) => Ok(n),
        None => match top(path, config, "original_max_position_embeddings")? {
            Some(n) => Ok(n),
            None => longest(),
        },
    };
    let scaling = match name {
        "default" => return Ok(Json::Null),
        "linear" => RopeScaling::Linear { factor: s.number("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: s.number("factor")?, original: longest()? },
        "llama3" => RopeScaling::Bands {
            factor: s.number("factor")?,
            low: s.number("low_freq_factor")?,
            high: s.number("high_freq_factor")?,
            original: s.number("original_max_position_embeddings")?,
        },
        "yarn" => {
            let original = original()?;
            let factor = match s.optional("factor")? {
                Some(f) => f,
                None => longest()? / original,
            };
            let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            let attention =
                match (s.optional("attention_factor")?, s.optional("mscale")?, s.optional("mscale_all_dim")?) {
                    (Some(a), _, _) => a,
                    (None, Some(m), Some(all)) => scale(m) / scale(all),
                    (None, _, _) => scale(1.0),
                };
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast: s.optional("beta_fast")?.unwrap_or(32.0),
                beta_slow: s.optional("beta_slow")?.unwrap_or(1.0),
                attention,
                truncate: s.map.get("truncate").and_then(Json::as_bool).unwrap_or(true),
            }
        }
        "longrope" | "su" => {
            let original = original()?;
            let factor = match (top(path, config, "original_max_position_embeddings")?, s.optional("factor")?) {
                (None, Some(f)) => f,
                (Some(_), _) | (None, None) => longest()? / original,
            };
            // Some configurations have a factor for each length.
            let (given, long) = (s.optional("short_mscale")?, s.optional("long_mscale")?);
            if given != long {
                return Err(s.error("short_mscale", "differs from `long_mscale`; both must be the same".into()));
            }
            let attention = match s.optional("attention_factor")?.or(given) {
                Some(a) => a,
                None if factor <= 1.0 || original <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / original.ln()).sqrt(),
            };
            RopeScaling::Long { short: s.list("short_factor")?, long: s.list("long_factor")?, original, attention }
        }
        other => {
            let problem = format!(
                "`{}.rope_type` is `{other}`; default, linear, dynamic, llama3, yarn and longrope are known",
                s.key
            );
            return Err(ImportError::unsupported(path, problem));
        }
    };
    serde_json::to_value(scaling).map_err(|e| s.error("rope_type", format!("has no JSON form: {e}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scaled(config: Json) -> Result<Json, ImportError> {
        scaling(Path::new("config.json"), config.as_object().unwrap(), None)
    }

    #[test]
    fn every_kind() {
        assert_eq!(scaled(json!({"rope_scaling": null})).unwrap(), Json::Null);
        assert_eq!(
            scaled(json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap(),
            json!({"linear": {"factor": 2.0}})
        );
        let dynamic = json!({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}});
        assert_eq!(scaled(dynamic).unwrap(), json!({"dynamic": {"factor": 2.0, "original": 64.0}}));
        let bands = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
        let want = json!({"bands": {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 32.0}});
        assert_eq!(scaled(json!({"rope_parameters": bands})).unwrap(), want);
    }

    #[test]
    fn yarn_takes_its_factor_from_the_context_lengths() {
        let config = json!({"max_position_embeddings": 128, "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32}});
        let yarn = &scaled(config).unwrap()["yarn"];
        assert_eq!((yarn["factor"].as_f64(), yarn["original"].as_f64()), (Some(4.0), Some(32.0)));
        assert!((yarn["attention"].as_f64().unwrap() - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    }

    #[test]
    fn long_takes_the_original_length_from_beside_the_object() {
        let config = json!({"max_position_embeddings": 256, "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0], "factor": 9.0}});
        let long = &scaled(config).unwrap()["long"];
        assert_eq!(long["original"].as_f64(), Some(64.0));
        assert!((long["attention"].as_f64().unwrap() - (1.0 + 4f64.ln() / 64f64.ln()).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn errors_name_the_key() {
        let e = scaled(json!({"rope_scaling": {"rope_type": "linear", "factor": "two"}})).unwrap_err();
        assert!(e.to_string().contains("`rope_scaling.factor` is \"two\"") && !e.is_unsupported(), "{e}");
        let e = scaled(json!({"rope_scaling": {"rope_type": "cubic"}})).unwrap_err();
        assert!(e.to_string().contains("cubic") && e.is_unsupported(), "{e}");
        assert!(scaled(json!({"rope_scaling": 3})).unwrap_err().to_string().contains("`rope_scaling` is 3"));
    }
}

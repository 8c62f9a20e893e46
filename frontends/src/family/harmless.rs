//! Configuration keys that change nothing of what a model computes, whatever its family. Every other key that the
//! family does not read is an error: it might stand for something that this program does not do.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{Family, show};
use crate::error::ImportError;

/// The list: a key a line, `KEY = JSON` for those that are harmless with one value only, `#` before comments.
const LIST: &str = include_str!("harmless.txt");

/// The keys of the list, and the one value of those that have one.
fn listed() -> impl Iterator<Item = (&'static str, Option<&'static str>)> {
    let lines = LIST.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.map(|l| l.split_once('=').map_or((l, None), |(key, value)| (key.trim(), Some(value.trim()))))
}

/// Fails at a key of `config` that nobody reads and that is not known to be harmless.
///
/// # Errors
/// The first such key, in the order of the file.
pub(super) fn check(path: &Path, family: &Family, config: &Map<String, Json>) -> Result<(), ImportError> {
    object(path, family, config, "")
}

/// The keys of one object; `outer` is the key that holds it, with a dot, or nothing.
fn object(path: &Path, family: &Family, config: &Map<String, Json>, outer: &str) -> Result<(), ImportError> {
    for (name, value) in config.iter().filter(|(_, v)| !v.is_null()) {
        let key = &format!("{outer}{name}");
        let inner = format!("{key}.");
        if let (true, Json::Object(map)) = (family.keys.iter().any(|rule| rule.key.starts_with(&inner)), value) {
            object(path, family, map, &inner)?;
            continue;
        }
        let read = family.keys.iter().any(|rule| rule.key == *key);
        if read || family.harmless.contains(key) || listed().any(|(k, only)| k == name && only.is_none()) {
            continue;
        }
        let written = value.to_string();
        let own = family.fixed.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let only = own.or_else(|| listed().find(|(k, _)| k == name).and_then(|(_, only)| only));
        match only {
            Some(only) if written == only => {}
            Some(only) => {
                return Err(ImportError::config(path, key, format!("is {}; only {only} is known", show(value))));
            }
            None => {
                let name = &family.name;
                return Err(ImportError::config(
                    path,
                    key,
                    format!(
                        "is {}, and means nothing to the family {name}: it may change what the model computes. If it does not, take it out of the file",
                        show(value)
                    ),
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::family::parse::parse;

    fn checked(config: Json) -> Result<(), ImportError> {
        let text = "arch \"toy\" for Toy\nkey size a\nkey size? d.e\nharmless b\nfixed c = \"plain\"\nawqir 1\nmodel \"toy\"\n";
        check(Path::new("config.json"), &parse("toy.awqir", text).unwrap(), config.as_object().unwrap())
    }

    #[test]
    fn keys_are_read_or_known_or_an_error() {
        checked(json!({"a": 3, "b": [1], "c": "plain", "attention_dropout": 0.1, "other": null})).unwrap();
        let e = checked(json!({"a": 3, "other": 1})).unwrap_err();
        assert!(e.to_string().contains("`other` is 1") && !e.is_unsupported(), "{e}");
        // What an object holds is read like the rest, if the family reads any of it.
        checked(json!({"d": {"e": 1, "attention_dropout": 0.1}})).unwrap();
        let e = checked(json!({"d": {"e": 1, "other": 2}})).unwrap_err();
        assert!(e.to_string().contains("`d.other` is 2"), "{e}");
        let e = checked(json!({"c": "fancy"})).unwrap_err();
        assert!(e.to_string().contains("`c` is \"fancy\"; only \"plain\" is known"), "{e}");
        assert!(checked(json!({"is_encoder_decoder": true})).is_err());
    }
}

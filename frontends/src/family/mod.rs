//! Model families: each is one file under `arch/`, a template in the IR's text with a few directives before it. To add
//! a family, add the file, and its name to the list in `src/arch.rs`.

pub(crate) mod env;
pub mod gguf;
mod harmless;
mod instantiate;
mod nearest;
mod parse;
mod pattern;
mod rope;

pub(crate) use instantiate::{Instance, instantiate, template};
pub use pattern::Pattern;

use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::arch::FILES;
use crate::error::ImportError;
use env::{ConfigEnv, truth};
use gguf::GgufSection;
use nearest::nearest;

/// What is known of a family, for lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchInfo {
    /// The family's name, which is its `model_type`.
    pub name: String,
    /// The classes of `architectures` in `config.json` that it covers.
    pub classes: Vec<String>,
    /// The names of `general.architecture` in GGUF files that it covers.
    pub gguf: Vec<String>,
    /// The file that describes it, in `arch/`.
    pub file: String,
}

/// A parsed family file.
#[derive(Clone, Debug)]
pub struct Family {
    /// See [`ArchInfo::name`].
    pub name: String,
    /// The file's name.
    pub file: &'static str,
    /// See [`ArchInfo::classes`].
    pub classes: Vec<String>,
    /// Which of the models of these classes the file describes; all without it.
    pub when: Option<Condition>,
    /// What the configuration must hold.
    pub keys: Vec<KeyRule>,
    /// Keys that change nothing of what the model computes.
    pub harmless: Vec<String>,
    /// Keys that are harmless with one value, as JSON.
    pub fixed: Vec<(String, String)>,
    /// Folders that hold the model's parts.
    pub parts: Vec<Part>,
    /// Other prefixes of tensor names, and what they stand for.
    pub aliases: Vec<(String, String)>,
    /// Tensors of no use.
    pub ignore: Vec<(Pattern, Option<Condition>)>,
    /// Tensors that depend on the configuration.
    pub only: Vec<(Pattern, Condition)>,
    /// GGUF mappings.
    pub gguf: Vec<GgufSection>,
    /// The text after the directives.
    pub template: String,
}

impl Family {
    /// The name in the template of a tensor of a checkpoint: its own, but for the prefixes that others use.
    pub fn name_of(&self, stored: &str) -> String {
        let other = |(theirs, ours): &(String, String)| Some(format!("{ours}{}", stored.strip_prefix(theirs)?));
        self.aliases.iter().find_map(other).unwrap_or_else(|| stored.to_owned())
    }
}

/// A folder with a part of the model: its tensors are called by the folder's name, a dot, and their own.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The folder.
    pub folder: String,
    /// The key under which the template finds the part's configuration.
    pub key: String,
}

/// A compile-time expression over `config`.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition(pub String);

/// What a configuration key must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyRule {
    /// The key; `a.b` for the key `b` of the object `a`.
    pub key: String,
    /// What it must hold.
    pub kind: KeyKind,
    /// Whether it may be missing or null.
    pub optional: bool,
}

/// What a configuration value can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// A positive integer below 2³¹.
    Size,
    /// An integer from 0.
    Count,
    /// A finite number.
    Number,
    /// `true` or `false`.
    Flag,
    /// A text.
    Text,
    /// A list.
    List,
    /// An object.
    Object,
}

impl KeyRule {
    fn check(&self, path: &Path, config: &Map<String, Json>) -> Result<(), ImportError> {
        let value = match value_at(config, &self.key) {
            None | Some(Json::Null) if self.optional => return Ok(()),
            None | Some(Json::Null) => {
                return Err(ImportError::config(
                    path,
                    &self.key,
                    format!("is missing; {} is needed", self.kind.words()),
                ));
            }
            Some(value) => value,
        };
        let fits = match self.kind {
            KeyKind::Size => value.as_u64().is_some_and(|n| n > 0 && n < 1 << 31),
            KeyKind::Count => value.as_u64().is_some(),
            KeyKind::Number => value.as_f64().is_some_and(f64::is_finite),
            KeyKind::Flag => value.is_boolean(),
            KeyKind::Text => value.is_string(),
            KeyKind::List => value.is_array(),
            KeyKind::Object => value.is_object(),
        };
        if fits {
            Ok(())
        } else {
            Err(ImportError::config(path, &self.key, format!("is {}; {} is needed", show(value), self.kind.words())))
        }
    }
}

impl KeyKind {
    fn words(self) -> &'static str {
        match self {
            KeyKind::Size => "a positive integer",
            KeyKind::Count => "an integer from 0",
            KeyKind::Number => "a number",
            KeyKind::Flag => "true or false",
            KeyKind::Text => "a text",
            KeyKind::List => "a list",
            KeyKind::Object => "an object",
        }
    }
}

/// The value of a key, `a.b` for the key `b` of the object `a`.
fn value_at<'c>(config: &'c Map<String, Json>, key: &str) -> Option<&'c Json> {
    let mut path = key.split('.');
    let first = config.get(path.next()?)?;
    path.try_fold(first, |value, key| value.get(key))
}

/// A value in a message, cut where it gets long.
pub(crate) fn show(value: &Json) -> String {
    let text = value.to_string();
    text.char_indices().nth(60).map_or_else(|| text.clone(), |(at, _)| format!("{}…", &text[..at]))
}

/// Parses every family file.
///
/// # Errors
/// When one of them is wrong, which the tests exclude.
fn families() -> Result<Vec<Family>, ImportError> {
    FILES
        .iter()
        .map(|(file, text)| parse::parse(file, text).map_err(|e| ImportError::text(Path::new(file), e)))
        .collect()
}

/// The families that can be imported, sorted by file.
pub fn archs() -> Vec<ArchInfo> {
    let families = families().unwrap_or_default().into_iter();
    let info = |f: Family| ArchInfo {
        name: f.name,
        classes: f.classes,
        gguf: f.gguf.into_iter().map(|g| g.architecture).collect(),
        file: f.file.to_owned(),
    };
    families.map(info).collect()
}

/// The family of a configuration: by class, or by model type where the configuration names no class. `names` gives the
/// checkpoint's tensors, for what is said where no family is found.
///
/// # Errors
/// When the configuration names neither, or the family is not known.
pub(crate) fn by_config(
    path: &Path,
    config: &Map<String, Json>,
    names: impl FnOnce() -> Vec<String>,
) -> Result<Family, ImportError> {
    let class = match config.get("architectures") {
        None | Some(Json::Null) => None,
        Some(Json::Array(list)) => match list.first().map(|c| (c, c.as_str())) {
            None => None,
            Some((_, Some(class))) => Some(class),
            Some((other, None)) => {
                return Err(ImportError::config(
                    path,
                    "architectures",
                    format!("holds {}; class names are needed", show(other)),
                ));
            }
        },
        Some(other) => {
            return Err(ImportError::config(
                path,
                "architectures",
                format!("is {}; a list of class names is needed", show(other)),
            ));
        }
    };
    let model_type = config.get("model_type").and_then(Json::as_str);
    let fits = |f: &Family| match (class, model_type) {
        (Some(class), _) => f.classes.iter().any(|c| c == class),
        (None, Some(model_type)) => f.name == model_type,
        (None, None) => false,
    };
    let families = families()?;
    let env = ConfigEnv { path, config, number: None };
    for family in families.iter().filter(|f| fits(f)) {
        if family.when.as_ref().map_or(Ok(true), |w| truth(&w.0, &env))? {
            return Ok(family.clone());
        }
    }
    let Some(name) = class.or(model_type) else {
        return Err(ImportError::config(
            path,
            "architectures",
            "is missing, and so is `model_type`: the model's family is not known",
        ));
    };
    let mut known: Vec<&str> = families.iter().flat_map(|f| &f.classes).map(String::as_str).collect();
    known.sort_unstable();
    known.dedup();
    let mut problem = format!("the model is a `{name}`, which is not known");
    if let Some(code) = own_code(path, config) {
        problem += &format!(" and brings its own Python code ({code}); this program runs no code of checkpoints");
    }
    problem += &match nearest(&families, config, &names()) {
        Some(n) => format!(". Of what is known, {}. {}", n.words(), n.remedy()),
        None => {
            ". No known family is near to it: describe it in a file under arch/, or convert the checkpoint".to_owned()
        }
    };
    Err(ImportError::unsupported(path, format!("{problem}. Known: {}", known.join(", "))))
}

/// What says that a checkpoint comes with code to be run.
fn own_code(path: &Path, config: &Map<String, Json>) -> Option<String> {
    if config.get("auto_map").is_some_and(|v| !v.is_null()) {
        return Some("`auto_map`".to_owned());
    }
    let files = std::fs::read_dir(path.parent()?).ok()?.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    let mut files: Vec<String> = files.filter(|n| n.ends_with(".py")).collect();
    files.sort();
    files.first().map(|n| format!("`{n}`"))
}

/// The family of a GGUF file.
///
/// # Errors
/// When it is not known.
pub(crate) fn by_gguf(path: &Path, architecture: &str) -> Result<Family, ImportError> {
    let families = families()?;
    let known: Vec<&str> = families.iter().flat_map(|f| &f.gguf).map(|g| g.architecture.as_str()).collect();
    let problem =
        format!("the model is a `{architecture}`, which is not known; known in GGUF files: {}", known.join(", "));
    let found = families.iter().find(|f| f.gguf.iter().any(|g| g.architecture == architecture));
    found.cloned().ok_or_else(|| ImportError::unsupported(path, problem))
}

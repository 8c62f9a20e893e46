//! The one door: a path to a module, whatever it leads to.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqc_ir::{Module, TensorSource};
use serde_json::{Map, Value as Json};

use crate::artefact;
use crate::error::ImportError;
use crate::family::{Family, Instance, by_config, by_gguf, instantiate};
use crate::file::read_small;
use crate::gguf::Gguf;
use crate::onnx;
use crate::parts::open_parts;
use crate::quantized::{self, Scheme};
use crate::safetensors::INDEX;
use crate::{folder, pickle};

/// A model, ready for the compiler.
pub struct Imported {
    /// The whole model.
    pub module: Module,
    /// Its tensors, under the names that the module uses.
    pub source: Arc<dyn TensorSource>,
    /// The Hugging Face configuration; for a GGUF file, one made from its metadata. Empty for a bare module.
    pub config: Map<String, Json>,
    /// Tokenizer and other files that belong to the model.
    pub files: Vec<ExtraFile>,
    /// Things that a person should know.
    pub notes: Vec<String>,
    /// What the path led to.
    pub kind: Kind,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Hugging Face folder, or a file of its tensors.
    HuggingFace,
    /// A GGUF file.
    Gguf,
    /// An ONNX file: a single region of the ops of that format, which rewrites have yet to recognise.
    Onnx,
    /// A compiled artefact.
    Artefact,
    /// A module's text without tensors; those that are read are made up.
    Text,
}

/// A file that goes with the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtraFile {
    /// Its name, without a folder.
    pub name: String,
    /// What is in it.
    pub contents: Contents,
}

/// Where a file's contents are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Here.
    Bytes(Vec<u8>),
    /// In this file.
    Path(PathBuf),
}

impl ExtraFile {
    /// The contents.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, ImportError> {
        match &self.contents {
            Contents::Bytes(bytes) => Ok(bytes.clone()),
            Contents::Path(path) => read_small(path, MAX_TEXT),
        }
    }
}

/// The configuration's file, as Hugging Face tools name it.
pub const CONFIG: &str = "config.json";

/// Files that are copied along, if they are there.
const EXTRA: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE",
];

/// Largest JSON or text file that is read: tokenizers take tens of megabytes.
pub(crate) const MAX_TEXT: u64 = 1 << 28;

/// Opens a model: a Hugging Face folder, a `.safetensors`, `.bin`, `.pt` or `.pth` file with its `config.json`, a
/// `.gguf` file or a folder with one, an `.onnx` file or a folder with `model.onnx`, a compiled artefact, or an
/// `.awqir` file.
///
/// # Errors
/// When the path leads to none of these, a file is damaged, or the model is not known.
pub fn open(path: &Path) -> Result<Imported, ImportError> {
    let meta = std::fs::metadata(path).map_err(|e| ImportError::io(path, e))?;
    if meta.is_dir() {
        return if path.join(artefact::MODULE).is_file() {
            artefact::open_folder(path)
        } else if let (false, Some(file)) = (path.join("config.json").is_file(), only_gguf(path)) {
            open_gguf(&file)
        } else if holds_onnx_alone(path) {
            onnx::open(&path.join(onnx::FILE))
        } else {
            open_hf(path)
        };
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("gguf") => open_gguf(path),
        Some("safetensors") => open_file(path, false),
        Some(extension) if pickle::EXTENSIONS.contains(&extension) => open_file(path, true),
        Some("onnx") => onnx::open(path),
        Some("awqir") => artefact::open_text(path),
        Some(_) | None => Err(ImportError::path(
            path,
            "is no model: give a folder with config.json and safetensors or pytorch_model.bin, a .safetensors, .bin, .pt, .pth, .gguf, .onnx or .awqir file, or a compiled model's folder",
        )),
    }
}

/// Whether a folder has an ONNX model and none in the format of the configuration beside it.
fn holds_onnx_alone(folder: &Path) -> bool {
    let others = [INDEX, "model.safetensors"];
    folder.join(onnx::FILE).is_file() && !others.iter().any(|f| folder.join(f).is_file())
}

/// The GGUF file of a folder that has just one.
fn only_gguf(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path());
    let mut found = entries.filter(|p| p.extension().is_some_and(|e| e == "gguf"));
    found.next().filter(|_| found.next().is_none())
}

fn open_hf(folder: &Path) -> Result<Imported, ImportError> {
    let config = read_config(&folder.join("config.json"))?;
    let names = || folder::open_folder(folder).map_or_else(|_| Vec::new(), |t| t.names());
    let family = by_config(&folder.join("config.json"), &config, names)?;
    let mut whole = config.clone();
    if let Some(parts) = open_parts(folder, &family.parts, &mut whole)? {
        let mut imported = hugging_face(folder, whole, &family, parts.source)?;
        let own = |name: &str| imported.files.iter().any(|f| f.name == name);
        let more: Vec<ExtraFile> = parts.files.into_iter().filter(|f| !own(&f.name)).collect();
        imported.files.extend(more);
        return Ok(imported);
    }
    hugging_face(folder, config, &family, folder::open_folder(folder)?)
}

fn open_file(path: &Path, pickled: bool) -> Result<Imported, ImportError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let config = read_config(&folder.join("config.json"))?;
    let names = || folder::open_file(path, pickled).map_or_else(|_| Vec::new(), |t| t.names());
    let family = by_config(&folder.join("config.json"), &config, names)?;
    // One shard of several stands for all of them.
    let tensors = folder::open_file(path, pickled)?;
    hugging_face(folder, config, &family, tensors)
}

fn hugging_face(
    folder: &Path,
    mut config: Map<String, Json>,
    family: &Family,
    tensors: Arc<dyn TensorSource>,
) -> Result<Imported, ImportError> {
    let path = folder.join("config.json");
    let mut scheme = Scheme::of_config(&path, &config)?;
    for (name, method) in quantized::FILES {
        let old = folder.join(name);
        if scheme.is_none() && old.is_file() {
            let mut settings = read_config(&old)?;
            scheme = Some(Scheme::read(&old, "", &settings, Some(method))?);
            settings.entry("quant_method").or_insert(method.into());
            config.insert("quantization_config".into(), Json::Object(settings));
        }
    }
    let Instance { module, source, notes } = instantiate(&path, family, &config, tensors, scheme, None)?;
    Ok(Imported { module, source, config, files: extra_files(folder), notes, kind: Kind::HuggingFace })
}

fn open_gguf(path: &Path) -> Result<Imported, ImportError> {
    let file = Gguf::open(path)?;
    let family = by_gguf(path, file.architecture()?)?;
    let mapped = file.map(&family)?;
    let elem = mapped.source.elem();
    let instance = instantiate(path, &family, &mapped.config, Arc::new(mapped.source), None, Some(elem))?;
    let Instance { module, source, mut notes } = instance;
    notes.extend(mapped.notes);
    Ok(Imported { module, source, config: mapped.config, files: mapped.files, notes, kind: Kind::Gguf })
}

/// The files of a folder that go with the model, in a fixed order.
pub(crate) fn extra_files(folder: &Path) -> Vec<ExtraFile> {
    let there = EXTRA.iter().map(|name| (name, folder.join(name))).filter(|(_, path)| path.is_file());
    there.map(|(name, path)| ExtraFile { name: (*name).to_owned(), contents: Contents::Path(path) }).collect()
}

/// Reads a JSON object.
pub(crate) fn read_config(path: &Path) -> Result<Map<String, Json>, ImportError> {
    if !path.is_file() {
        return Err(ImportError::path(path, "is missing: a model folder has a config.json beside its tensors"));
    }
    let bytes = read_small(path, MAX_TEXT)?;
    match serde_json::from_slice(&bytes) {
        Ok(Json::Object(map)) => Ok(map),
        Ok(_) => Err(ImportError::malformed(path, "is not a JSON object: download it again")),
        Err(e) => Err(ImportError::malformed(path, format!("is not JSON: {e}; download it again"))),
    }
}

//! An opened model: its graph, its tensors, its tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqc_frontends::{ExtraFile, ImportError, Imported, Kind};
use awqc_ir::{Module, TensorSource, text};
use awqc_passes::raise::raise;

use crate::failure::{Exit, Failure};
use crate::tokens::{Tokenizer, windows};

/// See the module documentation.
pub struct Model {
    /// The graph.
    pub module: Module,
    /// The tensors.
    pub source: Arc<dyn TensorSource>,
    /// The configuration as Hugging Face tools write it.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// Tokenizer and generation files that go with the model.
    pub files: Vec<ExtraFile>,
    /// What people should know of it.
    pub notes: Vec<String>,
    /// What the path led to.
    pub kind: Kind,
    /// The target that an artefact was compiled for.
    pub target: Option<String>,
    /// Where it was opened.
    pub path: PathBuf,
}

impl Model {
    /// Opens a model.
    ///
    /// # Errors
    /// When it is missing, damaged, contradicts itself, or is of an unknown family.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        Self::of(path, awqc_frontends::open(path))
    }

    /// A model of the shape that a configuration describes, with random weights: see [`awqc_frontends::open_random`].
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_random(path: &Path, seed: u64) -> Result<Self, Failure> {
        Self::of(path, awqc_frontends::open_random(path, seed))
    }

    fn of(path: &Path, imported: Result<Imported, ImportError>) -> Result<Self, Failure> {
        let imported = imported
            .map_err(|e| Failure::new(if e.is_unsupported() { Exit::Unsupported } else { Exit::BadInput }, e))?;
        let Imported { mut module, source, config, files, notes, kind } = imported;
        if kind == Kind::Onnx {
            raise(&mut module, &[]).map_err(|e| Failure::new(Exit::Unsupported, format!("{}: {e}", path.display())))?;
        }
        let target = std::fs::read(path.join("report.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok())
            .and_then(|report| Some(report.get("target")?.as_str()?.to_owned()));
        Ok(Self { module, source, config, files, target, notes, kind, path: path.to_owned() })
    }

    /// The graph of an artefact as it was compiled, with the origin of every weight.
    ///
    /// # Errors
    /// When the folder is no artefact.
    pub fn provenance(path: &Path) -> Result<Module, Failure> {
        let file = path.join(awqc_exec::emit::Reference::PROVENANCE);
        let text = std::fs::read_to_string(&file)
            .map_err(|e| Failure::io(&file, &e).help("only an artefact that awqc compiled has a provenance"))?;
        text::parse(&text).map_err(|e| Failure::new(Exit::BadInput, format!("{}\n{e}", file.display())))
    }

    /// The number of tokens that the model knows: the channels of its logits.
    pub fn vocabulary(&self) -> Option<u64> {
        let head = self.module.regions.last()?;
        head.value(*head.results().first()?).ty.channels()
    }

    /// The positions that the model was made for, where its configuration says so.
    pub fn positions(&self) -> Option<u64> {
        let text = self.config.get("text_config").and_then(serde_json::Value::as_object).unwrap_or(&self.config);
        let own = ["max_position_embeddings", "n_positions"].iter().find_map(|key| text.get(*key)?.as_u64())?;
        // With scaled rotations some configurations count what the scaling reaches, others what was trained before it.
        let scaled = ["rope_scaling", "rope_parameters"].iter().find_map(|key| {
            let scaling = text.get(*key)?;
            let trained = scaling["original_max_position_embeddings"].as_u64().unwrap_or(own);
            Some((scaling["factor"].as_f64()? * trained as f64) as u64)
        });
        Some(own.max(scaled.unwrap_or(0)))
    }

    /// A file that goes with the model.
    ///
    /// # Errors
    /// When it exists but cannot be read.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        let file = self.files.iter().find(|f| f.name == name);
        file.map(|f| self.read(f)).transpose()
    }

    /// The contents of one of [`Model::files`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, file: &ExtraFile) -> Result<Vec<u8>, Failure> {
        file.read().map_err(|e| Failure::new(Exit::BadInput, e))
    }

    /// The tokenizer. `otherwise` is what can be done without one.
    ///
    /// # Errors
    /// When there is no `tokenizer.json`, or it is damaged.
    pub fn tokenizer(&self, otherwise: &str) -> Result<Tokenizer, Failure> {
        let bytes = self.file("tokenizer.json")?.ok_or_else(|| {
            let message = format!("{}: there is no tokenizer.json, so text cannot be tokenized", self.path.display());
            Failure::new(Exit::BadInput, message).help(otherwise)
        })?;
        Tokenizer::from_bytes(&bytes)
    }

    /// At most `limit` windows of a text: tokenized whole, no token added, cut without overlap.
    ///
    /// # Errors
    /// When it cannot be read, is too short, or the model has no tokenizer.
    pub fn windows(&self, path: &Path, context: usize, limit: usize) -> Result<Vec<Vec<i32>>, Failure> {
        let text = std::fs::read_to_string(path).map_err(|e| Failure::io(path, &e))?;
        let tokenizer = self.tokenizer("put one into the model's folder, or give token ids with --ids")?;
        windows(&tokenizer.encode(&text)?, context, limit, &path.display().to_string())
    }

    /// A JSON file that goes with the model.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn json(&self, name: &str) -> Result<Option<serde_json::Value>, Failure> {
        let Some(bytes) = self.file(name)? else { return Ok(None) };
        let value = serde_json::from_slice(&bytes)
            .map_err(|e| Failure::new(Exit::BadInput, format!("{name} is not JSON: {e}")))?;
        Ok(Some(value))
    }
}

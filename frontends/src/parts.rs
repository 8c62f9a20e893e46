//! Checkpoints whose parts lie in folders of their own, each with a configuration and tensors as if it were a model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use awqc_ir::{RawTensor, TensorError, TensorInfo, TensorSource};
use serde_json::{Map, Value as Json};

use crate::error::ImportError;
use crate::family::Part;
use crate::folder::open_folder;
use crate::open::{ExtraFile, extra_files, read_config};

/// The tensors of all parts: a part's own names behind its folder's name.
struct Parts {
    of: BTreeMap<String, Arc<dyn TensorSource>>,
}

impl Parts {
    /// The part that a name belongs to, and the name in it.
    fn find<'n>(&self, name: &'n str) -> Option<(&dyn TensorSource, &'n str)> {
        let (folder, inner) = name.split_once('.')?;
        Some((self.of.get(folder)?.as_ref(), inner))
    }
}

impl TensorSource for Parts {
    fn names(&self) -> Vec<String> {
        let of = |(folder, part): (&String, &Arc<dyn TensorSource>)| {
            part.names().into_iter().map(|name| format!("{folder}.{name}")).collect::<Vec<_>>()
        };
        self.of.iter().flat_map(of).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (part, inner) = self.find(name)?;
        part.info(inner)
    }

    fn read(&self, name: &str) -> Result<RawTensor, TensorError> {
        match self.find(name) {
            Some((part, inner)) => part.read(inner),
            None => Err(TensorError(format!("there is no tensor `{name}` in the checkpoint"))),
        }
    }
}

/// What the folders of a model's parts hold.
pub(crate) struct Opened {
    /// The tensors of all parts.
    pub(crate) source: Arc<dyn TensorSource>,
    /// Tokenizer and other files: of two of one name the one of the part that the family names first.
    pub(crate) files: Vec<ExtraFile>,
}

/// Opens the parts of the model in `folder`, and puts their configurations into `config`; `None` if the tensors lie in
/// the folder itself.
///
/// # Errors
/// When a part is missing or damaged.
pub(crate) fn open_parts(
    folder: &Path,
    parts: &[Part],
    config: &mut Map<String, Json>,
) -> Result<Option<Opened>, ImportError> {
    if !parts.iter().any(|p| folder.join(&p.folder).is_dir()) {
        return Ok(None);
    }
    let (mut of, mut files) = (BTreeMap::new(), Vec::<ExtraFile>::new());
    for part in parts {
        let inner = folder.join(&part.folder);
        if !inner.is_dir() {
            return Err(ImportError::path(
                &inner,
                "is missing: the other parts of the model are there; download it again",
            ));
        }
        config.insert(part.key.clone(), Json::Object(read_config(&inner.join("config.json"))?));
        let source: Arc<dyn TensorSource> = open_folder(&inner)?;
        of.insert(part.folder.clone(), source);
        let new = extra_files(&inner).into_iter().filter(|f| files.iter().all(|known| known.name != f.name));
        files.extend(new.collect::<Vec<_>>());
    }
    Ok(Some(Opened { source: Arc::new(Parts { of }), files }))
}

//! Saved statistics: a folder with one safetensors file a region, so that a second compile of the same model, with
//! other bits or groups, needs no calibration run.

use std::path::{Path, PathBuf};

use awqc_exec::HostExecutor;
use awqc_passes::profile::store::{Recording, Replaying, StatsStore, from_tensors, to_tensors};
use awqc_passes::{ExecError, Executor, InputStats, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value as Json;

use crate::failure::{Exit, Failure};
use crate::model::Model;

/// Where a compile takes the statistics of its activations from.
#[derive(Clone, Debug, Default)]
pub enum Statistics {
    /// The calibration text.
    #[default]
    Gather,
    /// The calibration text; they are kept in this folder.
    Save(PathBuf),
    /// This folder.
    Load(PathBuf),
}

/// A number that hardly two models have in common: a checksum of the smallest weight of each region, mostly gains of
/// norms, and of the smallest matrix of the first layer.
///
/// # Errors
/// When a tensor cannot be read.
fn signature(model: &Model) -> Result<Json, Failure> {
    let exec = HostExecutor::new(model.source.clone());
    let mut sum = crc32fast::Hasher::new();
    let first = model.module.regions.iter().position(|r| r.name.is_layer());
    for (i, region) in model.module.regions.iter().enumerate() {
        let smallest = |rank: usize| {
            let sizes = region.used_weights().into_iter().filter_map(|id| {
                let shape = region.weight(id).ty.const_shape().filter(|s| s.len() >= rank)?;
                Some((shape.iter().product::<usize>(), id))
            });
            sizes.min_by_key(|(size, _)| *size).map(|(_, id)| id)
        };
        for id in [smallest(1), smallest(2).filter(|_| Some(i) == first)].into_iter().flatten() {
            for number in exec.realize(region, id)?.data {
                sum.update(&number.to_le_bytes());
            }
        }
    }
    Ok(sum.finalize().into())
}

/// A folder of statistics.
pub struct Folder {
    dir: PathBuf,
    replay: bool,
    /// What the statistics were gathered on, for the report.
    pub calibration: Json,
    /// Whose they are, if that is known.
    model: Json,
}

/// Says what the statistics were gathered on. It is written last: a folder without it is not complete.
const INDEX: &str = "calibration.json";
/// Its entry for the model's [`signature`].
const MODEL: &str = "model";

impl Folder {
    /// A new or empty folder for the statistics of `calibration`.
    ///
    /// # Errors
    /// When the folder holds something, or cannot be made.
    pub fn create(dir: &Path, calibration: Json) -> Result<Self, Failure> {
        std::fs::create_dir_all(dir).map_err(|e| Failure::io(dir, &e))?;
        let mut entries = std::fs::read_dir(dir).map_err(|e| Failure::io(dir, &e))?;
        if entries.next().is_some() {
            return Err(Failure::new(Exit::Usage, format!("{}: the folder is not empty", dir.display()))
                .help("give --save-profile another folder, or read this one with --profile"));
        }
        Ok(Self { dir: dir.to_owned(), replay: false, calibration, model: Json::Null })
    }

    /// A folder that an earlier compile filled.
    ///
    /// # Errors
    /// When it is missing or incomplete.
    pub fn open(dir: &Path) -> Result<Self, Failure> {
        let index = dir.join(INDEX);
        let help = "give the folder that an earlier compile filled with --save-profile";
        let bytes = std::fs::read(&index).map_err(|e| Failure::io(&index, &e).help(help))?;
        let mut calibration: Json = serde_json::from_slice(&bytes)
            .map_err(|e| Failure::new(Exit::BadInput, format!("{}: {e}", index.display())).help(help))?;
        let model = calibration.as_object_mut().and_then(|entries| entries.remove(MODEL)).unwrap_or_default();
        Ok(Self { dir: dir.to_owned(), replay: true, calibration, model })
    }

    /// The same folder as that of `model`'s statistics. One that does not say whose it holds is believed.
    ///
    /// # Errors
    /// When it was filled for a model with another [`signature`], or a tensor cannot be read.
    pub fn of(mut self, model: &Model) -> Result<Self, Failure> {
        let own = signature(model)?;
        if self.replay && self.model != own && !self.model.is_null() {
            let message = format!("{}: these are the statistics of another model", self.dir.display());
            return Err(Failure::new(Exit::BadInput, message).help("leave out --profile to calibrate this one"));
        }
        self.model = own;
        Ok(self)
    }

    /// Puts this folder in front of `exec` while `work` runs.
    pub fn with<R>(&mut self, exec: &mut dyn Executor, work: impl FnOnce(&mut dyn Executor) -> R) -> R {
        match self.replay {
            true => work(&mut Replaying { inner: exec, store: self }),
            false => work(&mut Recording { inner: exec, store: self }),
        }
    }

    /// Marks a filled folder as complete.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(&self) -> Result<(), Failure> {
        match self.replay {
            true => Ok(()),
            false => {
                let mut index = self.calibration.clone();
                index[MODEL] = self.model.clone();
                crate::files::write(&self.dir.join(INDEX), index.to_string().as_bytes())
            }
        }
    }

    /// Removes the folder and what is in it.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(self) -> Result<(), Failure> {
        std::fs::remove_dir_all(&self.dir).map_err(|e| Failure::io(&self.dir, &e))
    }

    fn file(&self, region: &str) -> PathBuf {
        self.dir.join(format!("{}.safetensors", region.trim_start_matches('@')))
    }
}

impl StatsStore for Folder {
    fn load(&self, region: &str) -> Result<Option<Vec<InputStats>>, ExecError> {
        let path = self.file(region);
        let damaged = |why: &dyn std::fmt::Display| ExecError::Tensor(format!("{}: {why}", path.display()));
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(damaged(&e)),
        };
        let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(&e))?;
        let get = |name: &str| {
            let view = file.tensor(name).ok().filter(|t| t.dtype() == Dtype::F32)?;
            let data = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            Some(Tensor::new(view.shape().to_vec(), data))
        };
        from_tensors(get).map(Some).map_err(|e| damaged(&e))
    }

    fn save(&mut self, region: &str, stats: &[InputStats]) -> Result<(), ExecError> {
        let path = self.file(region);
        let failed = |why: &dyn std::fmt::Display| ExecError::Unavailable(format!("{}: {why}", path.display()));
        let tensors = to_tensors(stats).into_iter().map(|(name, t)| {
            let bytes: Vec<u8> = t.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name, t.shape, bytes)
        });
        let tensors: Vec<_> = tensors.collect();
        let views =
            tensors.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
        let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>().map_err(|e| failed(&e))?;
        let file = safetensors::serialize(views, None).map_err(|e| failed(&e))?;
        crate::files::write(&path, &file).map_err(|e| failed(&e))
    }
}

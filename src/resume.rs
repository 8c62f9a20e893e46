//! Going on where a killed compile stopped: every finished region is kept in a work folder beside the output, until the
//! output is complete. A work folder of another model, pipeline or calibration text is refused.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use awqc_ir::{Module, Region, text};
use awqc_passes::{Remark, Remarks};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::failure::{Exit, Failure};

/// The work folder of one compile.
pub struct Work {
    dir: PathBuf,
}

/// What the passes had to say about one region.
#[derive(Serialize, Deserialize)]
struct Said {
    list: Vec<Remark>,
    stats: Vec<(String, String, f64)>,
    records: Vec<(String, Json)>,
}

impl Said {
    /// What `remarks` has more than `before`.
    fn since(before: &Remarks, remarks: &Remarks) -> Self {
        let old =
            |pass: &String, name: &String| before.stats.get(&(pass.clone(), name.clone())).copied().unwrap_or(0.0);
        Self {
            list: remarks.list[before.list.len()..].to_vec(),
            stats: remarks.stats.iter().map(|((p, n), v)| (p.clone(), n.clone(), v - old(p, n))).collect(),
            records: remarks.records[before.records.len()..].to_vec(),
        }
    }

    /// Adds it to `remarks`.
    fn tell(self, remarks: &mut Remarks) {
        remarks.list.extend(self.list);
        remarks.records.extend(self.records);
        for (pass, name, value) in self.stats {
            *remarks.stats.entry((pass, name)).or_default() += value;
        }
    }
}

/// The widths that were allocated.
const WIDTHS: &str = "widths.json";

impl Work {
    /// The folder beside `out`, for a compile that `fingerprint` identifies.
    ///
    /// # Errors
    /// When the folder belongs to another compile, or cannot be made.
    pub fn open(out: &Path, fingerprint: &Json) -> Result<Self, Failure> {
        let name = out.file_name().map_or_else(|| "out".into(), |n| n.to_string_lossy());
        let dir = out.with_file_name(format!(".{name}.resume"));
        claim(&dir, fingerprint, "compile")?;
        Ok(Self { dir })
    }

    /// Regions that an earlier run finished.
    pub fn finished(&self) -> usize {
        let files = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        files.filter(|f| f.path().extension().is_some_and(|e| e == "awqir")).count()
    }

    /// Keeps region `index` of `module` as the passes left it. `before` are the remarks from before the region.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn save(
        &self,
        index: usize,
        module: &Module,
        region: &Region,
        before: &Remarks,
        remarks: &Remarks,
    ) -> Result<(), Failure> {
        let mut alone = module.clone();
        alone.regions = vec![region.clone()];
        let numbers: Vec<(String, Vec<usize>, Vec<u8>)> = region
            .data_ids()
            .filter_map(|id| {
                let data = region.data(id);
                let bytes = data.values.as_ref()?.iter().flat_map(|v| v.to_le_bytes()).collect();
                Some((data.name.to_string(), data.shape.iter().map(|n| *n as usize).collect(), bytes))
            })
            .collect();
        let views =
            numbers.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
        let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        let file = views.and_then(|v| safetensors::serialize(v, None)).map_err(|e| Failure::new(Exit::Failed, e))?;
        crate::files::write(&self.file(index, "safetensors"), &file)?;
        let said = serde_json::to_vec(&Said::since(before, remarks)).map_err(|e| Failure::new(Exit::Failed, e))?;
        crate::files::write(&self.file(index, "json"), &said)?;
        // Last: a region counts as finished once its text is there.
        crate::files::write(&self.file(index, "awqir"), text::print(&alone).as_bytes())
    }

    /// Region `index` as an earlier run left it, if it finished it: the region, and the fused ops so far go to
    /// `module`, what was said to `remarks`.
    ///
    /// # Errors
    /// When the kept files are damaged.
    pub fn load(&self, index: usize, module: &mut Module, remarks: &mut Remarks) -> Result<Option<Region>, Failure> {
        let path = self.file(index, "awqir");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(None) };
        let damaged = |path: &Path, why: &dyn std::fmt::Display| {
            Failure::new(Exit::BadInput, format!("{}: {why}", path.display())).help("remove the folder to begin anew")
        };
        let kept = text::parse(&text).map_err(|e| damaged(&path, &e))?;
        let Some(mut region) = kept.regions.into_iter().next() else { return Err(damaged(&path, &"holds no region")) };
        module.fused = kept.fused;

        let path = self.file(index, "safetensors");
        let bytes = fs::read(&path).map_err(|e| Failure::io(&path, &e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(&path, &e))?;
        for id in region.data_ids() {
            let tensor = file.tensor(&region.data(id).name).map_err(|e| damaged(&path, &e))?;
            let values = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            region.set_data_values(id, Some(values));
        }
        let path = self.file(index, "json");
        let bytes = fs::read(&path).map_err(|e| Failure::io(&path, &e))?;
        let said: Said = serde_json::from_slice(&bytes).map_err(|e| damaged(&path, &e))?;
        said.tell(remarks);
        Ok(Some(region))
    }

    /// Keeps the widths that were allocated. `before` are the remarks from before that.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_widths(&self, widths: &[Vec<u8>], before: &Remarks, remarks: &Remarks) -> Result<(), Failure> {
        let kept = serde_json::to_vec(&(widths, Said::since(before, remarks)));
        crate::files::write(&self.dir.join(WIDTHS), &kept.map_err(|e| Failure::new(Exit::Failed, e))?)
    }

    /// The widths that an earlier run allocated, if it came so far; what was said goes to `remarks`.
    ///
    /// # Errors
    /// When the kept file is damaged.
    pub fn load_widths(&self, remarks: &mut Remarks) -> Result<Option<Vec<Vec<u8>>>, Failure> {
        let path = self.dir.join(WIDTHS);
        let Ok(bytes) = fs::read(&path) else { return Ok(None) };
        let (widths, said): (_, Said) = serde_json::from_slice(&bytes).map_err(|e| {
            Failure::new(Exit::BadInput, format!("{}: {e}", path.display())).help("remove the folder to begin anew")
        })?;
        said.tell(remarks);
        Ok(Some(widths))
    }

    /// Removes the folder: the output is complete.
    pub fn done(self) {
        // What is left of it does no harm: its fingerprint still guards it.
        drop(fs::remove_dir_all(&self.dir));
    }

    fn file(&self, index: usize, extension: &str) -> PathBuf {
        self.dir.join(format!("{index:05}.{extension}"))
    }
}

/// Makes `dir` the work folder of what `fingerprint` identifies, a `what` such as a compile.
///
/// # Errors
/// When it belongs to another, or cannot be made.
pub(crate) fn claim(dir: &Path, fingerprint: &Json, what: &str) -> Result<(), Failure> {
    let path = dir.join("fingerprint.json");
    match fs::read(&path) {
        Ok(bytes) => {
            let other: Json = serde_json::from_slice(&bytes).unwrap_or_default();
            let parts = fingerprint.as_object().into_iter().flatten();
            let differ: Vec<&str> = parts.filter(|(k, v)| other.get(*k) != Some(v)).map(|(k, _)| k.as_str()).collect();
            if differ.is_empty() {
                return Ok(());
            }
            let differ = differ.join(", ");
            let message = format!("{}: this belongs to another {what}; what differs: {differ}", dir.display());
            Err(Failure::new(Exit::BadInput, message)
                .help("run the same command as before, or use another folder, or remove this one to begin anew"))
        }
        Err(_) => {
            fs::create_dir_all(dir).map_err(|e| Failure::io(dir, &e))?;
            crate::files::write(&path, fingerprint.to_string().as_bytes())
        }
    }
}

/// What two runs have in common when one may go on where the other stopped: the model's files, the program's version,
/// and what else is given by name.
pub fn fingerprint<const N: usize>(model: &Path, parts: [(&str, Json); N]) -> Json {
    let stamp = |path: &Path| {
        let meta = fs::metadata(path).ok()?;
        let time = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(json!([path.file_name()?.to_string_lossy(), meta.len(), time.as_nanos() as u64]))
    };
    let mut files: Vec<PathBuf> =
        fs::read_dir(model).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    if !model.is_dir() {
        files.push(model.to_owned());
    }
    files.sort();
    let own = [
        ("version of awqc", json!(env!("CARGO_PKG_VERSION"))),
        ("files of the model", files.iter().filter_map(|p| stamp(p)).collect()),
    ];
    own.into_iter().chain(parts).map(|(name, part)| (name.to_owned(), part)).collect()
}

/// A part of a fingerprint: windows of tokens.
pub fn digest(windows: &[Vec<i32>]) -> Json {
    let mut hasher = DefaultHasher::new();
    windows.hash(&mut hasher);
    hasher.finish().into()
}

//! Mean magnitudes of what the linears of a model read: by these, channels are called salient.

use std::collections::BTreeMap;

use awqc_exec::{Control, HostExecutor};
use awqc_ir::ValueId;
use awqc_passes::profile::{store::sets, taps};
use awqc_passes::{Afterwards, ExecError, Executor, InputStats};

use super::Lab;
use crate::failure::Failure;
use crate::progress::Progress;
use crate::statistics::Folder;

/// Where the statistics of activations come from.
pub enum Calibrated {
    /// These windows.
    Windows(Vec<Vec<i32>>),
    /// A folder that a compile or a study filled.
    Folder(Folder),
}

impl Calibrated {
    /// The windows, if they are at hand.
    pub fn windows(&self) -> &[Vec<i32>] {
        match self {
            Calibrated::Windows(windows) => windows,
            Calibrated::Folder(_) => &[],
        }
    }
}

/// Mean |x| for each channel, by region and value, for each expert whose rows the value holds.
pub struct Activations(Vec<BTreeMap<ValueId, Vec<Vec<f32>>>>);

impl Activations {
    /// Reads them from statistics.
    ///
    /// # Errors
    /// When the statistics are of another model, or the user interrupts.
    pub fn read(lab: &Lab<'_>, mut statistics: Folder) -> Result<Self, Failure> {
        let mut out = Vec::new();
        statistics.with(&mut executor(lab), |exec| {
            walk(lab, exec, |stats| {
                let mean =
                    |(id, sets): (ValueId, Vec<InputStats>)| (id, sets.into_iter().map(|s| s.mean_abs).collect());
                out.push(stats.into_iter().map(mean).collect());
            })
        })?;
        Ok(Self(out))
    }

    /// Those of a value of the region with this index, for each expert; empty for a value that no linear reads.
    pub fn of(&self, region: usize, value: ValueId) -> &[Vec<f32>] {
        self.0.get(region).and_then(|r| r.get(&value)).map_or(&[], Vec::as_slice)
    }
}

/// A folder with the statistics, below the work folder if they must be gathered first. What an interrupted study left
/// there complete is used.
///
/// # Errors
/// When the model cannot be run, or the folder cannot be written.
pub fn statistics(lab: &Lab<'_>, calibrated: Calibrated, name: &str) -> Result<Folder, Failure> {
    let windows = match calibrated {
        Calibrated::Folder(folder) => return Ok(folder),
        Calibrated::Windows(windows) => windows,
    };
    let name: String = name.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    let dir = lab.kept.dir().join(name);
    if let Ok(folder) = Folder::open(&dir) {
        return Ok(folder);
    }
    if dir.exists() {
        std::fs::remove_dir_all(&dir).map_err(|e| Failure::io(&dir, &e))?;
    }
    let mut folder = Folder::create(&dir, serde_json::json!({ "windows": windows.len() }))?;
    let mut exec = executor(lab).with_calibration(&windows)?;
    folder.with(&mut exec, |exec| walk(lab, exec, |_| ()))?;
    folder.finish()?;
    Folder::open(&dir)
}

/// An executor that stops when the user asks.
pub fn executor(lab: &Lab<'_>) -> HostExecutor {
    let control = Control::new().with_interrupt(lab.watched.interrupt.flag());
    HostExecutor::new(lab.model.source.clone()).with_control(control)
}

/// Profiles one region after the other.
fn walk(
    lab: &Lab<'_>,
    exec: &mut dyn Executor,
    mut each: impl FnMut(BTreeMap<ValueId, Vec<InputStats>>),
) -> Result<(), Failure> {
    let module = &lab.model.module;
    let mut progress = Progress::new("calibrate", module.regions.len() as u64, lab.watched.quiet);
    for (i, region) in module.regions.iter().enumerate() {
        lab.watched.interrupt.check()?;
        let taps = taps(region);
        // Nothing comes after the last region: it is run for its own sake only.
        let stats = if taps.is_empty() && i + 1 == module.regions.len() {
            Vec::new()
        } else {
            exec.profile(region, &module.fused, &taps, Afterwards::Exit)?
        };
        let mut stats = stats.into_iter();
        let by_tap: BTreeMap<ValueId, Vec<InputStats>> =
            taps.iter().map(|tap| (*tap, stats.by_ref().take(sets(region, *tap)).collect())).collect();
        if by_tap.iter().any(|(tap, s)| s.len() != sets(region, *tap)) {
            return Err(ExecError::Unavailable(format!("region {}: statistics are missing", region.name)).into());
        }
        each(by_tap);
        progress.step(&region.name.to_string());
    }
    progress.finish();
    Ok(())
}

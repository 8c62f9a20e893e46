//! The flags that say what activations are measured on, for every command that calibrates.

use std::path::PathBuf;

use crate::calibration::Calibration;
use crate::failure::{Exit, Failure};

/// Where calibration tokens come from, and how many.
#[derive(clap::Args)]
pub(super) struct CalibrationArgs {
    /// What activations are measured on: `builtin`, `self` (the model writes it), or a text file.
    #[arg(long, value_name = "FILE|builtin|self", default_value = "builtin")]
    calib: Calibration,
    /// Token ids to calibrate on: `input_ids`, [windows, length], of a safetensors file.
    #[arg(long, value_name = "FILE", conflicts_with = "calib")]
    calib_ids: Option<PathBuf>,
    /// At most so many calibration windows; 64 if not given, for `explain` 4.
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Tokens in a calibration window.
    #[arg(long, default_value_t = 512, value_name = "N")]
    seqlen: usize,
}

/// What to calibrate on.
pub(super) struct Plan {
    pub(super) calibration: Calibration,
    pub(super) samples: usize,
    pub(super) seqlen: usize,
}

impl CalibrationArgs {
    /// What the flags ask for; `samples` windows where they do not say.
    pub(super) fn plan(&self, samples: usize) -> Result<Plan, Failure> {
        let samples = self.samples.unwrap_or(samples);
        if samples == 0 || self.seqlen < 2 {
            return Err(Failure::new(Exit::Usage, "at least one calibration window of two tokens is needed"));
        }
        let calibration = self.calib_ids.clone().map_or_else(|| self.calib.clone(), Calibration::Ids);
        Ok(Plan { calibration, samples, seqlen: self.seqlen })
    }
}

//! Calibration text: where the token windows come from that activations are measured on.

use std::path::PathBuf;
use std::str::FromStr;

use serde_json::json;

use crate::failure::Failure;
use crate::model::Model;
use crate::tokens::{read_ids, windows};

/// The text that this project wrote for the purpose; see `assets/README.md`.
const BUILTIN: &str = include_str!("../assets/calibration.txt");

/// Where calibration tokens come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Calibration {
    /// The project's own text.
    Builtin,
    /// Text that the model itself generates.
    SelfGenerated,
    /// A text file.
    Text(PathBuf),
    /// Token ids, `input_ids` of a safetensors file.
    Ids(PathBuf),
}

impl FromStr for Calibration {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "builtin" => Self::Builtin,
            "self" => Self::SelfGenerated,
            file => Self::Text(file.into()),
        })
    }
}

impl Calibration {
    /// At most `samples` windows of `length` tokens. `generate` makes windows with the model itself.
    ///
    /// # Errors
    /// When there is no tokenizer for text, a file cannot be read, or there is less than one window.
    pub fn windows(
        &self,
        model: &Model,
        samples: usize,
        length: usize,
        generate: impl FnOnce(usize, usize) -> Result<Vec<Vec<i32>>, Failure>,
    ) -> Result<Vec<Vec<i32>>, Failure> {
        let encode = |text: &str, what: &str| {
            let otherwise = "give token ids with --calib-ids, let the model write its own text with --calib self, or \
                             compile without calibration: `awqc compile --method rtn`";
            let tokenizer = model.tokenizer(otherwise)?;
            windows(&tokenizer.encode(text)?, length, samples, what)
        };
        match self {
            Self::Builtin => encode(BUILTIN, "the built-in calibration text"),
            Self::SelfGenerated => generate(samples, length),
            Self::Text(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| Failure::io(path, &e))?;
                encode(&text, &path.display().to_string())
            }
            Self::Ids(path) => Ok(read_ids(path)?.into_iter().take(samples).collect()),
        }
    }

    /// What the report says of it.
    pub fn describe(&self) -> serde_json::Value {
        match self {
            Self::Builtin => json!("builtin"),
            Self::SelfGenerated => json!("self"),
            Self::Text(path) => json!({ "text": path.file_name().map(|n| n.to_string_lossy()) }),
            Self::Ids(path) => json!({ "ids": path.file_name().map(|n| n.to_string_lossy()) }),
        }
    }
}

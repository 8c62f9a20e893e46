//! Studies: the measurements by which the AWQ paper argues, on any model and text. Each makes variants of a model, has
//! them all read the same windows, and gives a table; see `docs/studies.md`.
//!
//! [`salient`] and [`scale`] compute weights on the fly ([`overlay`]); [`calibration`] and [`bits`] run pipelines
//! ([`methods`]). What a variant scored is kept as soon as it is known ([`kept`]).

pub mod activations;
pub mod bits;
pub mod calibration;
pub mod kept;
pub mod methods;
pub mod overlay;
pub mod plot;
pub mod salient;
pub mod scale;
pub mod table;

use std::ops::Range;

use awqc_ir::{Module, TensorSource};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::evaluate::{Watched, likelihoods};
use crate::failure::Failure;
use crate::metrics::Clusters;
use crate::model::Model;
use crate::progress::say;
use kept::Kept;

/// A text to evaluate on.
pub struct Text {
    /// What people call it.
    pub name: String,
    /// Its windows of tokens.
    pub windows: Vec<Vec<i32>>,
}

/// What every study is given.
pub struct Lab<'a> {
    /// The model, with float weights.
    pub model: &'a Model,
    windows: Vec<Vec<i32>>,
    texts: Vec<(String, Range<usize>)>,
    kept: Kept,
    /// How the work is watched.
    pub watched: Watched<'a>,
}

/// What a variant scored on one text. Errors are standard errors over windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// exp of the mean negative log likelihood.
    pub perplexity: f64,
    /// Its error.
    pub perplexity_error: Option<f64>,
    /// Perplexity over that of the float model.
    pub ratio: f64,
    /// Its error, from the differences of log likelihoods.
    pub ratio_error: Option<f64>,
}

/// One row of a study's table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was varied, and what else was found.
    #[serde(flatten)]
    pub cells: Map<String, Json>,
    /// The text.
    pub text: String,
    /// The score.
    #[serde(flatten)]
    pub measured: Measured,
}

/// Which cells of a row make the plot.
#[derive(Clone, Copy, Debug)]
pub struct Axes {
    /// The cell on the x axis; rows without a number there become lines across the plot.
    pub x: &'static str,
    /// What is written along it.
    pub label: &'static str,
    /// Whether it is logarithmic.
    pub log: bool,
    /// The cells that tell one curve from another.
    pub series: &'static [&'static str],
}

/// What a study found.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The study.
    pub study: &'static str,
    /// The model's file or folder.
    pub model: String,
    /// Windows and targets of each text.
    pub texts: Vec<Json>,
    /// What was fixed.
    pub settings: Json,
    /// The float model on each text, then the variants in order.
    pub rows: Vec<Row>,
    /// How to plot it.
    #[serde(skip)]
    pub axes: Axes,
}

impl<'a> Lab<'a> {
    /// A place to study `model` on these texts.
    pub fn new(model: &'a Model, texts: Vec<Text>, kept: Kept, watched: Watched<'a>) -> Self {
        let (mut windows, mut ranges) = (Vec::new(), Vec::new());
        for text in texts {
            let start = windows.len();
            windows.extend(text.windows);
            ranges.push((text.name, start..windows.len()));
        }
        Self { model, windows, texts: ranges, kept, watched }
    }

    /// The table, with the float model as its first rows.
    ///
    /// # Errors
    /// When the model cannot be run.
    pub fn begin(&mut self, study: &'static str, settings: Json, axes: Axes) -> Result<Outcome, Failure> {
        let model = self.model.path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let text = |(name, range): &(String, Range<usize>)| {
            let targets: usize = self.windows[range.clone()].iter().map(|w| w.len().saturating_sub(1)).sum();
            serde_json::json!({ "name": name, "windows": range.len(), "tokens": targets })
        };
        let texts = self.texts.iter().map(text).collect();
        let mut outcome = Outcome { study, model, texts, settings, rows: Vec::new(), axes };
        let float = self.float()?;
        self.add(&mut outcome, "float", cells([(axes.series[0], "float".into())]), &float)?;
        Ok(outcome)
    }

    fn float(&mut self) -> Result<Clusters, Failure> {
        self.score("float", |lab| lab.likelihoods(&lab.model.module, lab.model.source.as_ref(), "float"))
    }

    /// What is kept under `key`, or else what `make` finds.
    ///
    /// # Errors
    /// As `make`, and when the result cannot be kept.
    pub fn score<T: serde::Serialize + serde::de::DeserializeOwned>(
        &mut self,
        key: &str,
        make: impl FnOnce(&Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if let Some(known) = self.kept.get(key)? {
            return Ok(known);
        }
        self.watched.interrupt.check()?;
        let value = make(self)?;
        self.kept.put(key, &value)?;
        Ok(value)
    }

    /// Whether the result of `key` is kept.
    pub fn knows(&self, key: &str) -> bool {
        self.kept.has(key)
    }

    /// The negative log likelihoods of all windows under `module`.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn likelihoods(&self, module: &Module, source: &dyn TensorSource, label: &str) -> Result<Clusters, Failure> {
        likelihoods(module, source, &self.windows, label, self.watched)
    }

    /// Adds what a variant scored, a row for each text.
    ///
    /// # Errors
    /// When the float model cannot be run.
    pub fn add(
        &mut self,
        outcome: &mut Outcome,
        label: &str,
        cells: Map<String, Json>,
        nll: &Clusters,
    ) -> Result<(), Failure> {
        let float = self.float()?;
        for (text, range) in &self.texts {
            let (own, float) = (nll.part(range.clone()), float.part(range.clone()));
            let (perplexity, perplexity_error) = own.exp();
            let (ratio, ratio_error) = own.minus(&float).exp();
            let measured = Measured { perplexity, perplexity_error, ratio, ratio_error };
            if !self.watched.quiet {
                let error = perplexity_error.map_or_else(String::new, |e| format!(" ± {e:.3}"));
                say(&format!("{label} on {text}: {perplexity:.3}{error}"));
            }
            outcome.rows.push(Row { cells: cells.clone(), text: text.clone(), measured });
        }
        Ok(())
    }
}

/// Cells of a row, in order.
pub fn cells<const N: usize>(cells: [(&str, Json); N]) -> Map<String, Json> {
    cells.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

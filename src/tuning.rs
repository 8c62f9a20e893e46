//! The part of a compile that takes the whole model at once: every region comes as far as `tune`, then all are tuned.

use awqc_exec::{Control, tune};
use awqc_ir::{Module, TensorSource, verify::verify};
use awqc_passes::pipeline::Pipeline;
use awqc_passes::tune::{Tune, TuneOptions};
use awqc_passes::{Pass, RemarkKind, Remarks};
use serde_json::{Value as Json, json};

use crate::evaluate::Watched;
use crate::failure::{Exit, Failure};
use crate::progress::Progress;

/// A pipeline that tunes.
pub(crate) struct Tuning {
    /// Where `tune` stands in the pipeline.
    pub(crate) at: usize,
    options: TuneOptions,
}

impl Tuning {
    /// The `tune` of `pipeline`, if it has one.
    ///
    /// # Errors
    /// When it has two.
    pub(crate) fn of(pipeline: &str) -> Result<Option<Self>, Failure> {
        let usage = |e: &dyn std::fmt::Display| Failure::new(Exit::Usage, e);
        let Pipeline { steps } = pipeline.parse().map_err(|e| usage(&e))?;
        let mut found = steps.into_iter().enumerate().filter(|(_, s)| s.name == Tune::NAME);
        let Some((at, step)) = found.next() else { return Ok(None) };
        if found.next().is_some() {
            return Err(Failure::new(Exit::Usage, "a pipeline can tune once only"));
        }
        let options = serde_json::from_value(Json::Object(step.options)).map_err(|e| usage(&e))?;
        Ok(Some(Self { at, options }))
    }

    /// Whether there is enough calibration text: asked before work is done.
    ///
    /// # Errors
    /// When there is not.
    pub(crate) fn check(&self, windows: &[Vec<i32>]) -> Result<(), Failure> {
        if windows.is_empty() {
            return Err(Failure::new(Exit::Usage, "tuning needs calibration text, saved statistics are not enough")
                .help("give calibration text in place of --profile"));
        }
        let (needed, given) = (self.options.held_out + 1, windows.len());
        if given < needed {
            return Err(Failure::new(
                Exit::Usage,
                format!("{given} calibration windows are too few to tune on: {needed} are needed, more are better"),
            )
            .help("give more text, or more of it with --samples; or take a method that does not tune"));
        }
        Ok(())
    }

    /// Tunes `module`, which was `float` before the pipeline began.
    ///
    /// # Errors
    /// When there is no calibration text, a tensor cannot be read, or the user interrupts.
    pub(crate) fn run(
        &self,
        watched: Watched<'_>,
        module: &mut Module,
        float: &Module,
        source: &dyn TensorSource,
        windows: &[Vec<i32>],
        remarks: &mut Remarks,
    ) -> Result<(), Failure> {
        let TuneOptions { steps, batch, held_out, .. } = self.options;
        let rate = self.options.rate_for(widest(module));
        let options = tune::Options { steps, batch, rate: rate as f32, held_out };
        let float = verify(float).map_err(|d| Failure::new(Exit::BadInput, d))?;
        let control = Control::new().with_interrupt(watched.interrupt.flag());
        let mut progress = Progress::new("tune", steps as u64, watched.quiet);
        let tuned = tune::tune(module, float, source, windows, &options, &control, &mut |_, loss| {
            progress.step(&format!("divergence {loss:.4}"));
        })?;
        progress.finish();
        remarks.enter(Tune::NAME, "the model");
        remarks.record(json!({
            "rate": rate,
            "divergence": tuned.steps,
            "held_out_before": tuned.before,
            "held_out_after": tuned.after,
            "kept": tuned.kept,
        }));
        let line = format!("divergence on held-out windows {:.5} before, {:.5} after", tuned.before, tuned.after);
        match tuned.kept {
            true => remarks.push(RemarkKind::Applied, line),
            false => remarks.push(RemarkKind::Warning, format!("{line}: nothing is moved")),
        }
        Ok(())
    }
}

/// The most bits that a code of the module's linears has.
fn widest(module: &Module) -> u8 {
    let regions = module.regions.iter();
    let bits = regions.flat_map(|r| {
        let operands = r.nodes().flat_map(|(_, node)| &node.operands);
        operands.filter_map(|o| Some(r.operand_type(*o).elem.quant()?.bits)).collect::<Vec<_>>()
    });
    bits.max().unwrap_or(u8::MAX)
}

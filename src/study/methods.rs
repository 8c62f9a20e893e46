//! The methods that studies compare, run in memory.

use awqc_ir::verify::verify;
use awqc_ir::{Group, Quant};
use awqc_passes::manager::shared_tensors;
use awqc_passes::{Executor, Registry, Remarks};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Lab;
use super::activations::executor;
use crate::compile::{pass_failure, profiles};
use crate::failure::{Exit, Failure};
use crate::metrics::Clusters;
use crate::resume::digest;
use crate::size::Tally;
use crate::statistics::Folder;
use crate::target::{Method, fill, outline};
use crate::tuning::Tuning;
use crate::watch::Watch;

/// The methods that are compared where none are named: those that treat one layer at a time.
pub const METHODS: &[Method] = &[Method::Rtn, Method::Paper, Method::Awq, Method::Gptq, Method::AwqGptq];

/// What a method does to one layer after the other; `SCHEME` stands for bits and group, see [`fill`].
const LAYERS: &str = "SEARCH,quantize{SCHEME}";

/// All that it does.
const WHOLE: &str = "SEARCH,quantize{SCHEME}REFINE";

/// The passes of a method, with `SCHEME` for bits and group.
pub fn pipeline(method: Method) -> String {
    outline(WHOLE, method)
}

/// By what a result is known: what people call it, the passes that made it, and the windows that they calibrated on,
/// where a study has several. A program whose methods have other passes measures anew.
pub fn key(label: &str, method: Method, quant: Quant, windows: &[Vec<i32>]) -> String {
    format!("{label}: {} on {}", fill(WHOLE, method, quant, 16), digest(windows))
}

/// Whether a method looks at activations.
pub fn profiled(method: Method) -> bool {
    profiles(&fill(WHOLE, method, Quant { bits: 4, symmetric: false, group: Group::Row }, 16))
}

/// The method of this name.
///
/// # Errors
/// When there is none; the message lists all.
pub fn find(name: &str) -> Result<Method, Failure> {
    Method::value_variants().iter().copied().find(|m| m.name() == name).ok_or_else(|| {
        let names: Vec<&str> = Method::value_variants().iter().map(|m| m.name()).collect();
        Failure::new(Exit::Usage, format!("there is no method `{name}`"))
            .help(format!("the methods are {}", names.join(", ")))
    })
}

/// What became of a model that a method quantized.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Quantized {
    /// Negative log likelihoods of the windows.
    pub nll: Clusters,
    /// Mean bits of a quantized weight, scales and zero points included.
    pub bits_per_weight: f64,
}

impl Lab<'_> {
    /// Quantizes the model by a method, with these statistics of its activations if it looks at them, and evaluates it.
    /// A method that tunes does so on `windows`.
    ///
    /// # Errors
    /// When a pass fails, the statistics do not fit, there are too few windows, or the model cannot be run.
    pub fn quantized(
        &self,
        registry: &Registry,
        method: Method,
        quant: Quant,
        statistics: Option<&mut Folder>,
        windows: &[Vec<i32>],
    ) -> Result<Quantized, Failure> {
        let tuning = Tuning::of(&fill(WHOLE, method, quant, 16))?;
        tuning.iter().try_for_each(|t| t.check(windows))?;
        let mut manager =
            Watch::default().manager(registry, &fill(LAYERS, method, quant, 16), self.watched.interrupt)?;
        let mut module = self.model.module.clone();
        let mut remarks = Remarks::default();
        let mut run = |exec: &mut dyn Executor| manager.run_module(&mut module, exec, &mut remarks, &mut |_| {});
        let done = match statistics {
            Some(folder) => folder.with(&mut executor(self), run),
            None => run(&mut executor(self)),
        };
        done.map_err(|e| pass_failure(&e))?;
        if let Some(tuning) = tuning {
            let (float, source) = (&self.model.module, self.model.source.as_ref());
            tuning.run(self.watched, &mut module, float, source, windows, &mut remarks)?;
        }
        verify(&module).map_err(|d| Failure::new(Exit::Check, d))?;
        let shared = shared_tensors(&module.regions);
        let mut tally = Tally::default();
        module.regions.iter().enumerate().for_each(|(i, region)| tally.add(region, &shared, i == 0));
        let label = format!("{} {quant}", method.name());
        let nll = self.likelihoods(&module, self.model.source.as_ref(), &label)?;
        Ok(Quantized { nll, bits_per_weight: tally.bits_per_weight() })
    }
}

//! The methods that studies compare: named pipelines, run in memory.

use awqc_ir::verify::verify;
use awqc_ir::{Group, Quant};
use awqc_passes::manager::shared_tensors;
use awqc_passes::{Executor, Registry, Remarks};
use serde::{Deserialize, Serialize};

use super::Lab;
use super::activations::executor;
use crate::compile::{pass_failure, profiles};
use crate::failure::{Exit, Failure};
use crate::metrics::Clusters;
use crate::size::Tally;
use crate::statistics::Folder;
use crate::target::fill;
use crate::watch::Watch;

/// A way to choose codes.
pub struct Method {
    /// What `--methods` takes.
    pub name: &'static str,
    /// The pipeline; `SCHEME` stands for bits and group.
    pub pipeline: &'static str,
}

/// All methods.
pub const METHODS: &[Method] = &[
    Method { name: "rtn", pipeline: "quantize{SCHEME}" },
    Method {
        name: "awq-published",
        pipeline: "profile,awq-scale{mode=reference},awq-clip{mode=reference,skip=scores},quantize{SCHEME}",
    },
    Method { name: "awq", pipeline: "profile,awq-scale,awq-clip,quantize{SCHEME}" },
];

impl Method {
    /// Whether it looks at activations.
    pub fn profiles(&self) -> bool {
        let any = Quant { bits: 4, symmetric: false, group: Group::Row };
        profiles(&fill(self.pipeline, any, 16))
    }

    /// The method of this name.
    ///
    /// # Errors
    /// When there is none; the message lists all.
    pub fn find(name: &str) -> Result<&'static Self, Failure> {
        METHODS.iter().find(|m| m.name == name).ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
            Failure::new(Exit::Usage, format!("there is no method `{name}`"))
                .help(format!("the methods are {}", names.join(", ")))
        })
    }
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
    ///
    /// # Errors
    /// When a pass fails, the statistics do not fit, or the model cannot be run.
    pub fn quantized(
        &self,
        registry: &Registry,
        method: &Method,
        quant: Quant,
        statistics: Option<&mut Folder>,
    ) -> Result<Quantized, Failure> {
        let pipeline = fill(method.pipeline, quant, 16);
        let mut manager = Watch::default().manager(registry, &pipeline, self.watched.interrupt)?;
        let mut module = self.model.module.clone();
        let mut remarks = Remarks::default();
        let mut run = |exec: &mut dyn Executor| manager.run_module(&mut module, exec, &mut remarks, &mut |_| {});
        let done = match statistics {
            Some(folder) => folder.with(&mut executor(self), run),
            None => run(&mut executor(self)),
        };
        done.map_err(|e| pass_failure(&e))?;
        verify(&module).map_err(|d| Failure::new(Exit::Check, d))?;
        let shared = shared_tensors(&module.regions);
        let mut tally = Tally::default();
        module.regions.iter().enumerate().for_each(|(i, region)| tally.add(region, &shared, i == 0));
        let label = format!("{} {quant}", method.name);
        let nll = self.likelihoods(&module, self.model.source.as_ref(), &label)?;
        Ok(Quantized { nll, bits_per_weight: tally.bits_per_weight() })
    }
}

//! `tune`: moves scales and gains so that a whole model predicts what it did before quantization.
//!
//! The one pass that sees more than a region. Here are its name, options and documentation; a driver brings every
//! region as far ([`crate::manager::Manager::run_part`]) and then has the executor tune the module.

use awqc_ir::Region;
use serde::{Deserialize, Serialize};

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct Tune {
    /// What the pipeline says.
    pub options: TuneOptions,
}

/// Options of [`Tune`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct TuneOptions {
    /// Steps of the optimiser.
    pub steps: usize,
    /// Calibration windows in a step.
    pub batch: usize,
    /// Largest relative change of a number in the first steps; if not given, what the width of the codes asks for.
    pub rate: Option<f64>,
    /// Windows that are only measured on.
    pub held_out: usize,
}

impl Default for TuneOptions {
    fn default() -> Self {
        Self { steps: 40, batch: 2, rate: None, held_out: 4 }
    }
}

impl TuneOptions {
    /// The rate for codes of at most so many bits. The fewer the bits, the farther scales have to go.
    pub fn rate_for(&self, bits: u8) -> f64 {
        self.rate.unwrap_or(if bits <= 2 { 2e-3 } else { 1e-3 })
    }
}

impl Pass for Tune {
    const NAME: &'static str = "tune";
    const DOC: &'static str = "\
Moves the scales of quantized weights and the gains of norms so that the model predicts what it did before: by gradient
descent on the divergence of its predictions from those of the float model, over the calibration windows. Codes stay.

# Before
`$w = quant(\"…\")` or `$w = codes(\"…\", #q, #s, #z)`, `$ln = \"…\"`.
# After
`$w = codes(\"…\", #q, #s, #z)` with other scales, `$ln = mul.0(\"…\", #t)`.
# Legal when
Every region has come as far: the pipeline is split here, so it works in `awqc compile` only, once in a pipeline, and
before passes that fuse ops or pack weights.
# Fidelity
Lossy, towards the original. Windows that are not trained on decide: if the divergence on them does not fall, nothing is
moved.
# Options
`steps` (40) of Adam, `batch` (2) calibration windows in each, not more than there are to train on. `rate`: the largest
relative change in a step, which falls to 0 as a cosine; 0.001 if not given, 0.002 if no code has more than 2 bits.
`held-out` (4): calibration windows that are measured on only; without any, the result is kept in any case.
# Reference
EfficientQAT, arXiv 2407.11062, section 3.3 (training of scales, end to end); Adam, arXiv 1412.6980.
";
    type Options = TuneOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Lossy
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        let refuse = |what: String| Err(PassError::Refused(what));
        if options.batch == 0 {
            return refuse("batch=0 is not possible: use 1 or more".into());
        }
        if let Some(rate) = options.rate.filter(|r| !(*r > 0.0 && *r < 1.0)) {
            return refuse(format!("rate={rate} is not possible: use a number between 0 and 1"));
        }
        Ok(Self { options })
    }

    fn run(&self, _: &mut Region, _: &mut PassCx<'_>) -> Result<Changed, PassError> {
        Err(PassError::Refused("`tune` needs the whole model: use it in `awqc compile --passes`".into()))
    }
}

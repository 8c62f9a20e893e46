//! What a pass is, and what it is given to work with.

use std::collections::BTreeSet;

use awqc_ir::{FusedDef, Region};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::exec::{ExecError, Executor};
use crate::facts::Facts;
use crate::remark::Remarks;
use crate::scheme::Scheme;

/// How exactly a pass preserves the function: what the equivalence harness allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fidelity {
    /// The same numbers, up to the order of additions inside one op.
    Exact,
    /// Equal up to float rounding: the largest deviation is at most this many f32 ulps (2⁻²³) of the output's largest
    /// magnitude.
    Rounding(f64),
    /// The function changes on purpose; the pass reports by how much.
    Lossy,
}

/// Whether a pass changed the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It did.
    Yes,
    /// It did not.
    No,
}

/// Why a pass could not do its work.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PassError {
    /// The executor failed.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The region or the options do not allow it; the message says why and what to do.
    #[error("{0}")]
    Refused(String),
}

/// What a pass is given besides its region.
pub struct PassCx<'a> {
    /// The outside world.
    pub exec: &'a mut dyn Executor,
    /// The module's fused ops; a fusion may add one.
    pub fused: &'a mut Vec<FusedDef>,
    /// What earlier passes found out about this region.
    pub facts: &'a mut Facts,
    /// Counters and messages for people.
    pub remarks: &'a mut Remarks,
    /// The quantization that a later `quantize` of this pipeline will apply, if there is one.
    pub scheme: Option<Scheme>,
    /// For a scheme of mixed widths, one for each of [`crate::analysis::linears::units`], as someone allocated them.
    pub widths: Option<&'a [u8]>,
    /// Full names of checkpoint tensors that more than one region uses; scaling one would change the other.
    pub shared: &'a BTreeSet<String>,
    /// Whether this is the module's last region.
    pub last: bool,
    /// How many rewrites may still be applied; [`Budget::default`] allows any number.
    pub budget: &'a mut Budget,
}

/// A number of rewrites that may still be applied: what `--max-rewrites` sets, to bisect a bad one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget(Option<u64>);

impl Budget {
    /// At most `n` rewrites.
    pub fn of(n: u64) -> Self {
        Self(Some(n))
    }

    /// Whether one more is allowed.
    pub fn allows(self) -> bool {
        self.0 != Some(0)
    }

    /// Counts one rewrite.
    pub fn spend(&mut self) {
        self.0 = self.0.map(|n| n.saturating_sub(1));
    }
}

/// A named, configured transformation of one region. Same region, options and facts: same result, byte for byte.
pub trait Pass: Sized {
    /// The name in pipelines, in kebab case; the file is its snake case.
    const NAME: &'static str;
    /// The page of documentation: the fixed headings of `docs/passes.md`.
    const DOC: &'static str;
    /// What the pipeline text may set.
    type Options: DeserializeOwned + Serialize + Default;

    /// How exactly it preserves the function.
    fn fidelity() -> Fidelity;

    /// A pass with these options.
    ///
    /// # Errors
    /// When the options contradict each other.
    fn new(options: Self::Options) -> Result<Self, PassError>;

    /// The quantization that this pass will apply; passes before it see it as [`PassCx::scheme`].
    fn scheme(&self) -> Option<Scheme> {
        None
    }

    /// Transforms a region.
    ///
    /// # Errors
    /// When it cannot do its work; the region may then be half changed and must be dropped.
    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError>;
}

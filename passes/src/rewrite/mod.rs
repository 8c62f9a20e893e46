//! Rewrites: small local changes, as data where possible. A rewrite looks at one node and returns a [`Patch`]; the
//! driver here checks it, applies it and counts it, until none applies any more.
//!
//! A fusion of your own is a rule and a dozen lines around it:
//!
//! ```
//! use awqc_ir::Region;
//! use awqc_passes::{Changed, Fidelity, Pass, PassCx, PassError, Registry, rewrite};
//!
//! /// Squared relu as one kernel.
//! struct FuseSquaredRelu;
//!
//! impl Pass for FuseSquaredRelu {
//!     const NAME: &'static str = "fuse-squared-relu";
//!     const DOC: &'static str = "Fuses `relu(x)²` into `@squared_relu`.";
//!     type Options = ();
//!
//!     fn fidelity() -> Fidelity {
//!         Fidelity::Exact
//!     }
//!
//!     fn new((): ()) -> Result<Self, PassError> {
//!         Ok(Self)
//!     }
//!
//!     fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
//!         rewrite::run_text(
//!             r#"rewrite "squared_relu" {
//!                 match   { %r = relu %x
//!                           %y = mul %r, %r }
//!                 produce { %y = fused @squared_relu(%x) }
//!             }"#,
//!             region,
//!             cx,
//!         )
//!     }
//! }
//!
//! let registry = Registry::empty().with::<FuseSquaredRelu>();
//! assert!(registry.resolve(&"fuse-squared-relu".parse().unwrap()).is_ok());
//! ```
//!
//! With no Rust at all, the same rule in a file of its own becomes a pass through [`crate::Registry::with_rewrites`].

mod matcher;
pub mod parallel_linear;
mod parse;
pub mod patch;
pub mod rule;
mod variables;

use awqc_ir::{NodeId, Region, Uses};

pub use parse::parse_rules;
pub use patch::Patch;
pub use rule::Rule;

use crate::pass::{Changed, Fidelity, PassCx, PassError};
use crate::registry::DynPass;
use crate::remark::RemarkKind;

/// What a rewrite finds at a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Nothing to do with it.
    Nothing,
    /// Nearly what it looks for; the sentence says what is in the way.
    Near(String),
    /// What to change.
    Patch(Patch),
}

/// Looks at one node at a time and proposes changes.
pub trait Rewrite {
    /// What messages and statistics call it.
    fn name(&self) -> &str;

    /// What there is to do at `root`. `uses` belongs to `region`.
    fn find(&self, region: &Region, uses: &Uses, root: NodeId) -> Found;
}

/// Applies rewrites until none applies any more, in program order and, at each node, in the order given. What nearly
/// applied in the end is noted in the remarks.
///
/// # Errors
/// When the rewrites keep undoing each other.
pub fn run<R: Rewrite>(rewrites: &[R], region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
    let limit = 64 + 16 * region.order().len();
    for applied in 0..=limit {
        match step(rewrites, region, cx) {
            Step::Applied => {}
            Step::Done(misses) => {
                for miss in misses {
                    cx.remarks.push(RemarkKind::Missed, miss);
                }
                return Ok(if applied > 0 { Changed::Yes } else { Changed::No });
            }
        }
    }
    let names: Vec<&str> = rewrites.iter().map(Rewrite::name).collect();
    Err(PassError::Refused(format!(
        "after {limit} applications there is no end: the rewrites {} undo each other",
        names.join(", ")
    )))
}

/// [`run`] with rules in text form, as in [`parse_rules`].
///
/// # Errors
/// When the text is wrong, and as [`run`].
pub fn run_text(rules: &str, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
    let rules = parse_rules(rules).map_err(|e| PassError::Refused(e.to_string()))?;
    run(&rules, region, cx)
}

enum Step {
    /// A patch was applied: look again.
    Applied,
    /// Nothing applies; these nearly did.
    Done(Vec<String>),
}

/// Applies the first patch there is.
fn step<R: Rewrite>(rewrites: &[R], region: &mut Region, cx: &mut PassCx<'_>) -> Step {
    let uses = Uses::of(region);
    let mut misses = Vec::new();
    for root in region.order().to_vec() {
        for rewrite in rewrites {
            let place = region
                .node(root)
                .results
                .first()
                .map_or_else(String::new, |r| format!(" at %{}", region.value(*r).name));
            let why = match rewrite.find(region, &uses, root) {
                Found::Nothing => continue,
                Found::Near(why) => why,
                Found::Patch(_) if !cx.budget.allows() => "the number of rewrites is limited".into(),
                Found::Patch(patch) => match patch.apply(region, cx.fused) {
                    Ok(()) => {
                        cx.budget.spend();
                        cx.remarks.count(rewrite.name(), 1.0);
                        cx.remarks.push(RemarkKind::Applied, format!("{}{place}", rewrite.name()));
                        return Step::Applied;
                    }
                    Err(why) => why,
                },
            };
            misses.push(format!("{}{place}: {why}", rewrite.name()));
        }
    }
    Step::Done(misses)
}

/// A pass made of rules, such as those of a user's file.
#[derive(Clone, Debug)]
pub struct RulesPass {
    name: String,
    rules: Vec<Rule>,
}

impl RulesPass {
    /// A pass `name` that applies `rules`.
    pub fn new(name: String, rules: Vec<Rule>) -> Self {
        Self { name, rules }
    }

    /// Its page of documentation.
    pub fn doc(&self) -> String {
        let names: Vec<&str> = self.rules.iter().map(|r| r.name.as_str()).collect();
        format!("Applies the rewrites {}.", names.join(", "))
    }
}

impl DynPass for RulesPass {
    fn name(&self) -> &str {
        &self.name
    }

    /// A rule may produce any ops: what it claims to preserve is checked to rounding.
    fn fidelity(&self) -> Fidelity {
        let outlines = self.rules.iter().all(|r| matches!(r.produce, rule::Produce::Outline { .. }));
        if outlines { Fidelity::Exact } else { Fidelity::Rounding(256.0) }
    }

    fn scheme(&self) -> Option<crate::scheme::Scheme> {
        None
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        run(&self.rules, region, cx)
    }
}

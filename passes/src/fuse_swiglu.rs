//! Fuses the gate of a feed-forward block, with the split before it, into one op.

use awqc_ir::Region;

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::rewrite;

/// The rules, in the order in which they are tried.
pub const RULES: &str = r#"
rewrite "swiglu" {
  match   { %g, %u = split %gu
            %s = silu %g
            %m = mul %s, %u }
  where   same_type(%g, %u), without(%g, heads)
  produce { %m = fused @swiglu(%gu) }
}
rewrite "geglu" {
  match   { %g, %u = split %gu
            %s = gelu %g
            %m = mul %s, %u }
  where   same_type(%g, %u), without(%g, heads)
  produce { %m = fused @geglu(%gu) }
}
"#;

/// See [`Pass::DOC`].
#[derive(Clone, Copy, Debug)]
pub struct FuseSwiglu;

impl Pass for FuseSwiglu {
    const NAME: &'static str = "fuse-swiglu";
    const DOC: &'static str = "\
Fuses a gate, `silu(gate) · up` or `gelu(gate) · up`, with the split that `fuse-gate-up` leaves.

# Before
```text
%g, %u = split %gu {sizes=[96, 96]}
%s = silu %g
%m = mul %s, %u
```
# After
```text
%m = fused @swiglu(%gu)
```
With `gelu`: `@geglu`.
# Legal when
The activated half comes first, and nothing else uses the halves or the activated gate.
# Fidelity
Exact: the body is the ops.
# Options
None.
# Reference
GLU variants: arXiv 2002.05202.
";
    type Options = ();

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new((): ()) -> Result<Self, PassError> {
        Ok(Self)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        rewrite::run_text(RULES, region, cx)
    }
}

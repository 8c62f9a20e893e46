//! Fuses a residual sum with the normalisation that reads it.

use awqc_ir::Region;

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::rewrite;

/// The rules, in the order in which they are tried.
pub const RULES: &str = r#"
rewrite "add_rms_norm" {
  match   { %r = add %x, %o
            %h = rms_norm %r, $g? }
  where   same_type(%x, %o), without(%h, heads)
  produce { %r, %h = fused @add_rms_norm(%x, %o, $g?) }
}
rewrite "add_layer_norm" {
  match   { %r = add %x, %o
            %h = layer_norm %r, $g?, $b? }
  where   same_type(%x, %o)
  produce { %r, %h = fused @add_layer_norm(%x, %o, $g?, $b?) }
}
"#;

/// See [`Pass::DOC`].
#[derive(Clone, Copy, Debug)]
pub struct FuseNorm;

impl Pass for FuseNorm {
    const NAME: &'static str = "fuse-norm";
    const DOC: &'static str = "\
Fuses a residual sum with the normalisation that reads it. The sum stays a result, for the residual stream goes on.

# Before
```text
%r = add %x, %o
%h = rms_norm %r, $g {eps=1e-5}
```
# After
```text
%r, %h = fused @add_rms_norm(%x, %o, $g)
```
Likewise `@add_layer_norm`, with gain and bias.
# Legal when
Both summands have one type, and the normalisation is over all channels.
# Fidelity
Exact: the body is the two ops.
# Options
None.
# Reference
Saves one pass over the residual stream.
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

//! Fuses the rotations of query and key, and the split before them, into one op.

use awqc_ir::Region;

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::rewrite;

/// The rules, in the order in which they are tried.
pub const RULES: &str = r#"
rewrite "rope_qkv" {
  match   { %q, %k, %v = split %qkv
            %qr = rope %q, %cos, %sin
            %kr = rope %k, %cos, %sin }
  where   without(%q, heads)
  produce { %qr, %kr, %v = fused @rope_qkv(%qkv, %cos, %sin) }
}
rewrite "rope_qk" {
  match   { %qr = rope %q, %cos, %sin
            %kr = rope %k, %cos, %sin
            %a = sdpa %qr, %kr, %v }
  produce { %qr, %kr = fused @rope_qk(%q, %k, %cos, %sin) }
}
"#;

/// See [`Pass::DOC`].
#[derive(Clone, Copy, Debug)]
pub struct FuseRope;

impl Pass for FuseRope {
    const NAME: &'static str = "fuse-rope";
    const DOC: &'static str = "\
Fuses the rotations of query and key into one op, after `fuse-qkv` together with the split.

# Before
```text
%q, %k, %v = split %qkv {sizes=[64, 32, 32]}
%qr = rope %q, %cos, %sin {heads=4}
%kr = rope %k, %cos, %sin {heads=2}
```
# After
```text
%qr, %kr, %v = fused @rope_qkv(%qkv, %cos, %sin)
```
Without the split: `%qr, %kr = fused @rope_qk(%q, %k, %cos, %sin)`, where both reach one `sdpa`.
# Legal when
Both rotations use the same angles, and nothing else uses the values before rotation.
# Fidelity
Exact: the body is the ops.
# Options
None.
# Reference
Rotary embedding: arXiv 2104.09864.
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

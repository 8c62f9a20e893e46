//! An `awqc` with a fusion of its own: this whole file is the tool. `docs/write-a-pass.md` walks through it.
//!
//!     cargo run --example custom_fusion -- passes
//!     cargo run --example custom_fusion -- opt examples/block.awqir --passes fuse-attention-out

use std::process::ExitCode;

use awqc::ir::Region;
use awqc::passes::{Changed, Fidelity, Pass, PassCx, PassError, rewrite};

/// Attention and the projection after it, as one op.
struct FuseAttentionOut;

impl Pass for FuseAttentionOut {
    const NAME: &'static str = "fuse-attention-out";
    const DOC: &'static str = "Fuses attention with the output projection into `@attention_out`.";
    type Options = ();

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new((): ()) -> Result<Self, PassError> {
        Ok(Self)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        rewrite::run_text(
            r#"rewrite "attention_out" {
                match   { %a = sdpa %q, %k, %v
                          %o = linear %a, $w }
                produce { %o = fused @attention_out(%q, %k, %v, $w) }
            }"#,
            region,
            cx,
        )
    }
}

fn main() -> ExitCode {
    awqc::main(awqc::standard::registry().with::<FuseAttentionOut>())
}

//! The `awqc` program: the standard registry, and nothing else. A tool with passes of its own is this file with more
//! `.with::<…>()`; see `examples/custom_fusion.rs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    awqc::main(awqc::standard::registry())
}

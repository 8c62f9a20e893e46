//! Developer commands: `cargo xtask COMMAND`. Each command is one module and needs nothing but Rust, a C compiler and
//! Python.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool")]

mod arm;
mod binaries;
mod demo;
mod docs;
mod goldens;
mod gpu;
mod nvrtc;
mod run;
mod test;
mod vnni;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND

  demo              fetch SmolLM2-135M-Instruct, compile it to 4 bits, compare perplexity, size and time, generate text
  test              format, lints, all tests, documentation check: what continuous integration runs
  arm               build for 64-bit ARM, run the CPU back end's tests on emulated processors (part of `test` where it can be had)
  vnni              run the CPU kernels' tests on an emulated x86 processor with AVX-512 VNNI (Debian; fetches the emulator)
  gpu [OPTION...]   test and measure on the machine's NVIDIA device, one report (`gpu --help` says more)
  gpu-prepare DIR   put the programs there that `gpu --with DIR` needs on a machine without Rust
  docs [--check]    write docs/passes.md from the passes' own documentation, or check that it is up to date
  goldens [DIR]     make golden checkpoints with PyTorch in a scratch environment (default: target/goldens)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["demo"] => demo::demo(),
        ["test"] => test::test(),
        ["arm"] => arm::arm(),
        ["vnni"] => vnni::vnni(),
        ["gpu", "--help"] => {
            println!("{}", gpu::USAGE);
            Ok(())
        }
        ["gpu", options @ ..] => gpu::Options::parse(options).and_then(|o| gpu::gpu(&o)),
        ["gpu-prepare", dir] => gpu::prepare(dir),
        ["docs"] => docs::docs(docs::Mode::Write, &[]),
        ["docs", "--check"] => docs::docs(docs::Mode::Check, &[]),
        ["goldens"] => goldens::goldens("target/goldens"),
        ["goldens", dir] => goldens::goldens(dir),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

//! `cargo xtask test`: what continuous integration runs, closing with one line that counts all tests.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::arm;
use crate::docs::{Mode, docs};
use crate::nvrtc;
use crate::run::{cargo, command, run, show};

/// Tests counted over all test binaries.
#[derive(Default)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Everything is built with burn-cuda, once; without it, the crates that know of it are looked at only.
const BURN: [&str; 2] = ["--features", "awqc/burn-cuda"];

/// The test that compiles every kernel with NVRTC.
const KERNELS: &str = "nvrtc_compiles_every_kernel";

pub(crate) fn test() -> Result<()> {
    let cargo = cargo();
    run(&cargo, &["fmt", "--all", "--check"])?;
    let lints = ["--", "-D", "warnings"];
    run(&cargo, &[&["clippy", "--workspace", "--all-targets"], &BURN[..], &lints].concat())?;
    run(&cargo, &[&["clippy", "-p", "awqc", "-p", "awqc-exec"], &lints[..]].concat())?;
    docs(Mode::Check, &BURN)?;
    let mut tally = Tally::default();
    let cargo_test =
        |more: &[&str]| command(&cargo, &[&["test", "--workspace", "--no-fail-fast"], &BURN[..], more].concat());
    // One test compiles all kernels; others that find NVIDIA's compiler would compile those of every model.
    let mut here = tests(cargo_test(&["--", "--skip", KERNELS]).env_remove(nvrtc::VARIABLE), &mut tally);
    match nvrtc::fetch() {
        Ok(folder) => {
            let mut kernels = cargo_test(&["--test", "all", "--", KERNELS]);
            here = here.and(tests(kernels.env(nvrtc::VARIABLE, folder), &mut tally));
        }
        Err(e) => {
            eprintln!("skipped: no kernel is compiled for a GPU: {e:#}");
            tally.skipped += 1;
        }
    }
    let elsewhere = match arm::prepare() {
        Some(environment) => arm::check(&environment, &mut tally),
        None => {
            tally.skipped += 1;
            Ok(())
        }
    };
    println!("{tally}");
    here.and(elsewhere)
}

/// Runs the tests, passes their output on, and adds up the closing lines of the test binaries.
pub(crate) fn tests(command: &mut Command, tally: &mut Tally) -> Result<()> {
    eprintln!("$ {}", show(command));
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let out = child.stdout.take().context("cargo has no output")?;
    for line in BufReader::new(out).lines() {
        let line = line.context("cannot read the output of the tests")?;
        println!("{line}");
        if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |what: &str| {
                let before = counts.split(what).next().unwrap_or_default().trim_end();
                before.rsplit([' ', ';', '.']).next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0)
            };
            tally.passed += count(" passed");
            tally.failed += count(" failed");
            tally.skipped += count(" ignored");
        }
    }
    let status = child.wait().context("cargo did not end")?;
    if !status.success() {
        bail!("some tests failed ({status})");
    }
    if tally.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

//! `cargo xtask arm`: builds everything for 64-bit ARM, and runs the CPU back end's tests on emulated processors.

use anyhow::Result;

use crate::run::{capture, cargo, command, finish};
use crate::test::{Tally, tests};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Processors as the emulator names them, each with what it has that the one before has not.
const PROCESSORS: [(&str, &str); 3] =
    [("cortex-a72", "plain NEON"), ("neoverse-n1", "dot products"), ("max", "8-bit matrix products")];

/// The environment for [`TARGET`]; `None`, with the reason on standard error, where it cannot be had.
pub(crate) fn prepare() -> Option<Vec<(String, String)>> {
    match capture("bash", &["xtask/src/arm.sh"]) {
        Ok(text) => {
            Some(text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
        }
        Err(e) => {
            eprintln!("skipped: nothing is built or run for 64-bit ARM: {e:#}");
            None
        }
    }
}

/// Checks the workspace and runs the tests, counted in `tally`.
pub(crate) fn check(environment: &[(String, String)], tally: &mut Tally) -> Result<()> {
    let cargo = cargo();
    let with = |args: &[&str], more: Option<(&str, &str)>| {
        let mut command = command(&cargo, args);
        command.envs(environment.iter().map(|(k, v)| (k, v))).envs(more);
        // It would switch off the flags for this target.
        command.env_remove("RUSTFLAGS");
        command
    };
    finish(&mut with(&["check", "--workspace", "--tests", "--target", TARGET], None))?;
    for (processor, has) in PROCESSORS {
        eprintln!("{processor}: {has}");
        let args = ["test", "-p", "awqc-cpu", "--lib", "--tests", "--target", TARGET];
        tests(&mut with(&args, Some(("QEMU_CPU", processor))), tally)?;
    }
    Ok(())
}

/// The command: here nothing is skipped.
pub(crate) fn arm() -> Result<()> {
    let Some(environment) = prepare() else { anyhow::bail!("the tools for 64-bit ARM are missing") };
    let mut tally = Tally::default();
    let done = check(&environment, &mut tally);
    println!("{tally}");
    done
}

//! `cargo xtask test`: what continuous integration runs, closing with one line that counts all tests.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::docs::{Mode, docs};
use crate::run::{cargo, command, run};

/// Tests counted over all test binaries.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

pub(crate) fn test() -> Result<()> {
    let cargo = cargo();
    run(&cargo, &["fmt", "--all", "--check"])?;
    run(&cargo, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    docs(Mode::Check)?;
    let mut tally = Tally::default();
    let tests = tests(&cargo, &["test", "--workspace", "--no-fail-fast"], &mut tally);
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    tests
}

/// Runs the tests, passes their output on, and adds up the closing lines of the test binaries.
fn tests(cargo: &str, args: &[&str], tally: &mut Tally) -> Result<()> {
    eprintln!("$ cargo {}", args.join(" "));
    let mut child = command(cargo, args).stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
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

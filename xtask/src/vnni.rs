//! `cargo xtask vnni`: runs the CPU kernels' tests on an emulated processor with AVX-512 VNNI, which few machines have.

use anyhow::{Context, Result};

use crate::binaries::binaries;
use crate::run::{command, finish};

/// What is run there: the name of a test binary, and its arguments. The emulator takes ten seconds for one of ours, so
/// only the products are, and what they are made of.
const COMMANDS: [(&str, &str); 3] = [
    ("all", "--test-threads=1 --nocapture products::instruction_sets"),
    ("all", "--test-threads=1 products"),
    ("awqc_cpu", "--test-threads=1 kernels"),
];

pub(crate) fn vnni() -> Result<()> {
    let mut run = command("bash", &["xtask/src/vnni.sh", "target/vnni"]);
    let binaries = binaries(&["-p", "awqc-cpu", "--lib", "--tests"])?;
    for (name, args) in COMMANDS {
        let of = |(n, _): &&(String, String)| n == name;
        let (_, path) = binaries.iter().find(of).with_context(|| format!("there is no test binary `{name}`"))?;
        run.args([path, args]);
    }
    finish(&mut run)
}

//! Running other programs from the project's root.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The project's root folder: where it was when this tool was built, or the current one if the tool was carried
/// elsewhere.
pub(crate) fn root() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).parent().filter(|p| p.is_dir());
    built.map_or_else(|| std::env::current_dir().unwrap_or_else(|_| PathBuf::from(".")), Path::to_path_buf)
}

/// A command in the project's root.
pub(crate) fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

/// Runs a command whose output goes to the terminal; fails if it fails.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<()> {
    finish(&mut command(program, args))
}

/// As [`run`], for a command that has been prepared.
pub(crate) fn finish(command: &mut Command) -> Result<()> {
    let line = show(command);
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("cannot start `{line}`: is the program installed?"))?;
    if !status.success() {
        bail!("{line} failed ({status})");
    }
    Ok(())
}

/// A command as one would type it.
pub(crate) fn show(command: &Command) -> String {
    let words: Vec<_> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|w| w.to_string_lossy()).collect();
    words.join(" ")
}

/// Runs a command and returns its standard output; its standard error goes to the terminal.
pub(crate) fn capture(program: &str, args: &[&str]) -> Result<String> {
    eprintln!("$ {program} {}", args.join(" "));
    let out = command(program, args)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {program}: is it installed?"))?;
    if !out.status.success() {
        bail!("{program} {} failed ({})", args.join(" "), out.status);
    }
    String::from_utf8(out.stdout).with_context(|| format!("{program} printed something that is not UTF-8"))
}

/// The cargo that runs this tool.
pub(crate) fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

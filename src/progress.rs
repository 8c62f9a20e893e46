//! Progress of long work on standard error: a bar on a terminal, a line now and then otherwise.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// One long piece of work.
pub struct Progress {
    bar: Option<ProgressBar>,
    label: String,
    total: u64,
    done: u64,
    last: Instant,
    quiet: bool,
}

impl Progress {
    /// Work of `total` steps. Quiet progress shows nothing.
    pub fn new(label: impl Into<String>, total: u64, quiet: bool) -> Self {
        let label = label.into();
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template("{prefix:>12} {bar:30} {pos}/{len} {msg} {elapsed} left {eta}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(label.clone());
            bar
        });
        Self { bar, label, total, done: 0, last: Instant::now(), quiet }
    }

    /// One step more, and what comes next.
    pub fn step(&mut self, message: &str) {
        self.done += 1;
        match &self.bar {
            Some(bar) => {
                bar.set_message(message.to_owned());
                bar.set_position(self.done);
            }
            None if !self.quiet && (self.last.elapsed() >= EVERY || self.done == self.total) => {
                self.last = Instant::now();
                say(&format!("{}: {}/{} {message}", self.label, self.done, self.total));
            }
            None => {}
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A line for people on standard error. A closed standard error is no reason to fail.
pub fn say(line: &str) {
    drop(writeln!(std::io::stderr().lock(), "{line}"));
}

/// Text on standard output; `false` once nobody reads it any more. Where it cannot be written for another reason, such
/// as a full disk, the program ends: whoever redirected it must not take a part for the whole.
pub fn print(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => true,
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => false,
        Err(e) => {
            say(&format!("error: cannot write to standard output: {e}"));
            std::process::exit(crate::failure::Exit::Failed as i32);
        }
    }
}

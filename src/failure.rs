//! How the program fails: a message, a remedy where there is one, and the exit code that scripts can rely on.

use std::fmt;

/// The exit codes of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Something went wrong that has no code of its own.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// The model or the target is not supported.
    Unsupported = 3,
    /// The input is missing, damaged or contradicts itself.
    BadInput = 4,
    /// A check or a quality gate was missed.
    Check = 5,
    /// Out of memory or over the budget.
    Memory = 6,
    /// The user interrupted.
    Interrupted = 130,
}

/// A failure on its way to the terminal.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What happened: file, tensor, expectation.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Failure {
    /// A failure without a remedy.
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: message.to_string(), help: None }
    }

    /// The same failure with a remedy.
    #[must_use]
    pub fn help(mut self, help: impl fmt::Display) -> Self {
        self.help = Some(help.to_string());
        self
    }

    /// A failure to read or write a file.
    pub fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        let exit = match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidData | std::io::ErrorKind::PermissionDenied => {
                Exit::BadInput
            }
            std::io::ErrorKind::OutOfMemory => Exit::Memory,
            _other => Exit::Failed,
        };
        // Rust's words for what `read_to_string` does not take.
        match error.kind() {
            std::io::ErrorKind::InvalidData if error.to_string().contains("valid UTF-8") => {
                Self::new(exit, format!("{} is not a text in UTF-8", path.display()))
            }
            _other => Self::new(exit, format!("{}: {error}", path.display())),
        }
    }

    /// The user asked to stop.
    pub fn interrupted() -> Self {
        Self::new(Exit::Interrupted, "interrupted")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "\nhelp: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

impl From<awqc_passes::ExecError> for Failure {
    fn from(error: awqc_passes::ExecError) -> Self {
        use awqc_passes::ExecError as E;
        match &error {
            E::Tensor(_) | E::NotFinite(_) => Self::new(Exit::BadInput, error),
            E::Unavailable(_) => Self::new(Exit::Failed, error),
            E::Memory(_) => Self::new(Exit::Memory, error).help("use a device with more memory, or the processor"),
            E::Interrupted => Self::interrupted(),
        }
    }
}

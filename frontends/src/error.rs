//! Why a model cannot be imported. Every message names the file, the tensor or key, what was expected and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

use awqc_ir::TensorError;

/// Why a model cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The path does not lead to a model.
    #[error("[F01] {path}: {problem}", path = path.display())]
    Path {
        /// What was given.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// The operating system refused to read a file.
    #[error("[F02] cannot read {path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A file does not follow its own format: it is damaged, truncated, or no such file.
    #[error("[F03] {path}: {problem}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what to do.
        problem: String,
    },
    /// A configuration value is missing, of the wrong kind, or contradicts another one.
    #[error("[F04] {path}: `{key}` {problem}", path = path.display())]
    Config {
        /// The configuration file, or the checkpoint whose metadata stand for it.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with its value, and what is understood.
        problem: String,
    },
    /// The model's family, or something that the configuration asks for, is not known.
    #[error("[F05] {path}: {problem}", path = path.display())]
    Unsupported {
        /// The checkpoint.
        path: PathBuf,
        /// What is not supported, and what is.
        problem: String,
    },
    /// The tensors of the checkpoint are not the ones that the family needs.
    #[error("[F06] {path}: {problems}", path = path.display())]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// All of them at once.
        problems: Problems,
    },
    /// A module's text is wrong: a family template, or a compiled artefact.
    #[error("[F07] {path}: {problem}", path = path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        problem: String,
    },
    /// A tensor that the import needs could not be read.
    #[error("[F08] {0}")]
    Tensor(#[from] TensorError),
}

/// A list of problems, one a line.
#[derive(Debug, Default)]
pub struct Problems(pub Vec<String>);

/// Problems that are shown; a checkpoint of another model would otherwise fill the screen.
const SHOWN: usize = 20;

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the tensors do not fit the model ({})", self.0.len())?;
        for problem in self.0.iter().take(SHOWN) {
            write!(f, "\n  {problem}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n  … and {more} more"),
        }
    }
}

impl ImportError {
    /// Whether the input may be fine and it is this program that does not know it; otherwise the input is bad.
    pub fn is_unsupported(&self) -> bool {
        match self {
            ImportError::Unsupported { .. } => true,
            ImportError::Path { .. }
            | ImportError::Io { .. }
            | ImportError::Malformed { .. }
            | ImportError::Config { .. }
            | ImportError::Tensors { .. }
            | ImportError::Text { .. }
            | ImportError::Tensor(_) => false,
        }
    }

    /// The stable code that begins the message.
    pub fn code(&self) -> &'static str {
        match self {
            ImportError::Path { .. } => "F01",
            ImportError::Io { .. } => "F02",
            ImportError::Malformed { .. } => "F03",
            ImportError::Config { .. } => "F04",
            ImportError::Unsupported { .. } => "F05",
            ImportError::Tensors { .. } => "F06",
            ImportError::Text { .. } => "F07",
            ImportError::Tensor(_) => "F08",
        }
    }

    pub(crate) fn path(path: &Path, problem: impl Into<String>) -> Self {
        ImportError::Path { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        ImportError::Io { path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        ImportError::Malformed { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn config(path: &Path, key: impl Into<String>, problem: impl Into<String>) -> Self {
        ImportError::Config { path: path.to_owned(), key: key.into(), problem: problem.into() }
    }

    pub(crate) fn unsupported(path: &Path, problem: impl Into<String>) -> Self {
        ImportError::Unsupported { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn text(path: &Path, problem: impl Into<String>) -> Self {
        ImportError::Text { path: path.to_owned(), problem: problem.into() }
    }
}

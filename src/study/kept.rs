//! What a study has found so far, in a work folder: one result a line, written as soon as it is known, so that a study
//! that was interrupted, or is run again with more variants, measures only what is new.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value as Json;
use tempfile::TempDir;

use crate::failure::{Exit, Failure};
use crate::resume::claim;

/// Results by key.
pub struct Kept {
    known: BTreeMap<String, Json>,
    dir: PathBuf,
    file: File,
    /// Goes away with the program, if no folder was given.
    _scratch: Option<TempDir>,
}

#[derive(Serialize, Deserialize)]
struct Line<T> {
    key: String,
    value: T,
}

impl Kept {
    /// The results in `dir`, which is made if there is none; if none is given, in a folder that goes away with the
    /// program. `fingerprint` is what all of them depend on.
    ///
    /// # Errors
    /// When the folder belongs to another study, is damaged, or cannot be made.
    pub fn open(dir: Option<&Path>, fingerprint: &Json) -> Result<Self, Failure> {
        let (dir, scratch) = match dir {
            Some(dir) => (dir.to_owned(), None),
            None => {
                let scratch = tempfile::tempdir();
                let scratch = scratch.map_err(|e| Failure::new(Exit::Failed, format!("a scratch folder: {e}")))?;
                (scratch.path().to_owned(), Some(scratch))
            }
        };
        claim(&dir, fingerprint, "study")?;
        let path = dir.join("results.jsonl");
        let io = |e: std::io::Error| Failure::io(&path, &e);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io(e)),
        };
        // A line without an end was being written when the program was killed.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let mut known = BTreeMap::new();
        for (i, line) in text[..whole].lines().enumerate() {
            let line: Line<Json> = serde_json::from_str(line).map_err(|e| {
                Failure::new(Exit::BadInput, format!("{}: line {}: {e}", path.display(), i + 1))
                    .help("remove the line, or the folder to begin anew")
            })?;
            known.insert(line.key, line.value);
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
        file.set_len(whole as u64).map_err(io)?;
        Ok(Self { known, dir, file, _scratch: scratch })
    }

    /// The folder, which has room for more.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there is a result under `key`.
    pub fn has(&self, key: &str) -> bool {
        self.known.contains_key(key)
    }

    /// The result under `key`.
    ///
    /// # Errors
    /// When it is not what is expected there.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Failure> {
        let Some(value) = self.known.get(key) else { return Ok(None) };
        serde_json::from_value(value.clone()).map(Some).map_err(|e| {
            Failure::new(Exit::BadInput, format!("the work folder's result of `{key}` is damaged: {e}"))
                .help("remove the folder to begin anew")
        })
    }

    /// Keeps a result.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put<T: Serialize>(&mut self, key: &str, value: &T) -> Result<(), Failure> {
        let fail = |e: serde_json::Error| Failure::new(Exit::Failed, e);
        let value = serde_json::to_value(value).map_err(fail)?;
        let line = Line { key: key.to_owned(), value };
        let text = serde_json::to_string(&line).map_err(fail)? + "\n";
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|e| Failure::io(&self.dir, &e))?;
        self.known.insert(line.key, line.value);
        Ok(())
    }
}

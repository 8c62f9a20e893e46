//! A folder that appears at once: filled under a temporary name beside its place, then renamed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::{EmitError, at};

/// What to do with a folder that is already there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail.
    Refuse,
    /// Replace it when the new one is complete.
    Replace,
}

/// A folder under construction. Dropped before [`Staging::commit`], it is removed.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    target: PathBuf,
    existing: Existing,
    done: bool,
}

impl Staging {
    /// Makes the temporary folder for `target`, in the same parent, so that the rename stays on one disk. What an
    /// earlier, killed run left there is removed.
    ///
    /// # Errors
    /// When `target` exists and may not be replaced, or a folder cannot be made.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, EmitError> {
        if existing == Existing::Refuse && target.exists() {
            return Err(EmitError::Exists(target.to_owned()));
        }
        let dir = sibling(target, "partial")?;
        remove(&dir)?;
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        Ok(Self { dir, target: target.to_owned(), existing, done: false })
    }

    /// Where the files go until the commit.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Gives the folder its name. Files must have been synced by whoever wrote them.
    ///
    /// # Errors
    /// When a folder cannot be renamed or synced; an old folder is then back in its place.
    pub fn commit(mut self) -> Result<(), EmitError> {
        sync(&self.dir)?;
        let old = sibling(&self.target, "old")?;
        remove(&old)?;
        let replaced = self.target.exists();
        if replaced {
            if self.existing == Existing::Refuse {
                return Err(EmitError::Exists(self.target.clone()));
            }
            fs::rename(&self.target, &old).map_err(at(&self.target))?;
        }
        if let Err(e) = fs::rename(&self.dir, &self.target) {
            if replaced {
                // Best effort: the first error is the one to report.
                let _ = fs::rename(&old, &self.target);
            }
            return Err(at(&self.target)(e));
        }
        self.done = true;
        if let Some(parent) = parent(&self.target) {
            sync(parent)?;
        }
        remove(&old)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.done {
            // Nothing can be reported from here; the next run removes it.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p })
}

fn sibling(target: &Path, suffix: &str) -> Result<PathBuf, EmitError> {
    let name = target.file_name().ok_or_else(|| {
        at(target)(io::Error::new(io::ErrorKind::InvalidInput, "this is not a name for a new folder"))
    })?;
    Ok(target.with_file_name(format!(".{}.{suffix}", name.to_string_lossy())))
}

fn remove(dir: &Path) -> Result<(), EmitError> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(at(dir)(e)),
    }
}

#[cfg(unix)]
fn sync(dir: &Path) -> Result<(), EmitError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))
}

#[cfg(not(unix))]
fn sync(dir: &Path) -> Result<(), EmitError> {
    // Folders cannot be opened for syncing here.
    let _ = (dir, File::open);
    Ok(())
}

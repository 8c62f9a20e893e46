//! A folder that appears at once: filled under a temporary name beside its place, then renamed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{EmitError, at};

/// What to do with a folder that is already there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail.
    Refuse,
    /// Replace it when the new one is complete, if it is empty or an earlier output: if it has a file by which outputs
    /// are known.
    Replace,
}

/// Files by which an output of this program is known.
const MARKS: [&str; 2] = ["report.json", "module.awqir"];

/// A folder under construction. Dropped before [`Staging::commit`], it is removed.
#[derive(Debug)]
pub struct Staging {
    dir: TempDir,
    target: PathBuf,
    existing: Existing,
}

impl Staging {
    /// Makes a temporary folder of its own for `target`, in the same parent, so that the rename stays on one disk.
    ///
    /// # Errors
    /// When `target` exists and may not be replaced, or a folder cannot be made.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, EmitError> {
        let name = target.file_name().ok_or_else(|| EmitError::Name(target.to_owned()))?;
        replaceable(target, existing)?;
        let parent = parent(target).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(at(parent))?;
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".{}.", name.to_string_lossy());
        builder.prefix(&prefix).suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any new folder: the default would keep others out.
            builder.permissions(fs::Permissions::from_mode(0o777));
        }
        let dir = builder.tempdir_in(parent).map_err(at(parent))?;
        Ok(Self { dir, target: target.to_owned(), existing })
    }

    /// Where the files go until the commit.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Gives the folder its name. Files must have been synced by whoever wrote them.
    ///
    /// # Errors
    /// When a folder cannot be renamed or synced, or has appeared in the meantime; an old folder is then in its place.
    pub fn commit(self) -> Result<(), EmitError> {
        let Self { dir, target, existing } = self;
        sync(dir.path())?;
        replaceable(&target, existing)?;
        let parent = parent(&target).unwrap_or(Path::new("."));
        // What is replaced waits in a folder of its own until the new one is there; that folder goes with this scope.
        let aside = tempfile::Builder::new().prefix(".awqc-old.").tempdir_in(parent).map_err(at(parent))?;
        let old = aside.path().join("old");
        let replaced = target.exists();
        if replaced {
            fs::rename(&target, &old).map_err(at(&target))?;
        }
        if let Err(e) = fs::rename(dir.path(), &target) {
            if replaced {
                // Best effort: the first error is the one to report.
                let _ = fs::rename(&old, &target);
            }
            return Err(at(&target)(e));
        }
        // It has moved away: there is nothing left to remove.
        let _ = dir.keep();
        sync(parent)
    }
}

/// Whether a new folder may take this place.
fn replaceable(target: &Path, existing: Existing) -> Result<(), EmitError> {
    if !target.exists() {
        return Ok(());
    }
    if existing == Existing::Refuse {
        return Err(EmitError::Exists(target.to_owned()));
    }
    let ours = MARKS.iter().any(|mark| target.join(mark).is_file());
    let empty = || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if ours || empty() { Ok(()) } else { Err(EmitError::Foreign(target.to_owned())) }
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p })
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

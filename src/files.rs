//! Writing single files: whole or not at all.

use std::io::Write;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::failure::{Exit, Failure};

/// Writes `bytes` beside the file and renames.
///
/// # Errors
/// When the folder does not exist or is full; the old file, if any, then stands.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut file = beside(path)?;
    file.write_all(bytes).map_err(|e| Failure::io(path, &e))?;
    persist(file, path)
}

/// The folder that a file is in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether a file can be written to `path`, as far as can be told without writing: asked before long work is done.
///
/// # Errors
/// When its folder does not exist, or it is a folder itself.
pub(crate) fn check(path: &Path) -> Result<(), Failure> {
    let folder = folder(path);
    if !folder.is_dir() {
        let message = format!("{}: the folder {} does not exist", path.display(), folder.display());
        return Err(Failure::new(Exit::Usage, message).help("make the folder, or name a file in another"));
    }
    if path.is_dir() {
        let message = format!("{}: this is a folder", path.display());
        return Err(Failure::new(Exit::Usage, message).help("give the name of a file"));
    }
    Ok(())
}

/// A file beside `path` that goes away unless [`persist`] puts it in its place.
///
/// # Errors
/// When the folder does not exist or is full.
pub(crate) fn beside(path: &Path) -> Result<NamedTempFile, Failure> {
    check(path)?;
    let dir = folder(path);
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As any new file: the default would keep others out.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(dir).map_err(|e| Failure::io(path, &e))
}

/// Renames a file that [`beside`] made to `path`, once it is on the disk.
///
/// # Errors
/// When it cannot be written; the old file, if any, then stands.
pub(crate) fn persist(file: NamedTempFile, path: &Path) -> Result<(), Failure> {
    file.as_file().sync_all().map_err(|e| Failure::io(path, &e))?;
    file.persist(path).map_err(|e| Failure::io(path, &e.error))?;
    Ok(())
}

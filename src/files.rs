//! Writing single files: whole or not at all.

use std::io::Write;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::failure::Failure;

/// Writes `bytes` beside the file and renames.
///
/// # Errors
/// When the folder does not exist or is full; the old file, if any, then stands.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut file = beside(path)?;
    file.write_all(bytes).map_err(|e| Failure::io(path, &e))?;
    persist(file, path)
}

/// A file beside `path` that goes away unless [`persist`] puts it in its place.
///
/// # Errors
/// When the folder does not exist or is full.
pub(crate) fn beside(path: &Path) -> Result<NamedTempFile, Failure> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
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

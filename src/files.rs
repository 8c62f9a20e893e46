//! Writing single files: whole or not at all.

use std::io::Write;
use std::path::Path;

use crate::failure::Failure;

/// Writes `bytes` beside the file and renames.
///
/// # Errors
/// When the folder does not exist or is full; the old file, if any, then stands.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As any new file: the default would keep others out.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(dir).map_err(|e| Failure::io(path, &e))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(|e| Failure::io(path, &e))?;
    file.persist(path).map_err(|e| Failure::io(path, &e.error))?;
    Ok(())
}

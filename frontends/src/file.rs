//! An open file that is read at positions, without a shared cursor. Checkpoints are not mapped: a file that another
//! program truncates would kill the process. Compiled artefacts are, because kernels read them in place.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::ImportError;

/// A file and its length when it was opened.
#[derive(Debug)]
pub struct DataFile {
    pub(crate) path: PathBuf,
    pub(crate) len: u64,
    file: File,
    map: Option<Mmap>,
}

impl DataFile {
    pub(crate) fn open(path: &Path) -> Result<Self, ImportError> {
        let file = File::open(path).map_err(|e| ImportError::io(path, e))?;
        let meta = file.metadata().map_err(|e| ImportError::io(path, e))?;
        if !meta.is_file() {
            return Err(ImportError::path(path, "is not a regular file"));
        }
        Ok(Self { path: path.to_owned(), len: meta.len(), file, map: None })
    }

    /// Maps the file into memory, for [`DataFile::mapped`].
    pub(crate) fn map(&mut self) -> Result<(), ImportError> {
        // SAFETY: nothing here relies on the bytes staying the same between two reads. A file that another program
        // truncates while it is mapped ends this one with SIGBUS: artefacts are replaced by renaming, never in place.
        let map = unsafe { Mmap::map(&self.file) }.map_err(|e| ImportError::io(&self.path, e))?;
        self.map = Some(map);
        Ok(())
    }

    /// `len` bytes from `at`, if the file is mapped and has them.
    pub(crate) fn mapped(&self, at: u64, len: u64) -> Option<&[u8]> {
        let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
        self.map.as_ref()?.get(at..at.checked_add(len)?)
    }

    /// `len` bytes from `at`. Fails, before it allocates, where the file has fewer.
    pub(crate) fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, std::io::Error> {
        let short = || std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the file is shorter than expected");
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(short());
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| short())?];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// The CRC-32 of `len` bytes from `at`. They are read piece by piece: through a map they would all stay resident.
    pub(crate) fn crc32(&self, at: u64, len: u64) -> Result<u32, std::io::Error> {
        const PIECE: u64 = 1 << 20;
        let mut crc = crc32fast::Hasher::new();
        let mut done = 0;
        while done < len {
            let bytes = self.read(at + done, PIECE.min(len - done))?;
            crc.update(&bytes);
            done += bytes.len() as u64;
        }
        Ok(crc.finalize())
    }
}

/// Reads a whole file that must not be larger than `limit` bytes.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>, ImportError> {
    let file = DataFile::open(path)?;
    if file.len > limit {
        return Err(ImportError::malformed(
            path,
            format!("is {} bytes long; such a file has at most {limit}", file.len),
        ));
    }
    file.read(0, file.len).map_err(|e| ImportError::io(path, e))
}

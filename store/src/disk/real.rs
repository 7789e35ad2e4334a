//! A directory of the operating system.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Disk, DiskFile};
use crate::Error;

/// A directory that this process has for itself while the value lives.
#[derive(Debug)]
pub struct RealDisk {
    path: PathBuf,
    dir: File,
    /// Holds the lock.
    _lock: File,
}

impl RealDisk {
    /// Takes a directory, which is made if it is missing.
    ///
    /// # Errors
    /// [`Error::InUse`] when another process has it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let err = |op: &'static str| move |e: io::Error| Error::io(op, path, &e);
        let missing: Vec<&Path> =
            path.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists()).collect();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(err("create"))?;
        // What is stored in it is durable only if its own name is.
        for parent in missing.iter().filter_map(|dir| dir.parent()) {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            File::open(parent).and_then(|dir| dir.sync_all()).map_err(err("sync the directory above"))?;
        }
        let dir = File::open(path).map_err(err("open"))?;
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path.join("lock"));
        let lock = lock.map_err(err("open the lock of"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), dir, _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(Error::InUse { store: path.display().to_string() }),
            Err(fs::TryLockError::Error(e)) => Err(Error::io("lock", path, &e)),
        }
    }
}

#[cfg(feature = "service")]
impl RealDisk {
    /// Whether there is a directory with a store in it. Changes nothing.
    pub(crate) fn has_store(path: &Path) -> Result<bool, Error> {
        let err = |e: io::Error| Error::io("read", path, &e);
        for entry in fs::read_dir(path).map_err(err)? {
            if entry.map_err(err)?.file_name().to_str().is_some_and(crate::engine::is_segment) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Disk for RealDisk {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            // Ours are all ASCII.
            names.extend(entry?.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).open(self.path.join(name))?))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        Ok(Arc::new(options.open(self.path.join(name))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        self.dir.sync_all()
    }
}

impl DiskFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match FileExt::read_at(self, &mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }
}

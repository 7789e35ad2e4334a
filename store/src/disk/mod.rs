//! The files that the engine works on: one flat directory.
//!
//! Everything that the engine does to a disk goes through [`Disk`] and [`DiskFile`], so that a test can be
//! the disk: see `fault` (feature `testing`).

#[cfg(any(test, feature = "testing"))]
pub mod fault;
mod real;

use std::fmt;
use std::io;
use std::sync::Arc;

pub use real::RealDisk;

/// A directory of files. Changes to it are durable after [`Disk::sync`].
pub trait Disk: Send + Sync + fmt::Debug {
    /// What it is called in messages.
    fn name(&self) -> String;

    /// The names of all files.
    ///
    /// # Errors
    /// The operating system's.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// The operating system's.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Makes a file that does not exist.
    ///
    /// # Errors
    /// The operating system's.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file; one that has the new name is replaced.
    ///
    /// # Errors
    /// The operating system's.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// The operating system's.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes what was created, renamed and removed durable.
    ///
    /// # Errors
    /// The operating system's. Whether the changes are durable is then unknown, for good.
    fn sync(&self) -> io::Result<()>;
}

/// An open file.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Reads up to the end of `buf` or of the file; says how much.
    ///
    /// # Errors
    /// The operating system's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `buf`.
    ///
    /// # Errors
    /// The operating system's; any part of it may have been written.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes contents and length durable.
    ///
    /// # Errors
    /// The operating system's. What is durable is then unknown, for good.
    fn sync(&self) -> io::Result<()>;

    /// Length in bytes.
    ///
    /// # Errors
    /// The operating system's.
    fn len(&self) -> io::Result<u64>;

    /// Whether it is empty.
    ///
    /// # Errors
    /// The operating system's.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts the file, or makes it longer with zeros.
    ///
    /// # Errors
    /// The operating system's.
    fn set_len(&self, len: u64) -> io::Result<()>;
}

/// Whether an error says that there is no space.
pub(crate) fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

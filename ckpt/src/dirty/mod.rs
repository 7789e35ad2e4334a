//! Which pages of a target changed since the last checkpoint.
//!
//! What is looked at: every private mapping, for its anonymous pages (a page that still is the
//! file's is restored from the file), and shared mappings that are writable, anonymous or already
//! in the store. A page that the store lacks is a page of zeros in anonymous memory, the file's
//! page in a mapping of a file.
//!
//! Three backends, best first: [`WpAsync`], [`SoftDirty`], [`Full`]. A kernel may accept the calls
//! of one and do nothing, so [`choose`] tries them out.

mod full;
mod judge;
mod selftest;
mod soft;
mod sys;
mod wp;

pub use full::Full;
pub use selftest::{choose, self_test};
pub use soft::{PageWords, ProcWords, SoftDirty, scan_words};
pub use sys::UFFD_FLAGS;
pub use wp::WpAsync;

use crate::pages::PageStore;
use crate::runs::{self, PageRun};
use crate::state::{Mapping, TASK_END};
use std::{fmt, io};

/// Result of a scan; both lists ascending, runs that touch are joined. Drop `gone` from the store
/// first, then commit the copies of `dirty`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Pages that may differ from the store.
    pub dirty: Vec<PageRun>,
    /// Stored pages that are no longer the target's own: unmapped, given back with `madvise`, or
    /// the file's page again.
    pub gone: Vec<PageRun>,
}

impl Scan {
    fn finish(mut self, store: &PageStore, looked_at: Vec<PageRun>) -> Self {
        let looked_at = runs::normalize(looked_at);
        let stored = runs::normalize(store.runs(0, TASK_END).collect());
        self.gone.extend(runs::subtract(&stored, &looked_at));
        self.gone = runs::normalize(self.gone);
        self.dirty = runs::normalize(self.dirty);
        self
    }
}

/// A scan that failed. The backend then reports everything at the next scan, as after
/// [`DirtyTracker::forget`].
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    what: String,
    #[source]
    source: io::Error,
}

impl Error {
    fn new(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        Self { what, source }
    }

    /// The system's error.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}

/// Finds the pages that changed.
pub trait DirtyTracker: fmt::Debug + Send {
    /// Name of the backend.
    fn name(&self) -> &'static str;

    /// Runs of pages that may differ from the last scan, and of stored pages that are gone; arms
    /// the tracking for the next scan. The first scan reports every page that is there. `store`
    /// must hold what the scans before reported. When the caller cannot commit the result it must
    /// call [`DirtyTracker::forget`].
    ///
    /// # Errors
    /// The target is gone, may not be read, or the kernel refused.
    fn scan(&mut self, pid: i32, maps: &[Mapping], store: &PageStore) -> Result<Scan, Error>;

    /// Makes the next scan report every page that is there.
    fn forget(&mut self);
}

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asynchronous write protection through a userfaultfd.
    WpAsync,
    /// Soft-dirty bits.
    SoftDirty,
    /// Comparison of all pages with the store.
    Full,
}

impl Kind {
    /// Every backend, best first.
    pub const ALL: [Self; 3] = [Self::WpAsync, Self::SoftDirty, Self::Full];

    /// Its name in configuration and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::WpAsync => "wp-async",
            Self::SoftDirty => "soft-dirty",
            Self::Full => "full",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

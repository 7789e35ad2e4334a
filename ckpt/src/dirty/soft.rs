//! Soft-dirty bits: `/proc/PID/clear_refs` takes them off, bit 55 of a pagemap word shows them.
//!
//! Reading and clearing are two steps, so every thread must be truly stopped: a write that a kernel
//! call completes between the two would be lost.

use super::judge::{self, Comparer, Look};
use super::sys::{Pagemap, Region, WRITTEN};
use super::{DirtyTracker, Error, Scan};
use crate::pages::PageStore;
use crate::runs::PageRun;
use crate::state::Mapping;
use std::io;

/// Source of pagemap words.
pub trait PageWords {
    /// Calls `each` with pieces of the range: address of the first page, one word a page.
    ///
    /// # Errors
    /// The words cannot be read.
    fn words(&self, start: u64, end: u64, each: &mut dyn FnMut(u64, &[u64])) -> io::Result<()>;

    /// Takes all soft-dirty bits off.
    ///
    /// # Errors
    /// They cannot be cleared.
    fn clear(&self) -> io::Result<()>;
}

/// The words of a process.
#[derive(Debug)]
pub struct ProcWords {
    pid: i32,
    pagemap: Pagemap,
}

impl ProcWords {
    /// Opens the files of a process.
    ///
    /// # Errors
    /// The process is gone or may not be read.
    pub fn open(pid: i32) -> io::Result<Self> {
        let pagemap = Pagemap::open(pid)?;
        Ok(Self { pid, pagemap })
    }
}

impl PageWords for ProcWords {
    fn words(&self, start: u64, end: u64, each: &mut dyn FnMut(u64, &[u64])) -> io::Result<()> {
        judge::read_words(self.pagemap.file(), start, end, each)
    }

    fn clear(&self) -> io::Result<()> {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid), "4")
    }
}

/// The backend on soft-dirty bits.
#[derive(Debug)]
pub struct SoftDirty {
    all: bool,
}

impl SoftDirty {
    /// A new one, which reports everything at its first scan.
    pub fn new() -> Self {
        Self { all: true }
    }
}

impl Default for SoftDirty {
    fn default() -> Self {
        Self::new()
    }
}

/// One scan over a source of words; `all` reports pages without the soft-dirty bit too. Shared
/// memory is read from process `pid` and compared.
///
/// # Errors
/// The source fails.
pub fn scan_words(
    source: &dyn PageWords,
    pid: i32,
    all: bool,
    maps: &[Mapping],
    store: &PageStore,
) -> Result<Scan, Error> {
    let mut out = Scan::default();
    let mut looked_at = Vec::new();
    let mut shared = Vec::new();
    for m in maps {
        let look = judge::look(m, store);
        if look == Look::No {
            continue;
        }
        looked_at.push(PageRun::span(m.start, m.end));
        let mut present: Vec<Region> = Vec::new();
        source
            .words(m.start, m.end, &mut |at, words| {
                judge::words_to_regions(at, words, &mut present);
            })
            .map_err(|e| Error::new("cannot read the pagemap of the target", e))?;
        if look == Look::Shared {
            shared.push((m, present));
            continue;
        }
        let changed: Vec<Region> = present.iter().filter(|r| all || r.is & WRITTEN != 0).copied().collect();
        judge::private(m, &changed, &present, store, &mut out);
    }
    source.clear().map_err(|e| Error::new("cannot clear the soft-dirty bits of the target", e))?;
    if !shared.is_empty() {
        let mut comparer = Comparer::new(pid);
        for (m, present) in shared {
            comparer.shared(m, &present, store, &mut out)?;
        }
    }
    Ok(out.finish(store, looked_at))
}

impl DirtyTracker for SoftDirty {
    fn name(&self) -> &'static str {
        super::Kind::SoftDirty.name()
    }

    fn scan(&mut self, pid: i32, maps: &[Mapping], store: &PageStore) -> Result<Scan, Error> {
        let result = ProcWords::open(pid)
            .map_err(|e| Error::new(format!("cannot open /proc/{pid}/pagemap"), e))
            .and_then(|source| scan_words(&source, pid, self.all, maps, store));
        self.all = result.is_err();
        result
    }

    fn forget(&mut self) {
        self.all = true;
    }
}

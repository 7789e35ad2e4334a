//! Comparison of every page with the store: needs nothing of the kernel, costs a read of all memory.

use super::judge::{self, Comparer, Look};
use super::sys::{Pagemap, Region};
use super::{DirtyTracker, Error, Scan};
use crate::pages::PageStore;
use crate::runs::PageRun;
use crate::state::Mapping;
use std::io;

/// The backend that compares.
#[derive(Debug, Default)]
pub struct Full;

impl Full {
    /// A new one.
    pub fn new() -> Self {
        Self
    }
}

fn present(pagemap: &mut Pagemap, m: &Mapping) -> io::Result<Vec<Region>> {
    match pagemap.present(m) {
        // A kernel without the scan call.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            let mut out = Vec::new();
            judge::read_words(pagemap.file(), m.start, m.end, |at, words| {
                judge::words_to_regions(at, words, &mut out);
            })?;
            Ok(out)
        }
        other => other,
    }
}

impl DirtyTracker for Full {
    fn name(&self) -> &'static str {
        super::Kind::Full.name()
    }

    fn scan(&mut self, pid: i32, maps: &[Mapping], store: &PageStore) -> Result<Scan, Error> {
        let failed = |e| Error::new(format!("cannot read /proc/{pid}/pagemap"), e);
        let mut pagemap = Pagemap::open(pid).map_err(failed)?;
        let mut comparer = Comparer::new(pid);
        let mut out = Scan::default();
        let mut looked_at = Vec::new();
        for m in maps {
            let look = judge::look(m, store);
            if look == Look::No {
                continue;
            }
            looked_at.push(PageRun::span(m.start, m.end));
            let present = present(&mut pagemap, m).map_err(failed)?;
            if look == Look::Shared {
                comparer.shared(m, &present, store, &mut out)?;
            } else {
                comparer.private(m, &present, store, &mut out)?;
            }
        }
        Ok(out.finish(store, looked_at))
    }

    fn forget(&mut self) {}
}

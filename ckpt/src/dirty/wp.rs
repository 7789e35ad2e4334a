//! Asynchronous write protection: the kernel notes a write by taking the protection off, and
//! `PAGEMAP_SCAN` reads and renews it in one step.
//!
//! Only pages that are there are protected: a page that appears later in a registered mapping is
//! unprotected and so reported, and a large empty reservation costs no page tables. A page that was
//! dropped is in no state that the scan reports, hence the second pass that asks what is there.

use super::judge::{self, Comparer, Look};
use super::sys::{self, Pagemap};
use super::{DirtyTracker, Error, Scan};
use crate::pages::PageStore;
use crate::runs::PageRun;
use crate::state::Mapping;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The backend on a userfaultfd of the target.
#[derive(Debug)]
pub struct WpAsync {
    uffd: OwnedFd,
    /// Report everything at the next scan.
    all: bool,
}

impl WpAsync {
    /// Takes a userfaultfd that was made in the target with [`super::UFFD_FLAGS`] and not used yet.
    /// It belongs to the target's address space: after exec or in a forked child a new one is
    /// needed.
    ///
    /// # Errors
    /// The kernel lacks asynchronous write protection (before 6.7).
    pub fn new(uffd: OwnedFd) -> Result<Self, Error> {
        sys::uffd_api(uffd.as_fd())
            .map_err(|e| Error::new("the kernel has no asynchronous write protection (UFFD_FEATURE_WP_ASYNC)", e))?;
        Ok(Self { uffd, all: true })
    }

    fn scan_all(&self, pid: i32, maps: &[Mapping], store: &PageStore) -> Result<Scan, Error> {
        let mut pagemap = Pagemap::open(pid).map_err(|e| Error::new(format!("cannot open /proc/{pid}/pagemap"), e))?;
        let mut comparer = None;
        let mut out = Scan::default();
        let mut looked_at = Vec::new();
        for m in maps {
            let look = judge::look(m, store);
            if look == Look::No {
                continue;
            }
            looked_at.push(PageRun::span(m.start, m.end));
            let failed = |e| Error::new(format!("cannot scan the mapping {:#x}-{:#x} {}", m.start, m.end, m.path), e);
            let tracked = match look {
                Look::Private => self.protect(&mut pagemap, m).map_err(failed)?,
                _ => Tracked::Not,
            };
            let present = pagemap.present(m).map_err(failed)?;
            match (tracked, look) {
                (Tracked::Written(changed), _) if !self.all => {
                    judge::private(m, &changed, &present, store, &mut out);
                }
                (Tracked::Written(_) | Tracked::New, _) => {
                    judge::private(m, &present, &present, store, &mut out);
                }
                (Tracked::Not, look) => {
                    let comparer = comparer.get_or_insert_with(|| Comparer::new(pid));
                    if look == Look::Shared {
                        comparer.shared(m, &present, store, &mut out)?;
                    } else {
                        comparer.private(m, &present, store, &mut out)?;
                    }
                }
            }
        }
        Ok(out.finish(store, looked_at))
    }

    fn protect(&self, pagemap: &mut Pagemap, m: &Mapping) -> io::Result<Tracked> {
        let refused = |e: &io::Error| e.raw_os_error() == Some(libc::EPERM);
        match pagemap.protect(m) {
            Ok(written) => return Ok(Tracked::Written(written)),
            Err(e) if refused(&e) => {}
            Err(e) => return Err(e),
        }
        // New, or moved here. What the protection bits say means nothing then.
        if sys::uffd_register(self.uffd.as_fd(), m.start, m.end).is_err() {
            // Held by another userfaultfd, or of a kind that cannot be registered.
            return Ok(Tracked::Not);
        }
        match pagemap.protect(m) {
            Ok(_) => Ok(Tracked::New),
            Err(e) if refused(&e) => Ok(Tracked::Not),
            Err(e) => Err(e),
        }
    }
}

enum Tracked {
    /// Registered before: these were written.
    Written(Vec<sys::Region>),
    /// Registered just now.
    New,
    /// Cannot be registered.
    Not,
}

impl DirtyTracker for WpAsync {
    fn name(&self) -> &'static str {
        super::Kind::WpAsync.name()
    }

    fn scan(&mut self, pid: i32, maps: &[Mapping], store: &PageStore) -> Result<Scan, Error> {
        let result = self.scan_all(pid, maps, store);
        self.all = result.is_err();
        result
    }

    fn forget(&mut self) {
        self.all = true;
    }
}

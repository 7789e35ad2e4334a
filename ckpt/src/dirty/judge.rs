//! From what the kernel says about pages to what a checkpoint must copy and forget.

use super::sys::{FILE, GUARD, PFNZERO, PRESENT, Region, SWAPPED};
use super::{Error, Scan};
use crate::copy::copy_into;
use crate::pages::{PageStore, StagedPages, is_zero};
use crate::runs::{self, PageRun};
use crate::state::{Mapping, PAGE_BYTES};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// What to do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Not ours to keep.
    No,
    /// Private memory.
    Private,
    /// Shared memory.
    Shared,
}

pub(super) fn look(m: &Mapping, store: &PageStore) -> Look {
    if m.path.starts_with("[vvar") {
        // Data of the kernel.
        Look::No
    } else if !m.shared {
        Look::Private
    } else if m.prot & libc::PROT_WRITE.cast_unsigned() != 0
        || m.path.starts_with("/dev/zero")
        || store.runs(m.start, m.end).next().is_some()
    {
        Look::Shared
    } else {
        Look::No
    }
}

fn select(regions: &[Region], mut want: impl FnMut(u64) -> bool) -> Vec<PageRun> {
    let mut out = Vec::new();
    for r in regions {
        if want(r.is) {
            runs::push(&mut out, r.start, r.end);
        }
    }
    out
}

/// Pages of a private mapping that belong to the process: anonymous, in memory or in swap. A guard
/// page has no contents.
fn own(is: u64) -> bool {
    is & GUARD == 0 && (is & SWAPPED != 0 || is & (PRESENT | FILE) == PRESENT)
}

fn stored(m: &Mapping, store: &PageStore) -> Vec<PageRun> {
    runs::normalize(store.runs(m.start, m.end).collect())
}

/// Judges a private mapping: `changed` may have changed, `present` is all that there is now.
pub(super) fn private(m: &Mapping, changed: &[Region], present: &[Region], store: &PageStore, out: &mut Scan) {
    let stored = stored(m, store);
    out.gone.extend(runs::subtract(&stored, &select(present, own)));
    // The page of zeros in anonymous memory is as good as no page, unless the store knows better.
    let zero = |is: u64| is & PFNZERO != 0 && m.inode == 0;
    out.dirty.extend(select(changed, |is| own(is) && !zero(is)));
    let zeros = select(changed, |is| own(is) && zero(is));
    out.dirty.extend(runs::intersect(&zeros, &stored));
    if m.inode != 0 {
        // In a mapping of a file the kernel leaves a marker where an anonymous page was dropped,
        // and it looks like a page in swap that nobody wrote. Its contents tell.
        let swapped = select(present, |is| is & SWAPPED != 0 && is & GUARD == 0);
        out.dirty.extend(runs::intersect(&swapped, &stored));
    }
}

/// Reads pages and compares them with the store.
#[derive(Debug)]
pub(super) struct Comparer {
    pid: i32,
    mem: Option<File>,
    scratch: StagedPages,
}

impl Comparer {
    pub(super) fn new(pid: i32) -> Self {
        Self { pid, mem: File::open(format!("/proc/{pid}/mem")).ok(), scratch: StagedPages::new() }
    }

    /// Judges a private mapping by its contents.
    pub(super) fn private(
        &mut self,
        m: &Mapping,
        present: &[Region],
        store: &PageStore,
        out: &mut Scan,
    ) -> Result<(), Error> {
        let own = select(present, own);
        out.gone.extend(runs::subtract(&stored(m, store), &own));
        self.compare(&own, m.inode == 0, store, out)
    }

    /// Judges a shared mapping by its contents: others may write to it, and a page that is not in
    /// the page table may still have contents.
    pub(super) fn shared(
        &mut self,
        m: &Mapping,
        present: &[Region],
        store: &PageStore,
        out: &mut Scan,
    ) -> Result<(), Error> {
        let mut pages = select(present, |is| is & GUARD == 0);
        pages.extend(stored(m, store));
        pages.extend(populated(self.pid, m));
        self.compare(&runs::normalize(pages), false, store, out)
    }

    fn compare(&mut self, pages: &[PageRun], skip_zero: bool, store: &PageStore, out: &mut Scan) -> Result<(), Error> {
        // Read in pieces that stay in the processor's cache.
        const PIECE: u64 = 128;
        let mut pieces: Vec<PageRun> = Vec::new();
        let mut left = pages.iter().copied();
        let mut run = left.next();
        while let Some(r) = run {
            let room = PIECE - runs::total(&pieces);
            let n = r.pages.min(room);
            pieces.push(PageRun { pages: n, ..r });
            run = if n < r.pages {
                Some(PageRun { start: r.start + n * PAGE_BYTES, pages: r.pages - n })
            } else {
                left.next()
            };
            if n == room || run.is_none() {
                copy_into(&mut self.scratch, self.pid, &pieces, self.mem.as_ref())
                    .map_err(|e| Error::new("cannot read pages of the target", e))?;
                pieces.clear();
                self.compare_scratch(skip_zero, store, out);
            }
        }
        Ok(())
    }

    fn compare_scratch(&self, skip_zero: bool, store: &PageStore, out: &mut Scan) {
        for (addr, page) in self.scratch.iter() {
            let same = match store.get(addr) {
                Some(old) => old == page,
                None => skip_zero && is_zero(page),
            };
            if !same {
                runs::push_any(&mut out.dirty, addr);
            }
        }
        for &addr in self.scratch.unreadable() {
            if store.get(addr).is_some() {
                runs::push_any(&mut out.gone, addr);
            }
        }
    }
}

/// Pages of a mapping of a shared memory object that may have contents although they are not in
/// the page table.
fn populated(pid: i32, m: &Mapping) -> Vec<PageRun> {
    const SHMEM: [&str; 4] = ["/dev/zero", "/memfd:", "/dev/shm/", "/SYSV"];
    let mut out = Vec::new();
    if !SHMEM.iter().any(|p| m.path.starts_with(p)) {
        return out;
    }
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", m.start, m.end);
    let Ok(file) = File::open(path) else {
        // Only the privileged may open that. Reading a hole fills it, but nothing is missed.
        return vec![PageRun::span(m.start, m.end)];
    };
    let end = m.offset + (m.end - m.start);
    let mut at = m.offset;
    while at < end {
        let Some(data) = seek(&file, at, libc::SEEK_DATA) else { break };
        let hole = seek(&file, data, libc::SEEK_HOLE).unwrap_or(end);
        if data >= end || hole <= data {
            break;
        }
        let from = data / PAGE_BYTES * PAGE_BYTES;
        let to = hole.min(end).next_multiple_of(PAGE_BYTES);
        runs::push(&mut out, m.start + (from.max(m.offset) - m.offset), m.start + (to - m.offset));
        at = hole;
    }
    out
}

fn seek(file: &File, at: u64, whence: i32) -> Option<u64> {
    use std::os::fd::AsRawFd;
    // SAFETY: a plain system call on a descriptor that we hold.
    let n = unsafe { libc::lseek(file.as_raw_fd(), at.cast_signed(), whence) };
    u64::try_from(n).ok()
}

/// Reads pagemap words as regions; for kernels without the scan call.
pub(super) fn words_to_regions(start: u64, words: &[u64], out: &mut Vec<Region>) {
    use super::sys::WRITTEN;
    for (i, word) in words.iter().enumerate() {
        let bit = |n: u32, is: u64| if word >> n & 1 == 1 { is } else { 0 };
        let is = bit(63, PRESENT) | bit(62, SWAPPED) | bit(61, FILE) | bit(58, GUARD);
        if is & (PRESENT | SWAPPED) == 0 {
            continue;
        }
        let is = is | bit(55, WRITTEN);
        let at = start + i as u64 * PAGE_BYTES;
        match out.last_mut() {
            Some(last) if last.end == at && last.is == is => last.end += PAGE_BYTES,
            _ => out.push(Region { start: at, end: at + PAGE_BYTES, is }),
        }
    }
}

/// Reads the pagemap words of a range, a piece at a time.
pub(super) fn read_words(file: &File, start: u64, end: u64, mut each: impl FnMut(u64, &[u64])) -> std::io::Result<()> {
    let mut bytes = vec![0u8; 1 << 16];
    let mut words = Vec::with_capacity(bytes.len() / 8);
    let mut at = start;
    while at < end {
        let want = (((end - at) / PAGE_BYTES * 8) as usize).min(bytes.len());
        let n = file.read_at(&mut bytes[..want], at / PAGE_BYTES * 8)? / 8 * 8;
        if n == 0 {
            break;
        }
        words.clear();
        let (chunks, _) = bytes[..n].as_chunks::<8>();
        words.extend(chunks.iter().map(|c| u64::from_le_bytes(*c)));
        each(at, &words);
        at += words.len() as u64 * PAGE_BYTES;
    }
    Ok(())
}

//! Moves pages between a target and us.

use crate::pages::{PageStore, StagedPages, ZERO_PAGE};
use crate::runs::{self, PageRun};
use crate::state::PAGE_BYTES;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const IOV_MAX: usize = 1024;
/// Pages in one call: bounds the time without a chance to notice that the target is gone.
const BATCH: u64 = 65_536;

/// Copies runs of pages of a target into a new stage; see [`copy_into`].
///
/// # Errors
/// As [`copy_into`].
pub fn copy_in(pid: i32, runs: &[PageRun], mem: Option<&File>) -> io::Result<StagedPages> {
    let mut staged = StagedPages::new();
    copy_into(&mut staged, pid, runs, mem)?;
    Ok(staged)
}

/// Copies runs of pages of a target into a stage, which is cleared first and keeps its memory.
///
/// `mem` is the target's `/proc/PID/mem`: through it pages without read permission are read as
/// well. A page that cannot be read either way is listed in [`StagedPages::unreadable`].
///
/// # Errors
/// The target is gone or may not be read, or no memory.
pub fn copy_into(staged: &mut StagedPages, pid: i32, runs: &[PageRun], mem: Option<&File>) -> io::Result<()> {
    staged.clear();
    let total = runs::total(runs) as usize;
    staged.reserve(total)?;
    staged.addrs.reserve(total);
    let StagedPages { addrs, buf: Some(buf), unreadable } = staged else {
        return Ok(());
    };
    let buf = buf.bytes_mut();
    let mut todo = Cursor { runs, done: 0 };
    loop {
        let remote = todo.batch();
        let want: usize = remote.iter().map(|v| v.iov_len).sum();
        if want == 0 {
            return Ok(());
        }
        let out = &mut buf[addrs.len() * PAGE_BYTES as usize..][..want];
        let got = match read_vec(pid, out, &remote) {
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => 0,
            other => other? as u64 / PAGE_BYTES,
        };
        todo.take(got, addrs);
        if got * PAGE_BYTES == want as u64 {
            continue;
        }
        // Here stands a page that the call refused: read on with the file to the end of its run.
        let Some(run) = todo.rest() else { return Ok(()) };
        let got = match mem {
            Some(mem) => {
                let len = (run.pages.min(BATCH) * PAGE_BYTES) as usize;
                let out = &mut buf[addrs.len() * PAGE_BYTES as usize..][..len];
                mem.read_at(out, run.start).unwrap_or(0) as u64 / PAGE_BYTES
            }
            None if got == 0 => 0,
            // The call may have stopped early for another reason: try again from here.
            None => continue,
        };
        todo.take(got, addrs);
        if got == 0 {
            unreadable.push(run.start);
            todo.done += 1;
            todo.normalize();
        }
    }
}

/// Where we are in a list of runs.
struct Cursor<'a> {
    runs: &'a [PageRun],
    /// Pages of the first run that are done.
    done: u64,
}

impl Cursor<'_> {
    fn normalize(&mut self) {
        while let Some(first) = self.runs.first() {
            if self.done < first.pages {
                return;
            }
            self.done -= first.pages;
            self.runs = &self.runs[1..];
        }
    }

    /// What is left of the current run.
    fn rest(&self) -> Option<PageRun> {
        self.runs.first().map(|r| PageRun { start: r.start + self.done * PAGE_BYTES, pages: r.pages - self.done })
    }

    fn batch(&self) -> Vec<libc::iovec> {
        let mut left = BATCH;
        let mut out = Vec::new();
        let rest = self.rest();
        for run in rest.iter().chain(self.runs.get(1..).unwrap_or(&[])) {
            let pages = run.pages.min(left);
            if pages == 0 && left == 0 || out.len() == IOV_MAX {
                break;
            }
            out.push(iovec(run.start as *mut u8, pages * PAGE_BYTES));
            left -= pages;
        }
        out
    }

    /// Passes `pages` pages and notes their addresses.
    fn take(&mut self, mut pages: u64, addrs: &mut Vec<u64>) {
        while pages > 0 {
            let Some(run) = self.rest() else { return };
            let n = pages.min(run.pages);
            addrs.extend(run.addrs().take(n as usize));
            self.done += n;
            pages -= n;
            self.normalize();
        }
        self.normalize();
    }
}

fn iovec(base: *mut u8, len: u64) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: len as usize }
}

fn read_vec(pid: i32, out: &mut [u8], remote: &[libc::iovec]) -> io::Result<usize> {
    let local = iovec(out.as_mut_ptr(), out.len() as u64);
    // SAFETY: the local vector is `out`; remote addresses belong to another process and are
    // checked by the kernel.
    let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes the stored pages in `range` into a target; returns how many.
///
/// `fresh` says that the memory there is new and zero, so that zero pages need not be written.
/// `mem` is the target's `/proc/PID/mem`, which also writes where the mapping forbids it.
///
/// # Errors
/// A page could not be written; the message names its address.
pub fn copy_out(
    pid: i32,
    store: &PageStore,
    range: std::ops::Range<u64>,
    fresh: bool,
    mem: Option<&File>,
) -> io::Result<u64> {
    let mut batch: Vec<(u64, &crate::pages::Page)> = Vec::with_capacity(IOV_MAX);
    let mut done = 0;
    for (addr, page) in store.iter_range(range.start, range.end) {
        if fresh && std::ptr::eq(page, &raw const ZERO_PAGE) {
            continue;
        }
        batch.push((addr, page));
        done += 1;
        if batch.len() == IOV_MAX {
            write_batch(pid, &batch, mem)?;
            batch.clear();
        }
    }
    write_batch(pid, &batch, mem)?;
    Ok(done)
}

fn write_batch(pid: i32, mut pages: &[(u64, &crate::pages::Page)], mem: Option<&File>) -> io::Result<()> {
    while let Some(&(first, bytes)) = pages.first() {
        let local: Vec<libc::iovec> = pages.iter().map(|(_, p)| iovec(p.as_ptr().cast_mut(), PAGE_BYTES)).collect();
        let mut remote: Vec<libc::iovec> = Vec::new();
        for &(addr, _) in pages {
            match remote.last_mut() {
                Some(v) if v.iov_base as u64 + v.iov_len as u64 == addr => {
                    v.iov_len += PAGE_BYTES as usize;
                }
                _ => remote.push(iovec(addr as *mut u8, PAGE_BYTES)),
            }
        }
        // SAFETY: the local vectors are borrowed pages that are only read; remote addresses are
        // checked by the kernel.
        let n = unsafe {
            libc::process_vm_writev(pid, local.as_ptr(), local.len() as u64, remote.as_ptr(), remote.len() as u64, 0)
        };
        let name = |e: io::Error| io::Error::new(e.kind(), format!("cannot write the page at {first:#x}: {e}"));
        let n = match n {
            0.. => n.cast_unsigned() / PAGE_BYTES as usize,
            _ => {
                let e = io::Error::last_os_error();
                if e.raw_os_error() != Some(libc::EFAULT) {
                    return Err(name(e));
                }
                0
            }
        };
        pages = &pages[n..];
        if n == 0 {
            match mem {
                Some(mem) => mem.write_all_at(bytes, first).map_err(name)?,
                None => return Err(name(io::Error::from_raw_os_error(libc::EFAULT))),
            }
            pages = &pages[1..];
        }
    }
    Ok(())
}

//! Checkpoint files.
//!
//! One file is one checkpoint: a *base* holds every page, a *delta* the pages that changed since its
//! parent. All numbers are little-endian; `crc` is CRC-32 (IEEE).
//!
//! ```text
//! header, 48 bytes
//!    0  magic        8  "FTRCKPT\n"
//!    8  version      4  1
//!   12  flags        4  bit 0: has a parent
//!   16  sii          8  the state after this many events
//!   24  parent       8  sii of the parent, 0 without one
//!   32  zero        12
//!   44  crc          4  of bytes 0 to 43
//! sections, each: head of 24 bytes, then `stored` bytes
//!    0  kind         4  1 snapshot, 2 gone, 3 zero, 4 pages, 5 end
//!    4  count        4  runs (2, 3), pages (4), sections before (5), 0 (1)
//!    8  raw          4  bytes when decompressed (1, 4), else 0
//!   12  stored       4  bytes that follow
//!   16  crc          4  of the bytes that follow
//!   20  crc          4  of bytes 0 to 19
//!    1 snapshot  zstd of the postcard of [`Snapshot`]; first, once
//!    2 gone      runs to forget from the parent: (address 8, pages 8) each
//!    3 zero      runs of zero pages, the same
//!    4 pages     up to 256 addresses (8 each, ascending), then zstd of their bytes
//!    5 end       length of the file 8, crc of everything before this section 4; last, once
//! ```
//!
//! A reader refuses a file that lacks a byte, has one too many or a wrong one. Files are written
//! under another name and renamed when complete, so `ckpt-…` is there whole or not at all.

mod chain;
mod read;

pub use chain::{BASE_CHAIN_MAX, Chain, Entry};

use crate::pages::{Page, PageStore, StagedPages, is_zero};
use crate::runs::{self, PageRun};
use crate::state::{PAGE_BYTES, Snapshot};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Version of the format that this program reads and writes.
pub const VERSION: u32 = 2;

const MAGIC: [u8; 8] = *b"FTRCKPT\n";
const HEADER: usize = 48;
const HEAD: usize = 24;
const HAS_PARENT: u32 = 1;
const PAGES_PER_SECTION: usize = 256;
/// Runs in one section; more go to the next.
const RUNS_PER_SECTION: usize = 4096;
/// No snapshot is larger, decompressed.
const SNAPSHOT_MAX: usize = 1 << 30;

const SNAPSHOT: u32 = 1;
const GONE: u32 = 2;
const ZERO: u32 = 3;
const PAGES: u32 = 4;
const END: u32 = 5;

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The bytes are not what was written.
    #[error("{}: damaged at byte {offset}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What does not fit.
        what: String,
    },
    /// Another version wrote it.
    #[error(
        "{}: written by format {found}, this is {VERSION}; remove the checkpoint or use the \
         program that wrote it",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A file of the chain is not there.
    #[error("{}: checkpoint {sii:#x} is missing{}", dir.display(), needed(*child))]
    Missing {
        /// The directory.
        dir: PathBuf,
        /// The one that is missing.
        sii: u64,
        /// The one that needs it.
        child: Option<u64>,
    },
}

fn needed(child: Option<u64>) -> String {
    child.map_or(String::new(), |sii| format!(", {sii:#x} is based on it"))
}

/// Pages to write, ascending.
pub trait PageSource {
    /// Calls `each` with every page in address order.
    ///
    /// # Errors
    /// Those of `each`.
    fn each_page(&self, each: &mut dyn FnMut(u64, &Page) -> io::Result<()>) -> io::Result<()>;
}

impl PageSource for StagedPages {
    fn each_page(&self, each: &mut dyn FnMut(u64, &Page) -> io::Result<()>) -> io::Result<()> {
        self.iter().try_for_each(|(addr, page)| each(addr, page))
    }
}

impl PageSource for PageStore {
    fn each_page(&self, each: &mut dyn FnMut(u64, &Page) -> io::Result<()>) -> io::Result<()> {
        self.iter().try_for_each(|(addr, page)| each(addr, page))
    }
}

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct WriteOptions {
    /// Bring the file and its name to the disk before returning.
    pub fsync: bool,
    /// Level of zstd.
    pub level: i32,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { fsync: false, level: 1 }
    }
}

/// A checkpoint that was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its file.
    pub path: PathBuf,
    /// Length of the file.
    pub bytes: u64,
}

/// Name of the file of a checkpoint.
pub fn file_name(sii: u64) -> String {
    format!("ckpt-{sii:016x}")
}

fn temp_name(sii: u64) -> String {
    format!(".ckpt-{sii:016x}.tmp")
}

/// Writes and publishes a checkpoint. Without a parent `pages` must be all pages, with one those
/// that changed since, and `gone` those to forget. A file of the same sii is replaced.
///
/// # Errors
/// The file cannot be written; nothing is published then.
pub fn write(
    dir: &Path,
    snapshot: &Snapshot,
    parent: Option<u64>,
    pages: &dyn PageSource,
    gone: &[PageRun],
    options: WriteOptions,
) -> Result<Written, Error> {
    let temp = dir.join(temp_name(snapshot.sii));
    let path = dir.join(file_name(snapshot.sii));
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    let write_temp = || {
        let mut out = Writer::create(&temp, options.level)?;
        out.header(snapshot.sii, parent)?;
        out.snapshot(snapshot)?;
        for part in gone.chunks(RUNS_PER_SECTION) {
            out.runs(GONE, part)?;
        }
        out.pages(pages)?;
        out.finish(options.fsync)
    };
    let bytes = write_temp().map_err(|e| {
        // The name is free for the next try; if this fails too there is nothing left to do.
        let _ = std::fs::remove_file(&temp);
        at(&temp)(e)
    })?;
    std::fs::rename(&temp, &path).map_err(at(&path))?;
    if options.fsync {
        File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))?;
    }
    Ok(Written { path, bytes })
}

/// Counts and sums what goes through.
struct Writer {
    out: BufWriter<File>,
    crc: crc32fast::Hasher,
    len: u64,
    sections: u32,
    zstd: zstd::bulk::Compressor<'static>,
    zero: Vec<PageRun>,
    addrs: Vec<u64>,
    raw: Vec<u8>,
}

fn too_long(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{what} is too long"))
}

fn head(kind: u32, count: u32, raw: u32, stored: &[u8]) -> io::Result<[u8; HEAD]> {
    let len = u32::try_from(stored.len()).map_err(|_| too_long("a section"))?;
    let mut head = [0; HEAD];
    let words = [kind, count, raw, len, crc32fast::hash(stored)];
    for (slot, word) in head.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *slot = word.to_le_bytes();
    }
    let crc = crc32fast::hash(&head[..20]);
    head[20..].copy_from_slice(&crc.to_le_bytes());
    Ok(head)
}

impl Writer {
    fn create(path: &Path, level: i32) -> io::Result<Self> {
        Ok(Self {
            out: BufWriter::with_capacity(1 << 20, File::create(path)?),
            crc: crc32fast::Hasher::new(),
            len: 0,
            sections: 0,
            zstd: zstd::bulk::Compressor::new(level)?,
            zero: Vec::new(),
            addrs: Vec::new(),
            raw: Vec::new(),
        })
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc.update(bytes);
        self.len += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn header(&mut self, sii: u64, parent: Option<u64>) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(parent.map_or(0, |_| HAS_PARENT).to_le_bytes());
        bytes.extend(sii.to_le_bytes());
        bytes.extend(parent.unwrap_or(0).to_le_bytes());
        bytes.resize(HEADER - 4, 0);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        self.put(&bytes)
    }

    fn section(&mut self, kind: u32, count: u32, raw: u32, stored: &[u8]) -> io::Result<()> {
        let head = head(kind, count, raw, stored)?;
        self.put(&head)?;
        self.put(stored)?;
        self.sections += 1;
        Ok(())
    }

    fn snapshot(&mut self, snapshot: &Snapshot) -> io::Result<()> {
        let raw = postcard::to_stdvec(snapshot).map_err(io::Error::other)?;
        if raw.len() > SNAPSHOT_MAX {
            return Err(too_long("the state of the process without its pages"));
        }
        let stored = self.zstd.compress(&raw)?;
        self.section(SNAPSHOT, 0, raw.len() as u32, &stored)
    }

    fn runs(&mut self, kind: u32, runs: &[PageRun]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(runs.len() * 16);
        for run in runs {
            bytes.extend(run.start.to_le_bytes());
            bytes.extend(run.pages.to_le_bytes());
        }
        self.section(kind, runs.len() as u32, 0, &bytes)
    }

    fn pages(&mut self, pages: &dyn PageSource) -> io::Result<()> {
        pages.each_page(&mut |addr, page| {
            if is_zero(page) {
                runs::push(&mut self.zero, addr, addr + PAGE_BYTES);
                if self.zero.len() > RUNS_PER_SECTION {
                    let last = self.zero.pop();
                    self.flush_zero()?;
                    self.zero.extend(last);
                }
                return Ok(());
            }
            self.addrs.push(addr);
            self.raw.extend_from_slice(page);
            if self.addrs.len() == PAGES_PER_SECTION {
                self.flush_pages()?;
            }
            Ok(())
        })?;
        self.flush_pages()?;
        self.flush_zero()
    }

    fn flush_zero(&mut self) -> io::Result<()> {
        let zero = std::mem::take(&mut self.zero);
        if zero.is_empty() {
            return Ok(());
        }
        self.runs(ZERO, &zero)
    }

    fn flush_pages(&mut self) -> io::Result<()> {
        if self.addrs.is_empty() {
            return Ok(());
        }
        let mut stored: Vec<u8> = self.addrs.iter().flat_map(|a| a.to_le_bytes()).collect();
        stored.extend(self.zstd.compress(&self.raw)?);
        let (count, raw) = (self.addrs.len() as u32, self.raw.len() as u32);
        self.addrs.clear();
        self.raw.clear();
        self.section(PAGES, count, raw, &stored)
    }

    fn finish(mut self, fsync: bool) -> io::Result<u64> {
        let len = self.len + (HEAD + 12) as u64;
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend(self.crc.clone().finalize().to_le_bytes());
        self.section(END, self.sections, 0, &bytes)?;
        let file = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        if fsync {
            file.sync_all()?;
        }
        Ok(len)
    }
}

//! Reads one checkpoint file. Nothing in it is believed before its checksum fits, and no size from
//! it is allocated before it is bounded by the file's own length.

use super::{
    END, Error, GONE, HAS_PARENT, HEAD, HEADER, MAGIC, PAGES, PAGES_PER_SECTION, RUNS_PER_SECTION, SNAPSHOT,
    SNAPSHOT_MAX, VERSION, ZERO,
};
use crate::pages::{PageStore, ZERO_PAGE};
use crate::runs::PageRun;
use crate::state::{PAGE_BYTES, Snapshot};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

/// User addresses end here.
const ADDR_END: u64 = 1 << 56;
/// A zero page costs a little index memory, so a run of them is bounded: 4 TiB.
const ZERO_RUN_MAX: u64 = 1 << 30;

/// The header of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) sii: u64,
    pub(super) parent: Option<u64>,
}

pub(super) struct Reader<'a> {
    path: &'a Path,
    file: BufReader<File>,
    crc: crc32fast::Hasher,
    at: u64,
    len: u64,
    pub(super) header: Header,
}

struct Head {
    kind: u32,
    count: usize,
    raw: usize,
    stored: usize,
    crc: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl<'a> Reader<'a> {
    /// Opens a file and checks its header.
    pub(super) fn open(path: &'a Path) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut reader = Self {
            path,
            file: BufReader::with_capacity(1 << 18, file),
            crc: crc32fast::Hasher::new(),
            at: 0,
            len,
            header: Header { sii: 0, parent: None },
        };
        let bytes = reader.take(HEADER, "the header")?;
        if bytes[..8] != MAGIC {
            return Err(reader.damaged(0, "not a checkpoint file (magic)"));
        }
        let version = u32_at(&bytes, 8);
        let intact = u32_at(&bytes, HEADER - 4) == crc32fast::hash(&bytes[..HEADER - 4]);
        if version != VERSION {
            return Err(Error::Version { path: path.to_owned(), found: version });
        }
        if !intact {
            return Err(reader.damaged(0, "checksum of the header"));
        }
        reader.header = Header {
            sii: u64_at(&bytes, 16),
            parent: (u32_at(&bytes, 12) & HAS_PARENT != 0).then(|| u64_at(&bytes, 24)),
        };
        Ok(reader)
    }

    /// Length of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Reads the rest: applies the pages to `store`, which holds those of the parent.
    pub(super) fn load(mut self, store: &mut PageStore) -> Result<Snapshot, Error> {
        let mut snapshot = None;
        let mut sections = 0;
        loop {
            let start = self.at;
            let crc_before = self.crc.clone().finalize();
            let head = self.head()?;
            let body = self.take(head.stored, "a section")?;
            if crc32fast::hash(&body) != head.crc {
                return Err(self.damaged(start, "checksum of a section"));
            }
            let bad = |what: &str| self.damaged(start, what);
            let first = sections == 0;
            match head.kind {
                SNAPSHOT if first => snapshot = Some(self.snapshot(start, &head, &body)?),
                _ if first => return Err(bad("the first section is not the snapshot")),
                GONE => {
                    for run in runs(&head, &body).ok_or_else(|| bad("runs of gone pages"))? {
                        store.drop_range(run.start, run.end());
                    }
                }
                ZERO => {
                    for run in runs(&head, &body).ok_or_else(|| bad("runs of zero pages"))? {
                        if run.pages > ZERO_RUN_MAX {
                            return Err(bad("a run of zero pages is too long"));
                        }
                        for addr in run.addrs() {
                            self.put(store, addr, &ZERO_PAGE)?;
                        }
                    }
                }
                PAGES => self.pages(start, &head, &body, store)?,
                END => {
                    if body.len() != 12 || u32_at(&body, 8) != crc_before {
                        return Err(bad("checksum of the file"));
                    }
                    if u64_at(&body, 0) != self.len || self.at != self.len {
                        return Err(bad("length of the file"));
                    }
                    if head.count != sections {
                        return Err(bad("number of sections"));
                    }
                    return snapshot.ok_or_else(|| bad("no snapshot"));
                }
                kind => return Err(bad(&format!("a section of unknown kind {kind}"))),
            }
            sections += 1;
        }
    }

    fn damaged(&self, offset: u64, what: &str) -> Error {
        Error::Damaged { path: self.path.to_owned(), offset, what: what.into() }
    }

    fn put(&self, store: &mut PageStore, addr: u64, page: &[u8; 4096]) -> Result<(), Error> {
        store.put(addr, page).map_err(|source| Error::Io { path: self.path.to_owned(), source })
    }

    fn take(&mut self, len: usize, what: &str) -> Result<Vec<u8>, Error> {
        if len as u64 > self.len.saturating_sub(self.at) {
            return Err(self.damaged(self.at, &format!("the file ends inside {what}")));
        }
        let mut bytes = vec![0; len];
        self.file.read_exact(&mut bytes).map_err(|source| {
            if source.kind() == ErrorKind::UnexpectedEof {
                return self.damaged(self.at, &format!("the file ends inside {what}"));
            }
            Error::Io { path: self.path.to_owned(), source }
        })?;
        self.crc.update(&bytes);
        self.at += len as u64;
        Ok(bytes)
    }

    fn head(&mut self) -> Result<Head, Error> {
        let start = self.at;
        let bytes = self.take(HEAD, "the head of a section")?;
        if u32_at(&bytes, 20) != crc32fast::hash(&bytes[..20]) {
            return Err(self.damaged(start, "checksum of the head of a section"));
        }
        Ok(Head {
            kind: u32_at(&bytes, 0),
            count: u32_at(&bytes, 4) as usize,
            raw: u32_at(&bytes, 8) as usize,
            stored: u32_at(&bytes, 12) as usize,
            crc: u32_at(&bytes, 16),
        })
    }

    fn snapshot(&self, start: u64, head: &Head, body: &[u8]) -> Result<Snapshot, Error> {
        if head.raw > SNAPSHOT_MAX || head.count != 0 {
            return Err(self.damaged(start, "sizes of the snapshot"));
        }
        let raw = zstd::bulk::decompress(body, head.raw)
            .map_err(|e| self.damaged(start, &format!("compressed snapshot: {e}")))?;
        if raw.len() != head.raw {
            return Err(self.damaged(start, "length of the snapshot"));
        }
        let snapshot: Snapshot = postcard::from_bytes(&raw)
            .map_err(|e| self.damaged(start, &format!("the snapshot does not decode: {e}")))?;
        if snapshot.sii != self.header.sii {
            return Err(self.damaged(start, "the snapshot is of another checkpoint"));
        }
        Ok(snapshot)
    }

    fn pages(&self, start: u64, head: &Head, body: &[u8], store: &mut PageStore) -> Result<(), Error> {
        let bad = |what: &str| self.damaged(start, what);
        let want = head.count * PAGE_BYTES as usize;
        if head.count == 0 || head.count > PAGES_PER_SECTION || head.raw != want {
            return Err(bad("number of pages"));
        }
        let (addrs, packed) = body.split_at_checked(head.count * 8).ok_or_else(|| bad("addresses of pages"))?;
        let raw = zstd::bulk::decompress(packed, want).map_err(|e| bad(&format!("compressed pages: {e}")))?;
        let (pages, _) = raw.as_chunks();
        if raw.len() != want {
            return Err(bad("length of the pages"));
        }
        let mut above = 0;
        for (addr, page) in addrs.as_chunks().0.iter().zip(pages) {
            let addr = u64::from_le_bytes(*addr);
            if !addr.is_multiple_of(PAGE_BYTES) || addr < above || addr >= ADDR_END {
                return Err(bad("address of a page"));
            }
            above = addr + PAGE_BYTES;
            self.put(store, addr, page)?;
        }
        Ok(())
    }
}

fn runs(head: &Head, body: &[u8]) -> Option<Vec<PageRun>> {
    if head.count > RUNS_PER_SECTION || body.len() != head.count * 16 {
        return None;
    }
    let (words, _) = body.as_chunks::<16>();
    let run = |w: &[u8; 16]| PageRun { start: u64_at(w, 0), pages: u64_at(w, 8) };
    let runs: Vec<PageRun> = words.iter().map(run).collect();
    let fits = |r: &PageRun| {
        r.start.is_multiple_of(PAGE_BYTES) && r.start < ADDR_END && r.pages <= (ADDR_END - r.start) / PAGE_BYTES
    };
    runs.iter().all(fits).then_some(runs)
}

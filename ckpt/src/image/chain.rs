//! The checkpoints of a directory and how they build on each other.

use super::read::Reader;
use super::{Error, WriteOptions, Written, write};
use crate::pages::PageStore;
use crate::state::Snapshot;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Longest chain of deltas on a base.
pub const BASE_CHAIN_MAX: usize = 32;

/// One checkpoint file whose header is in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The state after this many events.
    pub sii: u64,
    /// The checkpoint that it is a delta to.
    pub parent: Option<u64>,
    /// Length of the file.
    pub bytes: u64,
}

/// The checkpoints in a directory.
#[derive(Debug)]
pub struct Chain {
    dir: PathBuf,
    entries: BTreeMap<u64, Entry>,
    damaged: BTreeMap<u64, Error>,
}

impl Chain {
    /// Lists the checkpoints in a directory; reads their headers only. A file whose header is not
    /// in order is listed in [`Chain::damaged`].
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io { path: dir.to_owned(), source };
        let mut chain = Self { dir: dir.to_owned(), entries: BTreeMap::new(), damaged: BTreeMap::new() };
        for item in std::fs::read_dir(dir).map_err(io)? {
            let name = item.map_err(io)?.file_name();
            let Some(sii) = name.to_str().and_then(parse_name) else {
                continue;
            };
            match chain.read_entry(sii) {
                Ok(entry) => {
                    chain.entries.insert(sii, entry);
                }
                Err(e) => {
                    chain.damaged.insert(sii, e);
                }
            }
        }
        Ok(chain)
    }

    fn path(&self, sii: u64) -> PathBuf {
        self.dir.join(super::file_name(sii))
    }

    fn read_entry(&self, sii: u64) -> Result<Entry, Error> {
        let path = self.path(sii);
        let reader = Reader::open(&path)?;
        let header = reader.header;
        if header.sii != sii || header.parent.is_some_and(|p| p >= sii) {
            return Err(Error::Damaged {
                path: path.clone(),
                offset: 16,
                what: "the header is of another checkpoint than the name".into(),
            });
        }
        Ok(Entry { sii, parent: header.parent, bytes: reader.len() })
    }

    /// Notes a checkpoint that was just written here.
    ///
    /// # Errors
    /// Its header cannot be read.
    pub fn add(&mut self, sii: u64) -> Result<(), Error> {
        let entry = self.read_entry(sii)?;
        self.entries.insert(sii, entry);
        Ok(())
    }

    /// Files whose header is not in order: the sii of their names, ascending, and what is wrong.
    pub fn damaged(&self) -> impl DoubleEndedIterator<Item = (u64, &Error)> {
        self.damaged.iter().map(|(sii, e)| (*sii, e))
    }

    /// All checkpoints, ascending.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries.values()
    }

    /// The newest checkpoint.
    pub fn newest(&self) -> Option<u64> {
        self.entries.keys().next_back().copied()
    }

    /// The newest checkpoint of a state at or before this one.
    pub fn at_or_before(&self, sii: u64) -> Option<u64> {
        self.entries.range(..=sii).next_back().map(|(sii, _)| *sii)
    }

    /// A checkpoint and those that it builds on, base first.
    fn lineage(&self, sii: u64) -> Result<Vec<&Entry>, Error> {
        let mut out = Vec::new();
        let (mut next, mut child) = (Some(sii), None);
        // A parent has a smaller sii than its child, so this ends.
        while let Some(sii) = next {
            let entry = self.entries.get(&sii).ok_or_else(|| Error::Missing { dir: self.dir.clone(), sii, child })?;
            out.push(entry);
            (next, child) = (entry.parent, Some(sii));
        }
        out.reverse();
        Ok(out)
    }

    /// Reads a checkpoint with everything that it builds on.
    ///
    /// # Errors
    /// A file is missing, damaged or of another version.
    pub fn load(&self, sii: u64) -> Result<(Snapshot, PageStore), Error> {
        let mut store = PageStore::new();
        let mut snapshot = None;
        for entry in self.lineage(sii)? {
            let path = self.path(entry.sii);
            snapshot = Some(Reader::open(&path)?.load(&mut store)?);
        }
        match snapshot {
            Some(snapshot) => Ok((snapshot, store)),
            None => unreachable!("a lineage is not empty"),
        }
    }

    /// Reads the newest checkpoint at or before `sii` that is whole, and what kept the newer ones
    /// from being used.
    pub fn load_newest(&self, sii: u64) -> (Option<(Snapshot, PageStore)>, Vec<Error>) {
        let mut errors = Vec::new();
        for sii in self.entries.range(..=sii).rev().map(|(sii, _)| *sii) {
            match self.load(sii) {
                Ok(loaded) => return (Some(loaded), errors),
                Err(e) => errors.push(e),
            }
        }
        (None, errors)
    }

    /// Whether the next checkpoint should be a base: there is none, the deltas since have outgrown
    /// it, or there are too many of them.
    pub fn base_needed(&self) -> bool {
        let Some(Ok(line)) = self.newest().map(|sii| self.lineage(sii)) else {
            return true;
        };
        let deltas: u64 = line.iter().skip(1).map(|e| e.bytes).sum();
        line.first().is_none_or(|base| deltas > base.bytes) || line.len() > BASE_CHAIN_MAX
    }

    /// Turns a delta into a base in its place, from the files alone: the live store is not needed.
    ///
    /// # Errors
    /// As [`Chain::load`] and [`write()`]; the delta is unharmed.
    pub fn rebase(&mut self, sii: u64, options: WriteOptions) -> Result<Written, Error> {
        let (snapshot, store) = self.load(sii)?;
        let written = write(&self.dir, &snapshot, None, &store, &[], options)?;
        self.add(sii)?;
        Ok(written)
    }

    /// Deletes the files that the newest `keep` checkpoints (at least two) do not need. Returns how
    /// many. Damaged files stay.
    ///
    /// # Errors
    /// A file cannot be deleted.
    pub fn prune(&mut self, keep: usize) -> Result<usize, Error> {
        let keep: Vec<u64> = self.entries.keys().rev().take(keep.max(2)).copied().collect();
        let mut needed: BTreeSet<u64> = BTreeSet::new();
        for sii in keep {
            // With a broken lineage keep what there is of it.
            let mut next = Some(sii);
            while let Some(entry) = next.and_then(|sii| self.entries.get(&sii)) {
                needed.insert(entry.sii);
                next = entry.parent;
            }
        }
        // Children before parents, so that a crash in between leaves no child without its parent.
        let drop: Vec<u64> = self.entries.keys().rev().copied().collect();
        let mut count = 0;
        for sii in drop.into_iter().filter(|sii| !needed.contains(sii)) {
            remove(&self.path(sii))?;
            self.entries.remove(&sii);
            count += 1;
        }
        Ok(count)
    }

    /// Deletes every checkpoint but `sii`, which must be a base. Damaged files stay.
    ///
    /// # Errors
    /// A file cannot be deleted.
    pub fn keep_only(&mut self, sii: u64) -> Result<(), Error> {
        assert!(self.entries.get(&sii).is_some_and(|e| e.parent.is_none()), "a base stands alone");
        // Children before parents, as in `prune`.
        let drop: Vec<u64> = self.entries.keys().rev().copied().filter(|s| *s != sii).collect();
        for sii in drop {
            remove(&self.path(sii))?;
            self.entries.remove(&sii);
        }
        Ok(())
    }

    /// Deletes what writes that broke off have left. Only while nobody writes here.
    ///
    /// # Errors
    /// A file cannot be deleted.
    pub fn remove_temporary(&self) -> Result<(), Error> {
        let io = |source| Error::Io { path: self.dir.clone(), source };
        for item in std::fs::read_dir(&self.dir).map_err(io)? {
            let name = item.map_err(io)?.file_name();
            let temp = name.to_str().and_then(|n| n.strip_prefix('.')?.strip_suffix(".tmp"));
            if temp.and_then(parse_name).is_some() {
                remove(&self.dir.join(&name))?;
            }
        }
        Ok(())
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn parse_name(name: &str) -> Option<u64> {
    let hex = name.strip_prefix("ckpt-")?;
    let sii = u64::from_str_radix(hex, 16).ok()?;
    (super::file_name(sii) == name).then_some(sii)
}

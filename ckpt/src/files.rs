//! The files that memory is mapped from.
//!
//! A page that the process has not written is the file's: it is not copied, but mapped again. That is right for as long
//! as the file is to be had. So a checkpoint tells a file by more than its path, and has the content of those that have
//! lost their name (an upgrade puts new files in their place), or of all, to be restored where they are not.
//!
//! Content is pages, at addresses above those that a process can have: whatever keeps, compresses and compares pages
//! does so with these.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::copy::copy_in;
use crate::pages::{Page, PageStore, StagedPages};
use crate::runs::PageRun;
use crate::state::{Mapping, PAGE_BYTES, TASK_END};

/// First address of content.
const CONTENT_BASE: u64 = TASK_END.next_power_of_two();
/// Files that are larger are not read to tell them apart: size and time of the last change do.
const DIGEST_BYTES_MAX: u64 = 256 << 20;
/// Content of one process that is kept: it takes memory.
const CONTENT_BYTES_MAX: u64 = 1 << 30;
/// What the kernel adds to the name of a file that has lost it.
const DELETED: &str = " (deleted)";
/// What content is mapped from after a restore: followed by its address.
const RESTORED: &str = "/memfd:ftrun-content-";
/// Memory that has the form of a file.
const KERNELS_OWN: [&str; 4] = ["/SYSV", "/anon_hugepage", "/[aio]", "/memfd:"];

/// A file that memory is mapped from, as it was when that was first seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// As in [`Mapping`].
    pub dev: u64,
    /// As in [`Mapping`].
    pub inode: u64,
    /// Its name, without what the kernel adds when it is gone.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Who it is on this machine; `None` if it had lost its name before.
    pub identity: Option<Identity>,
    /// What it is anywhere, if that was wanted.
    pub digest: Option<Digest>,
    /// Address of its first byte among the pages, if what is mapped of it is there.
    pub content: Option<u64>,
}

/// Tells a file from one that takes its name later, also where an inode's number is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    dev: u64,
    inode: u64,
    /// When it was made, nanoseconds since the epoch, where the file system knows.
    born: Option<i128>,
}

/// A file that has a name, for a log of what was mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    path: String,
    identity: Identity,
}

impl Named {
    /// An open file, if `path` leads to it. Opens nothing.
    ///
    /// # Errors
    /// There is no such file, or it has another name.
    pub fn new(fd: RawFd, path: &Path) -> io::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        let (identity, _) = Identity::ask(fd, c"", libc::AT_EMPTY_PATH)?;
        let (there, _) = Identity::ask(libc::AT_FDCWD, &name, 0)?;
        let path = path.to_str().filter(|_| there.is(&identity)).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { path: path.to_owned(), identity })
    }

    /// Its name.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Opens it again, if `shared` also for writing where that can be; or what the checkpoint has of it.
    ///
    /// # Errors
    /// The name leads to another file, or nowhere, and the checkpoint has not the content.
    pub fn open(&self, shared: bool, files: &[MappedFile], pages: &PageStore) -> Result<File, Error> {
        let same = |there: &File| Identity::of(there).is_ok_and(|(found, _)| self.identity.is(&found));
        if let Some(file) = open_for(shared, &self.path).filter(same) {
            return Ok(file);
        }
        let known = files.iter().find(|f| f.content.is_some() && self.is(f));
        let content = known.and_then(|known| Some((known, known.content?)));
        let (known, content) = content.ok_or_else(|| Error::Replaced { path: self.path.clone() })?;
        restore(known, content, pages)
    }

    fn is(&self, known: &MappedFile) -> bool {
        known.identity.is_some_and(|identity| identity.is(&self.identity))
    }
}

/// What a file contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Digest {
    /// BLAKE3.
    Content([u8; 32]),
    /// Time of its last change, nanoseconds since the epoch: it is too large to be read.
    Changed(i128),
}

/// A file that was mapped cannot be had any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name leads to another file, and the checkpoint has not the content.
    #[error(
        "memory of the program is mapped from {path}, which is not there or another file than when the checkpoint was \
         taken; put it back"
    )]
    Replaced {
        /// Its name.
        path: String,
    },
    /// No memory for its content.
    #[error("the content of {path}: {source}")]
    Content {
        /// Its name.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What a checkpoint is to know about files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// The content of all: it may be restored where they are not.
    pub content: bool,
    /// What they contain, so that the same files are known elsewhere.
    pub digest: bool,
}

/// What is known of the mapped files of a process.
#[derive(Debug, Default)]
pub struct Files {
    policy: Policy,
    known: Vec<MappedFile>,
    taken: Arc<Taken>,
}

/// What [`Files::follow`] has found.
#[derive(Debug, Default)]
pub struct Followed {
    /// The files that are mapped.
    pub files: Vec<MappedFile>,
    /// Content that is not needed any more.
    pub needless: Vec<PageRun>,
    /// Files that have no name, and of which too much is mapped to keep their content: the process cannot be restored.
    pub left_out: Vec<String>,
}

/// What is among the pages, by device, inode, offset and length of mappings.
#[derive(Clone, Debug, Default)]
pub struct Taken(HashSet<(u64, u64, u64, u64)>);

impl Taken {
    /// A mapped file has lost its name, and nobody but the process has its content.
    pub fn lacks_one(&self, maps: &[Mapping]) -> bool {
        let lost = |m: &&Mapping| is_of_file(m) && can_be_taken(m) && m.path.ends_with(DELETED);
        maps.iter().filter(lost).any(|m| !self.0.contains(&key(m)))
    }
}

impl Identity {
    fn of(file: &File) -> io::Result<(Self, i128)> {
        Self::ask(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
    }

    /// And when it was changed last (statx(2)).
    fn ask(directory: RawFd, path: &CStr, flags: i32) -> io::Result<(Self, i128)> {
        // SAFETY: plain integers, for which zero is valid; string and structure outlive the call.
        let stat = unsafe {
            let mut stat: libc::statx = std::mem::zeroed();
            let want = libc::STATX_INO | libc::STATX_BTIME | libc::STATX_MTIME;
            if libc::statx(directory, path.as_ptr(), flags, want, &raw mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            stat
        };
        let time = |t: libc::statx_timestamp| i128::from(t.tv_sec) * 1_000_000_000 + i128::from(t.tv_nsec);
        let born = (stat.stx_mask & libc::STATX_BTIME != 0).then(|| time(stat.stx_btime));
        let dev = libc::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        Ok((Self { dev, inode: stat.stx_ino, born }, time(stat.stx_mtime)))
    }

    /// Both are of one file. A device's number may change when the machine is started again.
    fn is(&self, other: &Self) -> bool {
        self.inode == other.inode && self.born == other.born && (self.born.is_some() || self.dev == other.dev)
    }
}

impl Digest {
    fn of(file: &File, size: u64, changed: i128) -> io::Result<Self> {
        if size > DIGEST_BYTES_MAX {
            return Ok(Self::Changed(changed));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file)?;
        Ok(Self::Content(*hasher.finalize().as_bytes()))
    }
}

/// A mapping of a file, not of a device or of memory that has the form of a file.
fn is_of_file(m: &Mapping) -> bool {
    let private = !m.shared && m.path.starts_with("/memfd:");
    let device = m.path.starts_with("/dev/") && !m.path.starts_with("/dev/shm/");
    let own = device || KERNELS_OWN.iter().any(|own| m.path.starts_with(own));
    m.inode != 0 && m.path.starts_with('/') && (private || !own)
}

/// What others may write to is not the file's content: it is kept as memory.
fn can_be_taken(m: &Mapping) -> bool {
    !m.shared || m.prot & libc::PROT_WRITE.cast_unsigned() == 0
}

impl Files {
    /// Nothing is known yet.
    pub fn new(policy: Policy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// What a checkpoint knew from which the process has been restored.
    pub fn restored(&mut self, known: &[MappedFile]) {
        self.known = known.to_vec();
        self.taken = Arc::default();
    }

    /// What has been taken so far.
    pub fn taken(&self) -> Arc<Taken> {
        Arc::clone(&self.taken)
    }

    /// A mapping of this part of a file can be made again, whatever becomes of the file, as far as that is wanted.
    pub fn has(&self, file: &Named, offset: u64, length: u64) -> bool {
        let end = offset + length;
        let taken = |f: &MappedFile| {
            let of_it = |key: &&(u64, u64, u64, u64)| (key.0, key.1) == (f.dev, f.inode);
            self.taken.0.iter().filter(of_it).any(|(_, _, from, bytes)| *from <= offset && from + bytes >= end)
        };
        !self.policy.content || self.known.iter().any(|f| f.content.is_some() && file.is(f) && taken(f))
    }

    /// Follows what process `pid` has mapped now, and stages content that is not among the pages yet.
    ///
    /// # Errors
    /// The process is gone or may not be read, or no memory.
    pub fn follow(
        &mut self,
        pid: i32,
        maps: &[Mapping],
        stored: &PageStore,
        staged: &mut StagedPages,
    ) -> io::Result<Followed> {
        let before = std::mem::take(&mut self.known);
        let mut now: Vec<MappedFile> = Vec::with_capacity(before.len());
        let mut next = before.iter().filter_map(MappedFile::content_end).max().unwrap_or(CONTENT_BASE);
        let (mut missing, mut left_out) = (Vec::new(), Vec::new());
        let bytes = |f: &MappedFile| f.content.map_or(0, |_| f.size);
        let mut used: u64 = before.iter().map(bytes).sum();
        for m in maps.iter().filter(|m| is_of_file(m)) {
            let at = match now.iter().position(|f| (f.dev, f.inode) == (m.dev, m.inode)) {
                Some(at) => at,
                None => match self.recognise(&before, m) {
                    Some(file) => {
                        now.push(file);
                        now.len() - 1
                    }
                    None => continue,
                },
            };
            let file = &mut now[at];
            let wanted = self.policy.content || m.path.ends_with(DELETED);
            if !can_be_taken(m) || !wanted || self.taken.0.contains(&key(m)) {
                continue;
            }
            if file.content.is_none() {
                // As far as any mapping of it goes.
                let same = |o: &&Mapping| (o.dev, o.inode) == (m.dev, m.inode);
                let end = maps.iter().filter(same).map(|o| o.offset + (o.end - o.start)).max();
                file.size = file.size.max(end.unwrap_or(0));
                if used + file.size > CONTENT_BYTES_MAX {
                    if m.path.ends_with(DELETED) {
                        left_out.push(file.path.clone());
                    }
                    Arc::make_mut(&mut self.taken).0.insert(key(m));
                    continue;
                }
                used += file.size;
                file.content = Some(next);
                next = next.max(file.content_end().unwrap_or(0));
            }
            missing.extend(Missing::of(m, file, stored));
            Arc::make_mut(&mut self.taken).0.insert(key(m));
        }
        take(pid, missing, staged)?;
        let kept = |f: &MappedFile| now.iter().any(|n| n.content == f.content);
        let pages = |f: &MappedFile| Some(PageRun::span(f.content?, f.content_end()?));
        let needless = before.iter().filter(|f| !kept(f)).filter_map(pages).collect();
        if !self.taken.0.is_empty() {
            let mapped: HashSet<_> = maps.iter().map(key).collect();
            Arc::make_mut(&mut self.taken).0.retain(|key| mapped.contains(key));
        }
        self.known.clone_from(&now);
        Ok(Followed { files: now, needless, left_out })
    }

    /// The file of a mapping, as it is known or as it is.
    fn recognise(&self, before: &[MappedFile], m: &Mapping) -> Option<MappedFile> {
        let restored = m.path.strip_prefix(RESTORED).and_then(|rest| rest.strip_suffix(DELETED));
        if let Some(address) = restored.and_then(|address| u64::from_str_radix(address, 16).ok()) {
            let known = before.iter().find(|f| f.content == Some(address))?;
            return Some(MappedFile { dev: m.dev, inode: m.inode, ..known.clone() });
        }
        let lost = m.path.strip_suffix(DELETED);
        let name = lost.unwrap_or(&m.path);
        let same = |f: &&MappedFile| (f.dev, f.inode, f.path.as_str()) == (m.dev, m.inode, name);
        // One that was made since may have its number, and its name.
        if let Some(known) = before.iter().find(same).filter(|f| lost.is_some() || f.has_its_name()) {
            return Some(known.clone());
        }
        let of = |path: &str| MappedFile {
            dev: m.dev,
            inode: m.inode,
            path: path.to_owned(),
            size: 0,
            identity: None,
            digest: None,
            content: None,
        };
        if let Some(path) = lost {
            return Some(of(path));
        }
        let file = File::open(&m.path).ok()?;
        let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let (identity, changed) = Identity::of(&file).ok()?;
        let digest = (self.policy.digest && !self.policy.content).then(|| Digest::of(&file, metadata.len(), changed));
        let digest = digest.and_then(Result::ok);
        Some(MappedFile { size: metadata.len(), identity: Some(identity), digest, ..of(&m.path) })
    }
}

fn key(m: &Mapping) -> (u64, u64, u64, u64) {
    (m.dev, m.inode, m.offset, m.end - m.start)
}

/// What a mapping shows of its file and is not among the pages.
struct Missing {
    /// Addresses among the pages, and where the process has it.
    pages: Vec<(u64, u64)>,
    path: String,
    range: Range<u64>,
    file: MappedFile,
}

impl Missing {
    fn of(m: &Mapping, file: &MappedFile, stored: &PageStore) -> Option<Self> {
        let content = file.content?;
        let length = (m.end - m.start).min(file.size.next_multiple_of(PAGE_BYTES).saturating_sub(m.offset));
        let addrs = PageRun::span(m.start, m.start + length).addrs();
        let place = |at: u64| (content + m.offset + (at - m.start), at);
        let pages: Vec<_> = addrs.map(place).filter(|(place, _)| !stored.is_stored(*place)).collect();
        let range = m.start..m.end;
        (!pages.is_empty()).then(|| Self { pages, path: m.path.clone(), range, file: file.clone() })
    }

    /// Where the file can be read. Who may not open the mapping's reads the memory: a page there that was written is not the
    /// file's, but is kept itself.
    fn source(&self, pid: i32) -> Option<File> {
        let named = File::open(&self.path).ok().filter(|there| self.file.is(there));
        named.or_else(|| File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", self.range.start, self.range.end)).ok())
    }
}

/// Stages it, ascending; several mappings may show the same page.
fn take(pid: i32, missing: Vec<Missing>, staged: &mut StagedPages) -> io::Result<()> {
    let mut pages: BTreeMap<u64, (u64, usize)> = BTreeMap::new();
    for (i, m) in missing.iter().enumerate() {
        pages.extend(m.pages.iter().map(|(place, at)| (*place, (*at, i))));
    }
    let sources: Vec<Option<File>> = missing.iter().map(|m| m.source(pid)).collect();
    let memory = File::open(format!("/proc/{pid}/mem")).ok();
    for (place, (at, i)) in pages {
        let content = missing[i].file.content.unwrap_or(place);
        if let Some(source) = &sources[i] {
            staged.push(place, &read_page(source, place - content)?)?;
            continue;
        }
        let page = copy_in(pid, &[PageRun { start: at, pages: 1 }], memory.as_ref())?;
        page.iter().try_for_each(|(_, page)| staged.push(place, page))?;
    }
    Ok(())
}

/// A page of a file; behind its end there are zeros.
fn read_page(file: &File, offset: u64) -> io::Result<Page> {
    let mut page = [0; PAGE_BYTES as usize];
    let mut done = 0;
    while done < page.len() {
        match file.read_at(&mut page[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(page)
}

impl MappedFile {
    fn content_end(&self) -> Option<u64> {
        Some(self.content? + self.size.next_multiple_of(PAGE_BYTES))
    }

    /// The name leads to it.
    fn has_its_name(&self) -> bool {
        let there = CString::new(self.path.as_str()).ok().and_then(|path| Identity::ask(libc::AT_FDCWD, &path, 0).ok());
        there.zip(self.identity).is_some_and(|((there, _), known)| there.is(&known))
    }

    /// It is this one, or one with the same content.
    fn is(&self, other: &File) -> bool {
        let Ok((identity, changed)) = Identity::of(other) else { return false };
        let same = self.identity.is_some_and(|known| known.is(&identity));
        let like = || {
            let size = other.metadata().ok().map(|metadata| metadata.len());
            let digest = self.digest.filter(|_| size == Some(self.size));
            digest.is_some_and(|known| Digest::of(other, self.size, changed).is_ok_and(|found| found == known))
        };
        same || like()
    }
}

/// What a page of a mapping shows of its file before it is written; `None` if nobody has that.
pub fn page_of(m: &Mapping, at: u64, files: &[MappedFile], pages: &PageStore) -> Option<Page> {
    let known = files.iter().find(|f| (f.dev, f.inode) == (m.dev, m.inode))?;
    let offset = m.offset + (at - m.start);
    if let Some(content) = known.content {
        return pages.get(content + offset).copied();
    }
    read_page(&File::open(&known.path).ok().filter(|there| known.is(there))?, offset).ok()
}

/// Opens what a mapping is to be made from: the file, or what the checkpoint has of it. `None` where there is none, and what
/// is known of the memory is all of it.
///
/// # Errors
/// The file has been replaced.
pub fn open(m: &Mapping, files: &[MappedFile], pages: &PageStore) -> Result<Option<File>, Error> {
    if m.inode == 0 || m.path.is_empty() {
        return Ok(None);
    }
    let Some(known) = files.iter().find(|f| (f.dev, f.inode) == (m.dev, m.inode)) else {
        return Ok(if m.path.ends_with(DELETED) { None } else { open_for(m.shared, &m.path) });
    };
    // What others may write to changes: elsewhere it is what has the name.
    let elsewhere = !can_be_taken(m) && known.digest.is_some();
    if let Some(file) = open_for(m.shared, &known.path).filter(|there| elsewhere || known.is(there)) {
        return Ok(Some(file));
    }
    let Some(content) = known.content else {
        // A file without a name that others may write to is kept as memory.
        let memory = m.path.ends_with(DELETED) && !can_be_taken(m);
        return if memory { Ok(None) } else { Err(Error::Replaced { path: known.path.clone() }) };
    };
    restore(known, content, pages).map(Some)
}

/// As a mapping needs it; one that is only read needs no more.
fn open_for(shared: bool, path: &str) -> Option<File> {
    let open = |write: bool| File::options().read(true).write(write).open(path);
    if shared { open(true).or_else(|_| open(false)).ok() } else { open(false).ok() }
}

/// A file without a name that has the content.
fn restore(known: &MappedFile, content: u64, pages: &PageStore) -> Result<File, Error> {
    fill(known, content, pages).map_err(|source| Error::Content { path: known.path.clone(), source })
}

fn fill(known: &MappedFile, content: u64, pages: &PageStore) -> io::Result<File> {
    let name = CString::new(format!("{}{content:x}", RESTORED.trim_start_matches("/memfd:")))?;
    // SAFETY: a string that outlives the call; the result is owned by nobody else.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(known.size)?;
    for (at, page) in pages.iter_range(content, content + known.size.next_multiple_of(PAGE_BYTES)) {
        let offset = at - content;
        let length = (known.size - offset).min(PAGE_BYTES) as usize;
        file.write_all_at(&page[..length], offset)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::maps::read_maps;

    fn own_pid() -> i32 {
        std::process::id().cast_signed()
    }

    /// A file of this process's, mapped to be read; how that is seen.
    fn mapped(path: &Path, bytes: usize) -> Mapping {
        let file = File::open(path).unwrap();
        // SAFETY: a new mapping, which stays.
        let at = unsafe {
            let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
            libc::mmap(std::ptr::null_mut(), bytes, prot, flags, file.as_raw_fd(), 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        seen(at as u64)
    }

    fn seen(at: u64) -> Mapping {
        read_maps(own_pid()).unwrap().into_iter().find(|m| m.start == at).unwrap()
    }

    /// Break it: keep content of any size, or map what is known to be missing from nothing.
    #[test]
    fn what_is_too_large_to_be_kept_is_told_and_not_made_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("large");
        File::create(&path).unwrap().set_len(CONTENT_BYTES_MAX + PAGE_BYTES).unwrap();
        let start = mapped(&path, (CONTENT_BYTES_MAX + PAGE_BYTES) as usize).start;
        std::fs::remove_file(&path).unwrap();
        let maps = [seen(start)];
        let (mut files, mut staged, pages) = (Files::default(), StagedPages::new(), PageStore::new());
        assert!(files.taken().lacks_one(&maps));
        let followed = files.follow(own_pid(), &maps, &pages, &mut staged).unwrap();
        assert_eq!(followed.left_out, [path.to_str().unwrap()]);
        assert!(staged.is_empty() && !files.taken().lacks_one(&maps), "it is asked for again and again");
        assert!(matches!(open(&maps[0], &followed.files, &pages), Err(Error::Replaced { .. })));
    }

    /// Break it: tell a file by its name, or by the number of its inode, alone.
    #[test]
    fn content_outlives_the_file_and_goes_with_the_mapping() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small");
        let content = vec![7; 3 * PAGE_BYTES as usize + 5];
        File::create(&path).unwrap().write_all(&content).unwrap();
        let start = mapped(&path, content.len()).start;
        let (mut files, mut pages) = (Files::default(), PageStore::new());
        let mut follow = |maps: &[Mapping], pages: &mut PageStore| {
            let mut staged = StagedPages::new();
            let followed = files.follow(own_pid(), maps, pages, &mut staged).unwrap();
            pages.drop_runs(&followed.needless);
            pages.commit(&staged).unwrap();
            followed.files
        };
        let known = follow(&[seen(start)], &mut pages);
        assert!(pages.is_empty(), "the file is there");
        std::fs::remove_file(&path).unwrap();
        // On most file systems it has the same number.
        File::create(&path).unwrap().write_all(&[8; 9]).unwrap();
        assert!(matches!(open(&seen(start), &known, &pages), Err(Error::Replaced { .. })));
        let known = follow(&[seen(start)], &mut pages);
        assert_eq!(pages.len(), 4);
        let mut restored = Vec::new();
        open(&seen(start), &known, &pages).unwrap().unwrap().read_to_end(&mut restored).unwrap();
        // As far as it was mapped: to the end of a page.
        restored.truncate(content.len());
        assert!(restored == content);
        assert!(follow(&[], &mut pages).is_empty() && pages.is_empty());
    }
}

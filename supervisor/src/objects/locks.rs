//! Locks on files (fcntl(2), flock(2)): as the kernel tells them, as calls change them, and taken again.

use std::io;
use std::path::Path;

use super::build::{Error, Result};
use super::follow::Happened;
use super::{File, Id, Kind, Objects, Open, Record};

/// `lock: 1: POSIX  ADVISORY  WRITE 4711 00:2a:1234 0 EOF`.
pub(super) fn record_lock(line: &str) -> Option<Record> {
    let words: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let of_file = match *words.get(1)? {
        "POSIX" => false,
        "OFDLCK" => true,
        _ => return None,
    };
    let end = match *words.get(7)? {
        "EOF" => u64::MAX,
        n => n.parse().ok()?,
    };
    Some(Record { start: words.get(6)?.parse().ok()?, end, write: *words.get(3)? == "WRITE", of_file })
}

/// The same of a lock on the whole file.
pub(super) fn whole_lock(line: &str) -> Option<i32> {
    let words: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
    (*words.get(1)? == "FLOCK").then(|| if words.get(3) == Some(&"WRITE") { libc::LOCK_EX } else { libc::LOCK_SH })
}

impl File {
    /// Whether both are open on one file, as their paths tell, links followed.
    fn is_same(&self, other: &Self) -> bool {
        let real = |path: &Path| std::fs::canonicalize(path).ok();
        let named = !self.nameless && !other.nameless;
        self.path == other.path || named && real(&self.path).is_some_and(|path| Some(path) == real(&other.path))
    }

    /// Record locks are split and joined as fcntl(2) says.
    pub(super) fn set_record(&mut self, start: u64, end: u64, of_file: bool, write: Option<bool>) {
        let mut kept = Vec::new();
        for r in self.records.drain(..) {
            if r.of_file != of_file || r.end < start || r.start > end {
                kept.push(r);
                continue;
            }
            if r.start < start {
                kept.push(Record { end: start - 1, ..r });
            }
            if r.end > end {
                kept.push(Record { start: end + 1, ..r });
            }
        }
        kept.extend(write.map(|write| Record { start, end, write, of_file }));
        kept.sort_by_key(|r| (r.start, r.end));
        self.records = kept;
    }
}

impl Objects {
    /// The process has record locks.
    pub fn has_records(&self) -> bool {
        let has = |open: &Open| matches!(&open.kind, Kind::File(file) if file.records.iter().any(|r| !r.of_file));
        self.open.values().any(has)
    }

    /// The process's record locks of a file change, by whatever descriptor it has taken them: that goes by the file, not by its
    /// descriptions (fcntl(2)).
    pub(super) fn change_records(&mut self, id: Id, change: impl Fn(&mut File)) {
        let Some(Open { kind: Kind::File(file), .. }) = self.open.get(&id) else { return };
        let file = file.clone();
        for (other, open) in &mut self.open {
            if let Kind::File(with) = &mut open.kind
                && (*other == id || with.records.iter().any(|r| !r.of_file) && with.is_same(&file))
            {
                change(with);
            }
        }
    }

    /// A call has taken record locks, or let them go.
    pub(super) fn lock(&mut self, call: &Happened<'_>) {
        let half = |at: usize| call.data.get(at..at + 2).map_or(0, |b| i16::from_le_bytes([b[0], b[1]]));
        let (kind, whence) = (i32::from(half(0)), i32::from(half(2)));
        let (start, len) = (call.word(8) as i64, call.word(16) as i64);
        let command = call.args[1] as i32;
        let of_file = matches!(command, libc::F_OFD_SETLK | libc::F_OFD_SETLKW);
        let fd = call.args[0] as i32;
        let Some(file) = self.file(fd) else { return };
        let base = match whence {
            libc::SEEK_SET => 0,
            libc::SEEK_CUR => file.position.unwrap_or(0) as i64,
            // From the end, which nobody knows any more: a checkpoint stands for the call.
            _ => return,
        };
        let start = base + start;
        let (start, end) = match len {
            0 => (start as u64, u64::MAX),
            n if n > 0 => (start as u64, (start + n - 1) as u64),
            n => ((start + n) as u64, (start - 1) as u64),
        };
        let write = (kind != libc::F_UNLCK).then_some(kind == libc::F_WRLCK);
        if !of_file && let Some(id) = self.id(fd) {
            self.change_records(id, |file| file.set_record(start, end, of_file, None));
        }
        if let Some(file) = self.file(fd) {
            file.set_record(start, end, of_file, write);
        }
    }

    /// Takes record locks again that went with the table, in which everything else is.
    ///
    /// # Errors
    /// Somebody else has one now.
    pub fn take_records(&self) -> Result<()> {
        for (number, n) in &self.numbers {
            let Some(Open { kind: Kind::File(file), .. }) = self.open.get(&n.open) else { continue };
            let records = file.records.iter().filter(|r| !r.of_file).copied().collect();
            take_locks(*number, &File { lock: 0, records, ..File::default() }).map_err(|source| {
                let what = format!("descriptor {number}: a lock on {} is somebody else's now", file.path.display());
                Error::Sys { what, source }
            })?;
        }
        Ok(())
    }

    /// Takes all locks again.
    ///
    /// # Errors
    /// Somebody else has one now, and that is not allowed (`lossy`).
    pub(super) fn take_locks(&self, lossy: bool, told: &mut Vec<String>) -> Result<()> {
        let mut done = Vec::new();
        for (number, n) in &self.numbers {
            let Some(Open { kind: Kind::File(file), .. }) = self.open.get(&n.open) else { continue };
            if done.contains(&n.open) {
                continue;
            }
            done.push(n.open);
            if let Err(e) = take_locks(*number, file) {
                let what =
                    format!("descriptor {number}: a lock on {} is somebody else's now: {e}", file.path.display());
                if !lossy {
                    return Err(Error::Lost(what));
                }
                told.push(what);
            }
        }
        Ok(())
    }
}

fn take_locks(number: i32, file: &File) -> io::Result<()> {
    // SAFETY: plain numbers, and a structure that outlives the calls.
    unsafe {
        if file.lock != 0 && libc::flock(number, file.lock | libc::LOCK_NB) != 0 {
            return Err(io::Error::last_os_error());
        }
        for r in &file.records {
            let mut lock: libc::flock = std::mem::zeroed();
            lock.l_type = if r.write { libc::F_WRLCK } else { libc::F_RDLCK } as i16;
            lock.l_whence = libc::SEEK_SET as i16;
            lock.l_start = r.start as i64;
            lock.l_len = if r.end == u64::MAX { 0 } else { (r.end - r.start + 1) as i64 };
            let command = if r.of_file { libc::F_OFD_SETLK } else { libc::F_SETLK };
            if libc::fcntl(number, command, &raw const lock) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

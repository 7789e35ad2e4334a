//! What the unit's descriptors are: enough to make the kernel's objects again when they are gone with every process
//! that had them (ARCHITECTURE.md, "Cold recovery").
//!
//! A checkpoint holds this model as the kernel tells it ([`look`]); replay of the events behind it changes it as each
//! call has changed the objects ([`follow`]); at the end the objects are made from it, once ([`build`]).

pub mod build;
pub mod follow;
mod locks;
pub mod look;
mod options;
mod sockets;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Most bytes kept of one file without a name, and of all of them together.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most bytes kept of all files without a name.
pub const FILES_BYTES_MAX: u64 = 16 << 20;

/// Number of an open file description in the model.
pub type Id = u32;

/// The unit's descriptors, open file descriptions, directory and umask.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objects {
    /// Descriptors by number.
    pub numbers: BTreeMap<i32, Number>,
    /// Open file descriptions: several descriptors may share one.
    pub open: BTreeMap<Id, Open>,
    /// Pipes by what the kernel, or replay, calls them.
    pub pipes: BTreeMap<u64, Pipe>,
    /// The directory.
    pub directory: PathBuf,
    /// The umask.
    pub umask: u32,
    /// What the unit's starter gave to the program, by number: device and inode, by which another supervisor knows it again.
    pub given: BTreeMap<i32, (u64, u64)>,
    /// `CLOCK_MONOTONIC` nanoseconds, as far as the unit is known to have seen them: what is set to a time from now is set
    /// to one from then, which is not later, and which the program cannot tell.
    #[serde(skip)]
    pub time: u64,
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Number {
    /// What it is a descriptor of.
    pub open: Id,
    /// `execve` closes it.
    pub on_exec: bool,
}

/// An open file description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// What is open.
    pub kind: Kind,
    /// Access mode and status flags (`F_GETFL`).
    pub flags: i32,
    /// The number under which the unit's starter gave it to the program, if it did.
    pub given: Option<i32>,
}

/// What is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A file, directory, device or FIFO.
    File(File),
    /// One end of a pipe, by [`Objects::pipes`].
    Pipe(u64),
    /// A connection: nothing but that it is one. It is made as one that the other side has reset.
    Connection {
        /// `AF_INET`, `AF_INET6` or `AF_UNIX`.
        family: i32,
        /// `SOCK_STREAM` or `SOCK_SEQPACKET`.
        kind: i32,
    },
    /// Any other socket.
    Socket(Socket),
    /// An epoll set: by the number under which something was entered, and what it was.
    Epoll(BTreeMap<(i32, Id), Entry>),
    /// An eventfd.
    Counter {
        /// Its value.
        count: u64,
        /// A read takes one.
        semaphore: bool,
    },
    /// A timerfd.
    Timer(Timer),
    /// A signalfd, and its mask.
    Signals(u64),
    /// What cannot be made again: why.
    Opaque(String),
}

/// An open file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Where it is, or was.
    pub path: PathBuf,
    /// The position; unknown (at the end) after data were appended to a file whose size is not known.
    pub position: Option<u64>,
    /// The position is the end, where this description has appended last.
    pub at_end: bool,
    /// It has no name any more.
    pub nameless: bool,
    /// What is in it, if it has no name, or was made empty in the events that have been followed.
    pub content: Option<Content>,
    /// `LOCK_SH` or `LOCK_EX` (flock(2)), 0 for none.
    pub lock: i32,
    /// Record locks.
    pub records: Vec<Record>,
}

/// A file without a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// The bytes; `None` when they are too many to be kept.
    pub bytes: Option<Vec<u8>>,
    /// Seals of a file of memfd_create(2).
    pub seals: Option<i32>,
}

/// A record lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// Nobody else may have one, too.
    pub write: bool,
    /// Of the open file description (`F_OFD_SETLK`) rather than of the process.
    pub of_file: bool,
}

/// What is in a pipe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// `F_GETPIPE_SZ`; 0 for what the kernel gives.
    pub capacity: i32,
    /// Data that nobody has read.
    pub data: Vec<u8>,
}

/// A socket that is no connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// Address family.
    pub family: i32,
    /// Type, without flags.
    pub kind: i32,
    /// Protocol.
    pub protocol: i32,
    /// Its own address, if it has one.
    pub address: Option<Vec<u8>>,
    /// Where it sends to (datagrams).
    pub peer: Option<Vec<u8>>,
    /// `listen` has been called: the backlog.
    pub backlog: Option<i32>,
    /// Options that have been set, in their order: level, name, value.
    pub options: Vec<(i32, i32, Vec<u8>)>,
    /// Mode and owner of its file (unix(7)).
    pub file: Option<(u32, u32, u32)>,
    /// It was made by socketpair(2), and both ends are, or were, the unit's.
    pub pair: Option<PairEnd>,
}

/// One end of a pair of sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairEnd {
    /// The other end, while it is open.
    pub other: Option<Id>,
    /// Messages, or pieces of the stream, that nobody has read.
    pub queue: Vec<Vec<u8>>,
    /// Bit 0: shut down for reading; bit 1: for writing.
    pub shut: u8,
}

/// An entry of an epoll set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `EPOLL*`.
    pub events: u32,
    /// The program's own word.
    pub data: u64,
}

/// A timerfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timer {
    /// Clock.
    pub clock: i32,
    /// `CLOCK_MONOTONIC` nanoseconds of the first expiry that has not been read, which may lie in the past.
    pub next: Option<u64>,
    /// Period in nanoseconds.
    pub period: u64,
}

impl Content {
    /// Data are written.
    fn write(&mut self, at: u64, data: &[u8]) {
        let end = at.saturating_add(data.len() as u64);
        if end > FILE_BYTES_MAX {
            self.bytes = None;
        }
        if let Some(bytes) = &mut self.bytes {
            bytes.resize(bytes.len().max(end as usize), 0);
            bytes[at as usize..end as usize].copy_from_slice(data);
        }
    }

    /// It gets another length.
    fn resize(&mut self, len: u64) {
        if len > FILE_BYTES_MAX {
            self.bytes = None;
        }
        if let Some(bytes) = &mut self.bytes {
            bytes.resize(len as usize, 0);
        }
    }
}

impl Objects {
    /// The description that a number leads to.
    pub fn get(&self, number: i32) -> Option<&Open> {
        self.open.get(&self.numbers.get(&number)?.open)
    }

    fn id(&self, number: i32) -> Option<Id> {
        self.numbers.get(&number).map(|n| n.open)
    }

    fn kind(&mut self, number: i32) -> Option<&mut Kind> {
        let id = self.id(number)?;
        Some(&mut self.open.get_mut(&id)?.kind)
    }

    fn file(&mut self, number: i32) -> Option<&mut File> {
        match self.kind(number)? {
            Kind::File(file) => Some(file),
            _ => None,
        }
    }

    /// What is known to be in a file, to be changed.
    fn content(&mut self, number: i32) -> Option<&mut Content> {
        self.file(number)?.content.as_mut()
    }

    fn socket(&mut self, number: i32) -> Option<&mut Socket> {
        match self.kind(number)? {
            Kind::Socket(socket) => Some(socket),
            _ => None,
        }
    }

    /// A new description.
    fn add(&mut self, open: Open) -> Id {
        let id = self.open.last_key_value().map_or(0, |(id, _)| id + 1);
        self.open.insert(id, open);
        id
    }

    /// Gives a number to a description; what had it is closed.
    fn put(&mut self, number: i32, open: Id, on_exec: bool) {
        let before = self.numbers.insert(number, Number { open, on_exec });
        if let Some(before) = before.filter(|before| before.open != open) {
            self.released(before.open);
        }
    }

    /// Closes a number.
    fn close(&mut self, number: i32) {
        if let Some(was) = self.numbers.remove(&number) {
            self.change_records(was.open, |file| file.records.retain(|r| r.of_file));
            self.released(was.open);
        }
    }

    /// A number less leads to a description: the last one closes it.
    fn released(&mut self, id: Id) {
        if self.numbers.values().any(|n| n.open == id) {
            return;
        }
        let Some(gone) = self.open.remove(&id) else { return };
        for open in self.open.values_mut() {
            match &mut open.kind {
                Kind::Epoll(entries) => entries.retain(|(_, open), _| *open != id),
                Kind::Socket(Socket { pair: Some(pair), .. }) if pair.other == Some(id) => pair.other = None,
                _ => {}
            }
        }
        if let Kind::Pipe(pipe) = gone.kind
            && !self.open.values().any(|o| matches!(o.kind, Kind::Pipe(p) if p == pipe))
        {
            self.pipes.remove(&pipe);
        }
    }

    /// Descriptors that cannot be made again: number, and what it is.
    pub fn lost(&self) -> Vec<(i32, String)> {
        let why = |open: &Open| match &open.kind {
            Kind::Opaque(what) => Some(what.clone()),
            Kind::File(file) if file.nameless && file.content.as_ref().is_none_or(|c| c.bytes.is_none()) => {
                let path = file.path.display();
                Some(format!(
                    "{path}, a file without a name whose content is not known (or is more than {FILE_BYTES_MAX} bytes)"
                ))
            }
            _ => None,
        };
        self.numbers.iter().filter_map(|(n, number)| Some((*n, why(self.open.get(&number.open)?)?))).collect()
    }
}

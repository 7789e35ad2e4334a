//! The next keeper: what was held comes back, and goes to its numbers, if it is all there and if it can be told what the call
//! came to that the hands were making when everything was killed. Otherwise nothing of it is used, and the kernel's objects
//! are made again ([`crate::cold`]).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::stream;
use ftrun_abi::table::{self, Class, Effect, Row};

use super::{NONBLOCKING, ON_EXEC, numbers, peek, place, slot_of, slots};
use crate::changes::Change;
use crate::desk::{ARENA_BYTES, DONE, Desk, IDLE, Order, POSITION, RECEIVED, SENT, STARTED};
use crate::evlog::EventLog;
use crate::keeper::keep_only;
use crate::limits;
use crate::marshal::raw_call;
use crate::remains::Remains;

/// Under which name the service manager has the root.
pub const NAME: &str = "ftrun-hold";

/// What has come back: descriptors of this process, out of the way of the unit's numbers.
#[derive(Debug)]
pub struct Returned {
    /// Number, flags, and what it leads to.
    numbers: Vec<(i32, u32, i32)>,
    /// The service manager has what lower numbers lead to, too, and sets it to blocking mode for each start.
    given: i32,
    directory: i32,
    umask: u32,
}

impl Returned {
    /// The descriptors.
    pub fn copies(&self) -> Vec<i32> {
        self.numbers.iter().map(|(.., copy)| *copy).chain([self.directory]).collect()
    }

    /// Makes the calling thread's table, directory and umask those of the unit.
    pub fn put_back(&self) {
        // SAFETY: descriptors of this table that nothing owns: those of the program's starter, copies of ours that the keeper
        // has of its own by now, and what has come back, which is out of the way of the numbers.
        unsafe {
            for (number, flags, copy) in &self.numbers {
                libc::dup3(*copy, *number, if flags & ON_EXEC != 0 { libc::O_CLOEXEC } else { 0 });
                let mode = libc::fcntl(*copy, libc::F_GETFL);
                if *number < self.given && mode >= 0 {
                    let nonblocking = if flags & NONBLOCKING != 0 { libc::O_NONBLOCK } else { 0 };
                    libc::fcntl(*copy, libc::F_SETFL, mode & !libc::O_NONBLOCK | nonblocking);
                }
            }
            libc::fchdir(self.directory);
            libc::umask(self.umask);
        }
        keep_only(&self.numbers.iter().map(|(number, ..)| *number).collect::<Vec<_>>());
    }
}

/// What is held by the root of a unit that nobody runs any more is brought back, and the call that the hands were making is
/// settled on the desk. This process has one thread.
///
/// # Errors
/// Why it cannot be gone on with; the desk is as it was, but for what is made again in any case.
pub fn bring_back(root: &OwnedFd, desk: &'static Desk, log: &File, remains: &Remains) -> Result<Returned, String> {
    if desk.holds.load(SeqCst) == 0 {
        return Err("not all of them were held".into());
    }
    for pid in [&desk.pid, &desk.supervisor, &desk.keeper].map(|pid| pid.load(SeqCst)) {
        if pid != std::process::id() as i32 && !remains.await_end(pid) {
            return Err(format!("process {pid} of the unit does not end"));
        }
    }
    let held: Vec<_> = numbers(desk).collect();
    let spare = held.iter().map(|(number, _)| number + 1).max().unwrap_or(0).max(3);
    // Slots, what is in them, and the numbers. It may do with less.
    if limits::allow_numbers(spare as u64 + 3 * held.len() as u64 + 512).is_err() {
        limits::raise_numbers();
    }
    let slots = slots(root).map_err(|e| format!("what holds them cannot be looked into: {e}"))?;
    let mut slots: Vec<Option<OwnedFd>> = slots.into_iter().map(Some).collect();
    // What several numbers lead to is taken once, and its slot is closed here: the limit may be close.
    let mut come_back = |word: u32, what: &dyn std::fmt::Display| -> Result<OwnedFd, String> {
        let slot = slot_of(word).and_then(|slot| slots.get_mut(slot)?.take());
        let slot = slot.ok_or_else(|| format!("{what} is not held"))?;
        let found = peek(&slot).map_err(|e| format!("{what}: {e}"))?.and_then(|mut fds| fds.pop());
        let found = found.ok_or_else(|| format!("{what} has not come back"))?;
        // SAFETY: numbers; the result is owned by nobody else.
        let high = unsafe { libc::fcntl(found.as_raw_fd(), libc::F_DUPFD_CLOEXEC, spare) };
        super::owned(i64::from(high)).map_err(|_| format!("{what}: {}", std::io::Error::last_os_error()))
    };
    let mut copies: BTreeMap<u32, OwnedFd> = BTreeMap::new();
    for (number, word) in &held {
        if let Entry::Vacant(free) = copies.entry(place(*word)) {
            free.insert(come_back(*word, &format!("descriptor {number}"))?);
        }
    }
    let directory = come_back(desk.directory.load(SeqCst) as u32, &"the directory")?;
    drop(slots);
    crate::fault::keepers_point("hold-returned");

    let settle = Settle { desk, order: &desk.order, copies: &copies };
    settle.order(events_of(log, remains).ok_or("the log cannot be read")?)?;
    // Some may have been made for a call that is made again.
    let number = |(number, word): (i32, u32)| Some((number, word, copies.get(&place(word))?.as_raw_fd()));
    let returned = numbers(desk).filter_map(number).collect();
    let (given, umask) = (desk.given.load(SeqCst) as i32, desk.umask.load(SeqCst));
    let returned = Returned { numbers: returned, given, directory: directory.into_raw_fd(), umask };
    // They are the table's from here on.
    let used = returned.copies();
    for copy in copies.into_values().map(IntoRawFd::into_raw_fd).filter(|copy| !used.contains(copy)) {
        // SAFETY: made above, and owned by nothing any more.
        unsafe { libc::close(copy) };
    }
    Ok(returned)
}

/// The number of events in the log.
fn events_of(log: &File, remains: &Remains) -> Option<u64> {
    let newest = remains.newest()?;
    let log = EventLog::attach(log.try_clone().ok()?, newest).ok()?;
    Some(log.last_sii(newest))
}

/// What became of the call on the desk.
enum Verdict {
    /// It was made, with this result; what it wrote stands on the desk.
    Made(i64),
    /// It was not, or what it did is gone, or it comes out the same again.
    Again,
    /// It makes or removes a name: the file system tells, when the thread comes to it.
    Names,
}

struct Settle<'a> {
    desk: &'static Desk,
    order: &'a Order,
    copies: &'a BTreeMap<u32, OwnedFd>,
}

impl Settle<'_> {
    /// Settles the order, `sii` events being in the log.
    fn order(&self, sii: u64) -> Result<(), String> {
        let state = self.desk.call_state();
        if !matches!(state, STARTED | DONE) || self.order.sii.load(SeqCst) != sii {
            self.desk.hands.store(IDLE, SeqCst);
            return Ok(());
        }
        let nr = self.order.nr.load(SeqCst);
        let args = self.order.args.each_ref().map(|a| a.load(SeqCst));
        let row = table::lookup(nr, &args);
        let verdict = match state {
            DONE => self.made(&row, &args, self.order.result.load(SeqCst)),
            _ => self.begun(&row, &args),
        };
        match verdict.map_err(|why| format!("{} was under way: {why}", row.name))? {
            Verdict::Made(result) => {
                self.order.result.store(result, SeqCst);
                self.desk.hands.store(DONE, SeqCst);
            }
            again => {
                self.desk.hands.store(IDLE, SeqCst);
                self.desk.in_doubt.store(u32::from(matches!(again, Verdict::Names)), SeqCst);
            }
        }
        Ok(())
    }

    fn word(&self, number: i32) -> u32 {
        self.desk.held().get(number as usize).map_or(0, |word| word.load(SeqCst))
    }

    /// The copy of what a number leads to.
    fn copy(&self, number: i32) -> Result<i32, String> {
        let found = self.copies.get(&place(self.word(number)));
        found.map(AsRawFd::as_raw_fd).ok_or_else(|| format!("descriptor {number} is not open"))
    }

    /// What stands on the desk where an argument leads.
    fn arena(&self, at: u64, bytes: usize) -> &[u8] {
        let offset = at.wrapping_sub(self.order.arena.load(SeqCst)) as usize;
        if offset >= ARENA_BYTES {
            return &[];
        }
        // SAFETY: inside the arena; nobody writes there: this process has one thread and no other one is left.
        unsafe { std::slice::from_raw_parts(self.desk.arena().add(offset), bytes.min(ARENA_BYTES - offset)) }
    }

    /// It had been made. What it did to the table is gone with that, unless it has been noted before the kill.
    fn made(&self, row: &Row, args: &[u64; 6], result: i64) -> Result<Verdict, String> {
        if result < 0 {
            return Ok(Verdict::Made(result));
        }
        let noted = match Change::of(row, args, result, |at| self.arena(at, 8)) {
            Some(Change::Made(numbers)) => {
                let all = numbers.iter().all(|number| self.word(*number) != 0);
                let held = numbers.iter().filter_map(|number| self.desk.held().get(*number as usize));
                held.filter(|_| !all).for_each(|word| word.store(0, SeqCst));
                all
            }
            Some(Change::Same(number, as_number)) => place(self.word(number)) == place(self.word(as_number)),
            Some(Change::Closed(number)) => self.word(number) == 0,
            Some(Change::Umask(umask)) => self.desk.umask.load(SeqCst) == umask,
            Some(Change::Directory) => {
                self.desk.directory.load(SeqCst) >> 32 == u64::from(self.order.count.load(SeqCst))
            }
            // It comes out the same.
            Some(Change::ClosedFrom(..) | Change::Flags(_)) => false,
            Some(Change::More) => {
                if self.received(args[1]).iter().any(|number| self.word(*number) == 0) {
                    return Err("descriptors that came with a message are lost".into());
                }
                true
            }
            Some(Change::Anything) => return Err("nobody knows what it has changed".into()),
            None => row.effect != Effect::Lock,
        };
        Ok(match row.effect {
            _ if noted => Verdict::Made(result),
            Effect::Open(_) => Verdict::Names,
            _ => Verdict::Again,
        })
    }

    /// Descriptors that came with the message whose header is there.
    fn received(&self, header: u64) -> Vec<i32> {
        let header = self.arena(header, 56);
        let word = |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
        crate::objects::follow::received(self.arena(word(32), word(40) as usize))
    }

    /// It had been begun, and nobody has seen its end.
    fn begun(&self, row: &Row, args: &[u64; 6]) -> Result<Verdict, String> {
        let fd = args[0] as i32;
        match row.effect {
            // What it made is gone with the table, and what it closed is there again.
            Effect::MemoryFile
            | Effect::Socket
            | Effect::Accept
            | Effect::Pair
            | Effect::Pipe
            | Effect::Epoll
            | Effect::Counter
            | Effect::Timer
            | Effect::Signals
            | Effect::Duplicate
            | Effect::Onto
            | Effect::Close
            | Effect::CloseRange
            | Effect::OnExec
            | Effect::CloseOnExec(_)
            | Effect::Directory
            | Effect::DirectoryOf
            | Effect::Mask
            | Effect::Lock => Ok(Verdict::Again),
            // Set twice, it is as if it had been set once.
            Effect::Listen
            | Effect::Name
            | Effect::Option
            | Effect::Shut
            | Effect::Capacity
            | Effect::Seal
            | Effect::SetTimer
            | Effect::Mode
            | Effect::NonBlocking
            | Effect::GiveAt
            | Effect::Resize
            | Effect::FileLock => Ok(Verdict::Again),
            Effect::Seek if args[2] != libc::SEEK_CUR as u64 || args[1] == 0 => Ok(Verdict::Again),
            Effect::Open(_) | Effect::Make(_) | Effect::Remove(_) | Effect::Rename(..) => Ok(Verdict::Names),
            Effect::Bind => Ok(if has_name(self.copy(fd)?) { Verdict::Made(0) } else { Verdict::Again }),
            Effect::Connect => connected(self.copy(fd)?),
            Effect::Enrol => self.enrolled(args),
            Effect::Take | Effect::Give | Effect::Rewrite => self.moved(row, args),
            Effect::None if i64::from(row.nr) == libc::SYS_epoll_wait => {
                let events = self.arena(args[1], args[2] as usize * 12).chunks_exact(12);
                let n = events.take_while(|event| event[..4] != [0; 4]).count();
                Ok(if n > 0 { Verdict::Made(n as i64) } else { Verdict::Again })
            }
            Effect::None if matches!(row.class, Class::Input | Class::Object) => Ok(Verdict::Again),
            Effect::None if matches!(i64::from(row.nr), libc::SYS_fsync | libc::SYS_fdatasync) => Ok(Verdict::Again),
            _ => Err("nothing tells whether it was made".into()),
        }
    }

    fn enrolled(&self, args: &[u64; 6]) -> Result<Verdict, String> {
        let (set, number) = (self.copy(args[0] as i32)?, args[2] as i32);
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{set}")).map_err(|e| e.to_string())?;
        let number_of = |line: &str| line.strip_prefix("tfd:")?.split_whitespace().next()?.parse::<i32>().ok();
        let there = text.lines().any(|line| number_of(line) == Some(number));
        match (args[1] as i32, there) {
            (libc::EPOLL_CTL_ADD, true) => Ok(Verdict::Made(0)),
            (libc::EPOLL_CTL_DEL, false) => Err("nothing tells whether the set ever had it".into()),
            _ => Ok(Verdict::Again),
        }
    }

    /// Data were taken, or given: what the kernel counts tells.
    fn moved(&self, row: &Row, args: &[u64; 6]) -> Result<Verdict, String> {
        let fd = self.copy(args[0] as i32)?;
        let before = self.order.counted.load(SeqCst);
        let counts = || stream::counts(|nr, args: [u64; 6]| raw_call(nr, &args), fd as u64);
        let n = match self.order.counts.load(SeqCst) {
            RECEIVED => counts().and_then(|c| c.received).ok_or("the connection was reset")?.wrapping_sub(before),
            SENT => counts().ok_or("it is no connection any more")?.sent.wrapping_sub(before),
            POSITION if args[0] > 2 => {
                // SAFETY: queries about a descriptor.
                let (now, flags) =
                    unsafe { (libc::lseek(fd, 0, libc::SEEK_CUR) as u64, libc::fcntl(fd, libc::F_GETFL)) };
                match now.wrapping_sub(before) {
                    n if n > 0 && flags & libc::O_APPEND != 0 && row.nr as i64 == libc::SYS_write => n.min(args[2]),
                    n if n > 0 && flags & libc::O_APPEND != 0 => return Err(format!("{n} bytes were appended")),
                    n => n,
                }
            }
            _ if row.nr as i64 == libc::SYS_read && is_number(fd) => {
                // A value that was taken is not 0.
                self.arena(args[1], 8).iter().any(|b| *b != 0).into()
            }
            _ => return Err("nothing tells whether it was made".into()),
        };
        match n {
            0 => Ok(Verdict::Again),
            1 if row.nr as i64 == libc::SYS_read && is_number(fd) => Ok(Verdict::Made(8)),
            n if n <= ARENA_BYTES as u64 => Ok(Verdict::Made(n as i64)),
            n => Err(format!("{n} bytes were moved")),
        }
    }
}

/// An eventfd or a timerfd, of which a number is read.
fn is_number(fd: i32) -> bool {
    let kind = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
    matches!(kind.to_str(), Some("anon_inode:[eventfd]" | "anon_inode:[timerfd]"))
}

/// A socket has an address.
fn has_name(fd: i32) -> bool {
    let name = nix::sys::socket::getsockname::<nix::sys::socket::SockaddrStorage>(fd);
    name.is_ok_and(|name| match (name.as_sockaddr_in(), name.as_sockaddr_in6(), name.as_unix_addr()) {
        (Some(at), ..) => at.port() != 0,
        (_, Some(at), _) => at.port() != 0,
        (.., Some(at)) => at.path().is_some() || at.as_abstract().is_some(),
        _ => true,
    })
}

/// A connection that was being made.
fn connected(fd: i32) -> Result<Verdict, String> {
    /// `TCP_ESTABLISHED`, `TCP_SYN_SENT` and `TCP_CLOSE`.
    const STATES: [u8; 3] = [1, 2, 7];
    use nix::sys::socket::{SockType, SockaddrStorage, getpeername, getsockopt, sockopt};
    // SAFETY: a descriptor of this process, open for longer than the query.
    let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    if getsockopt(&socket, sockopt::SockType).is_ok_and(|kind| kind == SockType::Datagram) {
        return Ok(Verdict::Again);
    }
    let (mut info, mut len) = ([0u8; 8], 8u32);
    // SAFETY: a buffer that is as long as is said.
    let asked =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut len) };
    match STATES.iter().position(|state| asked == 0 && *state == info[0]) {
        // The socket has it as begun, so that the program asks how it has ended, as it would have.
        Some(0 | 1) => Ok(Verdict::Made(-i64::from(libc::EINPROGRESS))),
        Some(_) => Ok(Verdict::Again),
        None if asked != 0 && getpeername::<SockaddrStorage>(fd).is_ok() => Ok(Verdict::Made(0)),
        None if asked != 0 => Ok(Verdict::Again),
        None => Err("the connection has come and gone".into()),
    }
}

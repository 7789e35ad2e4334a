//! What the descriptors are, as the kernel tells it: for a checkpoint, while no thread of the unit runs.
//!
//! Looking at ten thousand descriptors takes tens of milliseconds. So what was seen is kept, and only what a call may
//! have changed since is looked at again: the shim and the supervisor note the descriptors of such calls. A connection
//! is nothing but that, so its traffic changes nothing here. Two things change without such a call, and are looked at
//! each time: what waits in a pair of sockets both of whose ends the unit has, and epoll sets with entries that a report
//! disarms (`EPOLLONESHOT`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::fds;
use crate::procfs::Ids;

use super::locks::{record_lock, whole_lock};
use super::{Content, Entry, FILE_BYTES_MAX, File, Id, Kind, Number, Objects, Open, Pipe, Record, Socket, Timer};
use super::{FILES_BYTES_MAX, sockets};

/// What was seen of the unit's descriptors, and how it is brought up to date.
#[derive(Debug, Default)]
pub struct Look {
    /// What was seen.
    pub objects: Objects,
    /// Descriptions by the inode of what is open: those that may be the same.
    by_inode: HashMap<Inode, Vec<Id>>,
    inodes: HashMap<Id, Inode>,
    numbers_of: HashMap<Id, BTreeSet<i32>>,
    /// Descriptions that change without a call that says so.
    restless: BTreeSet<Id>,
    /// Has been used.
    begun: bool,
    /// [`Look::objects`] as they are kept, while nothing has changed.
    encoded: Option<Vec<u8>>,
}

/// Device and inode.
type Inode = (u64, u64);

/// Which descriptors to look at.
#[derive(Debug)]
pub enum Which {
    /// All that the table has.
    All,
    /// These, and whether `execve` closes them; `None` for those that are closed.
    Some(Vec<(i32, Option<bool>)>),
}

/// An entry of an epoll set that has been made or changed: the set and what was entered, by number.
#[derive(Clone, Copy, Debug)]
pub struct Enrolled {
    /// The set.
    pub set: i32,
    /// The descriptor.
    pub number: i32,
    /// The entry.
    pub entry: Entry,
}

/// A descriptor of the table, taken into ours.
struct Taken {
    fd: OwnedFd,
    info: Info,
    stat: libc::stat,
    link: Vec<u8>,
}

/// What `/proc/PID/fdinfo` tells.
#[derive(Default)]
struct Info {
    position: u64,
    flags: i32,
    lines: Vec<String>,
}

impl Info {
    fn parse(text: &str) -> Self {
        let mut info = Self::default();
        for line in text.lines() {
            match line.split_once(':') {
                Some(("pos", n)) => info.position = n.trim().parse().unwrap_or(0),
                Some(("flags", n)) => info.flags = i32::from_str_radix(n.trim(), 8).unwrap_or(0),
                _ => info.lines.push(line.to_owned()),
            }
        }
        info
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.lines.iter().find_map(|l| Some(l.strip_prefix(key)?.strip_prefix(':')?.trim()))
    }
}

/// Directory and umask of a process.
fn place_of_files(pid: i32) -> io::Result<(PathBuf, u32)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mask = status.lines().find_map(|l| l.strip_prefix("Umask:"));
    let mask = mask.and_then(|m| u32::from_str_radix(m.trim(), 8).ok()).unwrap_or(0o022);
    Ok((fs::read_link(format!("/proc/{pid}/cwd"))?, mask))
}

/// A table that the unit shares with a thread.
struct Table {
    pidfd: OwnedFd,
    pid: i32,
}

/// One refresh: what it has come across.
#[derive(Default)]
struct Round {
    /// What the numbers led to before.
    before: BTreeMap<i32, Id>,
    /// Descriptions that have lost a number.
    loosened: BTreeSet<Id>,
    /// Epoll sets that have been looked at, and their entries by number.
    sets: Vec<(Id, Vec<(i32, Entry)>)>,
    /// Pipes to be looked into.
    pipes: BTreeSet<Inode>,
    /// Numbers that may lead to something else than before though nothing tells: what has no inode of its own.
    doubtful: BTreeSet<i32>,
}

impl Look {
    /// Brings it up to date. `pid` is a process whose main thread has the unit's table, directory and umask; call it
    /// in a thread with a table of its own. `given` says that what is open now was given to the program by its starter;
    /// `ids` are those of the unit's threads, for the names of their files in proc(5).
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn refresh(&mut self, pid: i32, which: Which, enrolled: &[Enrolled], given: bool, ids: &Ids) -> io::Result<()> {
        let table = Table::open(pid)?;
        let stale = match which {
            Which::Some(numbers) if self.begun => numbers,
            _ => {
                let given = std::mem::take(&mut self.objects.given);
                *self = Self::default();
                self.objects.given = given;
                table.numbers()?.into_iter().map(|n| Ok((n, Some(table.on_exec(n)?)))).collect::<io::Result<_>>()?
            }
        };
        self.begun = true;
        let mut stale: BTreeMap<i32, Option<bool>> = stale.into_iter().collect();
        for id in &self.restless {
            for number in self.numbers_of.get(id).into_iter().flatten() {
                let on_exec = self.objects.numbers.get(number).map(|n| n.on_exec);
                stale.entry(*number).or_insert(on_exec);
            }
        }
        let place = place_of_files(pid)?;
        if place != (self.objects.directory.clone(), self.objects.umask) || !stale.is_empty() || !enrolled.is_empty() {
            (self.objects.directory, self.objects.umask) = place;
            self.encoded = None;
        }
        let mut round = Round::default();
        stale.keys().for_each(|number| self.detach(*number, &mut round));
        for (number, on_exec) in stale {
            // One that is closed meanwhile was never the unit's.
            if let Some(on_exec) = on_exec
                && let Ok(mut taken) = table.take(number)
            {
                if let Some(lasting) = ids.lasting_path(&taken.link) {
                    taken.link = lasting;
                }
                self.attach(&table, &taken, Number { open: 0, on_exec }, number, given, &mut round);
            }
        }
        self.reread_sets(&table, &mut round);
        self.sweep(&round.loosened);
        self.link_sets(round.sets);
        enrolled.iter().for_each(|e| self.enrol(e));
        self.link_pairs();
        for pipe in &round.pipes {
            self.look_into_pipe(&table, *pipe);
        }
        Ok(())
    }

    /// It has looked at everything once.
    pub fn has_begun(&self) -> bool {
        self.begun
    }

    /// The objects, encoded for a checkpoint.
    ///
    /// # Errors
    /// They cannot be encoded.
    pub fn encoded(&mut self) -> postcard::Result<Vec<u8>> {
        match &self.encoded {
            Some(bytes) => Ok(bytes.clone()),
            None => Ok(self.encoded.insert(postcard::to_stdvec(&self.objects)?).clone()),
        }
    }

    /// A number is to be looked at anew; what it led to stays for now: it may have other numbers.
    fn detach(&mut self, number: i32, round: &mut Round) {
        if let Some(was) = self.objects.numbers.remove(&number) {
            self.numbers_of.entry(was.open).or_default().remove(&number);
            round.before.insert(number, was.open);
            round.loosened.insert(was.open);
        }
    }

    fn attach(
        &mut self,
        table: &Table,
        taken: &Taken,
        mut as_number: Number,
        number: i32,
        given: bool,
        round: &mut Round,
    ) {
        let inode = (taken.stat.st_dev, taken.stat.st_ino);
        let candidates = || self.by_inode.get(&inode).into_iter().flatten().copied();
        let first = |id: &Id| self.numbers_of.get(id).and_then(|n| n.first().copied());
        let same = candidates().find(|id| first(id).is_some_and(|other| fds::are_same(table.pid, number, other)));
        // What has had this number, and no other now: of a socket or pipe the inode tells that it is the same; of a
        // file it makes no difference.
        let before = || candidates().find(|id| first(id).is_none() && round.before.get(&number) == Some(id));
        let known = same.or_else(before);
        let (kind, flags) = self.look_at((table, number), taken, round, known);
        match taken.stat.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFSOCK => {}
            _ => {
                round.doubtful.insert(number);
            }
        }
        let restless = match &kind {
            Kind::Socket(Socket { pair, .. }) => pair.is_some(),
            // Another descriptor of the file may end them.
            Kind::File(File { records, .. }) => records.iter().any(|r| !r.of_file),
            _ => false,
        };
        let id = match known {
            Some(id) => {
                if let Some(open) = self.objects.open.get_mut(&id) {
                    (open.kind, open.flags) = (kind, flags);
                }
                id
            }
            None => {
                if given {
                    self.objects.given.insert(number, inode);
                }
                let given = (self.objects.given.get(&number) == Some(&inode)).then_some(number);
                let id = self.objects.add(Open { kind, flags, given });
                self.by_inode.entry(inode).or_default().push(id);
                self.inodes.insert(id, inode);
                id
            }
        };
        if matches!(self.objects.open.get(&id), Some(Open { kind: Kind::Epoll(_), .. })) {
            round.sets.retain(|(set, _)| *set != id);
            round.sets.push((id, entries(&taken.info)));
        }
        if restless {
            self.restless.insert(id);
        }
        as_number.open = id;
        self.numbers_of.entry(id).or_default().insert(number);
        self.objects.numbers.insert(number, as_number);
    }

    /// Sets that have an entry for a doubtful number are looked at again: it may have left them.
    fn reread_sets(&mut self, table: &Table, round: &mut Round) {
        if round.doubtful.is_empty() {
            return;
        }
        let seen: BTreeSet<Id> = round.sets.iter().map(|(id, _)| *id).collect();
        let concerned = |(id, open): (&Id, &Open)| match &open.kind {
            Kind::Epoll(entries) if !seen.contains(id) => {
                entries.keys().any(|(number, _)| round.doubtful.contains(number)).then_some(*id)
            }
            _ => None,
        };
        let sets: Vec<Id> = self.objects.open.iter().filter_map(concerned).collect();
        for id in sets {
            let number = self.numbers_of.get(&id).and_then(|n| n.first().copied());
            if let Some(Ok(taken)) = number.map(|n| table.take(n)) {
                round.sets.push((id, entries(&taken.info)));
            }
        }
    }

    /// Drops descriptions that have lost their last number.
    fn sweep(&mut self, loosened: &BTreeSet<Id>) {
        for id in loosened {
            if self.numbers_of.get(id).is_some_and(|n| !n.is_empty()) {
                continue;
            }
            self.numbers_of.remove(id);
            self.restless.remove(id);
            let gone = self.objects.open.remove(id);
            let Some(inode) = self.inodes.remove(id) else { continue };
            let ids = self.by_inode.entry(inode).or_default();
            ids.retain(|i| i != id);
            if ids.is_empty() {
                self.by_inode.remove(&inode);
                if let Some(pipe) = gone.and_then(|g| pipe_of(&g.kind)) {
                    self.objects.pipes.remove(&pipe);
                }
            }
        }
    }

    /// Says of each entry of the epoll sets that were looked at what was entered.
    fn link_sets(&mut self, sets: Vec<(Id, Vec<(i32, Entry)>)>) {
        for (id, found) in sets {
            let once = found.iter().any(|(_, e)| e.events & ONESHOT != 0 || e.events & !PRIVATE == 0);
            let open = |number: &i32| self.objects.numbers.get(number).map(|n| n.open);
            let entries = found.iter().filter_map(|(number, e)| Some(((*number, open(number)?), *e))).collect();
            if once {
                self.restless.insert(id);
            } else {
                self.restless.remove(&id);
            }
            if let Some(open) = self.objects.open.get_mut(&id) {
                open.kind = Kind::Epoll(entries);
            }
        }
    }

    /// An entry has been made or changed, in a set that has not been looked at.
    fn enrol(&mut self, enrolled: &Enrolled) {
        let Enrolled { set, number, entry } = *enrolled;
        let numbers = &self.objects.numbers;
        let (Some(set), Some(what)) = (numbers.get(&set), numbers.get(&number)) else { return };
        let (set, what) = (set.open, what.open);
        if let Some(Open { kind: Kind::Epoll(entries), .. }) = self.objects.open.get_mut(&set) {
            // What had the number before has left the set when it was closed.
            let stale: Vec<_> = entries.range((number, 0)..=(number, Id::MAX)).map(|(key, _)| *key).collect();
            for key in stale {
                entries.remove(&key);
            }
            entries.insert((number, what), entry);
            if entry.events & ONESHOT != 0 {
                self.restless.insert(set);
            }
        }
    }

    fn look_at(
        &self,
        (table, number): (&Table, i32),
        taken: &Taken,
        round: &mut Round,
        known: Option<Id>,
    ) -> (Kind, i32) {
        let fd = taken.fd.as_raw_fd();
        // SAFETY: a query about a descriptor.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        let kind = match taken.stat.st_mode & libc::S_IFMT {
            libc::S_IFSOCK => sockets::look_at(fd, taken.stat.st_ino),
            libc::S_IFIFO if taken.link.starts_with(b"pipe:[") => {
                round.pipes.insert((taken.stat.st_dev, taken.stat.st_ino));
                Kind::Pipe(taken.stat.st_ino)
            }
            0 => match taken.link.strip_prefix(b"anon_inode:").unwrap_or_default() {
                // Its entries are linked when every number is known.
                b"[eventpoll]" => Kind::Epoll(BTreeMap::new()),
                b"[eventfd]" => Kind::Counter {
                    count: taken.info.value("eventfd-count").and_then(|v| u64::from_str_radix(v, 16).ok()).unwrap_or(0),
                    semaphore: taken.info.value("eventfd-semaphore").is_some_and(|v| v != "0"),
                },
                b"[timerfd]" => Kind::Timer(timer(fd, || Ok(Info::parse(&table.info(number)?)))),
                b"[signalfd]" => {
                    let mask = taken.info.value("sigmask").and_then(|v| u64::from_str_radix(v, 16).ok());
                    Kind::Signals(mask.unwrap_or(0))
                }
                other => Kind::Opaque(String::from_utf8_lossy(other).into_owned()),
            },
            _ => Kind::File(self.file(taken, flags, known)),
        };
        (kind, flags)
    }

    fn file(&self, taken: &Taken, flags: i32, known: Option<Id>) -> File {
        let at_end = flags & libc::O_APPEND != 0 && taken.info.position == taken.stat.st_size as u64;
        let named = taken.stat.st_nlink > 0 && !taken.link.ends_with(b" (deleted)");
        let records = taken.info.lines.iter().filter_map(|l| record_lock(l));
        let mut records: Vec<Record> = records.collect();
        records.sort_by_key(|r| (r.start, r.end));
        File {
            path: PathBuf::from(std::ffi::OsStr::from_bytes(&taken.link)),
            position: Some(taken.info.position),
            at_end,
            nameless: !named,
            content: (!named).then(|| self.content(taken, flags, known)),
            lock: taken.info.lines.iter().find_map(|l| whole_lock(l)).unwrap_or(0),
            records,
        }
    }

    /// What is in a file without a name.
    fn content(&self, taken: &Taken, flags: i32, known: Option<Id>) -> Content {
        let size = taken.stat.st_size as u64;
        let kept = |(id, open): (&Id, &Open)| match &open.kind {
            _ if known == Some(*id) => 0,
            Kind::File(File { content: Some(Content { bytes: Some(bytes), .. }), .. }) => bytes.len() as u64,
            _ => 0,
        };
        let fits = size <= FILE_BYTES_MAX && self.objects.open.iter().map(kept).sum::<u64>() + size <= FILES_BYTES_MAX;
        let regular = taken.stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        let bytes = (fits && regular && flags & libc::O_ACCMODE != libc::O_WRONLY).then(|| {
            let mut bytes = vec![0u8; size as usize];
            // SAFETY: the buffer is as long as is said.
            let n = unsafe { libc::pread(taken.fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            (n == bytes.len() as isize).then_some(bytes)
        });
        // SAFETY: a query about a descriptor.
        let seals = unsafe { libc::fcntl(taken.fd.as_raw_fd(), libc::F_GET_SEALS) };
        Content { bytes: bytes.flatten(), seals: (seals >= 0).then_some(seals) }
    }

    /// Finds both ends of pairs of sockets: they tell each other's inodes.
    fn link_pairs(&mut self) {
        for id in self.restless.clone() {
            let Some(inode) = self.inodes.get(&id).copied() else { continue };
            let Some(Open { kind: Kind::Socket(Socket { pair: Some(_), .. }), .. }) = self.objects.open.get(&id) else {
                continue;
            };
            let peer = sockets::peer_inode(inode.1);
            let other = peer.and_then(|peer| self.by_inode.get(&(inode.0, peer))?.first().copied());
            let Some(open) = self.objects.open.get_mut(&id) else { continue };
            if let Kind::Socket(socket) = &mut open.kind {
                match (&mut socket.pair, other, peer) {
                    (Some(pair), Some(other), _) => pair.other = Some(other),
                    // The other end is closed: what waits can still be read.
                    (Some(_), None, None) => {}
                    // It is somebody else's.
                    _ => open.kind = Kind::Connection { family: socket.family, kind: socket.kind },
                }
            }
        }
    }

    fn look_into_pipe(&mut self, table: &Table, pipe: Inode) {
        let read_end = self.by_inode.get(&pipe).into_iter().flatten().find_map(|id| {
            let reads = self.objects.open.get(id)?.flags & libc::O_ACCMODE == libc::O_RDONLY;
            self.numbers_of.get(id)?.first().copied().filter(|_| reads)
        });
        let found = match read_end {
            Some(number) => table.take(number).and_then(|taken| pipe_content(taken.fd.as_raw_fd())),
            None => Ok(Pipe::default()),
        };
        self.objects.pipes.insert(pipe.1, found.unwrap_or_default());
    }
}

const ONESHOT: u32 = libc::EPOLLONESHOT as u32;
/// The events of an entry that a report has disarmed: only these bits are left (`EP_PRIVATE_BITS`).
const PRIVATE: u32 = (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE) as u32;

fn pipe_of(kind: &Kind) -> Option<u64> {
    match kind {
        Kind::Pipe(pipe) => Some(*pipe),
        _ => None,
    }
}

impl Table {
    fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: plain numbers; the result is owned by nobody else.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        Ok(Self { pidfd: unsafe { OwnedFd::from_raw_fd(fd as i32) }, pid })
    }

    fn numbers(&self) -> io::Result<Vec<i32>> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid))?;
        Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
    }

    fn info(&self, number: i32) -> io::Result<String> {
        fs::read_to_string(format!("/proc/{}/fdinfo/{number}", self.pid))
    }

    fn on_exec(&self, number: i32) -> io::Result<bool> {
        Ok(Info::parse(&self.info(number)?).flags & libc::O_CLOEXEC != 0)
    }

    /// Takes a copy of a descriptor, and asks what it is.
    fn take(&self, number: i32) -> io::Result<Taken> {
        // SAFETY: plain numbers; the result is owned by nobody else.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), number, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // SAFETY: plain integers, for which zero is valid.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` outlives the call.
        if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if stat.st_mode & libc::S_IFMT == libc::S_IFSOCK {
            return Ok(Taken { fd, info: Info::default(), stat, link: Vec::new() });
        }
        let text = self.info(number)?;
        let link = fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))?.as_os_str().as_bytes().to_vec();
        Ok(Taken { fd, info: Info::parse(&text), stat, link })
    }
}

/// The entries of an epoll set: `tfd: N events: X data: X ...`.
fn entries(info: &Info) -> Vec<(i32, Entry)> {
    let entry = |line: &String| {
        let mut words = line.split_whitespace();
        let mut value = |key: &str| {
            let word = words.next()?;
            match word.strip_prefix(key)? {
                "" => words.next(),
                value => Some(value),
            }
        };
        let number = value("tfd:")?.parse().ok()?;
        let events = u32::from_str_radix(value("events:")?, 16).ok()?;
        let data = u64::from_str_radix(value("data:")?, 16).ok()?;
        Some((number, Entry { events, data }))
    };
    info.lines.iter().filter_map(entry).collect()
}

/// A timerfd. To ask for its time makes the kernel count the expiries that nobody has read (timerfd_gettime(2)), which
/// nobody can tell; `info` is asked for after that.
fn timer(fd: RawFd, info: impl Fn() -> io::Result<Info>) -> Timer {
    let time = |info: &Info, key: &str| -> u64 {
        let text = info.value(key).unwrap_or("(0, 0)").trim_matches(['(', ')']).to_owned();
        let mut parts = text.split(',').map(|p| p.trim().parse::<u64>().unwrap_or(0));
        parts.next().unwrap_or(0) * 1_000_000_000 + parts.next().unwrap_or(0)
    };
    // Brings the count of expiries up to date, which fdinfo does not.
    let left = || {
        // SAFETY: plain integers, for which zero is valid, that outlive the call.
        let time = unsafe {
            let mut time: libc::itimerspec = std::mem::zeroed();
            libc::timerfd_gettime(fd, &raw mut time);
            time
        };
        time.it_value.tv_sec as u64 * 1_000_000_000 + time.it_value.tv_nsec as u64
    };
    // What is left is told as a time from now: the more exactly, the shorter the asking takes. The count belongs to it only if
    // there was no expiry meanwhile, at which what is left would grow, or be none until the next call.
    let ask = || {
        let (first, before) = (left(), crate::unit::now());
        let info = info().unwrap_or_default();
        let (after, told) = (crate::unit::now(), time(&info, "it_value"));
        let disturbed = first < told || told < left();
        ((disturbed, after - before), after, info)
    };
    let (_, now, info) = (0..4).fold(ask(), |best, _| Some(ask()).filter(|a| a.0 < best.0).unwrap_or(best));
    let ticks: u64 = info.value("ticks").and_then(|t| t.parse().ok()).unwrap_or(0);
    let (left, period) = (time(&info, "it_value"), time(&info, "it_interval"));
    let next = match ticks {
        0 => (left > 0).then(|| now + left),
        _ if period > 0 => Some((now + left).saturating_sub(ticks * period)),
        _ => Some(now),
    };
    Timer { clock: info.value("clockid").and_then(|c| c.parse().ok()).unwrap_or(0), next, period }
}

/// What is in a pipe, by its read end: a copy of it is read (tee(2)).
fn pipe_content(fd: RawFd) -> io::Result<Pipe> {
    // SAFETY: a query about a descriptor.
    let capacity = unsafe { libc::fcntl(fd, libc::F_GETPIPE_SZ) };
    let mut length: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut pipe = Pipe { capacity, data: vec![0; length.max(0) as usize] };
    if pipe.data.is_empty() {
        return Ok(pipe);
    }
    let mut ends = [0i32; 2];
    // SAFETY: room for two numbers, which nobody else owns.
    let (read, write) = unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(io::Error::last_os_error());
        }
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    // SAFETY: plain numbers, and a buffer as long as is said.
    let n = unsafe {
        libc::fcntl(write.as_raw_fd(), libc::F_SETPIPE_SZ, capacity);
        libc::tee(fd, write.as_raw_fd(), pipe.data.len(), libc::SPLICE_F_NONBLOCK);
        drop(write);
        let mut done = 0;
        while done < pipe.data.len() {
            let n = libc::read(read.as_raw_fd(), pipe.data[done..].as_mut_ptr().cast(), pipe.data.len() - done);
            if n <= 0 {
                break;
            }
            done += n as usize;
        }
        done
    };
    if n != pipe.data.len() {
        return Err(io::Error::other("a pipe has changed while it was looked into"));
    }
    Ok(pipe)
}

#[cfg(test)]
mod tests {
    use super::{AsRawFd, FromRawFd, Info, OwnedFd, timer};

    /// Nobody reads its expiries, so the first that is unread stays the first, whenever it is looked at.
    ///
    /// Break it: take the count of expiries that is told for the one when what is left was asked for.
    #[test]
    fn a_timer_that_expires_meanwhile_is_seen_as_it_is() {
        const PERIOD: u64 = 200_000;
        let first = crate::unit::now() + PERIOD;
        // SAFETY: plain numbers and a structure that outlives the call; the result is owned by nobody else.
        let fd = unsafe {
            let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC);
            let time =
                |ns: u64| libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
            let each = libc::itimerspec { it_interval: time(PERIOD), it_value: time(first) };
            assert_eq!(libc::timerfd_settime(fd, libc::TFD_TIMER_ABSTIME, &raw const each, std::ptr::null_mut()), 0);
            OwnedFd::from_raw_fd(fd)
        };
        let path = format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd());
        let early = (0..5_000).filter(|_| {
            let seen = timer(fd.as_raw_fd(), || Ok(Info::parse(&std::fs::read_to_string(&path)?)));
            seen.next.is_none_or(|next| next + PERIOD / 2 < first)
        });
        assert_eq!(early.count(), 0);
    }
}

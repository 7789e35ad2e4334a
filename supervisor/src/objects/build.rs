//! The kernel's objects are made from the model, in the table, directory and umask of the calling thread.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Content, Entry, File, Id, Kind, Objects, Open, PairEnd, Pipe, Socket, Timer, options, sockets};

/// Why objects could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Descriptors cannot be made again.
    #[error("{0}; `ftrun resume --lossy` goes on without: the program finds them at their end")]
    Lost(String),
    /// The process may not have so many descriptors, or the directory is gone.
    #[error("{what}: {source}")]
    Sys {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// What the kernel said to a call.
fn sys(what: impl FnOnce() -> String, result: i64) -> Result<i32> {
    if result >= 0 {
        return Ok(result as i32);
    }
    Err(Error::Sys { what: what(), source: io::Error::last_os_error() })
}

/// The work, and what it has made so far.
struct Builder<'a> {
    objects: &'a Objects,
    /// First number that nothing of the unit has.
    spare: i32,
    /// What the calling process was given, by number: out of the way.
    given: BTreeMap<i32, i32>,
    /// Descriptions that have been made, out of the way.
    made: BTreeMap<Id, i32>,
    /// Both ends of pipes.
    pipes: BTreeMap<u64, [i32; 2]>,
    /// A socket that listens on the loopback, and its port.
    listener: Option<(i32, u16)>,
    now: u64,
}

/// Makes the objects. `given` has what the process was given by who started it, by number, out of the way: it takes
/// the place of what the unit was given under the same number. All numbers below `spare` are free; what is made by the
/// way is above, and stays there for the caller to close. Returns what is not as it was.
///
/// # Errors
/// Something cannot be made again, and that is not allowed (`lossy`); the table is in no good state then.
pub fn build(objects: &Objects, given: BTreeMap<i32, i32>, spare: i32, lossy: bool, now: u64) -> Result<Vec<String>> {
    let mut b = Builder { objects, spare, given, made: BTreeMap::new(), pipes: BTreeMap::new(), listener: None, now };
    // Before anything is made: what is known to be lost.
    let mut told: Vec<String> = objects.lost().iter().map(|(n, what)| format!("descriptor {n}: {what}")).collect();
    if !lossy && !told.is_empty() {
        return Err(Error::Lost(told.join("; ")));
    }
    b.place_of_files()?;
    let behind_given = b.given.values().copied().max().unwrap_or(spare - 1) + 1;
    for id in objects.open.keys() {
        // The other end of a pair may have been made with it.
        if !b.made.contains_key(id)
            && let Err(e) = b.make(*id)
        {
            if !lossy {
                let numbers =
                    objects.numbers.iter().filter(|(_, n)| n.open == *id).map(|(number, _)| number.to_string());
                return Err(Error::Lost(format!("descriptor {}: {e}", numbers.collect::<Vec<_>>().join(", "))));
            }
            told.push(e.to_string());
            let stub = b.at_its_end()?;
            b.made.insert(*id, stub);
        }
        b.put_at_numbers(*id, behind_given)?;
    }
    for open in objects.open.iter().filter_map(|(id, open)| Some((*b.made.get(id)?, &open.kind))) {
        if let (set, Kind::Epoll(entries)) = open {
            entries.iter().try_for_each(|((number, open), entry)| b.enter(set, *number, *open, entry))?;
        }
    }
    // Other descriptions of a file are closed before its record locks are taken, which would go with them.
    // SAFETY: closes numbers that were made here.
    unsafe { libc::syscall(libc::SYS_close_range, behind_given, u32::MAX, 0) };
    objects.take_locks(lossy, &mut told)?;
    Ok(told)
}

impl Objects {
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

    fn take_locks(&self, lossy: bool, told: &mut Vec<String>) -> Result<()> {
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

/// Lets this process have so many descriptors. The unit's own limit follows with its next checkpoint.
///
/// # Errors
/// The hard limit does not allow it.
pub fn allow_numbers(count: u64) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: structures that outlive the calls.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        if limit.rlim_cur < count {
            let more = libc::rlimit { rlim_cur: count, rlim_max: limit.rlim_max.max(count) };
            let r = libc::setrlimit(libc::RLIMIT_NOFILE, &raw const more);
            sys(
                || format!("{count} open descriptors (ulimit -n) are needed, {} are allowed", limit.rlim_max),
                r.into(),
            )?;
        }
    }
    Ok(())
}

impl Builder<'_> {
    /// Moves a descriptor out of the way.
    fn raise(&self, fd: i32) -> Result<i32> {
        // SAFETY: numbers of this table, which nothing here owns.
        unsafe {
            let high = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, self.spare);
            sys(|| format!("a number for descriptor {fd}"), high.into())?;
            libc::close(fd);
            Ok(high)
        }
    }

    /// Gives what has been made its numbers. What was out of their way, from `behind` on, is given up at once: the limit may not allow
    /// twice as many.
    fn put_at_numbers(&mut self, id: Id, behind: i32) -> Result<()> {
        let Some(made) = self.made.get_mut(&id) else { return Ok(()) };
        let high = *made;
        for (number, n) in self.objects.numbers.iter().filter(|(_, n)| n.open == id) {
            let flags = if n.on_exec { libc::O_CLOEXEC } else { 0 };
            // SAFETY: numbers of this table, which nothing here owns.
            sys(|| format!("descriptor {number}"), i64::from(unsafe { libc::dup3(high, *number, flags) }))?;
            *made = *number;
        }
        if *made != high && high >= behind {
            // SAFETY: made here, and nothing has this number any more.
            unsafe { libc::close(high) };
        }
        Ok(())
    }

    /// The same of one that a call has just made.
    fn raised(&self, what: impl FnOnce() -> String, result: i64) -> Result<i32> {
        self.raise(sys(what, result)?)
    }

    fn place_of_files(&self) -> Result<()> {
        let directory = c_path(&self.objects.directory);
        // SAFETY: a string that outlives the call; plain numbers.
        unsafe {
            libc::umask(self.objects.umask);
            sys(
                || format!("the directory {}", self.objects.directory.display()),
                libc::chdir(directory.as_ptr()).into(),
            )?;
        }
        Ok(())
    }

    fn make(&mut self, id: Id) -> Result<()> {
        let Some(open) = self.objects.open.get(&id) else { return Ok(()) };
        if let Some(fd) = self.taken_over(open) {
            self.made.insert(id, fd);
            return Ok(());
        }
        let nonblock = open.flags & libc::O_NONBLOCK;
        let fd = match &open.kind {
            Kind::File(file) => self.file(file, open.flags)?,
            Kind::Pipe(pipe) => self.end_of_pipe(*pipe, open.flags)?,
            Kind::Connection { family, kind } => self.connection(*family, *kind)?,
            Kind::Socket(Socket { pair: Some(pair), .. }) => return self.pair(id, pair),
            Kind::Socket(socket) => self.socket(socket)?,
            // SAFETY: plain numbers.
            Kind::Epoll(_) => self.raised(|| "an epoll set".into(), unsafe { libc::epoll_create1(0) }.into())?,
            Kind::Counter { count, semaphore } => self.counter(*count, *semaphore)?,
            Kind::Timer(timer) => self.timer(timer)?,
            Kind::Signals(mask) => {
                let mask = (&raw const *mask) as u64;
                // SAFETY: a mask of 8 bytes that outlives the call.
                let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, mask, 8, 0) };
                self.raised(|| "a signalfd".into(), fd)?
            }
            Kind::Opaque(_) => self.at_its_end()?,
        };
        self.made.insert(id, fd);
        let mode = match open.kind {
            Kind::File(_) => open.flags,
            _ => nonblock | open.flags & (libc::O_ASYNC | libc::O_DIRECT),
        };
        // SAFETY: plain numbers.
        unsafe { libc::fcntl(fd, libc::F_SETFL, mode & !libc::O_PATH) };
        Ok(())
    }

    /// What the calling process was given under the number under which the unit was given this.
    fn taken_over(&self, open: &Open) -> Option<i32> {
        let number = open.given?;
        let fd = *self.given.get(&number)?;
        let standard = number <= 2;
        let alike = match (&open.kind, file_type(fd)) {
            (Kind::Socket(_) | Kind::Connection { .. }, libc::S_IFSOCK) | (Kind::Pipe(_), libc::S_IFIFO) => true,
            (Kind::File(_), kind) => !matches!(kind, libc::S_IFSOCK | libc::S_IFIFO),
            _ => false,
        };
        if !standard && !alike {
            return None;
        }
        // SAFETY: plain numbers.
        unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFL);
            let wanted = flags & !libc::O_NONBLOCK | open.flags & libc::O_NONBLOCK;
            if flags >= 0 && wanted != flags {
                libc::fcntl(fd, libc::F_SETFL, wanted);
            }
        }
        Some(fd)
    }

    fn file(&self, file: &File, flags: i32) -> Result<i32> {
        if file.nameless {
            let unknown = Content { bytes: None, seals: None };
            return self.nameless(file, file.content.as_ref().unwrap_or(&unknown), flags);
        }
        let path = c_path(&file.path);
        let what = || file.path.display().to_string();
        // SAFETY: strings that outlive the calls; numbers of this table.
        let fd = unsafe {
            // A FIFO that nobody else has open would keep us waiting.
            let mut st: libc::stat = std::mem::zeroed();
            let fifo = libc::stat(path.as_ptr(), &raw mut st) == 0 && st.st_mode & libc::S_IFMT == libc::S_IFIFO;
            let held =
                if fifo { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC) } else { -1 };
            let more = libc::O_CLOEXEC | libc::O_NOCTTY | if fifo { libc::O_NONBLOCK } else { 0 };
            let fd = libc::open(
                path.as_ptr(),
                flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC) | more,
            );
            let error = io::Error::last_os_error();
            if held >= 0 {
                libc::close(held);
            }
            if fd < 0 {
                return Err(Error::Sys { what: what(), source: error });
            }
            fd
        };
        let fd = self.raise(fd)?;
        let (offset, whence) = file.position.map_or((0, libc::SEEK_END), |p| (p as i64, libc::SEEK_SET));
        // SAFETY: plain numbers. What has no position refuses one.
        unsafe { libc::lseek(fd, offset, whence) };
        Ok(fd)
    }

    /// A file without a name, in memory.
    fn nameless(&self, file: &File, content: &Content, flags: i32) -> Result<i32> {
        let what = || format!("{}, which has no name", file.path.display());
        let Some(bytes) = &content.bytes else { return self.at_its_end() };
        let text = file.path.to_string_lossy();
        let name = text.trim_start_matches("/memfd:").trim_end_matches(" (deleted)");
        let name = c_path(Path::new(name.rsplit('/').next().unwrap_or(name)));
        let seals = content.seals.unwrap_or(libc::F_SEAL_SEAL);
        let mut own = libc::MFD_CLOEXEC;
        if seals & libc::F_SEAL_SEAL == 0 || seals != libc::F_SEAL_SEAL {
            own |= libc::MFD_ALLOW_SEALING;
        }
        // SAFETY: strings and buffers that outlive the calls; numbers of this table.
        unsafe {
            let made = self.raised(what, libc::memfd_create(name.as_ptr(), own).into())?;
            let n = libc::pwrite(made, bytes.as_ptr().cast(), bytes.len(), 0);
            if n != bytes.len() as isize {
                return Err(Error::Sys { what: what(), source: io::Error::last_os_error() });
            }
            if own & libc::MFD_ALLOW_SEALING != 0 && seals != 0 {
                libc::fcntl(made, libc::F_ADD_SEALS, seals);
            }
            let again = c_path(Path::new(&format!("/proc/thread-self/fd/{made}")));
            let fd = match flags & libc::O_ACCMODE {
                libc::O_RDWR => made,
                mode => {
                    let fd = self.raised(what, libc::open(again.as_ptr(), mode | libc::O_CLOEXEC).into());
                    libc::close(made);
                    fd?
                }
            };
            libc::lseek(fd, file.position.unwrap_or(bytes.len() as u64) as i64, libc::SEEK_SET);
            Ok(fd)
        }
    }

    fn end_of_pipe(&mut self, pipe: u64, flags: i32) -> Result<i32> {
        let ends = match self.pipes.get(&pipe) {
            Some(ends) => *ends,
            None => {
                let empty = Pipe::default();
                let ends = self.pipe(self.objects.pipes.get(&pipe).unwrap_or(&empty))?;
                self.pipes.insert(pipe, ends);
                ends
            }
        };
        // Each description of its own: two may have been opened by way of /proc.
        let end = ends[usize::from(flags & libc::O_ACCMODE != libc::O_RDONLY)];
        // SAFETY: plain numbers.
        let fd = unsafe { libc::fcntl(end, libc::F_DUPFD_CLOEXEC, self.spare) };
        sys(|| "a pipe".into(), fd.into())
    }

    fn pipe(&self, pipe: &Pipe) -> Result<[i32; 2]> {
        let mut ends = [0i32; 2];
        // SAFETY: room for two numbers; a buffer that is as long as is said; there is an end to read.
        unsafe {
            sys(|| "a pipe".into(), libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC).into())?;
            let ends = [self.raise(ends[0])?, self.raise(ends[1])?];
            if pipe.capacity > 0 {
                libc::fcntl(ends[1], libc::F_SETPIPE_SZ, pipe.capacity);
            }
            let n = libc::write(ends[1], pipe.data.as_ptr().cast(), pipe.data.len());
            if n != pipe.data.len() as isize {
                return Err(Error::Sys { what: "the data in a pipe".into(), source: io::Error::last_os_error() });
            }
            for end in ends {
                libc::fcntl(end, libc::F_SETFL, 0);
            }
            Ok(ends)
        }
    }

    /// Something that has ended: reads find the end, writes fail with EPIPE.
    fn at_its_end(&self) -> Result<i32> {
        self.closed_pair(libc::SOCK_STREAM, false)
    }

    /// A Unix socket whose other end is closed, or has been reset.
    fn closed_pair(&self, kind: i32, reset: bool) -> Result<i32> {
        let mut ends = [0i32; 2];
        // SAFETY: room for two numbers; a buffer as long as is said.
        unsafe {
            let r = libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr());
            sys(|| "a pair of sockets".into(), r.into())?;
            if reset {
                // Closed with something unread, the other end resets the connection (unix_release_sock).
                libc::send(ends[0], c"x".as_ptr().cast(), 1, libc::MSG_DONTWAIT);
            }
            libc::close(ends[1]);
        }
        self.raise(ends[0])
    }

    /// A connection that the other side has reset.
    fn connection(&mut self, family: i32, kind: i32) -> Result<i32> {
        if !matches!(family, libc::AF_INET | libc::AF_INET6) || kind != libc::SOCK_STREAM {
            return self.closed_pair(if kind == libc::SOCK_SEQPACKET { kind } else { libc::SOCK_STREAM }, true);
        }
        let what = || "a connection that has been reset".to_owned();
        let (listener, port) = self.listen_for_own()?;
        // SAFETY: structures that outlive the calls, of the lengths that are said; numbers of this table.
        unsafe {
            let fd = self.raised(what, libc::socket(family, kind | libc::SOCK_CLOEXEC, 0).into())?;
            let address = loopback(family, port);
            let r = libc::connect(fd, address.as_ptr().cast(), address.len() as u32);
            sys(what, r.into())?;
            let far = sys(
                what,
                libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC).into(),
            )?;
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            let at = (&raw const linger).cast();
            libc::setsockopt(far, libc::SOL_SOCKET, libc::SO_LINGER, at, size_of::<libc::linger>() as u32);
            libc::close(far);
            let mut reset = libc::pollfd { fd, events: 0, revents: 0 };
            if libc::poll(&raw mut reset, 1, 1000) != 1 {
                return Err(Error::Sys { what: what(), source: io::Error::other("the loopback interface is down") });
            }
            Ok(fd)
        }
    }

    fn listen_for_own(&mut self) -> Result<(i32, u16)> {
        if let Some(listener) = self.listener {
            return Ok(listener);
        }
        let what = || "a socket on the loopback interface".to_owned();
        let mut address = loopback(libc::AF_INET, 0);
        let mut len = address.len() as u32;
        // SAFETY: as in `connection`.
        let fd = unsafe {
            let fd =
                self.raised(what, libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0).into())?;
            sys(what, libc::bind(fd, address.as_ptr().cast(), len).into())?;
            sys(what, libc::listen(fd, 16).into())?;
            sys(what, libc::getsockname(fd, address.as_mut_ptr().cast(), &raw mut len).into())?;
            fd
        };
        let listener = (fd, u16::from_be_bytes([address[2], address[3]]));
        self.listener = Some(listener);
        Ok(listener)
    }

    fn socket(&self, socket: &Socket) -> Result<i32> {
        let Socket { family, kind, protocol, .. } = *socket;
        let text = socket.address.as_deref().map_or_else(|| "a socket".to_owned(), shown);
        let what = || text.clone();
        // SAFETY: plain numbers.
        let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
        let fd = self.raised(what, fd.into())?;
        for (level, name, value) in &socket.options {
            let now = options::get(fd, &(*level, *name, value.len().max(4)));
            if now.as_ref() != Some(value) {
                options::set(fd, *level, *name, &options::to_set(*level, *name, value));
            }
        }
        let reuse = |on: i32| options::set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &on.to_le_bytes());
        if let Some(address) = &socket.address {
            let stream = matches!(family, libc::AF_INET | libc::AF_INET6) && kind == libc::SOCK_STREAM;
            let reused = options::get(fd, &(libc::SOL_SOCKET, libc::SO_REUSEADDR, 4)).is_some_and(|v| v[0] != 0);
            if stream {
                // Connections of the processes that were killed may still be on their way out (TIME_WAIT).
                reuse(1);
            }
            if let Some(path) = sockets::unix_path(address) {
                clear_path(&path, kind);
            }
            // SAFETY: the buffer is as long as is said.
            let r = unsafe { libc::bind(fd, address.as_ptr().cast(), address.len() as u32) };
            sys(|| format!("{text} cannot be bound again"), r.into())?;
            if let (Some(path), Some((mode, uid, gid))) = (sockets::unix_path(address), socket.file) {
                let path = c_path(&path);
                // SAFETY: a string that outlives the calls.
                unsafe {
                    libc::chmod(path.as_ptr(), mode);
                    libc::chown(path.as_ptr(), uid, gid);
                }
            }
            if let Some(backlog) = socket.backlog {
                // SAFETY: plain numbers.
                let r = unsafe { libc::listen(fd, backlog) };
                sys(|| format!("{text} cannot be listened at again"), r.into())?;
            }
            if stream && !reused {
                reuse(0);
            }
        }
        if let Some(peer) = &socket.peer {
            // SAFETY: as above.
            let r = unsafe { libc::connect(fd, peer.as_ptr().cast(), peer.len() as u32) };
            sys(|| format!("{} cannot be connected to again", shown(peer)), r.into())?;
        }
        Ok(fd)
    }

    /// Both ends of a pair, and what waits in them.
    fn pair(&mut self, id: Id, end: &PairEnd) -> Result<()> {
        let kind_of = |id: Id| match &self.objects.open.get(&id)?.kind {
            Kind::Socket(socket) => Some((socket, self.objects.open.get(&id)?.flags)),
            _ => None,
        };
        let Some((socket, flags)) = kind_of(id) else { return Ok(()) };
        let other = end.other.and_then(|other| Some((other, kind_of(other)?)));
        let mut ends = [0i32; 2];
        // SAFETY: room for two numbers.
        let r = unsafe {
            libc::socketpair(socket.family, socket.kind | libc::SOCK_CLOEXEC, socket.protocol, ends.as_mut_ptr())
        };
        sys(|| "a pair of sockets".into(), r.into())?;
        let ends = [self.raise(ends[0])?, self.raise(ends[1])?];
        fill(ends[1], &end.queue)?;
        let shut = |fd: i32, end: &PairEnd| {
            if let how @ 1..=3 = end.shut {
                // SAFETY: plain numbers.
                unsafe { libc::shutdown(fd, i32::from(how) - 1) };
            }
        };
        if let Some((other, (far, far_flags))) = other {
            let far = far.pair.clone().unwrap_or_default();
            fill(ends[0], &far.queue)?;
            shut(ends[1], &far);
            set_nonblock(ends[1], far_flags);
            self.made.insert(other, ends[1]);
        } else {
            // SAFETY: made above.
            unsafe { libc::close(ends[1]) };
        }
        shut(ends[0], end);
        set_nonblock(ends[0], flags);
        self.made.insert(id, ends[0]);
        Ok(())
    }

    fn counter(&self, count: u64, semaphore: bool) -> Result<i32> {
        let flags = if semaphore { libc::EFD_SEMAPHORE } else { 0 };
        // SAFETY: plain numbers, and eight bytes that outlive the call.
        unsafe {
            let fd = self.raised(|| "an eventfd".into(), libc::eventfd(0, flags).into())?;
            if count > 0 {
                let r = libc::write(fd, (&raw const count).cast(), 8);
                sys(|| "the count of an eventfd".into(), r as i64)?;
            }
            Ok(fd)
        }
    }

    fn timer(&self, timer: &Timer) -> Result<i32> {
        const SEC: u64 = 1_000_000_000;
        // SAFETY: plain numbers, and a structure that outlives the call.
        unsafe {
            let fd = self.raised(|| "a timerfd".into(), libc::timerfd_create(timer.clock, 0).into())?;
            if let Some(next) = timer.next {
                let time = |ns: u64| libc::timespec { tv_sec: (ns / SEC) as i64, tv_nsec: (ns % SEC) as i64 };
                // Expiries that nobody has read are counted from a time that has passed. Other clocks have other times.
                let (value, flags) = match timer.clock {
                    libc::CLOCK_MONOTONIC => (next, libc::TFD_TIMER_ABSTIME),
                    _ => (next.saturating_sub(self.now), 0),
                };
                let set = libc::itimerspec { it_interval: time(timer.period), it_value: time(value.max(1)) };
                let r = libc::timerfd_settime(fd, flags, &raw const set, std::ptr::null_mut());
                sys(|| "a timerfd".into(), r.into())?;
            }
            Ok(fd)
        }
    }

    fn enter(&self, set: i32, number: i32, open: Id, entry: &Entry) -> Result<()> {
        // It has been closed, and has left the set.
        if self.objects.numbers.get(&number).is_none_or(|n| n.open != open) {
            return Ok(());
        }
        let mut event = libc::epoll_event { events: entry.events, u64: entry.data };
        // SAFETY: a structure that outlives the call.
        let r = unsafe { libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, number, &raw mut event) };
        sys(|| format!("descriptor {number} in an epoll set"), r.into()).map(drop)
    }
}

fn set_nonblock(fd: i32, flags: i32) {
    // SAFETY: plain numbers.
    unsafe { libc::fcntl(fd, libc::F_SETFL, flags & libc::O_NONBLOCK) };
}

/// Sends messages that the other end finds waiting.
fn fill(fd: i32, queue: &[Vec<u8>]) -> Result<()> {
    for message in queue {
        // SAFETY: the buffer is as long as is said.
        let n =
            unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if n != message.len() as isize {
            return Err(Error::Sys {
                what: "what waits in a pair of sockets".into(),
                source: io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}

/// Removes the file of a socket that nobody has any more; what is not that stays.
fn clear_path(path: &Path, kind: i32) {
    let mut address = vec![0u8; 2];
    address[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_le_bytes());
    address.extend_from_slice(path.as_os_str().as_bytes());
    address.push(0);
    let c = c_path(path);
    // SAFETY: strings and buffers that outlive the calls; a number that is closed again.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        let r = libc::connect(fd, address.as_ptr().cast(), address.len() as u32);
        let refused = r != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECONNREFUSED);
        libc::close(fd);
        if refused {
            libc::unlink(c.as_ptr());
        }
    }
}

fn file_type(fd: i32) -> u32 {
    // SAFETY: plain integers, for which zero is valid, that outlive the call.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        libc::fstat(fd, &raw mut st);
        st.st_mode & libc::S_IFMT
    }
}

/// An address of the loopback interface; of IPv6 the one that leads to IPv4.
fn loopback(family: i32, port: u16) -> Vec<u8> {
    let mut bytes = (family as u16).to_le_bytes().to_vec();
    bytes.extend_from_slice(&port.to_be_bytes());
    if family == libc::AF_INET6 {
        bytes.extend_from_slice(&[0; 14]);
        bytes.extend_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
        bytes.extend_from_slice(&[0; 4]);
    } else {
        bytes.extend_from_slice(&[127, 0, 0, 1]);
        bytes.extend_from_slice(&[0; 8]);
    }
    bytes
}

/// An address in words.
fn shown(address: &[u8]) -> String {
    use std::net::{Ipv4Addr, Ipv6Addr};
    let family = address.first().zip(address.get(1)).map_or(0, |(a, b)| i32::from(u16::from_le_bytes([*a, *b])));
    let port = || u16::from_be_bytes([address[2], address[3]]);
    match family {
        libc::AF_INET if address.len() >= 8 => {
            let ip: [u8; 4] = address[4..8].try_into().unwrap_or_default();
            format!("{}:{}", Ipv4Addr::from(ip), port())
        }
        libc::AF_INET6 if address.len() >= 24 => {
            let ip: [u8; 16] = address[8..24].try_into().unwrap_or_default();
            format!("[{}]:{}", Ipv6Addr::from(ip), port())
        }
        libc::AF_UNIX => match sockets::unix_path(address) {
            Some(path) => path.display().to_string(),
            None => format!("@{}", String::from_utf8_lossy(address.get(3..).unwrap_or_default())),
        },
        family => format!("an address of family {family}"),
    }
}

fn c_path(path: &Path) -> CString {
    let bytes: Vec<u8> = path.as_os_str().as_bytes().iter().copied().filter(|b| *b != 0).collect();
    CString::new(bytes).unwrap_or_default()
}

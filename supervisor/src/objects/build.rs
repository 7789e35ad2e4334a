//! The kernel's objects are made from the model, in the table, directory and umask of the calling thread.

mod ends;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Content, Entry, File, Id, Kind, Objects, Open, Pipe, Socket, Timer};

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

pub(super) type Result<T> = std::result::Result<T, Error>;

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

fn file_type(fd: i32) -> u32 {
    // SAFETY: plain integers, for which zero is valid, that outlive the call.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        libc::fstat(fd, &raw mut st);
        st.st_mode & libc::S_IFMT
    }
}

fn c_path(path: &Path) -> CString {
    let bytes: Vec<u8> = path.as_os_str().as_bytes().iter().copied().filter(|b| *b != 0).collect();
    CString::new(bytes).unwrap_or_default()
}

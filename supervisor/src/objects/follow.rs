//! An event changes what descriptors are: replay of the log on the model instead of on the kernel's objects.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ftrun_abi::table::{Arg, Effect, Row};

use crate::changes::opaque_at;

use super::{Content, Entry, File, Kind, Number, Objects, Open, PairEnd, Pipe, Socket, Timer};

/// A call that was made: what it was given and what it brought.
#[derive(Debug)]
pub struct Happened<'a> {
    /// What the table says of it.
    pub row: &'a Row,
    /// Its arguments.
    pub args: [u64; 6],
    /// Its result.
    pub result: i64,
    /// The memory that it was given to read, apart from paths.
    pub data: &'a [u8],
    /// Paths and names, by the number of the argument.
    pub paths: &'a [(u8, Vec<u8>)],
    /// What it wrote into the program's memory: address and bytes.
    pub outs: &'a [(u64, Vec<u8>)],
    /// Where it put control messages, if it is one that receives them.
    pub control: u64,
}

const SEC: u64 = 1_000_000_000;
const DEL: u64 = libc::EPOLL_CTL_DEL as u64;

impl Happened<'_> {
    fn fd(&self, arg: u8) -> i32 {
        self.args[usize::from(arg)] as i32
    }

    fn path(&self, arg: u8) -> Option<&Path> {
        let found = self.paths.iter().find(|(i, _)| *i == arg)?;
        Some(Path::new(std::ffi::OsStr::from_bytes(&found.1)))
    }

    fn out(&self, arg: u8) -> Option<&[u8]> {
        let at = self.args[usize::from(arg)];
        self.outs.iter().find(|o| o.0 == at && at != 0).map(|o| &o.1[..])
    }

    pub(super) fn word(&self, at: usize) -> u64 {
        self.data.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    /// Two descriptors that were written to the memory in an argument.
    fn two(&self, arg: u8) -> Option<[i32; 2]> {
        let bytes = self.out(arg)?;
        let n = |at: usize| Some(i32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some([n(0)?, n(4)?])
    }
}

impl Objects {
    /// A call has been made.
    pub fn follow(&mut self, call: &Happened<'_>) {
        let begun = call.row.effect == Effect::Connect && call.result == -i64::from(libc::EINPROGRESS);
        if call.result < 0 && !begun {
            return;
        }
        let (fd, made) = (call.args[0] as i32, call.result as i32);
        if i64::from(call.row.nr) == libc::SYS_clock_gettime && fd == libc::CLOCK_MONOTONIC {
            let word = |b: &[u8], at: usize| b.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
            let told = call.out(1).and_then(|b| Some(word(b, 0)? * SEC + word(b, 8)?));
            self.time = self.time.max(told.unwrap_or(0));
        }
        let flags_at = |arg: usize| call.args[arg] as i32;
        match call.row.effect {
            Effect::None | Effect::Make(_) => {}
            Effect::Open(path) => self.open_file(call, path),
            Effect::MemoryFile => {
                let name = call.path(0).unwrap_or(Path::new("")).display();
                let seals = if flags_at(1) as u32 & libc::MFD_ALLOW_SEALING != 0 { 0 } else { libc::F_SEAL_SEAL };
                let content = Some(Content { bytes: Some(vec![]), seals: Some(seals) });
                let path = PathBuf::from(format!("/memfd:{name}"));
                let kind = Kind::File(File { path, position: Some(0), nameless: true, content, ..File::default() });
                self.made(made, kind, libc::O_RDWR, flags_at(1) as u32 & libc::MFD_CLOEXEC != 0);
            }
            Effect::Socket => {
                let (kind, on_exec, mode) = socket_type(flags_at(1));
                let socket = Socket { family: fd, kind, protocol: flags_at(2), ..Socket::default() };
                self.made(made, Kind::Socket(socket), mode, on_exec);
            }
            Effect::Pair => self.pair(call),
            Effect::Accept => {
                let Some(Socket { family, kind, .. }) = self.socket(fd).map(|s| s.clone()) else { return };
                let (_, on_exec, mode) = socket_type(if call.row.args.len() > 3 { flags_at(3) } else { 0 });
                self.made(made, Kind::Connection { family, kind }, mode, on_exec);
            }
            Effect::Connect => {
                if let Some(kind) = self.kind(fd)
                    && let Kind::Socket(socket) = kind
                {
                    if matches!(socket.kind, libc::SOCK_STREAM | libc::SOCK_SEQPACKET) {
                        *kind = Kind::Connection { family: socket.family, kind: socket.kind };
                    } else {
                        socket.peer = Some(call.data.to_vec());
                    }
                }
            }
            Effect::Bind => {
                if let Some(socket) = self.socket(fd) {
                    socket.address = Some(call.data.to_vec());
                }
            }
            Effect::Name => {
                let address = call.out(1).map(<[u8]>::to_vec);
                if let Some(socket) = self.socket(fd)
                    && socket.address.is_some()
                    && matches!(socket.family, libc::AF_INET | libc::AF_INET6)
                {
                    socket.address = address.or(socket.address.take());
                }
            }
            Effect::Listen => {
                if let Some(socket) = self.socket(fd) {
                    socket.backlog = Some(flags_at(1));
                }
            }
            Effect::Option => {
                let (level, name) = (flags_at(1), flags_at(2));
                let value = super::options::told(level, name, call.data);
                if let Some(socket) = self.socket(fd) {
                    socket.options.retain(|o| (o.0, o.1) != (level, name));
                    socket.options.push((level, name, value));
                }
            }
            Effect::Shut => {
                if let Some(pair) = self.socket(fd).and_then(|s| s.pair.as_mut()) {
                    pair.shut |= call.args[1] as u8 + 1;
                }
            }
            Effect::Pipe => {
                let Some([read, write]) = call.two(0) else { return };
                let flags = if call.row.args.len() > 1 { flags_at(1) } else { 0 };
                let pipe = self.pipes.last_key_value().map_or(0, |(n, _)| n + 1);
                self.pipes.insert(pipe, Pipe::default());
                let (mode, on_exec) = (flags & (libc::O_NONBLOCK | libc::O_DIRECT), flags & libc::O_CLOEXEC != 0);
                self.made(read, Kind::Pipe(pipe), mode, on_exec);
                self.made(write, Kind::Pipe(pipe), mode | libc::O_WRONLY, on_exec);
            }
            Effect::Capacity => {
                if let Some(Kind::Pipe(pipe)) = self.kind(fd).cloned()
                    && let Some(pipe) = self.pipes.get_mut(&pipe)
                {
                    pipe.capacity = made;
                }
            }
            Effect::Seal => {
                if let Some(seals) = self.content(fd).and_then(|c| c.seals.as_mut()) {
                    *seals |= flags_at(2);
                }
            }
            Effect::Epoll => {
                let on_exec = i64::from(call.row.nr) == libc::SYS_epoll_create1 && fd & libc::EPOLL_CLOEXEC != 0;
                self.made(made, Kind::Epoll(BTreeMap::new()), libc::O_RDWR, on_exec);
            }
            Effect::Enrol => self.enrol(call),
            Effect::Counter => {
                let flags = if call.row.args.len() > 1 { flags_at(1) } else { 0 };
                let semaphore = flags & libc::EFD_SEMAPHORE != 0;
                let kind = Kind::Counter { count: u64::from(call.args[0] as u32), semaphore };
                self.made(made, kind, libc::O_RDWR | flags & libc::O_NONBLOCK, flags & libc::O_CLOEXEC != 0);
            }
            Effect::Timer => {
                let kind = Kind::Timer(Timer { clock: fd, ..Timer::default() });
                let flags = flags_at(1);
                self.made(made, kind, libc::O_RDWR | flags & libc::O_NONBLOCK, flags & libc::O_CLOEXEC != 0);
            }
            Effect::SetTimer => self.set_timer(call),
            Effect::Signals => {
                if fd >= 0 {
                    if let Some(Kind::Signals(mask)) = self.kind(fd) {
                        *mask = call.word(0);
                    }
                    return;
                }
                let flags = if call.row.args.len() > 3 { flags_at(3) } else { 0 };
                let mode = libc::O_RDWR | flags & libc::O_NONBLOCK;
                self.made(made, Kind::Signals(call.word(0)), mode, flags & libc::O_CLOEXEC != 0);
            }
            Effect::Duplicate => {
                let Some(open) = self.id(fd) else { return };
                let on_exec = i64::from(call.row.nr) == libc::SYS_fcntl && flags_at(1) == libc::F_DUPFD_CLOEXEC;
                self.put(made, open, on_exec);
            }
            Effect::Onto => {
                let Some(open) = self.id(fd) else { return };
                let on_exec = i64::from(call.row.nr) == libc::SYS_dup3 && flags_at(2) & libc::O_CLOEXEC != 0;
                if made != fd {
                    self.close(made);
                    self.put(made, open, on_exec);
                }
            }
            Effect::Close => self.close(fd),
            Effect::CloseRange => {
                let (first, last) = (call.args[0] as u32, call.args[1] as u32);
                let within: Vec<i32> =
                    self.numbers.keys().copied().filter(|n| (first..=last).contains(&(*n as u32))).collect();
                for number in within {
                    if call.args[2] as u32 & libc::CLOSE_RANGE_CLOEXEC != 0 {
                        self.set_on_exec(number, true);
                    } else {
                        self.close(number);
                    }
                }
            }
            Effect::Mode => {
                const SETTABLE: i32 =
                    libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME | libc::O_NONBLOCK;
                self.set_mode(fd, SETTABLE, flags_at(2));
            }
            Effect::NonBlocking => {
                let on = call.data.iter().any(|b| *b != 0);
                self.set_mode(fd, libc::O_NONBLOCK, if on { libc::O_NONBLOCK } else { 0 });
            }
            Effect::OnExec => self.set_on_exec(fd, flags_at(2) & libc::FD_CLOEXEC != 0),
            Effect::CloseOnExec(yes) => self.set_on_exec(fd, yes),
            Effect::Seek => {
                if let Some(file) = self.file(fd) {
                    (file.position, file.at_end) = (Some(call.result as u64), false);
                }
            }
            Effect::Take => self.take(call),
            Effect::TakeEntries => {
                let entries = call.out(1).unwrap_or_default();
                if let (Some(file), Some(position)) = (self.file(fd), last_entry(entries)) {
                    file.position = Some(position);
                }
            }
            Effect::Give => self.give(fd, call.data, call.result),
            Effect::GiveAt => {
                let data = &call.data[..call.data.len().min(call.result as usize)];
                if let Some(content) = self.content(fd) {
                    content.write(call.args[3], data);
                }
            }
            Effect::Resize => {
                if let Some(content) = self.content(fd) {
                    content.resize(call.args[1]);
                }
            }
            Effect::Rewrite => {
                if let Some(content) = self.content(fd) {
                    content.bytes = None;
                }
            }
            Effect::Transfer(from, to) => self.transfer(call, from, to),
            Effect::Lock => self.lock(call),
            Effect::FileLock => {
                if let Some(file) = self.file(fd) {
                    file.lock = match flags_at(1) & !libc::LOCK_NB {
                        libc::LOCK_UN => 0,
                        lock => lock,
                    };
                }
            }
            Effect::Directory => {
                if let Some(path) = call.path(0) {
                    self.directory = normal(&self.directory.join(path));
                }
            }
            Effect::DirectoryOf => {
                if let Some(path) = self.file(fd).map(|f| f.path.clone()) {
                    self.directory = path;
                }
            }
            Effect::Mask => self.umask = call.args[0] as u32 & 0o777,
            Effect::Rename(from, to) => {
                if let (Some(from), Some(to)) = (self.named(call, from), self.named(call, to)) {
                    self.renamed(&from, &to);
                }
            }
            Effect::Remove(path) => {
                if let Some(path) = self.named(call, path) {
                    self.removed(&path);
                }
            }
            Effect::Opaque => {
                let what = if call.row.command.is_empty() { call.row.name } else { call.row.command };
                let written = |at| call.outs.iter().find(|o| o.0 == at)?.1.get(..4)?.try_into().ok();
                let number = match opaque_at(call.row, &call.args) {
                    Some(at) => written(at).map(i32::from_le_bytes),
                    None => Some(made),
                };
                if let Some(number) = number {
                    self.made(number, Kind::Opaque(format!("made by {what}")), 0, false);
                }
            }
        }
    }

    /// `execve` has closed what it closes.
    pub fn executed(&mut self) {
        let closed: Vec<i32> = self.numbers.iter().filter(|(_, n)| n.on_exec).map(|(n, _)| *n).collect();
        closed.into_iter().for_each(|n| self.close(n));
    }

    fn made(&mut self, number: i32, kind: Kind, flags: i32, on_exec: bool) {
        let id = self.add(Open { kind, flags, given: None });
        self.put(number, id, on_exec);
    }

    fn set_mode(&mut self, fd: i32, mask: i32, flags: i32) {
        if let Some(open) = self.id(fd).and_then(|id| self.open.get_mut(&id)) {
            open.flags = open.flags & !mask | flags & mask;
        }
    }

    fn set_on_exec(&mut self, fd: i32, yes: bool) {
        if let Some(Number { on_exec, .. }) = self.numbers.get_mut(&fd) {
            *on_exec = yes;
        }
    }

    /// A path of the call, made absolute.
    fn named(&self, call: &Happened<'_>, arg: u8) -> Option<PathBuf> {
        let path = call.path(arg)?;
        let base = match arg.checked_sub(1).map(usize::from) {
            Some(dir) if call.row.args[dir] == Arg::DirFd && call.args[dir] as i32 != libc::AT_FDCWD => {
                match &self.get(call.args[dir] as i32)?.kind {
                    Kind::File(file) => &file.path,
                    _ => return None,
                }
            }
            _ => &self.directory,
        };
        Some(normal(&base.join(path)))
    }

    fn open_file(&mut self, call: &Happened<'_>, path: u8) {
        let flags = match i64::from(call.row.nr) {
            libc::SYS_creat => libc::O_WRONLY,
            libc::SYS_openat2 => call.word(0) as i32,
            _ => call.args[usize::from(path) + 1] as i32,
        };
        let kept = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_NOCTTY | libc::O_TRUNC | libc::O_CLOEXEC);
        let empty = Some(Content { bytes: Some(vec![]), seals: None });
        let kind = match self.named(call, path) {
            Some(_) if flags & libc::O_TMPFILE == libc::O_TMPFILE => {
                let path = "(a file without a name)".into();
                Kind::File(File { path, position: Some(0), nameless: true, content: empty, ..File::default() })
            }
            Some(path) => {
                let anew = flags & libc::O_TRUNC != 0
                    || flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL;
                let content = empty.filter(|_| anew || i64::from(call.row.nr) == libc::SYS_creat);
                Kind::File(File { path, position: Some(0), content, ..File::default() })
            }
            None => Kind::Opaque("a file in a directory that is not known".into()),
        };
        let kept = if flags & libc::O_TMPFILE == libc::O_TMPFILE { kept & !libc::O_TMPFILE } else { kept };
        self.made(call.result as i32, kind, kept, flags & libc::O_CLOEXEC != 0);
    }

    fn pair(&mut self, call: &Happened<'_>) {
        let Some([one, other]) = call.two(3) else { return };
        let (kind, on_exec, mode) = socket_type(call.args[1] as i32);
        let end = |pair| {
            let (family, protocol) = (call.args[0] as i32, call.args[2] as i32);
            Kind::Socket(Socket { family, kind, protocol, pair: Some(pair), ..Socket::default() })
        };
        self.made(one, end(PairEnd::default()), mode, on_exec);
        let first = self.id(one);
        self.made(other, end(PairEnd { other: first, ..PairEnd::default() }), mode, on_exec);
        let second = self.id(other);
        if let Some(pair) = self.socket(one).and_then(|s| s.pair.as_mut()) {
            pair.other = second;
        }
    }

    fn enrol(&mut self, call: &Happened<'_>) {
        let [set, op, number, ..] = call.args;
        let Some(open) = self.id(number as i32) else { return };
        let word = |at: usize| call.data.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        let events = word(0);
        let data = u64::from(word(4)) | u64::from(word(8)) << 32;
        let Some(Kind::Epoll(entries)) = self.kind(set as i32) else { return };
        if op == DEL {
            entries.remove(&(number as i32, open));
        } else {
            entries.insert((number as i32, open), Entry { events, data });
        }
    }

    fn set_timer(&mut self, call: &Happened<'_>) {
        let time = |at: usize| call.word(at).saturating_mul(SEC).saturating_add(call.word(at + 8));
        let (period, first, absolute) = (time(0), time(16), call.args[1] as i32 & libc::TFD_TIMER_ABSTIME != 0);
        let now = self.time;
        if let Some(Kind::Timer(timer)) = self.kind(call.args[0] as i32) {
            timer.period = period;
            timer.next = (first > 0).then(|| match absolute {
                true if timer.clock == libc::CLOCK_REALTIME => (crate::unit::now() + first).saturating_sub(real_time()),
                true => first,
                false => now + first,
            });
        }
    }

    fn take(&mut self, call: &Happened<'_>) {
        let n = call.result as usize;
        let peeks = match i64::from(call.row.nr) {
            libc::SYS_recvfrom => call.args[3],
            libc::SYS_recvmsg => call.args[2],
            _ => 0,
        } & libc::MSG_PEEK as u64
            != 0;
        let count = call.out(1).and_then(|b| b.try_into().ok()).map_or(1, u64::from_le_bytes);
        match self.kind(call.args[0] as i32) {
            Some(Kind::File(file)) => {
                file.position = file.position.map(|p| p + n as u64);
            }
            Some(Kind::Pipe(pipe)) => {
                let pipe = *pipe;
                if let Some(pipe) = self.pipes.get_mut(&pipe) {
                    pipe.data.drain(..n.min(pipe.data.len()));
                }
            }
            Some(Kind::Counter { count, semaphore }) => *count = if *semaphore { count.saturating_sub(1) } else { 0 },
            Some(Kind::Timer(timer)) => {
                // So many expiries have been read.
                timer.next = timer.next.filter(|_| timer.period > 0).map(|next| next + count * timer.period);
            }
            Some(Kind::Socket(Socket { kind, pair: Some(pair), .. })) if !peeks => {
                if *kind == libc::SOCK_STREAM {
                    let mut left = n;
                    while left > 0 && !pair.queue.is_empty() {
                        let part = left.min(pair.queue[0].len());
                        pair.queue[0].drain(..part);
                        left -= part;
                        if pair.queue[0].is_empty() {
                            pair.queue.remove(0);
                        }
                    }
                } else if !pair.queue.is_empty() {
                    pair.queue.remove(0);
                }
            }
            _ => {}
        }
        self.follow_message(call);
    }

    /// A message may have brought descriptors (`SCM_RIGHTS`): nobody but the sender knows what they are.
    fn follow_message(&mut self, call: &Happened<'_>) {
        if i64::from(call.row.nr) != libc::SYS_recvmsg || call.control == 0 {
            return;
        }
        for (_, bytes) in call.outs.iter().filter(|o| o.0 == call.control) {
            for number in received(bytes) {
                self.made(number, Kind::Opaque("received from another process".into()), 0, false);
            }
        }
    }

    fn give(&mut self, fd: i32, data: &[u8], result: i64) {
        let n = result as usize;
        let data = &data[..n.min(data.len())];
        let Some(id) = self.id(fd) else { return };
        let Some(Open { kind, flags, .. }) = self.open.get_mut(&id) else { return };
        match kind {
            Kind::File(file) => {
                let appends = *flags & libc::O_APPEND != 0;
                if let Some(content) = &mut file.content {
                    let end = content.bytes.as_ref().map_or(0, Vec::len) as u64;
                    content.write(if appends { end } else { file.position.unwrap_or(0) }, data);
                }
                file.position = if appends && !file.at_end { None } else { file.position.map(|p| p + n as u64) };
                file.at_end = appends;
            }
            Kind::Pipe(pipe) => {
                let pipe = *pipe;
                if let Some(pipe) = self.pipes.get_mut(&pipe) {
                    pipe.data.extend_from_slice(data);
                }
            }
            Kind::Counter { count, .. } => {
                let more = data.try_into().map_or(0, u64::from_le_bytes);
                *count = count.saturating_add(more);
            }
            Kind::Socket(Socket { pair: Some(pair), .. }) => {
                let other = pair.other.and_then(|id| self.open.get_mut(&id));
                if let Some(Open { kind: Kind::Socket(Socket { pair: Some(other), .. }), .. }) = other {
                    other.queue.push(data.to_vec());
                }
            }
            _ => {}
        }
    }

    fn transfer(&mut self, call: &Happened<'_>, from: u8, to: u8) {
        let n = call.result as u64;
        let own_position = |arg: u8| call.row.args[usize::from(arg)] != Arg::Int && call.args[usize::from(arg)] == 0;
        // sendfile's one position is that of its input.
        if own_position(if i64::from(call.row.nr) == libc::SYS_sendfile { 2 } else { from + 1 })
            && let Some(file) = self.file(call.fd(from))
        {
            file.position = file.position.map(|p| p + n);
        }
        let alone = i64::from(call.row.nr) == libc::SYS_sendfile;
        if (alone || own_position(to + 1))
            && let Some(file) = self.file(call.fd(to))
        {
            file.position = file.position.map(|p| p + n);
            file.content.iter_mut().for_each(|c| c.bytes = None);
        }
        for fd in [call.fd(from), call.fd(to)] {
            if let Some(kind) = self.kind(fd)
                && (matches!(kind, Kind::Pipe(_)) || matches!(kind, Kind::Socket(Socket { pair: Some(_), .. })))
            {
                *kind = Kind::Opaque(format!("a pipe or pair of sockets that {} has moved data of", call.row.name));
            }
        }
    }

    /// Files below a name have another one.
    fn renamed(&mut self, from: &Path, to: &Path) {
        self.removed(to);
        for open in self.open.values_mut() {
            if let Kind::File(file) = &mut open.kind
                && !file.nameless
                && let Ok(rest) = file.path.strip_prefix(from)
            {
                file.path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
        if let Ok(rest) = self.directory.strip_prefix(from) {
            self.directory = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
        }
    }

    /// A name is gone, and with it what was only kept by descriptors.
    fn removed(&mut self, path: &Path) {
        for open in self.open.values_mut() {
            if let Kind::File(file) = &mut open.kind
                && file.path == path
            {
                file.nameless = true;
            }
        }
    }
}

/// A socket's type without its flags, whether `execve` closes it, its mode.
fn socket_type(kind: i32) -> (i32, bool, i32) {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    (kind & !flags, kind & libc::SOCK_CLOEXEC != 0, libc::O_RDWR | kind & libc::SOCK_NONBLOCK)
}

/// The position behind the last entry that `getdents` gave (`d_off`; in both of its forms the second word).
fn last_entry(mut entries: &[u8]) -> Option<u64> {
    let mut position = None;
    while entries.len() >= 18 {
        position = Some(u64::from_le_bytes(entries[8..16].try_into().ok()?));
        let length = usize::from(u16::from_le_bytes([entries[16], entries[17]]));
        entries = entries.get(length.max(1)..)?;
    }
    position
}

/// Descriptors in control messages (cmsg(3)).
pub(crate) fn received(bytes: &[u8]) -> Vec<i32> {
    const HEAD: usize = 16;
    let mut numbers = Vec::new();
    let mut at = 0;
    while let Some(head) = bytes.get(at..at + HEAD) {
        let word = |i: usize| i32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let length = u64::from_le_bytes(head[..8].try_into().unwrap_or([0; 8])) as usize;
        if length < HEAD || length > bytes.len() - at || word(8) != libc::SOL_SOCKET {
            break;
        }
        if word(12) == libc::SCM_RIGHTS {
            let fds = bytes[at + HEAD..at + length].chunks_exact(4);
            numbers.extend(fds.map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        at += length.next_multiple_of(8);
    }
    numbers
}

/// A path without `.` and `..`, as the names tell: links are not followed.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

/// `CLOCK_REALTIME` in nanoseconds.
fn real_time() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.as_nanos() as u64)
}

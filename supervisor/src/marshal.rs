//! Executing a call of the unit in the supervisor, driven by the table of system calls.
//!
//! [`Prepared::new`] copies what the arguments point to out of the unit and computes the digest;
//! [`Prepared::run`] makes the call with local copies; [`Prepared::outputs`] lists what has to be
//! written back. Replay needs only the first.

use ftrun_abi::record::Digest;
use ftrun_abi::table::{Arg, Class, Effect, Len, Row, Used, Wait};

use crate::hands::{self, Piece};
use crate::tracee::{self, Result};

/// Largest buffer that one call moves, bytes; a longer one is cut, as the kernel may do too.
pub const BUFFER_BYTES_MAX: usize = 16 << 20;
/// Most elements of an `iovec` array (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

/// A buffer that the call fills.
#[derive(Debug)]
struct OutBuf {
    /// Where it goes in the unit: pieces of (address, bytes).
    pieces: Vec<(u64, usize)>,
    /// Index in `Prepared::bufs`.
    buf: usize,
    used: Used,
}

/// A `struct msghdr` in transit.
#[derive(Debug)]
struct Msg {
    /// Address of the header in the unit.
    addr: u64,
    name: (u64, usize),
    control: (u64, usize),
    pieces: Vec<(u64, usize)>,
    header: Box<libc::msghdr>,
    iov: Box<libc::iovec>,
    bufs: [usize; 3],
    receive: bool,
}

/// A call with local copies of its arguments.
#[derive(Debug)]
pub struct Prepared {
    /// Arguments for the local call.
    pub args: [u64; 6],
    /// Digest of number, arguments and input memory.
    pub digest: u64,
    bufs: Vec<Vec<u8>>,
    outs: Vec<OutBuf>,
    msg: Option<Msg>,
    /// Local iovecs (one element each, all data gathered); boxed because their addresses are arguments.
    #[expect(clippy::vec_box, reason = "the call holds the address of each element")]
    iovs: Vec<Box<libc::iovec>>,
    /// Index of the buffer that holds the data to be written, for write-like calls.
    pub data: Option<usize>,
    /// Paths and names that it was given, by argument.
    pub paths: Vec<(u8, Vec<u8>)>,
    /// Directory and path of the name that it makes or removes.
    watched: Option<(i32, usize)>,
    /// By bits: the arguments that point to local copies.
    pointers: u8,
    /// It takes effect, or takes something away: it must not be made twice.
    once: bool,
}

impl Prepared {
    /// Copies the inputs of a call out of thread `tid`. A bad pointer is left for the kernel to refuse:
    /// the argument becomes an address that is never mapped.
    pub fn new(tid: i32, nr: u64, row: &Row, args: &[u64; 6], path: &dyn Fn(Vec<u8>) -> Vec<u8>) -> Result<Self> {
        let mut p = Prepared {
            args: *args,
            digest: 0,
            bufs: Vec::new(),
            outs: Vec::new(),
            msg: None,
            iovs: Vec::new(),
            data: None,
            paths: Vec::new(),
            watched: None,
            pointers: 0,
            once: row.class != Class::Input || row.wait != Wait::Never,
        };
        let mut digest = Digest::new();
        digest.add_u64(nr);
        for (i, arg) in row.args.iter().enumerate() {
            let value = args[i];
            digest.add_u64(value);
            if value == 0 {
                continue;
            }
            match *arg {
                Arg::Int | Arg::Hex | Arg::Addr | Arg::Fd | Arg::DirFd | Arg::Pid | Arg::Sig => {}
                Arg::Strings => {}
                Arg::Path | Arg::Str => match tracee::read_cstr(tid, value, 4096) {
                    Ok(s) => {
                        digest.add_bytes(&s);
                        let mut s = if *arg == Arg::Path { path(s) } else { s };
                        p.paths.push((i as u8, s.clone()));
                        s.push(0);
                        p.give(i, s);
                    }
                    Err(e) => p.bad(i, e)?,
                },
                Arg::In(len) => {
                    let n = p.len(tid, args, len)?.min(BUFFER_BYTES_MAX);
                    let mut b = vec![0; n];
                    match tracee::read_mem(tid, value, &mut b) {
                        Ok(()) => {
                            digest.add_bytes(&b);
                            // The data comes before the address it goes to.
                            p.data = p.data.or(Some(p.bufs.len()));
                            p.give(i, b);
                            p.shorten(len, n);
                        }
                        Err(e) => p.bad(i, e)?,
                    }
                }
                Arg::InOut(len) => {
                    let n = p.len(tid, args, len)?.min(BUFFER_BYTES_MAX);
                    let mut b = vec![0; n];
                    match tracee::read_mem(tid, value, &mut b) {
                        Ok(()) => {
                            digest.add_bytes(&b);
                            p.outs.push(OutBuf { pieces: vec![(value, n)], buf: p.bufs.len(), used: Used::All });
                            p.give(i, b);
                        }
                        Err(e) => p.bad(i, e)?,
                    }
                }
                Arg::Out(len, used) => {
                    let n = p.len(tid, args, len)?.min(BUFFER_BYTES_MAX);
                    p.outs.push(OutBuf { pieces: vec![(value, n)], buf: p.bufs.len(), used });
                    p.give(i, vec![0; n]);
                    p.shorten(len, n);
                }
                Arg::IovIn(count) => {
                    let pieces = match iovecs(tid, value, args[count as usize]) {
                        Ok(v) => v,
                        Err(e) => {
                            p.bad(i, e)?;
                            continue;
                        }
                    };
                    match gather(tid, &pieces) {
                        Ok(b) => {
                            add_pieces(&mut digest, &b, &pieces);
                            p.data = Some(p.bufs.len());
                            p.give_iov(i, count, b);
                        }
                        Err(e) => p.bad(i, e)?,
                    }
                }
                Arg::IovOut(count) => match iovecs(tid, value, args[count as usize]) {
                    Ok(pieces) => {
                        let n: usize = pieces.iter().map(|x| x.1).sum::<usize>().min(BUFFER_BYTES_MAX);
                        p.outs.push(OutBuf { pieces, buf: p.bufs.len(), used: Used::Result });
                        p.give_iov(i, count, vec![0; n]);
                    }
                    Err(e) => p.bad(i, e)?,
                },
                Arg::MsgIn | Arg::MsgOut => match p.message(tid, value, *arg == Arg::MsgOut, &mut digest) {
                    Ok(()) => {
                        if let Some(m) = &mut p.msg {
                            p.args[i] = (&raw mut *m.header) as u64;
                            p.pointers |= 1 << i;
                        }
                    }
                    Err(e) => p.bad(i, e)?,
                },
            }
        }
        p.digest = digest.finish();
        let watched = match row.effect {
            Effect::Make(name) | Effect::Remove(name) | Effect::Rename(name, _) => Some(name),
            Effect::Open(name) if args[usize::from(name) + 1] & libc::O_EXCL as u64 != 0 => Some(name),
            _ => None,
        };
        p.watched = watched.and_then(|name| p.place(row, args, name));
        Ok(p)
    }

    /// Where a name is: its directory, and its position among the paths.
    fn place(&self, row: &Row, args: &[u64; 6], name: u8) -> Option<(i32, usize)> {
        let path = self.paths.iter().position(|(i, _)| *i == name)?;
        let dir = match usize::from(name).checked_sub(1) {
            Some(i) if row.args[i] == Arg::DirFd => args[i] as i32,
            _ => libc::AT_FDCWD,
        };
        Some((dir, path))
    }

    /// The inode of a name that the call was given, 0 for none.
    pub fn inode(&self, row: &Row, args: &[u64; 6], name: u8) -> u64 {
        self.place(row, args, name).map_or(0, |place| inode_at(&self.paths, place))
    }

    /// A pointer that the unit cannot read: the kernel shall answer `EFAULT`.
    fn bad(&mut self, i: usize, e: tracee::TraceError) -> Result<()> {
        if matches!(e, tracee::TraceError::Gone(_)) {
            return Err(e);
        }
        self.args[i] = 1;
        Ok(())
    }

    fn give(&mut self, i: usize, mut b: Vec<u8>) {
        if b.is_empty() {
            b.reserve(8);
        }
        self.args[i] = b.as_mut_ptr() as u64;
        self.pointers |= 1 << i;
        self.bufs.push(b);
    }

    fn give_iov(&mut self, i: usize, count: u8, mut b: Vec<u8>) {
        let iov = Box::new(libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() });
        self.args[i] = (&raw const *iov) as u64;
        self.pointers |= 1 << i;
        self.args[count as usize] = 1;
        self.iovs.push(iov);
        self.bufs.push(b);
    }

    /// The kernel must not be told of more room than we have.
    fn shorten(&mut self, len: Len, n: usize) {
        if let Len::Arg(a) = len {
            self.args[a as usize] = self.args[a as usize].min(n as u64);
        }
    }

    fn len(&self, tid: i32, args: &[u64; 6], len: Len) -> Result<usize> {
        Ok(match len {
            Len::Fixed(n) => n as usize,
            Len::Arg(a) => args[a as usize] as usize,
            Len::ArgTimes(a, size) => args[a as usize] as u32 as usize * size as usize,
            Len::U32At(a) => match tracee::read_u32(tid, args[a as usize]) {
                Ok(n) => (n as usize).min(1 << 16),
                Err(e @ tracee::TraceError::Gone(_)) => return Err(e),
                Err(_) => 0,
            },
            other => other.bytes(args, |_| None).unwrap_or(0) as usize,
        })
    }

    fn message(&mut self, tid: i32, addr: u64, receive: bool, digest: &mut Digest) -> Result<()> {
        let mut raw = [0u8; 56];
        tracee::read_mem(tid, addr, &mut raw)?;
        let word = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().unwrap_or([0; 8]));
        let name = (word(0), (word(8) as u32 as usize).min(4096));
        let control = (word(32), (word(40) as usize).min(1 << 20));
        let pieces = iovecs(tid, word(16), word(24))?;
        let total: usize = pieces.iter().map(|x| x.1).sum::<usize>().min(BUFFER_BYTES_MAX);
        let mut bufs = [vec![0u8; if name.0 == 0 { 0 } else { name.1 }], vec![], vec![0u8; total]];
        // Control data is written with alignment for cmsghdr; Vec<u8> of this size is 16-aligned by malloc.
        bufs[1] = vec![0u8; if control.0 == 0 { 0 } else { control.1 }];
        if !receive {
            tracee::read_mem(tid, name.0, &mut bufs[0])?;
            tracee::read_mem(tid, control.0, &mut bufs[1])?;
            bufs[2] = gather(tid, &pieces)?;
            digest.add_bytes(&bufs[0]);
            digest.add_bytes(&bufs[1]);
            add_pieces(digest, &bufs[2], &pieces);
        }
        let first = self.bufs.len();
        let iov = Box::new(libc::iovec { iov_base: bufs[2].as_mut_ptr().cast(), iov_len: bufs[2].len() });
        // SAFETY: msghdr is plain data, for which zero is valid.
        let mut header: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        if name.0 != 0 {
            header.msg_name = bufs[0].as_mut_ptr().cast();
            header.msg_namelen = bufs[0].len() as u32;
        }
        header.msg_iov = (&raw const *iov).cast_mut();
        header.msg_iovlen = 1;
        if control.0 != 0 {
            header.msg_control = bufs[1].as_mut_ptr().cast();
            header.msg_controllen = bufs[1].len();
        }
        header.msg_flags = word(48) as i32;
        self.bufs.extend(bufs);
        if !receive {
            self.data = Some(first + 2);
        }
        self.msg = Some(Msg { addr, name, control, pieces, header, iov, bufs: [first, first + 1, first + 2], receive });
        Ok(())
    }

    /// Makes the call. The result is as the kernel returns it; a signal of our own does not end it.
    pub fn run(&mut self, nr: u64) -> i64 {
        let args = self.args;
        self.run_with(nr, &args, self.pointers)
    }

    /// Makes another call on the same copies; `pointers` says, by bits, which arguments lead into them.
    pub fn run_with(&mut self, nr: u64, args: &[u64; 6], pointers: u8) -> i64 {
        if !self.once {
            return steady_call(nr, args);
        }
        let receives = self.msg.as_ref().is_some_and(|m| m.receive);
        let (outs, digest) = (&self.outs, self.digest);
        let piece = |at: *mut u8, len, out, pointers| Piece { at, len, out, pointers };
        let mut pieces: Vec<Piece> = Vec::new();
        for (i, b) in self.bufs.iter_mut().enumerate() {
            let out = receives || outs.iter().any(|o| o.buf == i);
            pieces.push(piece(b.as_mut_ptr(), b.len(), out, &[]));
        }
        // Offsets in `struct iovec` and `struct msghdr`: iov_base; msg_name, msg_iov, msg_control.
        let mut iovec =
            |iov: &mut libc::iovec| pieces.push(piece((&raw mut *iov).cast(), size_of::<libc::iovec>(), false, &[0]));
        self.iovs.iter_mut().for_each(|iov| iovec(iov));
        if let Some(m) = &mut self.msg {
            iovec(&mut m.iov);
            let header = (&raw mut *m.header).cast();
            pieces.push(piece(header, size_of::<libc::msghdr>(), receives, &[0, 16, 32]));
        }
        let (watched, paths) = (self.watched, &self.paths);
        let before = || watched.map_or(0, |place| inode_at(paths, place));
        hands::call(nr, args, pointers, digest, &before, &mut pieces)
    }

    /// Memory for a call beside the prepared one: where it is.
    pub fn more(&mut self, bytes: usize) -> u64 {
        let mut b = vec![0; bytes];
        let at = b.as_mut_ptr() as u64;
        self.outs.push(OutBuf { pieces: vec![], buf: self.bufs.len(), used: Used::All });
        self.bufs.push(b);
        at
    }

    /// What stands in the first `n` bytes of memory that [`Prepared::more`] has made.
    pub fn bytes_at(&self, at: u64, n: usize) -> Vec<u8> {
        let found = self.bufs.iter().find(|b| b.as_ptr() as u64 == at);
        found.and_then(|b| b.get(..n)).unwrap_or_default().to_vec()
    }

    /// Fills the beginning of such memory.
    pub fn put_at(&mut self, at: u64, bytes: &[u8]) {
        let found = self.bufs.iter_mut().find(|b| b.as_ptr() as u64 == at);
        if let Some(to) = found.and_then(|b| b.get_mut(..bytes.len())) {
            to.copy_from_slice(bytes);
        }
    }

    /// An `iovec` of the data but for its first `done` bytes: where it is.
    pub fn rest(&mut self, done: usize) -> u64 {
        let rest = &self.payload()[done..];
        let iov = Box::new(libc::iovec { iov_base: rest.as_ptr() as *mut libc::c_void, iov_len: rest.len() });
        let at = (&raw const *iov) as u64;
        self.iovs.push(iov);
        at
    }

    /// Where control messages go that the call receives, 0 for nowhere.
    pub fn control(&self) -> u64 {
        self.msg.as_ref().filter(|m| m.receive).map_or(0, |m| m.control.0)
    }

    /// The call sends ancillary data, which may be descriptors.
    pub(crate) fn passes_control(&self) -> bool {
        self.msg.as_ref().is_some_and(|m| !m.receive && m.control.1 > 0)
    }

    /// The data of a write-like call.
    pub fn payload(&self) -> &[u8] {
        self.data.map_or(&[], |i| &self.bufs[i])
    }

    /// Buffer that holds the bytes of output argument number `index`, by position among the outputs.
    pub fn out_mut(&mut self, index: usize) -> Option<&mut Vec<u8>> {
        let at = self.outs.get(index)?.buf;
        self.bufs.get_mut(at)
    }

    /// The message header, for `sendmsg` that goes on after a part was taken: drops the first `n` bytes
    /// and the control data.
    pub fn advance_message(&mut self, n: usize) {
        if let Some(m) = &mut self.msg {
            let b = &mut self.bufs[m.bufs[2]];
            let n = n.min(b.len());
            m.iov.iov_base = b[n..].as_mut_ptr().cast();
            m.iov.iov_len = b.len() - n;
            m.header.msg_control = std::ptr::null_mut();
            m.header.msg_controllen = 0;
        }
    }

    /// After the unit itself has made the call: copies what it wrote.
    pub fn read_back(&mut self, tid: i32) -> Result<()> {
        for out in &self.outs {
            let b = &mut self.bufs[out.buf];
            let mut at = 0;
            for &(addr, n) in &out.pieces {
                let n = n.min(b.len() - at);
                match tracee::read_mem(tid, addr, &mut b[at..at + n]) {
                    Err(e @ tracee::TraceError::Gone(_)) => return Err(e),
                    // The kernel could not write there either.
                    Ok(()) | Err(_) => at += n,
                }
            }
        }
        Ok(())
    }

    /// Every piece of memory that the call wrote: address and content.
    pub fn written(&self, result: i64) -> Vec<(u64, Vec<u8>)> {
        let mut outs = Vec::new();
        let collected = self.outputs(result, |addr, bytes| {
            outs.push((addr, bytes.to_vec()));
            Ok(())
        });
        debug_assert!(collected.is_ok(), "collecting cannot fail");
        outs
    }

    /// Calls `write` with every piece of memory that the call wrote.
    fn outputs(&self, result: i64, mut write: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        if result < 0 && result > -4096 {
            return Ok(());
        }
        for out in &self.outs {
            let b = &self.bufs[out.buf];
            let used = match out.used {
                Used::All => b.len(),
                Used::Result => result as usize,
                Used::ResultTimes(size) => result as usize * size as usize,
                Used::U32At(a) => {
                    let at = self.args[a as usize];
                    self.bufs
                        .iter()
                        .find(|x| x.as_ptr() as u64 == at)
                        .and_then(|x| Some(u32::from_le_bytes(x.get(..4)?.try_into().ok()?) as usize))
                        .unwrap_or(0)
                }
            };
            scatter(&b[..used.min(b.len())], &out.pieces, &mut write)?;
        }
        if let Some(m) = self.msg.as_ref().filter(|m| m.receive) {
            let n = (result as usize).min(self.bufs[m.bufs[2]].len());
            scatter(&self.bufs[m.bufs[2]][..n], &m.pieces, &mut write)?;
            let namelen = m.header.msg_namelen;
            if m.name.0 != 0 {
                let n = (namelen as usize).min(m.name.1);
                write(m.name.0, &self.bufs[m.bufs[0]][..n])?;
                write(m.addr + 8, &namelen.to_le_bytes())?;
            }
            let n = m.header.msg_controllen.min(m.control.1);
            if m.control.0 != 0 {
                write(m.control.0, &self.bufs[m.bufs[1]][..n])?;
            }
            write(m.addr + 40, &(n as u64).to_le_bytes())?;
            write(m.addr + 48, &m.header.msg_flags.to_le_bytes())?;
        }
        Ok(())
    }
}

fn inode_at(paths: &[(u8, Vec<u8>)], (dir, path): (i32, usize)) -> u64 {
    let Some(path) = paths.get(path).and_then(|(_, p)| std::ffi::CString::new(p.clone()).ok()) else { return 0 };
    // SAFETY: plain integers, for which zero is valid; a string and a structure that outlive the call.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        let r = libc::fstatat(dir, path.as_ptr(), &raw mut st, libc::AT_SYMLINK_NOFOLLOW);
        if r == 0 { st.st_ino } else { 0 }
    }
}

/// The kernel's interface, without libc's errno.
pub fn raw_call(nr: u64, a: &[u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: callers pass integers, or pointers to buffers that outlive the call and are as long as the
    // other arguments say; the kernel checks everything else.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") nr as i64 => result, in("rdi") a[0], in("rsi") a[1],
            in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5], out("rcx") _, out("r11") _);
    }
    result
}

/// A call that does not wait, made again when a signal of our own has ended it: `poll` and its like say EINTR even
/// with a timeout of 0.
pub fn steady_call(nr: u64, a: &[u64; 6]) -> i64 {
    loop {
        let result = raw_call(nr, a);
        if result != -i64::from(libc::EINTR) {
            return result;
        }
    }
}

fn iovecs(tid: i32, addr: u64, count: u64) -> Result<Vec<(u64, usize)>> {
    let count = (count as usize).min(IOV_MAX);
    let mut raw = vec![0u8; count * 16];
    tracee::read_mem(tid, addr, &mut raw)?;
    let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap_or([0; 8]));
    Ok(raw.chunks_exact(16).map(|c| (word(&c[..8]), word(&c[8..]) as usize)).collect())
}

fn gather(tid: i32, pieces: &[(u64, usize)]) -> Result<Vec<u8>> {
    let total: usize = pieces.iter().map(|x| x.1).sum();
    let mut b = vec![0u8; total.min(BUFFER_BYTES_MAX)];
    let mut at = 0;
    for &(addr, n) in pieces {
        let n = n.min(b.len() - at);
        tracee::read_mem(tid, addr, &mut b[at..at + n])?;
        at += n;
    }
    Ok(b)
}

/// Gathered data goes into the digest piece by piece, as it lies in the program.
fn add_pieces(digest: &mut Digest, data: &[u8], pieces: &[(u64, usize)]) {
    let mut rest = data;
    for (_, n) in pieces {
        let (piece, behind) = rest.split_at((*n).min(rest.len()));
        digest.add_bytes(piece);
        rest = behind;
    }
}

fn scatter(data: &[u8], pieces: &[(u64, usize)], write: &mut impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let mut rest = data;
    for &(addr, n) in pieces {
        if rest.is_empty() {
            break;
        }
        let n = n.min(rest.len());
        write(addr, &rest[..n])?;
        rest = &rest[n..];
    }
    Ok(())
}

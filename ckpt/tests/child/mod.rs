//! A forked child that does what it is told over a pipe.

#![allow(dead_code, reason = "not every test uses everything")]

use ftrun_ckpt::pages::Page;
use ftrun_ckpt::state::PAGE_BYTES;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

pub(crate) const FILE_PAGES: u64 = 64;

const POKE: i64 = -1;
const FORK: i64 = -2;
const STACK: i64 = -3;

pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % n.max(1)
    }
}

/// Contents of a page of the file that the child maps.
pub(crate) fn file_page(index: u64) -> Page {
    [0x80 | index as u8; PAGE_BYTES as usize]
}

pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) file_fd: u64,
    pub(crate) mem_fd: u64,
    pub(crate) path: String,
    pub(crate) brk0: u64,
    pub(crate) mem: File,
    to: File,
    from: File,
    _file: tempfile::NamedTempFile,
    pagemap: File,
    stopped: std::cell::Cell<bool>,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: writes two descriptors into the array.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both are new and ours.
    unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) }
}

impl Child {
    pub(crate) fn spawn() -> Self {
        let mut file = tempfile::NamedTempFile::new().expect("temp file");
        for i in 0..FILE_PAGES {
            file.write_all(&file_page(i)).expect("write");
        }
        // SAFETY: a static name; the descriptor is checked below.
        let mem_fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(mem_fd >= 0);
        // SAFETY: new and ours.
        let memfd = unsafe { File::from_raw_fd(mem_fd) };
        memfd.set_len(FILE_PAGES * PAGE_BYTES).expect("size");
        let (cmd_in, cmd_out) = pipe();
        let (reply_in, reply_out) = pipe();
        // SAFETY: the child only makes system calls and never returns.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            serve(cmd_in.as_raw_fd(), reply_out.as_raw_fd());
        }
        let mut child = Self {
            pid,
            file_fd: file.as_raw_fd() as u64,
            mem_fd: mem_fd as u64,
            path: file.path().to_str().expect("path").into(),
            brk0: 0,
            mem: File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).expect("mem"),
            to: cmd_out.into(),
            from: reply_in.into(),
            _file: file,
            pagemap: File::open(format!("/proc/{pid}/pagemap")).expect("pagemap"),
            stopped: std::cell::Cell::new(false),
        };
        let brk = child.call(libc::SYS_brk, [0; 6]) as u64;
        let brk = brk.next_multiple_of(PAGE_BYTES);
        child.call(libc::SYS_brk, [brk + PAGE_BYTES, 0, 0, 0, 0, 0]);
        child.brk0 = brk;
        child
    }

    pub(crate) fn call(&mut self, nr: i64, args: [u64; 6]) -> i64 {
        self.go_on();
        let mut bytes = nr.to_le_bytes().to_vec();
        args.iter().for_each(|a| bytes.extend(a.to_le_bytes()));
        self.to.write_all(&bytes).expect("send");
        let mut reply = [0; 8];
        if self.from.read_exact(&mut reply).is_err() {
            let mut status = 0;
            // SAFETY: our own child.
            unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
            panic!("the child died in {nr} {args:x?} with wait status {status:#x}");
        }
        i64::from_le_bytes(reply)
    }

    pub(crate) fn poke(&mut self, addr: u64, value: u8) {
        self.call(POKE, [addr, value.into(), 0, 0, 0, 0]);
    }

    pub(crate) fn fork(&mut self) {
        self.call(FORK, [0; 6]);
    }

    pub(crate) fn grow_stack(&mut self) {
        self.call(STACK, [0; 6]);
    }

    /// Stops it until it is told to do something, so that its memory stands still: having answered it still runs.
    pub(crate) fn stop(&self) {
        if self.stopped.replace(true) {
            return;
        }
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.pid, libc::SIGSTOP);
            let mut status = 0;
            libc::waitpid(self.pid, &raw mut status, libc::WUNTRACED);
            assert!(libc::WIFSTOPPED(status), "the child died: {status:x}");
        }
    }

    fn go_on(&self) {
        if self.stopped.replace(false) {
            // SAFETY: our own child.
            unsafe { libc::kill(self.pid, libc::SIGCONT) };
        }
    }

    /// The pagemap word of an address.
    pub(crate) fn word(&self, addr: u64) -> u64 {
        let mut word = [0; 8];
        let at = addr / PAGE_BYTES * 8;
        self.pagemap.read_exact_at(&mut word, at).expect("pagemap");
        u64::from_le_bytes(word)
    }

    /// A userfaultfd of the child, taken from it.
    pub(crate) fn uffd(&self) -> OwnedFd {
        // SAFETY: the calls below only handle descriptors.
        unsafe {
            let mut this = (self.to.try_clone().unwrap(), self.from.try_clone().unwrap());
            let mut call = |nr: i64, args: [u64; 6]| {
                let mut bytes = nr.to_le_bytes().to_vec();
                args.iter().for_each(|a| bytes.extend(a.to_le_bytes()));
                this.0.write_all(&bytes).unwrap();
                let mut reply = [0; 8];
                this.1.read_exact(&mut reply).unwrap();
                i64::from_le_bytes(reply)
            };
            let flags = ftrun_ckpt::dirty::UFFD_FLAGS as u64;
            let theirs = call(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]);
            assert!(theirs >= 0);
            let pidfd = libc::syscall(libc::SYS_pidfd_open, self.pid, 0) as i32;
            let ours = libc::syscall(libc::SYS_pidfd_getfd, pidfd, theirs, 0) as i32;
            assert!(ours >= 0);
            libc::close(pidfd);
            call(libc::SYS_close, [theirs as u64, 0, 0, 0, 0, 0]);
            OwnedFd::from_raw_fd(ours)
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

fn serve(from: i32, to: i32) -> ! {
    // SAFETY: in a forked child only system calls are made; the addresses are the test's business.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // A call that never returns fails the test instead of hanging it.
        libc::alarm(100);
        loop {
            let mut cmd = [0u64; 7];
            if libc::read(from, cmd.as_mut_ptr().cast(), 56) != 56 {
                libc::_exit(0);
            }
            let [nr, a, b, c, d, e, f] = cmd;
            let reply: i64 = match nr as i64 {
                POKE => {
                    (a as *mut u8).write_volatile(b as u8);
                    0
                }
                FORK => {
                    let pid = libc::syscall(libc::SYS_fork);
                    if pid == 0 {
                        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                        libc::alarm(20);
                        loop {
                            libc::pause();
                        }
                    }
                    pid
                }
                STACK => i64::from(deep(64)),
                nr => libc::syscall(nr, a, b, c, d, e, f),
            };
            libc::write(to, (&raw const reply).cast(), 8);
        }
    }
}

#[inline(never)]
fn deep(n: u8) -> u8 {
    let mut room = [n; 4096];
    std::hint::black_box(&mut room);
    if n == 0 { room[0] } else { room[1] ^ deep(n - 1) }
}

//! What recording a call costs inside the process: instructions, counted one by one, and time.
//!
//! The shim is put into a process of its own where there is no supervisor, and calls are made through a stub as
//! `ftrun` writes them. `cargo test --release -p ftrun-shim --test record_path -- --nocapture` prints a table.

use std::arch::{asm, global_asm};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use ftrun_abi::fast::{
    AREA_BYTES, AREAS_BASE, Area, CODE_BASE, CODE_BYTES_MAX, CONTROL_BASE, CONTROL_BYTES, Control, FD_COUNTED,
    FD_PRIVATE, OUTPUTS_BYTES, RING_BASE, area,
};
use ftrun_abi::ring::Ring;

global_asm!(
    ".globl ftrun_test_site, ftrun_test_site_end",
    "ftrun_test_site:",
    "mov gs:[0], rsp",
    "mov rsp, gs:[8]",
    "call gs:[16]",
    // What the supervisor would serve is made as it is.
    "syscall",
    ".byte 0xe9",
    ".long 0",
    "ret",
    "ftrun_test_site_end:",
);

unsafe extern "C" {
    static ftrun_test_site: u8;
    static ftrun_test_site_end: u8;
}

const RING_BYTES: u64 = (16 << 20) + 4096;

fn site() -> std::ops::Range<u64> {
    (&raw const ftrun_test_site) as u64..(&raw const ftrun_test_site_end) as u64
}

/// Makes a call through the site.
fn recorded(nr: i64, args: [u64; 6]) -> i64 {
    let result;
    // SAFETY: the site makes the call in place of `syscall`; `set_up` has been called in this process.
    unsafe {
        asm!("call {site}", site = in(reg) site().start, inlateout("rax") nr => result, in("rdi") args[0],
            in("rsi") args[1], in("rdx") args[2], in("r10") args[3], in("r8") args[4], in("r9") args[5],
            out("rcx") _, out("r11") _);
    }
    result
}

/// Makes a call without the shim; the time is asked for as a program does, by the kernel's shared object.
fn bare(nr: i64, args: [u64; 6]) -> i64 {
    // SAFETY: the calls below are given what they ask for.
    unsafe {
        if nr == libc::SYS_clock_gettime {
            return i64::from(libc::clock_gettime(args[0] as i32, args[1] as *mut libc::timespec));
        }
        libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5])
    }
}

/// Where the kernel's shared object is: the same in a child.
fn vdso() -> std::ops::Range<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc");
    let line = maps.lines().find(|l| l.ends_with("[vdso]")).expect("a shared object of the kernel");
    let (start, end) = line.split_once(' ').and_then(|l| l.0.split_once('-')).expect("a range");
    let number = |text| u64::from_str_radix(text, 16).expect("an address");
    number(start)..number(end)
}

fn map(at: u64, bytes: u64, prot: i32) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: memory at addresses that are ours by convention, and free.
    let got = unsafe { libc::mmap(at as *mut libc::c_void, bytes as usize, prot, flags, -1, 0) };
    assert_eq!(got as u64, at, "{}", std::io::Error::last_os_error());
}

fn control() -> &'static Control {
    // SAFETY: mapped by `set_up`, and every bit pattern is one.
    unsafe { &*(CONTROL_BASE as *const Control) }
}

fn rewind() {
    // SAFETY: as for `control`; nobody else uses the ring.
    let ring = unsafe { Ring::create(RING_BASE as *mut u8, RING_BYTES as usize) };
    assert!(ring.is_ok());
}

/// Puts the shim into this process, for the calling thread.
fn set_up() {
    const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
    map(CODE_BASE, CODE_BYTES_MAX, RW | libc::PROT_EXEC);
    map(AREAS_BASE, 2 * AREA_BYTES, RW);
    map(CONTROL_BASE, CONTROL_BYTES + OUTPUTS_BYTES + RING_BYTES, RW);
    rewind();
    let c = control();
    c.ring_bytes.store(RING_BYTES, SeqCst);
    c.budget.store(u64::MAX, SeqCst);
    for flag in [&c.may_wait, &c.single, &c.alone, &c.ignores_pipe] {
        flag.store(1, SeqCst);
    }
    let at = area(1);
    let fields = Area { user_sp: 0, stack: at + AREA_BYTES - 8, entry: ftrun_shim::entry(), slow: 0, tid: 1, this: at };
    const ARCH_SET_GS: u64 = 0x1001;
    // SAFETY: memory mapped above; the shim's code; a register that nothing here uses; a library that is loaded.
    unsafe {
        (at as *mut Area).write(fields);
        std::ptr::copy_nonoverlapping(ftrun_shim::IMAGE.as_ptr(), CODE_BASE as *mut u8, ftrun_shim::IMAGE.len());
        assert_eq!(libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, at), 0);
        let vdso = libc::dlopen(c"linux-vdso.so.1".as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_NOW);
        assert!(!vdso.is_null());
        c.clock_gettime.store(libc::dlsym(vdso, c"__vdso_clock_gettime".as_ptr()) as u64, SeqCst);
    }
}

/// A call to measure.
struct Case {
    name: &'static str,
    nr: i64,
    args: [u64; 6],
    /// Bytes that are sent to the socket before, and taken out of its far end after.
    feed: usize,
    drain: usize,
    /// Most instructions that recording may take; a byte of a long copy counts as one.
    limit: u64,
}

/// Where in [`Bench::buffer`] there are a message's header, a set of descriptors and zeroes.
const HEADER: usize = 20480;
const READY: usize = 24576;
const ZERO: usize = 28672;

/// A pair of TCP sockets on the loopback interface, an epoll set with the near one, and memory.
struct Bench {
    near: TcpStream,
    far: TcpStream,
    set: i32,
    buffer: Vec<u8>,
    sink: Vec<u8>,
    file: std::fs::File,
    /// The shim is there, and knows the descriptors.
    owned: bool,
}

impl Bench {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let far = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let (near, _) = listener.accept().expect("a connection");
        near.set_nonblocking(true).expect("a mode");
        near.set_nodelay(true).expect("an option");
        far.set_nodelay(true).expect("an option");
        // SAFETY: plain calls with valid arguments.
        let set = unsafe {
            let set = libc::epoll_create1(0);
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 7 };
            assert_eq!(libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, near.as_raw_fd(), &raw mut event), 0);
            set
        };
        let file = tempfile();
        Self { near, far, set, buffer: vec![0; 1 << 16], sink: vec![0; 1 << 16], file, owned: false }
    }

    /// Tells the shim that nobody else has the socket.
    fn own(&mut self) {
        self.owned = true;
        // SAFETY: mapped by `set_up`; the shim does not run.
        unsafe { (&mut (*(CONTROL_BASE as *mut Control)).fds)[self.near.as_raw_fd() as usize] = FD_PRIVATE };
    }

    fn cases(&mut self) -> Vec<Case> {
        let (file, null) = (self.file.as_raw_fd() as u64, c"/dev/null".as_ptr() as u64);
        let (fd, set, at) = (self.near.as_raw_fd() as u64, self.set as u64, self.buffer.as_mut_ptr() as u64);
        // Behind what is received: `struct msghdr`, its piece, and a set with the file in it, which is always ready.
        let (header, ready, zero) = (at + HEADER as u64, at + READY as u64, at + ZERO as u64);
        let message = [0, 0, header + 56, 1, 0, 0, 0, at, 4096];
        for (word, to) in message.into_iter().zip(self.buffer[HEADER..].chunks_exact_mut(8)) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.buffer[READY..READY + 8].copy_from_slice(&(1u64 << file).to_le_bytes());
        let case = |name, nr, args, feed, drain, limit| Case { name, nr, args, feed, drain, limit };
        vec![
            case("getppid", libc::SYS_getppid, [0; 6], 0, 0, 360),
            case("clock_gettime", libc::SYS_clock_gettime, [1, at, 0, 0, 0, 0], 0, 0, 480),
            case("read 1 B", libc::SYS_read, [fd, at, 1, 0, 0, 0], 1, 0, 700),
            case("read 100 B", libc::SYS_read, [fd, at, 16384, 0, 0, 0], 100, 0, 780),
            case("read 4 KiB", libc::SYS_read, [fd, at, 16384, 0, 0, 0], 4096, 0, 5000),
            case("write 1 B", libc::SYS_write, [fd, at, 1, 0, 0, 0], 0, 1, 950),
            case("write 100 B", libc::SYS_write, [fd, at, 100, 0, 0, 0], 0, 100, 1050),
            case("write 4 KiB", libc::SYS_write, [fd, at, 4096, 0, 0, 0], 0, 4096, 3500),
            case("fstat", libc::SYS_fstat, [fd, at, 0, 0, 0, 0], 0, 0, 1010),
            case("setsockopt", libc::SYS_setsockopt, [fd, 6, 1, zero, 4, 0], 0, 0, 1250),
            case("pwrite 4 KiB", libc::SYS_pwrite64, [file, at, 4096, 0, 0, 0], 0, 0, 3500),
            case("openat", libc::SYS_openat, [-100i64 as u64, null, 0, 0, 0, 0], 0, 0, 850),
            case("recvmsg 100 B", libc::SYS_recvmsg, [fd, header, 0, 0, 0, 0], 100, 0, 1200),
            case("select", libc::SYS_select, [file + 1, ready, 0, 0, zero, 0], 0, 0, 1700),
            case("epoll_pwait2", libc::SYS_epoll_pwait2, [set, at, 64, zero, 0, 8], 1, 0, 1150),
            case("epoll_wait", libc::SYS_epoll_wait, [set, at, 64, 0, 0, 0], 1, 0, 780),
        ]
    }

    fn before(&mut self, case: &Case) {
        self.far.write_all(&self.sink[..case.feed]).expect("room");
    }

    fn after(&mut self, case: &Case, result: i64) {
        let expected = match case.nr {
            libc::SYS_getppid => result,
            libc::SYS_clock_gettime | libc::SYS_fstat | libc::SYS_setsockopt => 0,
            libc::SYS_pwrite64 => 4096,
            libc::SYS_openat => {
                let close = if self.owned { recorded } else { bare };
                assert_eq!(close(libc::SYS_close, [result as u64, 0, 0, 0, 0, 0]), 0);
                result
            }
            libc::SYS_select => 1,
            libc::SYS_epoll_wait | libc::SYS_epoll_pwait2 => {
                self.near.read_exact(&mut self.sink[..case.feed]).expect("what it reported");
                1
            }
            _ => (case.feed + case.drain) as i64,
        };
        assert_eq!(result, expected, "{}", case.name);
        self.far.read_exact(&mut self.sink[..case.drain]).expect("what was sent");
    }
}

/// A file without a name.
fn tempfile() -> std::fs::File {
    use std::os::fd::FromRawFd;
    // SAFETY: a name and flags; the descriptor is owned by the file made from it.
    unsafe { std::fs::File::from_raw_fd(libc::memfd_create(c"record-path".as_ptr(), 0)) }
}

/// Calls of each case before those that are counted: what is found out once has been found out.
const WARM: u64 = 40;

/// The child's part of [`instructions`]: a breakpoint instruction before the call that is counted.
fn stepped() {
    set_up();
    let mut bench = Bench::new();
    bench.own();
    // SAFETY: asks to be traced.
    unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
    for case in bench.cases() {
        let before = control().fast.load(SeqCst);
        for _ in 0..WARM {
            bench.before(&case);
            let result = recorded(case.nr, case.args);
            bench.after(&case, result);
        }
        assert!(control().fast.load(SeqCst) - before >= WARM, "{} is served in the process", case.name);
        if matches!(case.nr, libc::SYS_read | libc::SYS_write) {
            // SAFETY: as in `own`.
            let known = unsafe { (&(*(CONTROL_BASE as *mut Control)).fds)[bench.near.as_raw_fd() as usize] };
            assert!(known & FD_COUNTED != 0, "{}: the stream is not counted", case.name);
        }
        bench.before(&case);
        // SAFETY: the tracer waits for this.
        unsafe { asm!("int3") };
        let result = recorded(case.nr, case.args);
        bench.after(&case, result);
    }
}

/// Counts the instructions of a call of each case, by stepping through a child.
fn instructions(cases: usize) -> Vec<u64> {
    // SAFETY: the child uses what a fork of one of several threads may here: no lock of this test is held.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        stepped();
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let go = |how: u32| {
        let mut status = 0;
        // SAFETY: our own child, which has stopped, goes on until it stops again or ends.
        unsafe {
            if how != 0 {
                libc::ptrace(how, child, 0, 0);
            }
            libc::waitpid(child, &raw mut status, 0);
        }
        status
    };
    let is_trap = |status| libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP;
    let ip = || {
        // SAFETY: the child has stopped; the structure is plain data.
        unsafe {
            let mut regs: libc::user_regs_struct = std::mem::zeroed();
            libc::ptrace(libc::PTRACE_GETREGS, child, 0, &raw mut regs);
            regs.rip
        }
    };
    // The shim restores the flags that it has seen, and has seen the trap flag.
    let no_more_steps = || {
        const TRAP_FLAG: u64 = 0x100;
        // SAFETY: as above.
        unsafe {
            let mut regs: libc::user_regs_struct = std::mem::zeroed();
            libc::ptrace(libc::PTRACE_GETREGS, child, 0, &raw mut regs);
            regs.eflags &= !TRAP_FLAG;
            libc::ptrace(libc::PTRACE_SETREGS, child, 0, &raw const regs);
        }
    };
    // The test's own code is not counted: the stub, the shim and the kernel's shared object are.
    let kernel = vdso();
    let counts_in =
        |at| site().contains(&at) || (CODE_BASE..CODE_BASE + CODE_BYTES_MAX).contains(&at) || kernel.contains(&at);
    let mut counts = vec![];
    let mut status = go(0);
    while counts.len() < cases {
        let mut count = 0;
        loop {
            assert!(is_trap(status), "the child: {status:#x}");
            let inside = counts_in(ip());
            if !inside && count > 0 {
                break;
            }
            count += u64::from(inside);
            status = go(libc::PTRACE_SINGLESTEP);
        }
        counts.push(count);
        no_more_steps();
        status = go(libc::PTRACE_CONT);
    }
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child: {status:#x}");
    counts
}

/// Nanoseconds for each call, the least of some rounds.
fn time(bench: &mut Bench, case: &Case, make: fn(i64, [u64; 6]) -> i64) -> u64 {
    const CALLS: u64 = 200;
    let round = |bench: &mut Bench| {
        rewind();
        let mut spent = 0;
        for _ in 0..CALLS {
            bench.before(case);
            let start = Instant::now();
            let result = make(case.nr, case.args);
            spent += start.elapsed().as_nanos() as u64;
            bench.after(case, result);
        }
        spent / CALLS
    };
    (0..100).map(|_| round(bench)).min().unwrap_or(0)
}

/// Break it: compute the digest of a call without input memory by way of the table, or look for room in the ring twice.
#[test]
fn recording_a_call_takes_few_instructions() {
    // The kernel's shared object reads the time again when it has just been set: the least of some passes.
    let cases = Bench::new().cases().len();
    let passes: Vec<_> = (0..4).map(|_| instructions(cases)).collect();
    let counts = (0..cases).map(|i| passes.iter().map(|counts| counts[i]).min().unwrap_or(0));
    set_up();
    let mut bench = Bench::new();
    bench.own();
    println!("{:16} {:>12} {:>8} {:>8} {:>6}", "call", "instructions", "bare ns", "ftrun ns", "adds");
    for (case, count) in bench.cases().iter().zip(counts) {
        let (plain, logged) = (time(&mut bench, case, bare), time(&mut bench, case, recorded));
        println!("{:16} {count:12} {plain:8} {logged:8} {:6}", case.name, logged as i64 - plain as i64);
        assert!(count > 20, "{}: the call was not recorded", case.name);
        assert!(count <= case.limit, "{}: {count} instructions", case.name);
    }
}

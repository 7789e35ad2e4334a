//! Making the unit's process: the program's first image, and a process rebuilt from a checkpoint.
//!
//! A process is always made the same way: the tracer forks a child that shares its descriptor table
//! and directory, and fills it from a [`Snapshot`]. `execve` unshares the table, so the program is
//! first executed in a scratch process that lives only until its image can be copied: starting a
//! program is recovering it from the checkpoint at its first instruction.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;

use ftrun_ckpt::copy::copy_out;
use ftrun_ckpt::files;
use ftrun_ckpt::pages::PageStore;
use ftrun_ckpt::state::{Mapping, MmFields, Snapshot, TASK_END};
use libc::{sock_filter, user_regs_struct};
use serde::{Deserialize, Serialize};

use ftrun_abi::fast::{CODE_BASE, VDSO_BASE, VDSO_BYTES_MAX};

use crate::mapper::Mapper;
use crate::marshal::raw_call;
use crate::tracee::{self, Event, Gate, TraceError};
use crate::vdso;

/// Where our pages lie in every unit: far from where Linux puts programs, libraries and stacks.
pub const GATE: Gate = Gate { base: 0x6f00_0000_0000 };

/// The filter: the gate's own instruction, the shim's, those of the kernel's shared object (which makes calls
/// where it cannot tell the time itself) and `rt_sigreturn` pass, 32-bit and x32 calls get `ENOSYS`,
/// everything else goes to the tracer (and fails with `ENOSYS` when there is none).
pub fn filter(gate: Gate) -> Vec<sock_filter> {
    const LD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JEQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const JGE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const RET: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    let s = |code, k| sock_filter { code, jt: 0, jf: 0, k };
    let j = |code, k, jt, jf| sock_filter { code, jt, jf, k };
    let ip = gate.allowed_ip();
    let (code, end) = (CODE_BASE, CODE_BASE + ftrun_shim::IMAGE.len() as u64);
    assert!(
        ip >> 32 == code >> 32 && code >> 32 == end >> 32 && ip >> 32 == VDSO_BASE >> 32,
        "one upper half for both"
    );
    vec![
        s(LD, 4),
        j(JEQ, AUDIT_ARCH_X86_64, 0, 11),
        s(LD, 12),
        j(JEQ, (ip >> 32) as u32, 0, 6),
        s(LD, 8),
        j(JEQ, ip as u32, 9, 0),
        j(JGE, code as u32, 0, 1),
        j(JGE, end as u32, 1, 7),
        j(JGE, VDSO_BASE as u32, 0, 1),
        j(JGE, (VDSO_BASE + VDSO_BYTES_MAX) as u32, 0, 5),
        s(LD, 0),
        j(JEQ, libc::SYS_rt_sigreturn as u32, 3, 0),
        j(JGE, 0x4000_0000, 0, 1),
        s(RET, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        s(RET, libc::SECCOMP_RET_TRACE),
        s(RET, libc::SECCOMP_RET_ALLOW),
    ]
}

/// Forks a child of the calling thread that waits in `pause` to be taken over.
///
/// With `filter` the child shares descriptors and directory with the caller and is filtered; without,
/// it is a plain copy (the scratch process for `execve`). Of all signals only those of `ignored` are.
fn fork_child(set_tid: Option<i32>, filter: Option<&[sock_filter]>, ignored: u64) -> io::Result<i32> {
    let tids = [set_tid.unwrap_or(0)];
    let mut args = [0u64; 11];
    args[0] = if filter.is_some() { (libc::CLONE_FILES | libc::CLONE_FS) as u64 } else { 0 };
    args[4] = libc::SIGCHLD as u64;
    if set_tid.is_some() {
        args[8] = tids.as_ptr() as u64;
        args[9] = 1;
    }
    let prog = filter.map(|f| libc::sock_fprog { len: f.len() as u16, filter: f.as_ptr().cast_mut() });
    let all = u64::MAX;
    let parent = i64::from(std::process::id());
    let mut patience = IdPatience::new(set_tid);
    let r = loop {
        let r = raw_call(libc::SYS_clone3 as u64, &[args.as_ptr() as u64, 88, 0, 0, 0, 0]);
        if patience.try_again(r) {
            continue;
        }
        if !patience.gives_up(r) {
            break r;
        }
        (args[8], args[9]) = (0, 0);
    };
    if r != 0 {
        return if r < 0 { Err(io::Error::from_raw_os_error(-r as i32)) } else { Ok(r as i32) };
    }
    // The child: only system calls from here, since other threads of the parent may have held locks.
    // Until it is traced, it ends with its parent by this.
    raw_call(libc::SYS_prctl as u64, &[libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0]);
    if raw_call(libc::SYS_getppid as u64, &[0; 6]) != parent {
        raw_call(libc::SYS_exit_group as u64, &[125, 0, 0, 0, 0, 0]);
    }
    raw_call(libc::SYS_rt_sigprocmask as u64, &[libc::SIG_BLOCK as u64, (&raw const all) as u64, 0, 8, 0, 0]);
    for signal in 1..=64 {
        let handler = if ignored >> (signal - 1) & 1 == 1 { libc::SIG_IGN } else { libc::SIG_DFL };
        let action = [handler as u64, 0, 0, 0];
        raw_call(libc::SYS_rt_sigaction as u64, &[signal, action.as_ptr() as u64, 0, 8, 0, 0]);
    }
    if let Some(prog) = &prog {
        let prog = (&raw const *prog) as u64;
        raw_call(libc::SYS_prctl as u64, &[libc::PR_SET_TSC as u64, libc::PR_TSC_SIGSEGV as u64, 0, 0, 0, 0]);
        raw_call(libc::SYS_arch_prctl as u64, &[ARCH_SET_CPUID, 0, 0, 0, 0, 0]);
        let set = [libc::SECCOMP_SET_MODE_FILTER as u64, 0, prog, 0, 0, 0];
        if raw_call(libc::SYS_seccomp as u64, &set) != 0 {
            raw_call(libc::SYS_prctl as u64, &[libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0]);
            if raw_call(libc::SYS_seccomp as u64, &set) != 0 {
                raw_call(libc::SYS_exit_group as u64, &[125, 0, 0, 0, 0, 0]);
            }
        }
    }
    loop {
        raw_call(libc::SYS_pause as u64, &[0; 6]);
    }
}

/// Waits for a thread id to be given back: the kernel does that some time after it has reported that the thread's
/// process is gone (`free_pids` in `release_task`), on the processor where the thread ended. One that somebody else
/// has got meanwhile is given up: the program goes on to see it, as it does where ids cannot be chosen.
struct IdPatience(Option<std::time::Instant>);

impl IdPatience {
    fn new(set_tid: Option<i32>) -> Self {
        const LIMIT: std::time::Duration = std::time::Duration::from_millis(20);
        Self(set_tid.map(|_| std::time::Instant::now() + LIMIT))
    }

    /// Whether to make the call again that returned this.
    fn try_again(&mut self, result: i64) -> bool {
        let again = result == -i64::from(libc::EEXIST) && self.0.is_some_and(|end| std::time::Instant::now() < end);
        if again {
            std::thread::yield_now();
        }
        again
    }

    /// Whether to make it again with any id.
    fn gives_up(&mut self, result: i64) -> bool {
        result == -i64::from(libc::EEXIST) && self.0.take().is_some()
    }
}

const ARCH_SET_CPUID: u64 = 0x1012;

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// `execve` failed.
    #[error("cannot execute {program}: {source}")]
    Exec {
        /// The program.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("{what}: {source}")]
    Sys {
        /// The operation.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// What memory was mapped from is not there any more.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The process died while it was built.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

pub(crate) fn sys(what: impl Into<String>) -> impl FnOnce(io::Error) -> LaunchError {
    let what = what.into();
    move |source| LaunchError::Sys { what, source }
}

/// What to execute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    /// Path of the file.
    pub path: CString,
    /// Arguments, the name first.
    pub argv: Vec<CString>,
    /// Environment.
    pub envp: Vec<CString>,
    /// Signal mask to start with.
    pub sigmask: u64,
    /// Signals to ignore from the start: bit 0 is signal 1.
    pub ignored: u64,
}

/// Executes the program in a scratch process; returns it stopped before its first instruction.
pub fn exec_scratch(program: &Program) -> Result<i32, LaunchError> {
    let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr() as u64).chain(std::iter::once(0)).collect::<Vec<u64>>();
    let (argv, envp) = (pointers(&program.argv), pointers(&program.envp));
    let tid = fork_child(None, None, program.ignored).map_err(sys("fork"))?;
    tracee::seize(tid)?;
    tracee::interrupt(tid)?;
    while !matches!(tracee::wait_one(tid)?, Event::Stop(_)) {
        tracee::cont(tid, 0)?;
    }
    // The child is done with its signal actions and mask when it comes to `pause`; that call is replaced.
    let mut regs = loop {
        tracee::cont_syscall(tid)?;
        tracee::wait_one(tid)?;
        let regs = tracee::get_regs(tid)?;
        if regs.orig_rax == libc::SYS_pause as u64 && regs.rax as i64 == -i64::from(libc::ENOSYS) {
            break regs;
        }
    };
    tracee::set_sigmask(tid, program.sigmask)?;
    regs.orig_rax = libc::SYS_execve as u64;
    regs.rdi = program.path.as_ptr() as u64;
    regs.rsi = argv.as_ptr() as u64;
    regs.rdx = envp.as_ptr() as u64;
    tracee::set_regs(tid, &regs)?;
    tracee::cont_syscall(tid)?;
    match tracee::wait_one(tid)? {
        Event::Other(libc::PTRACE_EVENT_EXEC) => Ok(tid),
        _ => {
            let errno = -(tracee::get_regs(tid)?.rax as i64) as i32;
            kill_and_reap(tid);
            Err(LaunchError::Exec {
                program: program.path.to_string_lossy().into_owned(),
                source: io::Error::from_raw_os_error(errno),
            })
        }
    }
}

/// Kills a process with SIGKILL and waits until it is gone.
pub fn kill_and_reap(pid: i32) {
    // SAFETY: a process that we made and have not reaped.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    while let Ok(event) = tracee::wait_one(pid) {
        if matches!(event, Event::Ended(_)) {
            break;
        }
    }
}

/// Reads the fields that [`MmFields`] holds. Uses descriptors: call it on the service thread.
pub fn read_mm(pid: i32, brk: Option<u64>) -> io::Result<MmFields> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = stat.rsplit_once(')').map_or("", |x| x.1);
    let fields: Vec<u64> = rest.split_whitespace().map(|w| w.parse().unwrap_or(0)).collect();
    // proc(5) numbers fields from 1 and the state, the first here, is number 3.
    let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0);
    Ok(MmFields {
        start_code: field(26),
        end_code: field(27),
        start_stack: field(28),
        start_data: field(45),
        end_data: field(46),
        start_brk: field(47),
        brk: brk.unwrap_or_else(|| field(47)),
        arg_start: field(48),
        arg_end: field(49),
        env_start: field(50),
        env_end: field(51),
        auxv: fs::read(format!("/proc/{pid}/auxv"))?,
        exe: String::from_utf8_lossy(fs::read_link(format!("/proc/{pid}/exe"))?.as_os_str().as_bytes()).into_owned(),
    })
}

/// Runs one call through the gate of a thread that is stopped anywhere. Signals that would interrupt
/// are kept from the thread and handed to `signal`.
pub fn gate_call(
    tid: i32,
    user: &user_regs_struct,
    nr: u64,
    args: [u64; 6],
    signal: &mut dyn FnMut(tracee::SigInfo),
) -> tracee::Result<i64> {
    tracee::set_regs(tid, &GATE.regs(user, nr, args))?;
    tracee::cont(tid, 0)?;
    loop {
        match tracee::wait_one(tid)? {
            Event::Seccomp => {
                let regs = tracee::get_regs(tid)?;
                if regs.rip == GATE.back_ip() {
                    return Ok(regs.rdi as i64);
                }
                // A stop of before the registers were set cannot come here; anything else is not ours.
                return Err(TraceError::Gone(tid));
            }
            Event::Signal(_) => {
                let info = tracee::get_siginfo(tid)?;
                let (number, code, _) = tracee::siginfo_head(&info);
                if code > 0 && matches!(number, libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGTRAP) {
                    let source = io::Error::other(format!("signal {number} at the gate"));
                    return Err(TraceError::Sys { op: "a call through the gate", tid, source });
                }
                signal(info);
                tracee::cont(tid, 0)?;
            }
            Event::Stop(_) | Event::Other(_) => tracee::cont(tid, 0)?,
            Event::Ended(_) => return Err(TraceError::Gone(tid)),
        }
    }
}

/// Builds a process from a checkpoint; its main thread stands in a stop, without the program's registers
/// yet. Other threads are added by [`add_thread`]. `locked` is for [`Mapper`].
pub fn rebuild(snapshot: &Snapshot, pages: &PageStore, set_tid: Option<i32>, locked: bool) -> Result<i32, LaunchError> {
    let tid = fork_child(set_tid, Some(&filter(GATE)), 0).map_err(sys("making the process"))?;
    tracee::seize(tid)?;
    if !matches!(tracee::wait_one(tid)?, Event::Seccomp) {
        return Err(TraceError::Gone(tid).into());
    }
    // The first call replaces the `pause` that the child is stopped in; the loop brings it back here.
    let mut regs = tracee::get_regs(tid)?;
    regs.orig_rax = libc::SYS_mmap as u64;
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let fixed = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE) as u64;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = [GATE.base, Gate::BYTES, rw, fixed, u64::MAX, 0];
    tracee::set_regs(tid, &regs)?;
    tracee::cont(tid, 0)?;
    tracee::wait_one(tid)?;
    tracee::write_mem(tid, GATE.base, &Gate::CODE)?;
    regs.orig_rax = libc::SYS_mprotect as u64;
    [regs.rdi, regs.rsi, regs.rdx] = [GATE.base, 4096, (libc::PROT_READ | libc::PROT_EXEC) as u64];
    tracee::set_regs(tid, &regs)?;
    tracee::cont(tid, 0)?;
    tracee::wait_one(tid)?;

    // It is traced, and ends with its tracer; the program has no such signal.
    regs.orig_rax = libc::SYS_prctl as u64;
    [regs.rdi, regs.rsi] = [libc::PR_SET_PDEATHSIG as u64, 0];
    tracee::set_regs(tid, &regs)?;
    tracee::cont(tid, 0)?;
    tracee::wait_one(tid)?;

    // The copy of our own restartable-sequence area goes with our memory; the kernel must not write there.
    if let Some((at, bytes, signature)) = tracee::rseq_of(tid)? {
        regs.orig_rax = libc::SYS_rseq as u64;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10] = [at, u64::from(bytes), 1, u64::from(signature)];
        tracee::set_regs(tid, &regs)?;
        tracee::cont(tid, 0)?;
        tracee::wait_one(tid)?;
    }
    // SAFETY: plain integers.
    let zero: user_regs_struct = unsafe { std::mem::zeroed() };
    let base = user_regs_struct { cs: regs.cs, ss: regs.ss, eflags: 0x202, ..zero };
    let made = |r: i64, what: &str| match r {
        -4095..0 => Err(sys(what.to_owned())(io::Error::from_raw_os_error(-r as i32))),
        r => Ok(r),
    };
    let call = |nr: libc::c_long, args: [u64; 6], what: &str| -> Result<i64, LaunchError> {
        made(gate_call(tid, &base, nr as u64, args, &mut |_| {})?, what)
    };
    call(libc::SYS_munmap, [0x1000, GATE.base - 0x1000, 0, 0, 0, 0], "unmapping")?;
    // The kernel's shared object is moved out of the way of what the snapshot maps.
    let areas = vdso::areas();
    for (begin, end) in areas {
        let (bytes, to) = (end - begin, vdso::moved(areas, *begin));
        let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        call(libc::SYS_mremap, [*begin, bytes, bytes, how, to, 0], "moving the vDSO")?;
    }
    let kept = VDSO_BASE + VDSO_BYTES_MAX;
    call(libc::SYS_munmap, [GATE.end(), VDSO_BASE - GATE.end(), 0, 0, 0, 0], "unmapping")?;
    call(libc::SYS_munmap, [kept, TASK_END - kept, 0, 0, 0, 0], "unmapping")?;

    let mut mapper = Mapper::begin(tid, &base, locked)?;
    for m in &snapshot.maps {
        let fd = mapper.open_for(m, &snapshot.files, pages)?;
        let what = format!("mapping {:x}-{:x} {}", m.start, m.end, m.path);
        let prot = if fill(m, pages) { m.prot | libc::PROT_WRITE as u32 } else { m.prot };
        let mut flags = libc::MAP_FIXED | if m.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        if fd < 0 {
            flags |= libc::MAP_ANONYMOUS;
        }
        if m.grows_down {
            flags |= libc::MAP_GROWSDOWN | libc::MAP_STACK;
        }
        if m.prot == 0 {
            flags |= libc::MAP_NORESERVE;
        }
        let args = [
            m.start,
            m.end - m.start,
            u64::from(prot),
            flags as u64,
            fd as i64 as u64,
            if fd < 0 { 0 } else { m.offset },
        ];
        made(mapper.call(libc::SYS_mmap, args)?, &what)?;
    }
    for m in &snapshot.maps {
        copy_out(tid, pages, m.start..m.end, m.inode == 0, None).map_err(sys("filling memory"))?;
        if fill(m, pages) && m.prot & libc::PROT_WRITE as u32 == 0 {
            call(libc::SYS_mprotect, [m.start, m.end - m.start, u64::from(m.prot), 0, 0, 0], "mprotect")?;
        }
    }
    set_mm(tid, snapshot, &mut mapper)?;
    mapper.end()?;
    for (i, action) in snapshot.sigactions.iter().enumerate() {
        let signal = i as u64 + 1;
        if *action != [0; 4] && signal != 9 && signal != 19 {
            let bytes: Vec<u8> = action.iter().flat_map(|w| w.to_le_bytes()).collect();
            tracee::write_mem(tid, GATE.slot(0), &bytes)?;
            call(libc::SYS_rt_sigaction, [signal, GATE.slot(0), 0, 8, 0, 0], "rt_sigaction")?;
        }
    }
    Ok(tid)
}

/// Pages of ours must be written into this mapping.
fn fill(m: &Mapping, pages: &PageStore) -> bool {
    pages.iter_range(m.start, m.end).next().is_some()
}

/// `prctl(PR_SET_MM, PR_SET_MM_MAP)`; the executable's own link can be set by the privileged alone.
fn set_mm(tid: i32, snapshot: &Snapshot, mapper: &mut Mapper) -> Result<(), LaunchError> {
    let mm = &snapshot.mm;
    let at = GATE.slot(0);
    let auxv = at + 256;
    let mut auxv_bytes = mm.auxv.clone();
    auxv_bytes.truncate(1024);
    tracee::write_mem(tid, auxv, &auxv_bytes)?;
    let mut result = 0;
    for exe_fd in [mapper.open(&mm.exe, false)?, -1] {
        let words = [
            mm.start_code,
            mm.end_code,
            mm.start_data,
            mm.end_data,
            mm.start_brk,
            mm.brk,
            mm.start_stack,
            mm.arg_start,
            mm.arg_end,
            mm.env_start,
            mm.env_end,
            auxv,
        ];
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.extend_from_slice(&(auxv_bytes.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(exe_fd as u32).to_le_bytes());
        tracee::write_mem(tid, at, &bytes)?;
        let args = [libc::PR_SET_MM as u64, libc::PR_SET_MM_MAP as u64, at, bytes.len() as u64, 0, 0];
        result = mapper.call(libc::SYS_prctl, args)?;
        if result == 0 {
            return Ok(());
        }
    }
    Err(sys("prctl(PR_SET_MM_MAP)")(io::Error::from_raw_os_error(-result as i32)))
}

/// Adds a thread to a process under construction through its main thread; returns the new id.
pub fn add_thread(main: i32, user: &user_regs_struct, set_tid: Option<i32>) -> Result<i32, LaunchError> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    clone_through_gate(main, user, flags as u64, [0; 4], set_tid, &mut |_| {})?.map_err(sys("making a thread"))
}

/// `clone3` with flags, then (parent_tid, child_tid, stack pointer, tls); the new thread or process is
/// stopped behind the gate when this returns. Signals that arrive meanwhile are handed to `signal`.
pub fn clone_through_gate(
    tid: i32,
    user: &user_regs_struct,
    flags: u64,
    [parent_tid, child_tid, sp, tls]: [u64; 4],
    set_tid: Option<i32>,
    signal: &mut dyn FnMut(tracee::SigInfo),
) -> tracee::Result<Result<i32, io::Error>> {
    let at = GATE.slot(0);
    let exit_signal =
        if flags & (libc::CLONE_THREAD | libc::CLONE_PARENT) as u64 != 0 { 0 } else { libc::SIGCHLD as u64 };
    let (stack, size) = if sp == 0 { (0, 0) } else { (sp - 16, 16) };
    let (tids, n) = if set_tid.is_some() { (at + 128, 1) } else { (0, 0) };
    let words = [flags, 0, child_tid, parent_tid, exit_signal, stack, size, tls, tids, n, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect();
    tracee::write_mem(tid, at, &bytes)?;
    tracee::write_mem(tid, at + 128, &set_tid.unwrap_or(0).to_le_bytes())?;
    let mut patience = IdPatience::new(set_tid);
    let r = loop {
        let r = gate_call(tid, user, libc::SYS_clone3 as u64, [at, 88, 0, 0, 0, 0], signal)?;
        if patience.try_again(r) {
            continue;
        }
        if !patience.gives_up(r) {
            break r;
        }
        // `set_tid` and `set_tid_size`.
        tracee::write_mem(tid, at + 64, &[0; 16])?;
    };
    if r < 0 {
        return Ok(Err(io::Error::from_raw_os_error(-r as i32)));
    }
    let new = r as i32;
    loop {
        match tracee::wait_one(new)? {
            Event::Seccomp => return Ok(Ok(new)),
            Event::Ended(_) => return Err(TraceError::Gone(new)),
            // One that was sent to the process may be taken by its newest thread.
            Event::Signal(_) => {
                signal(tracee::get_siginfo(new)?);
                tracee::cont(new, 0)?;
            }
            Event::Stop(_) | Event::Other(_) => tracee::cont(new, 0)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Break it: return EEXIST when patience is over.
    #[test]
    fn an_id_that_is_taken_is_given_up() {
        if !crate::run::can_set_tid() {
            return;
        }
        let taken = std::process::id() as i32;
        let pid = fork_child(Some(taken), None, 0).unwrap();
        assert_ne!(pid, taken);
        let mut status = 0;
        // SAFETY: our own child.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        }
    }
}

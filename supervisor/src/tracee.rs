//! One traced thread: registers, memory, signals, and running a system call inside it.
//!
//! A thread under control stands in a ptrace stop. Whatever the stop, setting its registers with
//! `orig_rax = -1` and continuing it makes the kernel abandon the call it may be in and go on from
//! the new registers; everything here relies on that (ptrace(2), "Syscall-stops"; the kernel
//! restarts a call only when `orig_rax` is not negative).
//!
//! **The gate.** Every unit has one page of ours at [`Gate::base`]. Its `syscall` instruction is the
//! only one that the seccomp filter lets through untraced, and the one behind it traps again. So
//! running a call inside the unit costs one stop: registers are set to the gate, the thread is
//! continued, and it comes back in a seccomp stop with the result in `rdi`.

use std::io;

use libc::{c_int, c_long, c_void, user_regs_struct};

/// Why an operation on a traced thread could not be done.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The thread has been killed or has ended.
    #[error("thread {0} is gone")]
    Gone(i32),
    /// The kernel refused.
    #[error("{op} on thread {tid}: {source}")]
    Sys {
        /// The operation.
        op: &'static str,
        /// The thread.
        tid: i32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Result of an operation on a traced thread.
pub type Result<T> = std::result::Result<T, TraceError>;

/// Events that [`wait`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Stopped by the seccomp filter at the entry of a call.
    Seccomp,
    /// About to be delivered this signal.
    Signal(c_int),
    /// `PTRACE_EVENT_STOP`: attached, interrupted or group-stopped with this signal.
    Stop(c_int),
    /// Another `PTRACE_EVENT_*`.
    Other(c_int),
    /// Ended; the wait status as `waitpid` gives it.
    Ended(c_int),
}

/// The options every thread is traced with.
pub const OPTIONS: c_int = libc::PTRACE_O_TRACESECCOMP
    | libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;

/// Makes an error of the last `errno`.
fn last(op: &'static str, tid: i32) -> TraceError {
    let source = io::Error::last_os_error();
    if source.raw_os_error() == Some(libc::ESRCH) { TraceError::Gone(tid) } else { TraceError::Sys { op, tid, source } }
}

/// `ptrace(2)` with integer arguments.
fn ptrace(op: &'static str, request: libc::c_uint, tid: i32, addr: u64, data: u64) -> Result<c_long> {
    // SAFETY: the requests made through here take integers, or pointers to live objects of the size
    // the request needs, which the callers below own for the time of the call.
    let r = unsafe { libc::ptrace(request, tid, addr as *mut c_void, data as *mut c_void) };
    if r == -1 { Err(last(op, tid)) } else { Ok(r) }
}

/// Attaches to a thread without stopping it.
pub fn seize(tid: i32) -> Result<()> {
    ptrace("PTRACE_SEIZE", libc::PTRACE_SEIZE, tid, 0, OPTIONS as u64).map(drop)
}

/// Continues a stopped thread, delivering `signal` if it is not 0.
pub fn cont(tid: i32, signal: c_int) -> Result<()> {
    ptrace("PTRACE_CONT", libc::PTRACE_CONT, tid, 0, signal as u64).map(drop)
}

/// Continues a stopped thread for one instruction, or to the first of the handler of `signal`.
pub fn step(tid: i32, signal: c_int) -> Result<()> {
    ptrace("PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP, tid, 0, signal as u64).map(drop)
}

/// Continues a stopped thread to the next entry or exit of a system call.
pub fn cont_syscall(tid: i32) -> Result<()> {
    ptrace("PTRACE_SYSCALL", libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Makes a running thread stop with `Event::Stop`.
pub fn interrupt(tid: i32) -> Result<()> {
    ptrace("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Leaves a group-stopped thread stopped but lets it be woken by `SIGCONT`.
pub fn listen(tid: i32) -> Result<()> {
    ptrace("PTRACE_LISTEN", libc::PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// General registers.
pub fn get_regs(tid: i32) -> Result<user_regs_struct> {
    // SAFETY: the structure is plain integers, for which zero is valid.
    let mut regs: user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace("PTRACE_GETREGS", libc::PTRACE_GETREGS, tid, 0, (&raw mut regs) as u64)?;
    Ok(regs)
}

/// Sets the general registers.
pub fn set_regs(tid: i32, regs: &user_regs_struct) -> Result<()> {
    ptrace("PTRACE_SETREGS", libc::PTRACE_SETREGS, tid, 0, (&raw const *regs) as u64).map(drop)
}

/// Extended state in the CPU's own layout and size (`NT_X86_XSTATE`).
pub fn get_xstate(tid: i32) -> Result<Vec<u8>> {
    let mut buf = vec![0u8; xstate_bytes()];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    ptrace("PTRACE_GETREGSET", libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, (&raw mut iov) as u64)?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// Sets the extended state.
pub fn set_xstate(tid: i32, xstate: &[u8]) -> Result<()> {
    let iov = libc::iovec { iov_base: xstate.as_ptr() as *mut c_void, iov_len: xstate.len() };
    ptrace("PTRACE_SETREGSET", libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, (&raw const iov) as u64).map(drop)
}

const NT_X86_XSTATE: u64 = 0x202;

/// Size of the extended state on this CPU, from CPUID leaf 0xD (it can be larger than a page).
fn xstate_bytes() -> usize {
    let leaf = std::arch::x86_64::__cpuid_count(0xd, 0);
    (leaf.ecx as usize).max(512 + 64)
}

/// The signal mask, bit n-1 for signal n.
pub fn get_sigmask(tid: i32) -> Result<u64> {
    let mut mask = 0u64;
    ptrace("PTRACE_GETSIGMASK", PTRACE_GETSIGMASK, tid, 8, (&raw mut mask) as u64)?;
    Ok(mask)
}

/// Sets the signal mask.
pub fn set_sigmask(tid: i32, mask: u64) -> Result<()> {
    ptrace("PTRACE_SETSIGMASK", PTRACE_SETSIGMASK, tid, 8, (&raw const mask) as u64).map(drop)
}

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_PEEKSIGINFO: libc::c_uint = 0x4209;

/// The thread's restartable-sequence area: address, size and signature (rseq(2)); `None` without one.
pub fn rseq_of(tid: i32) -> Result<Option<(u64, u32, u32)>> {
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    // struct ptrace_rseq_configuration: pointer, size, signature, flags, padding.
    let mut words = [0u32; 6];
    let at = words.as_mut_ptr() as u64;
    ptrace("PTRACE_GET_RSEQ_CONFIGURATION", PTRACE_GET_RSEQ_CONFIGURATION, tid, 24, at)?;
    let address = u64::from(words[0]) | u64::from(words[1]) << 32;
    Ok((address != 0).then_some((address, words[2], words[3])))
}

/// A `siginfo_t`, 128 bytes, in the kernel's layout.
pub type SigInfo = [u8; 128];

/// The signal that a thread in a signal-delivery stop is about to receive.
pub fn get_siginfo(tid: i32) -> Result<SigInfo> {
    let mut info = [0u8; 128];
    ptrace("PTRACE_GETSIGINFO", libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as u64)?;
    Ok(info)
}

/// Replaces the signal information of a thread in a signal-delivery stop.
pub fn set_siginfo(tid: i32, info: &SigInfo) -> Result<()> {
    ptrace("PTRACE_SETSIGINFO", libc::PTRACE_SETSIGINFO, tid, 0, info.as_ptr() as u64).map(drop)
}

/// Signals that wait to be delivered: to the thread itself (`shared` false) or to its process.
pub fn pending(tid: i32, shared: bool) -> Result<Vec<SigInfo>> {
    #[repr(C)]
    struct Peek {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut found = vec![[0u8; 128]; 32];
    let peek = Peek { off: 0, flags: u32::from(shared), nr: found.len() as i32 };
    let n = ptrace("PTRACE_PEEKSIGINFO", PTRACE_PEEKSIGINFO, tid, (&raw const peek) as u64, found.as_mut_ptr() as u64)?;
    found.truncate(n as usize);
    Ok(found)
}

/// Number, code and sender of a signal.
pub fn siginfo_head(info: &SigInfo) -> (c_int, c_int, c_int) {
    let word = |at: usize| i32::from_le_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    (word(0), word(8), word(16))
}

/// Signal information as `kill(2)` or `waitpid` events carry it.
pub fn make_siginfo(signo: c_int, code: c_int, pid: i32, uid: u32, status: i32) -> SigInfo {
    let mut info = [0u8; 128];
    info[0..4].copy_from_slice(&signo.to_le_bytes());
    info[8..12].copy_from_slice(&code.to_le_bytes());
    info[16..20].copy_from_slice(&pid.to_le_bytes());
    info[20..24].copy_from_slice(&uid.to_le_bytes());
    info[24..28].copy_from_slice(&status.to_le_bytes());
    info
}

/// Waits for an event of `tid` (or of anyone with -1). `None` when the tracer has been told something since it was
/// last told (see [`crate::told`]), or with `WNOHANG` when nothing happened; `ECHILD` is an error.
pub fn wait(tid: i32, flags: c_int) -> io::Result<Option<(i32, Event)>> {
    let mut status = 0;
    let r = crate::told::wait4(tid, &mut status, libc::__WALL | flags);
    if r == 0 || r == -i64::from(libc::EINTR) {
        return Ok(None);
    }
    if r < 0 {
        return Err(io::Error::from_raw_os_error(-r as i32));
    }
    Ok(Some((r as i32, decode(status))))
}

/// What a wait status says.
fn decode(status: c_int) -> Event {
    if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
        return Event::Ended(status);
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 => Event::Signal(signal),
        libc::PTRACE_EVENT_SECCOMP => Event::Seccomp,
        libc::PTRACE_EVENT_STOP => Event::Stop(signal),
        other => Event::Other(other),
    }
}

/// Waits for the next event of one thread, across interruptions.
pub fn wait_one(tid: i32) -> Result<Event> {
    loop {
        if let Some(event) = wait_tick(tid)? {
            crate::pulse::beat();
            return Ok(event);
        }
    }
}

/// Waits for the next event of one thread; `None` at a tick of the supervisor's clock.
pub fn wait_tick(tid: i32) -> Result<Option<Event>> {
    match wait(tid, 0) {
        Ok(Some((_, event))) => Ok(Some(event)),
        // A main thread that was killed is not reported while its process has other threads that
        // nobody has waited for.
        Ok(None) if is_zombie(tid) => match wait(tid, libc::WNOHANG) {
            Ok(Some((_, event))) => Ok(Some(event)),
            _ => Err(TraceError::Gone(tid)),
        },
        Ok(None) => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ECHILD) => Err(TraceError::Gone(tid)),
        Err(source) => Err(TraceError::Sys { op: "waitpid", tid, source }),
    }
}

/// The thread has ended and waits to be reaped.
fn is_zombie(tid: i32) -> bool {
    // No call tells: waitid(2) is silent where `wait` is, a process that is ending has lost its memory before it is a
    // zombie, and a signal 0 reaches zombies, too.
    let stat = crate::service::outside_the_table(|| std::fs::read_to_string(format!("/proc/{tid}/stat")));
    matches!(stat.unwrap_or_default().rsplit_once(") ").and_then(|x| x.1.chars().next()), Some('Z' | 'X') | None)
}

/// Reads memory of the process; all of `buf` or an error (`EFAULT`).
pub fn read_mem(tid: i32, addr: u64, buf: &mut [u8]) -> Result<()> {
    let n = read_some(tid, addr, buf)?;
    if n == buf.len() {
        Ok(())
    } else {
        Err(TraceError::Sys { op: "reading memory", tid, source: io::Error::from_raw_os_error(libc::EFAULT) })
    }
}

/// Reads as much of `buf` as is mapped.
pub fn read_some(tid: i32, addr: u64, buf: &mut [u8]) -> Result<usize> {
    if buf.is_empty() {
        return Ok(0);
    }
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: addr as *mut c_void, iov_len: buf.len() };
    // SAFETY: the local vector describes `buf`; the remote one is checked by the kernel.
    let n = unsafe { libc::process_vm_readv(tid, &raw const local, 1, &raw const remote, 1, 0) };
    if n < 0 { Err(last("process_vm_readv", tid)) } else { Ok(n as usize) }
}

/// Writes memory of the process; all of `data` or an error.
pub fn write_mem(tid: i32, addr: u64, data: &[u8]) -> Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    let local = libc::iovec { iov_base: data.as_ptr() as *mut c_void, iov_len: data.len() };
    let remote = libc::iovec { iov_base: addr as *mut c_void, iov_len: data.len() };
    // SAFETY: the local vector describes `data`; the remote one is checked by the kernel.
    let n = unsafe { libc::process_vm_writev(tid, &raw const local, 1, &raw const remote, 1, 0) };
    if n < 0 {
        return Err(last("process_vm_writev", tid));
    }
    if n as usize == data.len() {
        Ok(())
    } else {
        Err(TraceError::Sys { op: "writing memory", tid, source: io::Error::from_raw_os_error(libc::EFAULT) })
    }
}

/// Writes a word whatever the protection of the page is.
pub fn poke(tid: i32, addr: u64, word: u64) -> Result<()> {
    ptrace("PTRACE_POKEDATA", libc::PTRACE_POKEDATA, tid, addr, word).map(drop)
}

/// Reads a little-endian `u64`.
pub fn read_u64(tid: i32, addr: u64) -> Result<u64> {
    let mut b = [0; 8];
    read_mem(tid, addr, &mut b)?;
    Ok(u64::from_le_bytes(b))
}

/// Reads a little-endian `u32`.
pub fn read_u32(tid: i32, addr: u64) -> Result<u32> {
    let mut b = [0; 4];
    read_mem(tid, addr, &mut b)?;
    Ok(u32::from_le_bytes(b))
}

/// Reads a NUL-terminated string of at most `max` bytes, without the NUL.
pub fn read_cstr(tid: i32, addr: u64, max: usize) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut at = addr;
    loop {
        let room = (4096 - (at & 4095)) as usize;
        let mut chunk = [0u8; 4096];
        let n = read_some(tid, at, &mut chunk[..room])?;
        if let Some(end) = chunk[..n].iter().position(|&b| b == 0) {
            out.extend_from_slice(&chunk[..end]);
            return Ok(out);
        }
        out.extend_from_slice(&chunk[..n]);
        at += n as u64;
        if n < room || out.len() > max {
            return Err(TraceError::Sys {
                op: "reading a string",
                tid,
                source: io::Error::from_raw_os_error(libc::EFAULT),
            });
        }
    }
}

/// Sends a signal to one thread.
pub fn tgkill(pid: i32, tid: i32, signal: c_int) -> Result<()> {
    // SAFETY: a system call with three integers.
    let r = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    if r == -1 { Err(last("tgkill", tid)) } else { Ok(()) }
}

/// Our page in the unit: code, and behind it scratch memory for the arguments of waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Gate {
    /// First address. Code is in the first page, scratch slots follow.
    pub base: u64,
}

impl Gate {
    /// Bytes of scratch memory of one thread.
    pub const SLOT_BYTES: u64 = 16384;
    /// Most threads of one unit.
    pub const THREADS_MAX: u64 = 2000;
    /// Whole size in bytes.
    pub const BYTES: u64 = 4096 + Self::SLOT_BYTES * Self::THREADS_MAX;
    /// `syscall; mov %rax,%rdi; mov $-1,%eax... ; syscall; ud2`: the second call traps whatever its number.
    pub const CODE: [u8; 16] =
        [0x0f, 0x05, 0x48, 0x89, 0xc7, 0xb8, 0xff, 0x0f, 0x00, 0x00, 0x0f, 0x05, 0x0f, 0x0b, 0x90, 0x90];
    /// Number that the second call carries.
    pub const BACK_NR: u64 = 0xfff;

    /// Address behind the untraced `syscall` instruction: what the filter compares.
    pub fn allowed_ip(self) -> u64 {
        self.base + 2
    }

    /// Address behind the second `syscall`.
    pub fn back_ip(self) -> u64 {
        self.base + 12
    }

    /// First address behind our memory.
    pub fn end(self) -> u64 {
        self.base + Self::BYTES
    }

    /// Scratch memory of the thread in slot `slot`.
    pub fn slot(self, slot: usize) -> u64 {
        self.base + 4096 + slot as u64 * Self::SLOT_BYTES
    }

    /// Registers that run a call through the gate, on top of the thread's own.
    pub fn regs(self, user: &user_regs_struct, nr: u64, args: [u64; 6]) -> user_regs_struct {
        let mut regs = *user;
        regs.rip = self.base;
        regs.rax = nr;
        regs.orig_rax = u64::MAX;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        regs
    }
}

/// The call in the registers of a thread, as it is served: number and arguments.
///
/// Several messages in a call (recvmmsg(2), sendmmsg(2)) are served one at a time: the callers must do with fewer than they have asked
/// for. An entry of theirs begins with the header that recvmsg(2) and sendmsg(2) take.
pub fn call_of(regs: &user_regs_struct) -> (u64, [u64; 6]) {
    let (nr, args) = (regs.orig_rax, args_of(regs));
    let one = |nr: libc::c_long| (nr as u64, [args[0], args[1], args[3] & !(libc::MSG_WAITFORONE as u64), 0, 0, 0]);
    match nr as i64 {
        libc::SYS_recvmmsg if args[2] > 0 => one(libc::SYS_recvmsg),
        libc::SYS_sendmmsg if args[2] > 0 => one(libc::SYS_sendmsg),
        _ => (nr, args),
    }
}

/// What a call returns that has been served so: its result, and what else it has written, at an address.
pub fn result_of(regs: &user_regs_struct, result: i64) -> (i64, Option<(u64, [u8; 4])>) {
    let (nr, args) = call_of(regs);
    if nr == regs.orig_rax || result < 0 {
        return (result, None);
    }
    // `msg_len`, behind the header.
    (1, Some((args[1] + size_of::<libc::msghdr>() as u64, (result as u32).to_le_bytes())))
}

/// The six arguments in the registers of a call.
pub fn args_of(regs: &user_regs_struct) -> [u64; 6] {
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9]
}

/// Registers as plain words, in the order of `struct user_regs_struct`.
pub fn regs_to_words(r: &user_regs_struct) -> ftrun_ckpt::state::Regs {
    [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi,
        r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ]
}

/// The reverse of [`regs_to_words`].
pub fn words_to_regs(w: &ftrun_ckpt::state::Regs) -> user_regs_struct {
    user_regs_struct {
        r15: w[0],
        r14: w[1],
        r13: w[2],
        r12: w[3],
        rbp: w[4],
        rbx: w[5],
        r11: w[6],
        r10: w[7],
        r9: w[8],
        r8: w[9],
        rax: w[10],
        rcx: w[11],
        rdx: w[12],
        rsi: w[13],
        rdi: w[14],
        orig_rax: w[15],
        rip: w[16],
        cs: w[17],
        eflags: w[18],
        rsp: w[19],
        ss: w[20],
        fs_base: w[21],
        gs_base: w[22],
        ds: w[23],
        es: w[24],
        fs: w[25],
        gs: w[26],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is opened in the table of the thread that asks, where a killed supervisor would leave it to the unit:
    /// here that table is full.
    ///
    /// Break it: read the file in [`is_zombie`] itself.
    #[test]
    fn looking_for_zombies_opens_nothing_in_the_units_table() {
        let service = crate::service::Service::start(Vec::new()).unwrap();
        // Its table is a copy, and other tests wait for the end of what is in it.
        service.run(|| crate::keeper::keep_only(&[0, 1, 2]));
        service.be_the_tracers();
        std::thread::spawn(|| {
            // SAFETY: concerns this thread alone; its copies of a descriptor go with it. The child waits to be killed.
            let child = unsafe {
                assert_eq!(libc::unshare(libc::CLONE_FILES), 0);
                while libc::dup(0) >= 0 {}
                assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EMFILE));
                let child = libc::fork();
                if child == 0 {
                    loop {
                        libc::pause();
                    }
                }
                child
            };
            let alive = !is_zombie(child);
            // SAFETY: our own child, which stays a zombie until it is waited for.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let flags = libc::WEXITED | libc::WNOWAIT;
                assert_eq!(libc::waitid(libc::P_PID, child as u32, &raw mut info, flags), 0);
            }
            let ended = is_zombie(child);
            // SAFETY: as above.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            assert_eq!((alive, ended), (true, true));
        })
        .join()
        .unwrap();
    }
}

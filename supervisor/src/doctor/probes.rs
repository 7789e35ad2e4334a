//! The probes. Each one tries the thing, in the way in which `run` uses it.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::sys::ptrace::{self as pt, Options};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::Outcome;
use super::sandbox::{Child, exit_child, in_child, wait};

/// `arch_prctl` command to switch CPUID faulting (asm/prctl.h).
const ARCH_SET_CPUID: i32 = 0x1012;
/// The oldest kernel that has all the calls which are tried here (`pidfd_getfd` came last).
const KERNEL_MIN: (u32, u32) = (5, 6);
/// Descriptors that ftrun and a small program need.
const DESCRIPTORS_MIN: u64 = 64;
/// A unit needs room for a segment of its log.
const FREE_BYTES_MIN: u64 = 16 << 20;

fn sys(call: &str) -> impl Fn(nix::Error) -> String + '_ {
    move |e| format!("{call}: {}", e.desc())
}

/// The result of a raw system call.
fn checked(call: &str, result: libc::c_long) -> Result<i32, String> {
    if result < 0 {
        return Err(format!("{call}: {}", io::Error::last_os_error()));
    }
    i32::try_from(result).map_err(|_| format!("{call}: returned {result}"))
}

pub(super) fn kernel_release() -> String {
    let name = nix::sys::utsname::uname();
    name.map_or_else(|_| "unknown".into(), |n| n.release().to_string_lossy().into_owned())
}

pub(super) fn kernel() -> Outcome {
    let release = kernel_release();
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|p| p.parse().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let arch = std::env::consts::ARCH;
    if version < KERNEL_MIN || arch != "x86_64" {
        return Err(format!("{release} on {arch}, needed is {}.{} on x86_64", KERNEL_MIN.0, KERNEL_MIN.1));
    }
    Ok(format!("{release} on {arch}"))
}

pub(super) fn yama() -> Outcome {
    let path = "/proc/sys/kernel/yama/ptrace_scope";
    let Ok(text) = fs::read_to_string(path) else {
        return Ok("no ptrace_scope in this kernel".into());
    };
    let scope = text.trim();
    let privileged = caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_PTRACE);
    match scope {
        "0" | "1" => Ok(format!("ptrace_scope is {scope}: a parent may trace its child")),
        "2" if privileged.unwrap_or(false) => Ok("ptrace_scope is 2, and we have CAP_SYS_PTRACE".into()),
        "2" => Err("ptrace_scope is 2: only CAP_SYS_PTRACE may trace; needed is 0 or 1".into()),
        _ => Err(format!("ptrace_scope is {scope}: nobody may trace; needed is 0 or 1")),
    }
}

pub(super) fn ptrace() -> Outcome {
    in_child(|| {
        let (child, _go) = Child::start(|| 0)?;
        pt::seize(child.0, Options::PTRACE_O_EXITKILL).map_err(sys("PTRACE_SEIZE"))?;
        pt::interrupt(child.0).map_err(sys("PTRACE_INTERRUPT"))?;
        match wait(child.0).map_err(sys("waitpid"))? {
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) => {}
            other => return Err(format!("not the stop of PTRACE_INTERRUPT: {other:?}")),
        }
        pt::getregs(child.0).map_err(sys("PTRACE_GETREGS"))?;
        Ok("a child can be seized and read".into())
    })
}

/// A filter that sends `getppid` to the tracer.
fn trace_getppid() -> [libc::sock_filter; 4] {
    let op = |code: u32, k, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let ret = libc::BPF_RET | libc::BPF_K;
    [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_getppid as u32, 0, 1),
        op(ret, libc::SECCOMP_RET_TRACE, 0, 0),
        op(ret, libc::SECCOMP_RET_ALLOW, 0, 0),
    ]
}

/// Installs the filter and makes the call; 0 when the call went through.
fn filtered_getppid() -> i32 {
    if nix::sys::prctl::set_no_new_privs().is_err() {
        return 2;
    }
    let mut filter = trace_getppid();
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: `program` and the filter that it points to live over the call.
    let set = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if set != 0 {
        return 3;
    }
    // SAFETY: getppid(2) has no preconditions.
    i32::from(unsafe { libc::syscall(libc::SYS_getppid) } <= 0)
}

pub(super) fn seccomp_trace() -> Outcome {
    in_child(|| {
        let (child, go) = Child::start(filtered_getppid)?;
        let options = Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACESECCOMP;
        pt::seize(child.0, options).map_err(sys("PTRACE_SEIZE"))?;
        drop(go);
        match wait(child.0).map_err(sys("waitpid"))? {
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_SECCOMP) => {
                Ok("SECCOMP_RET_TRACE stops a filtered call".into())
            }
            WaitStatus::Exited(_, 2) => Err("PR_SET_NO_NEW_PRIVS is refused".into()),
            WaitStatus::Exited(_, 3) => Err("the kernel refuses a seccomp filter".into()),
            other => Err(format!("the filtered call did not stop: {other:?}")),
        }
    })
}

pub(super) fn no_new_privs() -> Outcome {
    in_child(|| {
        nix::sys::prctl::set_no_new_privs().map_err(sys("PR_SET_NO_NEW_PRIVS"))?;
        Ok("can be set".into())
    })
}

pub(super) fn subreaper() -> Outcome {
    in_child(|| {
        nix::sys::prctl::set_child_subreaper(true).map_err(sys("PR_SET_CHILD_SUBREAPER"))?;
        Ok("can be set".into())
    })
}

/// `clone3` like fork: `None` in the child. `pid` asks for a process id.
fn clone3(flags: i32, pid: Option<Pid>) -> Result<Option<Pid>, io::Error> {
    // SAFETY: all zeros is a valid `clone_args`.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.flags = flags as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    let ids = [pid.map_or(0, Pid::as_raw)];
    if pid.is_some() {
        args.set_tid = ids.as_ptr() as u64;
        args.set_tid_size = 1;
    }
    // SAFETY: `args` and `ids` live over the call. Without CLONE_VM the child has its own copy of
    // our memory, and our process has one thread; the child makes system calls only and exits.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match r {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Pid::from_raw(pid as i32))),
    }
}

pub(super) fn set_tid() -> Outcome {
    in_child(|| {
        let start = |pid| match clone3(0, pid) {
            Ok(None) => exit_child(0),
            Ok(Some(pid)) => Ok(Child(pid)),
            Err(e) => Err(e),
        };
        // Somebody else may take a freed id before we do.
        for _ in 0..5 {
            let pid = start(None).map_err(|e| format!("clone3: {e}"))?.0;
            match start(Some(pid)) {
                Ok(again) if again.0 == pid => return Ok("clone3 gives a freed process id back".into()),
                Ok(other) => return Err(format!("clone3 gave {} in place of {pid}", other.0)),
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
                Err(e) => return Err(format!("clone3 refuses to set a process id: {e}")),
            }
        }
        Err("other processes took the freed process ids".into())
    })
}

pub(super) fn shared_descriptors() -> Outcome {
    in_child(|| {
        let flags = libc::CLONE_FILES | libc::CLONE_FS;
        let Some(child) = clone3(flags, None).map_err(|e| format!("clone3(CLONE_FILES | CLONE_FS): {e}"))? else {
            // SAFETY: a NUL-terminated path.
            exit_child(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY) });
        };
        let WaitStatus::Exited(_, fd @ 3..) = wait(child).map_err(sys("waitpid"))? else {
            return Err("the child could not open a file".into());
        };
        // SAFETY: fcntl(2) with F_GETFD takes any number.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err("a file that a child with CLONE_FILES opened is not in our table".into());
        }
        Ok("a child can share our descriptor table and directory".into())
    })
}

pub(super) fn process_memory() -> Outcome {
    in_child(|| {
        let word = 0x1234_5678_9abc_def0_u64;
        let (child, _go) = Child::start(|| 0)?;
        let mut copy = 0u64;
        let local = libc::iovec { iov_base: (&raw mut copy).cast(), iov_len: 8 };
        let remote = libc::iovec { iov_base: (&raw const word).cast_mut().cast(), iov_len: 8 };
        // SAFETY: `local` points to the eight bytes of `copy`; the kernel checks `remote`, which is
        // an address of the child.
        let read = unsafe { libc::process_vm_readv(child.0.as_raw(), &raw const local, 1, &raw const remote, 1, 0) };
        checked("process_vm_readv", read as libc::c_long)?;
        if copy != word {
            return Err("process_vm_readv read something else than the child's memory".into());
        }
        Ok("process_vm_readv reads a child".into())
    })
}

pub(super) fn memfd() -> Outcome {
    in_child(|| {
        // SAFETY: a NUL-terminated name.
        let fd = unsafe { libc::memfd_create(c"ftrun-doctor".as_ptr(), libc::MFD_CLOEXEC) };
        checked("memfd_create", fd.into())?;
        Ok("memory that outlives a process can be made".into())
    })
}

pub(super) fn mm_map() -> Outcome {
    in_child(|| {
        let mut size = 0u32;
        // SAFETY: the kernel writes an unsigned int to the address, which is that of `size`.
        let r = unsafe { libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_MAP_SIZE, &raw mut size, 0usize, 0usize) };
        checked("PR_SET_MM_MAP_SIZE", r.into())?;
        Ok(format!("PR_SET_MM_MAP takes {size} bytes"))
    })
}

pub(super) fn tsc_trap() -> Outcome {
    in_child(|| {
        let (child, go) = Child::start(|| {
            // SAFETY: the call changes only how this process's RDTSC behaves.
            if unsafe { libc::prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV, 0, 0, 0) } != 0 {
                return 2;
            }
            // SAFETY: RDTSC has no preconditions; that it faults is what we look for.
            let _now = unsafe { core::arch::x86_64::_rdtsc() };
            1
        })?;
        drop(go);
        match wait(child.0).map_err(sys("waitpid"))? {
            WaitStatus::Signaled(_, Signal::SIGSEGV, _) => Ok("RDTSC can be trapped".into()),
            WaitStatus::Exited(_, 2) => Err("PR_SET_TSC is refused".into()),
            other => Err(format!("RDTSC does not fault although PR_SET_TSC was accepted ({other:?})")),
        }
    })
}

pub(super) fn cpuid_faulting() -> Outcome {
    in_child(|| {
        let (child, go) = Child::start(|| {
            // SAFETY: the call changes only how this process's CPUID behaves.
            if unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_CPUID, 0) } != 0 {
                return 2;
            }
            let _leaf = core::arch::x86_64::__cpuid(0);
            1
        })?;
        drop(go);
        match wait(child.0).map_err(sys("waitpid"))? {
            WaitStatus::Signaled(_, Signal::SIGSEGV, _) => Ok("CPUID can be trapped".into()),
            WaitStatus::Exited(_, 2) => Err("ARCH_SET_CPUID is not available".into()),
            other => Err(format!("CPUID does not fault although ARCH_SET_CPUID was accepted ({other:?})")),
        }
    })
}

pub(super) fn pidfd_getfd() -> Outcome {
    in_child(|| {
        let (child, _go) = Child::start(|| 0)?;
        // SAFETY: pidfd_open(2) takes any number.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.0.as_raw(), 0) };
        let pidfd = checked("pidfd_open", pidfd)?;
        // SAFETY: the descriptor was just made and has no other owner.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let theirs = [0, 1, 2].into_iter().map(|fd| {
            // SAFETY: pidfd_getfd(2) takes any number.
            checked("pidfd_getfd", unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
        });
        // One of them may be closed.
        let mut last = Err(String::new());
        for taken in theirs {
            last = taken;
            if last.is_ok() {
                break;
            }
        }
        last.map(|_| "a child's descriptor can be duplicated".into())
    })
}

pub(super) fn descriptor_limit() -> Outcome {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(sys("getrlimit"))?;
    let show = |n| if n == libc::RLIM_INFINITY { "unlimited".into() } else { format!("{n}") };
    let text = format!("RLIMIT_NOFILE is {} (at most {})", show(soft), show(hard));
    if soft < DESCRIPTORS_MIN {
        return Err(format!("{text}, needed is {DESCRIPTORS_MIN}"));
    }
    Ok(text)
}

/// Tries to write where the state directory is or would be made.
pub(super) fn state_dir(dir: &Path) -> Outcome {
    let there = dir.ancestors().find(|d| d.exists()).ok_or_else(|| format!("no part of {} exists", dir.display()))?;
    let trial = there.join(format!(".ftrun-doctor-{}", std::process::id()));
    let made = fs::DirBuilder::new().mode(0o700).create(&trial);
    let made = made.and_then(|()| fs::write(trial.join("file"), [0; 4096]));
    let removed = fs::remove_dir_all(&trial);
    made.map_err(|e| format!("cannot write in {}: {e}", there.display()))?;
    removed.map_err(|e| format!("cannot remove {}: {e}", trial.display()))?;
    let space = nix::sys::statvfs::statvfs(there).map_err(sys("statvfs"))?;
    let free = space.blocks_available() * space.fragment_size();
    let text = format!("{} is writable, {} MiB free", dir.display(), free >> 20);
    if free < FREE_BYTES_MIN {
        return Err(format!("{text}, needed is {} MiB", FREE_BYTES_MIN >> 20));
    }
    Ok(text)
}

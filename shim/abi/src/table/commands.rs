//! Commands of `fcntl`, `prctl` and `arch_prctl`, and the table of all commands.

use super::Effect::*;
use super::make::*;
use super::{Command, Len, Row, Used, file, ioctl, memory, net, process};

const FCNTL: Row = object(72, "fcntl", &[Fd, Hex, Int]);
const FCNTL_GET: Row = input(72, "fcntl", &[Fd, Hex]);
/// `struct flock` is 32 bytes.
const GETLK: Row = input(72, "fcntl", &[Fd, Hex, INOUT32]);
const SETLK: Row = object(72, "fcntl", &[Fd, Hex, IN32]).does(Lock);
const FCNTL_OUT8: Row = input(72, "fcntl", &[Fd, Hex, OUT8]);
const FCNTL_IN8: Row = object(72, "fcntl", &[Fd, Hex, IN8]);
const LEASE: Row = unknown(72, "fcntl", &[Fd, Hex, Int]).note("breaking it sends a signal");

const FCNTL_COMMANDS: &[Command] = &[
    FCNTL.does(Duplicate).when(1, 0, "F_DUPFD"),
    FCNTL_GET.when(1, 1, "F_GETFD"),
    FCNTL.does(OnExec).when(1, 2, "F_SETFD"),
    FCNTL_GET.when(1, 3, "F_GETFL"),
    FCNTL.does(Mode).when(1, 4, "F_SETFL"),
    GETLK.when(1, 5, "F_GETLK"),
    SETLK.when(1, 6, "F_SETLK"),
    SETLK.special().when(1, 7, "F_SETLKW"),
    FCNTL.when(1, 8, "F_SETOWN"),
    FCNTL_GET.when(1, 9, "F_GETOWN"),
    FCNTL.when(1, 10, "F_SETSIG"),
    FCNTL_GET.when(1, 11, "F_GETSIG"),
    FCNTL_IN8.when(1, 15, "F_SETOWN_EX"),
    FCNTL_OUT8.when(1, 16, "F_GETOWN_EX"),
    FCNTL_OUT8.when(1, 17, "F_GETOWNER_UIDS"),
    GETLK.when(1, 36, "F_OFD_GETLK"),
    SETLK.when(1, 37, "F_OFD_SETLK"),
    SETLK.special().when(1, 38, "F_OFD_SETLKW"),
    LEASE.when(1, 1024, "F_SETLEASE"),
    LEASE.when(1, 1025, "F_GETLEASE"),
    LEASE.when(1, 1026, "F_NOTIFY"),
    FCNTL.when(1, 1027, "F_DUPFD_QUERY"),
    FCNTL_GET.when(1, 1028, "F_CREATED_QUERY"),
    FCNTL.does(Duplicate).when(1, 1030, "F_DUPFD_CLOEXEC"),
    FCNTL.does(Capacity).when(1, 1031, "F_SETPIPE_SZ"),
    FCNTL_GET.when(1, 1032, "F_GETPIPE_SZ"),
    FCNTL.does(Seal).when(1, 1033, "F_ADD_SEALS"),
    FCNTL_GET.when(1, 1034, "F_GET_SEALS"),
    FCNTL_OUT8.when(1, 1035, "F_GET_RW_HINT"),
    FCNTL_IN8.when(1, 1036, "F_SET_RW_HINT"),
    FCNTL_OUT8.when(1, 1037, "F_GET_FILE_RW_HINT"),
    FCNTL_IN8.when(1, 1038, "F_SET_FILE_RW_HINT"),
];

const PRCTL: Row = local(157, "prctl", &[Hex, Int, Int, Int, Int]);
const PRCTL_OUT4: Row = local(157, "prctl", &[Hex, OUT4]);
const PRCTL_TSC: Row = local(157, "prctl", &[Hex, Int])
    .irregular()
    .note("the supervisor traps rdtsc: the program's own choice is only remembered");

const PRCTL_COMMANDS: &[Command] = &[
    PRCTL.when(0, 1, "PR_SET_PDEATHSIG"),
    PRCTL_OUT4.when(0, 2, "PR_GET_PDEATHSIG"),
    PRCTL.when(0, 3, "PR_GET_DUMPABLE"),
    PRCTL.note("a process that is not dumpable hides its /proc files").when(0, 4, "PR_SET_DUMPABLE"),
    PRCTL_OUT4.when(0, 5, "PR_GET_UNALIGN"),
    PRCTL.when(0, 6, "PR_SET_UNALIGN"),
    PRCTL.when(0, 7, "PR_GET_KEEPCAPS"),
    PRCTL.when(0, 8, "PR_SET_KEEPCAPS"),
    PRCTL_OUT4.when(0, 9, "PR_GET_FPEMU"),
    PRCTL.when(0, 10, "PR_SET_FPEMU"),
    PRCTL_OUT4.when(0, 11, "PR_GET_FPEXC"),
    PRCTL.when(0, 12, "PR_SET_FPEXC"),
    PRCTL.when(0, 13, "PR_GET_TIMING"),
    PRCTL.when(0, 14, "PR_SET_TIMING"),
    local(157, "prctl", &[Hex, Str]).when(0, 15, "PR_SET_NAME"),
    local(157, "prctl", &[Hex, OUT16]).when(0, 16, "PR_GET_NAME"),
    PRCTL_OUT4.when(0, 19, "PR_GET_ENDIAN"),
    PRCTL.when(0, 20, "PR_SET_ENDIAN"),
    PRCTL.when(0, 21, "PR_GET_SECCOMP"),
    local(157, "prctl", &[Hex, Int, Addr])
        .note("a filter also judges the calls that a restore makes in the process")
        .when(0, 22, "PR_SET_SECCOMP"),
    PRCTL.when(0, 23, "PR_CAPBSET_READ"),
    PRCTL.when(0, 24, "PR_CAPBSET_DROP"),
    local(157, "prctl", &[Hex, OUT4]).irregular().note(PRCTL_TSC.note).when(0, 25, "PR_GET_TSC"),
    PRCTL_TSC.when(0, 26, "PR_SET_TSC"),
    PRCTL.when(0, 27, "PR_GET_SECUREBITS"),
    PRCTL.when(0, 28, "PR_SET_SECUREBITS"),
    PRCTL.when(0, 29, "PR_SET_TIMERSLACK"),
    PRCTL.when(0, 30, "PR_GET_TIMERSLACK"),
    PRCTL.when(0, 31, "PR_TASK_PERF_EVENTS_DISABLE"),
    PRCTL.when(0, 32, "PR_TASK_PERF_EVENTS_ENABLE"),
    PRCTL.when(0, 33, "PR_MCE_KILL"),
    PRCTL.when(0, 34, "PR_MCE_KILL_GET"),
    local(157, "prctl", &[Hex, OUT4, Int, Int, Int]).when(0, 35, "PR_SET_MM, PR_SET_MM_MAP_SIZE").and(1, 15),
    local(157, "prctl", &[Hex, Int, In(Len::Arg(3)), Int, Int]).when(0, 35, "PR_SET_MM, PR_SET_MM_MAP").and(1, 14),
    local(157, "prctl", &[Hex, Int, In(Len::Arg(3)), Int, Int]).when(0, 35, "PR_SET_MM, PR_SET_MM_AUXV").and(1, 12),
    local(157, "prctl", &[Hex, Int, Addr, Int, Int]).when(0, 35, "PR_SET_MM"),
    PRCTL.when(0, 36, "PR_SET_CHILD_SUBREAPER"),
    PRCTL_OUT4.when(0, 37, "PR_GET_CHILD_SUBREAPER"),
    PRCTL.when(0, 38, "PR_SET_NO_NEW_PRIVS"),
    PRCTL.when(0, 39, "PR_GET_NO_NEW_PRIVS"),
    local(157, "prctl", &[Hex, OUT8]).when(0, 40, "PR_GET_TID_ADDRESS"),
    PRCTL.when(0, 41, "PR_SET_THP_DISABLE"),
    PRCTL.when(0, 42, "PR_GET_THP_DISABLE"),
    PRCTL.when(0, 43, "PR_MPX_ENABLE_MANAGEMENT"),
    PRCTL.when(0, 44, "PR_MPX_DISABLE_MANAGEMENT"),
    PRCTL.when(0, 45, "PR_SET_FP_MODE"),
    PRCTL.when(0, 46, "PR_GET_FP_MODE"),
    PRCTL.when(0, 47, "PR_CAP_AMBIENT"),
    PRCTL.when(0, 50, "PR_SVE_SET_VL"),
    PRCTL.when(0, 51, "PR_SVE_GET_VL"),
    PRCTL.when(0, 52, "PR_GET_SPECULATION_CTRL"),
    PRCTL.when(0, 53, "PR_SET_SPECULATION_CTRL"),
    PRCTL.when(0, 54, "PR_PAC_RESET_KEYS"),
    PRCTL.when(0, 55, "PR_SET_TAGGED_ADDR_CTRL"),
    PRCTL.when(0, 56, "PR_GET_TAGGED_ADDR_CTRL"),
    PRCTL.when(0, 57, "PR_SET_IO_FLUSHER"),
    PRCTL.when(0, 58, "PR_GET_IO_FLUSHER"),
    deny(157, "prctl", EINVAL).note("it would turn calls into signals before the supervisor sees them").when(
        0,
        59,
        "PR_SET_SYSCALL_USER_DISPATCH",
    ),
    PRCTL.when(0, 65, "PR_SET_MDWE"),
    PRCTL.when(0, 66, "PR_GET_MDWE"),
    PRCTL.when(0, 67, "PR_SET_MEMORY_MERGE"),
    PRCTL.when(0, 68, "PR_GET_MEMORY_MERGE"),
    PRCTL.when(0, 0x5961_6d61, "PR_SET_PTRACER"),
    local(157, "prctl", &[Hex, Int, Addr, Int, Str]).when(0, 0x5356_4d41, "PR_SET_VMA"),
    local(157, "prctl", &[Hex, Out(Len::Arg(2), Used::Result), Int, Int, Int]).when(0, 0x4155_5856, "PR_GET_AUXV"),
];

const ARCH: Row = local(158, "arch_prctl", &[Hex, Addr]);
const ARCH_OUT8: Row = local(158, "arch_prctl", &[Hex, OUT8]);
/// What the processor and the kernel can do: another host may answer otherwise.
const ARCH_HOST: Row = own(158, "arch_prctl", &[Hex, OUT8]);
const ARCH_CPUID: Row = local(158, "arch_prctl", &[Hex, Int])
    .irregular()
    .note("the supervisor traps cpuid: the program's own choice is only remembered");

const ARCH_COMMANDS: &[Command] = &[
    ARCH.when(0, 0x1001, "ARCH_SET_GS"),
    ARCH.when(0, 0x1002, "ARCH_SET_FS"),
    ARCH_OUT8.when(0, 0x1003, "ARCH_GET_FS"),
    ARCH_OUT8.when(0, 0x1004, "ARCH_GET_GS"),
    ARCH_CPUID.when(0, 0x1011, "ARCH_GET_CPUID"),
    ARCH_CPUID.when(0, 0x1012, "ARCH_SET_CPUID"),
    ARCH_HOST.when(0, 0x1021, "ARCH_GET_XCOMP_SUPP"),
    ARCH_HOST.when(0, 0x1022, "ARCH_GET_XCOMP_PERM"),
    ARCH.when(0, 0x1023, "ARCH_REQ_XCOMP_PERM"),
    ARCH_HOST.when(0, 0x1024, "ARCH_GET_XCOMP_GUEST_PERM"),
    ARCH.when(0, 0x1025, "ARCH_REQ_XCOMP_GUEST_PERM"),
    // Old glibc asks this one, with an address, of kernels that never had it.
    ARCH.when(0, 0x3001, "ARCH_CET_STATUS"),
    ARCH_HOST.when(0, 0x4001, "ARCH_GET_UNTAG_MASK"),
    ARCH_HOST.when(0, 0x4003, "ARCH_GET_MAX_TAG_BITS"),
    ARCH.when(0, 0x5001, "ARCH_SHSTK_ENABLE"),
    ARCH.when(0, 0x5002, "ARCH_SHSTK_DISABLE"),
    ARCH.when(0, 0x5003, "ARCH_SHSTK_LOCK"),
    ARCH.when(0, 0x5004, "ARCH_SHSTK_UNLOCK"),
    ARCH_OUT8.when(0, 0x5005, "ARCH_SHSTK_STATUS"),
];

/// `CLOSE_RANGE_UNSHARE`.
const CLOSE_RANGE_COMMANDS: &[Command] = &[file::UNSHARING_CLOSE.when(2, 2, "CLOSE_RANGE_UNSHARE").masked(2)];

/// Ascending by number.
const AREAS: [&[Command]; 8] = [
    ioctl::COMMANDS,
    memory::COMMANDS,
    net::COMMANDS,
    FCNTL_COMMANDS,
    PRCTL_COMMANDS,
    ARCH_COMMANDS,
    process::COMMANDS,
    CLOSE_RANGE_COMMANDS,
];

const COUNT: usize = {
    let mut n = 0;
    let mut a = 0;
    while a < AREAS.len() {
        n += AREAS[a].len();
        a += 1;
    }
    n
};

static TABLE: [Command; COUNT] = {
    let mut all = [AREAS[0][0]; COUNT];
    let (mut n, mut a) = (0, 0);
    while a < AREAS.len() {
        let mut i = 0;
        while i < AREAS[a].len() {
            all[n] = AREAS[a][i];
            n += 1;
            i += 1;
        }
        a += 1;
    }
    all
};

/// All commands; those of one call stand together, and the first that matches counts.
pub static COMMANDS: &[Command] = &TABLE;

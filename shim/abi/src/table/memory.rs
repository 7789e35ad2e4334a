//! Memory of the process.

use super::make::*;
use super::{Command, Len, Row, Used};

const PKEY: &str = "protection keys are refused: programs fall back to mprotect";

pub(super) const ROWS: &[Row] = &[
    local(9, "mmap", &[Addr, Int, Hex, Hex, Fd, Int]).irregular().note("the logged address is imposed in replay"),
    local(10, "mprotect", &[Addr, Int, Hex]),
    local(11, "munmap", &[Addr, Int]),
    local(12, "brk", &[Addr]),
    local(25, "mremap", &[Addr, Int, Int, Hex, Addr]).irregular().note("the logged address is imposed in replay"),
    local(26, "msync", &[Addr, Int, Hex]),
    own(27, "mincore", &[Addr, Int, Out(Len::Pages(1), Used::All)]),
    local(28, "madvise", &[Addr, Int, Int]),
    local(149, "mlock", &[Addr, Int]),
    local(150, "munlock", &[Addr, Int]),
    local(151, "mlockall", &[Hex]),
    local(152, "munlockall", &[]),
    unknown(216, "remap_file_pages", &[Addr, Int, Hex, Int, Hex]),
    local(237, "mbind", &[Addr, Int, Hex, In(Len::Bits(4, 1)), Int, Hex]),
    local(238, "set_mempolicy", &[Hex, In(Len::Bits(2, 1)), Int]),
    own(239, "get_mempolicy", &[OUT4, Out(Len::Bits(2, 1), Used::All), Int, Addr, Hex]),
    unknown(256, "migrate_pages", &[Pid, Int, Addr, Addr]),
    unknown(279, "move_pages", &[Pid, Int, Addr, Addr, Addr, Hex]),
    deny(323, "userfaultfd", ENOSYS).note("page faults would be handled outside the log"),
    local(324, "membarrier", &[Int, Hex, Int]),
    local(325, "mlock2", &[Addr, Int, Hex]),
    deny(329, "pkey_mprotect", ENOSYS).note(PKEY),
    deny(330, "pkey_alloc", ENOSYS).note(PKEY),
    deny(331, "pkey_free", ENOSYS).note(PKEY),
    unknown(440, "process_madvise", &[Fd, Addr, Int, Int, Hex]),
    unknown(447, "memfd_secret", &[Hex]).note("its pages cannot be read into a checkpoint"),
    unknown(448, "process_mrelease", &[Fd, Hex]),
    local(450, "set_mempolicy_home_node", &[Addr, Int, Int, Hex]),
    local(453, "map_shadow_stack", &[Addr, Int, Hex]).irregular().note("the logged address is imposed in replay"),
    local(462, "mseal", &[Addr, Int, Hex]).note("sealed mappings cannot be moved by a restore"),
];

const MADVISE: Row = local(28, "madvise", &[Addr, Int, Int]);
const MADVISE_UNKNOWN: Row = unknown(28, "madvise", &[Addr, Int, Int]);

/// Advice that is more than a hint with a fixed effect.
pub(super) const COMMANDS: &[Command] = &[
    MADVISE.irregular().note("when the pages go is up to the kernel: carried out as MADV_DONTNEED").when(
        2,
        8,
        "MADV_FREE",
    ),
    MADVISE_UNKNOWN.note("punches a hole in a file").when(2, 9, "MADV_REMOVE"),
    MADVISE_UNKNOWN.when(2, 100, "MADV_HWPOISON"),
    MADVISE_UNKNOWN.when(2, 101, "MADV_SOFT_OFFLINE"),
];

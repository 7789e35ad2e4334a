//! Descriptors, files, directories, polling.

use super::Effect::*;
use super::make::*;
use super::{Arg, Len, Place, Row, Used};

/// `(buffer, size)`: `result` bytes of the buffer in the preceding argument are used.
const BUF1: Arg = Out(Len::Arg(1), Used::Result);
const BUF2: Arg = Out(Len::Arg(2), Used::Result);
const BUF3: Arg = Out(Len::Arg(3), Used::Result);
/// The same where the kernel takes the size as a 32-bit number.
const BUF2_32: Arg = Out(Len::Arg32(2), Used::Result);
const BUF3_32: Arg = Out(Len::Arg32(3), Used::Result);
const STATFS: Arg = Out(Len::Fixed(120), Used::All);
const STATX: Arg = Out(Len::Fixed(256), Used::All);
const EPOLL_EVENTS: Arg = Out(Len::ArgTimes(2, 12), Used::ResultTimes(12));
const POLLFDS: Arg = InOut(Len::ArgTimes(1, 8));
const FD_SET: Arg = InOut(Len::Bits(0, 0));

const FIFO: &str = "opening one end of a FIFO whose other end is closed waits";
const SIGNALFD: &str = "reading depends on the signals of the reader itself";
const ACCESS: &str = "asks with the real user and group of whoever executes it";

pub(super) const ROWS: &[Row] = &[
    input(0, "read", &[Fd, BUF2, Int]).does(Take).readable(),
    output(1, "write", &[Fd, In(Len::Arg(2)), Int]).does(Give).writable(),
    object(2, "open", &[Path, Hex, Hex]).does(Open(0)).note(FIFO),
    object(3, "close", &[Fd]).does(Close).note("with SO_LINGER it waits until the data is sent"),
    input(4, "stat", &[Path, OUT144]),
    input(5, "fstat", &[Fd, OUT144]),
    input(6, "lstat", &[Path, OUT144]),
    input(7, "poll", &[POLLFDS, Int, Int]).special(),
    object(8, "lseek", &[Fd, Int, Int]).does(Seek),
    unknown(16, "ioctl", &[Fd, Hex, Addr]).note("commands that are not listed are unknown"),
    input(17, "pread64", &[Fd, BUF2, Int, Int]).readable(),
    output(18, "pwrite64", &[Fd, In(Len::Arg(2)), Int, Int]).does(GiveAt).writable(),
    input(19, "readv", &[Fd, IovOut(2), Int]).does(Take).readable(),
    output(20, "writev", &[Fd, IovIn(2), Int]).does(Give).writable(),
    input(21, "access", &[Path, Hex]).note(ACCESS),
    object(22, "pipe", &[OUT8]).does(Pipe),
    input(23, "select", &[Int, FD_SET, FD_SET, FD_SET, INOUT16]).special(),
    object(32, "dup", &[Fd]).does(Duplicate),
    object(33, "dup2", &[Fd, Fd]).does(Onto),
    output(40, "sendfile", &[Fd, Fd, INOUT8, Int]).does(Transfer(1, 0)).special(),
    unknown(72, "fcntl", &[Fd, Hex, Addr]).note("commands that are not listed are unknown"),
    object(73, "flock", &[Fd, Hex]).does(FileLock).special(),
    output(74, "fsync", &[Fd]),
    output(75, "fdatasync", &[Fd]),
    output(76, "truncate", &[Path, Int]),
    output(77, "ftruncate", &[Fd, Int]).does(Resize),
    input(78, "getdents", &[Fd, BUF2_32, Int]).does(TakeEntries),
    input(79, "getcwd", &[BUF1, Int]),
    object(80, "chdir", &[Path]).does(Directory),
    object(81, "fchdir", &[Fd]).does(DirectoryOf),
    output(82, "rename", &[Path, Path]).does(Rename(0, 1)),
    output(83, "mkdir", &[Path, Hex]).does(Make(0)),
    output(84, "rmdir", &[Path]).does(Remove(0)),
    object(85, "creat", &[Path, Hex]).does(Open(0)).note(FIFO),
    output(86, "link", &[Path, Path]).does(Make(1)),
    output(87, "unlink", &[Path]).does(Remove(0)),
    output(88, "symlink", &[Str, Path]).does(Make(1)),
    input(89, "readlink", &[Path, BUF2_32, Int]),
    output(90, "chmod", &[Path, Hex]),
    output(91, "fchmod", &[Fd, Hex]),
    output(92, "chown", &[Path, Int, Int]),
    output(93, "fchown", &[Fd, Int, Int]),
    output(94, "lchown", &[Path, Int, Int]),
    object(95, "umask", &[Hex]).does(Mask),
    output(132, "utime", &[Path, IN16]),
    output(133, "mknod", &[Path, Hex, Hex]).does(Make(0)),
    input(136, "ustat", &[Int, OUT32]),
    input(137, "statfs", &[Path, STATFS]),
    input(138, "fstatfs", &[Fd, STATFS]),
    object(161, "chroot", &[Path]),
    output(162, "sync", &[]),
    object(187, "readahead", &[Fd, Int, Int]),
    output(188, "setxattr", &[Path, Str, In(Len::Arg(3)), Int, Hex]),
    output(189, "lsetxattr", &[Path, Str, In(Len::Arg(3)), Int, Hex]),
    output(190, "fsetxattr", &[Fd, Str, In(Len::Arg(3)), Int, Hex]),
    input(191, "getxattr", &[Path, Str, BUF3, Int]),
    input(192, "lgetxattr", &[Path, Str, BUF3, Int]),
    input(193, "fgetxattr", &[Fd, Str, BUF3, Int]),
    input(194, "listxattr", &[Path, BUF2, Int]),
    input(195, "llistxattr", &[Path, BUF2, Int]),
    input(196, "flistxattr", &[Fd, BUF2, Int]),
    output(197, "removexattr", &[Path, Str]),
    output(198, "lremovexattr", &[Path, Str]),
    output(199, "fremovexattr", &[Fd, Str]),
    object(213, "epoll_create", &[Int]).does(Epoll),
    input(217, "getdents64", &[Fd, BUF2_32, Int]).does(TakeEntries),
    object(221, "fadvise64", &[Fd, Int, Int, Int]),
    input(232, "epoll_wait", &[Fd, EPOLL_EVENTS, Int, Int]).special(),
    object(233, "epoll_ctl", &[Fd, Int, Fd, In(Len::Fixed(12))]).does(Enrol),
    output(235, "utimes", &[Path, IN32]),
    object(253, "inotify_init", &[]).does(Opaque),
    object(254, "inotify_add_watch", &[Fd, Path, Hex]),
    object(255, "inotify_rm_watch", &[Fd, Int]),
    object(257, "openat", &[DirFd, Path, Hex, Hex]).does(Open(1)).note(FIFO),
    output(258, "mkdirat", &[DirFd, Path, Hex]).does(Make(1)),
    output(259, "mknodat", &[DirFd, Path, Hex, Hex]).does(Make(1)),
    output(260, "fchownat", &[DirFd, Path, Int, Int, Hex]),
    output(261, "futimesat", &[DirFd, Path, IN32]),
    input(262, "newfstatat", &[DirFd, Path, OUT144, Hex]),
    output(263, "unlinkat", &[DirFd, Path, Hex]).does(Remove(1)),
    output(264, "renameat", &[DirFd, Path, DirFd, Path]).does(Rename(1, 3)),
    output(265, "linkat", &[DirFd, Path, DirFd, Path, Hex]).does(Make(3)),
    output(266, "symlinkat", &[Str, DirFd, Path]).does(Make(2)),
    input(267, "readlinkat", &[DirFd, Path, BUF3_32, Int]),
    output(268, "fchmodat", &[DirFd, Path, Hex]),
    input(269, "faccessat", &[DirFd, Path, Hex]).note(ACCESS),
    input(270, "pselect6", &[Int, FD_SET, FD_SET, FD_SET, INOUT16, IN16])
        .special()
        .note("the last argument holds the address and size of the signal mask"),
    input(271, "ppoll", &[POLLFDS, Int, INOUT16, IN8, Int]).special(),
    output(275, "splice", &[Fd, INOUT8, Fd, INOUT8, Int, Hex]).does(Transfer(0, 2)).special(),
    output(276, "tee", &[Fd, Fd, Int, Hex]).does(Transfer(0, 1)).special(),
    output(277, "sync_file_range", &[Fd, Int, Int, Hex]),
    unknown(278, "vmsplice", &[Fd, Addr, Int, Hex]).special().note("leaves references to the caller's pages in a pipe"),
    output(280, "utimensat", &[DirFd, Path, IN32, Hex]),
    input(281, "epoll_pwait", &[Fd, EPOLL_EVENTS, Int, Int, IN8, Int]).special(),
    object(282, "signalfd", &[Fd, IN8, Int]).does(Signals).irregular().note(SIGNALFD),
    object(283, "timerfd_create", &[Int, Hex]).does(Timer),
    object(284, "eventfd", &[Int]).does(Counter),
    output(285, "fallocate", &[Fd, Hex, Int, Int]).does(Rewrite),
    object(286, "timerfd_settime", &[Fd, Hex, IN32, OUT32]).does(SetTimer),
    input(287, "timerfd_gettime", &[Fd, OUT32]),
    object(289, "signalfd4", &[Fd, IN8, Int, Hex]).does(Signals).irregular().note(SIGNALFD),
    object(290, "eventfd2", &[Int, Hex]).does(Counter),
    object(291, "epoll_create1", &[Hex]).does(Epoll),
    object(292, "dup3", &[Fd, Fd, Hex]).does(Onto),
    object(293, "pipe2", &[OUT8, Hex]).does(Pipe),
    object(294, "inotify_init1", &[Hex]).does(Opaque),
    input(295, "preadv", &[Fd, IovOut(2), Int, Int, Int]).readable(),
    output(296, "pwritev", &[Fd, IovIn(2), Int, Int, Int]).does(GiveAt).writable(),
    output(306, "syncfs", &[Fd]),
    output(316, "renameat2", &[DirFd, Path, DirFd, Path, Hex]).does(Rename(1, 3)),
    object(319, "memfd_create", &[Str, Hex]).does(MemoryFile),
    output(326, "copy_file_range", &[Fd, INOUT8, Fd, INOUT8, Int, Hex]).does(Transfer(0, 2)),
    input(327, "preadv2", &[Fd, IovOut(2), Int, Int, Int, Hex]).readable(),
    output(328, "pwritev2", &[Fd, IovIn(2), Int, Int, Int, Hex]).does(Rewrite).writable(),
    input(332, "statx", &[DirFd, Path, Hex, Hex, STATX]),
    object(436, "close_range", &[Int, Int, Hex]).does(CloseRange),
    object(437, "openat2", &[DirFd, Path, In(Len::Arg(3)), Int]).does(Open(1)).note(FIFO),
    input(439, "faccessat2", &[DirFd, Path, Hex, Hex]).note(ACCESS),
    input(441, "epoll_pwait2", &[Fd, EPOLL_EVENTS, Int, IN16, IN8, Int]).special(),
    input(451, "cachestat", &[Fd, IN16, Out(Len::Fixed(40), Used::All), Hex]),
    output(452, "fchmodat2", &[DirFd, Path, Hex, Hex]),
    input(465, "listxattrat", &[DirFd, Path, Hex, Out(Len::Arg(4), Used::Result), Int]),
    output(466, "removexattrat", &[DirFd, Path, Hex, Str]),
    input(468, "file_getattr", &[DirFd, Path, Out(Len::Arg(3), Used::All), Int, Hex]),
    output(469, "file_setattr", &[DirFd, Path, In(Len::Arg(3)), Int, Hex]),
];

/// Descriptor calls whose treatment hangs on a flag.
pub(super) const UNSHARING_CLOSE: Row = control(436, "close_range", &[Int, Int, Hex])
    .place(Place::Unit)
    .note("CLOSE_RANGE_UNSHARE ends the sharing of the descriptor table");

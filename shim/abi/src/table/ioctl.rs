//! Commands of `ioctl`.

use super::Effect::*;
use super::make::*;
use super::{Arg, Class, Command, Len, Place, Row, Used};

/// Number of `ioctl`.
pub(super) const NR: u16 = 16;

const fn get(arg: &'static [Arg]) -> Row {
    input(NR, "ioctl", arg)
}
const fn set(arg: &'static [Arg]) -> Row {
    object(NR, "ioctl", arg)
}

const fn own_process(mut row: Row) -> Row {
    row.place = Place::Unit;
    row.note = "concerns the caller's session";
    row
}
const fn visible(mut row: Row) -> Row {
    row.class = Class::Output;
    row
}

const NONE: Row = set(&[Fd, Hex]);
const INT: Row = set(&[Fd, Hex, Int]);
const GET4: Row = get(&[Fd, Hex, OUT4]);
const GET8: Row = get(&[Fd, Hex, OUT8]);
const SET4: Row = set(&[Fd, Hex, IN4]);
const SET8: Row = set(&[Fd, Hex, IN8]);
/// The kernel's `struct termios` has 36 bytes (libc's has 60), `termios2` 44, `termio` 18.
const GET_TERMIOS: Row = get(&[Fd, Hex, OUT36]);
const SET_TERMIOS: Row = set(&[Fd, Hex, IN36]);
const GET_TERMIOS2: Row = get(&[Fd, Hex, Out(Len::Fixed(44), Used::All)]);
const SET_TERMIOS2: Row = set(&[Fd, Hex, In(Len::Fixed(44))]);
const GET_TERMIO: Row = get(&[Fd, Hex, Out(Len::Fixed(18), Used::All)]);
const SET_TERMIO: Row = set(&[Fd, Hex, In(Len::Fixed(18))]);
/// `struct ifreq` is 40 bytes.
const GET_IF: Row = get(&[Fd, Hex, INOUT40]);
const SET_IF: Row = visible(set(&[Fd, Hex, IN40]));
const UNKNOWN: Row = unknown(NR, "ioctl", &[Fd, Hex, Addr]);
const POINTERS: Row = UNKNOWN.note("the argument holds addresses of further memory");
const FLEXIBLE: Row = UNKNOWN.note("the argument is longer than its number says");

/// An `ioctl` that is not listed, but whose number says which way its argument goes and how long
/// it is. The argument may still hold further addresses, so the call stays unknown.
pub(super) static BY_SIZE: [Row; 4] = [
    UNKNOWN,
    unknown(NR, "ioctl", &[Fd, Hex, In(Len::IocSize(1))]),
    unknown(NR, "ioctl", &[Fd, Hex, Out(Len::IocSize(1), Used::All)]),
    unknown(NR, "ioctl", &[Fd, Hex, InOut(Len::IocSize(1))]),
];

pub(super) const COMMANDS: &[Command] = &[
    // The most frequent first.
    SET4.does(NonBlocking).when(1, 0x5421, "FIONBIO"),
    GET_TERMIOS.when(1, 0x5401, "TCGETS"),
    GET4.when(1, 0x541b, "FIONREAD"),
    GET8.when(1, 0x5413, "TIOCGWINSZ"),
    own_process(GET4).when(1, 0x540f, "TIOCGPGRP"),
    own_process(SET4).when(1, 0x5410, "TIOCSPGRP"),
    NONE.does(CloseOnExec(true)).when(1, 0x5451, "FIOCLEX"),
    NONE.does(CloseOnExec(false)).when(1, 0x5450, "FIONCLEX"),
    SET4.when(1, 0x5452, "FIOASYNC"),
    GET4.when(1, 0x5411, "TIOCOUTQ"),
    // Terminals.
    SET_TERMIOS.when(1, 0x5402, "TCSETS"),
    SET_TERMIOS.note("waits until the output is drained").when(1, 0x5403, "TCSETSW"),
    SET_TERMIOS.note("waits until the output is drained").when(1, 0x5404, "TCSETSF"),
    GET_TERMIO.when(1, 0x5405, "TCGETA"),
    SET_TERMIO.when(1, 0x5406, "TCSETA"),
    SET_TERMIO.when(1, 0x5407, "TCSETAW"),
    SET_TERMIO.when(1, 0x5408, "TCSETAF"),
    INT.note("waits until the output is drained").when(1, 0x5409, "TCSBRK"),
    INT.when(1, 0x540a, "TCXONC"),
    INT.when(1, 0x540b, "TCFLSH"),
    NONE.when(1, 0x540c, "TIOCEXCL"),
    NONE.when(1, 0x540d, "TIOCNXCL"),
    own_process(INT).when(1, 0x540e, "TIOCSCTTY"),
    set(&[Fd, Hex, In(Len::Fixed(1))]).when(1, 0x5412, "TIOCSTI"),
    SET8.when(1, 0x5414, "TIOCSWINSZ"),
    GET4.when(1, 0x5415, "TIOCMGET"),
    SET4.when(1, 0x5416, "TIOCMBIS"),
    SET4.when(1, 0x5417, "TIOCMBIC"),
    SET4.when(1, 0x5418, "TIOCMSET"),
    GET4.when(1, 0x5419, "TIOCGSOFTCAR"),
    SET4.when(1, 0x541a, "TIOCSSOFTCAR"),
    SET4.when(1, 0x5420, "TIOCPKT"),
    own_process(NONE).when(1, 0x5422, "TIOCNOTTY"),
    SET4.when(1, 0x5423, "TIOCSETD"),
    GET4.when(1, 0x5424, "TIOCGETD"),
    INT.note("waits until the output is drained").when(1, 0x5425, "TCSBRKP"),
    NONE.when(1, 0x5427, "TIOCSBRK"),
    NONE.when(1, 0x5428, "TIOCCBRK"),
    own_process(GET4).when(1, 0x5429, "TIOCGSID"),
    GET_TERMIOS2.when(1, 0x802c_542a, "TCGETS2"),
    SET_TERMIOS2.when(1, 0x402c_542b, "TCSETS2"),
    SET_TERMIOS2.note("waits until the output is drained").when(1, 0x402c_542c, "TCSETSW2"),
    SET_TERMIOS2.note("waits until the output is drained").when(1, 0x402c_542d, "TCSETSF2"),
    GET4.when(1, 0x8004_5430, "TIOCGPTN"),
    SET4.when(1, 0x4004_5431, "TIOCSPTLCK"),
    GET4.when(1, 0x8004_5432, "TIOCGDEV"),
    GET4.when(1, 0x8004_5438, "TIOCGPKT"),
    GET4.when(1, 0x8004_5439, "TIOCGPTLCK"),
    GET4.when(1, 0x8004_5440, "TIOCGEXCL"),
    INT.does(Opaque).when(1, 0x5441, "TIOCGPTPEER"),
    get(&[Fd, Hex, Out(Len::Fixed(1), Used::All)]).when(1, 0x4b33, "KDGKBTYPE"),
    // Any descriptor and files.
    GET8.when(1, 0x5460, "FIOQSIZE"),
    get(&[Fd, Hex, INOUT4]).when(1, 1, "FIBMAP"),
    GET4.when(1, 2, "FIGETBSZ"),
    visible(set(&[Fd, Hex, Fd])).when(1, 0x4004_9409, "FICLONE"),
    visible(set(&[Fd, Hex, IN32])).when(1, 0x4020_940d, "FICLONERANGE"),
    FLEXIBLE.when(1, 0xc018_9436, "FIDEDUPERANGE"),
    FLEXIBLE.when(1, 0xc020_660b, "FS_IOC_FIEMAP"),
    // Their numbers say 8 bytes, the kernel moves an int.
    GET4.when(1, 0x8008_6601, "FS_IOC_GETFLAGS"),
    visible(SET4).when(1, 0x4008_6602, "FS_IOC_SETFLAGS"),
    GET4.when(1, 0x8008_7601, "FS_IOC_GETVERSION"),
    visible(SET4).when(1, 0x4008_7602, "FS_IOC_SETVERSION"),
    get(&[Fd, Hex, Out(Len::Fixed(28), Used::All)]).when(1, 0x801c_581f, "FS_IOC_FSGETXATTR"),
    visible(set(&[Fd, Hex, In(Len::Fixed(28))])).when(1, 0x401c_5820, "FS_IOC_FSSETXATTR"),
    SET8.when(1, 0x4008_5400, "TFD_IOC_SET_TICKS"),
    SET8.when(1, 0x4008_8a01, "EPIOCSPARAMS"),
    GET8.when(1, 0x8008_8a02, "EPIOCGPARAMS"),
    GET4.when(1, 0x8004_5200, "RNDGETENTCNT"),
    // Block devices.
    GET4.when(1, 0x125e, "BLKROGET"),
    GET8.when(1, 0x1260, "BLKGETSIZE"),
    visible(NONE).when(1, 0x1261, "BLKFLSBUF"),
    GET8.when(1, 0x1263, "BLKRAGET"),
    GET2.when(1, 0x1267, "BLKSECTGET"),
    GET4.when(1, 0x1268, "BLKSSZGET"),
    GET4.when(1, 0x8008_1270, "BLKBSZGET"),
    GET8.when(1, 0x8008_1272, "BLKGETSIZE64"),
    visible(set(&[Fd, Hex, IN16])).when(1, 0x1277, "BLKDISCARD"),
    GET4.when(1, 0x1278, "BLKIOMIN"),
    GET4.when(1, 0x1279, "BLKIOOPT"),
    GET4.when(1, 0x127a, "BLKALIGNOFF"),
    GET4.when(1, 0x127b, "BLKPBSZGET"),
    GET4.when(1, 0x127c, "BLKDISCARDZEROES"),
    GET2.when(1, 0x127e, "BLKROTATIONAL"),
    visible(set(&[Fd, Hex, IN16])).when(1, 0x127f, "BLKZEROOUT"),
    POINTERS.when(1, 0x1269, "BLKPG"),
    // Sockets and network interfaces.
    SET4.when(1, 0x8901, "FIOSETOWN"),
    SET4.when(1, 0x8902, "SIOCSPGRP"),
    GET4.when(1, 0x8903, "FIOGETOWN"),
    GET4.when(1, 0x8904, "SIOCGPGRP"),
    GET4.when(1, 0x8905, "SIOCATMARK"),
    get(&[Fd, Hex, OUT16]).when(1, 0x8906, "SIOCGSTAMP"),
    get(&[Fd, Hex, OUT16]).when(1, 0x8907, "SIOCGSTAMPNS"),
    GET_IF.when(1, 0x8910, "SIOCGIFNAME"),
    POINTERS.when(1, 0x8912, "SIOCGIFCONF"),
    GET_IF.when(1, 0x8913, "SIOCGIFFLAGS"),
    SET_IF.when(1, 0x8914, "SIOCSIFFLAGS"),
    GET_IF.when(1, 0x8915, "SIOCGIFADDR"),
    SET_IF.when(1, 0x8916, "SIOCSIFADDR"),
    GET_IF.when(1, 0x8917, "SIOCGIFDSTADDR"),
    SET_IF.when(1, 0x8918, "SIOCSIFDSTADDR"),
    GET_IF.when(1, 0x8919, "SIOCGIFBRDADDR"),
    SET_IF.when(1, 0x891a, "SIOCSIFBRDADDR"),
    GET_IF.when(1, 0x891b, "SIOCGIFNETMASK"),
    SET_IF.when(1, 0x891c, "SIOCSIFNETMASK"),
    GET_IF.when(1, 0x891d, "SIOCGIFMETRIC"),
    SET_IF.when(1, 0x891e, "SIOCSIFMETRIC"),
    GET_IF.when(1, 0x891f, "SIOCGIFMEM"),
    GET_IF.when(1, 0x8921, "SIOCGIFMTU"),
    SET_IF.when(1, 0x8922, "SIOCSIFMTU"),
    SET_IF.when(1, 0x8923, "SIOCSIFNAME"),
    SET_IF.when(1, 0x8924, "SIOCSIFHWADDR"),
    GET_IF.when(1, 0x8927, "SIOCGIFHWADDR"),
    GET_IF.when(1, 0x8929, "SIOCGIFSLAVE"),
    GET_IF.when(1, 0x8933, "SIOCGIFINDEX"),
    SET_IF.when(1, 0x8934, "SIOCSIFPFLAGS"),
    GET_IF.when(1, 0x8935, "SIOCGIFPFLAGS"),
    GET_IF.when(1, 0x8938, "SIOCGIFCOUNT"),
    GET_IF.when(1, 0x8942, "SIOCGIFTXQLEN"),
    SET_IF.when(1, 0x8943, "SIOCSIFTXQLEN"),
    POINTERS.when(1, 0x8946, "SIOCETHTOOL"),
    GET_IF.when(1, 0x8970, "SIOCGIFMAP"),
    // TUN and TAP: the numbers of the first two say 4 bytes, the kernel moves a struct ifreq.
    set(&[Fd, Hex, INOUT40]).when(1, 0x4004_54ca, "TUNSETIFF"),
    get(&[Fd, Hex, Out(Len::Fixed(40), Used::All)]).when(1, 0x8004_54d2, "TUNGETIFF"),
    INT.when(1, 0x4004_54cb, "TUNSETPERSIST"),
    INT.when(1, 0x4004_54cc, "TUNSETOWNER"),
    GET4.when(1, 0x8004_54cf, "TUNGETFEATURES"),
    INT.when(1, 0x4004_54d0, "TUNSETOFFLOAD"),
    GET4.when(1, 0x8004_54d7, "TUNGETVNETHDRSZ"),
    SET4.when(1, 0x4004_54d8, "TUNSETVNETHDRSZ"),
];

const GET2: Row = get(&[Fd, Hex, OUT2]);

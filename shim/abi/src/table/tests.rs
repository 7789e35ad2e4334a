use super::*;

/// Numbers of x86-64 as of Linux 6.17, without 335 and 336 (the kernel's own, for uprobes).
const COUNT: usize = 335 + (469 - 424 + 1);

const NO_ARGS: [u64; 6] = [0; 6];

/// Arguments with `value` at place `i`.
fn with(i: usize, value: u64) -> [u64; 6] {
    let mut args = NO_ARGS;
    args[i] = value;
    args
}

/// The row's invariants; `what` names it in failures.
fn check(row: &Row, what: &str) {
    assert!(!row.name.is_empty(), "{what}");
    assert!(row.args.len() <= 6, "{what}");
    assert_eq!(row.class == Class::Deny, row.deny_errno > 0, "{what}: errno");
    if row.class == Class::Local {
        assert_eq!(row.place, Place::Unit, "{what}: local calls run in the unit");
    }
    if matches!(row.class, Class::Unknown | Class::Deny) {
        assert!(!row.irregular, "{what}: no handler for it");
    }
    if row.class == Class::Unknown {
        assert_eq!(row.place, Place::Unit, "{what}");
    }
    if row.class == Class::Control {
        assert!(row.irregular, "{what}");
    }
    if row.wait == Wait::Special {
        assert!(row.irregular || row.class == Class::Unknown, "{what}: who waits?");
    }
    if let Wait::Readable(i) | Wait::Writable(i) = row.wait {
        assert_eq!(row.args[usize::from(i)], Arg::Fd, "{what}: waits for a descriptor");
        assert_eq!(row.place, Place::Supervisor, "{what}");
    }
    for arg in row.args {
        match *arg {
            Arg::In(len) | Arg::InOut(len) => check_len(row, len, what),
            Arg::Out(len, used) => {
                check_len(row, len, what);
                if let Used::U32At(i) = used {
                    check_pointer(row, i, what);
                }
            }
            Arg::IovIn(i) | Arg::IovOut(i) => check_number(row, i, what),
            _ => {}
        }
    }
}

fn check_number(row: &Row, i: u8, what: &str) {
    assert_eq!(row.args[usize::from(i)], Arg::Int, "{what}: argument {i} is no number");
}

fn check_pointer(row: &Row, i: u8, what: &str) {
    let arg = row.args[usize::from(i)];
    assert!(matches!(arg, Arg::InOut(Len::Fixed(4)) | Arg::In(Len::U32At(_))), "{what}: argument {i} holds no length");
}

fn check_len(row: &Row, len: Len, what: &str) {
    match len {
        Len::Fixed(n) => assert!(n > 0 && n <= 4096, "{what}"),
        Len::Arg(i) | Len::Arg32(i) | Len::Pages(i) => check_number(row, i, what),
        Len::ArgTimes(i, n) => {
            assert!(n > 0, "{what}");
            check_number(row, i, what);
        }
        Len::Bits(i, less) => {
            assert!(less <= 1, "{what}");
            check_number(row, i, what);
        }
        Len::IocSize(i) => assert_eq!((row.name, i), ("ioctl", 1), "{what}"),
        Len::U32At(i) => check_pointer(row, i, what),
    }
}

#[test]
fn every_number_has_a_row() {
    assert_eq!(ROWS.len(), COUNT);
    for nr in (0..=334).chain(424..=469) {
        assert_eq!(by_number(nr).map(|r| u64::from(r.nr)), Some(nr));
    }
}

#[test]
fn rows_ascend_and_names_are_unique() {
    for pair in ROWS.windows(2) {
        assert!(pair[0].nr < pair[1].nr, "{} {}", pair[0].name, pair[1].name);
    }
    for row in ROWS {
        assert_eq!(by_name(row.name).map(|r| r.nr), Some(row.nr), "{}", row.name);
        assert_eq!(row.command, "", "{}", row.name);
    }
    assert_eq!(by_name("no such call"), None);
}

#[test]
fn rows_are_consistent() {
    for row in ROWS {
        check(row, row.name);
    }
    for row in &ioctl::BY_SIZE {
        check(row, "ioctl");
    }
}

#[test]
fn commands_are_consistent() {
    for (i, c) in COMMANDS.iter().enumerate() {
        let what = c.row.command;
        check(&c.row, what);
        let base = by_number(u64::from(c.nr)).expect("a command of a listed call");
        assert_eq!((c.row.nr, c.row.name), (c.nr, base.name), "{what}");
        assert!(!what.is_empty());
        assert!(base.args.len() > usize::from(c.arg), "{what}");
        assert!(matches!(base.args[usize::from(c.arg)], Arg::Hex | Arg::Int), "{what}");
        assert!(c.also.is_none_or(|(arg, _)| arg != c.arg && arg < 6), "{what}");
        let twins = COMMANDS
            .iter()
            .filter(|d| (d.nr, d.arg, d.value, d.mask, d.also) == (c.nr, c.arg, c.value, c.mask, c.also));
        assert_eq!(twins.count(), 1, "{what} (entry {i}) is listed twice");
    }
}

#[test]
fn lookup_finds_every_row_and_command() {
    // No command of any call has this value in all its arguments.
    let args = [0x7fff_ff00; 6];
    for row in ROWS {
        let found = lookup(u64::from(row.nr), &args);
        if row.nr == ioctl::NR || row.name == "futex" {
            assert_eq!(found.name, row.name);
        } else {
            assert_eq!(&found, row);
        }
    }
    for c in COMMANDS {
        let mut args = with(usize::from(c.arg), c.value);
        if let Some((arg, value)) = c.also {
            args[usize::from(arg)] = u64::from(value);
        }
        assert_eq!(lookup(u64::from(c.nr), &args), c.row);
        // The kernel looks at 32 bits of a command.
        args[usize::from(c.arg)] |= 0xffff_ffff << 32;
        assert_eq!(lookup(u64::from(c.nr), &args), c.row);
    }
}

#[test]
fn unlisted_numbers_and_commands_are_unknown() {
    for nr in [335, 423, 470, 511, 512, 65535, 65536, 1 << 30, u64::MAX] {
        let row = lookup(nr, &NO_ARGS);
        assert_eq!(row.class, Class::Unknown);
        assert_eq!(row.place, Place::Unit);
        assert_eq!(u64::from(row.nr), nr.min(65535));
    }
    for name in ["fcntl", "ioctl", "prctl", "arch_prctl"] {
        let nr = u64::from(by_name(name).expect("a row").nr);
        assert_eq!(lookup(nr, &[0x7fff_ff00; 6]).class, Class::Unknown, "{name}");
    }
}

#[test]
fn an_unlisted_ioctl_is_described_by_its_number() {
    let size = |dir: u64, n: u64| {
        let args = with(1, dir << 30 | n << 16 | 0xee01);
        let row = lookup(16, &args);
        assert_eq!(row.class, Class::Unknown);
        match row.args[2] {
            Arg::In(l) => (1, l.bytes(&args, |_| None)),
            Arg::Out(l, Used::All) => (2, l.bytes(&args, |_| None)),
            Arg::InOut(l) => (3, l.bytes(&args, |_| None)),
            _ => (0, None),
        }
    };
    assert_eq!(size(0, 0), (0, None));
    assert_eq!(size(1, 24), (1, Some(24)));
    assert_eq!(size(2, 0x3fff), (2, Some(0x3fff)));
    assert_eq!(size(3, 1), (3, Some(1)));
}

#[test]
fn lengths() {
    let args = [3, u64::MAX, 65, 64, 4097, 0];
    let none = |_| None;
    assert_eq!(Len::Fixed(16).bytes(&args, none), Some(16));
    assert_eq!(Len::Arg(1).bytes(&args, none), Some(u64::MAX));
    assert_eq!(Len::Arg32(1).bytes(&args, none), Some(0xffff_ffff));
    assert_eq!(Len::ArgTimes(0, 12).bytes(&args, none), Some(36));
    assert_eq!(Len::Bits(2, 0).bytes(&args, none), Some(16));
    assert_eq!(Len::Bits(2, 1).bytes(&args, none), Some(8));
    assert_eq!(Len::Bits(5, 1).bytes(&args, none), Some(0));
    assert_eq!(Len::Pages(4).bytes(&args, none), Some(2));
    assert_eq!(Len::U32At(3).bytes(&args, |a| (a == 64).then_some(28)), Some(28));
    assert_eq!(Len::U32At(3).bytes(&args, none), None);

    assert_eq!(Used::All.bytes(16, 0, &args, none), Some(16));
    assert_eq!(Used::All.bytes(16, -11, &args, none), Some(0));
    assert_eq!(Used::Result.bytes(16, 20, &args, none), Some(16));
    assert_eq!(Used::ResultTimes(12).bytes(100, 2, &args, none), Some(24));
    assert_eq!(Used::U32At(3).bytes(16, 0, &args, |_| Some(128)), Some(16));
}

/// The priority calls of a real server are treated as designed.
#[test]
fn treatment_of_well_known_calls() {
    let class = |name: &str| by_name(name).map(|r| (r.class, r.place));
    for name in ["mmap", "munmap", "brk", "rt_sigaction", "setuid", "sigaltstack", "madvise"] {
        assert_eq!(class(name), Some((Class::Local, Place::Unit)), "{name}");
    }
    for name in ["read", "recvfrom", "clock_gettime", "newfstatat", "getrandom", "epoll_wait"] {
        assert_eq!(class(name), Some((Class::Input, Place::Supervisor)), "{name}");
    }
    for name in ["write", "sendto", "writev", "sendmsg", "connect", "sendfile", "fsync"] {
        assert_eq!(class(name), Some((Class::Output, Place::Supervisor)), "{name}");
    }
    for name in ["openat", "close", "accept4", "dup2", "epoll_ctl", "chdir", "umask", "socket"] {
        assert_eq!(class(name), Some((Class::Object, Place::Supervisor)), "{name}");
    }
    for name in ["io_uring_setup", "rseq", "pkey_alloc", "userfaultfd", "futex_waitv"] {
        assert_eq!(by_name(name).map(|r| r.deny_errno), Some(38), "{name}");
    }
    let lock = lookup(72, &with(1, 7));
    assert_eq!((lock.command, lock.wait), ("F_SETLKW", Wait::Special));
    assert_eq!(lock.args[2], Arg::In(Len::Fixed(32)));
    let option = lookup(54, &[3, 1, 26, 0, 16, 0]);
    assert_eq!((option.command, option.class), ("SO_ATTACH_FILTER", Class::Unknown));
    assert_eq!(lookup(54, &[3, 6, 26, 0, 16, 0]).class, Class::Object);
    assert_eq!(lookup(436, &[3, 9, 2, 0, 0, 0]).class, Class::Control);
    assert_eq!(lookup(436, &[3, 9, 4, 0, 0, 0]).class, Class::Object);
}

/// Recovery without the kernel's objects knows of every call that makes or changes one.
///
/// Break it: take the effect from any row of an object.
#[test]
fn what_becomes_of_descriptors_is_known() {
    /// Calls of the class whose effect nobody needs: hints, owners of signals, terminals, interfaces, and what is
    /// refused as a whole (inotify, chroot).
    const NONE: [&str; 7] =
        ["readahead", "fadvise64", "inotify_add_watch", "inotify_rm_watch", "chroot", "ioctl", "fcntl"];
    for row in ROWS.iter().filter(|row| row.class == Class::Object) {
        assert!(row.effect != Effect::None || NONE.contains(&row.name), "{}", row.name);
    }
    for name in
        ["F_DUPFD", "F_SETFD", "F_SETFL", "F_SETLK", "F_SETLKW", "F_OFD_SETLK", "F_SETPIPE_SZ", "FIONBIO", "FIOCLEX"]
    {
        let c = COMMANDS.iter().find(|c| c.row.command == name).expect("a command");
        assert_ne!(c.row.effect, Effect::None, "{name}");
    }
    for row in ROWS.iter().chain(COMMANDS.iter().map(|c| &c.row)) {
        let path = |i: u8| assert_eq!(row.args[usize::from(i)], Arg::Path, "{}", row.name);
        match row.effect {
            Effect::Open(i) | Effect::Remove(i) | Effect::Make(i) => path(i),
            Effect::Rename(from, to) => [from, to].into_iter().for_each(path),
            Effect::Transfer(from, to) => {
                assert_eq!([from, to].map(|i| row.args[usize::from(i)]), [Arg::Fd; 2], "{}", row.name);
            }
            _ => {}
        }
    }
}

/// `unistd_64.h` of the machine, where there is one, has the same names for the same numbers.
#[cfg(feature = "std")]
#[test]
fn names_agree_with_the_kernel_headers() {
    let Ok(text) = std::fs::read_to_string("/usr/include/x86_64-linux-gnu/asm/unistd_64.h") else {
        return;
    };
    let mut seen = 0;
    for line in text.lines() {
        let Some((name, nr)) = line.strip_prefix("#define __NR_").and_then(|rest| rest.split_once(' ')) else {
            continue;
        };
        let nr: u64 = nr.trim().parse().expect("a number");
        if (335..424).contains(&nr) || nr > 469 {
            continue;
        }
        assert_eq!(by_number(nr).map(|row| row.name), Some(name));
        seen += 1;
    }
    assert!(seen > 300);
}

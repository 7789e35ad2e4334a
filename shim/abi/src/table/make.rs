//! Constructors that keep the rows short. Everything here is evaluated at compile time.

use super::{Arg, Class, Command, Effect, Len, Place, Row, Used, Wait};

pub(super) use super::Arg::{
    Addr, DirFd, Fd, Hex, In, InOut, Int, IovIn, IovOut, MsgIn, MsgOut, Out, Path, Pid, Sig, Str, Strings,
};

/// `ENOSYS`: the kernel has no such call.
pub(super) const ENOSYS: i32 = 38;
/// `EINVAL`: the kernel has the call, but not this command.
pub(super) const EINVAL: i32 = 22;

pub(super) const IN4: Arg = In(Len::Fixed(4));
pub(super) const IN8: Arg = In(Len::Fixed(8));
pub(super) const IN16: Arg = In(Len::Fixed(16));
pub(super) const IN32: Arg = In(Len::Fixed(32));
pub(super) const IN36: Arg = In(Len::Fixed(36));
pub(super) const IN40: Arg = In(Len::Fixed(40));
pub(super) const OUT2: Arg = Out(Len::Fixed(2), Used::All);
pub(super) const OUT4: Arg = Out(Len::Fixed(4), Used::All);
pub(super) const OUT8: Arg = Out(Len::Fixed(8), Used::All);
pub(super) const OUT16: Arg = Out(Len::Fixed(16), Used::All);
pub(super) const OUT32: Arg = Out(Len::Fixed(32), Used::All);
pub(super) const OUT36: Arg = Out(Len::Fixed(36), Used::All);
/// `struct rusage`, `struct stat`.
pub(super) const OUT144: Arg = Out(Len::Fixed(144), Used::All);
pub(super) const INOUT4: Arg = InOut(Len::Fixed(4));
pub(super) const INOUT8: Arg = InOut(Len::Fixed(8));
pub(super) const INOUT16: Arg = InOut(Len::Fixed(16));
pub(super) const INOUT32: Arg = InOut(Len::Fixed(32));
pub(super) const INOUT40: Arg = InOut(Len::Fixed(40));

const fn row(nr: u16, name: &'static str, class: Class, place: Place, args: &'static [Arg]) -> Row {
    Row {
        nr,
        name,
        command: "",
        class,
        place,
        wait: Wait::Never,
        args,
        effect: Effect::None,
        irregular: false,
        deny_errno: 0,
        note: "",
    }
}

/// Executed by the thread itself, and again in replay.
pub(super) const fn local(nr: u16, name: &'static str, args: &'static [Arg]) -> Row {
    row(nr, name, Class::Local, Place::Unit, args)
}

/// An input that the supervisor fetches.
pub(super) const fn input(nr: u16, name: &'static str, args: &'static [Arg]) -> Row {
    row(nr, name, Class::Input, Place::Supervisor, args)
}

/// An input about the caller's own process or thread, which only it can fetch.
pub(super) const fn own(nr: u16, name: &'static str, args: &'static [Arg]) -> Row {
    row(nr, name, Class::Input, Place::Unit, args)
}

/// An output that the supervisor makes.
pub(super) const fn output(nr: u16, name: &'static str, args: &'static [Arg]) -> Row {
    row(nr, name, Class::Output, Place::Supervisor, args)
}

/// A change of a kernel object that the supervisor makes.
pub(super) const fn object(nr: u16, name: &'static str, args: &'static [Arg]) -> Row {
    row(nr, name, Class::Object, Place::Supervisor, args)
}

/// A hand-written call of the thread itself.
pub(super) const fn control(nr: u16, name: &'static str, args: &'static [Arg]) -> Row {
    row(nr, name, Class::Control, Place::Unit, args).irregular()
}

/// Refused.
pub(super) const fn deny(nr: u16, name: &'static str, errno: i32) -> Row {
    let mut r = row(nr, name, Class::Deny, Place::Supervisor, &[]);
    r.deny_errno = errno;
    r
}

/// Not understood.
pub(super) const fn unknown(nr: u16, name: &'static str, args: &'static [Arg]) -> Row {
    row(nr, name, Class::Unknown, Place::Unit, args)
}

impl Row {
    pub(super) const fn irregular(mut self) -> Row {
        self.irregular = true;
        self
    }

    pub(super) const fn place(mut self, place: Place) -> Row {
        self.place = place;
        self
    }

    pub(super) const fn does(mut self, effect: Effect) -> Row {
        self.effect = effect;
        self
    }

    /// Waits for input on the descriptor in argument 0.
    pub(super) const fn readable(mut self) -> Row {
        self.wait = Wait::Readable(0);
        self
    }

    /// Waits for room on the descriptor in argument 0.
    pub(super) const fn writable(mut self) -> Row {
        self.wait = Wait::Writable(0);
        self
    }

    /// Waits by rules of its own; unless the call is unknown that takes a handler.
    pub(super) const fn special(mut self) -> Row {
        self.wait = Wait::Special;
        self.irregular = !matches!(self.class, Class::Unknown);
        self
    }

    pub(super) const fn note(mut self, note: &'static str) -> Row {
        self.note = note;
        self
    }

    /// This row for the calls whose argument `arg` has `value` in its low 32 bits.
    pub(super) const fn when(mut self, arg: u8, value: u64, command: &'static str) -> Command {
        self.command = command;
        Command { nr: self.nr, arg, value, mask: 0xffff_ffff, also: None, row: self }
    }
}

impl Command {
    /// Further requires that argument `arg` has `value` in its low 32 bits.
    pub(super) const fn and(mut self, arg: u8, value: u32) -> Command {
        self.also = Some((arg, value));
        self
    }

    /// Compares only the bits of `mask`.
    pub(super) const fn masked(mut self, mask: u64) -> Command {
        self.mask = mask;
        self
    }
}

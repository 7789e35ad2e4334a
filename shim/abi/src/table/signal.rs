//! Signals.

use super::make::*;
use super::{Arg, Len, Row, Used};

const SIGINFO_IN: Arg = In(Len::Fixed(128));
const SIGINFO_OUT: Arg = Out(Len::Fixed(128), Used::All);

pub(super) const ROWS: &[Row] = &[
    local(13, "rt_sigaction", &[Sig, IN32, OUT32, Int]),
    local(14, "rt_sigprocmask", &[Int, IN8, OUT8, Int]),
    local(15, "rt_sigreturn", &[]).irregular().note("replaces every register"),
    control(34, "pause", &[]).special(),
    control(62, "kill", &[Pid, Sig]),
    own(127, "rt_sigpending", &[Out(Len::Arg(1), Used::All), Int]),
    control(128, "rt_sigtimedwait", &[IN8, SIGINFO_OUT, IN16, Int]).special(),
    control(129, "rt_sigqueueinfo", &[Pid, Sig, SIGINFO_IN]),
    control(130, "rt_sigsuspend", &[IN8, Int]).special(),
    local(131, "sigaltstack", &[In(Len::Fixed(24)), Out(Len::Fixed(24), Used::All)]),
    control(200, "tkill", &[Pid, Sig]),
    control(234, "tgkill", &[Pid, Pid, Sig]),
    control(297, "rt_tgsigqueueinfo", &[Pid, Pid, Sig, SIGINFO_IN]),
    unknown(424, "pidfd_send_signal", &[Fd, Sig, SIGINFO_IN, Hex]),
];

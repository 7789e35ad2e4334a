//! Clocks, sleeps and timers.

use super::make::*;
use super::{Len, Place, Row, Used};

const TIMER: &str = "timers die with the process: recovery makes them again";

pub(super) const ROWS: &[Row] = &[
    control(35, "nanosleep", &[IN16, OUT16]).special().place(Place::Supervisor),
    own(36, "getitimer", &[Int, OUT32]),
    control(37, "alarm", &[Int]).note(TIMER),
    control(38, "setitimer", &[Int, IN32, OUT32]).note(TIMER),
    input(96, "gettimeofday", &[OUT16, OUT8]),
    output(159, "adjtimex", &[InOut(Len::Fixed(208))]),
    output(164, "settimeofday", &[IN16, IN8]),
    input(201, "time", &[OUT8]),
    control(222, "timer_create", &[Int, In(Len::Fixed(64)), OUT4]).note(TIMER),
    control(223, "timer_settime", &[Int, Hex, IN32, OUT32]).note(TIMER),
    control(224, "timer_gettime", &[Int, OUT32]).note(TIMER),
    control(225, "timer_getoverrun", &[Int]).note(TIMER),
    control(226, "timer_delete", &[Int]).note(TIMER),
    output(227, "clock_settime", &[Int, IN16]),
    input(228, "clock_gettime", &[Int, OUT16]).irregular().note("CPU-time clocks are read in the unit"),
    input(229, "clock_getres", &[Int, OUT16]),
    control(230, "clock_nanosleep", &[Int, Hex, IN16, OUT16]).special().place(Place::Supervisor),
    output(305, "clock_adjtime", &[Int, InOut(Len::Fixed(208))]),
    input(318, "getrandom", &[Out(Len::Arg(1), Used::Result), Int, Hex]),
    input(63, "uname", &[Out(Len::Fixed(390), Used::All)]),
    input(99, "sysinfo", &[Out(Len::Fixed(112), Used::All)]),
];

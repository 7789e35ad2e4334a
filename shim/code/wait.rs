//! Calls that wait: first they look, then they wait in the kernel, if the supervisor allows that.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};

use ftrun_abi::fast::{Control, EPOLL, EPOLL_EVENTS_MAX, GRANTED, NOBODY, RUNS, Slot, WAITS, WANTS};
use ftrun_abi::record::HEADER_BYTES;

use crate::call::{Call, EINTR, syscall};
use crate::clock::monotonic;
use crate::log::{DATA, begin, commit, end, fill, has_room, log, ring, seam, size};
use crate::memory::copy;
use crate::{nr, outputs};

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
/// Most entries of a `poll` that is served here.
const POLL_MAX: usize = 256;
/// `CLOCK_MONOTONIC` nanoseconds that never come.
const NEVER: u64 = u64::MAX;

/// `epoll_wait`.
pub(crate) fn epoll(control: &mut Control, call: &Call) -> Option<i64> {
    const POLLIN: u64 = 1;
    let [fd, to, max, timeout, ..] = call.args;
    let max = max as i32;
    if max <= 0 || to == 0 {
        return None;
    }
    let limit = match call.number {
        nr::EPOLL_PWAIT2 => duration(timeout)?,
        _ if (timeout as i32) < 0 => NEVER,
        _ => timeout as u32 as u64 * MILLISECOND,
    };
    let digest = call.digest()?;
    let room = (max as usize).min(EPOLL_EVENTS_MAX);
    if !has_room(control, size(room as u64 * 12)) {
        return None;
    }
    let events = (&raw const control.events) as u64;
    let look = |ms: u64| syscall(nr::EPOLL_WAIT, [fd, events, room as u64, ms, 0, 0]);
    let entry = fd | POLLIN << 32;
    let mut wait = Wait::new(control, call, digest, limit);
    let n = loop {
        for event in &mut control.events[..room] {
            // An event that was reported is never 0.
            event[..4].fill(0);
        }
        begin(control, EPOLL, call, digest, to);
        seam(control);
        let n = look(0);
        if n != 0 || limit == 0 {
            break n;
        }
        match wait.whole(control, look, |ms| syscall(nr::POLL, [(&raw const entry) as u64, 1, ms, 0, 0, 0])) {
            Waited::Found(n) => break n,
            Waited::Look => {}
            Waited::Over => {
                end(control);
                return log(control, call, digest, 0, &[]);
            }
            Waited::Called => {
                // Whoever has the turn now has the place for what is in doubt, too.
                return None;
            }
        }
    };
    seam(control);
    if n < 0 {
        end(control);
        return None;
    }
    let mut ring = ring(control)?;
    let out = (n > 0).then_some((to, n as u64 * 12));
    let record = ring.reserve(out.map_or(HEADER_BYTES, |o| size(o.1)))?;
    if n > 0 {
        // SAFETY: `size` made room behind the two headers.
        unsafe { copy(record.as_mut_ptr().add(DATA), events as *const u8, n as usize * 12) };
    }
    fill(record, control, call, digest, n, out);
    commit(control, call, &mut ring);
    seam(control);
    end(control);
    // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
    unsafe { copy(to as *mut u8, events as *const u8, n as usize * 12) };
    Some(n)
}

/// `poll`, and `ppoll` without a signal mask. Asking changes nothing but the program's memory.
pub(crate) fn poll(control: &Control, call: &Call) -> Option<i64> {
    let [fds, count, timeout, mask, ..] = call.args;
    if count > POLL_MAX as u64 || (count > 0 && fds == 0) {
        return None;
    }
    let limit = match call.number {
        nr::POLL if (timeout as i32) < 0 => NEVER,
        nr::POLL => timeout as u32 as u64 * MILLISECOND,
        _ if mask != 0 => return None,
        _ => duration(timeout)?,
    };
    let digest = call.digest()?;
    if !has_room(control, size(count * 8)) {
        return None;
    }
    // A copy: what the program sees, and what the supervisor takes for the call's input, changes in the end.
    let mut entries = [[0u8; 8]; POLL_MAX];
    let at = entries.as_mut_ptr().cast::<u8>();
    let bytes = count as usize * 8;
    // SAFETY: the program gave this memory to its call, and there is room for so many entries.
    unsafe { copy(at, fds as *const u8, bytes) };
    let look = |ms: u64| syscall(nr::POLL, [at as u64, count, ms, 0, 0, 0]);
    let mut wait = Wait::new(control, call, digest, limit);
    let n = loop {
        let n = look(0);
        if n != 0 || limit == 0 {
            break n;
        }
        match wait.whole(control, look, look) {
            Waited::Found(n) => break n,
            Waited::Look => {}
            Waited::Over => break 0,
            Waited::Called => return None,
        }
    };
    if n < 0 || !has_room(control, size(count * 8)) {
        return None;
    }
    // SAFETY: as above.
    unsafe { copy(fds as *mut u8, at, bytes) };
    let outs = [(fds, bytes as u64)];
    log(control, call, digest, n, if count > 0 { &outs } else { &[] })
}

/// Most descriptors of a `select` that is served here: what a `fd_set` has room for.
const SELECT_MAX: usize = 1024;

/// `select`, and `pselect6` without a signal mask.
pub(crate) fn select(control: &Control, call: &Call) -> Option<i64> {
    const WORDS: usize = SELECT_MAX / 64;
    let [count, .., time, mask] = call.args;
    let sets = [call.args[1], call.args[2], call.args[3]];
    let count = usize::try_from(count as i32).ok().filter(|n| *n <= SELECT_MAX)?;
    // SAFETY: the program gave this memory to its call; a fault there is the supervisor's to handle.
    if call.number == nr::PSELECT6 && mask != 0 && unsafe { (mask as *const u64).read_unaligned() } != 0 {
        return None;
    }
    // `struct timeval` has microseconds where `struct timespec` has nanoseconds.
    let unit = if call.number == nr::SELECT { 1000 } else { 1 };
    let limit = if time == 0 {
        NEVER
    } else {
        // SAFETY: as above.
        let [s, part] = unsafe { (time as *const [u64; 2]).read_unaligned() };
        if s >= 1 << 32 || part >= SECOND / unit {
            return None;
        }
        s * SECOND + part * unit
    };
    let digest = call.digest()?;
    let bytes = count.div_ceil(64) * 8;
    if !has_room(control, size(bytes as u64) * 3 + size(16)) {
        return None;
    }
    // Copies, as in `poll`.
    let mut found = [[0u64; WORDS]; 3];
    let at = found.as_mut_ptr();
    let ask = |left: u64| {
        let mut to = [0u64; 3];
        for (i, set) in sets.into_iter().enumerate().filter(|(_, set)| *set != 0) {
            // SAFETY: one of the three copies, which has room for so many bytes of the program's.
            unsafe {
                let copied = at.add(i).cast::<u8>();
                copy(copied, set as *const u8, bytes);
                to[i] = copied as u64;
            }
        }
        // The kernel leaves there what is left.
        let mut time = [left / SECOND, left % SECOND];
        let time = if left == NEVER { 0 } else { (&raw mut time) as u64 };
        syscall(nr::PSELECT6, [count as u64, to[0], to[1], to[2], time, 0])
    };
    let mut wait = Wait::new(control, call, digest, limit);
    let n = loop {
        let n = ask(0);
        if n != 0 || limit == 0 {
            break n;
        }
        match wait.exactly(control, ask, ask) {
            Waited::Found(n) => break n,
            Waited::Look => {}
            Waited::Over => break 0,
            Waited::Called => return None,
        }
    };
    if n < 0 || !has_room(control, size(bytes as u64) * 3 + size(16)) {
        return None;
    }
    let mut outs = [(0, 0); 4];
    let mut used = 0;
    for (set, found) in sets.into_iter().zip(&found).filter(|(set, _)| *set != 0) {
        // SAFETY: as above.
        unsafe { copy(set as *mut u8, found.as_ptr().cast(), bytes) };
        outs[used] = (set, bytes as u64);
        used += 1;
    }
    if time != 0 {
        let left = wait.left(control);
        // SAFETY: as above.
        unsafe { (time as *mut [u64; 2]).write_unaligned([left / SECOND, left % SECOND / unit]) };
        outs[used] = (time, 16);
        used += 1;
    }
    log(control, call, digest, n, &outs[..used])
}

/// Waits until a descriptor in blocking mode is readable; false when the supervisor has to.
pub(crate) fn until_readable(control: &Control, call: &Call, digest: u64, fd: u64) -> bool {
    const POLLIN: u64 = 1;
    let entry = fd | POLLIN << 32;
    let mut wait = None;
    while syscall(nr::POLL, [(&raw const entry) as u64, 1, 0, 0, 0, 0]) == 0 {
        if wait.is_none() {
            wait = for_data(control, call, digest);
        }
        if !wait.as_mut().is_some_and(|wait| matches!(wait.readable(control, fd), Waited::Look)) {
            return false;
        }
    }
    true
}

/// `nanosleep`, and `clock_nanosleep` for a time from now.
pub(crate) fn sleep(control: &Control, call: &Call) -> Option<i64> {
    const CLOCKS: u64 = 2;
    let request = match call.number {
        nr::NANOSLEEP => call.args[0],
        // CLOCK_REALTIME and CLOCK_MONOTONIC run alike.
        _ if call.args[0] < CLOCKS && call.args[1] == 0 => call.args[2],
        _ => return None,
    };
    let limit = duration(request).filter(|limit| *limit != NEVER)?;
    let digest = call.digest()?;
    if !has_room(control, HEADER_BYTES) {
        return None;
    }
    let doze = |left: u64| {
        let time = [left / SECOND, left % SECOND];
        syscall(nr::NANOSLEEP, [(&raw const time) as u64, 0, 0, 0, 0, 0])
    };
    let mut wait = Wait::new(control, call, digest, limit);
    loop {
        match wait.exactly(control, doze, doze) {
            Waited::Over | Waited::Found(_) => return log(control, call, digest, 0, &[]),
            Waited::Look => {}
            Waited::Called => return None,
        }
    }
}

/// A `struct timespec` of the program in nanoseconds; [`NEVER`] for none, `None` for what is no time.
fn duration(at: u64) -> Option<u64> {
    if at == 0 {
        return Some(NEVER);
    }
    // SAFETY: the program gave it to its call; a fault there is the supervisor's to handle.
    let [s, ns] = unsafe { (at as *const [u64; 2]).read_unaligned() };
    (s < 1 << 32 && ns < SECOND).then(|| s * SECOND + ns)
}

/// The wait for a socket in blocking mode to be readable; `None` when it has a time limit of its own.
pub(crate) fn for_data<'a>(control: &Control, call: &'a Call, digest: u64) -> Option<Wait<'a>> {
    const SOL_SOCKET: u64 = 1;
    const SO_RCVTIMEO: u64 = 20;
    let (mut limit, mut len) = ([0u64; 2], 16u32);
    let at = [call.args[0], SOL_SOCKET, SO_RCVTIMEO, (&raw mut limit) as u64, (&raw mut len) as u64, 0];
    (syscall(nr::GETSOCKOPT, at) == 0 && limit == [0, 0]).then(|| Wait::new(control, call, digest, NEVER))
}

/// What came of waiting.
pub(crate) enum Waited {
    /// The thread kept the turn, and this is the call's result.
    Found(i64),
    /// The thread has the turn again and has to look.
    Look,
    /// The time is over; the thread has the turn.
    Over,
    /// The supervisor has to go on waiting.
    Called,
}

/// A call that waits.
pub(crate) struct Wait<'a> {
    call: &'a Call,
    digest: u64,
    limit: u64,
    /// When it ends, once that is known.
    deadline: Option<u64>,
}

impl<'a> Wait<'a> {
    /// Waits for at most `limit` nanoseconds, or for what is left if the call is made again.
    fn new(control: &Control, call: &'a Call, digest: u64, limit: u64) -> Self {
        let mut wait = Self { call, digest, limit, deadline: None };
        if let Some(slot) = control.slots.get(call.slot)
            && slot.again.load(Relaxed) != 0
        {
            slot.again.store(0, Relaxed);
            if slot.digest.load(Relaxed) == digest {
                let deadline = slot.deadline.load(Relaxed);
                wait.deadline = Some(if deadline == 0 { NEVER } else { deadline });
            }
        }
        wait
    }

    /// What is left of the time.
    fn left(&self, control: &Control) -> u64 {
        self.deadline.map_or(self.limit, |deadline| deadline.saturating_sub(monotonic(control)))
    }

    /// Waits until a descriptor is readable.
    pub(crate) fn readable(&mut self, control: &Control, fd: u64) -> Waited {
        const POLLIN: u64 = 1;
        let entry = fd | POLLIN << 32;
        let look = |ms: u64| syscall(nr::POLL, [(&raw const entry) as u64, 1, ms, 0, 0, 0]);
        match self.whole(control, look, look) {
            Waited::Found(_) => Waited::Look,
            other => other,
        }
    }

    /// As [`Wait::exactly`], in whole milliseconds (`u64::MAX` for ever): a wait is never shorter than it should be.
    fn whole(&mut self, control: &Control, hold: impl FnOnce(u64) -> i64, peek: impl FnOnce(u64) -> i64) -> Waited {
        let ms = |left: u64| if left == NEVER { u64::MAX } else { left.div_ceil(MILLISECOND).min(1 << 30) };
        self.exactly(control, |left| hold(ms(left)), |left| peek(ms(left)))
    }

    /// Waits in the kernel, for at most so many nanoseconds: with the turn, by `hold`, if there is no other
    /// thread; else without it, by `peek`, which only looks whether there is something.
    fn exactly(&mut self, control: &Control, hold: impl FnOnce(u64) -> i64, peek: impl FnOnce(u64) -> i64) -> Waited {
        let slot = control.slots.get(self.call.slot);
        let Some(slot) = slot.filter(|_| control.may_wait.load(SeqCst) != 0) else {
            end(control);
            return Waited::Called;
        };
        let until = control.wait_until.load(Relaxed);
        // Without a limit nobody asks for the time.
        let begin = if self.limit == NEVER && until == 0 { 0 } else { monotonic(control) };
        let deadline = *self.deadline.get_or_insert(if self.limit == NEVER { NEVER } else { begin + self.limit });
        let until = if until == 0 { deadline } else { until.min(deadline) };
        let left = if until == NEVER { NEVER } else { until.saturating_sub(begin) };
        slot.digest.store(self.digest, Relaxed);
        slot.deadline.store(if deadline == NEVER { 0 } else { deadline }, Relaxed);
        if control.commits.load(Relaxed) != 0 && outputs::leave_before_wait(control) {
            return Waited::Look;
        }
        if control.single.load(Relaxed) != 0 {
            let n = hold_turn(control, slot, left, hold);
            if n > 0 {
                return Waited::Found(n);
            }
            if n == 0 && deadline <= until {
                return Waited::Over;
            }
            slot.waited.store(1, SeqCst);
            end(control);
            return Waited::Called;
        }
        end(control);
        slot.tid.store(self.call.tid as u32, Relaxed);
        slot.state.store(WAITS, SeqCst);
        give(control);
        let n = if control.slow.load(SeqCst) == 0 { peek(left) } else { EINTR };
        if n < 0 || !take(control, slot, self.call.tid as u32) {
            // Without the turn: only what is the thread's own may be touched.
            slot.waited.store(1, SeqCst);
            slot.state.store(RUNS, SeqCst);
            return Waited::Called;
        }
        if control.slow.load(SeqCst) != 0 || (n == 0 && deadline > until) {
            slot.waited.store(1, SeqCst);
            return Waited::Called;
        }
        if n == 0 { Waited::Over } else { Waited::Look }
    }
}

/// Waits with the turn.
///
/// The supervisor may want the thread at any instant. It sets `slow` and then looks at the slot; we set the slot
/// and then look at `slow`: one sees the other, and a thread that waits is interrupted.
fn hold_turn(control: &Control, slot: &Slot, left: u64, hold: impl FnOnce(u64) -> i64) -> i64 {
    slot.state.store(WAITS, SeqCst);
    let may = control.slow.load(SeqCst) == 0 && control.may_wait.load(SeqCst) != 0;
    let n = if may { hold(left) } else { EINTR };
    slot.state.store(RUNS, SeqCst);
    n
}

const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;
/// What the supervisor's clock uses, too.
const SIGUSR2: u64 = 12;

/// Gives the turn away: to a thread that wants it, or to whoever will.
///
/// A thread that wants it says so and then tries to take it; we let it go and then look for such a thread again:
/// one of both finds the other.
fn give(control: &Control) {
    if grant(control, |tid| {
        control.turn.store(tid, SeqCst);
        true
    }) {
        return;
    }
    control.turn.store(NOBODY, SeqCst);
    if grant(control, |tid| control.turn.compare_exchange(NOBODY, tid, SeqCst, SeqCst).is_ok()) {
        return;
    }
    if control.shared.load(SeqCst) != 0 {
        let (supervisor, tracer) = (control.supervisor.load(Relaxed), u64::from(control.tracer.load(Relaxed)));
        syscall(nr::TGKILL, [supervisor, tracer, SIGUSR2, 0, 0, 0]);
    }
}

/// Passes the turn on before a call, and waits for it to come back; false when the supervisor wants the thread.
pub(crate) fn pass_turn(control: &Control, call: &Call) -> bool {
    let Some(slot) = control.slots.get(call.slot).filter(|_| control.may_wait.load(SeqCst) != 0) else { return false };
    let tid = call.tid as u32;
    slot.tid.store(tid, Relaxed);
    give(control);
    if !take(control, slot, tid) {
        slot.state.store(RUNS, SeqCst);
        return false;
    }
    control.slow.load(SeqCst) == 0
}

/// Gives the turn to a thread that wants it, by `give`. A thread that has been chosen does not go away meanwhile.
fn grant(control: &Control, give: impl Fn(u32) -> bool) -> bool {
    if control.wanting.load(SeqCst) == 0 {
        return false;
    }
    for slot in &control.slots {
        if slot.state.compare_exchange(WANTS, GRANTED, SeqCst, SeqCst).is_err() {
            continue;
        }
        let given = give(slot.tid.load(SeqCst));
        if !given {
            // Somebody has taken it; if that was this thread, it says so itself.
            let _gone = slot.state.compare_exchange(GRANTED, WANTS, SeqCst, SeqCst);
        }
        slot.word.fetch_add(1, SeqCst);
        syscall(nr::FUTEX, [(&raw const slot.word) as u64, FUTEX_WAKE, 1, 0, 0, 0]);
        return true;
    }
    false
}

/// Takes the turn, or waits until it is given; false when the supervisor wants the thread.
fn take(control: &Control, slot: &Slot, tid: u32) -> bool {
    slot.state.store(WANTS, SeqCst);
    control.wanting.fetch_add(1, SeqCst);
    let taken = loop {
        let word = slot.word.load(SeqCst);
        if control.turn.load(SeqCst) == tid
            || control.turn.compare_exchange(NOBODY, tid, SeqCst, SeqCst).is_ok()
        {
            break true;
        }
        let n = syscall(nr::FUTEX, [(&raw const slot.word) as u64, FUTEX_WAIT, u64::from(word), 0, 0, 0]);
        // Chosen by somebody, it stays until it has the turn.
        if n == EINTR && slot.state.compare_exchange(WANTS, RUNS, SeqCst, SeqCst).is_ok() {
            break false;
        }
        if n == EINTR {
            syscall(nr::SCHED_YIELD, [0; 6]);
        }
    };
    control.wanting.fetch_sub(1, SeqCst);
    if taken {
        slot.state.store(RUNS, SeqCst);
        control.turn_calls.store(0, Relaxed);
    }
    taken
}

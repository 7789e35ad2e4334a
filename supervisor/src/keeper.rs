//! The keeper: the process that the user started.
//!
//! Its first thread holds the unit's lock, passes signals on, watches the supervisor and ends with the
//! program's status. Its second thread, the *hands*, has the unit's descriptor table, directory and umask; it
//! starts the supervisors, which share them, so that all of that outlives a supervisor, and makes the unit's calls
//! where that must be ([`crate::hands`]).

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::atomic::Ordering::SeqCst;

use crate::desk::{CALL, Desk, SPAWN, STARTED};
use crate::hold::returned::Returned;
use crate::limits;
use crate::marshal::raw_call;
use crate::report::Error;
use crate::systemd::Notifier;
use crate::{fds, hands};

/// Supervisors in a row that may fail by themselves before the unit runs.
const FAILURES_MAX: u32 = 5;

/// What a supervisor is started with: descriptor numbers. Those of ours stay open in its own table, and are closed in
/// the unit's.
#[derive(Debug)]
pub struct Start {
    /// The unit's descriptors; all others of the table are the supervisor's, until it has a table of its own.
    pub unit_fds: Vec<i32>,
    /// Our standard error.
    pub stderr: Option<i32>,
    /// The unit's lock.
    pub lock: Option<i32>,
    /// The file of its event log.
    pub log: Option<i32>,
    /// The root of what holds its descriptors ([`crate::hold`]).
    pub hold: Option<i32>,
}

/// What a keeper keeps, beside its desk: descriptors of the process.
#[derive(Debug, Default)]
pub struct Kept {
    /// The unit's lock.
    pub lock: Option<i32>,
    /// The file of its event log: with it another supervisor takes over when one is killed.
    pub log: Option<i32>,
    /// The root of what holds the unit's descriptors.
    pub hold: Option<i32>,
    /// What was held, and has come back: the unit has it instead of what this process was started with.
    pub returned: Option<Returned>,
}

/// Keeps a unit. `supervisor` is the life of a supervisor, in a process of its own: it returns that process's
/// exit status. The `notifier` tells the service manager, if there is one.
pub fn keep(
    desk: &'static Desk,
    kept: Kept,
    notifier: Option<&mut Notifier>,
    supervisor: impl Fn(Start) -> i32 + Send + 'static,
) -> Result<i32, Error> {
    let os = |what: &'static str| move |e: io::Error| Error::bug(format!("{what}: {e}"));
    let Kept { lock, log, hold, returned } = kept;
    let unit_fds = inherited().map_err(os("the descriptors"))?;
    if returned.is_none() {
        desk.given.store(unit_fds.iter().max().map_or(0, |last| *last as u32 + 1), SeqCst);
    }
    let stderr = crate::logging::stderr_fd();
    // SAFETY: attributes of this process. Whoever a supervisor leaves behind is ours to bury.
    unsafe {
        desk.keeper.store(libc::getpid(), SeqCst);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    }
    let (parted, wait) = std::sync::mpsc::channel();
    let inherited = unit_fds.clone();
    let copies = returned.as_ref().map(Returned::copies).unwrap_or_default();
    let builder = std::thread::Builder::new().name("ftrun-hands".into()).stack_size(8 << 20);
    let started = builder.spawn(move || {
        if wait.recv().is_ok() {
            match returned {
                Some(returned) => returned.put_back(),
                None => keep_only(&unit_fds),
            }
            work(desk, [stderr, lock, log, hold], &supervisor);
        }
    });
    started.map_err(os("the keeper's hands"))?;
    // SAFETY: concerns this thread alone.
    if unsafe { libc::unshare(libc::CLONE_FILES | libc::CLONE_FS) } != 0 {
        return Err(os("a descriptor table for the keeper")(io::Error::last_os_error()));
    }
    // What is the program's must not be kept open by us: somebody may wait for its end.
    // SAFETY: descriptors of this thread's table that it does not use any more; 0 to 2 are not left free.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        for fd in inherited {
            if fd <= 2 {
                libc::dup2(null, fd);
            } else {
                libc::close(fd);
            }
        }
        for fd in copies {
            libc::close(fd);
        }
    }
    if parted.send(()).is_err() {
        return Err(Error::bug("the keeper's hands have ended"));
    }
    start(desk)?;
    let mut tell = notifier.map(|notifier| move || notifier.tell(desk));
    let code = watch(desk, log.is_some(), || tell.as_mut().is_some_and(|tell| tell()));
    // The last words.
    tell.map(|mut tell| tell());
    code
}

/// Has the hands start a supervisor.
fn start(desk: &Desk) -> Result<(), Error> {
    desk.supervisor.store(0, SeqCst);
    desk.hands.fetch_or(SPAWN, SeqCst);
    desk.wake_hands();
    while desk.supervisor.load(SeqCst) == 0 {
        desk.wait_hands(desk.hands.load(SeqCst));
    }
    match desk.supervisor.load(SeqCst) {
        pid if pid == -libc::ENOSYS => Err(Error::environment(
            "clone3(2), by which processes are made and brought back, is not allowed here",
            "take RestrictNamespaces= and what else filters it out of the service",
        )),
        pid if pid == -libc::EMFILE => Err(Error::environment(
            "no supervisor can be started: the unit has as many descriptors as may be open",
            "raise the hard limit (ulimit -Hn, LimitNOFILE=)",
        )),
        pid if pid < 0 => Err(Error::bug(format!("the supervisor: {}", io::Error::from_raw_os_error(-pid)))),
        _ => Ok(()),
    }
}

/// Passes signals on until the run is over; its exit status. `hangs` is asked again and again whether the supervisor does.
fn watch(desk: &Desk, survives: bool, mut hangs: impl FnMut() -> bool) -> Result<i32, Error> {
    let mut failures = 0;
    // Signals that have come, by bits.
    let mut kept = 0u64;
    loop {
        // SAFETY: plain data; the calls are given objects that outlive them.
        let (signal, info) = unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let wait = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            (libc::sigtimedwait(&raw const all, &raw mut info, &raw const wait), info)
        };
        if let Some(code) = over(desk) {
            return Ok(code);
        }
        // What the terminal sends to the foreground group reaches the program by itself.
        if signal > 0 && signal != libc::SIGCHLD && info.si_code <= 0 {
            kept |= 1 << (signal - 1);
        }
        let supervisor = desk.supervisor.load(SeqCst);
        if hangs() && survives {
            crate::logging::line(b"ftrun: the supervisor gives no sign of life and is replaced\n".to_vec());
            // SAFETY: our child, which has not been waited for.
            unsafe { libc::kill(supervisor, libc::SIGKILL) };
        }
        let Some(status) = bury_one(supervisor, libc::WNOHANG) else {
            pass_on(desk, &mut kept);
            continue;
        };
        if let Some(code) = over(desk) {
            return Ok(code);
        }
        if libc::WIFEXITED(status) {
            return Ok(libc::WEXITSTATUS(status));
        }
        if !survives {
            crate::logging::line(
                b"ftrun: the supervisor was killed, and the unit with it (durability `process` survives only the \
                  program's death; --durability supervisor survives this, too)\n"
                    .to_vec(),
            );
            return Ok(125);
        }
        // Killed from outside it may be as often as somebody likes.
        let own = libc::WTERMSIG(status) != libc::SIGKILL && desk.runs.load(SeqCst) == 0;
        failures = if own { failures + 1 } else { 0 };
        if failures == FAILURES_MAX {
            let text = format!("ftrun: the supervisor has failed in {FAILURES_MAX} recoveries; the unit ends\n");
            crate::logging::line(text.into_bytes());
            return Ok(125);
        }
        // Its processes are killed with it, and have come to us: what they were doing must have come to its end
        // before anybody looks at what became of it.
        desk.runs.store(0, SeqCst);
        while bury_one(-1, 0).is_some() {}
        // What they do may be to wait for us to read what the program has said. When they start a supervisor, we stand still.
        while matches!(desk.call_state(), CALL | STARTED) {
            hangs();
            desk.wait_hands(desk.hands.load(SeqCst));
        }
        start(desk)?;
    }
}

/// Passes signals on to the unit; while it is being recovered they wait.
fn pass_on(desk: &Desk, kept: &mut u64) {
    if *kept == 0 || desk.runs.load(SeqCst) == 0 {
        return;
    }
    for signal in (1..=64).filter(|s| *kept >> (s - 1) & 1 == 1) {
        // SAFETY: the process of this unit.
        unsafe { libc::kill(desk.pid.load(SeqCst), signal) };
    }
    *kept = 0;
}

fn over(desk: &Desk) -> Option<i32> {
    Some(desk.code.load(SeqCst)).filter(|code| *code >= 0)
}

/// Waits for the end of a child; its wait status.
fn bury_one(pid: i32, options: i32) -> Option<i32> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        match unsafe { libc::waitpid(pid, &raw mut status, options | libc::__WALL) } {
            0 => return None,
            n if n > 0 => return Some(status),
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            _ => return None,
        }
    }
}

/// The life of the hands.
fn work(desk: &'static Desk, ours: [Option<i32>; 4], supervisor: &impl Fn(Start) -> i32) {
    let mut owner = 0;
    loop {
        let now = desk.hands.load(SeqCst);
        if now & !SPAWN == CALL {
            hands::work(desk, &mut owner);
        } else if now & SPAWN != 0 {
            desk.hands.fetch_and(!SPAWN, SeqCst);
            if desk.generation.load(SeqCst) > 0 {
                // The unit may have as many descriptors as its own limit allows, which a checkpoint has
                // and this process follows when the unit runs (`Unit::follow_limits`).
                limits::raise_numbers();
            }
            let unit_fds = match enter_table(desk) {
                Ok(fds) => fds,
                Err(e) => {
                    desk.supervisor.store(-e.raw_os_error().unwrap_or(libc::EIO), SeqCst);
                    desk.wake_hands();
                    continue;
                }
            };
            let copies = ours.map(|fd| fd.map(from_keeper).transpose());
            if let Some(e) = copies.iter().find_map(|copy| copy.as_ref().err()) {
                desk.supervisor.store(-e.raw_os_error().unwrap_or(libc::EIO), SeqCst);
                desk.wake_hands();
                continue;
            }
            let [stderr, lock, log, hold] = copies.map(|copy| copy.ok().flatten());
            desk.generation.fetch_add(1, SeqCst);
            match fork_sharing() {
                0 => {
                    // SAFETY: names this process as its threads and its child expect it.
                    unsafe { libc::prctl(libc::PR_SET_NAME, c"ftrun".as_ptr(), 0, 0, 0) };
                    let code = supervisor(Start { unit_fds, stderr, lock, log, hold });
                    crate::logging::flush();
                    // SAFETY: ends the supervisor without running the keeper's destructors a second time.
                    unsafe { libc::_exit(code) }
                }
                // The descriptors of ours are closed by the supervisor, in the table that it shares with us.
                pid => {
                    desk.supervisor.store(pid, SeqCst);
                    desk.wake_hands();
                }
            }
        } else {
            desk.wait_hands(now);
        }
    }
}

/// Forks a child that shares the descriptor table, directory and umask of this thread: its process id, 0 in the
/// child, or a negative error. The keeper's first thread waits meanwhile, so that the child finds no lock taken.
fn fork_sharing() -> i32 {
    let mut args = [0u64; 11];
    args[0] = (libc::CLONE_FILES | libc::CLONE_FS) as u64;
    args[4] = libc::SIGCHLD as u64;
    raw_call(libc::SYS_clone3 as u64, &[args.as_ptr() as u64, 88, 0, 0, 0, 0]) as i32
}

/// A copy of a descriptor of the keeper's first thread, with a number out of the program's way.
fn from_keeper(fd: i32) -> io::Result<i32> {
    let copy = fds::take(fd)?;
    // SAFETY: numbers only; the result is owned by nobody else.
    let high = unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_DUPFD_CLOEXEC, crate::logging::FD_MIN) };
    Ok(if high < 0 { copy.into_raw_fd() } else { high })
}

/// Descriptors that we inherited: ours are all close-on-exec, those of the one who started us cannot be.
fn inherited() -> io::Result<Vec<i32>> {
    let mut fds = own_fds()?;
    // SAFETY: a query about a number.
    fds.retain(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } & libc::FD_CLOEXEC == 0);
    Ok(fds)
}

/// Every descriptor of the calling thread.
fn own_fds() -> io::Result<Vec<i32>> {
    // SAFETY: no arguments.
    fds::list(unsafe { libc::gettid() })
}

/// The unit's descriptors. From here on there are others in its table.
fn enter_table(desk: &Desk) -> io::Result<Vec<i32>> {
    if let Some(mut fds) = desk.entered_table() {
        // Cold recovery may have set them aside.
        if let raised @ 1.. = desk.raised.load(SeqCst) {
            fds.extend(raised..raised + fds.len() as i32);
        }
        // What the last supervisor left goes before the next one's threads take copies of it.
        keep_only(&fds);
        return Ok(fds);
    }
    let fds = own_fds()?;
    desk.enter_table(&fds);
    Ok(fds)
}

/// Closes every descriptor of the calling thread's table but these.
pub(crate) fn keep_only(fds: &[i32]) {
    let mut keep = fds.to_vec();
    keep.sort_unstable();
    let mut from = 0u32;
    for fd in keep {
        let fd = fd as u32;
        if fd > from {
            // SAFETY: closes numbers that nothing in this thread owns.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd + 1;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, from, u32::MAX, 0) };
}

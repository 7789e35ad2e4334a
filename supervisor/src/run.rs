//! `ftrun run`: what is run, and the life of a supervisor. Its main thread is the tracer; the process that the user
//! started is the keeper ([`crate::keeper`]).

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ftrun_ckpt::dirty;
use ftrun_ckpt::files::{Files, Policy};
use ftrun_ckpt::image::PageSource;

use crate::cli::{RunOptions, Stable, StoreOptions};
use crate::desk::Desk;
use crate::evlog::{EventLog, Queue};
use crate::hold::Hold;
use crate::hold::returned::{self as hold, Returned};
use crate::journal::{Journal, Stored};
use crate::keeper::{self, Kept, Start, keep_only};
use crate::launch::Program;
use crate::lifecycle::End;
use crate::recorder::{Place, Recorder, Watch};
use crate::remains::{Remains, Spec};
use crate::report::Error;
use crate::service::Service;
use crate::standby::Standby;
use crate::status::{State, Status, Timestamp};
use crate::systemd::{Notifier, Ready, environment};
use crate::unit::{Shared, Unit};
use crate::unitdir::UnitDir;

/// Locks a mutex; a panic elsewhere ends the process, so that none is ever poisoned.
pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    match m.lock() {
        Ok(g) => g,
        Err(e) => e.into_inner(),
    }
}

/// Runs a program as a unit; returns the exit status for the user.
pub fn run(options: RunOptions, mut dir: UnitDir) -> Result<i32, Error> {
    let mut env: Vec<_> = std::env::vars_os().collect();
    let held = environment::take_passed(&mut env, std::process::id(), hold::NAME);
    match Remains::of(&dir) {
        Some(_) if options.resume => return go_on(dir, options.lossy, None, held),
        Some(remains) => return Err(remains.refuse(dir.name())),
        None => {}
    }
    let notifier = notifier(&options, &dir);
    if let (Some(notifier), false) = (&notifier, held.is_empty()) {
        // Of a unit that is given up.
        notifier.take_out(hold::NAME).map_err(|e| Error::bug(format!("the service manager: {e}")))?;
    }
    drop(held);
    let program = program(&options, env, notifier.as_ref())?;
    dir.begin()?;
    let old_mask = take_signals();
    let program = Program { sigmask: mask_word(&old_mask), ..program };
    if !options.durability.survives_supervisor() {
        let desk = Desk::map(None).map_err(|e| Error::bug(format!("the desk: {e}")))?;
        return keep(options, dir, program, desk, None, (notifier, None));
    }
    let memory = dir.memory_dir()?;
    let laid = Remains::lay(&memory, &Spec::new(&options, &program));
    let (desk, log) = laid.inspect_err(|_| dir.forget_memory())?;
    keep(options, dir, program, desk, Some(log), (notifier, None))
}

fn notifier(options: &RunOptions, dir: &UnitDir) -> Option<Notifier> {
    Notifier::from_env(&crate::systemd::place(dir.path()), options.ready).unwrap_or_else(|e| {
        tracing::warn!("the service manager's NOTIFY_SOCKET cannot be used: {e}");
        None
    })
}

/// Goes on with a unit whose keeper, supervisor and program were killed; returns the exit status for the user.
///
/// `lossy` says that a descriptor which cannot be made again is no reason to give up. What remains is taken from the
/// memory of this machine; from the store if one is named, or if that memory is gone and there is one in the directory.
pub fn resume(dir: UnitDir, lossy: bool, store: Option<StoreOptions>) -> Result<i32, Error> {
    go_on(dir, lossy, store, Vec::new())
}

/// The same; `held` is what the service manager has passed that held the unit's descriptors, if it did.
fn go_on(mut dir: UnitDir, lossy: bool, store: Option<StoreOptions>, mut held: Vec<OwnedFd>) -> Result<i32, Error> {
    let own = || dir.store_dir().is_dir().then_some(StoreOptions { url: None, stable: Stable::Disk });
    let store = store.or_else(|| if Remains::of(&dir).is_none() { own() } else { None });
    if let Some(store) = store {
        crate::retrieve::retrieve(&mut dir, &store)?;
    }
    let Some(remains) = Remains::of(&dir) else {
        return Err(Error::environment(
            format!("there is nothing to go on with: the unit {} has ended, or its memory is gone", dir.name()),
            "`ftrun run` starts it anew",
        ));
    };
    let (spec, desk, log) = remains.take()?;
    let (mut options, program) = spec.into_parts(dir.name());
    options.lossy = lossy;
    // It has said before that it was ready, if it ever does.
    options.ready = Ready::Started;
    let notifier = notifier(&options, &dir);
    take_signals();
    let root = held.pop().filter(|_| held.is_empty());
    let returned = match &root {
        Some(root) => hold::bring_back(root, desk, &log, &remains),
        None if options.hold && desk.holds.load(Ordering::SeqCst) != 0 => {
            Err("the service manager has not passed what holds them".into())
        }
        None => Err(String::new()),
    };
    let returned = returned.map_err(|why| {
        if !why.is_empty() {
            let text =
                format!("ftrun: {}'s descriptors are not as they were: {why}; they are made again\n", dir.name());
            crate::logging::line(text.into_bytes());
        }
    });
    desk.take_over(returned.is_ok());
    let returned = returned.ok().and_then(|returned| Some((root?, returned)));
    keep(options, dir, program, desk, Some(log), (notifier, returned))
}

/// Keeps signals from this process, its only thread, for the keeper to pass on; the mask that was in force.
fn take_signals() -> libc::sigset_t {
    // Who started us may ignore SIGCHLD; ignored, it would reap our children before we have their status.
    // SAFETY: the default action, in a process with one thread.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    // SAFETY: signal sets are plain data; the mask of this thread, the only one, is changed.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, &raw mut old);
        old
    }
}

/// Keeps a unit until it ends. With a file for its event log the death of supervisors is survived.
fn keep(
    options: RunOptions,
    dir: UnitDir,
    program: Program,
    desk: &'static Desk,
    log: Option<File>,
    (mut notifier, returned): (Option<Notifier>, Option<(OwnedFd, Returned)>),
) -> Result<i32, Error> {
    let survives = log.is_some();
    let (root, returned) = match returned {
        Some((root, returned)) => (Some(root), Some(returned)),
        None => (notifier.as_ref().filter(|_| options.hold).and_then(begin_hold), None),
    };
    let raw = |fd: &OwnedFd| fd.as_raw_fd();
    let kept =
        Kept { lock: dir.lock_fd(), log: log.as_ref().map(AsRawFd::as_raw_fd), hold: root.as_ref().map(raw), returned };
    let dir = Arc::new(dir);
    let ours = Arc::clone(&dir);
    let run = move |start| supervisor(&options, &ours, &program, start, desk);
    let code = keeper::keep(desk, kept, notifier.as_mut(), run);
    if !desk.is_returned()
        && let (Some(notifier), Some(_)) = (&notifier, root)
        && let Err(e) = notifier.take_out(hold::NAME)
    {
        tracing::warn!("the service manager is not told to give up what holds the unit's descriptors: {e}");
    }
    if survives && code.is_ok() && desk.can_be_forgotten() {
        dir.forget_memory();
    }
    code
}

/// A root for what holds the unit's descriptors, left with the service manager.
fn begin_hold(notifier: &Notifier) -> Option<OwnedFd> {
    let root = crate::hold::root();
    let left = root.and_then(|root| Ok((notifier.leave(hold::NAME, root.as_fd())?, root)));
    match left {
        Ok((true, root)) => return Some(root),
        Ok((false, _)) => tracing::warn!(
            "the service manager takes no descriptors (FileDescriptorStoreMax=): the death of the keeper costs connections"
        ),
        Err(e) => tracing::warn!("descriptors cannot be left with the service manager: {e}"),
    }
    None
}

/// Room for events beyond those that make a checkpoint due: two of the longest, and what the disk has not
/// taken yet.
const LOG_SLACK: u64 = 64 << 20;

/// Bytes of the event log of a unit that survives its supervisor.
pub(crate) fn log_bytes(options: &RunOptions) -> u64 {
    options.checkpoint_log_bytes + 2 * LOG_SLACK
}

struct Control {
    writer: Service,
    stored: Arc<Mutex<Stored>>,
    shared: Arc<Shared>,
    status: Arc<Mutex<Status>>,
    store: Option<Watch>,
    outputs: Mutex<Queue>,
    log: File,
}

impl crate::control::Handler for Control {
    fn status(&self) -> Status {
        let mut status = lock(&self.status).clone();
        Unit::publish_counters(&self.shared, &mut status);
        status.stored_checkpoint = lock(&self.stored).checkpoint;
        status.store = self.store.as_ref().map(|s| s.info(status.events, lock(&self.outputs).bytes()));
        // stat(2) counts in blocks of 512 bytes, whatever the file system's own are.
        status.log.resident_bytes = self.log.metadata().map_or(0, |m| m.blocks() * 512);
        status.updated_at = Timestamp::now();
        status
    }

    fn checkpoint(&self) -> Result<Status, String> {
        let before = self.shared.checkpoints.load(Ordering::SeqCst);
        self.shared.checkpoint.store(true, Ordering::SeqCst);
        for _ in 0..10_000 {
            if self.shared.checkpoints.load(Ordering::SeqCst) > before {
                // Behind what writes it to disk.
                self.writer.run(|| ());
                let error = lock(&self.stored).error.clone();
                return error.map_or_else(
                    || Ok(self.status()),
                    |e| Err(format!("there is a new checkpoint in memory, but not in the state directory: {e}")),
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("no checkpoint within 100 seconds".into())
    }

    fn stop(&self) -> Result<(), String> {
        self.shared.stop.store(true, Ordering::SeqCst);
        Ok(())
    }
}

fn supervisor(options: &RunOptions, dir: &Arc<UnitDir>, program: &Program, start: Start, desk: &'static Desk) -> i32 {
    match try_supervisor(options, dir, program, start, desk) {
        Ok(code) => code,
        Err(e) => {
            let mut text = Vec::new();
            if e.print(&mut text).is_ok() {
                crate::logging::line(text);
            }
            i32::from(e.exit_code())
        }
    }
}

fn try_supervisor(
    options: &RunOptions,
    dir: &Arc<UnitDir>,
    program: &Program,
    start: Start,
    desk: &'static Desk,
) -> Result<i32, Error> {
    let os = |what: &str, e: io::Error| Error::bug(format!("{what}: {e}"));
    // SAFETY: changes an attribute of this process.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    crate::pulse::tell(desk);
    let takes_over = desk.generation.load(Ordering::SeqCst) > 1;
    if takes_over {
        if desk.resumed.swap(0, Ordering::SeqCst) == 0 {
            crate::fault::disarm();
        }
        desk.owner.leave();
    }
    let service = Service::start(start.unit_fds.clone()).map_err(|e| os("the service thread", e))?;
    service.be_the_tracers();
    crate::logging::use_fd(start.stderr);
    service.run(crate::logging::start_thread).map_err(|e| os("the logging thread", e))?;
    let shared = Arc::new(Shared::default());
    let before = if takes_over { dir.read_status()? } else { Status::default() };
    let mut status = Status {
        name: dir.name().to_owned(),
        state: if takes_over { State::Recovering } else { State::Running },
        supervisor_pid: Some(std::process::id() as i32),
        keeper_pid: Some(desk.keeper.load(Ordering::SeqCst)),
        incarnation: desk.incarnation.load(Ordering::SeqCst).max(1),
        recoveries: desk.recoveries.load(Ordering::SeqCst),
        supervisors: desk.generation.load(Ordering::SeqCst),
        durability: options.durability.name().to_owned(),
        program: options.program.to_string_lossy().into_owned(),
        args: options.args.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
        started_at: if takes_over { before.started_at } else { Timestamp::now() },
        unloggable: before.unloggable,
        ..Status::default()
    };
    let backend = dirty::choose();
    status.dirty_backend = backend.name().to_owned();
    let status = Arc::new(Mutex::new(status));
    let mut recorder = None;
    let (log, standby, last, journal) = service.run(|| -> Result<_, Error> {
        let no_memory = |e| {
            Error::environment(
                format!("memory for the event log: {e}"),
                "lower --checkpoint-log, or give /dev/shm more room (mount -o remount,size=SIZE /dev/shm)",
            )
        };
        let (log, standby, last) = if let Some(fd) = start.log {
            let memory = dir.memory_dir()?;
            let (standby, last) = Standby::open(&memory)?;
            // SAFETY: of this thread's table, and owned by nobody else in it.
            let file = unsafe { File::from_raw_fd(fd) };
            let log = match &last {
                Some((snapshot, _)) => EventLog::attach(file, snapshot.sii),
                None => EventLog::create(file, log_bytes(options)),
            };
            let log = log.map_err(no_memory)?;
            let standby = standby.follow(&log);
            if let Some(store) = &options.store {
                let fresh = last.is_none() && !takes_over;
                let spec = Spec::new(options, program).to_bytes()?;
                let place = Place::new(store, dir, desk.keeper.load(Ordering::SeqCst), spec);
                let mut opened = Recorder::open_until(&place, fresh, takes_over)?;
                log.control().commits.store(1, Ordering::SeqCst);
                let from = last.as_ref().map(|(snapshot, pages)| (snapshot, pages as &dyn PageSource));
                opened.follow(&log, from)?;
                recorder = Some(opened);
            }
            (log, Some(standby), last)
        } else {
            (EventLog::new(options.checkpoint_log_bytes + LOG_SLACK).map_err(no_memory)?, None, None)
        };
        let journal = Journal::open(&dir.log_dir(), dir.ckpt_dir(), &log, options.journal)?;
        let (writer, stored) = journal.progress();
        let store = recorder.as_ref().map(Recorder::watch);
        let (shared, log_file) = (Arc::clone(&shared), log.share().map_err(no_memory)?);
        let outputs = Mutex::new(log.outputs());
        let handler = Control { writer, stored, shared, status: Arc::clone(&status), store, outputs, log: log_file };
        let (ours, first) = (Arc::clone(dir), lock(&status).clone());
        let answer = move || -> Result<(), Error> {
            ours.write_status(&first)?;
            crate::control::serve(ours.bind_control()?, Arc::new(handler))
                .map_err(|e| Error::bug(format!("control socket: {e}")))
        };
        if takes_over {
            // A disk that is busy with others may take long to make a file: nobody is to wait for that.
            let thread = std::thread::Builder::new().name("ftrun-answer".into());
            let later = move || answer().unwrap_or_else(|e| tracing::warn!("nobody can ask the unit: {e}"));
            thread.spawn(later).map_err(|e| os("a thread", e))?;
        } else {
            answer()?;
        }
        Ok((log, standby, last, journal))
    })?;
    crate::pulse::beat();
    // SAFETY: no arguments.
    let tracer = unsafe { libc::syscall(libc::SYS_gettid) };
    start_ticks(&service, tracer)?;
    keep_only(&start.unit_fds);
    if let Some(cwd) = options.cwd.as_ref().filter(|_| last.is_none()) {
        std::env::set_current_dir(cwd)
            .map_err(|e| Error::environment(format!("--cwd {}: {e}", cwd.display()), "name a directory that exists"))?;
    }
    catch_signals();
    log.control().kill_in.store(crate::fault::in_shim(), Ordering::SeqCst);
    // Never dropped: it owns descriptors of the service thread's table, and this process ends with it.
    let mut unit =
        ManuallyDrop::new(Unit::new(service.clone(), log, Arc::clone(&shared), Arc::clone(&status), backend));
    unit.journal = Some(journal);
    unit.standby = standby;
    unit.recorder = recorder;
    unit.desk = Some(desk);
    unit.mapped = Files::new(Policy { content: options.self_contained, digest: options.store.is_some() });
    unit.checkpoint_every = options.checkpoint_every.as_nanos() as u64;
    unit.replay_max = options.recover_within.as_nanos() as u64;
    unit.checkpoint_log = options.checkpoint_log_bytes;
    unit.set_tid = can_set_tid();
    unit.choose_cpu();
    unit.shim = options.shim;
    unit.lossy = options.lossy;
    unit.vdso_clock = service.run(|| crate::vdso::clock_gettime(crate::vdso::areas()));
    if unit.standby.is_some() {
        crate::hands::hire(desk);
    }
    if let Some(root) = start.hold.filter(|_| desk.holds_nothing.load(Ordering::SeqCst) == 0) {
        // SAFETY: of the service thread's table, and owned by nobody else in it.
        let opened = service.run(|| Hold::open(unsafe { OwnedFd::from_raw_fd(root) }, desk));
        unit.hold = Some(opened.map_err(|e| os("what holds the descriptors", e))?);
    }
    let end = unit.supervise(program, last);
    if matches!(end, Ok(End::Ended(_))) || desk.can_be_forgotten() {
        // Otherwise it does not stop: it has not been gone on with.
        crate::pulse::ending();
    }
    let unit = &mut *unit;
    if matches!(end, Ok(End::Ended(_))) {
        unit.flush_outputs();
    }
    if let Some(journal) = &mut unit.journal {
        journal.finish(unit.snapshot.as_ref(), &unit.pages);
        let (_, stored) = journal.progress();
        lock(&status).stored_checkpoint = lock(&stored).checkpoint;
    }
    if matches!(end, Ok(End::Ended(_))) {
        // It was ending already when everything was killed: nothing is made again.
        desk.leave_table();
    }
    if !desk.can_be_forgotten() {
        // The unit has not gone on: what remains of it is as it was, and may be tried again.
        let why = match end {
            Ok(End::Failed(why)) => why,
            Ok(End::Ended(_)) => String::new(),
            Err(e) => return Err(e),
        };
        let text =
            format!("ftrun: {} cannot be gone on with: {why}\nftrun: nothing of it has been given up\n", dir.name());
        crate::logging::line(text.into_bytes());
        crate::logging::flush();
        return Ok(125);
    }
    let (code, state, reason) = match end {
        Ok(End::Ended(s)) if libc::WIFEXITED(s) => (libc::WEXITSTATUS(s), State::Stopped, None),
        Ok(End::Ended(s)) => (128 + libc::WTERMSIG(s), State::Stopped, None),
        Ok(End::Failed(why)) => {
            crate::logging::line(format!("ftrun: {}: {why}\n", dir.name()).into_bytes());
            (unit.failed_signal.map_or(125, |s| 128 + s), State::Failed, Some(why))
        }
        Err(e) => {
            write_end(&service, dir, &shared, &status, State::Stopped, Some(i32::from(e.exit_code())), None);
            return Err(e);
        }
    };
    write_end(&service, dir, &shared, &status, state, Some(code), reason);
    if let Some(recorder) = unit.recorder.as_ref().filter(|_| state == State::Stopped) {
        recorder.forget();
    }
    if unit.standby.is_some() {
        // The keeper does this, too, unless it was killed.
        service.run(|| dir.forget_memory());
    }
    crate::logging::flush();
    desk.code.store(code, Ordering::SeqCst);
    // The program's end has closed its descriptors; ours of the shared table go with it.
    keep_only(&[]);
    unit.end_hold();
    unit.serve_children();
    Ok(code)
}

fn write_end(
    service: &Service,
    dir: &UnitDir,
    shared: &Shared,
    status: &Mutex<Status>,
    state: State,
    code: Option<i32>,
    reason: Option<String>,
) {
    let mut s = lock(status).clone();
    Unit::publish_counters(shared, &mut s);
    s.state = state;
    s.pid = None;
    s.exit_code = code;
    s.reason = reason;
    s.updated_at = Timestamp::now();
    *lock(status) = s.clone();
    service.run(|| {
        if let Err(e) = dir.write_status(&s) {
            tracing::warn!("the last status cannot be written: {e}");
        }
    });
}

/// Makes the tracer's waits return from time to time, so that it sees requests and deadlines.
pub(crate) fn start_ticks(service: &Service, tracer: libc::c_long) -> Result<(), Error> {
    crate::told::listen();
    let started = service.run(|| {
        std::thread::Builder::new().name("ftrun-tick".into()).spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(10));
                // SAFETY: a thread of this process that lives as long as the process.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tracer, libc::SIGUSR2) };
            }
        })
    });
    started.map(drop).map_err(|e| Error::bug(format!("the clock thread: {e}")))
}

/// Signals meant for the program do not end the supervisor. Handlers, unlike ignoring, are not inherited by
/// what is executed. The tracer takes only its clock's signal.
fn catch_signals() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: installs handlers that do nothing, and sets the mask of this thread.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1, libc::SIGALRM] {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut mask);
        libc::sigdelset(&raw mut mask, libc::SIGUSR2);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut());
    }
}

/// A process id can be chosen (`clone3` with `set_tid`): CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
pub(crate) fn can_set_tid() -> bool {
    caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN).unwrap_or(false)
        || caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_CHECKPOINT_RESTORE).unwrap_or(false)
}

fn mask_word(set: &libc::sigset_t) -> u64 {
    (1..=64)
        // SAFETY: a valid set and signal number.
        .filter(|s| unsafe { libc::sigismember(&raw const *set, *s) } == 1)
        .fold(0, |m, s| m | 1 << (s - 1))
}

/// An `execve` that failed, as the user sees it.
pub fn exec_error(program: &str, e: &io::Error) -> Error {
    if e.raw_os_error() == Some(libc::ENOENT) {
        return Error::NotFound { program: program.into() };
    }
    Error::NotExecutable { program: program.into(), reason: e.to_string(), hint: String::new() }
}

/// Finds the program and refuses what cannot be run.
fn program(
    options: &RunOptions,
    mut env: Vec<(std::ffi::OsString, std::ffi::OsString)>,
    notifier: Option<&Notifier>,
) -> Result<Program, Error> {
    let path = find(&options.program)?;
    let not = |reason: &str, hint: &str| Error::NotExecutable {
        program: options.program.clone(),
        reason: reason.into(),
        hint: hint.into(),
    };
    let meta = std::fs::metadata(&path).map_err(|e| exec_error(&path.to_string_lossy(), &e))?;
    if meta.is_dir() {
        return Err(not("it is a directory", ""));
    }
    if meta.permissions().mode() & 0o111 == 0 {
        return Err(not("it has no execute permission", "chmod +x"));
    }
    if meta.mode() & (libc::S_ISUID | libc::S_ISGID) != 0 && meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(not(&set_id_text(&path), "run ftrun as that user, or a copy without the bit"));
    }
    if meta.mode() & (libc::S_ISUID | libc::S_ISGID) != 0 {
        return Err(not(&set_id_text(&path), "a traced program gets no other identity; use a copy without the bit"));
    }
    let mut head = [0u8; 20];
    if let Ok(mut f) = std::fs::File::open(&path)
        && io::Read::read(&mut f, &mut head).is_ok_and(|n| n >= 20)
        && head[..4] == *b"\x7fELF"
        && (head[4] != 2 || head[18] != 62)
    {
        return Err(not("it is not a 64-bit x86-64 program (32-bit programs are not supported)", ""));
    }
    let c =
        |s: &OsStr| CString::new(s.as_bytes()).map_err(|_| Error::environment("an argument contains a NUL byte", ""));
    let mut argv = vec![c(&options.program)?];
    for a in &options.args {
        argv.push(c(a)?);
    }
    env.retain(|(k, _)| k != "FTRUN_FAULT" && options.env.iter().all(|(o, _)| o != k));
    environment::for_program(&mut env, std::process::id(), notifier.map(Notifier::program_socket));
    env.extend(options.env.iter().cloned());
    let mut envp = Vec::new();
    for (k, v) in env {
        let mut s = k.into_vec();
        s.push(b'=');
        s.extend(v.into_vec());
        envp.push(CString::new(s).map_err(|_| Error::environment("a variable contains a NUL byte", ""))?);
    }
    let ignored = crate::dispositions::ignored();
    Ok(Program { path: c(path.as_os_str())?, argv, envp, sigmask: 0, ignored })
}

fn set_id_text(path: &Path) -> String {
    format!("{} is a set-user-ID or set-group-ID program", path.display())
}

/// The file that `execvp` would take.
pub(crate) fn find(program: &OsStr) -> Result<PathBuf, Error> {
    if program.as_bytes().contains(&b'/') {
        return Ok(program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    let mut denied = false;
    for dir in std::env::split_paths(&path) {
        let file = dir.join(program);
        if let Ok(meta) = std::fs::metadata(&file)
            && meta.is_file()
        {
            if meta.permissions().mode() & 0o111 != 0 {
                return Ok(file);
            }
            denied = true;
        }
    }
    if denied {
        return Err(Error::NotExecutable {
            program: program.into(),
            reason: "it has no execute permission".into(),
            hint: String::new(),
        });
    }
    Err(Error::NotFound { program: program.into() })
}

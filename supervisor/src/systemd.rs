//! What ftrun and a service manager tell each other (sd_notify(3), sd_watchdog_enabled(3), systemd.service(5)).
//!
//! The keeper is the service's main process, from the first to the last instant: it is what `Type=notify` hears
//! and what is stopped and watched. The program has another process id, and may come to yet another, so it does
//! not talk to the service manager itself: what it says goes to a socket of the keeper's, which passes it on in its own name.
//! So `NotifyAccess=main` suffices, a program that names itself the main process (`MAINPID=`) does no harm, its
//! status text stands behind ours, and its watchdog is part of ours: once it has shown that it has one, it must keep
//! to it.

pub mod environment;
pub mod install;
mod socket;
pub mod unit_file;

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::desk::Desk;
use socket::{Inbox, Message, Outbox};

/// How long the service manager may take to hear us.
const BARRIER: Duration = Duration::from_secs(10);

/// When a unit is ready in the eyes of the service manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub enum Ready {
    /// When the program runs.
    Started,
    /// When the program says so.
    Program,
}

/// The keeper's conversation with the service manager.
#[derive(Debug)]
pub struct Notifier {
    manager: Outbox,
    inbox: Inbox,
    /// Not sent yet: the service manager has much to read.
    waiting: VecDeque<Message>,
    talk: Talk,
}

impl Notifier {
    /// If a service manager has started this process: `NOTIFY_SOCKET` says where it listens. `place` names the unit among
    /// all of the machine.
    ///
    /// # Errors
    /// The variable names no socket; no descriptor.
    pub fn from_env(place: &OsStr, ready: Ready) -> io::Result<Option<Self>> {
        let Some(to) = std::env::var_os("NOTIFY_SOCKET").filter(|to| !to.is_empty()) else { return Ok(None) };
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let usec = number("WATCHDOG_USEC").filter(|usec| meant && *usec > 0);
        let talk = Talk::new(ready, usec.map(Duration::from_micros), Instant::now());
        let (manager, inbox) = (Outbox::new(&to)?, Inbox::bind(place)?);
        Ok(Some(Self { manager, inbox, waiting: VecDeque::new(), talk }))
    }

    /// What `NOTIFY_SOCKET` says to the program.
    pub fn program_socket(&self) -> &OsStr {
        self.inbox.name()
    }

    /// Passes on what there is to say. True when the supervisor has given no sign of life for half of the time that the
    /// watchdog allows.
    pub fn tell(&mut self, desk: &Desk) -> bool {
        let now = Instant::now();
        while self.waiting.is_empty()
            && let Ok(message) = self.inbox.receive()
        {
            let text = self.talk.hear(&message.text, now);
            if !text.is_empty() {
                self.waiting.push_back(Message { text, fds: message.fds });
                self.send();
            }
        }
        let (messages, hangs) = self.talk.say(&Seen::on(desk), now);
        self.waiting.extend(messages.into_iter().filter(|text| !text.is_empty()).map(Message::from));
        self.send();
        hangs
    }

    /// Leaves a descriptor with the service manager under a name that nothing else has there; false when it does not
    /// take it.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn leave(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<bool> {
        let store = |name: &str, fd: OwnedFd| {
            // Not to be thrown out because the other end has hung up.
            let text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
            self.manager.send_now(&Message { text, fds: vec![fd] })
        };
        self.take_out(name)?;
        // What is not taken is closed, which this one shows. There may be room for one alone.
        let (end, theirs) = std::io::pipe()?;
        let probe = format!("{name}-probe");
        store(&probe, theirs.into())?;
        self.heard()?;
        let taken = !hung_up(&end, Duration::ZERO)?;
        self.take_out(&probe)?;
        if taken {
            store(name, fd.try_clone_to_owned()?)?;
        }
        Ok(taken)
    }

    /// What was left under this name is given up.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn take_out(&self, name: &str) -> io::Result<()> {
        self.manager.send_now(&Message::from(format!("FDSTOREREMOVE=1\nFDNAME={name}")))
    }

    /// Waits until the service manager has heard what was said (sd_notify_barrier(3)).
    fn heard(&self) -> io::Result<()> {
        let (end, theirs) = std::io::pipe()?;
        self.manager.send_now(&Message { text: "BARRIER=1".into(), fds: vec![theirs.into()] })?;
        if hung_up(&end, BARRIER)? { Ok(()) } else { Err(io::Error::from(io::ErrorKind::TimedOut)) }
    }

    fn send(&mut self) {
        while let Some(message) = self.waiting.front() {
            match self.manager.send(message) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // As sd_notify(3) advises: nobody can do anything about it.
                Err(e) => tracing::debug!("the service manager is not told {:?}: {e}", message.text),
                Ok(()) => {}
            }
            self.waiting.pop_front();
        }
    }
}

/// Whether a pipe has no writer, or has none before so much time has passed.
fn hung_up(end: &impl AsRawFd, within: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: end.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one structure that outlives the call.
    match unsafe { libc::poll(&raw mut poll, 1, within.as_millis() as i32) } {
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(poll.revents & libc::POLLHUP != 0),
    }
}

/// What the keeper sees of its unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    runs: bool,
    has_run: bool,
    ending: bool,
    degraded: bool,
    beats: u64,
    recoveries: u64,
    supervisors: u32,
}

impl Seen {
    fn on(desk: &Desk) -> Self {
        Self {
            // While its descriptors are being made again nobody can reach it.
            runs: desk.runs.load(SeqCst) != 0 && !desk.is_cold(),
            has_run: desk.has_run.load(SeqCst) != 0,
            ending: desk.ending.load(SeqCst) != 0,
            degraded: desk.degraded.load(SeqCst) != 0,
            beats: desk.beats.load(SeqCst),
            recoveries: desk.recoveries.load(SeqCst),
            supervisors: desk.generation.load(SeqCst),
        }
    }
}

/// What is said when: no sockets, no clock.
#[derive(Debug)]
struct Talk {
    ready: Ready,
    /// The program has said that it is ready.
    program_ready: bool,
    /// `READY=1` has been said.
    is_ready: bool,
    /// `STOPPING=1` has been said.
    stops: bool,
    /// What the program says of its state.
    program_status: String,
    /// What was last said of the unit's.
    status: String,
    watchdog: Option<Watchdog>,
}

#[derive(Debug)]
struct Watchdog {
    allows: Duration,
    /// When the service manager was last told that all is well, and the beats until then.
    told: Instant,
    beats: u64,
    /// When the program last did, if it has ever done so; or has been brought back since.
    program: Option<Instant>,
    /// The supervisor that is there, since when, and whether it was found to hang.
    supervisor: (u32, Instant),
    hung: bool,
}

impl Talk {
    fn new(ready: Ready, watchdog: Option<Duration>, now: Instant) -> Self {
        let watchdog = watchdog.map(|allows| {
            let (program, supervisor) = (None, (0, now));
            Watchdog { allows, told: now, beats: 0, program, supervisor, hung: false }
        });
        Self {
            ready,
            program_ready: false,
            is_ready: false,
            stops: false,
            program_status: String::new(),
            status: String::new(),
            watchdog,
        }
    }

    /// What of a message of the program is passed on as it is.
    fn hear(&mut self, text: &str, now: Instant) -> String {
        let mut pass = String::new();
        for line in text.lines() {
            match line.split_once('=') {
                // The main process is the keeper, and who may speak is for the service's unit file to say.
                Some(("MAINPID" | "MAINPIDFD" | "MAINPIDFDID" | "NOTIFYACCESS", _)) | None => {}
                Some(("STATUS", status)) => status.clone_into(&mut self.program_status),
                Some(("WATCHDOG", "1")) => {
                    if let Some(watchdog) = &mut self.watchdog {
                        watchdog.program = Some(now);
                    }
                }
                Some(("READY", "1")) if !self.is_ready => self.program_ready = true,
                Some((key, value)) => {
                    let usec = (key == "WATCHDOG_USEC").then(|| value.parse().ok()).flatten();
                    if let (Some(usec), Some(watchdog)) = (usec.filter(|usec| *usec > 0), &mut self.watchdog) {
                        watchdog.allows = Duration::from_micros(usec);
                    }
                    self.stops |= key == "STOPPING";
                    let _infallible = writeln!(pass, "{line}");
                }
            }
        }
        pass
    }

    /// What is to be said now, and whether the supervisor hangs. Of `READY=1` and `STOPPING=1` in one message only the last
    /// would be taken.
    fn say(&mut self, seen: &Seen, now: Instant) -> ([String; 2], bool) {
        let (mut ready, mut lines) = (String::new(), String::new());
        // One that is brought back after all was killed has run before, and is reached by nobody yet.
        let has_come = seen.runs || seen.ending;
        if has_come && seen.has_run && !self.is_ready && (self.ready == Ready::Started || self.program_ready) {
            self.is_ready = true;
            let _infallible = write!(ready, "READY=1\nMAINPID={}\n", std::process::id());
        }
        if seen.ending && !self.stops {
            self.stops = true;
            lines.push_str("STOPPING=1\n");
        }
        let status = self.status(seen);
        if status != self.status {
            let _infallible = writeln!(lines, "STATUS={status}");
            self.status = status;
        }
        let Some(watchdog) = &mut self.watchdog else { return ([ready, lines], false) };
        if !seen.runs {
            // Who is being brought back says nothing.
            watchdog.program = watchdog.program.map(|_| now);
        }
        let half = now.duration_since(watchdog.told) * 2 >= watchdog.allows;
        let lives = seen.beats != watchdog.beats;
        let program = watchdog.program.is_none_or(|at| now.duration_since(at) < watchdog.allows);
        if half && lives && program {
            (watchdog.told, watchdog.beats) = (now, seen.beats);
            lines.push_str("WATCHDOG=1\n");
        }
        if watchdog.supervisor.0 != seen.supervisors {
            // It has a time of its own.
            (watchdog.supervisor, watchdog.hung) = ((seen.supervisors, now), false);
        }
        let quiet = now.duration_since(watchdog.told.max(watchdog.supervisor.1)) * 2 >= watchdog.allows;
        let hangs = quiet && !lives && !seen.ending && !watchdog.hung;
        watchdog.hung |= hangs;
        ([ready, lines], hangs)
    }

    fn status(&self, seen: &Seen) -> String {
        let mut text = String::from(match *seen {
            _ if self.stops => "stopping",
            Seen { has_run: false, .. } => "starting",
            Seen { runs: false, .. } => "recovering",
            Seen { degraded: true, .. } => {
                "degraded: memory that outlives the supervisor is full, its death may not be survived"
            }
            _ => "running",
        });
        let mut times = |count: u64, what: &str| {
            if count > 0 {
                let _infallible = write!(text, ", {what} {count} time{}", if count == 1 { "" } else { "s" });
            }
        };
        times(seen.recoveries, "brought back");
        times(u64::from(seen.supervisors.saturating_sub(1)), "supervisor replaced");
        if !self.program_status.is_empty() {
            let _infallible = write!(text, "; {}", self.program_status);
        }
        text
    }
}

/// The name of the socket for the program of the unit in this directory.
pub fn place(unit: &std::path::Path) -> OsString {
    unit.join("notify").into_os_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: Seen =
        Seen { runs: true, has_run: true, ending: false, degraded: false, beats: 1, recoveries: 0, supervisors: 1 };

    fn said(talk: &mut Talk, seen: Seen, now: Instant) -> Vec<String> {
        talk.say(&seen, now).0.iter().flat_map(|m| m.lines()).map(str::to_owned).collect()
    }

    #[test]
    fn a_unit_is_ready_when_its_program_runs_or_says_so() {
        let now = Instant::now();
        let main = format!("MAINPID={}", std::process::id());
        let mut talk = Talk::new(Ready::Started, None, now);
        assert_eq!(said(&mut talk, Seen::default(), now), ["STATUS=starting"]);
        assert_eq!(said(&mut talk, RUNS, now), ["READY=1", &main, "STATUS=running"]);
        assert_eq!(said(&mut talk, RUNS, now), [""; 0]);

        let mut talk = Talk::new(Ready::Started, None, now);
        assert_eq!(said(&mut talk, Seen { runs: false, ..RUNS }, now), ["STATUS=recovering"]);
        assert_eq!(said(&mut talk, RUNS, now), ["READY=1", &main, "STATUS=running"]);

        let mut talk = Talk::new(Ready::Program, None, now);
        assert_eq!(said(&mut talk, RUNS, now), ["STATUS=running"]);
        assert_eq!(talk.hear("STATUS=warming up", now), "");
        assert_eq!(said(&mut talk, RUNS, now), ["STATUS=running; warming up"]);
        assert_eq!(talk.hear("READY=1\nSTATUS=serving\nMAINPID=1234", now), "");
        assert_eq!(said(&mut talk, RUNS, now), ["READY=1", &main, "STATUS=running; serving"]);
        // From then on it is what ends a reload.
        assert_eq!(talk.hear("RELOADING=1\nMONOTONIC_USEC=5", now), "RELOADING=1\nMONOTONIC_USEC=5\n");
        assert_eq!(talk.hear("READY=1", now), "READY=1\n");
    }

    /// Break it: put everything into one message.
    #[test]
    fn who_has_run_and_ended_meanwhile_was_ready() {
        let now = Instant::now();
        let mut talk = Talk::new(Ready::Started, None, now);
        let ended = Seen { runs: false, ending: true, ..RUNS };
        let ([ready, rest], _) = talk.say(&ended, now);
        assert!(ready.starts_with("READY=1\nMAINPID="), "{ready}");
        assert_eq!(rest, "STOPPING=1\nSTATUS=stopping\n");
    }

    #[test]
    fn the_state_is_told_when_it_changes() {
        let now = Instant::now();
        let mut talk = Talk::new(Ready::Started, None, now);
        talk.say(&RUNS, now);
        let recovering = Seen { runs: false, ..RUNS };
        assert_eq!(said(&mut talk, recovering, now), ["STATUS=recovering"]);
        let back = Seen { recoveries: 1, supervisors: 3, ..RUNS };
        let times = ", brought back 1 time, supervisor replaced 2 times";
        assert_eq!(said(&mut talk, back, now), [format!("STATUS=running{times}")]);
        let degraded = said(&mut talk, Seen { degraded: true, ..RUNS }, now);
        assert!(degraded[0].starts_with("STATUS=degraded: memory"), "{degraded:?}");
        let ending = Seen { ending: true, runs: false, ..RUNS };
        assert_eq!(said(&mut talk, ending, now), ["STOPPING=1", "STATUS=stopping"]);
        assert_eq!(said(&mut talk, ending, now), [""; 0]);
    }

    /// Break it: answer whatever the beats are.
    #[test]
    fn the_watchdog_is_answered_for_who_lives() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut talk = Talk::new(Ready::Started, Some(Duration::from_secs(1)), begin);
        let beats = |beats| Seen { beats, ..RUNS };
        let mut step = |seen, ms| {
            let (messages, hangs) = talk.say(&seen, at(ms));
            (messages[1].contains("WATCHDOG=1\n"), hangs)
        };
        assert_eq!(step(beats(1), 10), (false, false));
        assert_eq!(step(beats(5), 500), (true, false));
        assert_eq!(step(beats(5), 980), (false, false));
        assert_eq!(step(beats(5), 1000), (false, true), "it has not beaten for half of the time");
        assert_eq!(step(beats(5), 1020), (false, false), "said once");
        let next = |beats| Seen { beats, supervisors: 2, ..RUNS };
        assert_eq!(step(next(5), 1040), (false, false), "the next one has only begun");
        assert_eq!(step(next(6), 1100), (true, false), "and lives");
        assert_eq!(step(next(6), 1700), (false, true));
        let third = Seen { supervisors: 3, ..beats(6) };
        assert_eq!(step(third, 1720), (false, false));
        assert_eq!(step(third, 2300), (false, true), "without ever having lived");
        let ending = Seen { ending: true, supervisors: 4, beats: 6, ..RUNS };
        assert_eq!(step(ending, 2320), (false, false), "the last one");
        assert_eq!(step(ending, 9000), (false, false), "what is written at the end takes its time");
    }

    #[test]
    fn a_program_that_has_a_watchdog_keeps_to_it() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut talk = Talk::new(Ready::Started, Some(Duration::from_secs(1)), begin);
        let answers = |talk: &mut Talk, seen: Seen, ms| talk.say(&seen, at(ms)).0[1].contains("WATCHDOG=1\n");
        let beats = |beats| Seen { beats, ..RUNS };
        assert!(answers(&mut talk, beats(2), 600), "one that has none need not");
        assert_eq!(talk.hear("WATCHDOG=1", at(900)), "");
        assert!(answers(&mut talk, beats(3), 1300));
        assert!(answers(&mut talk, beats(4), 1850));
        assert!(!answers(&mut talk, beats(5), 2400), "it is silent for longer than it may");
        // A program that is being brought back cannot speak.
        assert!(answers(&mut talk, Seen { runs: false, ..beats(6) }, 2500));
        assert!(answers(&mut talk, beats(7), 3300));
        assert!(!answers(&mut talk, beats(8), 3900));
        assert_eq!(
            talk.hear("WATCHDOG_USEC=4000000\nWATCHDOG=trigger", at(4000)),
            "WATCHDOG_USEC=4000000\nWATCHDOG=trigger\n"
        );
        assert!(answers(&mut talk, beats(9), 6000));
        assert!(!answers(&mut talk, beats(10), 7000));
    }

    #[test]
    fn other_lines_pass() {
        let mut talk = Talk::new(Ready::Started, None, Instant::now());
        let mut hear = |text| talk.hear(text, Instant::now());
        assert_eq!(hear("FDSTORE=1\nFDNAME=a\n"), "FDSTORE=1\nFDNAME=a\n");
        assert_eq!(hear("BARRIER=1"), "BARRIER=1\n");
        assert_eq!(
            hear("EXTEND_TIMEOUT_USEC=7\nNOTIFYACCESS=all\nERRNO=2\nnonsense"),
            "EXTEND_TIMEOUT_USEC=7\nERRNO=2\n"
        );
        assert_eq!(hear(""), "");
    }
}

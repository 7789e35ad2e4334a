//! Commands to a running unit, over the socket `ctl.sock` in its directory.
//!
//! A connection carries one JSON object a line: `{"cmd":"status"}`, `{"cmd":"checkpoint"}` or
//! `{"cmd":"stop"}`. Each gets a line back: `{"ok":true,"status":{...}}` (without `status` for
//! `stop`) or `{"ok":false,"error":"..."}`. Only root and the user who runs the unit are heard.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use crate::report::Error;
use crate::run::lock;
use crate::status::Status;
use crate::unitdir::UnitDir;

/// Longest request, in bytes.
const REQUEST_BYTES_MAX: u64 = 4096;
/// Longest reply, in bytes.
const REPLY_BYTES_MAX: u64 = 1 << 20;
/// Connections served at a time. One more ends the oldest of those that have asked nothing.
const CONNECTIONS_MAX: usize = 16;
/// A connection that says nothing for this long is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// How long a client waits for the live status before it takes the written one.
const STATUS_WAIT: Duration = Duration::from_secs(2);
/// How long an order waits for a supervisor to answer at all.
const START_WAIT: Duration = Duration::from_secs(10);
/// How long a client waits for a checkpoint or a stop.
const WORK_WAIT: Duration = Duration::from_secs(120);

/// What a supervisor does when it is asked. Called on threads of its own.
pub trait Handler: Send + Sync {
    /// The status now.
    fn status(&self) -> Status;
    /// Takes a checkpoint; the status after it.
    fn checkpoint(&self) -> Result<Status, String>;
    /// Begins to stop the unit.
    fn stop(&self) -> Result<(), String>;
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
enum Request {
    Status,
    Checkpoint,
    Stop,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Reply {
    ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<Box<Status>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Reply {
    fn error(error: impl Into<String>) -> Self {
        Self { ok: false, status: None, error: Some(error.into()) }
    }

    fn status(status: Status) -> Self {
        Self { ok: true, status: Some(Box::new(status)), error: None }
    }
}

/// Serves commands on a thread until the process ends. Start it from a thread with ftrun's own
/// descriptor table.
pub fn serve(listener: UnixListener, handler: Arc<dyn Handler>) -> io::Result<()> {
    let spawn = thread::Builder::new().name("ftrun-control".into());
    spawn.spawn(move || accept(&listener, &handler))?;
    Ok(())
}

fn accept(listener: &UnixListener, handler: &Arc<dyn Handler>) {
    // Signals are for the threads that wait for them.
    if let Err(e) = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None) {
        tracing::warn!("cannot block signals in the control thread: {e}");
    }
    let open = Arc::new(Table::default());
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::debug!("accept on the control socket: {e}");
                // Out of descriptors or memory, most likely: not a reason to spin.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(place) = Place::of(&open, stream) else { continue };
        let handler = Arc::clone(handler);
        let spawned = thread::Builder::new().name("ftrun-control".into()).spawn(move || {
            if let Err(e) = converse(&place, &*handler) {
                tracing::debug!("control connection: {e}");
            }
        });
        if let Err(e) = spawned {
            tracing::warn!("cannot start a thread for a control connection: {e}");
        }
    }
}

/// The open connections, the oldest first.
#[derive(Debug, Default)]
struct Table(Mutex<Vec<Arc<Connection>>>);

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    /// What it has asked for is being done.
    works: AtomicBool,
}

/// A connection's place in the table; given back with the value.
#[derive(Debug)]
struct Place {
    table: Arc<Table>,
    connection: Arc<Connection>,
}

impl Place {
    /// A place for a new connection. Somebody who says nothing gives his up for it; whose order is being carried out does not.
    fn of(table: &Arc<Table>, stream: UnixStream) -> Option<Self> {
        let connection = Arc::new(Connection { stream, works: AtomicBool::new(false) });
        let mut open = lock(&table.0);
        if open.len() >= CONNECTIONS_MAX {
            let idle = open.iter().position(|c| !c.works.load(SeqCst))?;
            // It may have hung up already; its thread ends with it.
            let _gone = open.remove(idle).stream.shutdown(Shutdown::Both);
        }
        open.push(Arc::clone(&connection));
        Some(Self { table: Arc::clone(table), connection })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.table.0).retain(|c| !Arc::ptr_eq(c, &self.connection));
    }
}

fn converse(place: &Place, handler: &dyn Handler) -> io::Result<()> {
    let Connection { stream, works } = &*place.connection;
    stream.set_read_timeout(Some(IDLE_MAX))?;
    stream.set_write_timeout(Some(IDLE_MAX))?;
    let peer = getsockopt(stream, PeerCredentials)?.uid();
    if peer != 0 && peer != geteuid().as_raw() {
        let refusal = "only root and the user who runs the unit may control it";
        return send(stream, &Reply::error(refusal));
    }
    let mut lines = BufReader::new(stream);
    while let Some(line) = read_line(&mut lines, REQUEST_BYTES_MAX)? {
        works.store(true, SeqCst);
        let reply = match serde_json::from_slice(&line) {
            Ok(Request::Status) => Reply::status(handler.status()),
            Ok(Request::Checkpoint) => handler.checkpoint().map_or_else(Reply::error, Reply::status),
            Ok(Request::Stop) => {
                let ok = Reply { ok: true, ..Reply::default() };
                handler.stop().map_or_else(Reply::error, |()| ok)
            }
            Err(e) => Reply::error(format!("not a request: {e}")),
        };
        works.store(false, SeqCst);
        send(stream, &reply)?;
    }
    Ok(())
}

fn send<T: Serialize>(mut stream: &UnixStream, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// A line without its end, `None` at the end of the stream.
fn read_line(from: &mut impl BufRead, max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    if from.by_ref().take(max).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        let what = "a line is cut short or too long";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(Some(line))
}

fn ask(unit: &UnitDir, request: Request, wait: Duration) -> io::Result<Reply> {
    let stream = unit.connect_control()?;
    stream.set_read_timeout(Some(wait))?;
    stream.set_write_timeout(Some(wait))?;
    send(&stream, &request)?;
    let line = read_line(&mut BufReader::new(&stream), REPLY_BYTES_MAX)?;
    let line = line.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(serde_json::from_slice(&line)?)
}

/// The status of a unit: from its supervisor if that answers, otherwise as last written.
pub fn status(unit: &UnitDir) -> Result<Status, Error> {
    if unit.is_running()
        && let Ok(Reply { status: Some(status), .. }) = ask(unit, Request::Status, STATUS_WAIT)
    {
        return Ok(*status);
    }
    unit.read_status()
}

/// The status of every unit of a state directory, by name. Supervisors are asked at the same time, so that one that is slow
/// to answer does not hold up the others.
pub fn statuses(state_dir: &Path) -> Result<Vec<Status>, Error> {
    let names = UnitDir::list(state_dir)?;
    let one = |name: &str| UnitDir::open(state_dir, name).and_then(|unit| status(&unit));
    let asked: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = names.iter().map(|name| scope.spawn(|| one(name))).collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let mut found = Vec::new();
    for (name, asked) in names.iter().zip(asked) {
        match asked {
            Ok(Ok(status)) => found.push(status),
            // One unit that cannot be read does not hide the others.
            Ok(Err(e)) => tracing::warn!("{name}: {e}"),
            Err(_) => return Err(Error::bug(format!("the thread that asked {name} has ended"))),
        }
    }
    Ok(found)
}

/// Takes a checkpoint of a running unit; its status after that.
pub fn checkpoint(unit: &UnitDir) -> Result<Status, Error> {
    match order(unit, Request::Checkpoint)?.status {
        Some(status) => Ok(*status),
        None => Err(Error::bug("the supervisor's answer to `checkpoint` holds no status")),
    }
}

/// Stops a running unit and waits until its supervisor is gone.
pub fn stop(unit: &UnitDir) -> Result<(), Error> {
    order(unit, Request::Stop)?;
    let end = Instant::now() + WORK_WAIT;
    while unit.is_running() {
        if Instant::now() > end {
            return Err(Error::environment(
                format!("the unit {} did not stop in {} s", unit.name(), WORK_WAIT.as_secs()),
                format!("see what it does: ftrun status {}", unit.name()),
            ));
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn order(unit: &UnitDir, request: Request) -> Result<Reply, Error> {
    let name = unit.name();
    if !unit.is_running() {
        let hint = format!("see its last state: ftrun status {name}");
        return Err(Error::environment(format!("the unit {name} is not running"), hint));
    }
    let end = Instant::now() + START_WAIT;
    let reply = loop {
        match ask(unit, request, WORK_WAIT) {
            // A supervisor that was killed has a successor in a moment; both orders may be given twice.
            Err(e) if may_have_died(&e) && unit.is_running() && Instant::now() < end => {
                thread::sleep(Duration::from_millis(10));
            }
            reply => break reply,
        }
    };
    let reply = reply.map_err(|e| {
        Error::environment(
            format!("the supervisor of {name} does not answer: {e}"),
            "it may be starting or recovering: try again",
        )
    })?;
    match reply.error {
        None if reply.ok => Ok(reply),
        error => Err(Error::environment(format!("the unit {name} refused: {}", error.unwrap_or_default()), "")),
    }
}

fn may_have_died(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(e.kind(), BrokenPipe | ConnectionRefused | ConnectionReset | NotFound | UnexpectedEof)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(Mutex<Option<UnitDir>>);

    impl Handler for Fake {
        fn status(&self) -> Status {
            Status { events: 7, ..Status::default() }
        }

        fn checkpoint(&self) -> Result<Status, String> {
            Err("not now".into())
        }

        fn stop(&self) -> Result<(), String> {
            drop(self.0.lock().unwrap().take());
            Ok(())
        }
    }

    /// A unit that is served, and its state directory.
    fn served() -> (tempfile::TempDir, UnitDir) {
        let state = tempfile::tempdir().unwrap();
        let mut ours = UnitDir::create(state.path(), "u").unwrap();
        ours.begin().unwrap();
        let listener = ours.bind_control().unwrap();
        serve(listener, Arc::new(Fake(Mutex::new(Some(ours))))).unwrap();
        let unit = UnitDir::open(state.path(), "u").unwrap();
        (state, unit)
    }

    /// Everybody who holds a connection and says nothing, or never the end of a line, makes room for somebody who asks.
    ///
    /// Break it: turn the new one away instead (`Place::of`).
    #[test]
    fn silent_connections_hold_up_nobody() {
        let (_state, unit) = served();
        let mut held = Vec::new();
        for n in 0..2000 {
            let mut silent = unit.connect_control().unwrap();
            // A part of a line, or none. It may have had to make room already.
            let _ = silent.write(&b"{\"cmd\":"[..n % 8]);
            held.push(silent);
            if held.len() > 500 {
                held.remove(0);
            }
            if n % 100 == 0 {
                assert_eq!(ask(&unit, Request::Status, STATUS_WAIT).unwrap().status.unwrap().events, 7);
            }
        }
        assert_eq!(ask(&unit, Request::Status, STATUS_WAIT).unwrap().status.unwrap().events, 7);
    }

    #[test]
    fn random_bytes_are_errors_and_nothing_else() {
        let (_state, unit) = served();
        let mut seed = 42u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..300 {
            let mut bytes: Vec<u8> = (0..random() % 5000).map(|_| random() as u8).collect();
            bytes.extend(b"\n");
            let mut stream = unit.connect_control().unwrap();
            // It may have hung up in the middle.
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let mut said = Vec::new();
            // A reset is an end as well.
            let _ = stream.read_to_end(&mut said);
            for line in String::from_utf8_lossy(&said).lines() {
                assert!(line.starts_with("{\"ok\":false,\"error\":\"not a request"), "{line}");
            }
        }
        assert_eq!(ask(&unit, Request::Status, STATUS_WAIT).unwrap().status.unwrap().events, 7);
    }

    #[test]
    fn commands_and_answers() {
        let state = tempfile::tempdir().unwrap();
        let mut ours = UnitDir::create(state.path(), "u").unwrap();
        ours.begin().unwrap();
        let unit = UnitDir::open(state.path(), "u").unwrap();
        let refused = checkpoint(&unit).unwrap_err();
        assert!(refused.to_string().contains("does not answer"), "{refused}");
        assert_eq!(status(&unit).unwrap().events, 0, "as written");

        let listener = ours.bind_control().unwrap();
        serve(listener, Arc::new(Fake(Mutex::new(Some(ours))))).unwrap();
        assert_eq!(status(&unit).unwrap().events, 7, "live");
        let refused = checkpoint(&unit).unwrap_err();
        assert!(refused.to_string().contains("not now"), "{refused}");

        let mut stream = unit.connect_control().unwrap();
        let mut answers = BufReader::new(stream.try_clone().unwrap());
        let mut answer = move |request: &[u8]| {
            stream.write_all(request).unwrap();
            let line = read_line(&mut answers, REPLY_BYTES_MAX).unwrap()?;
            Some(serde_json::from_slice::<serde_json::Value>(&line).unwrap())
        };
        assert_eq!(answer(b"{\"cmd\":\"status\"}\n").unwrap()["status"]["events"], 7);
        for bad in ["\n", "{}\n", "{\"cmd\":\"explode\"}\n", "\u{0}\n"] {
            let reply = answer(bad.as_bytes()).unwrap();
            assert_eq!(reply["ok"], false, "{bad:?}: {reply}");
        }
        assert_eq!(answer(b"{\"cmd\":\"status\"}\n").unwrap()["ok"], true);

        let mut long = unit.connect_control().unwrap();
        long.write_all(&vec![b'x'; REQUEST_BYTES_MAX as usize + 1]).unwrap();
        let mut rest = Vec::new();
        drop(long.read_to_end(&mut rest));
        assert!(rest.is_empty(), "a line that is too long ends the connection");

        stop(&unit).unwrap();
        assert!(!unit.is_running());
        assert!(stop(&unit).unwrap_err().to_string().contains("is not running"));
    }
}

//! A store elsewhere: the client side of `ftstore serve`. Synchronous.
//!
//! Of those who wait for something one reads from the connection, for all of them; whoever has got what it waited for leaves
//! that to another one. So who waits alone is woken by the service and by nobody in between. A thread of its own reads only
//! where somebody wants to be called ([`UnitStore::notify`]).
//!
//! Pages have a connection of their own, which is made when they are first sent or asked for: what waits there for the disk
//! or the network does not hold up records and acknowledgements.

mod connect;
mod unit;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Instant;

use nix::poll::{PollFlags, PollTimeout};

use crate::location::Location;
use crate::net::{Answer, FRAME_BYTES_MAX, Incoming, Op, PUTS_MAX, Request, Response, encode};
use crate::watch::{Look, Watch};
use crate::{Error, Fsck, OpenOptions, Reclaimed, StableStore, UnitInfo, UnitName, UnitStore};
#[cfg(feature = "service")]
pub(crate) use connect::read_key;
use connect::{Link, connect};
use unit::Remote;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client of `ftstore serve`.
pub struct Client {
    main: Connection,
    pages: Arc<ForPages>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.main.shared.location)
    }
}

/// A connection; it ends with the value.
struct Connection {
    shared: Arc<Shared>,
}

/// The connection for pages, once it is needed.
#[derive(Default)]
struct ForPages {
    connection: Mutex<Option<Connection>>,
    /// Checkpoints that are being sent.
    putting: Mutex<usize>,
    /// There are fewer.
    put: Condvar,
}

/// The right to send a checkpoint.
struct Putting<'a>(&'a ForPages);

impl Drop for Putting<'_> {
    fn drop(&mut self) {
        *lock(&self.0.putting) -= 1;
        self.0.put.notify_one();
    }
}

impl ForPages {
    /// The connection beside `main`; a new one if there is none, or the last one has been lost.
    fn connection(&self, main: &Shared) -> Result<Arc<Shared>, Error> {
        let mut connection = lock(&self.connection);
        if let Some(error) = main.failure() {
            return Err(error);
        }
        if let Some(there) = connection.as_ref().filter(|c| c.shared.failure().is_none()) {
            return Ok(Arc::clone(&there.shared));
        }
        let new = Connection::open(&main.location)?;
        Ok(Arc::clone(&connection.insert(new).shared))
    }

    /// Waits until the service takes another checkpoint.
    fn putting(&self) -> Putting<'_> {
        let mut putting = lock(&self.putting);
        while *putting >= PUTS_MAX {
            putting = self.put.wait(putting).unwrap_or_else(PoisonError::into_inner);
        }
        *putting += 1;
        Putting(self)
    }
}

type Reply = Result<(Answer, Vec<u8>), Error>;

struct Shared {
    location: Location,
    link: Link,
    out: Mutex<Out>,
    /// There is room in `out`.
    drained: Condvar,
    next_id: AtomicU64,
    inbox: Mutex<Inbox>,
    /// Of whoever reads.
    input: Mutex<Input>,
    /// Reads when nobody else does, where somebody wants to be called.
    listener: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Input {
    incoming: Incoming,
    buffer: Vec<u8>,
}

/// Bytes that are read at once.
const READ_BYTES: usize = 256 << 10;
/// Batches under way for which nobody has waited, before it is looked whether they have been acknowledged.
const UNREAD_MAX: usize = 256;

/// What is to be sent. Whoever finds nobody sending sends what all have put here.
#[derive(Debug, Default)]
struct Out {
    bytes: Vec<u8>,
    sending: bool,
    /// Somebody has put a part of something larger, which comes first.
    waiting: usize,
}

/// Bytes that may wait to be sent before senders wait, too.
const OUT_BYTES_MAX: usize = 4 << 20;

/// Who waits for what comes in.
#[derive(Default)]
struct Inbox {
    /// Replies that somebody will ask for.
    replies: HashMap<u64, Option<Reply>>,
    units: HashMap<u32, Arc<Watch>>,
    failed: Option<Error>,
    /// Somebody reads.
    reading: bool,
    /// Those who wait while another one reads.
    waiting: Vec<Waiting>,
}

struct Waiting {
    id: u64,
    need: Need,
    thread: Thread,
}

/// What somebody waits for.
#[derive(Clone)]
enum Need {
    Reply(u64),
    /// Something is to be said of a record.
    Record(Arc<Watch>, u64),
    /// There is room for so many bytes more.
    Room(Arc<Watch>, usize),
    /// The end of the connection.
    End,
}

impl Inbox {
    fn has(&self, need: &Need) -> bool {
        self.failed.is_some()
            || match need {
                Need::Reply(id) => self.replies.get(id).is_none_or(Option::is_some),
                Need::Record(watch, sii) => !matches!(watch.look(*sii), Look::Waiting),
                Need::Room(watch, bytes) => watch.has_room(*bytes),
                Need::End => false,
            }
    }

    /// Those who have got what they waited for.
    fn served(&mut self) -> Vec<Waiting> {
        let waiting = std::mem::take(&mut self.waiting);
        let (served, waiting) = waiting.into_iter().partition(|w| self.has(&w.need));
        self.waiting = waiting;
        served
    }
}

fn wake(waiting: &[Waiting]) {
    waiting.iter().for_each(|w| w.thread.unpark());
}

impl Client {
    /// Connects to a service.
    ///
    /// # Errors
    /// [`Error::Disconnected`], [`Error::Refused`], [`Error::Version`]; a file that the URL names cannot be read.
    pub fn connect(location: &Location) -> Result<Self, Error> {
        Ok(Self { main: Connection::open(location)?, pages: Arc::default() })
    }

    fn opened(&self, op: Op, name: &UnitName, options: Option<&OpenOptions>) -> Result<Arc<dyn UnitStore>, Error> {
        let shared = &self.main.shared;
        let (answer, _) = shared.call(op, &[])?;
        let Answer::Opened { handle, epoch, log, acknowledged } = answer else { return Err(shared.odd()) };
        let watch = Arc::new(Watch::new(log.end, acknowledged));
        {
            let mut inbox = lock(&shared.inbox);
            if let Some(e) = &inbox.failed {
                return Err(e.clone());
            }
            inbox.units.insert(handle, Arc::clone(&watch));
        }
        let (shared, pages) = (Arc::clone(shared), Arc::clone(&self.pages));
        Ok(Arc::new(Remote::new(shared, pages, name.clone(), handle, epoch, watch, options.cloned())))
    }
}

impl Connection {
    fn open(location: &Location) -> Result<Self, Error> {
        let link = connect(location)?;
        let shared = Arc::new(Shared {
            location: location.clone(),
            link,
            out: Mutex::default(),
            drained: Condvar::new(),
            next_id: AtomicU64::new(1),
            inbox: Mutex::default(),
            input: Mutex::default(),
            listener: Mutex::default(),
        });
        Ok(Self { shared })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Handles that are left find the connection gone.
        self.shared.link.socket.shutdown();
        let listener = lock(&self.shared.listener).take();
        if let Some(listener) = listener {
            // A thread that panicked has said so.
            let _ = listener.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Lest a handle that is left makes another one.
        self.main.shared.fail(&"this client has ended");
        drop(lock(&self.pages.connection).take());
    }
}

impl Shared {
    fn odd(&self) -> Error {
        Error::Disconnected { server: self.location.to_string(), why: "it gave an answer to another question".into() }
    }

    fn lost(&self, why: &dyn fmt::Display) -> Error {
        Error::Disconnected { server: self.location.to_string(), why: why.to_string() }
    }

    /// Why the connection cannot be used any more.
    fn failure(&self) -> Option<Error> {
        lock(&self.inbox).failed.clone()
    }

    /// Sends a frame; several threads' frames go out together.
    fn send(&self, message: &Request, bytes: &[u8]) -> Result<(), Error> {
        if let Some(e) = self.failure() {
            return Err(e);
        }
        let mut out = lock(&self.out);
        while out.bytes.len() > OUT_BYTES_MAX && out.sending {
            out.waiting += 1;
            out = self.drained.wait(out).unwrap_or_else(PoisonError::into_inner);
            out.waiting -= 1;
        }
        encode(&mut out.bytes, message, bytes);
        self.flush(out).map_err(|e| self.fail(&e))
    }

    /// Sends what there is, unless somebody does already.
    fn flush<'a>(&'a self, mut out: MutexGuard<'a, Out>) -> io::Result<()> {
        if out.sending {
            return Ok(());
        }
        out.sending = true;
        let mut buffer = Vec::new();
        loop {
            buffer.clear();
            std::mem::swap(&mut buffer, &mut out.bytes);
            if out.waiting > 0 {
                self.drained.notify_all();
            }
            drop(out);
            let sent = self.link.send(&buffer, &|| self.no_room());
            out = lock(&self.out);
            if sent.is_err() || out.bytes.is_empty() {
                out.sending = false;
                if out.bytes.is_empty() && buffer.capacity() <= OUT_BYTES_MAX {
                    buffer.clear();
                    out.bytes = buffer;
                }
                return sent;
            }
        }
    }

    fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// What is sent is not taken: what comes in meanwhile is read, lest both sides wait for each other.
    fn no_room(&self) -> io::Result<()> {
        let what = PollFlags::POLLIN | PollFlags::POLLOUT;
        let mine = !std::mem::replace(&mut lock(&self.inbox).reading, true);
        // Whoever reads may stop.
        let (what, time) = if mine { (what, PollTimeout::NONE) } else { (PollFlags::POLLOUT, PollTimeout::from(50u8)) };
        let ready = self.link.ready(what, time);
        if mine {
            let ready = ready.as_ref().is_ok_and(|ready| !(*ready & !PollFlags::POLLOUT).is_empty());
            let why = if ready { self.read_once() } else { None };
            self.leave();
            if let Some(why) = why {
                return Err(io::Error::other(why));
            }
        }
        ready.map(drop)
    }

    /// Says that the reply to a request will be asked for.
    fn expect(&self, id: u64) -> Result<(), Error> {
        let mut inbox = lock(&self.inbox);
        if let Some(e) = &inbox.failed {
            return Err(e.clone());
        }
        inbox.replies.insert(id, None);
        Ok(())
    }

    /// Waits for a reply.
    fn reply(&self, id: u64) -> Reply {
        self.wait_for(&Need::Reply(id), None);
        let mut inbox = lock(&self.inbox);
        let reply = inbox.replies.remove(&id).flatten();
        reply.unwrap_or_else(|| Err(inbox.failed.clone().unwrap_or_else(|| self.odd())))
    }

    fn call(&self, op: Op, bytes: &[u8]) -> Reply {
        let id = self.id();
        self.expect(id)?;
        self.send(&Request { id, op }, bytes)?;
        self.reply(id)
    }

    /// Waits for something, or the end of the connection; false when the time is over.
    fn wait_for(&self, need: &Need, end: Option<Instant>) -> bool {
        let id = self.id();
        let mut inbox = lock(&self.inbox);
        loop {
            if inbox.has(need) {
                break;
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            if !inbox.reading {
                inbox.reading = true;
                inbox.waiting.retain(|w| w.id != id);
                drop(inbox);
                let time = left.map_or(PollTimeout::NONE, |left| {
                    PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX)
                });
                self.read(time);
                inbox = lock(&self.inbox);
                inbox.reading = false;
                continue;
            }
            if !inbox.waiting.iter().any(|w| w.id == id) {
                inbox.waiting.push(Waiting { id, need: need.clone(), thread: std::thread::current() });
            }
            drop(inbox);
            match left {
                None => std::thread::park(),
                Some(left) => std::thread::park_timeout(left),
            }
            inbox = lock(&self.inbox);
        }
        inbox.waiting.retain(|w| w.id != id);
        let met = inbox.has(need);
        self.hand_over(&inbox);
        met
    }

    /// If nobody reads, one of those who wait does.
    fn hand_over(&self, inbox: &Inbox) {
        if !inbox.reading
            && let Some(next) = inbox.waiting.first()
        {
            next.thread.unpark();
        }
    }

    /// Ends reading.
    fn leave(&self) {
        let mut inbox = lock(&self.inbox);
        inbox.reading = false;
        self.hand_over(&inbox);
    }

    /// Takes what has come in, if nobody reads.
    fn drain(&self) {
        if !std::mem::replace(&mut lock(&self.inbox).reading, true) {
            self.read(PollTimeout::ZERO);
            self.leave();
        }
    }

    /// Has a thread read when nobody else does.
    fn listen(self: &Arc<Self>) {
        let mut listener = lock(&self.listener);
        if listener.is_none() {
            let shared = Arc::clone(self);
            let thread = std::thread::Builder::new().name("store-client".into());
            let listen = move || {
                shared.wait_for(&Need::End, None);
            };
            match thread.spawn(listen) {
                Ok(thread) => *listener = Some(thread),
                Err(e) => drop(self.fail(&e)),
            }
        }
    }

    fn done(&self, op: Op) -> Result<(), Error> {
        match self.call(op, &[])? {
            (Answer::Done, _) => Ok(()),
            _ => Err(self.odd()),
        }
    }

    /// The connection cannot be used any more.
    fn fail(&self, why: &dyn fmt::Display) -> Error {
        let (error, units, served) = {
            let mut inbox = lock(&self.inbox);
            let error = inbox.failed.get_or_insert_with(|| self.lost(why)).clone();
            (error, inbox.units.values().cloned().collect::<Vec<_>>(), inbox.served())
        };
        self.link.socket.shutdown();
        self.drained.notify_all();
        units.iter().for_each(|unit| unit.fail(&error, true));
        wake(&served);
        error
    }

    /// Reads what there is, or waits for it. Only one thread may be in here.
    fn read(&self, time: PollTimeout) {
        // Without a limit reading waits by itself.
        let ready = if time.is_none() { Ok(PollFlags::POLLIN) } else { self.link.ready(PollFlags::POLLIN, time) };
        let why = match ready {
            Ok(ready) if ready.is_empty() => return,
            Ok(_) => self.read_once(),
            Err(e) => Some(e.to_string()),
        };
        if let Some(why) = why {
            self.fail(&why);
        }
    }

    /// Reads once; says why the connection cannot be used any more.
    fn read_once(&self) -> Option<String> {
        let mut input = lock(&self.input);
        let Input { incoming, buffer } = &mut *input;
        buffer.resize(READ_BYTES, 0);
        match self.link.receive(incoming, buffer) {
            Ok((0, _)) => return Some("it has hung up".to_owned()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return None,
            Err(e) => return Some(e.to_string()),
            Ok((_, false)) => {}
            Ok((_, true)) => {
                if let Err(e) = self.flush(lock(&self.out)) {
                    return Some(e.to_string());
                }
            }
        }
        let why = loop {
            match incoming.next::<Response>(FRAME_BYTES_MAX) {
                Ok(Some((response, bytes))) => self.take(response, bytes),
                Ok(None) => break None,
                Err(why) => break Some(why),
            }
        };
        let served = lock(&self.inbox).served();
        wake(&served);
        why
    }

    fn take(&self, response: Response, bytes: Vec<u8>) {
        let unit = |handle: &u32| lock(&self.inbox).units.get(handle).cloned();
        match response {
            Response::Reply { id, result } => {
                // Whoever asked may have gone.
                if let Some(reply) = lock(&self.inbox).replies.get_mut(&id) {
                    *reply = Some(result.map(|answer| (answer, bytes)));
                }
            }
            Response::Acknowledged(all) => {
                let units: Vec<_> = {
                    let inbox = lock(&self.inbox);
                    all.iter().filter_map(|(handle, sii)| Some((inbox.units.get(handle).cloned()?, *sii))).collect()
                };
                units.iter().for_each(|(unit, sii)| unit.acknowledge(*sii));
            }
            Response::AppendFailed { handle, error } => {
                if let Some(unit) = unit(&handle) {
                    unit.fail(&error, false);
                }
            }
            Response::Stuck { handle, error } => {
                if let Some(unit) = unit(&handle) {
                    unit.stuck(&error);
                }
            }
        }
    }
}

impl StableStore for Client {
    fn open(&self, unit: &UnitName, options: &OpenOptions) -> Result<Arc<dyn UnitStore>, Error> {
        self.opened(Op::Open { unit: unit.clone(), options: options.clone() }, unit, Some(options))
    }

    fn view(&self, unit: &UnitName) -> Result<Arc<dyn UnitStore>, Error> {
        self.opened(Op::View { unit: unit.clone() }, unit, None)
    }

    fn units(&self) -> Result<Vec<UnitInfo>, Error> {
        match self.main.shared.call(Op::Units, &[])? {
            (Answer::Units(units), _) => Ok(units),
            _ => Err(self.main.shared.odd()),
        }
    }

    fn remove(&self, unit: &UnitName) -> Result<(), Error> {
        self.main.shared.done(Op::Remove { unit: unit.clone() })
    }

    fn fsck(&self) -> Result<Fsck, Error> {
        match self.main.shared.call(Op::Fsck, &[])? {
            (Answer::Fsck(report), _) => Ok(report),
            _ => Err(self.main.shared.odd()),
        }
    }

    fn gc(&self) -> Result<Reclaimed, Error> {
        match self.main.shared.call(Op::Gc, &[])? {
            (Answer::Gc(reclaimed), _) => Ok(reclaimed),
            _ => Err(self.main.shared.odd()),
        }
    }
}

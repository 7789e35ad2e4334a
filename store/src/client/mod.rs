//! A store elsewhere: the client side of `ftstore serve`. Synchronous; one thread reads from each connection.
//!
//! Pages have a connection of their own, which is made when they are first sent or asked for: what waits there for the disk
//! or the network does not hold up records and acknowledgements.

mod connect;
mod unit;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::location::Location;
use crate::net::{Answer, FRAME_BYTES_MAX, Incoming, Op, Request, Response, encode};
use crate::watch::Watch;
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

/// A connection, and the thread that reads from it.
struct Connection {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

/// The connection for pages, once it is needed.
#[derive(Default)]
struct ForPages(Mutex<Option<Connection>>);

impl ForPages {
    /// The connection beside `main`; a new one if there is none, or the last one has been lost.
    fn connection(&self, main: &Shared) -> Result<Arc<Shared>, Error> {
        let mut connection = lock(&self.0);
        if let Some(error) = main.failure() {
            return Err(error);
        }
        if let Some(there) = connection.as_ref().filter(|c| c.shared.failure().is_none()) {
            return Ok(Arc::clone(&there.shared));
        }
        let new = Connection::open(&main.location)?;
        Ok(Arc::clone(&connection.insert(new).shared))
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
}

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
    replies: HashMap<u64, SyncSender<Reply>>,
    units: HashMap<u32, Arc<Watch>>,
    failed: Option<Error>,
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
        });
        let of_thread = Arc::clone(&shared);
        let reader = std::thread::Builder::new().name("store-client".into()).spawn(move || of_thread.read());
        let reader = reader.map_err(|e| Error::io("start a thread for", location.to_string(), &e))?;
        Ok(Self { shared, reader: Some(reader) })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Handles that are left find the connection gone.
        self.shared.link.socket.shutdown();
        if let Some(reader) = self.reader.take() {
            // A thread that panicked has said so.
            let _ = reader.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Lest a handle that is left makes another one.
        self.main.shared.fail(&"this client has ended");
        drop(lock(&self.pages.0).take());
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
            let sent = self.link.send(&buffer);
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

    /// Says where the reply to a request is to go.
    fn expect(&self, id: u64) -> Result<Receiver<Reply>, Error> {
        let (sender, receiver) = sync_channel(1);
        let mut inbox = lock(&self.inbox);
        if let Some(e) = &inbox.failed {
            return Err(e.clone());
        }
        inbox.replies.insert(id, sender);
        Ok(receiver)
    }

    fn wait(&self, reply: &Receiver<Reply>) -> Reply {
        reply.recv().unwrap_or_else(|_| Err(lock(&self.inbox).failed.clone().unwrap_or_else(|| self.odd())))
    }

    fn call(&self, op: Op, bytes: &[u8]) -> Reply {
        let id = self.id();
        let reply = self.expect(id)?;
        self.send(&Request { id, op }, bytes)?;
        self.wait(&reply)
    }

    fn done(&self, op: Op) -> Result<(), Error> {
        match self.call(op, &[])? {
            (Answer::Done, _) => Ok(()),
            _ => Err(self.odd()),
        }
    }

    /// The connection cannot be used any more.
    fn fail(&self, why: &dyn fmt::Display) -> Error {
        let (error, units) = {
            let mut inbox = lock(&self.inbox);
            let error = inbox.failed.get_or_insert_with(|| self.lost(why)).clone();
            inbox.replies.clear();
            (error, inbox.units.values().cloned().collect::<Vec<_>>())
        };
        self.link.socket.shutdown();
        self.drained.notify_all();
        units.iter().for_each(|unit| unit.fail(&error, true));
        error
    }

    fn read(&self) {
        let mut incoming = Incoming::default();
        let mut buffer = vec![0; 256 << 10];
        let why = loop {
            match self.link.receive(&mut incoming, &mut buffer) {
                Ok((0, _)) => break "it has hung up".to_owned(),
                Err(e) => break e.to_string(),
                Ok((_, false)) => {}
                Ok((_, true)) => {
                    if let Err(e) = self.flush(lock(&self.out)) {
                        break e.to_string();
                    }
                }
            }
            let bad = loop {
                match incoming.next::<Response>(FRAME_BYTES_MAX) {
                    Ok(Some((response, bytes))) => self.take(response, bytes),
                    Ok(None) => break None,
                    Err(why) => break Some(why),
                }
            };
            if let Some(why) = bad {
                break why;
            }
        };
        self.fail(&why);
    }

    fn take(&self, response: Response, bytes: Vec<u8>) {
        let unit = |handle: &u32| lock(&self.inbox).units.get(handle).cloned();
        match response {
            Response::Reply { id, result } => {
                if let Some(reply) = lock(&self.inbox).replies.remove(&id) {
                    // Whoever asked may have gone.
                    let _ = reply.send(result.map(|answer| (answer, bytes)));
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

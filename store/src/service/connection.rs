//! One connection: a task that reads and one that writes. (Who commits may write in the place of the latter:
//! [`super::acknowledge`].)

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};

use super::acknowledge::{Handles, Open, Ready};
use super::greet::{Entry, Namespace, Peer};
use super::{Service, count, lock};
use crate::engine::Handle;
use crate::net::{
    Answer, FRAME_BYTES_MAX, HANDSHAKE_BYTES_MAX, Hello, Incoming, MAGIC, Op, PUTS_MAX, Proof, Prover, Request,
    Response, VERSIONS, Welcome, encode, nonce, proof, same,
};
use crate::{Batch, Durability, Error, NewCheckpoint, PAGE_BYTES, Page, Pages, StableStore, UnitStore, net};

/// Requests of one connection that are worked on at a time beside checkpoints; reading waits when there are more.
pub(super) const AT_A_TIME: usize = 8;
/// Replies of one connection that wait to be sent, beside those that are worked on.
const REPLIES_WAIT: usize = 1;
/// Units that one connection may have open.
const HANDLES_MAX: usize = 1 << 16;
/// Bytes that may be read at once.
const READ_AHEAD: usize = 64 << 10;
/// Bytes of records in one reply, and one batch more.
const READ_BYTES: usize = 128 << 10;
/// Pages in one reply.
const READ_PAGES: usize = 1024;
/// A frame, and whatever else a client must go on with, may take so many times as long as the handshake.
const FRAME_TIMES: u32 = 6;

/// Reads the next frame; `None` when the other side has ended between frames. Whatever else happens ends the connection.
async fn hear<M: serde::de::DeserializeOwned>(
    read: &mut (impl AsyncRead + Unpin),
    incoming: &mut Incoming,
    bytes_max: usize,
    deadline: Option<Instant>,
    frame_time: Duration,
) -> Result<Option<(M, Vec<u8>)>, String> {
    let mut deadline = deadline;
    loop {
        if let Some(frame) = incoming.next(bytes_max)? {
            return Ok(Some(frame));
        }
        if deadline.is_none() && incoming.is_partial() {
            deadline = Some(Instant::now() + frame_time);
        }
        let reading = read.read_buf(incoming.space(READ_AHEAD));
        let n = match deadline {
            None => reading.await,
            Some(deadline) => timeout_at(deadline, reading).await.map_err(|_| "it was too slow")?,
        };
        match n.map_err(|e| e.to_string())? {
            0 if incoming.is_partial() => return Err("it ended within a frame".into()),
            0 => return Ok(None),
            _ => {}
        }
    }
}

async fn say(write: &mut (impl AsyncWrite + Unpin), message: &impl serde::Serialize) -> Result<(), String> {
    let mut out = Vec::new();
    encode(&mut out, message, &[]);
    write.write_all(&out).await.map_err(|e| e.to_string())?;
    write.flush().await.map_err(|e| e.to_string())
}

/// Lets a client in, or not.
async fn greet(
    service: &Service,
    read: &mut (impl AsyncRead + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
    incoming: &mut Incoming,
    peer: &Peer,
) -> Result<Option<Namespace>, String> {
    let time = Duration::from_secs(service.limits.handshake_seconds);
    let deadline = Some(Instant::now() + time);
    let Some((hello, _)) = hear::<Hello>(read, incoming, HANDSHAKE_BYTES_MAX, deadline, time).await? else {
        return Ok(None);
    };
    if hello.magic != MAGIC {
        return Err("it does not speak our protocol".into());
    }
    let version = hello.versions.0.min(VERSIONS.0);
    if version < VERSIONS.1 || version < hello.versions.1 {
        let what = "this ftstore".to_owned();
        let error = Error::Version { what, found: VERSIONS.0, known: hello.versions.0 };
        say(write, &Welcome::Refused(error)).await?;
        return Err(format!("it speaks versions {:?}", hello.versions));
    }
    let nonce = nonce().map_err(|e| e.to_string())?;
    let refused = || Error::Refused {
        server: "ftstore".into(),
        why: "nobody with this name and proof is in its configuration ([[client]])".into(),
    };
    let entry = service.door.admit(peer, &hello.client);
    let tcp = matches!(peer, Peer::Tcp { certificate: None, .. });
    if !tcp && entry.is_none() {
        count(&service.figures.refused);
        say(write, &Welcome::Refused(refused())).await?;
        return Ok(None);
    }
    if let Some(Entry::Open(namespace)) = entry {
        say(write, &Welcome::Version { version, prove: false, nonce }).await?;
        say(write, &net::Ready::Yes(None)).await?;
        return Ok(Some(namespace));
    }
    // Whether the name is known does not show before the proof.
    say(write, &Welcome::Version { version, prove: true, nonce }).await?;
    let Some((theirs, _)) = hear::<Proof>(read, incoming, HANDSHAKE_BYTES_MAX, deadline, time).await? else {
        return Ok(None);
    };
    let channel = match peer {
        Peer::Tcp { channel, .. } => *channel,
        Peer::Unix { .. } => [0; 32],
    };
    let nonces = [&hello.nonce, &nonce];
    if let Some(Entry::Prove(key, namespace)) = entry
        && same(&theirs.mac, &proof(key, Prover::Client(&hello.client), nonces, &channel))
    {
        say(write, &net::Ready::Yes(Some(proof(key, Prover::Service, nonces, &channel)))).await?;
        return Ok(Some(namespace));
    }
    count(&service.figures.refused);
    say(write, &net::Ready::Refused(refused())).await?;
    Ok(None)
}

/// Serves a connection until it ends.
pub(super) async fn run(
    service: Arc<Service>,
    mut read: impl AsyncRead + Unpin,
    mut write: impl AsyncWrite + Unpin + Send + 'static,
    direct: Option<OwnedFd>,
    peer: Peer,
) {
    let mut incoming = Incoming::default();
    let namespace = match greet(&service, &mut read, &mut write, &mut incoming, &peer).await {
        Ok(Some(namespace)) => namespace,
        Ok(None) => return,
        Err(why) => {
            count(&service.figures.broken);
            tracing::debug!(why, "a connection was ended");
            return;
        }
    };
    let handles = Arc::new(Handles::default());
    lock(&handles.direct).socket = direct;
    let time = FRAME_TIMES * Duration::from_secs(service.limits.handshake_seconds);
    let (sender, receiver) = mpsc::channel(REPLIES_WAIT);
    let mut writer = tokio::spawn(send(write, receiver, Arc::clone(&handles), time));
    let mut session = Session {
        service: Arc::clone(&service),
        namespace,
        handles: Arc::clone(&handles),
        sender,
        busy: Arc::new(Semaphore::new(AT_A_TIME)),
        putting: Arc::new(Semaphore::new(PUTS_MAX)),
        next_handle: Arc::default(),
        puts: HashMap::new(),
        appended: None,
        stored: Vec::new(),
    };
    let mut ending = service.ending.clone();
    let mut written = None;
    loop {
        // Work is done on pages that are to come; it does not wait for them for ever.
        let deadline = (!session.puts.is_empty()).then(|| Instant::now() + time);
        let frame = tokio::select! {
            _ = ending.wait_for(|e| *e) => break,
            end = &mut writer => {
                written = Some(end);
                Err("it has not taken what it asked for".into())
            }
            frame = hear::<Request>(&mut read, &mut incoming, FRAME_BYTES_MAX, deadline, time) => frame,
        };
        let mut taken = match frame {
            Ok(Some((request, bytes))) => session.take(request, bytes).await,
            Ok(None) => ControlFlow::Break(None),
            Err(why) => ControlFlow::Break(Some(why)),
        };
        // What has come with it.
        while taken.is_continue() {
            match incoming.next::<Request>(FRAME_BYTES_MAX) {
                Ok(Some((request, bytes))) => taken = session.take(request, bytes).await,
                Ok(None) => break,
                Err(why) => taken = ControlFlow::Break(Some(why)),
            }
        }
        session.commit();
        if let ControlFlow::Break(why) = taken {
            if let Some(why) = why {
                count(&service.figures.broken);
                tracing::debug!(why, "a connection was ended");
            }
            break;
        }
    }
    // What is being worked on is answered before the writer ends; acknowledgements that come later are not sent.
    let (busy, putting) = (Arc::clone(&session.busy), Arc::clone(&session.putting));
    drop(session);
    let all = |places: usize| u32::try_from(places).expect("few");
    let _ = tokio::join!(busy.acquire_many(all(AT_A_TIME)), putting.acquire_many(all(PUTS_MAX)));
    lock(&handles.units).clear();
    handles.wake.notify_one();
    // One that does not read is not waited for.
    if written.is_none() {
        let _ = tokio::time::timeout(time, writer).await;
    }
}

/// Writes all of `bytes`; false if the other side has gone, or takes nothing for so long.
async fn write_all(write: &mut (impl AsyncWrite + Unpin), mut bytes: &[u8], time: Duration) -> bool {
    while !bytes.is_empty() {
        match timeout_at(Instant::now() + time, write.write(bytes)).await {
            Ok(Ok(n)) if n > 0 => bytes = &bytes[n..],
            _ => return false,
        }
    }
    matches!(timeout_at(Instant::now() + time, write.flush()).await, Ok(Ok(())))
}

/// Writes replies and acknowledgements, many at a time.
async fn send(
    mut write: impl AsyncWrite + Unpin,
    mut receiver: mpsc::Receiver<Vec<u8>>,
    handles: Arc<Handles>,
    time: Duration,
) {
    let mut out = Vec::new();
    loop {
        let first = tokio::select! {
            frame = receiver.recv() => match frame {
                Some(frame) => Some(frame),
                None => break,
            },
            () = handles.wake.notified() => None,
        };
        {
            // From here on acknowledgements come this way.
            let mut direct = lock(&handles.direct);
            direct.busy = true;
            out.append(&mut direct.rest);
        }
        out.extend(first.into_iter().flatten());
        while out.len() < 1 << 20
            && let Ok(frame) = receiver.try_recv()
        {
            out.extend_from_slice(&frame);
        }
        handles.acknowledgements(&mut out);
        if !write_all(&mut write, &out, time).await {
            return;
        }
        // Who found it busy has left a wake-up.
        lock(&handles.direct).busy = false;
        out.clear();
        if out.capacity() > 4 << 20 {
            out = Vec::new();
        }
    }
    // The other side sees an end, no reset, if it has read everything.
    let _ = timeout_at(Instant::now() + time, write.shutdown()).await;
}

/// What comes in on a connection.
struct Session {
    service: Arc<Service>,
    namespace: Namespace,
    handles: Arc<Handles>,
    sender: mpsc::Sender<Vec<u8>>,
    busy: Arc<Semaphore>,
    /// Places for checkpoints. One that waits for its pages must not take the place of what has to be answered before they
    /// are sent.
    putting: Arc<Semaphore>,
    next_handle: Arc<std::sync::atomic::AtomicU32>,
    /// Checkpoints that are coming in, by number of the request.
    puts: HashMap<u64, mpsc::Sender<Part>>,
    /// A unit that was appended to since somebody was told to commit.
    appended: Option<Arc<Open>>,
    /// Units that were appended to meanwhile and need not be committed to be acknowledged.
    stored: Vec<(u32, Arc<Open>)>,
}

/// A part of a checkpoint.
#[derive(Debug)]
enum Part {
    Pages(Vec<u8>),
    Whole,
}

/// Pages as they come in.
struct Arriving(Mutex<mpsc::Receiver<Part>>);

impl Pages for Arriving {
    fn each(&self, put: &mut dyn FnMut(u64, &Page) -> Result<(), Error>) -> Result<(), Error> {
        loop {
            let part = lock(&self.0).blocking_recv();
            match part {
                Some(Part::Pages(bytes)) => {
                    for entry in bytes.as_chunks::<{ 8 + PAGE_BYTES }>().0 {
                        let (address, page) = entry.split_first_chunk::<8>().expect("longer than that");
                        put(u64::from_le_bytes(*address), page.try_into().expect("a page"))?;
                    }
                }
                Some(Part::Whole) => return Ok(()),
                None => return Err(Error::invalid("the pages of a checkpoint", "the client has given up")),
            }
        }
    }
}

impl Session {
    async fn take(&mut self, request: Request, bytes: Vec<u8>) -> ControlFlow<Option<String>> {
        let id = request.id;
        match request.op {
            Op::Append { handle, first, count } => self.append(handle, first, count, bytes).await,
            Op::Close { handle } => {
                lock(&self.handles.units).remove(&handle);
                ControlFlow::Continue(())
            }
            Op::Put { handle, sii, parent, gone } => {
                let (sender, receiver) = mpsc::channel(4);
                // One of those that have a place ends by itself, so the next gets one.
                if self.puts.len() >= PUTS_MAX || self.puts.insert(id, sender).is_some() {
                    return ControlFlow::Break(Some("too many checkpoints at a time".into()));
                }
                self.work(&self.putting, id, move |_, _, handles| {
                    let unit = handles.get(handle)?;
                    let pages = Arriving(Mutex::new(receiver));
                    let new = NewCheckpoint { sii, parent, manifest: &bytes, gone: &gone, pages: &pages };
                    unit.store.put_checkpoint(&new).map(|()| (Answer::Done, Vec::new()))
                })
                .await;
                ControlFlow::Continue(())
            }
            Op::PutPages => {
                if !bytes.len().is_multiple_of(8 + PAGE_BYTES) {
                    return ControlFlow::Break(Some("pages of a wrong length".into()));
                }
                if let Some(put) = self.puts.get(&id) {
                    // One that has failed is answered; the rest of it goes nowhere.
                    let _ = put.send(Part::Pages(bytes)).await;
                }
                ControlFlow::Continue(())
            }
            Op::PutEnd { whole } => {
                if let Some(put) = self.puts.remove(&id)
                    && whole
                {
                    let _ = put.send(Part::Whole).await;
                }
                ControlFlow::Continue(())
            }
            op => {
                let next_handle = Arc::clone(&self.next_handle);
                let answer = move |service: &_, namespace: &_, handles: &_| {
                    answer(op, service, namespace, handles, &next_handle)
                };
                self.work(&self.busy, id, answer).await;
                ControlFlow::Continue(())
            }
        }
    }

    async fn append(&mut self, handle: u32, first: u64, records: u32, bytes: Vec<u8>) -> ControlFlow<Option<String>> {
        let Ok(unit) = self.handles.get(handle) else { return ControlFlow::Continue(()) };
        if unit.failed.load(Ordering::SeqCst) {
            return ControlFlow::Continue(());
        }
        count(&self.service.figures.appends);
        self.service.figures.append_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let len = bytes.len();
        let append = || Batch::parse(first, records, bytes).and_then(|batch| unit.store.append_for_later(&batch));
        let appended = if self.service.engine.has_room(len) {
            append()
        } else {
            self.commit();
            tokio::task::block_in_place(append)
        };
        match appended {
            Ok(()) => {
                if unit.memory {
                    self.stored.push((handle, Arc::clone(&unit)));
                }
                self.appended = Some(unit);
            }
            Err(error) => {
                unit.failed.store(true, Ordering::SeqCst);
                let mut frame = Vec::new();
                encode(&mut frame, &Response::AppendFailed { handle, error }, &[]);
                if self.sender.send(frame).await.is_err() {
                    return ControlFlow::Break(None);
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Has committed what was appended.
    fn commit(&mut self) {
        let Some(unit) = self.appended.take() else { return };
        if !self.stored.is_empty() {
            // Who asks first sees to it that all are sent, so nothing may come between.
            for (handle, unit) in self.stored.drain(..) {
                self.handles.ask(handle, &unit);
            }
            self.handles.acknowledge();
        }
        unit.store.have_committed();
    }

    /// Answers a request on a thread that may block.
    async fn work(
        &self,
        places: &Arc<Semaphore>,
        id: u64,
        work: impl FnOnce(&Service, &Namespace, &Arc<Handles>) -> Result<(Answer, Vec<u8>), Error> + Send + 'static,
    ) {
        // It is never closed.
        let Ok(place) = Arc::clone(places).acquire_owned().await else { return };
        let (service, namespace, handles) =
            (Arc::clone(&self.service), self.namespace.clone(), Arc::clone(&self.handles));
        let sender = self.sender.clone();
        let work = tokio::task::spawn_blocking(move || {
            let (result, bytes) = match work(&service, &namespace, &handles) {
                Ok((answer, bytes)) => (Ok(answer), bytes),
                Err(e) => (Err(e), Vec::new()),
            };
            let mut frame = Vec::new();
            encode(&mut frame, &Response::Reply { id, result }, &bytes);
            frame
        });
        // The thread is free for others while the reply waits.
        tokio::spawn(async move {
            let _place = place;
            if let Ok(frame) = work.await {
                // Whoever asked may have gone.
                let _ = sender.send(frame).await;
            }
        });
    }
}

type Given = Result<(Answer, Vec<u8>), Error>;

fn opened(
    store: Handle,
    memory: bool,
    ready: &Arc<Ready>,
    handles: &Arc<Handles>,
    next: &std::sync::atomic::AtomicU32,
    acknowledged_here: bool,
) -> Result<Answer, Error> {
    if lock(&handles.units).len() >= HANDLES_MAX {
        return Err(Error::invalid("another unit", format!("one connection may have {HANDLES_MAX} open")));
    }
    let handle = next.fetch_add(1, Ordering::SeqCst);
    let (epoch, log) = (store.epoch(), store.log()?);
    let store = Arc::new(store);
    let unit = Arc::new(Open::new(store, memory));
    // Whoever is told of it finds it.
    lock(&handles.units).insert(handle, Arc::clone(&unit));
    if acknowledged_here {
        let (all, weak, ready) = (Arc::downgrade(handles), Arc::downgrade(&unit), Arc::clone(ready));
        unit.store.notify(Box::new(move || {
            if let (Some(all), Some(unit)) = (all.upgrade(), weak.upgrade())
                && all.ask(handle, &unit)
            {
                ready.add(all);
            }
        }));
    }
    Ok(Answer::Opened { handle, epoch, acknowledged: log.end, log })
}

fn answer(
    op: Op,
    service: &Service,
    namespace: &Namespace,
    handles: &Arc<Handles>,
    next_handle: &std::sync::atomic::AtomicU32,
) -> Given {
    let engine = &service.engine;
    let plain = |answer| Ok((answer, Vec::new()));
    let whole = |what: &str| match namespace.is_all() {
        true => Ok(()),
        false => Err(Error::Refused {
            server: "ftstore".into(),
            why: format!("{what} concerns all units, and this client has a namespace of its own"),
        }),
    };
    let unit = |handle| handles.get(handle).map(|unit| Arc::clone(&unit.store));
    match op {
        Op::Open { unit, options } => {
            let memory = options.durability == Durability::Memory;
            let store = engine.writer(&namespace.outer(&unit)?, &options)?;
            plain(opened(store, memory, &service.ready, handles, next_handle, true)?)
        }
        Op::Join { unit, epoch, options } => {
            let store = engine.join(&namespace.outer(&unit)?, epoch, &options)?;
            plain(opened(store, false, &service.ready, handles, next_handle, false)?)
        }
        Op::View { unit } => {
            let store = engine.reader(&namespace.outer(&unit)?)?;
            plain(opened(store, false, &service.ready, handles, next_handle, false)?)
        }
        Op::Units => {
            let mut units = engine.units()?;
            units.retain_mut(|info| match namespace.inner(&info.name) {
                Some(name) => {
                    info.name = name;
                    true
                }
                None => false,
            });
            plain(Answer::Units(units))
        }
        Op::Remove { unit } => engine.remove(&namespace.outer(&unit)?).and_then(|()| plain(Answer::Done)),
        Op::Fsck => whole("a check").and_then(|()| plain(Answer::Fsck(engine.fsck()?))),
        Op::Gc => whole("collecting garbage").and_then(|()| plain(Answer::Gc(engine.gc()?))),
        Op::Log { handle } => plain(Answer::Log(unit(handle)?.log()?)),
        Op::Resume { handle } => {
            let unit = handles.get(handle)?;
            let log = unit.store.log()?;
            unit.failed.store(false, Ordering::SeqCst);
            plain(Answer::Log(log))
        }
        Op::Read { handle, from, bytes_max } => {
            let bytes_max = usize::try_from(bytes_max).unwrap_or(READ_BYTES).min(READ_BYTES);
            let batches = unit(handle)?.read(from, bytes_max)?;
            let len = |batch: &Batch| u32::try_from(batch.body().len()).expect("a batch is bounded");
            let heads = batches.iter().map(|batch| (batch.first(), batch.count(), len(batch))).collect();
            Ok((Answer::Batches(heads), batches.iter().flat_map(|batch| batch.body()).copied().collect()))
        }
        Op::TruncateBelow { handle, sii } => unit(handle)?.truncate_below(sii).and_then(|()| plain(Answer::Done)),
        Op::TruncateFrom { handle, sii } => unit(handle)?.truncate_from(sii).and_then(|()| plain(Answer::Done)),
        Op::Collect { handle, recovery, spare } => {
            let spare = usize::try_from(spare).unwrap_or(usize::MAX);
            plain(Answer::Collected(unit(handle)?.collect(recovery, spare)?))
        }
        Op::Checkpoints { handle } => plain(Answer::Checkpoints(unit(handle)?.checkpoints()?)),
        Op::Manifest { handle, sii } => Ok((Answer::Manifest, unit(handle)?.manifest(sii)?)),
        Op::Pages { handle, sii, range } => some_pages(&*unit(handle)?, sii, range),
        Op::Renew { handle } => unit(handle)?.renew().and_then(|()| plain(Answer::Done)),
        Op::Release { handle } => unit(handle)?.release().and_then(|()| plain(Answer::Done)),
        Op::Append { .. } | Op::Close { .. } | Op::Put { .. } | Op::PutPages | Op::PutEnd { .. } => {
            Err(Error::invalid("a request", "it is none that is answered"))
        }
    }
}

/// The first pages of a range, and where the others begin.
fn some_pages(unit: &dyn UnitStore, sii: u64, range: std::ops::Range<u64>) -> Given {
    let (mut pages, mut bytes, mut next) = (Vec::new(), Vec::new(), None);
    let enough = Error::Closed { store: "this reply".into() };
    let result = unit.pages(sii, range, &mut |address, page| {
        if pages.len() == READ_PAGES {
            next = Some(address);
            return Err(enough.clone());
        }
        pages.push((address, page.is_some()));
        bytes.extend(page.into_iter().flatten());
        Ok(())
    });
    match result {
        Err(e) if next.is_none() || e != enough => Err(e),
        _ => Ok((Answer::Pages { pages, next }, bytes)),
    }
}

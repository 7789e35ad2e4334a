//! What the other modules need of JetStream: storing a message behind a known one, and finding it again.
//!
//! A store has two streams, so that checkpoints do not stand in the way of events. `NAME-log` has what writers append;
//! `NAME-state` keeps the last message of each subject: the units, tables, packs of pages.
//!
//! Invariant: whatever is stored with a condition is stored once. A publication whose answer was lost is sent again with the
//! same condition, the sequence number of the message before it on its subject. If it has been stored, the condition no
//! longer holds, and the message that broke it has the id of ours.

use std::fmt;
use std::future::Future;
use std::net::ToSocketAddrs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::context::PublishErrorKind as Refused;
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RawMessageError, RawMessageErrorKind, StorageType, Stream};
use async_nats::jetstream::{self, Context, ErrorCode};
use async_nats::{ConnectOptions, ServerAddr};
use futures_util::{StreamExt, TryStreamExt};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::{Error, UnitName, location};

/// After this a question without an answer is asked again.
const ANSWER: Duration = Duration::from_secs(2);
/// Between two tries, while the cluster elects a leader or has no majority.
pub(super) const AGAIN: Duration = Duration::from_millis(100);
/// A call fails when it has been tried for so long. What was appended is tried for ever.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Questions that are under way at a time.
pub(super) const AT_A_TIME: usize = 32;
/// What headers and subject take of a message, bytes, at most.
const HEAD_BYTES: usize = 1024;
/// What a server says when a message does not follow the one it was to follow, and a leader while that is still under way to
/// the other replicas.
const WRONG_LAST: [ErrorCode; 2] = [ErrorCode::STREAM_WRONG_LAST_SEQUENCE, ErrorCode(10164)];
/// Header with what the message is, in our own terms.
const HEAD: &str = "Ftrun";
/// Header with the id of a publication.
const ID: &str = "Ftrun-Id";

/// A connection to a cluster, and the two streams of a store there.
pub(super) struct Cluster {
    pub(super) name: String,
    /// First token of every subject.
    pub(super) store: String,
    pub(super) log: Stream,
    pub(super) state: Stream,
    context: Context,
    /// No two connections have the same.
    nonce: String,
    published: AtomicU64,
    part_bytes: usize,
    closed: AtomicBool,
    runtime: Option<Runtime>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cluster({})", self.name)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Nobody waits for what is left; the last to let go may be one of its own threads.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Why an operation has not worked.
enum Failure {
    /// It may work later.
    Again(String),
    Final(Error),
}

/// What a stored message is, without its contents.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) subject: String,
    pub(super) sequence: u64,
    pub(super) head: String,
    pub(super) bytes: u64,
}

fn head_of(headers: Option<&async_nats::HeaderMap>, name: &str) -> String {
    headers.and_then(|h| h.get(name)).map(|v| v.as_str().to_owned()).unwrap_or_default()
}

impl Cluster {
    pub(super) fn connect(at: &location::Nats) -> Result<Self, Error> {
        let name = at.to_string();
        let lost = |e: &dyn fmt::Display| Error::Disconnected { server: name.clone(), why: e.to_string() };
        if at.ca.is_none() && !at.servers.iter().all(|server| is_local(server)) {
            let why =
                "without TLS only this machine is talked to; add ca=FILE with who signs the servers' certificates";
            return Err(Error::invalid(name, why));
        }
        let servers: Result<Vec<ServerAddr>, _> = at.servers.iter().map(|s| format!("nats://{s}").parse()).collect();
        let servers = servers.map_err(|e: std::io::Error| lost(&e))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("store-nats")
            .enable_all()
            .build()
            .map_err(|e| Error::io("start a thread for", &name, &e))?;
        let mut options = ConnectOptions::new().name("ftrun").connection_timeout(ANSWER).request_timeout(Some(ANSWER));
        if let Some(password) = &at.password {
            let text = std::fs::read_to_string(password).map_err(|e| Error::io("read", password, &e))?;
            options = options.user_and_password(at.user.clone(), text.trim_end().to_owned());
        }
        if let Some(ca) = &at.ca {
            options = options.require_tls(true).add_root_certificates(ca.clone());
        }
        if let (Some(cert), Some(key)) = (&at.cert, &at.cert_key) {
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
        let connecting = options.connect(servers);
        let client = runtime.block_on(connecting).map_err(|e| lost(&e))?;
        let part_bytes = client.server_info().max_payload.saturating_sub(HEAD_BYTES).max(HEAD_BYTES);
        let streams = async {
            let context = jetstream::context::ContextBuilder::new().timeout(ANSWER).build(client);
            let log = open(&context, at, "log", &["log.*"], -1).await?;
            let state = open(&context, at, "state", &["unit.*", "table.*.*.*", "pack.*", "sweep"], 1).await?;
            Ok((context, log, state))
        };
        let (context, log, state) = runtime.block_on(streams)?;
        let nonce = crate::net::nonce()?[..8].iter().map(|b| format!("{b:02x}")).collect();
        let (store, published) = (at.store.clone(), AtomicU64::new(0));
        Ok(Self {
            name,
            store,
            log,
            state,
            context,
            nonce,
            published,
            part_bytes,
            closed: AtomicBool::new(false),
            runtime: Some(runtime),
        })
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("taken only when this is dropped")
    }

    /// Waits for what the other methods promise; not from a thread of this connection.
    pub(super) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime().block_on(future)
    }

    pub(super) fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime().spawn(task)
    }

    /// What is being tried ends with [`Error::Closed`].
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// The largest contents of a message, bytes.
    pub(super) fn part_bytes(&self) -> usize {
        self.part_bytes
    }

    /// The subject of a unit; a name has dots, a token none.
    pub(super) fn subject(&self, kind: &str, unit: &UnitName) -> String {
        format!("{}.{kind}.{}", self.store, token(unit))
    }

    async fn patiently<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        patience: Duration,
        op: impl Fn() -> F,
    ) -> Result<T, Error> {
        let began = Instant::now();
        loop {
            if self.closed.load(Ordering::Relaxed) {
                return Err(Error::Closed { store: self.name.clone() });
            }
            match op().await {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(why)) if began.elapsed() > patience => {
                    return Err(Error::Disconnected { server: self.name.clone(), why });
                }
                Err(Failure::Again(_)) => tokio::time::sleep(AGAIN).await,
            }
        }
    }

    fn failure(&self, error: &jetstream::Error) -> Failure {
        match error.error_code() {
            ErrorCode::INSUFFICIENT_RESOURCES
            | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED
            | ErrorCode::STORAGE_RESOURCES_EXCEEDED
            | ErrorCode::STREAM_STORE_FAILED => Failure::Final(Error::Full { store: self.name.clone() }),
            _ if error.code() == 503 || error.code() == 500 => Failure::Again(error.to_string()),
            _ => Failure::Final(self.refused(&error)),
        }
    }

    fn refused(&self, why: &dyn fmt::Display) -> Error {
        Error::Io { op: "use".into(), what: self.name.clone(), cause: why.to_string() }
    }

    /// Stores a message, if the last one on its subject is number `after` (0 for none); returns its number. `None` if it
    /// is another one.
    ///
    /// # Errors
    /// [`Error::Full`]; [`Error::Disconnected`] when `patience` is over: then it may or may not be stored.
    pub(super) async fn publish(
        &self,
        subject: &str,
        head: &str,
        contents: Vec<u8>,
        after: Option<u64>,
        patience: Duration,
    ) -> Result<Option<u64>, Error> {
        let id = format!("{}-{}", self.nonce, self.published.fetch_add(1, Ordering::Relaxed));
        let mut message = PublishMessage::build().payload(contents.into()).header(ID, id.as_str());
        if !head.is_empty() {
            message = message.header(HEAD, head);
        }
        if let Some(after) = after {
            message = message.expected_last_subject_sequence(after);
        }
        let (message, id) = (&message, &id);
        self.patiently(patience, || async move {
            let acknowledged = match self.context.send_publish(subject.to_owned(), message.clone()).await {
                Ok(acknowledgement) => acknowledgement.await,
                Err(e) => Err(e),
            };
            let error = match acknowledged {
                Ok(acknowledged) => return Ok(Some(acknowledged.sequence)),
                Err(error) => error,
            };
            let source = std::error::Error::source(&error).and_then(|e| e.downcast_ref::<jetstream::Error>());
            let code = source.map(jetstream::Error::error_code);
            match error.kind() {
                Refused::WrongLastSequence | Refused::Other if code.is_some_and(|code| WRONG_LAST.contains(&code)) => {
                    match self.last_once(subject).await? {
                        Some(last) if head_of(Some(&last.headers), ID) == *id => Ok(Some(last.sequence)),
                        // Another one is under way, or whoever was asked now is behind.
                        last if last.as_ref().map_or(0, |l| l.sequence) == after.unwrap_or(0) => {
                            Err(Failure::Again(error.to_string()))
                        }
                        _ => Ok(None),
                    }
                }
                Refused::WrongLastSequence | Refused::Other => {
                    Err(source.map_or_else(|| Failure::Again(error.to_string()), |e| self.failure(e)))
                }
                Refused::MaxPayloadExceeded | Refused::WrongLastMessageId => Err(Failure::Final(self.refused(&error))),
                // No leader, no answer, no connection.
                Refused::StreamNotFound | Refused::TimedOut | Refused::BrokenPipe | Refused::MaxAckPending => {
                    Err(Failure::Again(error.to_string()))
                }
            }
        })
        .await
    }

    fn stream_of(&self, subject: &str) -> &Stream {
        if subject[self.store.len()..].starts_with(".log.") { &self.log } else { &self.state }
    }

    async fn last_once(&self, subject: &str) -> Result<Option<StreamMessage>, Failure> {
        self.found(self.stream_of(subject).get_last_raw_message_by_subject(subject).await)
    }

    fn found(&self, result: Result<StreamMessage, RawMessageError>) -> Result<Option<StreamMessage>, Failure> {
        match result.map_err(|e| (e.kind(), e)) {
            Ok(message) => Ok(Some(message)),
            Err((RawMessageErrorKind::NoMessageFound, _)) => Ok(None),
            Err((RawMessageErrorKind::JetStream(e), _)) => Err(self.failure(&e)),
            Err((_, e)) => Err(Failure::Again(e.to_string())),
        }
    }

    /// The last message of a subject, as the leader has it.
    pub(super) async fn last(&self, subject: &str) -> Result<Option<StreamMessage>, Error> {
        self.patiently(PATIENCE, || self.last_once(subject)).await
    }

    /// The only message of a subject whose contents never change; any replica may answer.
    pub(super) async fn constant(&self, subject: &str) -> Result<Option<StreamMessage>, Error> {
        match self.state.direct_get_last_for_subject(subject).await {
            Ok(message) => Ok(Some(message)),
            // The replica may be behind.
            Err(_) => self.last(subject).await,
        }
    }

    /// The message with this number; any replica may answer.
    pub(super) async fn numbered(&self, stream: &Stream, sequence: u64) -> Result<Option<StreamMessage>, Error> {
        if let Ok(message) = stream.direct_get(sequence).await {
            return Ok(Some(message));
        }
        self.patiently(PATIENCE, || async move { self.found(stream.get_raw_message(sequence).await) }).await
    }

    /// Calls `each` with the messages of a stream whose subjects match, `from` the first number until the last one that is
    /// of interest, without their contents. The message `until` must be there.
    pub(super) async fn scan(
        &self,
        stream: &Stream,
        filter: &str,
        mut from: u64,
        until: u64,
        each: &mut (dyn FnMut(Stored) + Send),
    ) -> Result<(), Error> {
        let began = Instant::now();
        while from <= until {
            let (tried, why) = (from, self.scan_once(stream, filter, &mut from, until, each).await);
            let Err(why) = why else { continue };
            if from == tried && began.elapsed() > PATIENCE {
                return Err(Error::Disconnected { server: self.name.clone(), why });
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    async fn scan_once(
        &self,
        stream: &Stream,
        filter: &str,
        from: &mut u64,
        until: u64,
        each: &mut (dyn FnMut(Stored) + Send),
    ) -> Result<(), String> {
        let config = pull::OrderedConfig {
            filter_subject: filter.to_owned(),
            headers_only: true,
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: *from },
            ..pull::OrderedConfig::default()
        };
        let consumer = stream.create_consumer(config).await.map_err(|e| e.to_string())?;
        let mut messages = consumer.messages().await.map_err(|e| e.to_string())?;
        while *from <= until {
            let next = tokio::time::timeout(ANSWER, messages.try_next()).await;
            let next = next.map_err(|_| "no message has come".to_owned())?.map_err(|e| e.to_string())?;
            let message = next.ok_or("the messages have ended")?;
            let sequence = message.info().map_err(|e| e.to_string())?.stream_sequence;
            let headers = message.headers.as_ref();
            let bytes = head_of(headers, "Nats-Msg-Size").parse().unwrap_or(0);
            *from = sequence + 1;
            if sequence <= until {
                each(Stored { subject: message.subject.to_string(), sequence, head: head_of(headers, HEAD), bytes });
            }
        }
        Ok(())
    }

    /// The names of all units that there ever were, as they are in subjects.
    pub(super) async fn tokens(&self) -> Result<Vec<String>, Error> {
        let prefix = &format!("{}.unit.", self.store);
        self.patiently(PATIENCE, || async move {
            let again = |e: &dyn fmt::Display| Failure::Again(e.to_string());
            let mut subjects = self.state.info_with_subjects(format!("{prefix}*")).await.map_err(|e| again(&e))?;
            let mut tokens = Vec::new();
            while let Some(subject) = subjects.next().await {
                let (subject, _) = subject.map_err(|e| again(&e))?;
                tokens.extend(subject.strip_prefix(prefix).map(str::to_owned));
            }
            tokens.sort_unstable();
            Ok(tokens)
        })
        .await
    }

    /// Drops the messages of a log before number `sequence`.
    pub(super) async fn purge(&self, subject: &str, sequence: u64) -> Result<(), Error> {
        self.patiently(PATIENCE, || async move {
            let purged = self.log.purge().filter(subject).sequence(sequence).await;
            purged.map(drop).map_err(|e| Failure::Again(e.to_string()))
        })
        .await
    }

    /// Drops one message of the state. It need not be there any more.
    pub(super) async fn delete(&self, sequence: u64) -> Result<(), Error> {
        self.patiently(PATIENCE, || async move {
            let Err(e) = self.state.delete_message(sequence).await else { return Ok(()) };
            match self.state.get_raw_message(sequence).await {
                Err(gone) if gone.kind() == RawMessageErrorKind::NoMessageFound => Ok(()),
                _ => Err(Failure::Again(e.to_string())),
            }
        })
        .await
    }

    /// Bytes that the packs, tables and entries of all units need.
    pub(super) async fn state_bytes(&self) -> Result<u64, Error> {
        self.patiently(PATIENCE, || async move {
            self.state.get_info().await.map(|info| info.state.bytes).map_err(|e| Failure::Again(e.to_string()))
        })
        .await
    }

    /// The time of the leader of the log, nanoseconds since 1970: that by which it stamps messages.
    pub(super) async fn now(&self) -> Result<i128, Error> {
        let subject = &format!("STREAM.INFO.{}-log", self.store);
        let time_of = |value: &serde_json::Value| value.get("ts").and_then(|ts| ts.as_str()).map(str::to_owned);
        self.patiently(PATIENCE, || async move {
            let answer: Result<serde_json::Value, _> = self.context.request(subject.clone(), &()).await;
            let time = answer.map_err(|e| Failure::Again(e.to_string()))?;
            let time = time_of(&time).ok_or_else(|| Failure::Again("the cluster does not tell the time".into()))?;
            let time = async_nats::datetime::parse_rfc3339(&time).map_err(|e| Failure::Final(self.refused(&e)))?;
            Ok(time.unix_timestamp_nanos())
        })
        .await
    }
}

/// A unit's name as one token of a subject.
pub(super) fn token(unit: &UnitName) -> String {
    unit.as_str().replace('.', "=")
}

/// The unit of a token.
pub(super) fn unit_of(token: &str) -> Result<UnitName, Error> {
    UnitName::new(token.replace('=', "."))
}

fn is_local(server: &str) -> bool {
    // What has no address cannot be reached at all, which is told later.
    server.to_socket_addrs().is_ok_and(|mut addresses| addresses.all(|a| a.ip().is_loopback()))
}

/// Opens a stream, or makes it. Its replicas have to be as many as are wanted.
async fn open(
    context: &Context,
    at: &location::Nats,
    kind: &str,
    subjects: &[&str],
    each: i64,
) -> Result<Stream, Error> {
    let name = format!("{}-{kind}", at.store);
    let config = Config {
        name: name.clone(),
        subjects: subjects.iter().map(|s| format!("{}.{s}", at.store)).collect(),
        max_messages_per_subject: each,
        storage: StorageType::File,
        num_replicas: at.replicas,
        // Nothing that was acknowledged is ever dropped to make room.
        discard: DiscardPolicy::New,
        allow_direct: true,
        ..Config::default()
    };
    let began = Instant::now();
    let stream = loop {
        match context.get_or_create_stream(config.clone()).await {
            Ok(stream) => break stream,
            // A cluster that has just been started has to find itself first.
            Err(_) if began.elapsed() < PATIENCE => tokio::time::sleep(AGAIN).await,
            Err(e) => return Err(Error::Disconnected { server: at.to_string(), why: format!("stream {name}: {e}") }),
        }
    };
    let replicas = stream.cached_info().config.num_replicas;
    if replicas != at.replicas {
        let why = format!("its stream {name} has {replicas} replicas, not {}; say replicas={replicas}", at.replicas);
        return Err(Error::invalid(at.to_string(), why));
    }
    Ok(stream)
}

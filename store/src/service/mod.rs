//! `ftstore serve`: a store for many machines.
//!
//! Sockets are tokio's; the engine below is synchronous. An append is queued by the task that reads it; all else runs on
//! threads that may block. What has come in on a connection is queued as a whole before anybody commits it; whoever commits sends the
//! acknowledgements, where the socket takes them.

mod acknowledge;
pub mod config;
mod connection;
mod greet;
mod http;

use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::net::PUTS_MAX;
use crate::{Engine, EngineOptions, Error};
use config::Config;
use greet::Door;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all connections share.
#[derive(Debug)]
struct Service {
    engine: Engine,
    limits: config::Limits,
    door: Door,
    figures: Figures,
    ready: Arc<acknowledge::Ready>,
    /// True when the service ends.
    ending: watch::Receiver<bool>,
}

/// What is counted.
#[derive(Debug, Default)]
struct Figures {
    connections: AtomicUsize,
    accepted: AtomicU64,
    turned_away: AtomicU64,
    refused: AtomicU64,
    broken: AtomicU64,
    appends: AtomicU64,
    append_bytes: AtomicU64,
}

/// Threads for what is not a client's.
const SPARE_THREADS: usize = 64;

fn count(figure: &AtomicU64) {
    figure.fetch_add(1, Ordering::Relaxed);
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// The store cannot be opened, an address not be listened on, or the disk has failed.
pub fn serve(config: &Config) -> Result<(), Error> {
    // Each request that waits for the disk has a thread, and so has each append: nobody waits for those of others.
    let threads =
        config.limits.connections.saturating_mul(connection::AT_A_TIME + PUTS_MAX + 1).saturating_add(SPARE_THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread().max_blocking_threads(threads).enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("start", "the runtime", &e))?;
    runtime.block_on(run(config))
}

async fn run(config: &Config) -> Result<(), Error> {
    let io = |what: String| move |e: std::io::Error| Error::io("listen on", what, &e);
    let options = EngineOptions {
        segment_bytes_max: config.limits.segment_bytes,
        quota_bytes: config.limits.quota_bytes,
        keep_leases: true,
        ..EngineOptions::default()
    };
    let engine = Engine::open(&config.dir, options)?;
    for finding in engine.damage() {
        tracing::error!(%finding, "damage");
    }
    let (end, ending) = watch::channel(false);
    let tls = config.tls.as_ref().map(greet::tls).transpose()?;
    let service = Arc::new(Service {
        engine,
        limits: config.limits.clone(),
        door: Door::new(config)?,
        figures: Figures::default(),
        ready: Arc::default(),
        ending,
    });
    let ready = Arc::clone(&service.ready);
    service.engine.call_behind(Box::new(move || ready.acknowledge()));
    let mut tasks = JoinSet::new();
    if let Some(path) = &config.unix {
        let listener = listen_unix(path).map_err(io(path.display().to_string()))?;
        tasks.spawn(accept_unix(Arc::clone(&service), listener));
    }
    if let Some(address) = config.tcp {
        let listener = TcpListener::bind(address).await.map_err(io(address.to_string()))?;
        tracing::info!(address = %listener.local_addr().map_err(io(address.to_string()))?, "listening");
        tasks.spawn(accept_tcp(Arc::clone(&service), listener, tls));
    }
    if let Some(address) = config.http {
        let listener = TcpListener::bind(address).await.map_err(io(address.to_string()))?;
        tasks.spawn(http::serve(Arc::clone(&service), listener));
    }
    let signals = |kind| signal(kind).map_err(|e| Error::io("watch for", "signals", &e));
    let (mut term, mut int) = (signals(SignalKind::terminate())?, signals(SignalKind::interrupt())?);
    tell_systemd("READY=1");
    tracing::info!(dir = %config.dir.display(), "ready");
    let mut failed = Ok(());
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                // After a failed write only opening the store again tells what it holds: whoever watches us does that.
                failed = service.engine.healthy();
                if failed.is_err() {
                    break;
                }
            }
        }
    }
    tell_systemd("STOPPING=1");
    // Everybody watches this.
    let _ = end.send(true);
    while tasks.join_next().await.is_some() {}
    if let Some(path) = &config.unix {
        // The next start replaces it anyway.
        let _ = std::fs::remove_file(path);
    }
    failed.and_then(|()| service.engine.close())
}

/// Listens on a path; a socket that nobody listens on any more is replaced.
fn listen_unix(path: &Path) -> std::io::Result<UnixListener> {
    let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path).is_err();
    if stale {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // Who may do what is asked of the peer's credentials.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Counts a connection in, if there is room.
struct Place(Arc<Service>);

impl Place {
    fn take(service: &Arc<Service>) -> Option<Self> {
        let figures = &service.figures;
        if figures.connections.fetch_add(1, Ordering::SeqCst) >= service.limits.connections {
            figures.connections.fetch_sub(1, Ordering::SeqCst);
            count(&figures.turned_away);
            return None;
        }
        count(&figures.accepted);
        Some(Self(Arc::clone(service)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.figures.connections.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Out of descriptors, for one: those who are connected will free some.
async fn cannot_accept(e: &std::io::Error) {
    tracing::warn!(error = %e, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

async fn accept_unix(service: Arc<Service>, listener: UnixListener) {
    let (mut ending, mut tasks) = (service.ending.clone(), JoinSet::new());
    loop {
        let accepted = tokio::select! {
            _ = ending.wait_for(|e| *e) => break,
            Some(_) = tasks.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let Some(place) = Place::take(&service) else { continue };
                let uid = stream.peer_cred().ok().map(|c| c.uid());
                let direct = stream.as_fd().try_clone_to_owned().ok();
                let (read, write) = stream.into_split();
                let service = Arc::clone(&service);
                tasks.spawn(async move {
                    let _place = place;
                    connection::run(service, read, write, direct, greet::Peer::Unix { uid }).await;
                });
            }
            Err(e) => cannot_accept(&e).await,
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn accept_tcp(service: Arc<Service>, listener: TcpListener, tls: Option<TlsAcceptor>) {
    let (mut ending, mut tasks) = (service.ending.clone(), JoinSet::new());
    loop {
        let accepted = tokio::select! {
            _ = ending.wait_for(|e| *e) => break,
            Some(_) = tasks.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let Some(place) = Place::take(&service) else { continue };
                let (service, tls) = (Arc::clone(&service), tls.clone());
                tasks.spawn(async move {
                    let _place = place;
                    // Without it small frames wait for one another.
                    let _ = stream.set_nodelay(true);
                    // It has gone already when this fails.
                    let _ = crate::net::keep_alive(&stream);
                    let Some(tls) = tls else {
                        let direct = stream.as_fd().try_clone_to_owned().ok();
                        let (read, write) = stream.into_split();
                        let peer = greet::Peer::Tcp { certificate: None, channel: [0; 32] };
                        return connection::run(service, read, write, direct, peer).await;
                    };
                    let time = Duration::from_secs(service.limits.handshake_seconds);
                    match tokio::time::timeout(time, tls.accept(stream)).await {
                        Ok(Ok(stream)) => {
                            let peer = greet::Peer::of_tls(stream.get_ref().1);
                            let (read, write) = tokio::io::split(stream);
                            connection::run(service, read, write, None, peer).await;
                        }
                        _ => count(&service.figures.broken),
                    }
                });
            }
            Err(e) => cannot_accept(&e).await,
        }
    }
    while tasks.join_next().await.is_some() {}
}

/// sd_notify(3), if systemd has started us.
fn tell_systemd(state: &str) {
    use std::os::linux::net::SocketAddrExt;
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || {
        let socket = UnixDatagram::unbound()?;
        let address = match path.as_encoded_bytes().strip_prefix(b"@") {
            Some(name) => std::os::unix::net::SocketAddr::from_abstract_name(name)?,
            None => std::os::unix::net::SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(e) = send() {
        tracing::warn!(error = %e, "systemd cannot be told {state}");
    }
}

//! Reaching a service, and being let in.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::Error;
use crate::location::{Location, Tcp};
use crate::net::{
    EXPORTER_LABEL, HANDSHAKE_BYTES_MAX, Hello, Incoming, MAGIC, Proof, Prover, Ready, VERSIONS, Welcome, encode,
    keep_alive, nonce, proof, same,
};

/// How long reaching a service and being let in may take.
const CONNECT: Duration = Duration::from_secs(10);

/// A socket of either kind.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn timeout(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(s) => s.set_read_timeout(time).and_then(|()| s.set_write_timeout(time)),
            Self::Tcp(s) => s.set_read_timeout(time).and_then(|()| s.set_write_timeout(time)),
        }
    }

    pub(super) fn shutdown(&self) {
        // It is gone already when this fails.
        let _ = match self {
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Both),
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Both),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(s) => s.as_fd(),
            Self::Tcp(s) => s.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(s) => (&*s).read(buf),
            Socket::Tcp(s) => (&*s).read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(s) => (&*s).write(buf),
            Socket::Tcp(s) => (&*s).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection: one thread reads, and one at a time writes.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) socket: Socket,
    tls: Option<Mutex<ClientConnection>>,
}

impl Link {
    /// Waits until there is something to read, or room to write; says what.
    pub(super) fn ready(&self, what: PollFlags, time: PollTimeout) -> io::Result<PollFlags> {
        let mut fds = [PollFd::new(self.socket.as_fd(), what)];
        match poll(&mut fds, time) {
            Ok(_) => Ok(fds[0].revents().unwrap_or(PollFlags::empty())),
            Err(nix::Error::EINTR) => Ok(PollFlags::empty()),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends all of `bytes`; calls `blocked` when there is no room. Only one thread may be in here.
    fn send_plain(&self, mut bytes: &[u8], blocked: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !bytes.is_empty() {
            match send(self.socket.as_fd().as_raw_fd(), bytes, flags) {
                Ok(n) => bytes = &bytes[n..],
                Err(nix::Error::EAGAIN) => blocked()?,
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`; calls `blocked` when there is no room. Only one thread may be in here.
    pub(super) fn send(&self, bytes: &[u8], blocked: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        let Some(tls) = &self.tls else { return self.send_plain(bytes, blocked) };
        let mut sealed = Vec::with_capacity(bytes.len() + bytes.len() / 64 + 64);
        {
            let mut tls = tls.lock().unwrap_or_else(PoisonError::into_inner);
            tls.writer().write_all(bytes)?;
            while tls.wants_write() {
                tls.write_tls(&mut sealed)?;
            }
        }
        self.send_plain(&sealed, blocked)
    }

    /// Reads something; nothing at the end. The flag says that something has to be sent, if only by TLS itself.
    pub(super) fn receive(&self, into: &mut Incoming, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
        let n = (&self.socket).read(buffer)?;
        let Some(tls) = &self.tls else {
            into.push(&buffer[..n]);
            return Ok((n, false));
        };
        let mut tls = tls.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sealed = &buffer[..n];
        let mut plain = [0; 16 << 10];
        while !sealed.is_empty() {
            tls.read_tls(&mut sealed)?;
            tls.process_new_packets().map_err(io::Error::other)?;
            loop {
                match tls.reader().read(&mut plain) {
                    Ok(0) => break,
                    Ok(n) => into.push(&plain[..n]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                }
            }
        }
        Ok((n, tls.wants_write()))
    }
}

fn lost(location: &Location) -> impl Fn(io::Error) -> Error + '_ {
    move |e| Error::Disconnected { server: location.to_string(), why: e.to_string() }
}

fn read_file(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|e| Error::io("read", path, &e))
}

/// Reads a shared key: a file of at least 32 bytes, of which an end of line does not count.
pub(crate) fn read_key(path: &Path) -> Result<Vec<u8>, Error> {
    let mut key = read_file(path)?;
    while key.last().is_some_and(|b| b"\r\n".contains(b)) {
        key.pop();
    }
    if key.len() < 32 {
        let why = "a shared key has at least 32 bytes; make one with `openssl rand -hex 32`";
        return Err(Error::invalid(path.display().to_string(), why));
    }
    Ok(key)
}

/// Connects and shows who we are.
pub(super) fn connect(location: &Location) -> Result<Link, Error> {
    let io = lost(location);
    let mut key = None;
    let mut link = match location {
        Location::File(_) | Location::Nats(_) => return Err(Error::invalid(location.to_string(), "not a service")),
        Location::Unix(path) => Link { socket: Socket::Unix(UnixStream::connect(path).map_err(&io)?), tls: None },
        Location::Tcp(tcp) => {
            key = tcp.key.as_deref().map(read_key).transpose()?;
            tcp_link(tcp, location)?
        }
    };
    link.socket.timeout(Some(CONNECT)).map_err(&io)?;
    if let Some(tls) = &mut link.tls {
        let tls = tls.get_mut().unwrap_or_else(PoisonError::into_inner);
        while tls.is_handshaking() {
            tls.complete_io(&mut &link.socket).map_err(&io)?;
        }
    }
    let client = match location {
        Location::Tcp(tcp) => tcp.name.clone(),
        Location::File(_) | Location::Unix(_) | Location::Nats(_) => String::new(),
    };
    greet(&link, location, client, key.as_deref())?;
    link.socket.timeout(None).map_err(&io)?;
    Ok(link)
}

fn tcp_link(tcp: &Tcp, location: &Location) -> Result<Link, Error> {
    let io = lost(location);
    let addresses: Vec<SocketAddr> = tcp.address.to_socket_addrs().map_err(&io)?.collect();
    let loopback = !addresses.is_empty() && addresses.iter().all(|a| a.ip().is_loopback());
    if tcp.ca.is_none() && !loopback {
        let why = "without TLS only this machine is talked to; add ca=FILE with who signs the service's certificate";
        return Err(Error::invalid(location.to_string(), why));
    }
    if tcp.key.is_none() && tcp.cert.is_none() {
        return Err(Error::invalid(location.to_string(), "say who we are: name= and key=FILE, or cert= and cert-key="));
    }
    let mut result = Err(io::Error::other("the name has no address"));
    for address in addresses {
        result = TcpStream::connect_timeout(&address, CONNECT);
        if result.is_ok() {
            break;
        }
    }
    let socket = result.map_err(&io)?;
    socket.set_nodelay(true).and_then(|()| keep_alive(&socket)).map_err(&io)?;
    let tls = tcp.ca.as_deref().map(|ca| tls(tcp, ca, location)).transpose()?;
    Ok(Link { socket: Socket::Tcp(socket), tls: tls.map(Mutex::new) })
}

fn tls(tcp: &Tcp, ca: &Path, location: &Location) -> Result<ClientConnection, Error> {
    let bad = |path: &Path, e: &dyn std::fmt::Display| Error::invalid(path.display().to_string(), e.to_string());
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_file_iter(ca).map_err(|e| bad(ca, &e))? {
        roots.add(cert.map_err(|e| bad(ca, &e))?).map_err(|e| bad(ca, &e))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let of_tls = |e: rustls::Error| Error::Refused { server: location.to_string(), why: e.to_string() };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(of_tls)?
        .with_root_certificates(roots);
    let config = match (&tcp.cert, &tcp.cert_key) {
        (Some(cert), Some(key)) => {
            let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(cert).map_err(|e| bad(cert, &e))?.collect();
            let private = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, &e))?;
            config.with_client_auth_cert(chain.map_err(|e| bad(cert, &e))?, private).map_err(of_tls)?
        }
        (None, None) => config.with_no_client_auth(),
        _ => return Err(Error::invalid(location.to_string(), "cert= and cert-key= go together")),
    };
    let host = tcp.address.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']).to_owned();
    let name = ServerName::try_from(host).map_err(|e| Error::invalid(location.to_string(), e.to_string()))?;
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(of_tls)?;
    connection.set_buffer_limit(None);
    Ok(connection)
}

fn greet(link: &Link, location: &Location, client: String, key: Option<&[u8]>) -> Result<(), Error> {
    let server = location.to_string();
    let refused = |why: &str| Error::Refused { server: server.clone(), why: why.to_owned() };
    let mut incoming = Incoming::default();
    let ours = nonce()?;
    say(link, location, &Hello { magic: MAGIC, versions: VERSIONS, client: client.clone(), nonce: ours })?;
    let (prove, theirs) = match hear(link, location, &mut incoming)? {
        Welcome::Refused(e) => return Err(e),
        Welcome::Version { version, .. } if version > VERSIONS.0 || version < VERSIONS.1 => {
            return Err(Error::Version { what: server, found: version, known: VERSIONS.0 });
        }
        Welcome::Version { prove, nonce, .. } => (prove, nonce),
    };
    if !prove && key.is_some() {
        return Err(refused("it does not ask for the key that we share, so it may be somebody else"));
    }
    if !prove {
        return match hear(link, location, &mut incoming)? {
            Ready::Yes(_) => Ok(()),
            Ready::Refused(e) => Err(e),
        };
    }
    let key = key.ok_or_else(|| refused("it asks for a shared key; add name= and key=FILE"))?;
    let mut channel = [0; 32];
    if let Some(tls) = &link.tls {
        let tls = tls.lock().unwrap_or_else(PoisonError::into_inner);
        tls.export_keying_material(&mut channel, EXPORTER_LABEL, None).map_err(|e| refused(&e.to_string()))?;
    }
    say(link, location, &Proof { mac: proof(key, Prover::Client(&client), [&ours, &theirs], &channel) })?;
    match hear(link, location, &mut incoming)? {
        Ready::Refused(e) => Err(e),
        Ready::Yes(Some(mac)) if same(&mac, &proof(key, Prover::Service, [&ours, &theirs], &channel)) => Ok(()),
        Ready::Yes(_) => Err(refused("it does not have the key that we share")),
    }
}

fn say(link: &Link, location: &Location, message: &impl serde::Serialize) -> Result<(), Error> {
    let mut out = Vec::new();
    encode(&mut out, message, &[]);
    // Nothing else is under way, so there is room.
    let blocked = || link.ready(PollFlags::POLLOUT, PollTimeout::NONE).map(drop);
    link.send(&out, &blocked).map_err(lost(location))
}

fn hear<M: serde::de::DeserializeOwned>(link: &Link, location: &Location, incoming: &mut Incoming) -> Result<M, Error> {
    let mut buffer = [0; HANDSHAKE_BYTES_MAX];
    loop {
        let frame = incoming.next::<M>(HANDSHAKE_BYTES_MAX);
        let why = |why: String| Error::Disconnected { server: location.to_string(), why };
        if let Some((message, _)) = frame.map_err(why)? {
            return Ok(message);
        }
        if link.receive(incoming, &mut buffer).map_err(lost(location))?.0 == 0 {
            return Err(why("it has hung up".to_owned()));
        }
    }
}

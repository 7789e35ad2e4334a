//! What a service manager hears from a unit: the other end of sd_notify(3).

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::unit::LIMIT;
use crate::{Error, error};

/// Listens where `NOTIFY_SOCKET` says.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    /// Everything that was said so far, line by line.
    pub heard: Vec<String>,
}

impl Manager {
    /// Listens at `path`, where nothing is yet.
    pub fn listen(path: &Path) -> Result<Self, Error> {
        let socket = UnixDatagram::bind(path)?;
        // As the service manager's own socket.
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        Ok(Self { socket, path: path.to_owned(), heard: Vec::new() })
    }

    /// The value for `NOTIFY_SOCKET`.
    pub fn address(&self) -> &Path {
        &self.path
    }

    /// Waits for a line, and returns it. What was said before this call does not count.
    pub fn await_line(&mut self, wanted: impl Fn(&str) -> bool) -> Result<String, Error> {
        let end = Instant::now() + LIMIT;
        loop {
            let lines = self.hear(end)?.ok_or_else(|| error!("not said in {LIMIT:?}; heard: {:?}", self.heard))?;
            if let Some(line) = lines.into_iter().find(|line| wanted(line)) {
                return Ok(line);
            }
        }
    }

    /// The lines of the next message that comes before `end`, if one does.
    pub fn hear(&mut self, end: Instant) -> Result<Option<Vec<String>>, Error> {
        let mut bytes = [0; 65536];
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        self.socket.set_read_timeout(Some(left))?;
        let length = match self.socket.recv(&mut bytes) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return self.hear(end),
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                return Ok(None);
            }
            length => length?,
        };
        let text = str::from_utf8(&bytes[..length]).map_err(|e| error!("a message that is no text: {e}"))?;
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        self.heard.extend(lines.iter().cloned());
        Ok(Some(lines))
    }
}

/// A service manager that has room for descriptors (`FDSTORE=1`) and does nothing else: for who wants to know what it costs to leave
/// them there.
#[derive(Debug)]
pub struct Store {
    dir: tempfile::TempDir,
}

impl Store {
    /// Listens, in a thread that goes on as long as this process.
    pub fn start() -> Result<Self, Error> {
        let dir = tempfile::Builder::new().prefix("ftrun-manager-").tempdir()?;
        let socket = UnixDatagram::bind(dir.path().join("notify"))?;
        std::thread::spawn(move || {
            let mut kept: BTreeMap<String, Vec<OwnedFd>> = BTreeMap::new();
            while let Ok((text, fds)) = receive(&socket) {
                let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default();
                match text.lines().next() {
                    Some("FDSTORE=1") => kept.entry(name.to_owned()).or_default().extend(fds),
                    Some("FDSTOREREMOVE=1") => drop(kept.remove(name)),
                    // Closed, they say that it was heard (`BARRIER=1`).
                    _ => drop(fds),
                }
            }
        });
        Ok(Self { dir })
    }

    /// The value for `NOTIFY_SOCKET`.
    pub fn address(&self) -> PathBuf {
        self.dir.path().join("notify")
    }
}

/// A message, and the descriptors that came with it.
fn receive(socket: &UnixDatagram) -> Result<(String, Vec<OwnedFd>), Error> {
    let (mut bytes, mut control) = ([0; 65536], nix::cmsg_space!([i32; 253]));
    let mut into = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
        .map_err(std::io::Error::from)?;
    let mut fds = Vec::new();
    for message in message.cmsgs().map_err(std::io::Error::from)? {
        if let ControlMessageOwned::ScmRights(came) = message {
            // SAFETY: the kernel has just made them for us, and nothing else knows them.
            fds.extend(came.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let length = message.bytes;
    Ok((String::from_utf8_lossy(&bytes[..length]).into_owned(), fds))
}

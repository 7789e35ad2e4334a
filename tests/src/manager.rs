//! What a service manager hears from a unit: the other end of sd_notify(3).

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Instant;

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

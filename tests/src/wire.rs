//! One checked connection, and the faults that a client can see.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a reply may take before it counts as an error.
pub const REPLY_LIMIT: Duration = Duration::from_secs(30);

/// What kind of harm a client saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Something that had been acknowledged is gone.
    Lost,
    /// Something took effect, or was answered, more than once.
    Doubled,
    /// The connection broke.
    Reset,
    /// Anything else that must not be: an error reply, a wrong reply, no reply.
    Error,
}

/// One fault, in words.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Its kind.
    pub kind: Kind,
    /// What was expected and what came.
    pub what: String,
}

impl Fault {
    /// A fault of kind [`Kind::Lost`].
    pub fn lost(what: impl Into<String>) -> Self {
        Self { kind: Kind::Lost, what: what.into() }
    }

    /// A fault of kind [`Kind::Doubled`].
    pub fn doubled(what: impl Into<String>) -> Self {
        Self { kind: Kind::Doubled, what: what.into() }
    }

    /// A fault of kind [`Kind::Error`].
    pub fn error(what: impl Into<String>) -> Self {
        Self { kind: Kind::Error, what: what.into() }
    }

    /// A count came out as `got` where it had to be `want`: fewer is lost, more is doubled.
    pub fn count(what: &str, want: u64, got: u64) -> Self {
        let text = format!("{what}: expected {want}, got {got}");
        if got < want { Self::lost(text) } else { Self::doubled(text) }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Lost => "lost",
            Kind::Doubled => "doubled",
            Kind::Reset => "reset",
            Kind::Error => "error",
        };
        write!(f, "{kind}: {}", self.what)
    }
}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Self {
        let kind = match e.kind() {
            ErrorKind::ConnectionReset
            | ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof => Kind::Reset,
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                return Self::error(format!("no reply within {} s", REPLY_LIMIT.as_secs()));
            }
            _ => Kind::Error,
        };
        Self { kind, what: e.to_string() }
    }
}

trait Stream: Read + Write + Send + std::fmt::Debug {}
impl<T: Read + Write + Send + std::fmt::Debug> Stream for T {}

/// A stream connection that is read by lines and by lengths.
#[derive(Debug)]
pub struct Wire {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
    start: usize,
}

impl Wire {
    /// Connects to a port of the loopback.
    pub fn tcp(port: u16) -> Result<Self, Fault> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REPLY_LIMIT))?;
        stream.set_write_timeout(Some(REPLY_LIMIT))?;
        Ok(Self::new(stream))
    }

    /// Connects to a Unix socket.
    pub fn unix(path: &Path) -> Result<Self, Fault> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(REPLY_LIMIT))?;
        stream.set_write_timeout(Some(REPLY_LIMIT))?;
        Ok(Self::new(stream))
    }

    fn new(stream: impl Stream + 'static) -> Self {
        Self { stream: Box::new(stream), buffer: Vec::new(), start: 0 }
    }

    /// Sends all of `data`.
    pub fn send(&mut self, data: &[u8]) -> Result<(), Fault> {
        Ok(self.stream.write_all(data)?)
    }

    fn fill(&mut self) -> Result<(), Fault> {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        let mut chunk = [0; 65536];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                Ok(n) => {
                    self.buffer.extend_from_slice(&chunk[..n]);
                    return Ok(());
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The next line, without its end (`\n` or `\r\n`).
    pub fn line(&mut self) -> Result<Vec<u8>, Fault> {
        let mut searched = self.start;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|b| *b == b'\n') {
                let end = searched + at;
                let mut line = self.buffer[self.start..end].to_vec();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                self.start = end + 1;
                return Ok(line);
            }
            let unread = self.buffer.len() - self.start;
            self.fill()?;
            searched = self.start + unread;
        }
    }

    /// The next line as text.
    pub fn text(&mut self) -> Result<String, Fault> {
        String::from_utf8(self.line()?).map_err(|e| Fault::error(format!("a line is not text: {e}")))
    }

    /// The next `length` bytes.
    pub fn exactly(&mut self, length: usize) -> Result<Vec<u8>, Fault> {
        while self.buffer.len() - self.start < length {
            self.fill()?;
        }
        let data = self.buffer[self.start..self.start + length].to_vec();
        self.start += length;
        Ok(data)
    }

    /// Everything up to the end of the stream.
    pub fn rest(&mut self) -> Result<Vec<u8>, Fault> {
        let mut data = self.buffer.split_off(self.start);
        self.buffer.clear();
        self.start = 0;
        self.stream.read_to_end(&mut data)?;
        Ok(data)
    }

    /// Between requests nothing may have come: what has is a reply too many.
    pub fn expect_quiet(&self) -> Result<(), Fault> {
        let unread = &self.buffer[self.start..];
        if unread.is_empty() {
            return Ok(());
        }
        Err(Fault::doubled(format!("{} bytes that nobody asked for: {}", unread.len(), excerpt(unread))))
    }
}

/// The beginning of `data`, printable.
pub fn excerpt(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(&data[..data.len().min(60)]).escape_debug().to_string();
    if data.len() > 60 { format!("\"{text}\"... ({} bytes)", data.len()) } else { format!("\"{text}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn lines_lengths_and_leftovers() -> Result<(), Box<dyn std::error::Error>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let sender = std::thread::spawn(move || -> io::Result<()> {
            let (mut peer, _) = listener.accept()?;
            peer.write_all(b"one\r\ntw")?;
            peer.write_all(b"o\nabcdeXY")
        });
        let mut wire = Wire::tcp(port).map_err(|f| f.to_string())?;
        assert_eq!(wire.line().map_err(|f| f.to_string())?, b"one");
        assert_eq!(wire.line().map_err(|f| f.to_string())?, b"two");
        assert_eq!(wire.exactly(5).map_err(|f| f.to_string())?, b"abcde");
        assert_eq!(wire.exactly(1).map_err(|f| f.to_string())?, b"X");
        assert_eq!(wire.expect_quiet().map_err(|f| f.kind), Err(Kind::Doubled));
        assert_eq!(wire.exactly(1).map_err(|f| f.to_string())?, b"Y");
        assert_eq!(wire.line().map_err(|f| f.kind), Err(Kind::Reset));
        sender.join().map_err(|_| "sender")??;
        Ok(())
    }

    #[test]
    fn too_few_is_lost_and_too_many_is_doubled() {
        assert_eq!(Fault::count("x", 5, 4).kind, Kind::Lost);
        assert_eq!(Fault::count("x", 5, 6).kind, Kind::Doubled);
    }
}

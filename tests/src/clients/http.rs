//! A keep-alive HTTP/1.1 client that compares whole bodies.

use std::sync::Arc;

use crate::load::{Client, Progress};
use crate::rng::Rng;
use crate::wire::{Fault, Wire};

/// `length` bytes that nobody could guess, the same for the same seed.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = Rng::part(seed, 99);
    let mut data = Vec::with_capacity(length + 8);
    while data.len() < length {
        data.extend_from_slice(&rng.next().to_le_bytes());
    }
    data.truncate(length);
    data
}

/// The files of a web server: path and content.
pub type Files = Vec<(String, Vec<u8>)>;

/// One connection for the whole run.
#[derive(Debug)]
pub struct Http {
    wire: Wire,
    rng: Rng,
    port: u16,
    n: usize,
    files: Arc<Files>,
    /// Where uploads go; nowhere if the server takes none.
    upload: Option<String>,
    uploads: u64,
    reconnect: bool,
}

impl Http {
    /// Connects client `n`, which will ask for these files (path, content).
    pub fn connect(port: u16, n: usize, rng: Rng, files: &Arc<Files>) -> Result<Self, Fault> {
        let (wire, files) = (Wire::tcp(port)?, Arc::clone(files));
        Ok(Self { wire, rng, port, n, files, upload: None, uploads: 0, reconnect: false })
    }

    /// Also uploads to this path: the answer has to be what [`super::Upstream`] says.
    #[must_use]
    pub fn uploading(mut self, path: &str) -> Self {
        self.upload = Some(path.to_owned());
        self
    }

    /// Connects anew for each request.
    #[must_use]
    pub fn reconnecting(mut self) -> Self {
        self.reconnect = true;
        self
    }

    /// Reads a reply: its status and its body.
    fn reply(&mut self) -> Result<(u16, Vec<u8>), Fault> {
        let status = self.wire.text()?;
        let bad = || Fault::error(format!("not an HTTP reply: {status}"));
        let code: u16 = status.split(' ').nth(1).and_then(|c| c.parse().ok()).ok_or_else(bad)?;
        if !status.starts_with("HTTP/1.") {
            return Err(bad());
        }
        let mut length = None;
        loop {
            let line = self.wire.text()?;
            if line.is_empty() {
                break;
            }
            if let Some((key, value)) = line.split_once(':')
                && key.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().ok();
            }
        }
        let length = length.ok_or_else(|| Fault::error("a reply without Content-Length"))?;
        Ok((code, self.wire.exactly(length)?))
    }

    fn get(&mut self) -> Result<(), Fault> {
        let files = Arc::clone(&self.files);
        let at = usize::try_from(self.rng.within(0..=files.len() as u64 - 1)).unwrap_or(0);
        let (path, content) = &files[at];
        let close = if self.reconnect { "Connection: close\r\n" } else { "" };
        self.wire.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n{close}\r\n").as_bytes())?;
        let (code, body) = self.reply()?;
        if code != 200 {
            return Err(Fault::error(format!("GET {path}: status {code}")));
        }
        if body != *content {
            let same = body.iter().zip(content).take_while(|(a, b)| a == b).count();
            let (got, want) = (body.len(), content.len());
            return Err(Fault::error(format!("GET {path}: {got} bytes of {want}, wrong from byte {same} on")));
        }
        Ok(())
    }

    fn post(&mut self, path: &str) -> Result<(), Fault> {
        self.uploads += 1;
        let id = format!("{}-{}", self.n, self.uploads);
        let length = if self.rng.one_in(4) { self.rng.within(100_000..=400_000) } else { self.rng.within(1..=5000) };
        let body = pattern(self.rng.next(), usize::try_from(length).unwrap_or(1));
        let sum = super::upstream::sum(&body);
        let head = format!("POST {path} HTTP/1.1\r\nHost: test\r\nX-Upload: {id}\r\nContent-Length: {length}\r\n\r\n");
        self.wire.send(head.as_bytes())?;
        self.wire.send(&body)?;
        let (code, reply) = self.reply()?;
        let (got, want) = (String::from_utf8_lossy(&reply).into_owned(), format!("{id} {length} {sum:016x}\n"));
        if code != 200 || got != want {
            return Err(Fault::error(format!("POST {id}: status {code}, expected {want:?}, got {got:?}")));
        }
        Ok(())
    }
}

impl Client for Http {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        match self.upload.clone() {
            Some(path) if self.rng.one_in(4) => self.post(&path)?,
            _ => self.get()?,
        }
        self.wire.expect_quiet()?;
        if self.reconnect {
            let rest = self.wire.rest()?;
            if !rest.is_empty() {
                return Err(Fault::doubled(format!("{} bytes after the reply", rest.len())));
            }
            self.wire = Wire::tcp(self.port)?;
        }
        Ok(1)
    }
}

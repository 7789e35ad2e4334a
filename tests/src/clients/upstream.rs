//! The small server behind a proxy that is under test: it counts every upload that reaches it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use crate::wire::Fault;

/// A sum over the bytes of an upload (FNV-1a).
pub(super) fn sum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// Listens until the test process ends; answers each upload with `ID LENGTH SUM`.
#[derive(Debug)]
pub struct Upstream {
    /// Where it listens.
    pub port: u16,
    seen: Arc<Mutex<HashMap<String, u64>>>,
}

impl Upstream {
    /// Starts it in threads of this process.
    pub fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let seen = Arc::new(Mutex::new(HashMap::new()));
        let counts = Arc::clone(&seen);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let counts = Arc::clone(&counts);
                // What a broken connection means, the client behind the proxy will find out.
                std::thread::spawn(move || serve(stream, &counts));
            }
        });
        Ok(Self { port, seen })
    }

    /// Each upload must have come exactly once.
    pub fn check(&self) -> Result<(), Fault> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match seen.iter().find(|(_, count)| **count != 1) {
            Some((id, count)) => Err(Fault::doubled(format!("upload {id} reached the upstream {count} times"))),
            None => Ok(()),
        }
    }
}

fn serve(mut stream: TcpStream, seen: &Mutex<HashMap<String, u64>>) -> std::io::Result<()> {
    let mut read = BufReader::new(stream.try_clone()?);
    let (mut id, mut length) = (String::new(), 0u64);
    loop {
        let mut line = String::new();
        read.read_line(&mut line)?;
        let Some((key, value)) = line.trim().split_once(": ") else {
            if line.trim().is_empty() {
                break;
            }
            continue;
        };
        match key.to_ascii_lowercase().as_str() {
            "x-upload" => id = value.to_owned(),
            "content-length" => length = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    let mut body = Vec::new();
    read.take(length).read_to_end(&mut body)?;
    if body.len() as u64 == length {
        *seen.lock().unwrap_or_else(PoisonError::into_inner).entry(id.clone()).or_insert(0) += 1;
    }
    let reply = format!("{id} {} {:016x}\n", body.len(), sum(&body));
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", reply.len());
    stream.write_all(format!("{head}{reply}").as_bytes())
}

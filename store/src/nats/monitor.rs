//! Whether the servers sync what they store before they acknowledge it.
//!
//! A client cannot see that. The servers' monitoring port shows it: `GET /jsz?config=true` of each server.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use crate::{Error, location};

/// How long a server may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// An answer has no more, bytes.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// Checks that the servers named by `monitor=` sync each message; a majority has to answer. Without these, `sync=always` is taken at its word.
pub(super) fn check_sync(at: &location::Nats) -> Result<(), Error> {
    let invalid = |why: String| Error::invalid(format!("durability disk in {at}"), why);
    if at.monitor.is_empty() && !at.sync_always {
        let why = "set `sync_interval: always` for JetStream in all servers, and say so by monitor=HOST:PORT,… (the \
                   servers' monitoring ports, which are then asked) or by sync=always; or use durability cache";
        return Err(invalid(why.into()));
    }
    let mut silent = Vec::new();
    for server in &at.monitor {
        let body = match ask(server, "/jsz?config=true") {
            Ok(body) => body,
            // A server that is down acknowledges nothing.
            Err(e) => {
                silent.push(Error::io("ask", server, &e));
                continue;
            }
        };
        let answer: serde_json::Value =
            serde_json::from_slice(&body).map_err(|e| Error::io("ask", server, &e.into()))?;
        if answer.pointer("/config/sync_always") != Some(&serde_json::Value::Bool(true)) {
            return Err(invalid(format!("the server at {server} has no `sync_interval: always`")));
        }
    }
    if silent.len() * 2 < at.monitor.len() { Ok(()) } else { silent.pop().map_or(Ok(()), Err) }
}

/// What a server's monitoring port says.
pub(super) fn ask(server: &str, path: &str) -> std::io::Result<Vec<u8>> {
    let address = server.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    // HTTP/1.0: the answer ends with the connection and comes in one piece.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {server}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    let body = answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or(std::io::ErrorKind::InvalidData)?;
    Ok(answer.split_off(body + 4))
}

//! A client of the datagram echo server. The loopback loses nothing, so neither may the server.

use std::net::UdpSocket;
use std::time::Duration;

use super::echo::check;
use crate::load::{Client, Progress};
use crate::rng::Rng;
use crate::wire::{Fault, REPLY_LIMIT};

/// One socket for the whole run.
#[derive(Debug)]
pub struct Udp {
    socket: UdpSocket,
    rng: Rng,
    count: u64,
    highest: u64,
}

impl Udp {
    /// A socket that talks to this port.
    pub fn connect(port: u16, rng: Rng) -> Result<Self, Fault> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(("127.0.0.1", port))?;
        socket.set_read_timeout(Some(REPLY_LIMIT))?;
        Ok(Self { socket, rng, count: 0, highest: 0 })
    }

    fn receive(&mut self, text: &[u8]) -> Result<(), Fault> {
        let mut reply = [0; 8192];
        let n = match self.socket.recv(&mut reply) {
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                return Err(Fault::lost(format!("no answer to datagram {} in {REPLY_LIMIT:?}", self.count + 1)));
            }
            other => other?,
        };
        let reply = &reply[..n];
        self.count += 1;
        // The answer to the datagram before, once more, names the count before.
        let old = format!("{} ", self.count - 1);
        if self.count > 1 && reply.starts_with(old.as_bytes()) && !reply.ends_with(text) {
            return Err(Fault::doubled(format!("datagram {} was answered again", self.count - 1)));
        }
        (self.highest, _) = check(reply, self.count, self.highest, text)?;
        Ok(())
    }
}

impl Client for Udp {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        let several = if self.rng.one_in(4) { self.rng.within(2..=4) } else { 1 };
        let texts: Vec<_> = (0..several)
            .map(|_| {
                let length = self.rng.within(4..=1200);
                self.rng.text(usize::try_from(length).unwrap_or(4))
            })
            .collect();
        for text in &texts {
            self.socket.send(text)?;
        }
        for text in &texts {
            self.receive(text)?;
        }
        Ok(several)
    }

    fn finish(&mut self) -> Result<u64, Fault> {
        self.socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut reply = [0; 8192];
        match self.socket.recv(&mut reply) {
            Ok(_) => Err(Fault::doubled("an answer that nobody asked for")),
            Err(_) => Ok(0),
        }
    }

    fn shared(&self) -> Option<(u64, u64)> {
        Some((self.count, self.highest))
    }
}

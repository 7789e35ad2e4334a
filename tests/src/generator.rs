//! A load generator: many connections served by one thread, on each one request at a time, every reply checked.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::clients::pattern;
use crate::wire::{Fault, REPLY_LIMIT, excerpt};

/// One side of a conversation: what to ask, and whether the answer is right.
pub trait Talk {
    /// The next request.
    fn request(&mut self) -> Vec<u8>;

    /// Whether `got` is the whole reply to the last request; a fault if it is no beginning of one.
    fn reply(&mut self, got: &[u8]) -> Result<bool, Fault>;
}

/// Text of `length` characters that no other `seed` has.
fn text(seed: u64, length: usize) -> Vec<u8> {
    pattern(seed, length).into_iter().map(|b| b'a' + b % 26).collect()
}

/// A set of memcached, a get of the same key, and so on; each set has another value.
#[derive(Debug)]
pub struct MemcachedTalk {
    key: String,
    seed: u64,
    size: usize,
    count: u64,
    value: Vec<u8>,
    want: Vec<u8>,
}

impl MemcachedTalk {
    /// Connection `n`, with values of `size` bytes.
    pub fn new(n: u64, size: usize) -> Self {
        let value = text(n, size);
        Self { key: format!("bench:{n}"), seed: n, size, count: 0, value, want: Vec::new() }
    }
}

impl Talk for MemcachedTalk {
    fn request(&mut self) -> Vec<u8> {
        self.count += 1;
        let (key, size) = (&self.key, self.size);
        if self.count.is_multiple_of(2) {
            self.want = [format!("VALUE {key} 0 {size}\r\n").as_bytes(), &self.value, b"\r\nEND\r\n"].concat();
            return format!("get {key}\r\n").into_bytes();
        }
        // A cheap change: the generator must not be what is measured.
        let mark = format!("{}-{}.", self.seed, self.count);
        let length = mark.len().min(size);
        self.value[..length].copy_from_slice(&mark.as_bytes()[..length]);
        self.want = b"STORED\r\n".to_vec();
        [format!("set {key} 0 0 {size}\r\n").as_bytes(), &self.value, b"\r\n"].concat()
    }

    fn reply(&mut self, got: &[u8]) -> Result<bool, Fault> {
        if self.want.starts_with(got) {
            return Ok(got.len() == self.want.len());
        }
        Err(Fault::error(format!("{}: expected {}, got {}", self.key, excerpt(&self.want), excerpt(got))))
    }
}

/// A line to one of the echo servers, which answer `TEXT` with `COUNT TOTAL TEXT`.
#[derive(Debug)]
pub struct EchoTalk {
    text: Vec<u8>,
    count: u64,
    highest: u64,
}

impl EchoTalk {
    /// Connection `n`, with lines of `size` bytes.
    pub fn new(n: u64, size: usize) -> Self {
        Self { text: text(n, size), count: 0, highest: 0 }
    }
}

impl Talk for EchoTalk {
    fn request(&mut self) -> Vec<u8> {
        self.count += 1;
        [&self.text[..], b"\n"].concat()
    }

    fn reply(&mut self, got: &[u8]) -> Result<bool, Fault> {
        let Some(line) = got.strip_suffix(b"\n") else { return Ok(false) };
        let (total, rest) = crate::clients::check_echo(line, self.count, self.highest, &self.text)?;
        if !rest.is_empty() {
            return Err(Fault::error(format!("after the echo: {}", excerpt(&rest))));
        }
        self.highest = total;
        Ok(true)
    }
}

/// What a run has measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// How long it took.
    pub seconds: f64,
    /// Of each request, sorted, microseconds.
    pub latencies_us: Vec<f64>,
}

struct Connection<T> {
    stream: TcpStream,
    talk: T,
    got: Vec<u8>,
    /// When the request was sent that has no reply yet.
    asked: Option<Instant>,
}

impl<T: Talk> Connection<T> {
    fn ask(&mut self) -> Result<(), Fault> {
        let request = self.talk.request();
        self.got.clear();
        self.asked = Some(Instant::now());
        // One request fits into the socket's buffer, and nothing else is in it.
        let sent = self.stream.write(&request)?;
        if sent == request.len() { Ok(()) } else { Err(Fault::error("a request did not fit into the socket")) }
    }

    /// Reads what has come; true when the reply is complete.
    fn read(&mut self) -> Result<bool, Fault> {
        let mut chunk = [0; 16384];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(std::io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(n) if self.asked.is_none() => Err(Fault::doubled(format!("nobody asked for {}", excerpt(&chunk[..n])))),
            Ok(n) => {
                self.got.extend_from_slice(&chunk[..n]);
                self.talk.reply(&self.got)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

/// Asks for `time` over a connection for each of `talks`, then lets the last replies come.
pub fn run<T: Talk>(port: u16, talks: Vec<T>, time: Duration) -> Result<Measured, Fault> {
    let errno = |e: Errno| Fault::from(std::io::Error::from(e));
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(errno)?;
    let mut connections = Vec::new();
    for (n, talk) in (0u64..).zip(talks) {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, n)).map_err(errno)?;
        connections.push(Connection { stream, talk, got: Vec::new(), asked: None });
    }
    let mut latencies_us = Vec::new();
    let start = Instant::now();
    for connection in &mut connections {
        connection.ask()?;
    }
    let mut waiting = connections.len();
    let mut events = vec![EpollEvent::empty(); connections.len().max(1)];
    let limit = EpollTimeout::try_from(REPLY_LIMIT).map_err(|e| Fault::error(e.to_string()))?;
    while waiting > 0 {
        let ready = match epoll.wait(&mut events, limit) {
            Ok(0) => return Err(std::io::Error::from(ErrorKind::TimedOut).into()),
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(errno(e)),
        };
        for event in &events[..ready] {
            let n = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let Some(connection) = connections.get_mut(n) else { continue };
            if !connection.read()? {
                continue;
            }
            if let Some(asked) = connection.asked.take() {
                latencies_us.push(asked.elapsed().as_secs_f64() * 1e6);
            }
            if start.elapsed() < time {
                connection.ask()?;
            } else {
                waiting -= 1;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    latencies_us.sort_by(f64::total_cmp);
    Ok(Measured { seconds, latencies_us })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Kind;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    /// Serves two connections, one after the other in turns; the last answer before `bad_at` lines is right.
    fn echo_server(bad_at: u64) -> std::io::Result<u16> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || -> std::io::Result<()> {
                    let mut reader = BufReader::new(stream.try_clone()?);
                    let (mut line, mut count, mut stream) = (String::new(), 0, stream);
                    while reader.read_line(&mut line)? > 0 {
                        count += 1;
                        let told = if count == bad_at { count + 1 } else { count };
                        stream.write_all(format!("{told} {count} {line}").as_bytes())?;
                        line.clear();
                    }
                    Ok(())
                });
            }
        });
        Ok(port)
    }

    #[test]
    fn an_echo_server_is_loaded_and_a_wrong_count_is_noticed() -> Result<(), Box<dyn std::error::Error>> {
        let talks = || vec![EchoTalk::new(0, 100), EchoTalk::new(1, 100)];
        let time = Duration::from_millis(50);
        let good = run(echo_server(0)?, talks(), time).map_err(|f| f.to_string())?;
        assert!(good.latencies_us.len() >= 2 && good.latencies_us.is_sorted(), "{good:?}");
        let bad = run(echo_server(2)?, talks(), time);
        assert_eq!(bad.map(|m| m.latencies_us.len()).map_err(|f| f.kind), Err(Kind::Doubled));
        Ok(())
    }

    #[test]
    fn memcached_gets_what_was_set() -> Result<(), Box<dyn std::error::Error>> {
        let mut talk = MemcachedTalk::new(7, 20);
        let set = String::from_utf8(talk.request())?;
        assert!(set.starts_with("set bench:7 0 0 20\r\n7-1."), "{set}");
        assert_eq!(set.len(), 20 + 20 + 2);
        assert_eq!(talk.reply(b"STO").map_err(|f| f.kind), Ok(false));
        assert_eq!(talk.reply(b"STORED\r\n").map_err(|f| f.kind), Ok(true));
        assert_eq!(talk.request(), b"get bench:7\r\n");
        let reply = format!("VALUE bench:7 0 20\r\n{}END\r\n", &set[20..]);
        assert_eq!(talk.reply(reply.as_bytes()).map_err(|f| f.kind), Ok(true));
        assert_eq!(talk.reply(b"END\r\n").map_err(|f| f.kind), Err(Kind::Error));
        Ok(())
    }
}

//! A redis client over one connection that knows what every reply has to be.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::load::{Client, Progress};
use crate::rng::Rng;
use crate::wire::{Fault, REPLY_LIMIT, Wire, excerpt};

/// A reply of the protocol RESP2.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reply {
    Simple(String),
    Error(String),
    Int(i64),
    Bulk(Option<Vec<u8>>),
    Array(Vec<Reply>),
}

/// What a reply has to be.
#[derive(Debug)]
enum Want {
    Ok,
    Count(i64),
    Bulk(Option<Vec<u8>>),
    /// The count that all clients raise: more than this one has seen.
    Shared,
}

/// One connection; its keys are its own, but for `shared`.
#[derive(Debug)]
pub struct Redis {
    wire: Wire,
    rng: Rng,
    prefix: String,
    strings: HashMap<u64, Vec<u8>>,
    counters: [i64; 4],
    list: VecDeque<Vec<u8>>,
    shared_done: u64,
    shared_highest: u64,
}

impl Redis {
    /// Connects client `n`.
    pub fn connect(port: u16, n: usize, rng: Rng) -> Result<Self, Fault> {
        Ok(Self {
            wire: Wire::tcp(port)?,
            rng,
            prefix: format!("client{n}"),
            strings: HashMap::new(),
            counters: [0; 4],
            list: VecDeque::new(),
            shared_done: 0,
            shared_highest: 0,
        })
    }

    /// Keeps the model and goes on with it at another server, which must hold the same.
    pub fn reconnect(&mut self, port: u16) -> Result<(), Fault> {
        self.wire = Wire::tcp(port)?;
        Ok(())
    }

    /// Sends a command and returns the bulk reply as text.
    pub fn ask(&mut self, parts: &[&str]) -> Result<String, Fault> {
        let parts: Vec<&[u8]> = parts.iter().map(|p| p.as_bytes()).collect();
        let mut data = Vec::new();
        encode(&mut data, &parts);
        self.wire.send(&data)?;
        match self.reply()? {
            Reply::Bulk(Some(text)) => Ok(String::from_utf8_lossy(&text).into_owned()),
            Reply::Simple(text) => Ok(text),
            Reply::Int(n) => Ok(n.to_string()),
            other => Err(Fault::error(format!("{other:?}"))),
        }
    }

    /// Fills the server with `mib` MiB of incompressible values of 4 KiB.
    pub fn fill(&mut self, mib: u64) -> Result<(), Fault> {
        for batch in 0..mib * 4 {
            let mut data = Vec::with_capacity(300_000);
            for n in 0..64 {
                let key = format!("filler:{}", batch * 64 + n);
                let value = self.rng.text(4096);
                encode(&mut data, &[b"SET", key.as_bytes(), &value]);
            }
            self.wire.send(&data)?;
            for _ in 0..64 {
                self.expect(Want::Ok, "filling")?;
            }
        }
        Ok(())
    }

    fn reply(&mut self) -> Result<Reply, Fault> {
        let line = self.wire.text()?;
        let bad = || Fault::error(format!("not a RESP reply: {}", excerpt(line.as_bytes())));
        let mut letters = line.chars();
        let kind = letters.next().ok_or_else(bad)?;
        let rest = letters.as_str();
        Ok(match kind {
            '+' => Reply::Simple(rest.to_owned()),
            '-' => Reply::Error(rest.to_owned()),
            ':' => Reply::Int(rest.parse().map_err(|_| bad())?),
            '$' if rest == "-1" => Reply::Bulk(None),
            '$' => {
                let length: usize = rest.parse().map_err(|_| bad())?;
                let mut data = self.wire.exactly(length + 2)?;
                data.truncate(length);
                Reply::Bulk(Some(data))
            }
            '*' => {
                let count: usize = rest.parse().map_err(|_| bad())?;
                Reply::Array((0..count).map(|_| self.reply()).collect::<Result<_, _>>()?)
            }
            _ => return Err(bad()),
        })
    }

    fn expect(&mut self, want: Want, what: &str) -> Result<(), Fault> {
        let got = self.reply()?;
        match (want, got) {
            (Want::Ok, Reply::Simple(text)) if text == "OK" => Ok(()),
            (Want::Count(want), Reply::Int(got)) if want == got => Ok(()),
            (Want::Count(want), Reply::Int(got)) => {
                Err(Fault::count(what, u64::try_from(want).unwrap_or(0), u64::try_from(got).unwrap_or(0)))
            }
            (Want::Shared, Reply::Int(got)) => {
                let got = u64::try_from(got).unwrap_or(0);
                if got <= self.shared_highest {
                    return Err(Fault::lost(format!("{what}: {got} after {} had been told", self.shared_highest)));
                }
                self.shared_highest = got;
                Ok(())
            }
            (Want::Bulk(want), Reply::Bulk(got)) if want == got => Ok(()),
            (Want::Bulk(want), Reply::Bulk(got)) => {
                let show = |value: &Option<Vec<u8>>| value.as_deref().map_or("nothing".into(), excerpt);
                Err(Fault::lost(format!("{what}: expected {}, got {}", show(&want), show(&got))))
            }
            (want, got) => Err(Fault::error(format!("{what}: expected {want:?}, got {got:?}"))),
        }
    }

    /// Appends a random command to `data`, and does in the model what it must do in the server.
    fn command(&mut self, data: &mut Vec<u8>) -> (Want, String) {
        let prefix = self.prefix.clone();
        match self.rng.within(0..=99) {
            0..=29 => {
                let n = self.rng.within(0..=31);
                let length =
                    if self.rng.one_in(40) { self.rng.within(1000..=20_000) } else { self.rng.within(1..=100) };
                let value = self.rng.text(usize::try_from(length).unwrap_or(1));
                let key = format!("{prefix}:string:{n}");
                encode(data, &[b"SET", key.as_bytes(), &value]);
                self.strings.insert(n, value);
                (Want::Ok, format!("SET {key}"))
            }
            30..=54 => {
                let n = self.rng.within(0..=31);
                let key = format!("{prefix}:string:{n}");
                encode(data, &[b"GET", key.as_bytes()]);
                (Want::Bulk(self.strings.get(&n).cloned()), format!("GET {key}"))
            }
            55..=74 => {
                let n = usize::try_from(self.rng.within(0..=3)).unwrap_or(0);
                let key = format!("{prefix}:counter:{n}");
                encode(data, &[b"INCR", key.as_bytes()]);
                self.counters[n] += 1;
                (Want::Count(self.counters[n]), format!("INCR {key}"))
            }
            75..=84 => {
                encode(data, &[b"INCR", b"shared"]);
                self.shared_done += 1;
                (Want::Shared, "INCR shared".into())
            }
            _ => {
                let key = format!("{prefix}:list");
                if self.list.len() > 100 || (!self.list.is_empty() && self.rng.one_in(3)) {
                    encode(data, &[b"RPOP", key.as_bytes()]);
                    return (Want::Bulk(self.list.pop_back()), format!("RPOP {key}"));
                }
                let value = self.rng.text(20);
                encode(data, &[b"LPUSH", key.as_bytes(), &value]);
                self.list.push_front(value);
                (Want::Count(i64::try_from(self.list.len()).unwrap_or(0)), format!("LPUSH {key}"))
            }
        }
    }

    /// Compares everything that this client has ever written with what the server holds.
    pub fn verify(&mut self) -> Result<u64, Fault> {
        let mut checked = 0;
        let ask = |client: &mut Self, parts: &[&[u8]], want: Want| {
            let mut data = Vec::new();
            encode(&mut data, parts);
            client.wire.send(&data)?;
            let what = parts.iter().map(|p| String::from_utf8_lossy(p)).collect::<Vec<_>>().join(" ");
            client.expect(want, &what)
        };
        for n in 0..=31 {
            let key = format!("{}:string:{n}", self.prefix);
            let want = Want::Bulk(self.strings.get(&n).cloned());
            ask(self, &[b"GET", key.as_bytes()], want)?;
            checked += 1;
        }
        for n in 0..4 {
            let key = format!("{}:counter:{n}", self.prefix);
            let want = (self.counters[n] > 0).then(|| self.counters[n].to_string().into_bytes());
            ask(self, &[b"GET", key.as_bytes()], Want::Bulk(want))?;
            checked += 1;
        }
        let key = format!("{}:list", self.prefix);
        let mut data = Vec::new();
        encode(&mut data, &[b"LRANGE", key.as_bytes(), b"0", b"-1"]);
        self.wire.send(&data)?;
        let want = Reply::Array(self.list.iter().cloned().map(|v| Reply::Bulk(Some(v))).collect());
        let got = self.reply()?;
        if got != want {
            return Err(Fault::lost(format!("LRANGE {key}: expected {want:?}, got {got:?}")));
        }
        self.wire.expect_quiet()?;
        Ok(checked + 1)
    }
}

impl Client for Redis {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        // Now and then several commands in one packet.
        let several = if self.rng.one_in(4) { self.rng.within(2..=8) } else { 1 };
        let mut data = Vec::new();
        let wants: Vec<_> = (0..several).map(|_| self.command(&mut data)).collect();
        self.wire.send(&data)?;
        for (want, what) in wants {
            self.expect(want, &what)?;
        }
        self.wire.expect_quiet()?;
        Ok(several)
    }

    fn finish(&mut self) -> Result<u64, Fault> {
        self.verify()
    }

    fn shared(&self) -> Option<(u64, u64)> {
        Some((self.shared_done, self.shared_highest))
    }
}

/// A client that has the server save in the background, over and over, and checks that it does.
#[derive(Debug)]
pub struct Saver {
    redis: Redis,
    command: &'static str,
    /// Saves that came to their end.
    saved: u64,
}

impl Saver {
    /// Connects; `command` is `BGSAVE` or `BGREWRITEAOF`.
    pub fn connect(port: u16, rng: Rng, command: &'static str) -> Result<Self, Fault> {
        Ok(Self { redis: Redis::connect(port, 1000, rng)?, command, saved: 0 })
    }

    fn info(&mut self, key: &str) -> Result<String, Fault> {
        let text = self.redis.ask(&["INFO", "persistence"])?;
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.map(|l| l.trim().to_owned()).ok_or_else(|| Fault::error(format!("INFO persistence: no {key}")))
    }
}

impl Client for Saver {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        let (running, outcome) = if self.command == "BGSAVE" {
            ("rdb_bgsave_in_progress", "rdb_last_bgsave_status")
        } else {
            ("aof_rewrite_in_progress", "aof_last_bgrewrite_status")
        };
        self.redis.ask(&[self.command])?;
        let start = Instant::now();
        let mut asked = 1;
        loop {
            asked += 1;
            if self.info(running)? == "0" {
                break;
            }
            if start.elapsed() > REPLY_LIMIT {
                return Err(Fault::error(format!("{} has not ended after {} s", self.command, REPLY_LIMIT.as_secs())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let status = self.info(outcome)?;
        if status != "ok" {
            return Err(Fault::error(format!("{}: {outcome} is {status}", self.command)));
        }
        self.saved += 1;
        Ok(asked + 1)
    }

    fn finish(&mut self) -> Result<u64, Fault> {
        if self.saved == 0 { Err(Fault::error(format!("no {} came to its end", self.command))) } else { Ok(0) }
    }
}

fn encode(data: &mut Vec<u8>, parts: &[&[u8]]) {
    data.extend(format!("*{}\r\n", parts.len()).bytes());
    for part in parts {
        data.extend(format!("${}\r\n", part.len()).bytes());
        data.extend_from_slice(part);
        data.extend_from_slice(b"\r\n");
    }
}

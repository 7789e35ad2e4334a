//! A memcached client (text protocol) over one connection that knows what every reply has to be.

use std::collections::HashMap;

use crate::load::{Client, Progress};
use crate::rng::Rng;
use crate::wire::{Fault, Wire, excerpt};

const KEYS: u64 = 32;

/// One connection; its keys are its own, but for `shared`.
#[derive(Debug)]
pub struct Memcached {
    wire: Wire,
    rng: Rng,
    prefix: String,
    values: HashMap<u64, Vec<u8>>,
    counter: Option<u64>,
    shared_done: u64,
    shared_highest: u64,
}

impl Memcached {
    /// Connects client `n`; the first one makes the shared counter.
    pub fn connect(port: u16, n: usize, rng: Rng) -> Result<Self, Fault> {
        let prefix = format!("client{n}");
        let wire = Wire::tcp(port)?;
        let mut client =
            Self { wire, rng, prefix, values: HashMap::new(), counter: None, shared_done: 0, shared_highest: 0 };
        if n == 0 {
            client.ask("add shared 0 0 1\r\n0", "STORED")?;
        }
        Ok(client)
    }

    fn ask(&mut self, request: &str, want: &str) -> Result<(), Fault> {
        self.wire.send(request.as_bytes())?;
        self.wire.send(b"\r\n")?;
        self.expect(request, want)
    }

    fn expect(&mut self, request: &str, want: &str) -> Result<(), Fault> {
        let got = self.wire.text()?;
        if got == want {
            return Ok(());
        }
        let request = excerpt(request.as_bytes());
        match (want.parse(), got.parse()) {
            (Ok(want), Ok(got)) => Err(Fault::count(&request, want, got)),
            _ if got == "NOT_FOUND" => Err(Fault::lost(format!("{request}: expected {want}, got {got}"))),
            _ => Err(Fault::error(format!("{request}: expected {want}, got {got}"))),
        }
    }

    fn store(&mut self, verb: &str, n: u64, value: &[u8], want: &str) -> Result<(), Fault> {
        let request = format!("{verb} {}:{n} 0 0 {}", self.prefix, value.len());
        let mut data = request.clone().into_bytes();
        data.extend_from_slice(b"\r\n");
        data.extend_from_slice(value);
        data.extend_from_slice(b"\r\n");
        self.wire.send(&data)?;
        self.expect(&request, want)
    }

    fn get(&mut self, n: u64) -> Result<(), Fault> {
        let key = format!("{}:{n}", self.prefix);
        self.wire.send(format!("get {key}\r\n").as_bytes())?;
        let mut got = None;
        loop {
            let line = self.wire.text()?;
            if line == "END" {
                break;
            }
            let length = line.strip_prefix("VALUE ").and_then(|l| l.rsplit(' ').next()?.parse::<usize>().ok());
            let Some(length) = length else { return Err(Fault::error(format!("get {key}: {line}"))) };
            let mut data = self.wire.exactly(length + 2)?;
            data.truncate(length);
            got = Some(data);
        }
        if got.as_ref() == self.values.get(&n) {
            return Ok(());
        }
        let show = |value: Option<&Vec<u8>>| value.map_or("nothing".into(), |v| excerpt(v));
        let (want, got) = (show(self.values.get(&n)), show(got.as_ref()));
        Err(Fault::lost(format!("get {key}: expected {want}, got {got}")))
    }
}

impl Client for Memcached {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        let n = self.rng.within(0..=KEYS - 1);
        let there = self.values.contains_key(&n);
        match self.rng.within(0..=99) {
            0..=24 => {
                let length =
                    if self.rng.one_in(30) { self.rng.within(1000..=30_000) } else { self.rng.within(1..=100) };
                let value = self.rng.text(usize::try_from(length).unwrap_or(1));
                self.store("set", n, &value, "STORED")?;
                self.values.insert(n, value);
            }
            25..=54 => self.get(n)?,
            55..=64 => {
                let value = self.rng.text(30);
                self.store("add", n, &value, if there { "NOT_STORED" } else { "STORED" })?;
                self.values.entry(n).or_insert(value);
            }
            65..=74 => {
                // What an append carried out twice leaves behind the next get sees.
                let value = self.rng.text(10);
                let short = self.values.get(&n).is_none_or(|v| v.len() < 50_000);
                if short {
                    self.store("append", n, &value, if there { "STORED" } else { "NOT_STORED" })?;
                    self.values.entry(n).and_modify(|v| v.extend_from_slice(&value));
                }
            }
            75..=79 => {
                let request = format!("delete {}:{n}", self.prefix);
                self.ask(&request, if there { "DELETED" } else { "NOT_FOUND" })?;
                self.values.remove(&n);
            }
            80..=89 => {
                let prefix = self.prefix.clone();
                if let Some(counter) = self.counter {
                    self.ask(&format!("incr {prefix}:counter 3"), &(counter + 3).to_string())?;
                    self.counter = Some(counter + 3);
                } else {
                    self.ask(&format!("set {prefix}:counter 0 0 1\r\n5"), "STORED")?;
                    self.counter = Some(5);
                }
            }
            _ => {
                self.wire.send(b"incr shared 1\r\n")?;
                let line = self.wire.text()?;
                let got: u64 = line.parse().map_err(|_| Fault::error(format!("incr shared: {line}")))?;
                if got <= self.shared_highest {
                    let highest = self.shared_highest;
                    return Err(Fault::lost(format!("incr shared: {got} after {highest} had been told")));
                }
                self.shared_highest = got;
                self.shared_done += 1;
            }
        }
        self.wire.expect_quiet()?;
        Ok(1)
    }

    fn finish(&mut self) -> Result<u64, Fault> {
        for n in 0..KEYS {
            self.get(n)?;
        }
        self.wire.expect_quiet()?;
        Ok(KEYS)
    }

    fn shared(&self) -> Option<(u64, u64)> {
        Some((self.shared_done, self.shared_highest))
    }
}

//! Clients of the line echo servers, which answer `TEXT` with `COUNT TOTAL TEXT`.

use crate::load::{Client, Progress};
use crate::rng::Rng;
use crate::wire::{Fault, Wire, excerpt};

/// Checks one answer of an echo server: `count` lines by this sender, more than `highest` in all.
///
/// Returns the new total and what follows the echoed text.
pub fn check(reply: &[u8], count: u64, highest: u64, text: &[u8]) -> Result<(u64, Vec<u8>), Fault> {
    let unreadable = || Fault::error(format!("not an echo of line {count}: {}", excerpt(reply)));
    let mut parts = reply.splitn(3, |b| *b == b' ');
    let mut number = || {
        let digits = std::str::from_utf8(parts.next()?).ok()?;
        digits.parse::<u64>().ok()
    };
    let (own, total) = (number().ok_or_else(unreadable)?, number().ok_or_else(unreadable)?);
    let echoed = parts.next().ok_or_else(unreadable)?;
    if own != count {
        return Err(Fault::count("lines of this sender", count, own));
    }
    if total <= highest {
        return Err(Fault::lost(format!("lines in all: {total}, after {highest} had been told")));
    }
    let rest = echoed.strip_prefix(text).ok_or_else(|| {
        Fault::error(format!("line {count} came back as {} instead of {}", excerpt(echoed), excerpt(text)))
    })?;
    Ok((total, rest.to_vec()))
}

/// One connection to an echo server for the whole run.
#[derive(Debug)]
pub struct Echo {
    wire: Wire,
    rng: Rng,
    count: u64,
    highest: u64,
    pid: Option<Vec<u8>>,
    asks_pid: bool,
    longest: u64,
}

impl Echo {
    /// Connects; `asks_pid` if the server answers `pid` with its process id, which must never change.
    pub fn connect(port: u16, rng: Rng, asks_pid: bool) -> Result<Self, Fault> {
        Ok(Self::over(Wire::tcp(port)?, rng, asks_pid))
    }

    fn over(wire: Wire, rng: Rng, asks_pid: bool) -> Self {
        Self { wire, rng, count: 0, highest: 0, pid: None, asks_pid, longest: 40_000 }
    }

    /// Sends one line and checks its answer; returns what follows the echo.
    pub fn ask(&mut self, text: &[u8]) -> Result<Vec<u8>, Fault> {
        self.ask_all(&[text.to_vec()])
    }

    /// Sends one line, checks its answer, and returns how many lines the server says that it has answered.
    pub fn told(&mut self, text: &[u8]) -> Result<u64, Fault> {
        self.ask(text)?;
        Ok(self.highest)
    }

    /// Sends lines in one go and checks all answers; returns what follows the last echo.
    fn ask_all(&mut self, lines: &[Vec<u8>]) -> Result<Vec<u8>, Fault> {
        let mut data = lines.join(&b'\n');
        data.push(b'\n');
        self.wire.send(&data)?;
        let mut rest = Vec::new();
        for text in lines {
            self.count += 1;
            let reply = self.wire.line()?;
            (self.highest, rest) = check(&reply, self.count, self.highest, text)?;
        }
        self.wire.expect_quiet()?;
        Ok(rest)
    }

    fn check_pid(&mut self) -> Result<(), Fault> {
        let pid = self.ask(b"pid")?;
        match &self.pid {
            Some(before) if *before != pid => Err(Fault::error(format!(
                "the server's pid was{} and is now{}",
                String::from_utf8_lossy(before),
                String::from_utf8_lossy(&pid)
            ))),
            _ => {
                self.pid = Some(pid);
                Ok(())
            }
        }
    }

    fn line(&mut self) -> Vec<u8> {
        let length = if self.rng.one_in(50) { self.rng.within(1000..=self.longest) } else { self.rng.within(4..=80) };
        let mut line = self.count.to_string().into_bytes();
        line.push(b':');
        line.extend(self.rng.text(usize::try_from(length).unwrap_or(80)));
        line
    }
}

impl Client for Echo {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        if self.asks_pid && (self.pid.is_none() || self.rng.one_in(100)) {
            return self.check_pid().map(|()| 1);
        }
        // Now and then several lines in one packet.
        let several = if self.rng.one_in(4) { self.rng.within(2..=6) } else { 1 };
        let lines: Vec<_> = (0..several).map(|_| self.line()).collect();
        self.ask_all(&lines)?;
        Ok(several)
    }

    fn finish(&mut self) -> Result<u64, Fault> {
        if self.asks_pid {
            self.check_pid()?;
        }
        let line = self.line();
        self.ask(&line)?;
        Ok(1)
    }

    fn shared(&self) -> Option<(u64, u64)> {
        Some((self.count, self.highest))
    }
}

/// A client that comes and goes: each step connects, asks a little, and hangs up.
#[derive(Debug)]
pub struct Visitor {
    port: u16,
    rng: Rng,
    done: u64,
    highest: u64,
}

impl Visitor {
    /// Visits this port.
    pub fn new(port: u16, rng: Rng) -> Self {
        Self { port, rng, done: 0, highest: 0 }
    }
}

impl Client for Visitor {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        let mut visit = Echo::connect(self.port, Rng::new(self.rng.next()), false)?;
        visit.highest = self.highest;
        let asked = self.rng.within(0..=3);
        for _ in 0..asked {
            let line = visit.line();
            visit.ask(&line)?;
        }
        self.highest = visit.highest;
        self.done += asked;
        Ok(asked)
    }

    fn shared(&self) -> Option<(u64, u64)> {
        Some((self.done, self.highest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Kind;

    #[test]
    fn an_answer_is_checked_in_each_part() {
        let kind = |reply: &[u8]| check(reply, 5, 40, b"text").map_err(|f| f.kind);
        assert_eq!(kind(b"5 41 text"), Ok((41, b"".to_vec())));
        assert_eq!(kind(b"5 41 text 17"), Ok((41, b" 17".to_vec())));
        assert_eq!(kind(b"4 41 text"), Err(Kind::Lost));
        assert_eq!(kind(b"6 41 text"), Err(Kind::Doubled));
        assert_eq!(kind(b"5 40 text"), Err(Kind::Lost));
        assert_eq!(kind(b"5 41 tent"), Err(Kind::Error));
        assert_eq!(kind(b"junk"), Err(Kind::Error));
    }
}

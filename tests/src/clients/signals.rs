//! A client that sends the server signals and asks how many it got.

use super::Echo;
use crate::load::{Client, Progress};
use crate::process::Process;
use crate::rng::Rng;
use crate::wire::Fault;

/// Sends SIGUSR1, one at a time, and asks for the count over one connection.
///
/// A signal that waits in a process when SIGKILL takes that process, or that reaches its corpse, is gone: the
/// kernel drops it, and no supervisor is told of it. So a kill excuses one missing signal, if it was sent
/// between the kill and the recovery or is asked for after the kill; one too many, or one that was counted
/// and is forgotten, is always a fault.
#[derive(Debug)]
pub struct Signaller {
    echo: Echo,
    pid: Option<i32>,
    counted: u64,
}

impl Signaller {
    /// Connects. Only one client of a server may do this.
    pub fn connect(port: u16, rng: Rng) -> Result<Self, Fault> {
        Ok(Self { echo: Echo::connect(port, rng, false)?, pid: None, counted: 0 })
    }

    fn count(&mut self) -> Result<u64, Fault> {
        let rest = self.echo.ask(b"signals")?;
        let text = String::from_utf8_lossy(&rest);
        text.trim().parse().map_err(|_| Fault::error(format!("not a count: {text}")))
    }
}

impl Client for Signaller {
    fn step(&mut self, progress: &Progress) -> Result<u64, Fault> {
        if self.pid.is_none() {
            let rest = self.echo.ask(b"pid")?;
            self.pid = String::from_utf8_lossy(&rest).trim().parse().ok();
        }
        let pid = self.pid.ok_or_else(|| Fault::error("no pid"))?;
        let before = progress.calm();
        // While the unit is being recovered its number may belong to nobody.
        let sent = Process::open(pid).and_then(|p| p.signal(libc::SIGUSR1)).is_ok();
        let got = self.count()?;
        let struck = before.is_none() || progress.calm() != before;
        let want = self.counted + u64::from(sent);
        if got != want && !(struck && got == self.counted) {
            return Err(Fault::count("signals", want, got));
        }
        self.counted = got;
        Ok(1)
    }

    fn finish(&mut self) -> Result<u64, Fault> {
        let got = self.count()?;
        if got == self.counted { Ok(1) } else { Err(Fault::count("signals at the end", self.counted, got)) }
    }

    fn shared(&self) -> Option<(u64, u64)> {
        self.echo.shared()
    }
}

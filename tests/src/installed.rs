//! A unit that `ftrun install-unit` has made a service of, under a real systemd ([`crate::machine`]).

use crate::binaries::guest;
use crate::clients::Echo;
use crate::machine::Machine;
use crate::rng::Rng;
use crate::{Error, error};

/// Where programs listen in there.
pub const PORT: u16 = 7000;
/// The path of ftrun in there.
pub const FTRUN: &str = "/mnt/share/ftrun";

/// Nobody kills everything so often but a test.
pub const NO_LIMIT: &str = "[Unit]\nStartLimitIntervalSec=0\n";
/// What `ftrun status` calls the processes of a unit.
pub const ALL: &[&str] = &["keeper_pid", "supervisor_pid", "pid"];

/// A service on a machine of its own.
#[derive(Debug)]
pub struct Service {
    /// The machine.
    pub machine: Machine,
    /// Name of the unit.
    pub name: &'static str,
    /// Name of the service.
    pub unit: String,
}

impl Service {
    /// Installs the echo server as a service, with `more` in a drop-in; does not start it.
    pub fn echo(name: &'static str, options: &[&str], more: &str) -> Result<Option<Self>, Error> {
        let program = guest("epoll_echo")?;
        let command = |machine: &Machine| {
            let words = vec![machine.give(&program)?, PORT.to_string(), "READY=1".into()];
            Ok(words)
        };
        Self::install(name, &[options, &["--ready", "program"]].concat(), command, more)
    }

    /// The same of a command that `command` gives to the machine. The calling thread uses the machine's network from then on.
    pub fn install(
        name: &'static str,
        options: &[&str],
        command: impl FnOnce(&Machine) -> Result<Vec<String>, Error>,
        more: &str,
    ) -> Result<Option<Self>, Error> {
        let Some(machine) = Machine::start()? else { return Ok(None) };
        let command = command(&machine)?;
        let words = [&[FTRUN, "install-unit", name], options, &["--"]].concat().into_iter().map(str::to_owned);
        println!("{}", machine.ok(words.chain(command))?);
        let unit = format!("ftrun@{name}.service");
        // What it prints; there is no journal.
        let text =
            format!("[Service]\nStandardOutput=append:/mnt/share/out\nStandardError=append:/mnt/share/err\n{more}");
        std::fs::write(machine.share().join("more.conf"), text)?;
        machine.ok(["cp", "/mnt/share/more.conf", &format!("/etc/systemd/system/{unit}.d/more.conf")])?;
        machine.ok(["systemctl", "daemon-reload"])?;
        machine.enter_network()?;
        Ok(Some(Self { machine, name, unit }))
    }

    /// Has systemd do something with it.
    pub fn systemctl(&self, verb: &str) -> Result<(), Error> {
        self.machine.ok(["systemctl", verb, &self.unit]).map(drop)
    }

    /// A property of the service.
    pub fn get(&self, property: &str) -> Result<String, Error> {
        self.machine.property(&self.unit, property)
    }

    /// What `ftrun status` says of the unit.
    pub fn status(&self) -> Result<serde_json::Value, Error> {
        let state = self.get("StateDirectory")?;
        let dir = format!("/var/lib/{state}");
        let status = self.machine.ok([FTRUN, "status", self.name, "--json", "--state-dir", &dir])?;
        serde_json::from_str(&status).map_err(|e| error!("{e}: {status}"))
    }

    /// A process of the unit, as the machine numbers it.
    pub fn pid(&self, key: &str) -> Result<String, Error> {
        let status = self.status()?;
        Ok(status[key].as_i64().ok_or_else(|| error!("no {key} in {status}"))?.to_string())
    }

    /// Kills processes of the unit, by their names in the status, at once.
    pub fn kill(&self, keys: &[&str]) -> Result<(), Error> {
        let status = self.status()?;
        let pids = keys.iter().filter_map(|key| status[key].as_i64()).map(|pid| pid.to_string());
        let words: Vec<_> = ["kill", "-KILL"].into_iter().map(str::to_owned).chain(pids).collect();
        if words.len() > 2 {
            // Who was being replaced may be gone by now.
            self.machine.run(words)?;
        }
        Ok(())
    }

    /// Waits until the service has been restarted more often than that, and runs; how often it has.
    pub fn await_restart(&self, before: u64) -> Result<u64, Error> {
        let restarts = |n: &str| n.parse().unwrap_or(0u64);
        let now = self.machine.await_property(&self.unit, "NRestarts", |n| restarts(n) > before)?;
        self.machine.await_property(&self.unit, "ActiveState", |s| s == "active")?;
        Ok(restarts(&now))
    }

    /// Kills keeper, supervisor and program, and waits until the service runs again.
    pub fn kill_all(&self) -> Result<(), Error> {
        let before = self.get("NRestarts")?.parse().map_err(|e| error!("{e}"))?;
        self.kill(ALL)?;
        self.await_restart(before).map(drop)
    }

    /// What was said but for what a supervisor says whose keeper is killed first.
    pub fn complaints(&self) -> Result<Vec<String>, Error> {
        let expected = |line: &&str| !line.contains("the keeper was killed: ");
        Ok(self.errors()?.lines().filter(expected).map(str::to_owned).collect())
    }

    /// It is stopped, and leaves nothing with systemd.
    pub fn stop(&self) -> Result<(), Error> {
        self.systemctl("stop")?;
        let ended = [self.get("ActiveState")?, self.get("Result")?, self.get("NFileDescriptorStore")?];
        if ended == ["inactive", "success", "0"] { Ok(()) } else { Err(error!("stopped, it is {ended:?}")) }
    }

    /// A client of the echo server.
    pub fn client(&self) -> Result<Echo, Error> {
        Ok(Echo::connect(PORT, Rng::new(7), true)?)
    }

    /// What was written to its standard error.
    pub fn errors(&self) -> Result<String, Error> {
        Ok(String::from_utf8_lossy(&std::fs::read(self.machine.share().join("err"))?).into_owned())
    }

    /// All has gone well: nothing of it is kept.
    pub fn done(self) {
        self.machine.done();
    }
}

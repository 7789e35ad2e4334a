//! A store service of the tests' own.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::binaries::own_release;
use crate::load::Store;
use crate::process::Process;
use crate::unit::LIMIT;
use crate::{Error, error};

/// An `ftstore serve` with a directory of its own.
#[derive(Debug)]
pub struct Service {
    dir: tempfile::TempDir,
    child: Child,
    port: u16,
}

impl Service {
    /// Starts one that serves a Unix socket and a port of loopback.
    pub fn new() -> Result<Self, Error> {
        Self::within(&std::env::temp_dir())
    }

    /// The same, in a new directory in that one.
    pub fn within(dir: &Path) -> Result<Self, Error> {
        let dir = tempfile::Builder::new().prefix("ftrun-store-").tempdir_in(dir)?;
        // A port that the kernel gives, and nobody else gets in the instant that it is free.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (store, socket) = (dir.path().join("store"), dir.path().join("socket"));
        let key = dir.path().join("key");
        std::fs::write(&key, "a key that only this test has, and long enough")?;
        let client = format!("[[client]]\nname = \"test\"\nnamespace = \"\"\nkey = {key:?}\n");
        let config = format!("dir = {store:?}\nunix = {socket:?}\ntcp = \"127.0.0.1:{port}\"\n{client}");
        std::fs::write(dir.path().join("config"), config)?;
        let child = Self::serve(dir.path())?;
        Ok(Self { dir, child, port })
    }

    fn serve(dir: &Path) -> Result<Child, Error> {
        let mut command = Command::new(own_release("ftstore")?);
        command.arg("serve").arg("--config").arg(dir.join("config"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let begin = Instant::now();
        while std::os::unix::net::UnixStream::connect(dir.join("socket")).is_err() {
            if let Some(status) = child.try_wait()? {
                return Err(error!("ftstore serve: {status}"));
            }
            if begin.elapsed() > LIMIT {
                return Err(error!("ftstore serves nobody after {} s", LIMIT.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(child)
    }

    fn signal(&self, signal: i32) -> Result<(), Error> {
        let pid = i32::try_from(self.child.id()).map_err(|e| error!("{e}"))?;
        Ok(Process::open(pid)?.signal(signal)?)
    }

    /// Lets it go on.
    pub fn go_on(&self) -> Result<(), Error> {
        self.signal(libc::SIGCONT)
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Stops every thread; when this returns none of them does anything.
    pub fn stop(&self) -> Result<(), Error> {
        self.signal(libc::SIGSTOP)?;
        let begin = Instant::now();
        loop {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()))?;
            let stopped = |task: std::fs::DirEntry| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
            };
            if tasks.flatten().all(stopped) {
                return Ok(());
            }
            if begin.elapsed() > LIMIT {
                return Err(error!("ftstore does not stop"));
            }
            std::thread::yield_now();
        }
    }

    /// Starts it again on the same directory.
    pub fn restart(&mut self) -> Result<(), Error> {
        self.child = Self::serve(self.dir.path())?;
        Ok(())
    }

    /// Has a link lead to its directory.
    pub fn link(&self, name: &Path) -> Result<(), Error> {
        Ok(std::os::unix::fs::symlink(self.dir.path().file_name().unwrap_or_default(), name)?)
    }

    /// Its Unix socket, as the URL of a store.
    pub fn url(&self) -> String {
        format!("unix:{}", self.dir.path().join("socket").display())
    }

    /// Its port, as the URL of a store.
    pub fn tcp_url(&self) -> String {
        format!("tcp:127.0.0.1:{}?name=test&key={}", self.port, self.dir.path().join("key").display())
    }

    /// Its directory.
    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }
}

impl Store for Mutex<Service> {
    fn kill(&self, _: u64) -> Result<(), Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).kill()
    }

    fn restart(&self) -> Result<(), Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).restart()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

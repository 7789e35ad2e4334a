//! A store behind a real `ftstore serve`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ftrun_store::{Client, Location, StableStore};
use ftrun_tests::binaries::{cargo, target_dir};
use ftrun_tests::{Error, error};

/// How long it may take to start.
const START: Duration = Duration::from_secs(30);

/// A service, and a connection to it.
#[derive(Debug)]
pub(super) struct Served {
    child: Child,
    client: Option<Client>,
}

/// Builds the service once.
fn build() -> Result<(), Error> {
    static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
    let build = || {
        let mut command = cargo();
        command.args(["build", "--quiet", "--release", "--package", "ftrun-store", "--bin", "ftstore", "--target-dir"]);
        let status = command.arg(target_dir().map_err(|e| e.to_string())?).status().map_err(|e| e.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("building ftstore: {status}")) }
    };
    BUILT.get_or_init(build).clone().map_err(|e| error!("{e}"))
}

impl Served {
    /// Starts a service on `dir` and connects to it, through a Unix socket or over TCP with a shared key.
    pub(super) fn start(dir: &Path, tcp: bool) -> Result<Self, Error> {
        build()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let at = dir.display();
        std::fs::write(dir.join("key"), "0123456789abcdef0123456789abcdef")?;
        let config = format!(
            "dir = '{at}/store'\nunix = '{at}/socket'\ntcp = '127.0.0.1:{port}'\n\
             [[client]]\nname = 'bench'\nnamespace = ''\nkey = '{at}/key'\n"
        );
        std::fs::write(dir.join("ftstore.toml"), config)?;
        let mut command = Command::new(target_dir()?.join("release/ftstore"));
        command.args(["serve", "--config"]).arg(dir.join("ftstore.toml")).env("FTSTORE_LOG", "warn");
        let child = command.stdin(Stdio::null()).spawn()?;
        let mut served = Self { child, client: None };
        let url =
            if tcp { format!("tcp:127.0.0.1:{port}?name=bench&key={at}/key") } else { format!("unix:{at}/socket") };
        let location: Location = url.parse().map_err(|e| error!("{e}"))?;
        let began = Instant::now();
        while served.client.is_none() {
            match Client::connect(&location) {
                Ok(client) => served.client = Some(client),
                // It is not there yet.
                Err(_) if began.elapsed() < START && served.child.try_wait()?.is_none() => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(error!("{e}")),
            }
        }
        Ok(served)
    }

    pub(super) fn store(&self) -> &dyn StableStore {
        self.client.as_ref().expect("connected in start")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.client = None;
        // It may have ended by itself, which whoever waited for an append has been told.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! What other people's engines do for the same job: NATS JetStream through our backend, and PostgreSQL.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ftrun_store::StableStore;
use ftrun_store::nats::servers::Servers;
use ftrun_tests::process::is_root;
use ftrun_tests::{Error, error};

use super::Writer;
use crate::install;

/// How long it may take to start.
const START: Duration = Duration::from_secs(30);
/// The user and group that PostgreSQL is run as by root, which it does not allow: nobody.
const NOBODY: u32 = 65534;

/// A store in a NATS cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    store: Box<dyn StableStore>,
    #[expect(dead_code, reason = "ends the servers, after the store")]
    servers: Servers,
}

impl Cluster {
    pub(super) fn start(dir: &Path, nodes: usize) -> Result<Self, Error> {
        let servers = Servers::start(&install::nats_server()?, dir, nodes)?;
        let location: ftrun_store::Location = servers.url("bench").parse().map_err(|e| error!("{e}"))?;
        Ok(Self { store: location.open().map_err(|e| error!("{e}"))?, servers })
    }

    pub(super) fn store(&self) -> &dyn StableStore {
        &*self.store
    }
}

/// A PostgreSQL with a table of records.
#[derive(Debug)]
pub(super) struct Postgres {
    dir: PathBuf,
    server: Child,
}

/// A program of PostgreSQL, run as an ordinary user. Debian keeps them apart by version; the newest one is taken.
fn program(name: &str) -> Result<Command, Error> {
    let versions = Path::new("/usr/lib/postgresql");
    let mut found: Vec<PathBuf> =
        versions.read_dir().into_iter().flatten().filter_map(|v| Some(v.ok()?.path().join("bin").join(name))).collect();
    found.retain(|path| path.exists());
    found.sort();
    let path = found.pop().ok_or_else(|| error!("no {name}; apt-get install -y postgresql"))?;
    let mut command = Command::new(path);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command)
}

impl Postgres {
    pub(super) fn start(dir: &Path) -> Result<Self, Error> {
        let dir = dir.join("pg");
        std::fs::create_dir(&dir)?;
        if is_root() {
            chown(&dir, Some(NOBODY), Some(NOBODY))?;
        }
        let data = dir.join("data");
        let status =
            program("initdb")?.args(["-A", "trust", "-U", "bench", "-D"]).arg(&data).current_dir(&dir).status()?;
        if !status.success() {
            return Err(error!("initdb: {status}; the directory must be open to user nobody"));
        }
        let socket = format!("unix_socket_directories={}", dir.display());
        let mut server = program("postgres")?;
        server.arg("-D").arg(&data).current_dir(&dir);
        for setting in ["listen_addresses=", "synchronous_commit=on", "fsync=on", "max_connections=200", &socket] {
            server.args(["-c", setting]);
        }
        let postgres = Self { server: server.spawn()?, dir };
        let began = Instant::now();
        let mut client = loop {
            match postgres.connect() {
                Ok(client) => break client,
                // It is not there yet.
                Err(_) if began.elapsed() < START => std::thread::sleep(Duration::from_millis(20)),
                Err(e) => return Err(e),
            }
        };
        let table = "CREATE TABLE records (unit int8, sii int8, record bytea, PRIMARY KEY (unit, sii))";
        client.batch_execute(table).map_err(|e| error!("{e}"))?;
        Ok(postgres)
    }

    fn connect(&self) -> Result<postgres::Client, Error> {
        let place = format!("host={} user=bench dbname=postgres", self.dir.display());
        postgres::Client::connect(&place, postgres::NoTls).map_err(|e| error!("{e}"))
    }

    pub(super) fn writer(&self, unit: usize) -> Result<PostgresWriter, Error> {
        let mut client = self.connect()?;
        let insert = client.prepare("INSERT INTO records VALUES ($1, $2, $3)").map_err(|e| error!("{e}"))?;
        Ok(PostgresWriter { client, insert, unit: i64::try_from(unit).map_err(|e| error!("{e}"))? })
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // With its children, which a signal to it alone would leave behind for a while.
        let stopped = program("pg_ctl").and_then(|mut pg_ctl| {
            let args = ["stop", "--silent", "--mode=fast", "-D", "data"];
            Ok(pg_ctl.args(args).current_dir(&self.dir).status()?.success())
        });
        if !stopped.unwrap_or(false) {
            // It may have ended by itself, which whoever waited for it has been told.
            let _ = self.server.kill();
        }
        let _ = self.server.wait();
    }
}

/// One connection.
pub(super) struct PostgresWriter {
    client: postgres::Client,
    insert: postgres::Statement,
    unit: i64,
}

impl Writer for PostgresWriter {
    fn append(&mut self, n: u64, record: &[u8]) -> Result<(), Error> {
        let sii = i64::try_from(n).map_err(|e| error!("{e}"))?;
        self.client.execute(&self.insert, &[&self.unit, &sii, &record]).map(drop).map_err(|e| error!("{e}"))
    }

    fn wait(&mut self, _: u64) -> Result<(), Error> {
        // A statement is acknowledged when it has been executed.
        Ok(())
    }
}

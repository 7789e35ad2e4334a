//! NATS servers on this machine, for tests and benchmarks.

use std::fmt::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::monitor;

/// How long servers may take to find each other, and one that was started again to catch up.
const START: Duration = Duration::from_secs(60);

/// The program that `FTRUN_NATS_SERVER` names, or the one in the path.
pub fn program() -> PathBuf {
    std::env::var_os("FTRUN_NATS_SERVER").map_or_else(|| "nats-server".into(), PathBuf::from)
}

/// Servers with JetStream that sync each message, on loopback; killed with the value.
#[derive(Debug)]
pub struct Servers {
    program: PathBuf,
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    dir: PathBuf,
    port: u16,
    http: u16,
    route: u16,
    child: Option<Child>,
}

impl Servers {
    /// Starts so many, each with a directory of its own in `dir`, and waits until they take messages.
    ///
    /// # Errors
    /// There is no program `nats-server` (2.10 or later), or it does not start.
    pub fn start(program: &Path, dir: &Path, nodes: usize) -> std::io::Result<Self> {
        // All at once, lest one be given out twice.
        let free: Vec<TcpListener> =
            (0..3 * nodes).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
        let mut ports = free.iter().map(|l| l.local_addr().map(|a| a.port())).collect::<Result<Vec<_>, _>>()?;
        drop(free);
        let mut port = || ports.pop().expect("three for each");
        let node = |n| Node { dir: dir.join(format!("n{n}")), port: port(), http: port(), route: port(), child: None };
        let mut servers = Self { program: program.to_owned(), nodes: (0..nodes).map(node).collect() };
        let routes: Vec<String> = servers.nodes.iter().map(|n| format!("nats://127.0.0.1:{}", n.route)).collect();
        for (n, node) in servers.nodes.iter_mut().enumerate() {
            std::fs::create_dir_all(&node.dir)?;
            let mut config = format!(
                "server_name: n{n}\nlisten: \"127.0.0.1:{}\"\nhttp: \"127.0.0.1:{}\"\n\
                 jetstream {{ store_dir: \"{}\", sync_interval: always }}\n",
                node.port,
                node.http,
                node.dir.display()
            );
            if nodes > 1 {
                // Writing to a string does not fail.
                let _ = writeln!(
                    config,
                    "cluster {{ name: test, listen: \"127.0.0.1:{}\", routes: {routes:?} }}",
                    node.route
                );
            }
            std::fs::write(node.dir.join("config"), config)?;
            node.start(program)?;
        }
        for n in 0..nodes {
            servers.wait_healthy(n)?;
        }
        Ok(servers)
    }

    /// The URL of a store there.
    pub fn url(&self, store: &str) -> String {
        let list = |port: fn(&Node) -> u16| {
            self.nodes.iter().map(|n| format!("127.0.0.1:{}", port(n))).collect::<Vec<_>>().join(",")
        };
        let (servers, monitor, replicas) = (list(|n| n.port), list(|n| n.http), self.nodes.len());
        format!("nats://{servers}/{store}?replicas={replicas}&monitor={monitor}")
    }

    /// Kills one (SIGKILL).
    ///
    /// # Errors
    /// It has ended by itself.
    pub fn kill(&mut self, n: usize) -> std::io::Result<()> {
        let Some(mut child) = self.nodes[n].child.take() else { return Ok(()) };
        child.kill()?;
        child.wait().map(drop)
    }

    /// Starts one that was killed again, and waits until it has caught up.
    ///
    /// # Errors
    /// It does not start.
    pub fn restart(&mut self, n: usize) -> std::io::Result<()> {
        self.nodes[n].start(&self.program)?;
        self.wait_healthy(n)
    }

    fn wait_healthy(&mut self, n: usize) -> std::io::Result<()> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.nodes[n].child.as_mut().and_then(|c| c.try_wait().transpose()) {
                return Err(std::io::Error::other(format!("nats-server has ended: {}", status?)));
            }
            let address = format!("127.0.0.1:{}", self.nodes[n].http);
            if TcpStream::connect(&address).is_ok()
                && let Ok(answer) = monitor::ask(&address, "/healthz")
                && answer.starts_with(br#"{"status":"ok"}"#)
            {
                return Ok(());
            }
            if began.elapsed() > START {
                return Err(std::io::Error::other(format!("the server on {address} does not become healthy")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for n in 0..self.nodes.len() {
            // It may have ended already.
            let _ = self.kill(n);
        }
    }
}

impl Node {
    fn start(&mut self, program: &Path) -> std::io::Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("output"))?;
        let mut command = Command::new(program);
        command.arg("-c").arg(self.dir.join("config")).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let missing = |e: std::io::Error| {
            let what = program.display();
            std::io::Error::new(
                e.kind(),
                format!("{what}: {e}; install nats-server 2.10 or later, or name it by FTRUN_NATS_SERVER"),
            )
        };
        self.child = Some(command.spawn().map_err(missing)?);
        Ok(())
    }
}

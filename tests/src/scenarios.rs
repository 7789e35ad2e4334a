//! One function for each program: start it, load it, kill it, check what is left.
//!
//! Tests, demo, soak and benchmark run these by name.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::binaries::{guest, need, own, program_source};
use crate::clients::{Echo, Files, Http, Memcached, Redis, Rights, Saver, Signaller, Udp, Upstream, Visitor, pattern};
use crate::load::{self, Client, Load, Report};
use crate::process::is_root;
use crate::rng::Rng;
use crate::unit::{Launch, Ready, Unit, free_port};
use crate::wire::Fault;
use crate::{Error, error};

/// Runs one scenario.
pub type Scenario = fn(&Load) -> Result<Report, Error>;

/// Every scenario, by the name under which `cargo xtask soak --program` runs it.
pub const ALL: &[(&str, Scenario)] = &[
    ("redis", redis),
    ("redis-aof", redis_aof),
    ("redis-bgsave", redis_bgsave),
    ("memcached-t1", memcached_t1),
    ("memcached-t4", memcached_t4),
    ("nginx", nginx),
    ("python-asyncio", python_asyncio),
    ("python-threads", python_threads),
    ("python-http", python_http),
    ("epoll-echo", epoll_echo),
    ("visitors", visitors),
    ("thread-echo", thread_echo),
    ("waits-echo", waits_echo),
    ("exec-chain", exec_chain),
    ("tokio-echo", tokio_echo),
    ("udp-echo", udp_echo),
    ("unix-rights", unix_rights),
    ("signals", signals),
    ("compute", compute),
    ("timers", timers),
    ("forks", forks),
    ("files", files),
    ("memory", memory),
    ("itself", itself),
    ("mmsg", mmsg),
    ("descriptors", descriptors),
    ("spin", spin),
    ("alarm-spin", alarm_spin),
];

/// The scenario of this name.
pub fn named(name: &str) -> Option<Scenario> {
    ALL.iter().find(|(n, _)| *n == name).map(|(_, run)| *run)
}

/// Ends a run: a clean one is stopped and cleared away, the other kept and reported.
fn conclude(unit: &Unit, report: Report) -> Result<Report, Error> {
    require_clean(unit, &report)?;
    unit.stop()?;
    Ok(report)
}

fn require_clean(unit: &Unit, report: &Report) -> Result<(), Error> {
    if report.is_clean() { Ok(()) } else { Err(error!("{}:\n{report}", unit.name)) }
}

/// Connects what `make` makes, boxed.
fn clients<C: Client + 'static>(
    mut make: impl FnMut(usize, Rng) -> Result<C, Fault>,
) -> impl FnMut(usize, Rng) -> Result<Box<dyn Client>, Fault> {
    move |n, rng| Ok(Box::new(make(n, rng)?))
}

/// A launch of redis-server with these further arguments.
pub fn redis_launch(args: &[&str]) -> Result<Launch, Error> {
    let mut launch = Launch::new("redis")?;
    let port = free_port()?;
    let work = launch.work();
    launch.run(need("redis-server")?, ["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"]);
    launch.add_args([work.as_os_str()]).add_args(args).ready(Ready::Port(port));
    Ok(launch)
}

fn redis_pid(port: u16, load: &Load) -> Result<String, Error> {
    let mut client = Redis::connect(port, 9999, Rng::new(load.seed))?;
    let info = client.ask(&["INFO", "server"])?;
    let line = info.lines().find_map(|l| l.strip_prefix("process_id:"));
    Ok(line.ok_or_else(|| error!("INFO server: no process_id"))?.trim().to_owned())
}

/// redis as it comes.
pub fn redis(load: &Load) -> Result<Report, Error> {
    redis_with(redis_launch(&[])?, load)
}

/// A prepared redis; its own idea of its process id must not change either.
pub fn redis_with(launch: Launch, load: &Load) -> Result<Report, Error> {
    let unit = launch.start()?;
    let pid = redis_pid(unit.port, load)?;
    let mut report = load::run(load, &unit, clients(|n, rng| Redis::connect(unit.port, n, rng)));
    let now = redis_pid(unit.port, load)?;
    if now != pid {
        report.fault("redis", &Fault::error(format!("INFO process_id was {pid} and is {now}")));
    }
    conclude(&unit, report)
}

/// redis with an append-only file, which must then hold exactly what the clients did.
pub fn redis_aof(load: &Load) -> Result<Report, Error> {
    let unit = redis_launch(&["--appendonly", "yes"])?.start()?;
    let mut models = Vec::new();
    for n in 0..load.clients {
        models.push(Redis::connect(unit.port, n, Rng::part(load.seed, n as u64))?);
    }
    // The clients come back with their models, to be asked once more about what was in the file.
    let shelf = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut models = models.into_iter();
    let report = load::run(load, &unit, |_, _| {
        let client = models.next().ok_or_else(|| Fault::error("more clients than models"))?;
        Ok(Box::new(Returning { client: Some(client), shelf: Arc::clone(&shelf) }))
    });
    require_clean(&unit, &report)?;
    unit.stop()?;
    let models = std::mem::take(&mut *shelf.lock().map_err(|_| error!("a client panicked"))?);
    let fresh = FreshRedis::start(&unit.work())?;
    for mut client in models {
        client.reconnect(fresh.port)?;
        client.verify().map_err(|f| {
            unit.failed();
            error!("{}: the append-only file, read by a fresh redis: {f}", unit.name)
        })?;
    }
    Ok(report)
}

/// A client that goes onto a shelf at the end.
struct Returning {
    client: Option<Redis>,
    shelf: Arc<std::sync::Mutex<Vec<Redis>>>,
}

impl Client for Returning {
    fn step(&mut self, progress: &load::Progress) -> Result<u64, Fault> {
        self.client.as_mut().map_or(Ok(0), |c| c.step(progress))
    }

    fn finish(&mut self) -> Result<u64, Fault> {
        self.client.as_mut().map_or(Ok(0), Client::finish)
    }

    fn shared(&self) -> Option<(u64, u64)> {
        self.client.as_ref().and_then(Client::shared)
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        if let (Some(client), Ok(mut shelf)) = (self.client.take(), self.shelf.lock()) {
            shelf.push(client);
        }
    }
}

/// A redis without ftrun that reads what another left behind.
struct FreshRedis {
    child: std::process::Child,
    port: u16,
}

impl FreshRedis {
    fn start(work: &Path) -> Result<Self, Error> {
        let port = free_port()?;
        let mut command = Command::new(need("redis-server")?);
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--appendonly", "yes", "--dir"]).arg(work);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut fresh = Self { child, port };
        let start = Instant::now();
        // It answers -LOADING while it reads.
        while Redis::connect(port, 0, Rng::new(0)).and_then(|mut c| c.ask(&["PING"])).is_err() {
            if let Some(status) = fresh.child.try_wait()? {
                return Err(error!("a fresh redis did not start with the append-only file: {status}"));
            }
            if start.elapsed() > crate::unit::LIMIT {
                return Err(error!("a fresh redis does not answer"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(fresh)
    }
}

impl Drop for FreshRedis {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// redis that forks to save in the background all the time.
pub fn redis_bgsave(load: &Load) -> Result<Report, Error> {
    let unit = redis_launch(&["--appendonly", "yes"])?.start()?;
    let port = unit.port;
    let report = load::run(load, &unit, |n, rng| {
        Ok(match n {
            0 => Box::new(Saver::connect(port, rng, "BGSAVE")?) as Box<dyn Client>,
            _ => Box::new(Redis::connect(port, n, rng)?),
        })
    });
    conclude(&unit, report)
}

/// memcached with one worker thread.
pub fn memcached_t1(load: &Load) -> Result<Report, Error> {
    memcached(load, "1")
}

/// memcached with four worker threads.
pub fn memcached_t4(load: &Load) -> Result<Report, Error> {
    memcached(load, "4")
}

/// A launch of memcached with so many worker threads.
pub fn memcached_launch(threads: &str) -> Result<Launch, Error> {
    let mut launch = Launch::new("memcached")?;
    let port = free_port()?;
    launch.run(need("memcached")?, ["-l", "127.0.0.1", "-U", "0", "-t", threads, "-p", &port.to_string()]);
    if is_root() {
        launch.add_args(["-u", "root"]);
    }
    launch.ready(Ready::Port(port));
    Ok(launch)
}

fn memcached(load: &Load, threads: &str) -> Result<Report, Error> {
    let unit = memcached_launch(threads)?.start()?;
    let port = unit.port;
    let report = load::run(load, &unit, clients(|n, rng| Memcached::connect(port, n, rng)));
    conclude(&unit, report)
}

fn web_files(dir: &Path, seed: u64) -> Result<Arc<Files>, Error> {
    let sizes = [("small.txt", 100), ("page.bin", 20_000), ("big.bin", 1 << 20)];
    let mut files = Vec::new();
    for (n, (name, size)) in sizes.into_iter().enumerate() {
        let content = pattern(seed + n as u64, size);
        std::fs::write(dir.join(name), &content)?;
        files.push((format!("/{name}"), content));
    }
    Ok(Arc::new(files))
}

/// A launch of nginx without a master process that serves its working directory, with these further lines for
/// its `http` and its `server` block.
pub fn nginx_launch(http: &str, server: &str) -> Result<Launch, Error> {
    let mut launch = Launch::new("nginx")?;
    let (port, work) = (free_port()?, launch.work());
    let user = if is_root() { "user root;\n" } else { "" };
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("    {kind}_temp_path {}/{kind};\n", work.display()))
        .concat();
    let config = format!(
        "{user}daemon off;\nmaster_process off;\nerror_log stderr;\npid {dir}/nginx.pid;\n\
         events {{ worker_connections 256; }}\n\
         http {{\n    keepalive_requests 100000000;\n    keepalive_timeout 600;\n{http}\n{temporary}\
         server {{\n        listen 127.0.0.1:{port};\n        root {dir};\n{server}\n    }}\n}}\n",
        dir = work.display(),
    );
    let file = work.join("nginx.conf");
    std::fs::write(&file, config)?;
    launch.run(need("nginx")?, [Path::new("-p"), &work, Path::new("-c"), &file]);
    launch.ready(Ready::Port(port));
    Ok(launch)
}

/// nginx: files up to 1 MiB on keep-alive connections, and uploads to an upstream.
pub fn nginx(load: &Load) -> Result<Report, Error> {
    let upstream = Upstream::start()?;
    let server =
        format!("location /upload {{ proxy_pass http://127.0.0.1:{}; proxy_read_timeout 60; }}", upstream.port);
    let launch = nginx_launch("access_log access.log; client_max_body_size 8m;", &server)?;
    let files = web_files(&launch.work(), load.seed)?;
    let unit = launch.start()?;
    let port = unit.port;
    let connect = |n, rng| Ok(Http::connect(port, n, rng, &files)?.uploading("/upload"));
    let mut report = load::run(load, &unit, clients(connect));
    if let Err(fault) = upstream.check() {
        report.fault("upstream", &fault);
    }
    conclude(&unit, report)
}

/// nginx that [`nginx_launch`] has prepared: files up to 1 MiB on keep-alive connections.
pub fn nginx_files(load: &Load, launch: Launch) -> Result<Report, Error> {
    let files = web_files(&launch.work(), load.seed)?;
    let unit = launch.start()?;
    let report = load::run(load, &unit, clients(|n, rng| Http::connect(unit.port, n, rng, &files)));
    conclude(&unit, report)
}

/// Starts a server that prints `ready PORT` and answers `pid`, and loads it with echo clients.
pub fn echo_server(load: &Load, mut launch: Launch) -> Result<Report, Error> {
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let report = load::run(load, &unit, clients(|_, rng| Echo::connect(unit.port, rng, true)));
    conclude(&unit, report)
}

/// A launch of one of our Python programs, which any user may read.
pub fn python_launch(script: &str) -> Result<Launch, Error> {
    let mut launch = Launch::new("python")?;
    let script = launch.copy(&program_source(script))?;
    launch.run(need("python3")?, [script]);
    Ok(launch)
}

/// An asyncio server with counters for each connection.
pub fn python_asyncio(load: &Load) -> Result<Report, Error> {
    echo_server(load, python_launch("asyncio_echo.py")?)
}

/// A Python server with a thread for each connection.
pub fn python_threads(load: &Load) -> Result<Report, Error> {
    echo_server(load, python_launch("thread_echo.py")?)
}

/// `python3 -m http.server`, most clients on one connection each, two that connect for each request.
pub fn python_http(load: &Load) -> Result<Report, Error> {
    let mut launch = Launch::new("http-server")?;
    let port = free_port()?;
    let files = web_files(&launch.work(), load.seed)?;
    let port_text = port.to_string();
    launch.run(need("python3")?, ["-m", "http.server", "--bind", "127.0.0.1", "--protocol", "HTTP/1.1", &port_text]);
    launch.ready(Ready::Port(port));
    let unit = launch.start()?;
    let connect = |n: usize, rng| {
        let client = Http::connect(port, n, rng, &files)?;
        Ok(if n % 4 == 3 { client.reconnecting() } else { client })
    };
    let report = load::run(load, &unit, clients(connect));
    conclude(&unit, report)
}

/// A launch of one of our C programs, which any user may run.
pub fn guest_launch(name: &str) -> Result<Launch, Error> {
    let mut launch = Launch::new(name)?;
    let program = launch.copy(&guest(name)?)?;
    launch.run(program, [] as [&str; 0]);
    Ok(launch)
}

/// An epoll server in C.
pub fn epoll_echo(load: &Load) -> Result<Report, Error> {
    echo_server(load, guest_launch("epoll_echo")?)
}

/// The same server with clients that come and go, so that kills fall into accept and close.
pub fn visitors(load: &Load) -> Result<Report, Error> {
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let report = load::run(load, &unit, clients(|_, rng| Ok(Visitor::new(unit.port, rng))));
    conclude(&unit, report)
}

/// A server in C with threads, mutexes and condition variables.
pub fn thread_echo(load: &Load) -> Result<Report, Error> {
    echo_server(load, guest_launch("thread_echo")?)
}

/// A server in C that waits in every way there is.
pub fn waits_echo(load: &Load) -> Result<Report, Error> {
    echo_server(load, guest_launch("waits_echo")?)
}

/// A shell that becomes `env`, which becomes the server.
pub fn exec_chain(load: &Load) -> Result<Report, Error> {
    echo_server(load, exec_chain_launch()?)
}

/// A shell that executes `env`, which executes the echo server.
pub fn exec_chain_launch() -> Result<Launch, Error> {
    let mut launch = Launch::new("exec-chain")?;
    let program = launch.copy(&guest("epoll_echo")?)?;
    let script = format!("cd . && exec env CHAIN=1 '{}'", program.display());
    launch.run("/bin/sh", ["-c", &script]);
    Ok(launch)
}

/// A tokio server with four worker threads.
pub fn tokio_echo(load: &Load) -> Result<Report, Error> {
    let mut launch = Launch::new("tokio-echo")?;
    launch.run(own("tokio_echo")?, [] as [&str; 0]);
    echo_server(load, launch)
}

/// A datagram server.
pub fn udp_echo(load: &Load) -> Result<Report, Error> {
    let mut launch = guest_launch("udp_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let report = load::run(load, &unit, clients(|_, rng| Udp::connect(unit.port, rng)));
    conclude(&unit, report)
}

/// A Unix-socket server that passes descriptors.
pub fn unix_rights(load: &Load) -> Result<Report, Error> {
    let mut launch = guest_launch("unix_rights")?;
    let path = launch.work().join("socket");
    launch.add_args([&path]).ready(Ready::Line);
    let unit = launch.start()?;
    let report = load::run(load, &unit, clients(|_, rng| Rights::connect(&path, rng)));
    conclude(&unit, report)
}

/// A server that counts SIGUSR1.
pub fn signals(load: &Load) -> Result<Report, Error> {
    let mut launch = guest_launch("signals")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let port = unit.port;
    let report = load::run(load, &unit, |n, rng| {
        Ok(match n {
            0 if unit.may_choose_pids() || unit.is_bare() => {
                Box::new(Signaller::connect(port, rng)?) as Box<dyn Client>
            }
            _ => Box::new(Echo::connect(port, rng, true)?),
        })
    });
    conclude(&unit, report)
}

/// Runs a self-checking program under kills, has it end, then looks at what it has left behind.
pub fn rounds(
    load: &Load,
    mut launch: Launch,
    check: impl FnOnce(&Unit, u64) -> Result<(), Fault>,
) -> Result<Report, Error> {
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let alone = Load { clients: 0, ..load.clone() };
    let mut report = load::run(&alone, &unit, |_, _| Err(Fault::error("no clients here")));
    require_clean(&unit, &report)?;
    let count = unit.finish_rounds()?;
    report.requests = count;
    if let Err(fault) = check(&unit, count) {
        unit.failed();
        report.fault("what is left", &fault);
    }
    require_clean(&unit, &report)?;
    Ok(report)
}

/// A program that computes and appends each result to a file: each line there exactly once.
pub fn compute(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("compute")?, |unit, count| {
        let text = std::fs::read_to_string(unit.work().join("results.txt"))?;
        let mut value = 1u64;
        let mut lines = text.lines();
        for n in 1..=count {
            for _ in 0..200_000 {
                value = mix(value);
            }
            let line = lines.next().ok_or_else(|| Fault::lost(format!("results.txt ends before line {n}")))?;
            if line != format!("{n} {value}") {
                return Err(Fault::error(format!("results.txt: `{line}` where `{n} {value}` belongs")));
            }
        }
        match lines.next() {
            Some(line) => Err(Fault::doubled(format!("results.txt: `{line}` after line {count}, the last"))),
            None => Ok(()),
        }
    })
}

/// The step of the sequence that `compute.c` computes.
fn mix(x: u64) -> u64 {
    Rng::new(x).next()
}

/// Timers, signalfd, eventfd, pipes, poll and select.
pub fn timers(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("timers")?, |_, _| Ok(()))
}

/// fork, pipe, SIGCHLD, waitpid.
pub fn forks(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("forks")?, |_, _| Ok(()))
}

/// Descriptors that come and go, positions in files, connections to itself; the file that grows holds each line once.
pub fn descriptors(load: &Load) -> Result<Report, Error> {
    descriptors_of(load, guest_launch("descriptors")?)
}

/// As [`descriptors`], launched in some way.
pub fn descriptors_of(load: &Load, launch: Launch) -> Result<Report, Error> {
    rounds(load, launch, |unit, count| {
        let want: String = (1..=count).map(|n| format!("line {n}\n")).collect();
        let got = std::fs::read_to_string(unit.work().join("ledger"))?;
        let lines = got.lines().count();
        if got == want {
            Ok(())
        } else {
            Err(Fault::error(format!("the ledger has {lines} lines after {count} rounds")))
        }
    })
}

/// Files and directories; what is left is what the last rounds leave.
pub fn files(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("files")?, |unit, count| {
        let want: String = (1..=count).map(|n| format!("round {n}\n")).collect();
        let got = std::fs::read_to_string(unit.work().join("appended"))?;
        if got != want {
            return Err(Fault::error(format!("`appended` has {} bytes instead of {}", got.len(), want.len())));
        }
        let names = std::fs::read_dir(unit.work())?.flatten().map(|e| e.file_name());
        let mut dirs: Vec<_> = names.filter_map(|n| n.to_str()?.strip_prefix("dir.")?.parse::<u64>().ok()).collect();
        dirs.sort_unstable();
        let want: Vec<_> = (count.saturating_sub(7).max(1)..=count).collect();
        if dirs == want { Ok(()) } else { Err(Fault::error(format!("directories {dirs:?} instead of {want:?}"))) }
    })
}

/// mmap, mremap, mprotect, madvise, brk.
pub fn memory(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("memory")?, |_, _| Ok(()))
}

/// A program that keeps files open that proc(5) has about the program.
pub fn itself(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("itself")?, |_, _| Ok(()))
}

/// A program that receives several messages in a call.
pub fn mmsg(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("mmsg")?, |_, _| Ok(()))
}

/// A thread that spins on a variable until another has set it.
pub fn spin(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("spin")?, |_, _| Ok(()))
}

/// A program that computes without a system call until SIGALRM comes.
pub fn alarm_spin(load: &Load) -> Result<Report, Error> {
    rounds(load, guest_launch("alarm_spin")?, |_, _| Ok(()))
}

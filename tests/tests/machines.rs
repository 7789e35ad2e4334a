//! Two network namespaces as two machines, and a third with the store: a unit of durability `node` goes on on the other one
//! when the first is lost.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ftrun_tests::binaries::{Mode, mode, need, own_release};
use ftrun_tests::process::{Process, is_root};
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::{LIMIT, Ready, Unit};
use ftrun_tests::{Error, error};

/// A network namespace with a link to the store's.
struct Machine {
    name: String,
}

fn ip(words: &str) -> Result<(), Error> {
    let output = Command::new(need("ip")?).args(words.split(' ')).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(error!("ip {words}: {text}")) }
}

impl Machine {
    fn new(which: &str) -> Result<Self, Error> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        // Tests of one process run beside each other.
        let name = format!("ftrun-{which}-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        ip(&format!("netns add {name}"))?;
        let machine = Self { name };
        ip(&format!("-n {} link set lo up", machine.name))?;
        Ok(machine)
    }

    /// Links it to the store's machine: network `n` is 10.99.n.0/24, and the store has 1 in it.
    fn link(&self, store: &Machine, n: u8) -> Result<(), Error> {
        let (here, there) = (&self.name, &store.name);
        ip(&format!("-n {here} link add up{n} type veth peer name down{n} netns {there}"))?;
        for (machine, link, host) in [(here, format!("up{n}"), 2), (there, format!("down{n}"), 1)] {
            ip(&format!("-n {machine} addr add 10.99.{n}.{host}/24 dev {link}"))?;
            ip(&format!("-n {machine} link set {link} up"))?;
        }
        Ok(())
    }

    /// The words that start what follows them there, under the machine's own name.
    fn words(&self) -> Vec<String> {
        let script = format!("hostname {} && exec \"$0\" \"$@\"", self.name);
        let words = ["ip", "netns", "exec", &self.name, "unshare", "--uts", "sh", "-c", &script];
        words.map(str::to_owned).to_vec()
    }

    fn command(&self, program: impl AsRef<Path>) -> Result<Command, Error> {
        let words = self.words();
        let mut command = Command::new(need(&words[0])?);
        command.args(&words[1..]).arg(program.as_ref()).stdin(Stdio::null());
        Ok(command)
    }

    /// Does something in it, in a thread of its own.
    fn inside<R: Send>(&self, f: impl FnOnce() -> Result<R, Error> + Send) -> Result<R, Error> {
        let file = std::fs::File::open(Path::new("/run/netns").join(&self.name))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                // SAFETY: concerns this thread alone.
                if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    return Err(std::io::Error::last_os_error().into());
                }
                f()
            });
            thread.join().map_err(|_| error!("a thread in a namespace panicked"))?
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _gone = ip(&format!("netns del {}", self.name));
    }
}

/// A process that is killed in the end.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Asks the echo server so many times; the total that it has counted in the end.
fn talk(port: u16, times: u64) -> Result<u64, Error> {
    let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", port))?);
    stream.get_mut().set_read_timeout(Some(LIMIT))?;
    let mut total = 0;
    for n in 0..times {
        stream.get_mut().write_all(format!("request {n}\n").as_bytes())?;
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let said = line.split(' ').nth(1).and_then(|t| t.parse().ok());
        total = said.ok_or_else(|| error!("`{line}` has no total"))?;
    }
    Ok(total)
}

/// An authority, and a certificate of the store's two addresses.
fn certify(ca_at: &Path, cert_at: &Path, key_at: &Path) -> Result<(), Error> {
    let make = || -> Result<[String; 3], rcgen::Error> {
        let mut ca = rcgen::CertificateParams::new(Vec::new())?;
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_key = rcgen::KeyPair::generate()?;
        let ca_pem = ca.self_signed(&ca_key)?.pem();
        let issuer = rcgen::Issuer::new(ca, ca_key);
        let key = rcgen::KeyPair::generate()?;
        let hosts = vec!["10.99.1.1".to_owned(), "10.99.2.1".to_owned()];
        let cert = rcgen::CertificateParams::new(hosts)?.signed_by(&key, &issuer)?;
        Ok([ca_pem, cert.pem(), key.serialize_pem()])
    };
    let pems = make().map_err(|e| error!("a certificate: {e}"))?;
    for (at, pem) in [ca_at, cert_at, key_at].into_iter().zip(pems) {
        std::fs::write(at, pem)?;
    }
    Ok(())
}

/// Three machines, one with a store, and a directory for what they need.
struct Site {
    dir: tempfile::TempDir,
    first: Machine,
    second: Machine,
    _service: Running,
    _store: Machine,
}

impl Site {
    fn new() -> Result<Self, Error> {
        let dir = tempfile::Builder::new().prefix("ftrun-machines-").tempdir()?;
        let at = |name: &str| dir.path().join(name);
        let (store, first, second) = (Machine::new("store")?, Machine::new("one")?, Machine::new("two")?);
        first.link(&store, 1)?;
        second.link(&store, 2)?;
        std::fs::write(at("key"), "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n")?;
        certify(&at("ca"), &at("cert"), &at("cert-key"))?;
        let config = format!(
            "dir = {:?}\ntcp = \"0.0.0.0:7070\"\n[tls]\ncert = {:?}\nkey = {:?}\n\
             [[client]]\nname = \"shop\"\nnamespace = \"shop\"\nkey = {:?}\n",
            at("store"),
            at("cert"),
            at("cert-key"),
            at("key")
        );
        std::fs::write(at("config"), config)?;
        let mut serve = store.command(own_release("ftstore")?)?;
        let said = std::fs::File::create(at("ftstore"))?;
        let serve = serve.arg("serve").arg("--config").arg(at("config")).stdout(said.try_clone()?).stderr(said);
        let service = Running(serve.spawn()?);
        let listens = || TcpStream::connect_timeout(&([10, 99, 1, 1], 7070).into(), Duration::from_millis(100));
        let begin = Instant::now();
        while first.inside(|| Ok(listens()?)).is_err() {
            if begin.elapsed() > LIMIT {
                return Err(error!("no ftstore: {}", std::fs::read_to_string(at("ftstore"))?));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { first, second, _service: service, _store: store, dir })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The store, from machine `n`.
    fn url(&self, n: u8) -> String {
        let (key, ca) = (self.at("key"), self.at("ca"));
        format!("tcp:10.99.{n}.1:7070?name=shop&key={}&ca={}", key.display(), ca.display())
    }

    /// The echo server on the first machine.
    fn start(&self) -> Result<Unit, Error> {
        let mut launch = guest_launch("epoll_echo")?;
        launch.through(self.first.words()).ready(Ready::Line);
        launch.options(["--durability", "node", "--stable", "cache", "--store", &self.url(1)]);
        launch.start()
    }

    /// `ftrun resume` on the second machine.
    fn resume(&self, ftrun: &Path, unit: &Unit) -> Result<Running, Error> {
        let mut resume = self.second.command(ftrun)?;
        let said = std::fs::File::create(self.at("resumed"))?;
        resume.arg("--state-dir").arg(self.at("state")).args(["resume", &unit.name, "--stable", "cache"]);
        resume.args(["--store", &self.url(2)]).stdout(said.try_clone()?).stderr(said);
        Ok(Running(resume.spawn()?))
    }

    fn ask(&self, ftrun: &Path, words: &[&str]) -> Result<serde_json::Value, Error> {
        let output = Command::new(ftrun).arg("--state-dir").arg(self.at("state")).args(words).output()?;
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    fn said(&self) -> Result<String, Error> {
        Ok(std::fs::read_to_string(self.at("resumed"))?)
    }

    /// Waits until the unit runs on the second machine; how long that took.
    fn await_running(&self, ftrun: &Path, unit: &Unit, resumed: &mut Running) -> Result<Duration, Error> {
        let begin = Instant::now();
        while self.ask(ftrun, &["status", &unit.name, "--json"])?["state"] != "running" {
            if resumed.0.try_wait()?.is_some() || begin.elapsed() > LIMIT {
                return Err(error!("not resumed: {}", self.said()?));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(begin.elapsed())
    }
}

fn may_run() -> Result<Option<&'static Path>, Error> {
    let Mode::Under(ftrun) = mode()? else { return Ok(None) };
    if !is_root() {
        eprintln!("skipped: network namespaces take root");
        return Ok(None);
    }
    Ok(Some(ftrun))
}

/// Whether the writer lives cannot be seen from another machine: its lease is waited for, and that is said.
///
/// Break it: have `retrieve` leave out the events behind the newest checkpoint, or take every holder for dead
/// (`Holder::is_dead`).
#[test]
fn a_unit_goes_on_on_another_machine() -> Result<(), Error> {
    let Some(ftrun) = may_run()? else { return Ok(()) };
    let site = Site::new()?;
    let unit = site.start()?;
    assert_eq!(site.first.inside(|| talk(unit.port, 300))?, 300);
    unit.kill9_all(0)?;
    unit.given_up();
    let mut resumed = site.resume(ftrun, &unit)?;
    let took = site.await_running(ftrun, &unit, &mut resumed)?;
    let said = site.said()?;
    assert!(said.contains(&site.first.name) && said.contains("waiting until"), "{said}");
    // The lease is of ten seconds, and was renewed within the last few.
    assert!(took > Duration::from_secs(4), "{took:?}");
    assert_eq!(site.second.inside(|| talk(unit.port, 50))?, 350);
    site.ask(ftrun, &["stop", &unit.name])?;
    resumed.0.wait()?;
    unit.wipe_memory()
}

/// A machine that stood still comes back when its unit goes on elsewhere: it gives out nothing any more, and ends.
///
/// Break it: leave out the epoch (have the service take appends of a handle that another opening has overtaken), or have an output that waits
/// not look whether the unit is lost (`Unit::may_leave`).
#[test]
fn a_machine_that_comes_back_is_fenced() -> Result<(), Error> {
    let Some(ftrun) = may_run()? else { return Ok(()) };
    let site = Site::new()?;
    let unit = site.start()?;
    let mut talks = site.first.inside(|| {
        let stream = TcpStream::connect(("127.0.0.1", unit.port))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(BufReader::new(stream))
    })?;
    let mut line = String::new();
    for n in 1..=20 {
        talks.get_mut().write_all(b"text\n")?;
        line.clear();
        talks.read_line(&mut line)?;
        assert_eq!(line, format!("{n} {n} text\n"));
    }
    let status = unit.status()?;
    let pids =
        ["keeper_pid", "supervisor_pid", "pid"].map(|key| status[key].as_i64().and_then(|n| i32::try_from(n).ok()));
    let processes = pids.into_iter().flatten().map(Process::open).collect::<Result<Vec<_>, _>>()?;
    assert_eq!(processes.len(), 3);
    for process in &processes {
        process.signal(libc::SIGSTOP)?;
    }
    // It is there when the machine comes back.
    talks.get_mut().write_all(b"while it stood still\n")?;
    let mut resumed = site.resume(ftrun, &unit)?;
    site.await_running(ftrun, &unit, &mut resumed)?;
    assert_eq!(site.second.inside(|| talk(unit.port, 1))?, 21);
    for process in processes.iter().rev() {
        process.signal(libc::SIGCONT)?;
    }
    line.clear();
    let heard = talks.read_line(&mut line);
    assert!(!matches!(heard, Ok(1..)), "answered by a unit that is lost: {line}");
    let ended = unit.wait()?;
    let said = unit.stderr()?;
    assert!(!ended.success() && said.contains("has been taken over"), "{ended}: {said}");
    assert_eq!(site.second.inside(|| talk(unit.port, 10))?, 31);
    site.ask(ftrun, &["stop", &unit.name])?;
    resumed.0.wait()?;
    Ok(())
}

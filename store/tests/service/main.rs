//! `ftstore serve` as its users have it: a process, sockets, files.

mod bad_input;
mod commands;
mod strangers;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ftrun_store::net::{
    Answer, FRAME_BYTES_MAX, Incoming, Op, PUTS_MAX, Ready, Request, Response, VERSIONS, Welcome, encode,
};
use ftrun_store::{Batch, Client, Durability, Error, Location, OpenOptions, StableStore, UnitName, conformance};

const LONG: Duration = Duration::from_secs(60);
const KEY: &str = "0123456789abcdef0123456789abcdef";

/// A service with a directory of its own; ended with the value.
struct Service {
    dir: tempfile::TempDir,
    child: Child,
    port: u16,
    http: u16,
}

/// Ports that nobody listens on just now.
fn free_ports() -> (u16, u16) {
    let bind = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (a, b) = (bind(), bind());
    (a.local_addr().unwrap().port(), b.local_addr().unwrap().port())
}

impl Service {
    fn start(more: &str) -> Self {
        Self::start_with(more, |_| {})
    }

    fn start_with(more: &str, prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        std::fs::write(dir.path().join("key"), format!("{KEY}\n")).unwrap();
        let (port, http) = free_ports();
        let at = dir.path().display();
        let config = format!(
            "dir = '{at}/store'\nunix = '{at}/socket'\ntcp = '127.0.0.1:{port}'\nhttp = '127.0.0.1:{http}'\n{}\n\
             [[client]]\nname = 'all'\nnamespace = ''\nkey = '{at}/key'\n\
             [[client]]\nname = 'one'\nnamespace = 'one'\nkey = '{at}/key'\n\
             [[client]]\nname = 'two'\nnamespace = 'two'\nkey = '{at}/key'\n",
            more.replace("DIR", &at.to_string())
        );
        std::fs::write(dir.path().join("ftstore.toml"), config).unwrap();
        let child = Self::spawn(dir.path());
        let mut service = Self { dir, child, port, http };
        service.wait_ready();
        service
    }

    fn spawn(dir: &Path) -> Child {
        Command::new(env!("CARGO_BIN_EXE_ftstore"))
            .args(["serve", "--config"])
            .arg(dir.join("ftstore.toml"))
            .env("FTSTORE_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// The socket is listened on before the service says that it is ready; asking it is the test.
    fn wait_ready(&mut self) {
        let began = Instant::now();
        while UnixStream::connect(self.path("socket")).is_err() || TcpStream::connect(("127.0.0.1", self.http)).is_err()
        {
            assert!(self.child.try_wait().unwrap().is_none(), "it has ended");
            assert!(began.elapsed() < LONG);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn unix(&self) -> Location {
        Location::Unix(self.path("socket"))
    }

    fn tcp(&self, name: &str) -> Location {
        let key = self.path("key");
        format!("tcp:127.0.0.1:{}?name={name}&key={}", self.port, key.display()).parse().unwrap()
    }

    fn http(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = self.http("/metrics");
        let line = metrics.lines().find_map(|l| l.strip_prefix(name).filter(|rest| rest.starts_with(' ')));
        line.unwrap_or_else(|| panic!("{name} in {metrics}")).trim().parse().unwrap()
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn name(name: &str) -> UnitName {
    UnitName::new(name).unwrap()
}

fn options(durability: Durability) -> OpenOptions {
    OpenOptions { holder: "tester".into(), ttl: Duration::from_secs(30), durability }
}

/// A store that lives with its service.
#[derive(Debug)]
struct Held<S: StableStore> {
    store: S,
    #[expect(dead_code, reason = "dropped after the store")]
    service: Alive,
}

struct Alive(#[expect(dead_code, reason = "ends the service")] Service);

impl std::fmt::Debug for Alive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Alive")
    }
}

impl<S: StableStore> StableStore for Held<S> {
    fn open(
        &self,
        unit: &UnitName,
        options: &OpenOptions,
    ) -> Result<std::sync::Arc<dyn ftrun_store::UnitStore>, Error> {
        self.store.open(unit, options)
    }
    fn view(&self, unit: &UnitName) -> Result<std::sync::Arc<dyn ftrun_store::UnitStore>, Error> {
        self.store.view(unit)
    }
    fn units(&self) -> Result<Vec<ftrun_store::UnitInfo>, Error> {
        self.store.units()
    }
    fn remove(&self, unit: &UnitName) -> Result<(), Error> {
        self.store.remove(unit)
    }
    fn fsck(&self) -> Result<ftrun_store::Fsck, Error> {
        self.store.fsck()
    }
    fn gc(&self) -> Result<ftrun_store::Reclaimed, Error> {
        self.store.gc()
    }
}

fn conforms(more: &str, prepare: fn(&Path), location: fn(&Service) -> Location) {
    conformance::run(&mut || {
        let service = Service::start_with(more, prepare);
        let store = Client::connect(&location(&service)).unwrap();
        Box::new(Held { store, service: Alive(service) })
    });
}

#[test]
fn conforms_over_a_unix_socket() {
    conforms("", |_| {}, Service::unix);
}

#[test]
fn conforms_over_tcp_with_a_key() {
    conforms("", |_| {}, |service| service.tcp("all"));
}

const TLS: &str = "[tls]\ncert = 'DIR/cert.pem'\nkey = 'DIR/cert-key.pem'\n";

/// A CA, the service's certificate, and a client's.
fn certificates(dir: &Path) {
    let write = |file: &str, text: String| std::fs::write(dir.join(file), text).unwrap();
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    write("ca.pem", ca_cert.pem());
    let issuer = rcgen::Issuer::new(ca, ca_key);
    for (file, host) in [("cert", "127.0.0.1"), ("client", "client"), ("stranger", "stranger")] {
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = rcgen::CertificateParams::new(vec![host.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        write(&format!("{file}.pem"), cert.pem());
        write(&format!("{file}-key.pem"), key.serialize_pem());
        let print = ring::digest::digest(&ring::digest::SHA256, cert.der());
        let print: Vec<String> = print.as_ref().iter().map(|b| format!("{b:02X}")).collect();
        write(&format!("{file}.sha256"), print.join(":"));
    }
}

#[test]
fn conforms_over_tls_with_a_key() {
    conforms(TLS, certificates, |service| {
        let Location::Tcp(tcp) = service.tcp("all") else { unreachable!() };
        Location::Tcp(ftrun_store::Tcp { ca: Some(service.path("ca.pem")), ..tcp })
    });
}

#[test]
fn conforms_over_mutual_tls() {
    fn prepare(dir: &Path) {
        certificates(dir);
    }
    let with = |service: &Service, who: &str| {
        Location::Tcp(ftrun_store::Tcp {
            address: format!("127.0.0.1:{}", service.port),
            ca: Some(service.path("ca.pem")),
            cert: Some(service.path(&format!("{who}.pem"))),
            cert_key: Some(service.path(&format!("{who}-key.pem"))),
            ..ftrun_store::Tcp::default()
        })
    };
    let mut services = 0;
    conformance::run(&mut || {
        services += 1;
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let print = std::fs::read_to_string(dir.path().join("client.sha256")).unwrap();
        let more =
            format!("{TLS}client-ca = 'DIR/ca.pem'\n[[client]]\nname = 'c'\nnamespace = ''\ncertificate = '{print}'\n");
        let service = Service::start_with(&more, |to| {
            for file in std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().path()) {
                std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
            }
        });
        if services == 1 {
            let e = Client::connect(&with(&service, "stranger")).unwrap_err();
            assert!(matches!(&e, Error::Refused { .. }), "a certificate that is not listed: {e}");
        }
        let store = Client::connect(&with(&service, "client")).unwrap();
        Box::new(Held { store, service: Alive(service) })
    });
}

/// Break it: leave the prefix out of one operation.
#[test]
fn a_client_has_only_its_own_units() {
    let service = Service::start("");
    let [one, two, all] = ["one", "two", "all"].map(|who| Client::connect(&service.tcp(who)).unwrap());
    let unit = one.open(&name("a"), &options(Durability::Disk)).unwrap();
    unit.append(Batch::of(0, ["secret"])).unwrap();
    unit.wait(0, LONG).unwrap();
    assert!(two.units().unwrap().is_empty());
    for other in ["a", "one/a"] {
        assert!(matches!(two.view(&name(other)), Err(Error::NoUnit { .. })), "{other}");
        assert!(matches!(two.remove(&name(other)), Err(Error::NoUnit { .. })), "{other}");
    }
    let own = two.open(&name("a"), &options(Durability::Disk)).unwrap();
    assert!(own.log().unwrap().is_empty(), "the same name is another unit");
    for refused in [two.fsck().map(drop), two.gc().map(drop)] {
        assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    }
    let names: Vec<String> = all.units().unwrap().into_iter().map(|u| u.name.to_string()).collect();
    assert_eq!(names, ["one/a", "two/a"]);
    assert_eq!(one.units().unwrap()[0].name.as_str(), "a");
    all.fsck().unwrap();
}

/// What was acknowledged is there after the service has been killed; leases are kept.
#[test]
fn a_killed_service_has_lost_nothing() {
    let mut service = Service::start("");
    let mut sure = 0;
    for kill in 0..6 {
        let client = Client::connect(&service.tcp("all")).unwrap();
        let unit = client.open(&name("a"), &options(Durability::Disk)).unwrap();
        let log = unit.log().unwrap();
        assert!(log.end >= sure, "kill {kill}: {log:?}, {sure} were acknowledged");
        let mut at = log.end;
        // Cut off in the middle of what is under way.
        let e = loop {
            let appended = unit.append(Batch::of(at, [at.to_le_bytes()]));
            at += 1;
            if let Err(e) = appended.and_then(|()| if at.is_multiple_of(7) { unit.wait(at - 1, LONG) } else { Ok(()) })
            {
                break e;
            }
            sure = sure.max(unit.acknowledged().unwrap_or(0));
            if at == log.end + 200 + kill * 31 {
                service.child.kill().unwrap();
            }
        };
        assert!(matches!(e, Error::Disconnected { .. }), "{e}");
        assert!(matches!(client.units(), Err(Error::Disconnected { .. })));
        service.child.wait().unwrap();
        service.child = Service::spawn(service.dir.path());
        service.wait_ready();
        let client = Client::connect(&service.unix()).unwrap();
        let other = OpenOptions { holder: "another".into(), ..options(Durability::Disk) };
        assert!(matches!(client.open(&name("a"), &other), Err(Error::Held { .. })));
    }
    assert!(sure > 1000);
}

/// SIGTERM: what was sent is stored, the store is closed cleanly.
#[test]
fn it_ends_when_asked_to() {
    let mut service = Service::start("");
    let client = Client::connect(&service.unix()).unwrap();
    let unit = client.open(&name("a"), &options(Durability::Cache)).unwrap();
    for sii in 0..500 {
        unit.append(Batch::of(sii, [[1; 100]])).unwrap();
    }
    unit.wait(499, LONG).unwrap();
    service.signal(nix::sys::signal::Signal::SIGTERM);
    let status = service.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(service.path("store/clean").exists());
    assert!(matches!(unit.log(), Err(Error::Disconnected { .. })));
    service.child = Service::spawn(service.dir.path());
    service.wait_ready();
    let client = Client::connect(&service.unix()).unwrap();
    assert_eq!(client.view(&name("a")).unwrap().log().unwrap(), 0..500);
}

#[test]
fn systemd_is_told_and_health_and_metrics_are_served() {
    let socket_dir = tempfile::tempdir().unwrap();
    let path = socket_dir.path().join("notify");
    let notify = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    notify.set_read_timeout(Some(LONG)).unwrap();
    let mut service = Service::start("");
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    service.child = Command::new(env!("CARGO_BIN_EXE_ftstore"))
        .args(["serve", "--config"])
        .arg(service.path("ftstore.toml"))
        .env("NOTIFY_SOCKET", &path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut told = [0; 64];
    let n = notify.recv(&mut told).unwrap();
    assert_eq!(&told[..n], b"READY=1");
    let client = Client::connect(&service.unix()).unwrap();
    let unit = client.open(&name("a"), &options(Durability::Disk)).unwrap();
    unit.append(Batch::of(0, ["x"])).unwrap();
    unit.wait(0, LONG).unwrap();
    assert!(service.http("/health").starts_with("HTTP/1.1 200"));
    assert!(service.http("/other").starts_with("HTTP/1.1 404"));
    for (metric, value) in [("ftstore_units", 1), ("ftstore_appends_total", 1), ("ftstore_healthy", 1)] {
        assert_eq!(service.metric(metric), value, "{metric}");
    }
    service.signal(nix::sys::signal::Signal::SIGTERM);
    let n = notify.recv(&mut told).unwrap();
    assert_eq!(&told[..n], b"STOPPING=1");
}

/// Pages that the service does not take for a while hold up no records: their source waits in the middle of a checkpoint
/// until records that were appended behind it are acknowledged.
///
/// Break it: send pages on the connection of the records.
#[test]
fn a_checkpoint_under_way_does_not_hold_up_records() {
    struct Slow<'a>(&'a dyn ftrun_store::UnitStore);
    impl ftrun_store::Pages for Slow<'_> {
        fn each(&self, put: &mut dyn FnMut(u64, &ftrun_store::Page) -> Result<(), Error>) -> Result<(), Error> {
            for n in 0..4096u64 {
                let mut page = [0; 4096];
                page[..8].copy_from_slice(&(n + 1).to_le_bytes());
                put(n * 4096, &page)?;
                if n % 1024 == 1000 {
                    let at = self.0.log()?.end;
                    self.0.append(Batch::of(at, ["x"]))?;
                    self.0.wait(at, LONG)?;
                }
            }
            Ok(())
        }
    }
    let service = Service::start("");
    for location in [service.unix(), service.tcp("all")] {
        let client = Client::connect(&location).unwrap();
        let unit = client.open(&name("a"), &options(Durability::Disk)).unwrap();
        unit.truncate_from(0).unwrap();
        unit.append(Batch::of(unit.log().unwrap().end, ["before"])).unwrap();
        let new = ftrun_store::NewCheckpoint { sii: 1, parent: None, manifest: b"m", gone: &[], pages: &Slow(&*unit) };
        unit.put_checkpoint(&new).unwrap();
        assert_eq!(unit.checkpoints().unwrap()[0].pages, 4096);
        assert_eq!(service.metric("ftstore_connections"), 2);
        // A writer that was overtaken is refused on either connection.
        let later = client.open(&name("a"), &options(Durability::Disk)).unwrap();
        assert!(unit.put_checkpoint(&new).unwrap_err().is_fenced());
        assert_eq!(later.checkpoints().unwrap().len(), 1);
        later.release().unwrap();
        drop((unit, later, client));
        while service.metric("ftstore_connections") > 0 {
            std::thread::yield_now();
        }
    }
}

/// More checkpoints at a time than the service takes on one connection, and pages are read there meanwhile.
///
/// Break it: have checkpoints take the places of other requests, or let the client send as many as it likes.
#[test]
fn many_checkpoints_at_a_time_wait_for_each_other() {
    struct Together<'a>(&'a std::sync::Barrier, &'a dyn ftrun_store::UnitStore);
    impl ftrun_store::Pages for Together<'_> {
        fn each(&self, put: &mut dyn FnMut(u64, &ftrun_store::Page) -> Result<(), Error>) -> Result<(), Error> {
            self.0.wait();
            let mut found = 0;
            self.1.pages(1, 0..4096, &mut |_, _| {
                found += 1;
                Ok(())
            })?;
            assert_eq!(found, 1);
            put(0, &[7; 4096])
        }
    }
    struct One;
    impl ftrun_store::Pages for One {
        fn each(&self, put: &mut dyn FnMut(u64, &ftrun_store::Page) -> Result<(), Error>) -> Result<(), Error> {
            put(0, &[7; 4096])
        }
    }
    let service = Service::start("");
    let client = Client::connect(&service.unix()).unwrap();
    let together = std::sync::Barrier::new(PUTS_MAX);
    fn checkpoint(unit: &dyn ftrun_store::UnitStore, sii: u64, pages: &dyn ftrun_store::Pages) {
        let new = ftrun_store::NewCheckpoint { sii, parent: None, manifest: b"m", gone: &[], pages };
        unit.put_checkpoint(&new).unwrap();
    }
    std::thread::scope(|scope| {
        for n in 0..2 * PUTS_MAX {
            let unit = client.open(&name(&format!("unit-{n}")), &options(Durability::Disk)).unwrap();
            unit.append(Batch::of(0, ["x"; 3])).unwrap();
            checkpoint(&*unit, 1, &One);
            let together = &together;
            scope.spawn(move || checkpoint(&*unit, 2, &Together(together, &*unit)));
        }
    });
    assert!(client.units().unwrap().iter().all(|unit| unit.checkpoints == [1, 2]));
}

/// What has come with a batch that has to be synced is acknowledged, too, and so is all that comes later.
///
/// Break it: have whoever puts down the first acknowledgement leave the sending to somebody else.
#[test]
fn acknowledgements_of_all_levels_come_together() {
    let service = Service::start("");
    let mut stream = UnixStream::connect(service.path("socket")).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    bad_input::hello(&mut stream, VERSIONS);
    let open = |unit: &str, durability| Op::Open { unit: name(unit), options: options(durability) };
    let opens = [(1, open("memory", Durability::Memory)), (2, open("disk", Durability::Disk))];
    let (mut incoming, mut handles, mut acknowledged) = (Incoming::default(), [0; 2], [0; 2]);
    let mut greetings = 2;
    stream.write_all(&bad_input::asked(opens)).unwrap();
    let mut heard = |stream: &mut UnixStream| loop {
        if greetings == 2 && incoming.next::<Welcome>(FRAME_BYTES_MAX).unwrap().is_some() {
            greetings = 1;
        }
        if greetings == 1 && incoming.next::<Ready>(FRAME_BYTES_MAX).unwrap().is_some() {
            greetings = 0;
        }
        if greetings == 0
            && let Some((response, _)) = incoming.next::<Response>(FRAME_BYTES_MAX).unwrap()
        {
            return response;
        }
        let mut bytes = [0; 4096];
        let n = stream.read(&mut bytes).unwrap();
        assert!(n > 0, "it has hung up");
        incoming.push(&bytes[..n]);
    };
    for _ in 0..2 {
        match heard(&mut stream) {
            Response::Reply { id, result: Ok(Answer::Opened { handle, .. }) } => handles[id as usize - 1] = handle,
            other => panic!("{other:?}"),
        }
    }
    for first in 0..10 {
        let mut out = Vec::new();
        for handle in handles {
            let batch = Batch::of(first, ["x"]);
            let op = Op::Append { handle, first, count: 1 };
            encode(&mut out, &Request { id: 0, op }, batch.body());
        }
        stream.write_all(&out).unwrap();
        while acknowledged != [first + 1; 2] {
            match heard(&mut stream) {
                Response::Acknowledged(all) => {
                    for (handle, sii) in all {
                        acknowledged[handles.iter().position(|h| *h == handle).unwrap()] = sii;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

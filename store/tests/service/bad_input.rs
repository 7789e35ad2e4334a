//! What strangers and broken clients send.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ftrun_store::net::{Hello, MAGIC, Op, Request, VERSIONS, encode};
use ftrun_store::{Batch, Client, Durability, Error, StableStore};

use super::{LONG, Service, name, options};

/// xorshift64 (Marsaglia 2003).
pub(super) fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Bytes of memory that the service has.
pub(super) fn memory(service: &Service) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", service.child.id())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Somebody who goes on working meanwhile.
pub(super) struct Bystander {
    client: Client,
    next: u64,
}

impl Bystander {
    pub(super) fn new(service: &Service) -> Self {
        Self { client: Client::connect(&service.unix()).unwrap(), next: 0 }
    }

    pub(super) fn works(&mut self) {
        let unit = self.client.open(&name("bystander"), &options(Durability::Disk)).unwrap();
        unit.append(Batch::of(self.next, [[0; 50]])).unwrap();
        unit.wait(self.next, LONG).unwrap();
        self.next += 1;
    }
}

/// Reads until the service closes the connection; it must.
pub(super) fn closed(mut stream: impl Read) {
    let mut bytes = [0; 4096];
    // A reset is an end as well.
    while stream.read(&mut bytes).is_ok_and(|n| n > 0) {}
}

pub(super) fn tcp(service: &Service) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", service.port)).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

fn unix(service: &Service) -> UnixStream {
    let stream = UnixStream::connect(service.path("socket")).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

pub(super) fn hello(stream: &mut impl Write, versions: (u32, u32)) {
    let mut out = Vec::new();
    encode(&mut out, &Hello { magic: MAGIC, versions, client: "all".into(), nonce: [7; 32] }, &[]);
    stream.write_all(&out).unwrap();
}

#[test]
fn random_bytes_end_the_connection_and_nothing_else() {
    let service = Service::start("");
    let mut bystander = Bystander::new(&service);
    bystander.works();
    let mut seed = 42;
    let mut before = 0;
    for round in 0..600 {
        let mut bytes: Vec<u8> = (0..random(&mut seed) % 3000).map(|_| random(&mut seed) as u8).collect();
        if round % 3 == 0 && bytes.len() > 12 {
            // A frame that is in order, of a message that is not.
            let len = bytes.len() as u32 - 8;
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            let crc = crc32fast::hash(&bytes[8..]);
            bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        }
        let send = |stream: &mut dyn Write| {
            // It may have hung up in the middle.
            let _ = stream.write_all(&bytes);
        };
        match round % 4 {
            0 => send(&mut tcp(&service)),
            1 => send(&mut unix(&service)),
            2 => send(&mut TcpStream::connect(("127.0.0.1", service.http)).unwrap()),
            // Behind a greeting that is accepted.
            _ => {
                let mut stream = unix(&service);
                hello(&mut stream, VERSIONS);
                send(&mut stream);
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                closed(stream);
            }
        }
        if round == 100 {
            before = memory(&service);
        }
        if round % 100 == 0 {
            bystander.works();
        }
    }
    bystander.works();
    let after = memory(&service);
    assert!(after < before + (16 << 20), "{before} {after}");
}

/// Requests that are well formed and make no sense.
#[test]
fn requests_of_a_mad_client_are_errors() {
    let service = Service::start("");
    let mut bystander = Bystander::new(&service);
    let mut stream = unix(&service);
    hello(&mut stream, VERSIONS);
    let mut out = Vec::new();
    let everything = 0..u64::MAX;
    for handle in [0, 1, u32::MAX] {
        for op in [
            Op::Append { handle, first: u64::MAX, count: u32::MAX },
            Op::Log { handle },
            Op::Read { handle, from: u64::MAX, bytes_max: u64::MAX },
            Op::TruncateBelow { handle, sii: u64::MAX },
            Op::Collect { handle, recovery: u64::MAX, spare: u64::MAX },
            Op::Pages { handle, sii: 0, range: everything.clone() },
            Op::Put { handle, sii: 1, parent: Some(7), gone: vec![everything.clone()] },
            Op::PutPages,
            Op::PutEnd { whole: true },
            Op::Close { handle },
            Op::Open { unit: name("bystander"), options: options(Durability::Disk) },
        ] {
            encode(&mut out, &Request { id: u64::from(handle), op }, &[1; 4104]);
        }
    }
    stream.write_all(&out).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    closed(stream);
    bystander.works();
}

#[test]
fn truncated_and_oversized_frames_end_the_connection() {
    let service = Service::start("");
    let mut bystander = Bystander::new(&service);
    let mut frame = Vec::new();
    encode(&mut frame, &Request { id: 1, op: Op::Units }, &[0; 100]);
    for cut in 0..frame.len() {
        let mut stream = unix(&service);
        hello(&mut stream, VERSIONS);
        stream.write_all(&frame[..cut]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        closed(stream);
    }
    let before = memory(&service);
    for announced in [1 << 27, u32::MAX] {
        for greeted in [false, true] {
            let mut stream = unix(&service);
            if greeted {
                hello(&mut stream, VERSIONS);
            }
            stream.write_all(&announced.to_le_bytes()).unwrap();
            stream.write_all(&[0; 4]).unwrap();
            closed(stream);
        }
    }
    assert!(memory(&service) < before + (16 << 20));
    bystander.works();
}

#[test]
fn a_wrong_key_name_or_version_is_refused_with_a_reason() {
    let service = Service::start("");
    std::fs::write(service.path("wrong"), "f".repeat(40)).unwrap();
    std::fs::write(service.path("short"), "secret").unwrap();
    let at = format!("tcp:127.0.0.1:{}", service.port);
    let connect = |options: String| Client::connect(&format!("{at}{options}").parse().unwrap()).unwrap_err();
    let file = |file: &str| service.path(file).display().to_string();
    let wrong = connect(format!("?name=all&key={}", file("wrong")));
    let unknown = connect(format!("?name=nobody&key={}", file("key")));
    assert!(matches!(&wrong, Error::Refused { why, .. } if why.contains("[[client]]")), "{wrong}");
    assert_eq!(wrong, unknown, "which names there are is nobody's business");
    let e = connect(format!("?name=all&key={}", file("short")));
    assert!(e.to_string().contains("at least 32 bytes"), "{e}");
    let e = connect(String::new());
    assert!(e.to_string().contains("key=FILE"), "{e}");
    let e = Client::connect(&format!("tcp:192.0.2.1:1?name=a&key={}", file("key")).parse().unwrap()).unwrap_err();
    assert!(e.to_string().contains("ca=FILE"), "clear text off this machine: {e}");
    assert_eq!(service.metric("ftstore_connections_refused_total"), 2);
    for versions in [(0, 0), (9, 8)] {
        let mut stream = unix(&service);
        hello(&mut stream, versions);
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(!answer.is_empty(), "it is told why");
    }
    // A client that is newer, and knows ours, too, is welcome.
    let mut stream = unix(&service);
    hello(&mut stream, (9, 1));
    let mut out = Vec::new();
    encode(&mut out, &Request { id: 1, op: Op::Units }, &[]);
    stream.write_all(&out).unwrap();
    let mut answer = [0; 200];
    assert!(stream.read(&mut answer).unwrap() > 8);
}

/// Break it: leave out the deadlines.
#[test]
fn slow_clients_are_let_go() {
    let service = Service::start("[limits]\nhandshake-seconds = 1\n");
    let mut bystander = Bystander::new(&service);
    let began = Instant::now();
    let silent = tcp(&service);
    let mut slow = tcp(&service);
    let dripping = std::thread::spawn(move || {
        let mut out = Vec::new();
        encode(&mut out, &Hello { magic: MAGIC, versions: VERSIONS, client: "all".into(), nonce: [7; 32] }, &[]);
        // Until it is cut off.
        for byte in out.iter().cycle() {
            if slow.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let mut half = unix(&service);
    hello(&mut half, VERSIONS);
    half.write_all(&[100, 0, 0, 0]).unwrap();
    closed(silent);
    dripping.join().unwrap();
    bystander.works();
    closed(half);
    assert!(began.elapsed() > Duration::from_secs(1) && began.elapsed() < LONG);
}

/// How many connections we may hold at a time, 10,000 at most.
pub(super) fn connections_to_hold() -> usize {
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    let wanted = hard.min(12_000);
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, wanted.max(soft), hard).unwrap();
    usize::try_from(wanted.max(soft)).unwrap().saturating_sub(1000).min(10_000)
}

#[test]
fn ten_thousand_connections_do_not_disturb_the_others() {
    let service = Service::start("[limits]\nhandshake-seconds = 1\nconnections = 300\n");
    let held_max = connections_to_hold();
    let mut bystander = Bystander::new(&service);
    bystander.works();
    let before = memory(&service);
    let mut held = std::collections::VecDeque::new();
    for n in 0..10_000 {
        let stream = if n % 2 == 0 {
            TcpStream::connect(("127.0.0.1", service.port)).map(std::os::fd::OwnedFd::from)
        } else {
            UnixStream::connect(service.path("socket")).map(std::os::fd::OwnedFd::from)
        };
        // A full backlog is a refusal, too.
        held.extend(stream);
        if held.len() > held_max {
            held.pop_front();
        }
        if n % 1000 == 0 {
            bystander.works();
        }
    }
    bystander.works();
    assert!(service.metric("ftstore_connections") <= 301);
    assert!(service.metric("ftstore_connections_turned_away_total") > 1000);
    let after = memory(&service);
    assert!(after < before + (64 << 20), "{before} {after}");
    drop(held);
    let began = Instant::now();
    while service.metric("ftstore_connections") > 1 {
        assert!(began.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(20));
    }
    Client::connect(&service.tcp("all")).expect("there is room again");
}

/// A client that sends and never reads.
#[test]
fn a_client_that_does_not_read_is_held_back() {
    let service = Service::start("");
    let mut bystander = Bystander::new(&service);
    bystander.works();
    let writer = Client::connect(&service.unix()).unwrap();
    let unit = writer.open(&name("big"), &options(Durability::Cache)).unwrap();
    unit.append(Batch::of(0, [vec![5; 8 << 20]])).unwrap();
    unit.wait(0, LONG).unwrap();
    let before = memory(&service);
    let mut stream = unix(&service);
    hello(&mut stream, VERSIONS);
    let mut out = Vec::new();
    encode(&mut out, &Request { id: 1, op: Op::View { unit: name("big") } }, &[]);
    stream.write_all(&out).unwrap();
    stream.set_nonblocking(true).unwrap();
    out.clear();
    for id in 2..2000 {
        encode(&mut out, &Request { id, op: Op::Read { handle: 0, from: 0, bytes_max: 1 } }, &[]);
    }
    // What does not go in is not its business.
    let _ = stream.write(&out);
    for _ in 0..20 {
        bystander.works();
    }
    // As many replies as are worked on at a time, each with a batch, in two buffers.
    let after = memory(&service);
    assert!(after < before + 48 * (8 << 20), "{before} {after}");
    assert_eq!(unit.read(0, 1).unwrap()[0].count(), 1);
}

pub(super) fn asked(requests: impl IntoIterator<Item = (u64, Op)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (id, op) in requests {
        encode(&mut out, &Request { id, op }, &[]);
    }
    out
}

/// Many clients begin as many checkpoints as they may and send no pages. Break it: give no time to those that have begun one,
/// or few threads to all.
#[test]
fn checkpoints_that_do_not_come_are_given_up_and_hold_up_nobody() {
    let service = Service::start("[limits]\nhandshake-seconds = 1\nconnections = 300\n");
    let mut bystander = Bystander::new(&service);
    bystander.works();
    let held: Vec<UnixStream> = (0..100)
        .map(|n| {
            let mut stream = unix(&service);
            hello(&mut stream, VERSIONS);
            let open = Op::Open { unit: name(&format!("held-{n}")), options: options(Durability::Cache) };
            stream.write_all(&asked([(1, open)])).unwrap();
            stream
        })
        .collect();
    while bystander.client.units().unwrap().len() < 101 {}
    for mut stream in &held {
        let put = |id| (id, Op::Put { handle: 0, sii: id, parent: None, gone: Vec::new() });
        stream.write_all(&asked((2..10).map(put))).unwrap();
    }
    let began = Instant::now();
    for _ in 0..20 {
        bystander.works();
    }
    assert!(service.metric("ftstore_connections") > 100, "they are still there");
    held.into_iter().for_each(closed);
    assert!(began.elapsed() < LONG);
    bystander.works();
}

/// A client that asks for much and takes none of it is left; one that takes it slowly is not. Break it: wait for a whole reply
/// as long as for a part.
#[test]
fn a_client_that_takes_nothing_is_left() {
    let service = Service::start("[limits]\nhandshake-seconds = 1\n");
    let writer = Client::connect(&service.unix()).unwrap();
    let unit = writer.open(&name("big"), &options(Durability::Cache)).unwrap();
    unit.append(Batch::of(0, [vec![5; 8 << 20]])).unwrap();
    unit.wait(0, LONG).unwrap();
    let view = || {
        let mut stream = unix(&service);
        hello(&mut stream, VERSIONS);
        let read = |id| (id, Op::Read { handle: 0, from: 0, bytes_max: 1 });
        let out = asked([(1, Op::View { unit: name("big") })].into_iter().chain((2..4).map(read)));
        stream.write_all(&out).unwrap();
        stream
    };
    let (nothing, mut slow) = (view(), view());
    let left = service.metric("ftstore_connections_broken_total") + 1;
    let (began, mut taken, mut part) = (Instant::now(), 0, vec![0; 512 << 10]);
    // Longer than anybody who takes nothing is waited for.
    while service.metric("ftstore_connections_broken_total") < left || began.elapsed() < Duration::from_secs(9) {
        assert!(began.elapsed() < LONG);
        taken += slow.read(&mut part).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    }
    while taken < 16 << 20 {
        let n = slow.read(&mut part).unwrap();
        assert!(n > 0, "{taken}");
        taken += n;
    }
    assert_eq!(service.metric("ftstore_connections_broken_total"), left);
    closed(nothing);
}

/// The kernel asks whether the other side is still there. Break it: leave `keep_alive` out on either side.
#[test]
fn a_connection_to_a_machine_that_is_gone_does_not_last() {
    let service = Service::start("");
    let _client = Client::connect(&service.tcp("all")).unwrap();
    // Of proc_net_tcp(5): local and remote address, state (1 is established), queues, timer (2 is keepalive).
    let port = format!(":{:04X}", service.port);
    let asks = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = rows.filter(|row| row[3] == "01" && (row[1].ends_with(&port) || row[2].ends_with(&port)));
        ours.map(|row| row[5].starts_with("02:")).collect::<Vec<_>>()
    };
    let began = Instant::now();
    while asks() != [true, true] {
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", asks());
        std::thread::sleep(Duration::from_millis(10));
    }
}

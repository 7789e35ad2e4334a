//! What comes to the port with TLS, and to the port for health and metrics.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftrun_store::net::{Op, Request, VERSIONS, encode};
use ftrun_store::{Client, Error, Location, StableStore, Tcp};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::bad_input::{Bystander, closed, connections_to_hold, hello, memory, random, tcp};
use super::{LONG, Service, TLS, certificates};

/// A connection by TLS on which nothing has been said.
fn greeted(service: &Service) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(service.path("ca.pem")).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), tcp(service))
}

fn location(service: &Service, key: &str) -> Location {
    Location::Tcp(Tcp {
        address: format!("127.0.0.1:{}", service.port),
        name: "all".into(),
        key: Some(service.path(key)),
        ca: Some(service.path("ca.pem")),
        ..Tcp::default()
    })
}

/// Random bytes before and inside TLS, clear text, frames that are cut or too long, a wrong key, and the right one afterwards.
///
/// Break it: read a frame of any length, or have the proof not looked at.
#[test]
fn strangers_at_the_port_with_tls() {
    let service = Service::start_with(TLS, certificates);
    let mut bystander = Bystander::new(&service);
    let mut seed = 42;
    let mut before = 0;
    for round in 0..200 {
        let mut bytes: Vec<u8> = (0..random(&mut seed) % 3000).map(|_| random(&mut seed) as u8).collect();
        match round % 4 {
            0 => {
                let mut stream = tcp(&service);
                // A record of a handshake, as it seems.
                bytes.splice(..bytes.len().min(5), [22, 3, 1, 2, 0]);
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(Shutdown::Write);
                closed(stream);
            }
            1 => {
                // Whoever speaks without TLS is not understood.
                let mut stream = tcp(&service);
                hello(&mut stream, VERSIONS);
                let _ = stream.shutdown(Shutdown::Write);
                closed(stream);
            }
            2 => {
                let mut stream = greeted(&service);
                let _ = stream.write_all(&bytes);
                stream.conn.send_close_notify();
                let _ = stream.flush();
                closed(stream);
            }
            _ => {
                let mut stream = greeted(&service);
                hello(&mut stream, VERSIONS);
                // Neither has it proved who it is, nor is this a frame.
                encode(&mut bytes, &Request { id: 1, op: Op::Units }, &[]);
                bytes.splice(..0, [255, 255, 255, 255, 0, 0, 0, 0]);
                let _ = stream.write_all(&bytes[..8 + round % (bytes.len() - 8)]);
                stream.conn.send_close_notify();
                let _ = stream.flush();
                closed(stream);
            }
        }
        if round == 40 {
            before = memory(&service);
        }
        if round % 40 == 0 {
            bystander.works();
        }
    }
    std::fs::write(service.path("wrong"), "f".repeat(40)).unwrap();
    let e = Client::connect(&location(&service, "wrong")).unwrap_err();
    assert!(matches!(&e, Error::Refused { why, .. } if why.contains("[[client]]")), "{e}");
    bystander.works();
    assert!(Client::connect(&location(&service, "key")).unwrap().units().unwrap().len() == 1);
    let after = memory(&service);
    assert!(after < before + (16 << 20), "{before} {after}");
}

/// Handshakes that do not end, by the thousand. Break it: begin to count the time when the handshake is over.
#[test]
fn handshakes_that_do_not_end_are_let_go() {
    let service = Service::start_with(
        "[tls]\ncert = 'DIR/cert.pem'\nkey = 'DIR/cert-key.pem'\n[limits]\nhandshake-seconds = 1\nconnections = 300\n",
        certificates,
    );
    let held_max = connections_to_hold();
    let mut bystander = Bystander::new(&service);
    bystander.works();
    let before = memory(&service);
    let mut dripping = tcp(&service);
    let drip = std::thread::spawn(move || {
        // A record of 512 bytes, one at a time, until it is cut off.
        for byte in [22, 3, 1, 2, 0].into_iter().chain(std::iter::repeat(1)) {
            if dripping.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let mut held = VecDeque::new();
    for n in 0..10_000 {
        // A full backlog is a refusal, too.
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", service.port)) {
            let _ = stream.write_all(&[22, 3, 1, 2, 0, 1][..n % 7]);
            held.push_back(stream);
        }
        if held.len() > held_max {
            held.pop_front();
        }
        if n % 1000 == 0 {
            bystander.works();
        }
    }
    drip.join().unwrap();
    bystander.works();
    let after = memory(&service);
    assert!(after < before + (64 << 20), "{before} {after}");
    let began = Instant::now();
    while service.metric("ftstore_connections") > 1 {
        assert!(began.elapsed() < LONG, "they are held though their time is over");
        std::thread::sleep(Duration::from_millis(20));
    }
    Client::connect(&location(&service, "key")).expect("there is room again");
}

/// Whoever asks for the health is answered, whoever else says nothing, too much, or never the end.
///
/// Break it: have connections wait for a place instead of ending the oldest (`http::serve`).
#[test]
fn the_port_for_health_answers_whatever_others_do() {
    let service = Service::start("");
    let held_max = connections_to_hold();
    let mut bystander = Bystander::new(&service);
    let healthy = || {
        let began = Instant::now();
        assert!(service.http("/health").ends_with("ok\n"));
        // Far less than the five seconds that a request may take.
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    };
    healthy();
    let before = memory(&service);
    let connect = || TcpStream::connect(("127.0.0.1", service.http)).unwrap();
    for request in [
        &b"GET /health HTTP/1.1\r\n"[..],
        b"\r\n\r\n",
        b"POST /health HTTP/1.1\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"GET",
        &[b'x'; 100_000],
    ] {
        let mut stream = connect();
        let _ = stream.write_all(request);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        // A reset is an end as well.
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }
    let mut held = VecDeque::new();
    for n in 0..10_000 {
        let mut stream = connect();
        let _ = stream.write_all(&b"GET /health HTTP/1.1\r\n"[..n % 22]);
        held.push_back(stream);
        if held.len() > held_max {
            held.pop_front();
        }
        if n % 500 == 0 {
            healthy();
            bystander.works();
        }
    }
    healthy();
    let after = memory(&service);
    assert!(after < before + (32 << 20), "{before} {after}");
}

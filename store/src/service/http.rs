//! Health and metrics for those who watch: `/health`, and `/metrics` as Prometheus reads them.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::Service;

/// Connections at a time. One more ends the oldest: a request is answered at once, so that one has sent none.
const AT_A_TIME: usize = 64;
const REQUEST_BYTES_MAX: usize = 4096;
const TIME: Duration = Duration::from_secs(5);

pub(super) async fn serve(service: Arc<Service>, listener: TcpListener) {
    let mut ending = service.ending.clone();
    let mut open = VecDeque::<JoinHandle<()>>::new();
    loop {
        let accepted = tokio::select! {
            _ = ending.wait_for(|e| *e) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                open.retain(|task| !task.is_finished());
                if open.len() >= AT_A_TIME
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                let service = Arc::clone(&service);
                open.push_back(tokio::spawn(async move {
                    // Whoever is too slow, or has gone, gets nothing.
                    let _ = tokio::time::timeout(TIME, answer(&service, stream)).await;
                }));
            }
            Err(e) => super::cannot_accept(&e).await,
        }
    }
}

async fn answer(service: &Service, mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let mut part = [0; 512];
        let n = stream.read(&mut part).await?;
        if n == 0 || request.len() + n > REQUEST_BYTES_MAX {
            return Ok(());
        }
        request.extend_from_slice(&part[..n]);
    }
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let (status, body) = match line.split(|b| *b == b' ').collect::<Vec<_>>()[..] {
        [b"GET", b"/health", ..] => match service.engine.healthy() {
            Ok(()) => ("200 OK", "ok\n".to_owned()),
            Err(e) => ("503 Service Unavailable", format!("{e}\n")),
        },
        [b"GET", b"/metrics", ..] => ("200 OK", metrics(service)),
        [b"GET", ..] => ("404 Not Found", "there is /health and /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

fn metrics(service: &Service) -> String {
    let figures = &service.figures;
    let (bytes, live) = service.engine.space();
    let (commits, written) = service.engine.commits();
    let get = |figure: &std::sync::atomic::AtomicU64| figure.load(Ordering::Relaxed);
    let mut out = String::new();
    let units = service.engine.unit_count();
    for (name, kind, what, value) in [
        ("connections", "gauge", "Connections that are open", figures.connections.load(Ordering::Relaxed) as u64),
        ("connections_total", "counter", "Connections that were accepted", get(&figures.accepted)),
        (
            "connections_turned_away_total",
            "counter",
            "Connections for which there was no room",
            get(&figures.turned_away),
        ),
        ("connections_refused_total", "counter", "Clients that were not let in", get(&figures.refused)),
        ("connections_broken_total", "counter", "Connections ended for bad or late input", get(&figures.broken)),
        ("appends_total", "counter", "Batches that came in", get(&figures.appends)),
        ("append_bytes_total", "counter", "Bytes of records that came in", get(&figures.append_bytes)),
        ("commits_total", "counter", "Groups written to the log", commits),
        ("log_written_bytes_total", "counter", "Bytes written to the log", written),
        ("segment_bytes", "gauge", "Bytes of log and pack files", bytes),
        ("live_bytes", "gauge", "Bytes of them that are needed", live),
        ("units", "gauge", "Units that are stored", units as u64),
        ("healthy", "gauge", "1 while the store takes writes", u64::from(service.engine.healthy().is_ok())),
        (
            "damage_findings",
            "gauge",
            "Places found damaged when the store was opened",
            service.engine.damage().len() as u64,
        ),
    ] {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP ftstore_{name} {what}.\n# TYPE ftstore_{name} {kind}\nftstore_{name} {value}");
    }
    out
}

//! Line echo server on tokio's multi-threaded runtime, run as a unit by the tests.
//!
//! Each line `TEXT` is answered with `COUNT TOTAL TEXT`: how many lines this connection has sent, how
//! many the server has answered in all; `pid` is answered with the process id appended.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

async fn serve(mut stream: TcpStream, total: Arc<AtomicU64>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    let mut count = 0u64;
    while read.read_until(b'\n', &mut line).await? > 0 {
        count += 1;
        let total = total.fetch_add(1, Ordering::Relaxed) + 1;
        let mut reply = format!("{count} {total} ").into_bytes();
        if line == b"pid\n" {
            line = format!("pid {}\n", std::process::id()).into_bytes();
        }
        reply.append(&mut line);
        write.write_all(&reply).await?;
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let port: u16 = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(0);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", port)).await?;
        let mut out = std::io::stdout();
        writeln!(out, "ready {}", listener.local_addr()?.port())?;
        out.flush()?;
        let total = Arc::new(AtomicU64::new(0));
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(serve(stream, Arc::clone(&total)));
        }
    })
}

//! Loads a server for a while and prints, as JSON, how fast it answered: the benchmarks run this.
//!
//! usage: load memcached|echo PORT CONNECTIONS SECONDS SIZE

use std::time::Duration;

use ftrun_tests::generator::{EchoTalk, MemcachedTalk, run};
use ftrun_tests::load::quantile;
use ftrun_tests::{Error, error};

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [protocol, port, connections, seconds, size] = &args[..] else {
        return Err(error!("usage: load memcached|echo PORT CONNECTIONS SECONDS SIZE"));
    };
    let bad = |what: &str| error!("load: {what} is no number of the right kind");
    let port: u16 = port.parse().map_err(|_| bad(port))?;
    let connections: u64 = connections.parse().map_err(|_| bad(connections))?;
    let time = Duration::try_from_secs_f64(seconds.parse().map_err(|_| bad(seconds))?).map_err(|_| bad(seconds))?;
    let size: usize = size.parse().map_err(|_| bad(size))?;
    let measured = match protocol.as_str() {
        "memcached" => run(port, (0..connections).map(|n| MemcachedTalk::new(n, size)).collect(), time)?,
        "echo" => run(port, (0..connections).map(|n| EchoTalk::new(n, size)).collect(), time)?,
        other => return Err(error!("load: no protocol {other}")),
    };
    let latencies = &measured.latencies_us;
    let all = serde_json::json!({
        "requests": latencies.len(),
        "seconds": measured.seconds,
        "p50_us": quantile(latencies, 0.5),
        "p99_us": quantile(latencies, 0.99),
    });
    println!("{all}");
    Ok(())
}

//! `cargo xtask soak --program unit`: very many events go through one unit at durability `node`, whose store is a directory.
//! What it takes of disk and memory has to stay bounded, and in the end nothing may be missing.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::{LIMIT, Ready, Unit};
use ftrun_tests::{Error, error};

use crate::soak_store::disk_bytes;

/// Threads that ask, and connections of each: the requests of one are on their way together.
const ASKERS: usize = 2;
const CONNECTIONS: usize = 32;
/// What a request carries.
const PADDING: usize = 40;
/// Between two samples.
const SAMPLE: Duration = Duration::from_secs(1);
/// Between two lines for those who watch.
const TELL: Duration = Duration::from_secs(60);
/// The second half of the samples may have this much more than the first, as a whole number of tenths, ...
const GROWTH_TENTHS: u64 = 12;
/// ... and this much besides: two segments on disk, and what an allocator keeps.
const SLACK: [u64; 5] = [128 << 20, 16 << 20, 8 << 20, 8 << 20, 8 << 20];
const NAMES: [&str; 5] = ["disk", "/dev/shm", "keeper", "supervisor", "program"];

/// Bytes of disk, of shared memory, and of each process's own memory.
type Sample = [u64; 5];

/// What a process has of its own, bytes: what it shares is in `/dev/shm`, and counted there.
fn own_memory(pid: i64) -> Result<u64, Error> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| error!("/proc/{pid}/status has no RssAnon"))
}

fn sample(unit: &Unit, store: &Path) -> Result<(u64, Sample), Error> {
    let status = unit.status()?;
    let of = |key: &str| status[key].as_i64().ok_or_else(|| error!("no {key} in {status}"));
    let mut sample = [disk_bytes(store)?, disk_bytes(&unit.memory_dir()?)?, 0, 0, 0];
    for (at, key) in ["keeper_pid", "supervisor_pid", "pid"].into_iter().enumerate() {
        sample[2 + at] = own_memory(of(key)?)?;
    }
    Ok((status["events"].as_u64().unwrap_or(0), sample))
}

/// Asks on all its connections at once, again and again; each answer has to be the next of its connection.
fn ask(port: u16, over: &AtomicBool, answered: &AtomicU64) -> Result<(), Error> {
    let connect = |_| -> Result<_, Error> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(BufReader::new(stream))
    };
    let mut connections = (0..CONNECTIONS).map(connect).collect::<Result<Vec<_>, _>>()?;
    let mut line = String::new();
    for round in 1u64.. {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let text = format!("{round} {:.<PADDING$}", "");
        for connection in &mut connections {
            connection.get_mut().write_all(format!("{text}\n").as_bytes())?;
        }
        for connection in &mut connections {
            line.clear();
            connection.read_line(&mut line)?;
            let mut parts = line.trim_end().splitn(3, ' ');
            let (count, _total, rest) = (parts.next(), parts.next(), parts.next());
            if count.and_then(|c| c.parse().ok()) != Some(round) || rest != Some(&text) {
                return Err(error!("`{line}` is the answer to `{text}`"));
            }
        }
        answered.fetch_add(CONNECTIONS as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Runs until there have been so many events or so much time has passed; prints the figures.
pub(crate) fn run(events: u64, time: Duration) -> Result<(), Error> {
    let dir = ftrun_tests::binaries::target_dir()?.join(format!("soak-unit-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = soak(&dir, events, time);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn soak(store: &Path, events_most: u64, time: Duration) -> Result<(), Error> {
    let url = format!("file:{}", store.display());
    let mut launch = guest_launch("epoll_echo")?;
    launch.options(["--durability", "node", "--store", &url]).ready(Ready::Line);
    let unit = launch.start()?;
    let (over, answered, began) = (AtomicBool::new(false), AtomicU64::new(0), Instant::now());
    let mut samples = Vec::new();
    let mut events = 0;
    std::thread::scope(|scope| {
        let (over, answered, port) = (&over, &answered, unit.port);
        let askers: Vec<_> = (0..ASKERS).map(|_| scope.spawn(move || ask(port, over, answered))).collect();
        let watched = (|| {
            let mut told = Instant::now();
            while events < events_most && began.elapsed() < time && !askers.iter().any(|a| a.is_finished()) {
                std::thread::sleep(SAMPLE);
                let taken;
                (events, taken) = sample(&unit, store)?;
                samples.push(taken);
                if told.elapsed() >= TELL {
                    told = Instant::now();
                    eprintln!("{:.0} s: {events} events; {}", began.elapsed().as_secs_f64(), show(&taken));
                }
            }
            Ok::<(), Error>(())
        })();
        over.store(true, Ordering::Relaxed);
        for asker in askers {
            asker.join().map_err(|_| error!("a client panicked"))??;
        }
        watched
    })?;
    let (seconds, answered) = (began.elapsed().as_secs_f64(), answered.load(Ordering::Relaxed));
    let rate = events as f64 / seconds;
    println!(
        "{seconds:.0} s: {events} events ({rate:.0}/s), {answered} requests; 10^8 events take {:.0} min",
        1e8 / rate / 60.0
    );
    let halves = samples.split_at(samples.len() / 2);
    let [first, second] = [halves.0, halves.1].map(most);
    println!("at most in the first half:  {}\nat most in the second half: {}", show(&first), show(&second));
    lose_and_resume(&unit, &url, answered)?;
    for ((name, slack), (first, second)) in NAMES.into_iter().zip(SLACK).zip(first.into_iter().zip(second)) {
        if second > first * GROWTH_TENTHS / 10 + slack {
            return Err(error!("{name} grows: {first} bytes at most in the first half, {second} in the second"));
        }
    }
    Ok(())
}

fn most(samples: &[Sample]) -> Sample {
    let mut most = Sample::default();
    for sample in samples {
        most = std::array::from_fn(|n| most[n].max(sample[n]));
    }
    most
}

fn show(sample: &Sample) -> String {
    let each: Vec<_> = NAMES.iter().zip(sample).map(|(name, bytes)| format!("{name} {} MiB", bytes >> 20)).collect();
    each.join(", ")
}

/// The machine is lost, too: the unit goes on from its store, and has counted every request.
fn lose_and_resume(unit: &Unit, url: &str, answered: u64) -> Result<(), Error> {
    unit.kill9_all(0)?;
    unit.wipe_memory()?;
    let began = Instant::now();
    unit.resume_as(&[], &["--store", url])?;
    let mut connection = BufReader::new(TcpStream::connect(("127.0.0.1", unit.port))?);
    connection.get_mut().write_all(b"last\n")?;
    let mut line = String::new();
    connection.read_line(&mut line)?;
    println!("resumed from the store after {:.1} s", began.elapsed().as_secs_f64());
    let total = line.split(' ').nth(1).and_then(|t| t.parse::<u64>().ok());
    if total != Some(answered + 1) {
        return Err(error!(
            "{answered} requests were answered, and after the loss of the machine `{line}` is the next"
        ));
    }
    unit.stop().map(drop)
}

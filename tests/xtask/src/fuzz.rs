//! `cargo xtask fuzz`: the store's readers, on bytes that follow from seeds.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ftrun_store::engine::fuzz::TARGETS;
use ftrun_tests::{Error, error};

/// What is being tried, for whoever finds that it failed.
static TRYING: Mutex<Option<(&str, u64)>> = Mutex::new(None);

pub(crate) fn run(only: Option<&str>, seconds: u64, seed: Option<u64>) -> Result<(), Error> {
    let targets: Vec<_> = TARGETS.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)).collect();
    if targets.is_empty() {
        let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
        return Err(error!("no such target; there are {}", names.join(", ")));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let first = seed.unwrap_or(now << 20);
    let path = ftrun_tests::binaries::workspace().join("store/fuzz-seeds");
    let before = std::panic::take_hook();
    // A panic ends the process, so it is here that the seed is kept.
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        if let Ok(Some((name, seed))) = TRYING.lock().as_deref() {
            eprintln!("xtask: {name} {seed} (kept in {})", path.display());
            let kept = std::fs::OpenOptions::new().append(true).open(&path);
            if let Err(e) = kept.and_then(|mut file| writeln!(file, "{name} {seed}")) {
                eprintln!("xtask: {}: {e}", path.display());
            }
        }
    }));
    for (name, target) in targets.iter().copied() {
        let (began, mut runs) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(seconds) / u32::try_from(targets.len()).unwrap_or(1) {
            let seed = first.wrapping_add(runs);
            if let Ok(mut trying) = TRYING.lock() {
                *trying = Some((name, seed));
            }
            target(seed);
            runs += 1;
        }
        println!("{name}: {runs} seeds from {first} on, nothing found");
    }
    Ok(())
}

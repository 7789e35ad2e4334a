//! What a checkpoint that is being stored costs the appends of the same unit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ftrun_store::{Error as StoreError, NewCheckpoint, OpenOptions, Page, Pages, StableStore, UnitName};
use ftrun_tests::{Error, error};

use super::{Batch, Durability};
use crate::bench::stats::{Table, show};

/// So many different pages; a quarter of each does not compress.
struct Many {
    pages: u64,
}

impl Pages for Many {
    fn each(&self, put: &mut dyn FnMut(u64, &Page) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut page: Page = [0; 4096];
        let mut x = 1u64;
        for n in 1..=self.pages {
            for word in page[..1024].as_chunks_mut::<8>().0 {
                // Xorshift (Marsaglia 2003).
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                *word = x.to_le_bytes();
            }
            put(n * 4096, &page)?;
        }
        Ok(())
    }
}

/// Median, 99th percentile and longest, microseconds.
fn three(mut taken: Vec<Duration>) -> [Option<f64>; 3] {
    taken.sort_unstable();
    let at = |part: f64| taken.get((taken.len() as f64 * part) as usize).or(taken.last());
    [0.5, 0.99, 1.0].map(|part| at(part).map(|d| d.as_secs_f64() * 1e6))
}

/// Appends records of 200 bytes one at a time, for some time alone and then while a checkpoint is stored.
pub(super) fn measure(
    store: &dyn StableStore,
    backend: &str,
    mib: u64,
    alone: Duration,
    table: &mut Table,
) -> Result<(), Error> {
    let of = |e: StoreError| error!("{e}");
    let ttl = Duration::from_secs(60);
    let options = OpenOptions { holder: "bench".into(), ttl, durability: Durability::Disk };
    let unit = store.open(&UnitName::new("beside").map_err(of)?, &options).map_err(of)?;
    let mut at = 0;
    let mut append = |while_true: &dyn Fn() -> bool| {
        let mut taken = Vec::new();
        while while_true() {
            let began = Instant::now();
            unit.append(Batch::of(at, [[b'r'; 200]])).and_then(|()| unit.wait(at, ttl)).map_err(of)?;
            taken.push(began.elapsed());
            at += 1;
        }
        Ok::<_, Error>(taken)
    };
    let began = Instant::now();
    let before = append(&|| began.elapsed() < alone)?;
    let (stored, began) = (AtomicBool::new(false), Instant::now());
    let beside = std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| {
            let pages = Many { pages: mib << 8 };
            let new = NewCheckpoint { sii: 1, parent: None, manifest: b"m", gone: &[], pages: &pages };
            let result = unit.put_checkpoint(&new);
            stored.store(true, Ordering::Release);
            result
        });
        let beside = append(&|| !stored.load(Ordering::Acquire))?;
        checkpoint.join().map_err(|_| error!("the checkpoint panicked"))?.map_err(of)?;
        Ok::<_, Error>(beside)
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let (count, before, beside) = (beside.len(), three(before), three(beside));
    let mut line = vec![backend.to_owned(), show(Some(seconds), 1), count.to_string()];
    line.extend(before.into_iter().chain(beside).map(|figure| show(figure, 0)));
    table.line(line);
    Ok(())
}

/// The head of the table.
pub(super) fn table() -> Table {
    let heads = ["backend", "checkpoint s", "appends", "alone p50 µs", "p99", "most", "beside p50 µs", "p99", "most"];
    Table::new(1, heads)
}

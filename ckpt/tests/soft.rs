//! The logic of the soft-dirty backend on invented pagemap words, as not every kernel has the bit.

use ftrun_ckpt::dirty::{PageWords, Scan, scan_words};
use ftrun_ckpt::pages::{PageStore, ZERO_PAGE};
use ftrun_ckpt::runs::PageRun;
use ftrun_ckpt::state::{Mapping, PAGE_BYTES};
use std::cell::Cell;
use std::io;

const ANON: u64 = 0x1000_0000;
const FILE: u64 = 0x2000_0000;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
const GUARD: u64 = 1 << 58;
const DIRTY: u64 = 1 << 55;

struct Words {
    anon: Vec<u64>,
    file: Vec<u64>,
    cleared: Cell<u32>,
}

impl PageWords for Words {
    fn words(&self, start: u64, end: u64, each: &mut dyn FnMut(u64, &[u64])) -> io::Result<()> {
        let all = if start == ANON { &self.anon } else { &self.file };
        assert_eq!(end - start, all.len() as u64 * PAGE_BYTES);
        // In pieces, as the kernel's file is read.
        for (i, piece) in all.chunks(3).enumerate() {
            each(start + i as u64 * 3 * PAGE_BYTES, piece);
        }
        Ok(())
    }

    fn clear(&self) -> io::Result<()> {
        self.cleared.set(self.cleared.get() + 1);
        Ok(())
    }
}

fn map(start: u64, pages: usize, inode: u64) -> Mapping {
    Mapping {
        start,
        end: start + pages as u64 * PAGE_BYTES,
        prot: 1,
        shared: false,
        grows_down: false,
        offset: 0,
        dev: 0,
        inode,
        path: String::new(),
    }
}

fn run(base: u64, page: u64, pages: u64) -> PageRun {
    PageRun { start: base + page * PAGE_BYTES, pages }
}

#[test]
fn words_are_understood() {
    let words = Words {
        anon: vec![
            PRESENT | DIRTY,
            PRESENT,
            SWAPPED | DIRTY,
            DIRTY, // not there; the bit means nothing
            0,
            PRESENT | DIRTY,
            PRESENT | DIRTY,
            SWAPPED | GUARD | DIRTY,
        ],
        file: vec![
            PRESENT | OF_FILE | DIRTY, // read from the file
            PRESENT | DIRTY,           // written
            PRESENT | OF_FILE,         // was written, now the file's again
            SWAPPED,                   // swapped, or dropped: only its contents tell
            SWAPPED,                   // the same, never stored
        ],
        cleared: Cell::new(0),
    };
    let maps = [map(ANON, 8, 0), map(FILE, 5, 9)];
    let mut store = PageStore::new();
    let scan = scan_words(&words, 0, true, &maps, &store).expect("scan");
    let want = Scan { dirty: vec![run(ANON, 0, 3), run(ANON, 5, 2), run(FILE, 1, 1), run(FILE, 3, 2)], gone: vec![] };
    assert_eq!(scan, want);

    for stored in [run(ANON, 0, 8), run(FILE, 1, 3), run(0x5000_0000, 0, 2)] {
        for addr in stored.addrs() {
            store.put(addr, &ZERO_PAGE).expect("put");
        }
    }
    let scan = scan_words(&words, 0, false, &maps, &store).expect("scan");
    let want = Scan {
        dirty: vec![run(ANON, 0, 1), run(ANON, 2, 1), run(ANON, 5, 2), run(FILE, 1, 1), run(FILE, 3, 1)],
        gone: vec![run(ANON, 3, 2), run(ANON, 7, 1), run(FILE, 2, 1), run(0x5000_0000, 0, 2)],
    };
    assert_eq!(scan, want);
    assert_eq!(words.cleared.get(), 2);
}

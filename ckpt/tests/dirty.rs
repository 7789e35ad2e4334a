//! Dirty tracking against a real child that does random things to its memory: after every scan and
//! commit the store must equal the child's memory.

mod child;

use child::{Child, FILE_PAGES, Rng};
use ftrun_ckpt::copy::{copy_in, copy_out};
use ftrun_ckpt::dirty::{DirtyTracker, Full, Kind, Scan, WpAsync, self_test};
use ftrun_ckpt::maps::read_maps;
use ftrun_ckpt::pages::{Page, PageStore, ZERO_PAGE};
use ftrun_ckpt::runs::{self, PageRun};
use ftrun_ckpt::state::PAGE_BYTES;
use std::fs::File;
use std::os::unix::fs::FileExt;

const SMALL: u64 = 0x2000_0000_0000;
const SMALL_PAGES: u64 = 48;
/// Room for huge pages.
const LARGE: u64 = 0x2100_0000_0000;
const LARGE_PAGES: u64 = 2048;

const RW: u64 = 3;
const FIXED: u64 = libc::MAP_FIXED as u64;
const PRIVATE: u64 = libc::MAP_PRIVATE as u64;
const SHARED: u64 = libc::MAP_SHARED as u64;
const ANON: u64 = libc::MAP_ANONYMOUS as u64;
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;
const NO_FD: u64 = u64::MAX;

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("before the failure:\n{}", self.tail());
        }
    }
}

struct Run {
    child: Child,
    rng: Rng,
    tracker: Box<dyn DirtyTracker>,
    store: PageStore,
    log: Vec<String>,
}

impl Run {
    fn new(kind: Kind, seed: u64) -> Self {
        let child = Child::spawn();
        let tracker: Box<dyn DirtyTracker> = match kind {
            Kind::WpAsync => Box::new(WpAsync::new(child.uffd()).expect("wp-async")),
            _ => Box::new(Full::new()),
        };
        Self { child, rng: Rng::new(seed), tracker, store: PageStore::new(), log: Vec::new() }
    }

    fn range(&mut self) -> (u64, u64) {
        let (base, all) = match self.rng.below(4) {
            0 => (LARGE, LARGE_PAGES),
            _ => (SMALL, SMALL_PAGES),
        };
        let mut at = self.rng.below(all);
        let mut len = 1 + self.rng.below((all - at).min(all / 4));
        if base == LARGE && self.rng.below(2) == 0 {
            at = at / 512 * 512;
            len = 512 * (1 + self.rng.below(2)).min((all - at) / 512);
        }
        (base + at * PAGE_BYTES, len * PAGE_BYTES)
    }

    fn call(&mut self, name: &str, nr: i64, args: [u64; 6]) -> i64 {
        let got = self.child.call(nr, args);
        self.log.push(format!("{name} {args:x?} = {got}"));
        got
    }

    fn file_in(&self, start: u64, end: u64) -> bool {
        let maps = read_maps(self.child.pid).expect("maps");
        maps.iter().any(|m| m.inode != 0 && m.start < end && m.end > start)
    }

    /// Stores into writable mappings from user mode.
    fn touch(&mut self, start: u64, end: u64) {
        let maps = read_maps(self.child.pid).expect("maps");
        let value = self.rng.below(4) as u8;
        let step = [1, 1, 3, 7][self.rng.below(4) as usize];
        for m in &maps {
            let (from, to) = (m.start.max(start), m.end.min(end));
            if m.prot & 3 != 3 || from >= to {
                continue;
            }
            for addr in (from..to).step_by(step * PAGE_BYTES as usize) {
                if self.child.word(addr) >> 58 & 1 == 0 {
                    self.child.poke(addr + self.rng.below(PAGE_BYTES), value);
                }
            }
        }
        self.log.push(format!("touch {start:x}-{end:x} step {step} = {value}"));
    }

    fn step(&mut self) {
        let (at, len) = self.range();
        let (file, memfd) = (self.child.file_fd, self.child.mem_fd);
        let offset = self.rng.below(FILE_PAGES / 2) * PAGE_BYTES;
        let short = len.min(FILE_PAGES / 2 * PAGE_BYTES);
        let prot = [0, 1, RW, RW][self.rng.below(4) as usize];
        match self.rng.below(28) {
            0 | 1 => {
                self.call("mmap anon", libc::SYS_mmap, [at, len, RW, PRIVATE | ANON | FIXED, NO_FD, 0]);
                if at >= LARGE {
                    self.call("hugepage", libc::SYS_madvise, [at, len, libc::MADV_HUGEPAGE as u64, 0, 0, 0]);
                }
            }
            2 => {
                self.call("mmap file", libc::SYS_mmap, [at, short, prot, PRIVATE | FIXED, file, offset]);
            }
            3 => {
                self.call("mmap shared anon", libc::SYS_mmap, [at, short, RW, SHARED | ANON | FIXED, NO_FD, 0]);
            }
            4 => {
                self.call("mmap memfd", libc::SYS_mmap, [at, short, RW, SHARED | FIXED, memfd, offset]);
            }
            5 => {
                self.call("munmap", libc::SYS_munmap, [at, len, 0, 0, 0, 0]);
            }
            6 | 7 => {
                self.call("mprotect", libc::SYS_mprotect, [at, len, prot, 0, 0, 0]);
            }
            8 | 9 => {
                let mut advice = [
                    libc::MADV_DONTNEED,
                    libc::MADV_DONTNEED,
                    libc::MADV_REMOVE,
                    libc::MADV_PAGEOUT,
                    libc::MADV_COLLAPSE,
                    GUARD_INSTALL,
                    GUARD_REMOVE,
                ][self.rng.below(7) as usize];
                // Linux 6.18 never returns from a guard install over protected private file pages:
                // dropping the page leaves a marker, and the install waits for no page.
                if advice == GUARD_INSTALL && self.file_in(at, at + len) {
                    advice = libc::MADV_DONTNEED;
                }
                self.call("madvise", libc::SYS_madvise, [at, len, advice as u64, 0, 0, 0]);
            }
            10 | 11 => {
                let (to, _) = self.range();
                let flags = [3, 3, 7][self.rng.below(3) as usize];
                // A file mapping that outgrows its file would end the child with SIGBUS.
                let new = if flags == 7 || self.file_in(at, at + PAGE_BYTES) || self.rng.below(2) == 0 {
                    len
                } else {
                    PAGE_BYTES * 3
                };
                self.call("mremap", libc::SYS_mremap, [at, len, new, flags, to, 0]);
            }
            12 if !self.file_in(at, at + PAGE_BYTES) => {
                self.call("mremap grow", libc::SYS_mremap, [at, PAGE_BYTES, 3 * PAGE_BYTES, 0, 0, 0]);
            }
            13 | 14 => {
                let brk = self.call("brk?", libc::SYS_brk, [0; 6]) as u64;
                let new = if self.rng.below(3) == 0 {
                    brk - self.rng.below(6) * PAGE_BYTES
                } else {
                    brk + self.rng.below(12) * PAGE_BYTES
                };
                let new = new.max(self.child.brk0);
                self.call("brk", libc::SYS_brk, [new, 0, 0, 0, 0, 0]);
                let from = self.child.brk0 + self.rng.below(20) * PAGE_BYTES;
                self.touch(from, new);
            }
            15 => {
                self.child.fork();
                self.log.push("fork".into());
            }
            16 => {
                // The kernel writes into the memory.
                self.call("pread", libc::SYS_pread64, [file, at + 100, short, offset, 0, 0]);
            }
            17 => {
                // Shared memory changes without the mapping.
                self.call("pwrite", libc::SYS_pwrite64, [memfd, self.child.brk0, PAGE_BYTES, offset, 0, 0]);
            }
            18 => {
                // The supervisor writes, also where the program may not.
                let done = self.child.mem.write_at(&[9; 5000], at + 10);
                self.log.push(format!("supervisor writes {at:x}: {done:?}"));
            }
            19 => {
                // Reads make pages appear.
                let mut buf = vec![0; len as usize];
                let done = self.child.mem.read_at(&mut buf, at);
                self.log.push(format!("reads {at:x}+{len:x}: {done:?}"));
            }
            20 => self.child.grow_stack(),
            _ => self.touch(at, at + len),
        }
    }

    fn checkpoint(&mut self) -> Scan {
        self.child.stop();
        let pid = self.child.pid;
        let maps = read_maps(pid).expect("maps");
        let scan = self.tracker.scan(pid, &maps, &self.store).expect("scan");
        for list in [&scan.dirty, &scan.gone] {
            assert!(list.windows(2).all(|w| w[0].end() < w[1].start), "{list:x?}");
        }
        self.store.drop_runs(&scan.gone);
        let staged = copy_in(pid, &scan.dirty, Some(&self.child.mem)).expect("copy");
        assert_eq!((staged.len() + staged.unreadable().len()) as u64, runs::total(&scan.dirty));
        self.store.commit(&staged).expect("commit");
        scan
    }

    fn tail(&self) -> String {
        self.log[self.log.len().saturating_sub(60)..].join("\n")
    }

    fn fail(&self, what: &str, addr: u64) -> ! {
        panic!("{what} at {addr:#x}");
    }

    fn verify(&mut self) {
        let maps = read_maps(self.child.pid).expect("maps");
        let all_shared = self.rng.below(3) == 0;
        let mut covered: Vec<PageRun> = Vec::new();
        for m in &maps {
            if m.path.starts_with("[vvar") {
                continue;
            }
            // Shared memory that was writable once is kept, not found anew.
            let kept = m.shared && m.prot & 2 == 0 && !m.path.starts_with("/dev/zero");
            runs::push(&mut covered, m.start, m.end);
            for addr in (m.start..m.end).step_by(PAGE_BYTES as usize) {
                let word = self.child.word(addr);
                let (there, file) = (word >> 62 != 0, word >> 61 & 1 == 1);
                let mine = self.store.get(addr);
                if !there && !m.shared {
                    if m.inode != 0 && mine.is_some() || mine.is_some_and(|p| *p != ZERO_PAGE) {
                        self.fail("the store has a page that is not there", addr);
                    }
                    continue;
                }
                if kept && mine.is_none() {
                    continue;
                }
                if m.shared && !there && !all_shared {
                    continue;
                }
                let mut page: Page = ZERO_PAGE;
                if self.child.mem.read_exact_at(&mut page, addr).is_err() {
                    if mine.is_some() {
                        self.fail("the store has an unreadable page", addr);
                    }
                    continue;
                }
                let absent = if m.shared || m.inode == 0 {
                    ZERO_PAGE
                } else if m.path == self.child.path {
                    child::file_page((m.offset + addr - m.start) / PAGE_BYTES)
                } else if file {
                    page
                } else {
                    ZERO_PAGE
                };
                if *mine.unwrap_or(&absent) != page {
                    let has = if mine.is_some() { "differs" } else { "is missing" };
                    self.fail(&format!("a page {has}; word {word:x}, {m:x?}"), addr);
                }
            }
        }
        for (addr, _) in self.store.iter() {
            if !covered.iter().any(|r| (r.start..r.end()).contains(&addr)) {
                self.fail("the store has a page of no mapping", addr);
            }
        }
    }
}

fn random(kind: Kind, seeds: std::ops::Range<u64>) {
    if let Err(why) = self_test(kind) {
        eprintln!("skipped: {kind} does not work here: {why}");
        return;
    }
    for seed in seeds {
        let mut run = Run::new(kind, seed);
        for round in 0..30 {
            for _ in 0..=run.rng.below(12) {
                run.step();
            }
            if run.rng.below(8) == 0 {
                run.tracker.forget();
            }
            let scan = run.checkpoint();
            run.log.push(format!("-- seed {seed} round {round}: {scan:x?}"));
            run.verify();
            if run.rng.below(4) == 0 {
                // Twice: the first copy may bring file pages back in.
                run.checkpoint();
                let scan = run.checkpoint();
                if !scan.dirty.is_empty() || !scan.gone.is_empty() {
                    let guard = |r: &PageRun| run.child.word(r.start) >> 58 & 1 == 1;
                    if !scan.dirty.iter().all(guard) {
                        run.fail(&format!("reported without a write: {scan:x?}"), 0);
                    }
                }
            }
        }
    }
}

fn seeds(count: u64) -> std::ops::Range<u64> {
    let from = std::env::var("FTRUN_SEED").ok().and_then(|s| s.parse().ok());
    let count = std::env::var("FTRUN_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(count);
    let from = from.unwrap_or(1);
    from..from + count
}

#[test]
fn wp_async_equals_the_childs_memory() {
    random(Kind::WpAsync, seeds(8));
}

#[test]
fn full_equals_the_childs_memory() {
    random(Kind::Full, seeds(4));
}

#[test]
fn wp_async_reports_only_what_was_written() {
    if self_test(Kind::WpAsync).is_err() {
        return;
    }
    let mut run = Run::new(Kind::WpAsync, 0);
    let pages = 20_000;
    run.call("mmap", libc::SYS_mmap, [LARGE, pages * PAGE_BYTES, RW, PRIVATE | ANON | FIXED, NO_FD, 0]);
    for i in (0..pages).step_by(2) {
        run.child.poke(LARGE + i * PAGE_BYTES, 1);
    }
    let first = run.checkpoint();
    let here = |scan: &Scan| -> Vec<u64> {
        let runs = scan.dirty.iter().flat_map(PageRun::addrs);
        runs.filter(|a| (LARGE..LARGE + pages * PAGE_BYTES).contains(a)).collect()
    };
    assert_eq!(here(&first).len() as u64, pages / 2, "more runs than one call returns");
    run.child.poke(LARGE + 4 * PAGE_BYTES, 2);
    run.child.poke(LARGE + 5 * PAGE_BYTES, 2);
    let second = run.checkpoint();
    assert_eq!(here(&second), [LARGE + 4 * PAGE_BYTES, LARGE + 5 * PAGE_BYTES]);
    run.call("dontneed", libc::SYS_madvise, [LARGE, 2 * PAGE_BYTES, 4, 0, 0, 0]);
    let third = run.checkpoint();
    assert_eq!(third.gone, [PageRun { start: LARGE, pages: 1 }]);
    assert!(here(&third).is_empty());
}

#[test]
fn a_dropped_page_of_a_file_is_the_files_again() {
    for kind in [Kind::WpAsync, Kind::Full] {
        if self_test(kind).is_err() {
            continue;
        }
        let mut run = Run::new(kind, 0);
        let (file, len) = (run.child.file_fd, 8 * PAGE_BYTES);
        run.call("mmap", libc::SYS_mmap, [SMALL, len, RW, PRIVATE | FIXED, file, 0]);
        (0..4).for_each(|i| run.child.poke(SMALL + i * PAGE_BYTES, 1));
        let own = |run: &Run| run.store.iter_range(SMALL, SMALL + len).count();
        run.checkpoint();
        assert_eq!(own(&run), 4, "{kind}");
        run.call("dontneed", libc::SYS_madvise, [SMALL, 2 * PAGE_BYTES, 4, 0, 0, 0]);
        // The first of the two is looked at again, which brings the file's page in.
        let mut byte = [0];
        run.child.mem.read_exact_at(&mut byte, SMALL).expect("read");
        run.checkpoint();
        run.verify();
        assert_eq!(run.store.get(SMALL), None, "{kind}");
        let dropped = run.store.get(SMALL + PAGE_BYTES);
        assert!(dropped.is_none_or(|p| *p == child::file_page(1)), "{kind}");
        run.checkpoint();
        assert_eq!(own(&run), 2, "{kind}");
    }
}

#[test]
fn pages_are_copied_out_and_in() {
    let mut child = Child::spawn();
    let len = 3000 * PAGE_BYTES;
    child.call(libc::SYS_mmap, [LARGE, len, RW, PRIVATE | ANON | FIXED, NO_FD, 0]);
    let mut store = PageStore::new();
    for i in (0..3000).filter(|i| i % 7 != 0) {
        let mut page = ZERO_PAGE;
        page[5] = (i % 5) as u8;
        store.put(LARGE + i * PAGE_BYTES, &page).expect("put");
    }
    // Some of it cannot be written or read by the call that ignores nothing.
    child.call(libc::SYS_mprotect, [LARGE + 100 * PAGE_BYTES, 50 * PAGE_BYTES, 0, 0, 0, 0]);
    child.call(libc::SYS_mprotect, [LARGE + 2000 * PAGE_BYTES, 3 * PAGE_BYTES, 1, 0, 0, 0]);
    let mem = child.mem.try_clone().expect("mem");
    let all = LARGE..LARGE + len;
    let denied = copy_out(child.pid, &store, all.clone(), true, None).expect_err("protected");
    assert!(denied.to_string().contains("0x"), "{denied}");
    copy_out(child.pid, &store, all.clone(), true, Some(&mem)).expect("copy out");
    let runs = [PageRun::span(LARGE, LARGE + len)];
    let staged = copy_in(child.pid, &runs, Some(&mem)).expect("copy in");
    assert_eq!(staged.len(), 3000);
    for (addr, page) in staged.iter() {
        assert_eq!(page, store.get(addr).unwrap_or(&ZERO_PAGE), "{addr:#x}");
    }
    let staged = copy_in(child.pid, &runs, None).expect("copy in");
    assert_eq!((staged.len(), staged.unreadable().len()), (2950, 50));
    assert_eq!(staged.unreadable()[0], LARGE + 100 * PAGE_BYTES);
    let beyond = [PageRun::span(LARGE + len - PAGE_BYTES, LARGE + len + 2 * PAGE_BYTES)];
    let staged = copy_in(child.pid, &beyond, Some(&mem)).expect("copy in");
    assert_eq!((staged.len(), staged.unreadable().len()), (1, 2));
    let pid = child.pid;
    drop(child);
    assert!(copy_in(pid, &runs, None::<&File>).is_err(), "the target is gone");
}

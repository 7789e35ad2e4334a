//! A shadow of a unit: a checkpoint and the events after it are replayed off line, in a process of its own,
//! and the state that comes out is compared with the next checkpoint.
//!
//! Replay makes no input and no output call, so the shadow touches nothing of the unit's world. The two
//! exceptions are taken care of: files mapped shared are mapped private, and process ids are virtual.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use ftrun_abi::record::Record;
use ftrun_ckpt::dirty::Kind;
use ftrun_ckpt::files::page_of;
use ftrun_ckpt::pages::{PageStore, ZERO_PAGE};
use ftrun_ckpt::state::{Mapping, PAGE_BYTES, Snapshot, ThreadState};

use crate::evlog::EventLog;
use crate::service::Service;
use crate::unit::{Halt, Model, PREEMPTED, Shared, Unit};

/// Shortest time after which a shadow that comes to no call is given up.
const STALL: Duration = Duration::from_secs(60);

/// A checkpoint.
pub type State = (Snapshot, PageStore);

/// What came of replaying an interval.
#[derive(Debug, PartialEq, Eq)]
pub enum Finding {
    /// Replayed; registers and memory are those of the next checkpoint.
    Equal,
    /// Replayed; there is no later checkpoint to compare with.
    Replayed,
    /// Replayed; the checkpoint was taken because of something that replay cannot make, so states are not
    /// compared.
    NotComparable(String),
    /// The first difference.
    Different(String),
}

/// Replays `records`, which follow the checkpoint `from`, and compares the outcome with `to`.
///
/// The calling thread becomes a tracer; `service` must have been started by it.
///
/// # Errors
/// The shadow could not be made or run; that says nothing about the unit.
pub fn replay(
    service: &Service,
    from: State,
    mut records: Vec<(u64, Box<[u8]>)>,
    to: Option<&State>,
) -> Result<Finding, String> {
    let (mut snapshot, pages) = from;
    let cause = match to {
        None => None,
        Some((to, _)) => model(to)?.irregular,
    };
    for m in &mut snapshot.maps {
        m.shared &= !has_file(m);
    }
    if cause.as_ref().is_some_and(|c| c != PREEMPTED) {
        // The last event led to the checkpoint, which holds its effect.
        records.pop();
    }
    let log = service.run(|| log_of(&records)).map_err(|e| format!("memory for the events: {e}"))?;
    let mut unit = Unit::new(service.clone(), log, Arc::new(Shared::default()), Arc::new(Mutex::default()), Kind::Full);
    unit.off_line = true;
    unit.vpid = snapshot.threads.first().map_or(0, |t| t.tid);
    if unit.vpid == 0 {
        // The first image of an unprivileged unit was stored before its process had an id.
        unit.vpid = records.first().and_then(|(_, b)| Record::parse(b).ok()).map_or(0, |r| r.0.header.tid as i32);
    }
    unit.pages = Arc::new(RwLock::new(pages));
    unit.snapshot = Some(Arc::new(snapshot));
    unit.arrive_last = to.is_some() && cause.is_none();
    // What took the unit so long may take the shadow some times longer.
    let taken = to.zip(unit.snapshot.as_deref()).map(|((to, _), from)| to.at_ns.saturating_sub(from.at_ns));
    let limit = STALL + taken.map_or(STALL, |ns| 4 * Duration::from_nanos(ns));
    let watch = Arc::new(Watch { shared: Arc::clone(&unit.shared), limit, ..Watch::default() });
    service.run({
        let watch = Arc::clone(&watch);
        || std::thread::spawn(move || watch.keep())
    });
    let result = run(&mut unit);
    watch.over.store(true, Relaxed);
    let finding = match result {
        Ok(()) if cause.is_some() => Ok(Finding::NotComparable(cause.unwrap_or_default())),
        Ok(()) => match to {
            None => Ok(Finding::Replayed),
            Some(to) => compare(&unit, to).map(|d| d.map_or(Finding::Equal, Finding::Different)),
        },
        Err(Halt::Ended(_)) => Ok(Finding::Replayed),
        Err(Halt::Diverged(d)) => Ok(Finding::Different(d.to_string())),
        Err(Halt::Died) if watch.gave_up.load(Relaxed) => {
            let seconds = limit.as_secs();
            Ok(Finding::Different(format!(
                "the replayed program came to no call for {seconds} s at event {}",
                unit.sii
            )))
        }
        Err(Halt::Died) => {
            Ok(Finding::Different(format!("the replayed process died at event {}; the unit did not", unit.sii)))
        }
        Err(h) => Err(h.to_string()),
    };
    unit.bury();
    // It owns a descriptor of the service thread's table.
    let log = unit.log;
    service.run(move || drop(log));
    finding
}

/// A log in memory that holds these records.
fn log_of(records: &[(u64, Box<[u8]>)]) -> std::io::Result<EventLog> {
    let bytes: usize = records.iter().map(|r| r.1.len() + 16).sum();
    // Half of a ring is what one record may take.
    let largest = records.iter().map(|r| r.1.len()).max().unwrap_or(0);
    let mut log = EventLog::new((bytes + 2 * largest + 4096) as u64)?;
    for (_, record) in records {
        log.append(record).map_err(|_full| std::io::Error::other("the events do not fit"))?;
    }
    Ok(log)
}

/// Ends a shadow that computes for ever, so that its tracer does not wait for ever.
#[derive(Default)]
struct Watch {
    shared: Arc<Shared>,
    limit: Duration,
    over: AtomicBool,
    gave_up: AtomicBool,
}

impl Watch {
    fn keep(&self) {
        let mut seen = (self.shared.events.load(Relaxed), Instant::now());
        while !self.over.load(Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
            let (events, pid) = (self.shared.events.load(Relaxed), self.shared.pid.load(Relaxed));
            if events != seen.0 {
                seen = (events, Instant::now());
            } else if seen.1.elapsed() > self.limit && pid > 0 && !self.over.load(Relaxed) {
                self.gave_up.store(true, Relaxed);
                // SAFETY: a child that its tracer has not buried: it does that after `over`.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                return;
            }
        }
    }
}

fn run(unit: &mut Unit) -> Result<(), Halt> {
    unit.restore()?;
    unit.replay()?;
    if unit.arrive_last { unit.checkpoint() } else { Ok(()) }
}

fn model(snapshot: &Snapshot) -> Result<Model, String> {
    postcard::from_bytes(&snapshot.model).map_err(|e| format!("the checkpoint's model cannot be read: {e}"))
}

/// The first difference between the state that replay came to and the checkpoint `to`.
fn compare(unit: &Unit, to: &State) -> Result<Option<String>, String> {
    let Some(found) = unit.snapshot.as_deref() else { return Err("the shadow has no checkpoint".into()) };
    let (logged, pages) = to;
    let (a, b) = (model(logged)?, model(found)?);
    let whole = [
        (logged.sii == found.sii, "the number of events"),
        (logged.sigactions == found.sigactions, "the signal actions"),
        (a.brk == b.brk, "the end of the heap"),
        (a.futexes == b.futexes, "the queues of futex waiters"),
    ];
    let thread = || {
        let ids = |s: &Snapshot| s.threads.iter().map(|t| t.tid).collect::<BTreeSet<_>>();
        if ids(logged) != ids(found) {
            return Some(format!("threads: checkpoint {:?}, replay {:?}", ids(logged), ids(found)));
        }
        logged.threads.iter().find_map(|l| {
            let f = found.threads.iter().find(|t| t.tid == l.tid)?;
            thread_difference(l, f).map(|d| format!("thread {}: {d}", l.tid))
        })
    };
    let what = whole
        .iter()
        .find(|(same, _)| !same)
        .map(|(_, what)| (*what).to_owned())
        .or_else(thread)
        .or_else(|| layout_difference(&layout(logged), &layout(found)))
        .or_else(|| memory_difference(logged, pages, &crate::capture::read(&unit.pages)));
    Ok(what.map(|w| format!("after event {} the replayed state is not that of the checkpoint: {w}", logged.sii)))
}

/// The mapping is of a file that others can see; shared anonymous memory and deleted files have an inode, too.
fn has_file(m: &Mapping) -> bool {
    m.inode != 0 && !m.path.ends_with(" (deleted)")
}

/// Start, end, protection and file of a mapping: what the program can tell.
type Area = (u64, u64, u32, String);

fn layout_difference(logged: &[Area], found: &[Area]) -> Option<String> {
    let i = (0..logged.len().max(found.len())).find(|i| logged.get(*i) != found.get(*i))?;
    let show = |a: Option<&Area>| match a {
        Some((start, end, prot, path)) => format!("{start:x}-{end:x} protection {prot} {path}"),
        None => "nothing more".to_owned(),
    };
    Some(format!("mapping {i}: checkpoint {}, replay {}", show(logged.get(i)), show(found.get(i))))
}

/// The mappings, neighbours that differ in nothing else joined: the kernel joins and splits mappings by
/// their history.
fn layout(snapshot: &Snapshot) -> Vec<Area> {
    let mut out: Vec<(u64, u64, u32, String, u64)> = Vec::new();
    for m in &snapshot.maps {
        let path = if has_file(m) { m.path.clone() } else { String::new() };
        match out.last_mut() {
            Some(l) if l.1 == m.start && l.2 == m.prot && l.3 == path && (path.is_empty() || l.4 == m.offset) => {
                l.1 = m.end;
            }
            _ => out.push((m.start, m.end, m.prot, path, 0)),
        }
        if let Some(l) = out.last_mut() {
            l.4 = m.offset + (m.end - m.start);
        }
    }
    out.into_iter().map(|(start, end, prot, path, _)| (start, end, prot, path)).collect()
}

fn thread_difference(logged: &ThreadState, found: &ThreadState) -> Option<String> {
    const NAMES: [&str; 27] = [
        "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
        "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
    ];
    if let Some(i) = (0..27).find(|i| logged.regs[*i] != found.regs[*i]) {
        return Some(format!("{}: checkpoint {:#x}, replay {:#x}", NAMES[i], logged.regs[i], found.regs[i]));
    }
    if let Some(i) = extended(&logged.xstate).zip(extended(&found.xstate)).position(|(a, b)| a != b) {
        return Some(format!("extended state, byte {i} of what is compared"));
    }
    let rest = [
        (logged.sigmask == found.sigmask, "signal mask"),
        (logged.altstack == found.altstack, "alternate signal stack"),
        (logged.clear_child_tid == found.clear_child_tid, "clear_child_tid"),
        (logged.robust_list == found.robust_list, "robust list"),
        (logged.comm == found.comm, "name"),
    ];
    rest.iter().find(|(same, _)| !same).map(|(_, what)| (*what).to_owned())
}

/// The extended state without what the processor does not define: the last x87 instruction's place, the
/// reserved words, and the header, which says how registers that hold their initial value are stored.
fn extended(xstate: &[u8]) -> impl Iterator<Item = u8> + '_ {
    xstate.iter().enumerate().filter(|(i, _)| !matches!(i, 6..24 | 464..576)).map(|(_, b)| *b)
}

/// Compares every page that either side has stored. A page that one of them has not is what its mapping
/// began with: zeros, or the file's.
fn memory_difference(of: &Snapshot, logged: &PageStore, found: &PageStore) -> Option<String> {
    let addrs: BTreeSet<u64> = logged.iter().chain(found.iter()).map(|(addr, _)| addr).collect();
    let mut first = None;
    let mut count = 0u64;
    for addr in addrs {
        let Some(m) = of.maps.iter().find(|m| m.start <= addr && addr < m.end) else { continue };
        if m.shared && has_file(m) {
            continue;
        }
        let fresh = || page_of(m, addr, &of.files, logged).unwrap_or(ZERO_PAGE);
        let page = |store: &PageStore| store.get(addr).copied().unwrap_or_else(fresh);
        let (l, f) = (page(logged), page(found));
        let Some(at) = (0..PAGE_BYTES as usize).find(|i| l[*i] != f[*i]) else { continue };
        count += 1;
        first.get_or_insert_with(|| {
            let (l, f) = (&l[at & !7..][..8], &f[at & !7..][..8]);
            let name = if m.path.is_empty() { "anonymous memory" } else { &m.path };
            format!("{:#x} in {name}: checkpoint {l:02x?}, replay {f:02x?}", addr + (at & !7) as u64)
        });
    }
    first.map(|f| format!("{count} pages of memory differ, the first at {f}"))
}

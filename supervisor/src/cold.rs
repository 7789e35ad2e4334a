//! Cold recovery: the unit's keeper was killed with supervisor and program, and the kernel's objects are gone
//! (ARCHITECTURE.md, "Cold recovery").
//!
//! While the log is replayed each call is followed in the model ([`crate::objects`]); at its end the objects are made
//! from the model, and then the unit goes live. Every call comes to the supervisor meanwhile, since the shim knows
//! nothing of the model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::fast::{COUNTED, EPOLL, NOTHING, QUEUE, RECEIVE, SEND, SEND_ALL, TRANSFER};
use ftrun_abi::record::Record;
use ftrun_abi::table::{self, Class, Effect, Row};

use serde::{Deserialize, Serialize};

use crate::capture::broken;
use crate::changes::Change;
use crate::hands;
use crate::live::Outcome;
use crate::marshal::Prepared;
use crate::objects::follow::Happened;
use crate::objects::look::{Enrolled, Look, Which};
use crate::objects::{Entry, Kind, Objects, Open, Socket, build};
use crate::tracee;
use crate::unit::{Halt, Result, Unit, now};

/// What a checkpoint says of the descriptors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// `CLOCK_MONOTONIC` nanoseconds when they were looked at.
    at: u64,
    /// [`Objects`], encoded: ten thousand connections need not be encoded for each checkpoint.
    #[serde(serialize_with = "as_bytes")]
    bytes: Vec<u8>,
}

/// In one piece, which postcard writes in the same way as a sequence, and faster.
fn as_bytes<S: serde::Serializer>(bytes: &[u8], to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_bytes(bytes)
}

/// Which descriptors are to be looked at for the next checkpoint.
#[derive(Debug, Default)]
pub struct Changed {
    /// All of them.
    all: bool,
    /// These. The shim keeps its own list.
    some: BTreeSet<i32>,
}

/// The call that was under way when every process was killed, where nothing tells what became of it.
#[derive(Debug)]
pub(crate) struct InDoubt {
    vtid: i32,
    digest: u64,
    /// The inode of the name that it makes or removes, as it was before; 0 for none.
    before: Option<u64>,
    /// Where the file that it appends to ended before.
    end: Option<u64>,
}

/// Device and inode of a descriptor.
fn inode(fd: i32) -> Option<(u64, u64)> {
    // SAFETY: plain integers, for which zero is valid; the structure outlives the call.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        (libc::fstat(fd, &raw mut stat) == 0).then_some((stat.st_dev, stat.st_ino))
    }
}

impl Unit {
    /// What the descriptors are, for a checkpoint that outlives this process. No thread of the unit runs. `given` says
    /// that they are what the program was started with.
    pub(crate) fn look_at_objects(&mut self, given: bool) -> Option<Seen> {
        self.standby.as_ref()?;
        let control = self.log.control();
        let mut which = std::mem::take(&mut self.changed);
        for (i, word) in control.changed.iter().enumerate() {
            let bits = word.swap(0, SeqCst);
            which.some.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| (i * 64 + bit) as i32));
        }
        let count = control.enrolments.swap(0, SeqCst) as usize;
        let entered = |e: &ftrun_abi::fast::Enrolment| Enrolled {
            set: e.set.load(SeqCst) as i32,
            number: e.fd.load(SeqCst) as i32,
            entry: Entry { events: e.events.load(SeqCst) as u32, data: e.data.load(SeqCst) },
        };
        let enrolled: Vec<Enrolled> = control.enrolled.iter().take(count).map(entered).collect();
        // A set that is looked at anew needs no change.
        let enrolled: Vec<_> = enrolled.into_iter().filter(|e| !which.some.contains(&e.set)).collect();
        // Children share what the unit had open when they were made.
        let all = which.all || control.alone.load(SeqCst) == 0;
        let on_exec = |fd: i32| {
            // SAFETY: a query about a descriptor of the table that the unit shares with us.
            let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
            (fd, (flags >= 0).then_some(flags & libc::FD_CLOEXEC != 0))
        };
        let which = if all { Which::All } else { Which::Some(which.some.into_iter().map(on_exec).collect()) };
        let (pid, ids, look) = (std::process::id() as i32, self.ids(), &mut self.look);
        let looked = self.service.run(|| {
            look.refresh(pid, which, &enrolled, given, &ids)?;
            look.encoded().map_err(std::io::Error::other)
        });
        match looked {
            Ok(bytes) => Some(Seen { at: now(), bytes }),
            Err(e) => {
                tracing::warn!("what the unit's descriptors are cannot be kept: {e}");
                self.look = Look::default();
                None
            }
        }
    }

    /// A call of the supervisor is about to change descriptors.
    pub(crate) fn note_changes(&mut self, row: &Row, args: &[u64; 6]) {
        if self.standby.is_none() {
            return;
        }
        if row.class == Class::Unknown {
            self.changed.all = true;
        }
        let always = matches!(row.effect, Effect::Close | Effect::Onto | Effect::Mode | Effect::NonBlocking);
        for (arg, value) in row.args.iter().zip(args) {
            let fd = *value as i32;
            let connection = || matches!(self.look.objects.get(fd), Some(Open { kind: Kind::Connection { .. }, .. }));
            if *arg == table::Arg::Fd && row.effect != Effect::None && (always || !connection()) {
                self.changed.some.insert(fd);
            }
        }
    }

    /// It has been made, with this result: what is to be looked at, and what is to be held.
    pub(crate) fn note_made(&mut self, nr: u64, args: &[u64; 6], result: i64, outs: &[(u64, Vec<u8>)]) {
        // Whatever else it says, a close has closed what was open.
        let closed = nr as i64 == libc::SYS_close && result != -i64::from(libc::EBADF);
        if self.standby.is_none() || (result < 0 && !closed) {
            return;
        }
        let memory = |at: u64| outs.iter().find(|o| o.0 == at).map_or(&[][..], |o| &o.1);
        let Some(change) = Change::of(&table::lookup(nr, args), args, result, memory) else { return };
        match &change {
            Change::Made(numbers) => self.changed.some.extend(numbers),
            Change::Same(number, _) => drop(self.changed.some.insert(*number)),
            Change::ClosedFrom(..) | Change::More | Change::Anything => self.changed.all = true,
            Change::Flags(numbers) if numbers.len() > 1 => self.changed.all = true,
            // They are arguments.
            Change::Closed(_) | Change::Flags(_) | Change::Directory | Change::Umask(_) => {}
        }
        self.hold_call(change);
    }

    /// Nobody can tell which descriptors have changed.
    pub(crate) fn note_all_changed(&mut self) {
        self.changed.all = true;
    }

    /// A call of the hands was under way when every process was killed, and only the names of files tell what became of it.
    pub(crate) fn find_doubt(&mut self) {
        if let Some(desk) = self.desk.filter(|desk| desk.in_doubt.load(SeqCst) != 0)
            && desk.order.sii.load(SeqCst) == self.sii
        {
            let order = &desk.order;
            let before = Some(order.before.load(SeqCst));
            let (vtid, digest) = (order.vtid.load(SeqCst), order.digest.load(SeqCst));
            self.in_doubt = Some(InDoubt { vtid, digest, before, end: None });
        }
    }

    /// After every process was killed: the operation that the shim had begun is settled, as far as what is left in
    /// memory tells. Where only the kernel's objects would, it is in doubt.
    pub(crate) fn settle_cold(&mut self) -> Result<()> {
        self.find_doubt();
        if !self.shim {
            return Ok(());
        }
        let control = self.log.control();
        let what = control.pending.load(SeqCst);
        if matches!(what, NOTHING | QUEUE | RECEIVE | SEND | SEND_ALL | EPOLL | TRANSFER) {
            return self.settle().map(drop);
        }
        control.sii.store(self.sii, SeqCst);
        // Without an event since it was begun its end is not known. On a stream that was counted it makes no
        // difference: the connection is gone, and what it took nobody has seen.
        if self.sii == control.pending_sii.load(SeqCst) && what & COUNTED == 0 {
            let [vtid, _, digest, _] = control.pending_call.each_ref().map(|w| w.load(SeqCst));
            self.in_doubt = Some(InDoubt { vtid: vtid as i32, digest, before: None, end: None });
        }
        control.pending.store(NOTHING, SeqCst);
        Ok(())
    }

    /// The model as a checkpoint holds it: where replay begins.
    pub(crate) fn begin_cold(&mut self, seen: Option<Seen>) -> Result<()> {
        // Record locks belonged to the table.
        let locked = self.desk.is_some_and(|desk| desk.is_returned()) && self.log.control().locked.load(SeqCst) != 0;
        if !locked && self.desk.is_none_or(|desk| !desk.is_cold()) {
            if let Some(Seen { bytes, .. }) = seen.filter(|_| !self.look.has_begun()) {
                // What the program was started with another supervisor has known.
                let objects: Objects = postcard::from_bytes(&bytes).map_err(broken("decoding the descriptors"))?;
                self.look.objects.given = objects.given;
            }
            return Ok(());
        }
        let Some(Seen { at, bytes }) = seen else {
            return Err(Halt::Broken("the checkpoint does not say what the unit's descriptors were".into()));
        };
        let objects: Objects = postcard::from_bytes(&bytes).map_err(broken("decoding the descriptors"))?;
        self.cold = Some(Objects { time: at, ..objects });
        Ok(())
    }

    /// An event has been replayed: its effect on descriptors.
    pub(crate) fn follow_cold(&mut self, row: &Row, args: &[u64; 6], call: &Prepared, record: &Record<'_>) {
        let Some(objects) = &mut self.cold else { return };
        let outs: Vec<(u64, Vec<u8>)> = record.outputs().map(|(at, b)| (at, b.to_vec())).collect();
        let (result, control) = (record.header.result, call.control());
        let (data, paths) = (call.payload(), &call.paths[..]);
        objects.follow(&Happened { row, args: *args, result, data, paths, outs: &outs, control });
    }

    /// The log has been replayed: the objects are made, and the unit's table is its own again.
    pub(crate) fn thaw(&mut self) -> Result<()> {
        if self.desk.is_some_and(|desk| desk.is_returned()) {
            let locks = self.cold.take().map_or(Ok(()), |objects| objects.take_records());
            return locks.map_err(|e| Halt::Broken(e.to_string()));
        }
        let (Some(mut objects), Some(desk)) = (self.cold.take(), self.desk) else { return Ok(()) };
        self.follow_debt(&mut objects)?;
        let present = desk.entered_table().unwrap_or_default();
        let given = self.set_given_aside(&objects, &present)?;
        for open in objects.open.values_mut() {
            if let Kind::File(file) = &mut open.kind
                && let Some(now) = self.path_now(&file.path)
            {
                file.path = now;
            }
        }
        self.drop_outputs();
        crate::fault::point("thaw-begin", self.pid);
        let spare = desk.raised.load(SeqCst);
        // Calls that connect and accept would be interrupted by the clock.
        let built = crate::told::hold(|| build::build(&objects, given, spare, self.lossy, now()));
        let told = match built {
            Ok(told) => told,
            Err(e) => return Err(Halt::Broken(format!("the unit's descriptors cannot be made again: {e}"))),
        };
        for what in told {
            tracing::warn!("not as it was: {what}");
        }
        if objects.has_records() {
            // The log of before may be on another machine.
            self.log.control().locked.store(1, SeqCst);
        }
        if let Some(doubt) = &mut self.in_doubt {
            let fd = self.threads.get(&doubt.vtid).map_or(-1, |t| t.regs.rdi as i32);
            if let Some(Open { kind: Kind::File(file), given, .. }) = objects.get(fd)
                && (file.at_end || given.is_some())
            {
                doubt.end = file.position;
            }
        }
        crate::fault::point("thaw-end", self.pid);
        desk.leave_table();
        desk.in_doubt.store(0, SeqCst);
        self.close_aside();
        // The next checkpoint knows the new objects; it is due at once.
        self.look = Look::default();
        let given = |number: &i32| objects.get(*number).is_some_and(|open| open.given == Some(*number));
        let known = objects.given.keys().filter(|number| given(number)).filter_map(|n| Some((*n, inode(*n)?)));
        self.look.objects.given = known.collect();
        self.checkpoint_at = 0;
        let connections = objects.open.values().filter(|o| matches!(o.kind, Kind::Connection { .. })).count();
        tracing::info!(descriptors = objects.numbers.len(), connections, "descriptors have been made again");
        Ok(())
    }

    /// What the process that resumes was given, out of the way of the unit's numbers. A supervisor that was killed in
    /// the middle of this has left it where it is, and other things, which go.
    fn set_given_aside(&self, objects: &Objects, present: &[i32]) -> Result<BTreeMap<i32, i32>> {
        let Some(desk) = self.desk else { return Ok(BTreeMap::new()) };
        let spare = match desk.raised.load(SeqCst) {
            0 => {
                let last = objects.numbers.keys().chain(present).copied().max().unwrap_or(2);
                let spare = last + 1;
                let count = spare as usize + 2 * objects.pipes.len() + present.len() + 8;
                crate::limits::allow_numbers(count as u64).map_err(broken("descriptors"))?;
                for (i, number) in present.iter().enumerate() {
                    // SAFETY: numbers of the unit's table, in which nothing else is now.
                    let r = unsafe { libc::dup3(*number, spare + i as i32, libc::O_CLOEXEC) };
                    if r < 0 {
                        return Err(Halt::Broken(format!("descriptor {number}: {}", std::io::Error::last_os_error())));
                    }
                }
                desk.raised.store(spare, SeqCst);
                spare
            }
            spare => spare,
        };
        let behind = spare + present.len() as i32;
        // SAFETY: as above.
        unsafe {
            libc::syscall(libc::SYS_close_range, 0, spare - 1, 0);
            libc::syscall(libc::SYS_close_range, behind, u32::MAX, 0);
        }
        Ok(present.iter().enumerate().map(|(i, number)| (*number, spare + i as i32)).collect())
    }

    /// Closes what was set aside.
    pub(crate) fn close_aside(&self) {
        let Some(desk) = self.desk.filter(|desk| !desk.is_cold()) else { return };
        if let spare @ 1.. = desk.raised.load(SeqCst) {
            // SAFETY: numbers that were made in `set_given_aside` and behind.
            unsafe { libc::syscall(libc::SYS_close_range, spare, u32::MAX, 0) };
            desk.raised.store(0, SeqCst);
        }
    }

    /// The result of a call is owed to a thread. What it did to the world is done: the model follows it, and the
    /// thread is given the result. What it did to objects that are gone never happened: it is made again.
    fn follow_debt(&mut self, objects: &mut Objects) -> Result<()> {
        let Some(vtid) = hands::owed_to().filter(|v| self.threads.contains_key(v)) else { return Ok(()) };
        let regs = self.thread(vtid).regs;
        let (nr, args) = tracee::call_of(&regs);
        let row = table::lookup(nr, &args);
        let call = Prepared::new(self.tid(vtid), nr, &row, &args, &|path| self.path_of(vtid, path))?;
        let Some(result) = hands::owed(vtid, call.digest) else { return Ok(()) };
        let kind = objects.get(args[0] as i32).map(|open| &open.kind);
        let outside = match (row.effect, kind) {
            (Effect::None | Effect::Make(_) | Effect::Remove(_) | Effect::Rename(..) | Effect::Open(_), _) => true,
            (Effect::Give | Effect::Take | Effect::Seek | Effect::TakeEntries, Some(Kind::File(_))) => true,
            // Datagrams.
            (Effect::Give | Effect::Take, Some(Kind::Socket(Socket { pair: None, .. }))) => true,
            _ => false,
        };
        if !outside {
            hands::settle_debt(vtid);
            return Ok(());
        }
        let (data, paths) = (call.payload(), &call.paths[..]);
        objects.follow(&Happened { row: &row, args, result, data, paths, outs: &[], control: 0 });
        Ok(())
    }

    /// A thread comes to the call that is in doubt: the outcome, if the file system tells it. Otherwise it is made again.
    pub(crate) fn judge(
        &mut self,
        vtid: i32,
        nr: u64,
        row: &Row,
        args: &[u64; 6],
        call: &mut Prepared,
    ) -> Option<Outcome> {
        let doubt = self.in_doubt.take_if(|d| d.vtid == vtid)?;
        if doubt.digest != call.digest {
            return None;
        }
        let there = |arg: u8| call.inode(row, args, arg);
        let done = match (row.effect, doubt.before) {
            (Effect::Remove(name) | Effect::Rename(name, _), Some(before @ 1..)) => {
                (there(name) != before).then_some(0)
            }
            (Effect::Make(name), Some(0)) => (there(name) != 0).then_some(0),
            (Effect::Open(name), Some(0)) if there(name) != 0 => {
                // It was made; only the descriptor is missing.
                if let Some(flags) = call.args.get_mut(usize::from(name) + 1) {
                    *flags &= !(libc::O_EXCL as u64);
                }
                return None;
            }
            (Effect::Give, _) => appended(args[0] as i32, call.payload(), doubt.end),
            _ => None,
        };
        if let Some(result) = done {
            tracing::info!(call = row.name, "a call under way had been made");
            return Some(Outcome::Done(result));
        }
        if row.class == Class::Output && !matches!(row.effect, Effect::Remove(_) | Effect::Rename(..) | Effect::Make(_))
        {
            let known = row.effect == Effect::Give && is_regular(args[0] as i32);
            if !known {
                tracing::warn!(nr, "{} was under way when everything was killed, and is made again", row.name);
            }
        }
        None
    }
}

/// How much of data that were to be appended to a file is there. What was written at a position is written again,
/// which makes no difference.
fn appended(fd: i32, data: &[u8], end: Option<u64>) -> Option<i64> {
    // SAFETY: a query about a descriptor.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 || flags & libc::O_APPEND == 0 || !is_regular(fd) {
        return None;
    }
    // The file may be open for writing only.
    let path = format!("/proc/self/fd/{fd}");
    let size = std::fs::metadata(&path).ok()?.len();
    // Where nobody knows where it ended, it ends with the data or does not.
    let end = end.unwrap_or(size.saturating_sub(data.len() as u64));
    // Opened and closed in the unit's table, it would end the unit's record locks.
    let tail = crate::service::outside_the_table(|| std::fs::read(&path).ok())?;
    let tail = tail.get(end as usize..)?;
    let same = tail.iter().zip(data).take_while(|(a, b)| a == b).count();
    (same > 0 && same == tail.len().min(data.len())).then_some(same as i64)
}

fn is_regular(fd: i32) -> bool {
    // SAFETY: plain integers, for which zero is valid, that outlive the call.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        libc::fstat(fd, &raw mut st) == 0 && st.st_mode & libc::S_IFMT == libc::S_IFREG
    }
}

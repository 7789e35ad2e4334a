//! The hands: a thread of the keeper that makes the unit's calls where the supervisor's death must be survived.
//!
//! The supervisor writes the call and a copy of its arguments on the desk, and waits. Whoever of the two dies,
//! the other knows what became of the call: the result stands on the desk until the event is in the log. A
//! supervisor that takes over finds it there; replay brings the thread to the same call again, and it is given
//! the result instead of being made.

use std::cell::RefCell;
use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::stream::{self, Counts};
use ftrun_abi::table::{self, Effect};

use crate::desk::{ARENA_BYTES, CALL, DONE, Desk, Order, POSITION, RECEIVED, SENT, SPAWN, STARTED};
use crate::marshal::{raw_call, steady_call};

/// Memory that a call reads or writes.
#[derive(Debug)]
pub struct Piece {
    /// Where it is in this process.
    pub at: *mut u8,
    /// Its bytes.
    pub len: usize,
    /// The call writes to it.
    pub out: bool,
    /// Offsets in it of pointers to other pieces.
    pub pointers: &'static [usize],
}

/// A call that was made for a supervisor that died before it had logged it.
#[derive(Debug)]
struct Owed {
    vtid: i32,
    call: (u64, [u64; 6], u64),
    result: i64,
    arena: Vec<u8>,
}

/// Who makes the calls of this supervisor's unit.
#[derive(Debug)]
struct Hired {
    desk: &'static Desk,
    vtid: i32,
    sii: u64,
    owed: Option<Owed>,
    /// The keeper was killed: there are no hands.
    alone: bool,
    /// [`crate::desk::Order::before`] of the call that is about to be made.
    before: u64,
}

thread_local! {
    /// Of the tracer's thread; elsewhere calls are made by who wants them.
    static HIRED: RefCell<Option<Hired>> = const { RefCell::new(None) };
}

/// Has the calling thread's calls made by the keeper from now on.
pub fn hire(desk: &'static Desk) {
    HIRED.with_borrow_mut(|hired| *hired = Some(Hired { desk, vtid: 0, sii: 0, owed: None, alone: false, before: 0 }));
}

/// The next calls are made in the name of this thread, `sii` events being in the log.
pub fn serve(vtid: i32, sii: u64) {
    HIRED.with_borrow_mut(|hired| {
        if let Some(h) = hired {
            (h.vtid, h.sii) = (vtid, sii);
        }
    });
}

/// What became of the call under way when the last supervisor died: it is owed to the thread that made it,
/// unless it has been logged. `sii` events are in the log.
pub fn take_over(sii: u64) {
    HIRED.with_borrow_mut(|hired| {
        let Some(h) = hired else { return };
        while matches!(h.desk.call_state(), CALL | STARTED) {
            h.desk.wait_hands(h.desk.hands.load(SeqCst));
        }
        let order = &h.desk.order;
        if h.desk.call_state() == DONE && order.sii.load(SeqCst) == sii {
            let used = (order.used.load(SeqCst) as usize).min(ARENA_BYTES);
            // SAFETY: inside the arena, which the hands do not touch now.
            let arena = unsafe { std::slice::from_raw_parts(h.desk.arena(), used) }.to_vec();
            // The desk may have been mapped elsewhere then.
            let (then, here) = (order.arena.load(SeqCst), h.desk.arena() as u64);
            let moved = |arg: u64| match arg.wrapping_sub(then) {
                offset if offset < ARENA_BYTES as u64 => here + offset,
                _ => arg,
            };
            let args = order.args.each_ref().map(|a| moved(a.load(SeqCst)));
            let call = (order.nr.load(SeqCst), args, order.digest.load(SeqCst));
            h.owed = Some(Owed { vtid: order.vtid.load(SeqCst), call, result: order.result.load(SeqCst), arena });
        }
        // It stays on the desk: this supervisor may be killed, too, before the thread has come there.
    });
}

/// The thread to which a result is owed.
pub fn owed_to() -> Option<i32> {
    HIRED.with_borrow(|hired| hired.as_ref()?.owed.as_ref().map(|o| o.vtid))
}

/// A call that is about to be tried has been made for the last supervisor, with arguments of this digest: what it took is
/// not there any more, and its result is given by [`call`].
pub fn was_made(nr: u64, digest: u64) -> bool {
    HIRED.with_borrow(|hired| {
        let Some(h) = hired else { return false };
        h.owed.as_ref().is_some_and(|o| (o.vtid, o.call.0, o.call.2) == (h.vtid, nr, digest))
    })
}

/// The result that is owed to a thread for the call with this digest.
pub fn owed(vtid: i32, digest: u64) -> Option<i64> {
    HIRED.with_borrow(|hired| {
        let owed = hired.as_ref()?.owed.as_ref()?;
        (owed.vtid == vtid && owed.call.2 == digest).then_some(owed.result)
    })
}

/// The thread has come to its next call: what was owed to it is given by now, or has been told otherwise.
pub fn settle_debt(vtid: i32) {
    HIRED.with_borrow_mut(|hired| {
        if let Some(h) = hired {
            h.owed.take_if(|o| o.vtid == vtid);
        }
    });
}

/// Makes a call of the unit, or gives out the result of one that was made. `pointers` says, by bits, which
/// arguments lead into the pieces; `digest` is the one of the unit's call; `before` tells the inode of the name that
/// it makes or removes.
pub fn call(
    nr: u64,
    args: &[u64; 6],
    pointers: u8,
    digest: u64,
    before: &dyn Fn() -> u64,
    pieces: &mut [Piece],
) -> i64 {
    HIRED.with_borrow_mut(|hired| match hired {
        Some(h) => {
            h.before = before();
            h.call(nr, args, pointers, digest, pieces)
        }
        None => steady_call(nr, args),
    })
}

impl Hired {
    fn call(&mut self, nr: u64, args: &[u64; 6], pointers: u8, digest: u64, pieces: &mut [Piece]) -> i64 {
        let mut starts = Vec::with_capacity(pieces.len());
        let mut used = 0;
        for piece in &*pieces {
            starts.push(used);
            used += piece.len.max(1).next_multiple_of(16);
        }
        if used > ARENA_BYTES {
            return -i64::from(libc::ENOMEM);
        }
        if let Err(e) = self.desk.populate(used) {
            // The unit goes on. Nobody must take the result of the last call for one of this.
            self.desk.hands.fetch_and(SPAWN, SeqCst);
            tracing::warn!("a call of {used} bytes does not outlive the supervisor: {e}");
            return steady_call(nr, args);
        }
        let arena = self.desk.arena();
        let moved = |pieces: &[Piece], address: u64| {
            let here = |(piece, start): (&Piece, &usize)| {
                let offset = address.wrapping_sub(piece.at as u64);
                (offset < piece.len.max(1) as u64).then(|| arena as u64 + *start as u64 + offset)
            };
            pieces.iter().zip(&starts).find_map(here).unwrap_or(address)
        };
        let mut args = *args;
        for (_, arg) in args.iter_mut().enumerate().filter(|(i, _)| pointers >> i & 1 == 1) {
            *arg = moved(pieces, *arg);
        }
        let owed = self.owed.take_if(|o| o.vtid == self.vtid && o.call == (nr, args, digest) && o.arena.len() == used);
        let result = match owed {
            Some(owed) => {
                // SAFETY: as long as was checked; the hands do nothing now.
                unsafe { std::ptr::copy_nonoverlapping(owed.arena.as_ptr(), arena, used) };
                owed.result
            }
            None => {
                for (piece, start) in pieces.iter().zip(&starts) {
                    // SAFETY: pieces are memory of ours, and the arena has room for all of them.
                    unsafe {
                        let to = arena.add(*start);
                        std::ptr::copy_nonoverlapping(piece.at, to, piece.len);
                        for field in piece.pointers {
                            let field = to.add(*field).cast::<u64>();
                            field.write_unaligned(moved(pieces, field.read_unaligned()));
                        }
                    }
                }
                self.have_made(nr, &args, digest, used)
            }
        };
        for (piece, start) in pieces.iter_mut().zip(&starts).filter(|(piece, _)| piece.out) {
            // SAFETY: as above. Pointers stay our own.
            unsafe {
                let own: Vec<u64> =
                    piece.pointers.iter().map(|f| piece.at.add(*f).cast::<u64>().read_unaligned()).collect();
                std::ptr::copy_nonoverlapping(arena.add(*start), piece.at, piece.len);
                for (field, own) in piece.pointers.iter().zip(own) {
                    piece.at.add(*field).cast::<u64>().write_unaligned(own);
                }
            }
        }
        result
    }

    fn have_made(&mut self, nr: u64, args: &[u64; 6], digest: u64, used: usize) -> i64 {
        let order = &self.desk.order;
        // Nobody must take the result of the last call for one of this.
        self.desk.hands.fetch_and(SPAWN, SeqCst);
        order.vtid.store(self.vtid, SeqCst);
        order.nr.store(nr, SeqCst);
        for (to, arg) in order.args.iter().zip(args) {
            to.store(*arg, SeqCst);
        }
        order.digest.store(digest, SeqCst);
        order.sii.store(self.sii, SeqCst);
        order.before.store(self.before, SeqCst);
        order.count.fetch_add(1, SeqCst);
        if self.desk.holds.load(SeqCst) != 0 {
            note_counts(order, nr, args);
        }
        order.used.store(used as u64, SeqCst);
        order.arena.store(self.desk.arena() as u64, SeqCst);
        crate::fault::point("hands-ordered", self.desk.pid.load(SeqCst));
        if self.alone {
            return self.make_alone();
        }
        self.desk.set_call_state(CALL);
        loop {
            let seen = self.desk.hands.load(SeqCst);
            match seen & !SPAWN {
                DONE => break,
                state => {
                    // A call may wait as long as it likes.
                    crate::pulse::beat();
                    self.desk.wait_hands(seen);
                    if self.desk.hands.load(SeqCst) == seen && self.keeper_is_gone() {
                        // Nobody can tell any more whether a call that was being made took effect.
                        assert!(state == CALL, "the keeper was killed in the middle of a call");
                        tracing::warn!("the keeper was killed: the death of the supervisor will not be survived");
                        self.alone = true;
                        return self.make_alone();
                    }
                }
            }
        }
        crate::fault::point("hands-made", self.desk.pid.load(SeqCst));
        order.result.load(SeqCst)
    }

    /// Makes the call that stands on the desk, as the hands would, for whoever recovers the unit when this process is
    /// killed, too.
    fn make_alone(&self) -> i64 {
        make(self.desk);
        self.desk.order.result.load(SeqCst)
    }

    fn keeper_is_gone(&self) -> bool {
        // SAFETY: no arguments.
        unsafe { libc::getppid() != self.desk.keeper.load(SeqCst) }
    }
}

/// Notes what will tell whether data have been taken or given, where the descriptor outlives whoever makes the call.
fn note_counts(order: &Order, nr: u64, args: &[u64; 6]) {
    let fd = args[0];
    let taken = match table::lookup(nr, args).effect {
        Effect::Take => true,
        Effect::Give | Effect::Rewrite => false,
        _ => return order.counts.store(0, SeqCst),
    };
    let counts = stream::counts(|nr, args: [u64; 6]| raw_call(nr, &args), fd);
    let position = || raw_call(libc::SYS_lseek as u64, &[fd, 0, libc::SEEK_CUR as u64, 0, 0, 0]);
    let (what, count) = match counts {
        Some(counts) if !taken => (SENT, counts.sent),
        Some(Counts { received: Some(received), .. }) => (RECEIVED, received),
        Some(_) => (0, 0),
        None => u64::try_from(position()).map_or((0, 0), |at| (POSITION, at)),
    };
    order.counts.store(what, SeqCst);
    order.counted.store(count, SeqCst);
}

/// What the hands do: makes the call on the desk. `owner` is the change of credentials that they last followed.
pub fn work(desk: &Desk, owner: &mut u32) {
    let version = desk.owner.version.load(SeqCst);
    if std::mem::replace(owner, version) != version {
        let (uid, gid, groups) = desk.owner.get();
        crate::capture::set_fs_credentials(uid, gid, &groups);
    }
    make(desk);
}

/// Makes the call on the desk.
fn make(desk: &Desk) {
    desk.set_call_state(STARTED);
    let order = &desk.order;
    let args = order.args.each_ref().map(|a| a.load(SeqCst));
    order.result.store(steady_call(order.nr.load(SeqCst), &args), SeqCst);
    desk.set_call_state(DONE);
}

//! The queue of outputs at durability `node`, where the unit does not empty it itself (ARCHITECTURE.md, "Output queue").

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ftrun_abi::outputs::{BY_SHIM, BY_SUPERVISOR, Passed, is_due, is_empty, pass, take_up};

use crate::commit::want;
use crate::evlog::Queue;
use crate::fault;
use crate::marshal::raw_call;
use crate::recorder::wait;
use crate::unit::Unit;

/// How long who has nothing to do sleeps when nothing wakes it.
const NAP: Duration = Duration::from_millis(100);
/// How long outputs that may leave are left to a unit that may come by.
const TICK: Duration = Duration::from_millis(1);
/// And how long nothing is there before we have to be told of what is.
const STAY: Duration = Duration::from_millis(20);
/// How long room in a socket's buffer is waited for before other sockets are looked after.
const ROOM_MS: i32 = 5;

impl Unit {
    /// Begins to let outputs leave. The unit's descriptors are as it knows them.
    pub(crate) fn begin_outputs(&mut self) {
        if self.recorder.is_none() || std::mem::replace(&mut self.has_outputs, true) {
            return;
        }
        let mut queue = self.log.outputs();
        take_up(queue.control(), &queue.ring, BY_SUPERVISOR);
        // A thread of the tracer's: it has the unit's descriptors.
        let thread = std::thread::Builder::new().name("ftrun-outputs".into());
        if let Err(e) = thread.spawn(move || sweep(&mut queue)) {
            panic!("the thread that lets outputs leave: {e}");
        }
    }

    /// The unit is dead: what it was letting leave is settled.
    pub(crate) fn settle_outputs(&self) {
        let queue = self.log.outputs();
        take_up(queue.control(), &queue.ring, BY_SHIM);
    }

    /// The connections are gone, and with them whoever would have been given this.
    pub(crate) fn drop_outputs(&mut self) {
        let Queue { ring, .. } = &mut self.log.outputs();
        ring.release_to(ring.end());
        let control = self.log.control();
        control.leaving.store(0, SeqCst);
        control.leaver.store(0, SeqCst);
    }

    /// Lets leave what may; whether nothing is left.
    pub(crate) fn let_leave(&self) -> bool {
        let mut queue = self.log.outputs();
        while is_due(queue.control(), &queue.ring) && let_leave(&mut queue).is_none() {
            std::thread::yield_now();
        }
        is_empty(&queue.ring)
    }

    /// The program has ended: what it has sent before leaves. Nothing does once somebody else has the unit.
    pub(crate) fn flush_outputs(&self) {
        if !self.has_outputs {
            return;
        }
        self.settle_outputs();
        let control = self.log.control();
        while self.recorder.as_ref().is_none_or(|r| r.lost().is_none()) {
            let word = control.commit_word.load(SeqCst);
            if self.let_leave() {
                return;
            }
            want(control, control.needed.load(SeqCst));
            wait(&control.commit_word, word, TICK);
        }
    }
}

/// Lets everything leave that may; `None` when somebody else is about that.
fn let_leave(queue: &mut Queue) -> Option<Passed> {
    let kernel = |nr, args: [u64; 6]| {
        fault::point_beside("output-leaving");
        let result = raw_call(nr, &args);
        fault::point_beside("output-left");
        result
    };
    let message = queue.leaving_message();
    let (control, ring) = queue.parts();
    // SAFETY: the message of this control page, and the queue behind it.
    let passed = unsafe { pass(kernel, control, message, ring, usize::MAX, BY_SUPERVISOR) };
    match passed {
        Ok(passed) => passed,
        Err(e) => panic!("the unit has overwritten its queue of outputs: {e}"),
    }
}

/// The life of the thread: while the unit comes by with calls it lets outputs leave itself.
fn sweep(queue: &mut Queue) -> ! {
    loop {
        let control = queue.control();
        let word = control.sweep_word.load(SeqCst);
        if is_empty(&queue.ring) {
            control.sweep.store(0, SeqCst);
            let end = queue.ring.end();
            wait(&control.sweep_word, word, STAY);
            if queue.ring.end() == end {
                // Nothing for a while: who puts something there now finds that we are idle, or is found here.
                control.sweeper_idle.store(1, SeqCst);
                if is_empty(&queue.ring) {
                    wait(&control.sweep_word, word, NAP);
                }
                control.sweeper_idle.store(0, SeqCst);
            }
        } else if control.sweep.load(SeqCst) != 0 {
            let commit = control.commit_word.load(SeqCst);
            let passed = let_leave(queue);
            await_more(queue, passed, commit);
        } else {
            let begin = queue.ring.begin();
            wait(&control.sweep_word, word, TICK);
            let control = queue.control();
            if queue.ring.begin() == begin && is_due(control, &queue.ring) {
                let_leave(queue);
            }
        }
    }
}

/// Waits until more may leave, or there is room in a socket's buffer.
fn await_more(queue: &Queue, passed: Option<Passed>, commit: u32) {
    match passed {
        None => std::thread::yield_now(),
        Some(passed) if passed.full_count > 0 => {
            let entry = |fd: &u64| libc::pollfd { fd: *fd as i32, events: libc::POLLOUT, revents: 0 };
            let mut full: Vec<_> = passed.full[..passed.full_count].iter().map(entry).collect();
            // SAFETY: as many entries as is said.
            unsafe { libc::poll(full.as_mut_ptr(), full.len() as u64, ROOM_MS) };
        }
        Some(_) if is_empty(&queue.ring) => {}
        Some(_) => wait(&queue.control().commit_word, commit, NAP),
    }
}

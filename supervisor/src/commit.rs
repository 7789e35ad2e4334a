//! Output commit (Johnson §2.1.8): at durability `node` what others can see waits until all that led to it is in stable
//! storage (ARCHITECTURE.md, "Output commit").

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use ftrun_abi::fast::Control;
use ftrun_abi::record::Kind;
use ftrun_abi::table::{Row, is_seen};

use crate::hands;
use crate::marshal::Prepared;
use crate::recorder::{wait, wake};
use crate::unit::{Halt, Result, Unit};

/// How long the tracer waits for a commit before it looks after other things.
const PATIENCE: Duration = Duration::from_millis(20);
/// And then looks again, nanoseconds.
pub(crate) const LOOK_AGAIN_NS: u64 = 5_000_000;

impl Unit {
    /// Whether a call may be made now that others may see: all that led to it is in stable storage then, and that this
    /// thread is the one to go on.
    pub(crate) fn may_leave(&mut self, vtid: i32, row: &Row, args: &[u64; 6], call: &Prepared) -> Result<bool> {
        self.expected = None;
        if self.recorder.is_none() || hands::owed_to() == Some(vtid) || !is_seen(row, args) {
            return Ok(true);
        }
        if self.is_inside(vtid, row, args)? {
            return Ok(true);
        }
        if let Some(why) = self.recorder.as_ref().and_then(|r| r.lost()) {
            return Err(Halt::Broken(why));
        }
        if self.log.control().last_tid.load(SeqCst) != vtid as u64 {
            self.begin_record(Kind::Sched);
            self.append(vtid, 0, 0, 0, 0)?;
            // The call comes behind that event: who takes over finds it so.
            hands::serve(vtid, self.sii);
        }
        let control = self.log.control();
        if !await_commit(control, PATIENCE) || !self.let_leave() {
            return Ok(false);
        }
        self.expected = sent_whole(row, call).map(|result| (result, control.needed.load(SeqCst)));
        Ok(true)
    }

    /// A call that looks like an output, and stays inside the unit.
    fn is_inside(&mut self, vtid: i32, row: &Row, args: &[u64; 6]) -> Result<bool> {
        let nr = u64::from(row.nr);
        Ok(match i64::from(row.nr) {
            libc::SYS_clone3 => {
                let request = self.clone_request(vtid, nr, args)?;
                request.is_some_and(|r| r.flags & libc::CLONE_THREAD as u64 != 0)
            }
            libc::SYS_write => {
                self.log.control().alone.load(SeqCst) != 0 && crate::blocking::is_eventfd(args[0] as i32)
            }
            libc::SYS_kill
            | libc::SYS_tkill
            | libc::SYS_tgkill
            | libc::SYS_rt_sigqueueinfo
            | libc::SYS_rt_tgsigqueueinfo => self.is_self_signal(nr, args),
            _ => false,
        })
    }
}

/// What comes out of a call when nothing stands in its way, and comes out again when it is made again after the loss
/// of the machine: connections are lost with it, so that nothing is sent twice.
fn sent_whole(row: &Row, call: &Prepared) -> Option<i64> {
    match i64::from(row.nr) {
        libc::SYS_close | libc::SYS_shutdown => Some(0),
        libc::SYS_write | libc::SYS_writev | libc::SYS_sendto | libc::SYS_sendmsg => {
            crate::blocking::is_stream(call.args[0] as i32).then(|| call.payload().len() as i64)
        }
        _ => None,
    }
}

/// Waits until what an output now depends on is committed, for at most `patience`; whether it is.
pub(crate) fn await_commit(control: &Control, patience: Duration) -> bool {
    let needed = control.needed.load(SeqCst);
    let begin = Instant::now();
    loop {
        let word = control.commit_word.load(SeqCst);
        if control.committed.load(SeqCst) >= needed {
            return true;
        }
        want(control, needed);
        let Some(left) = patience.checked_sub(begin.elapsed()) else { return false };
        wait(&control.commit_word, word, left);
    }
}

/// Asks the recorder for a commit.
pub(crate) fn want(control: &Control, event: u64) {
    if control.want(event) {
        wake(&control.want_word);
    }
}

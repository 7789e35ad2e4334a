//! What the unit's calls change of its table is followed in what is held, before they are logged.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering::SeqCst;

use super::{Hold, NONBLOCKING, ON_EXEC};
use crate::changes::Change;
use crate::fds;
use crate::limits;
use crate::unit::Unit;

/// The flags of a number of the unit's table; `None` when it is not open.
fn flags_of(number: i32) -> Option<u32> {
    // SAFETY: queries about a descriptor of the table that the unit shares with us.
    let (own, mode) = unsafe { (libc::fcntl(number, libc::F_GETFD), libc::fcntl(number, libc::F_GETFL)) };
    let on = |yes: bool, flag: u32| if yes { flag } else { 0 };
    let nonblocking = mode >= 0 && mode & libc::O_NONBLOCK != 0;
    (own >= 0).then_some(on(own & libc::FD_CLOEXEC != 0, ON_EXEC) | on(nonblocking, NONBLOCKING))
}

impl Hold {
    /// Follows a change. `open` has those of the numbers that it is about which are open, and their flags; `tracer` is a thread with the unit's table.
    fn follow(&mut self, change: &Change, open: &BTreeMap<i32, u32>, tracer: i32) -> io::Result<()> {
        match change {
            Change::Made(_) => open.iter().try_for_each(|(number, flag)| self.put(*number, *flag)),
            Change::Same(_, as_number) => {
                open.iter().try_for_each(|(number, flag)| self.put_same(*number, *as_number, *flag))
            }
            Change::Closed(number) => {
                self.close(*number);
                Ok(())
            }
            Change::ClosedFrom(first, last) => {
                let within: Vec<_> = self.numbers().filter(|(n, _)| (first..=last).contains(&n)).collect();
                within.into_iter().for_each(|(n, _)| self.close(n));
                Ok(())
            }
            Change::Flags(_) => {
                open.iter().for_each(|(number, flag)| self.mark(*number, *flag));
                Ok(())
            }
            Change::Directory => self.put_directory(tracer),
            Change::Umask(umask) => {
                self.desk.umask.store(*umask, SeqCst);
                Ok(())
            }
            Change::More => {
                let new = |hold: &Self, n: i32| hold.at(n).is_none_or(|word| word == 0);
                open.iter().try_for_each(|(n, flag)| if new(self, *n) { self.put(*n, *flag) } else { Ok(()) })
            }
            Change::Anything => {
                let closed: Vec<_> = self.numbers().filter(|(n, _)| !open.contains_key(n)).collect();
                closed.into_iter().for_each(|(n, _)| self.close(n));
                let same = |hold: &Self, n: i32| hold.at(n).is_some_and(|word| word != 0 && hold.is_same(n, word));
                open.iter().try_for_each(|(n, flag)| {
                    if same(self, *n) {
                        self.mark(*n, *flag);
                        return Ok(());
                    }
                    self.put(*n, *flag)
                })
            }
        }
    }
}

impl Unit {
    /// Before the unit goes on: everything that it has open is held, if that is wanted.
    pub(crate) fn begin_hold(&mut self) {
        let Some(desk) = self.desk else { return };
        desk.in_doubt.store(0, SeqCst);
        if self.hold.is_some() && desk.holds.load(SeqCst) == 0 {
            // SAFETY: the umask is put back; the hands, who share it, do nothing now.
            let umask = unsafe { libc::umask(0) };
            // SAFETY: as above.
            unsafe { libc::umask(umask) };
            self.hold_changes(&[Change::Anything, Change::Directory, Change::Umask(umask)]);
            if self.hold.is_some() {
                desk.holds.store(1, SeqCst);
            }
        }
        let first = if self.hold.is_some() { desk.given.load(SeqCst).max(1) } else { 0 };
        self.log.control().held.store(first, SeqCst);
    }

    /// A call has been made, and is about to be logged.
    pub(crate) fn hold_call(&mut self, change: Change) {
        if self.hold.is_some() {
            self.hold_changes(&[change]);
        }
    }

    /// `execve` has closed what it closes.
    pub(crate) fn hold_executed(&mut self) {
        if let Some(hold) = &self.hold {
            let closed: Vec<_> = hold.numbers().filter(|(_, word)| word & ON_EXEC != 0).collect();
            self.hold_changes(&closed.into_iter().map(|(n, _)| Change::Closed(n)).collect::<Vec<_>>());
        }
    }

    /// The unit's end closes all of its descriptors.
    pub(crate) fn end_hold(&mut self) {
        if let Some(mut hold) = self.hold.take() {
            self.service.run(|| {
                hold.end();
                drop(hold);
            });
        }
    }

    fn hold_changes(&mut self, changes: &[Change]) {
        let mut raised = false;
        for change in changes {
            while let Err(e) = self.hold_change(change) {
                // What is in flight counts against the limit of who sends it.
                if !raised && matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ETOOMANYREFS)) {
                    raised = true;
                    limits::raise_numbers();
                    continue;
                }
                tracing::warn!(
                    "the unit's descriptors cannot all be held: {e}. If the keeper is killed, too, its connections are lost"
                );
                if let Some(desk) = self.desk {
                    desk.holds_nothing.store(1, SeqCst);
                }
                self.log.control().held.store(0, SeqCst);
                self.end_hold();
            }
        }
    }

    fn hold_change(&mut self, change: &Change) -> io::Result<()> {
        let Some(hold) = &mut self.hold else { return Ok(()) };
        // SAFETY: no arguments.
        let tracer = unsafe { libc::gettid() };
        let numbers = match change {
            Change::Made(numbers) | Change::Flags(numbers) => numbers.clone(),
            Change::Same(number, _) => vec![*number],
            Change::More | Change::Anything => self.service.run(|| fds::list(tracer))?,
            _ => vec![],
        };
        let open = numbers.into_iter().filter_map(|number| Some((number, flags_of(number)?))).collect();
        self.service.run(|| hold.follow(change, &open, tracer))
    }
}

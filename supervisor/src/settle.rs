//! What a death left open: whether the call that was under way took effect.
//!
//! The shim notes in the shared page what it is about to do; what the kernel wrote there, the descriptor table
//! and the positions of files outlive the process and tell whether it was done (ARCHITECTURE.md, "In doubt").

use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::fast::{
    AREA_BYTES, CLOSE, COUNTED, ENROL, EPOLL, EPOLL_EVENTS_MAX, FD_COUNTED, FRAME_TOP, Frame, NOT_YET, NOTHING, OPEN,
    QUEUE, READ_FILE, RECEIVE, SEND, SEND_ALL, TRANSFER, WRITE_FILE, area, frame_at,
};
use ftrun_abi::record::{HEADER_BYTES, Kind, OUTPUT_HEADER_BYTES, Record, flag};
use ftrun_abi::stream;

use crate::marshal::raw_call;
use crate::tracee;
use crate::unit::{Halt, Result, Unit};

/// A call that took effect: its result and what it wrote into the program's memory.
struct Done(i64, Vec<(u64, Vec<u8>)>);

impl Unit {
    /// After the process died, or faulted in the shim: the operation in doubt is settled by what the kernel
    /// wrote, and what was logged is counted. Returns the result of a call that turned out to be done.
    pub(crate) fn settle(&mut self) -> Result<Option<i64>> {
        if !self.shim {
            return Ok(None);
        }
        self.settle_outputs();
        let last = self.count_log();
        let control = self.log.control();
        control.sii.store(self.sii, SeqCst);
        control.needed.store(self.sii, SeqCst);
        if control.pending.load(SeqCst) == NOTHING {
            return Ok(None);
        }
        if self.sii > control.pending_sii.load(SeqCst) {
            // The end came after it had been logged.
            control.pending.store(NOTHING, SeqCst);
            return Ok(last);
        }
        let what = control.pending.load(SeqCst);
        let [vtid, nr, digest, at] = control.pending_call.each_ref().map(|w| w.load(SeqCst));
        let Some(Done(result, mut outs)) = self.outcome(what, at)? else {
            self.log.control().pending.store(NOTHING, SeqCst);
            return Ok(None);
        };
        if nr == libc::SYS_recvmsg as u64 && result >= 0 {
            // No ancillary data, and no flags.
            let header = self.log.control().pending_set.load(SeqCst);
            outs.extend([(header + 40, vec![0; 8]), (header + 48, vec![0; 4])]);
        }
        if what & !COUNTED == SEND_ALL && (result as u64) < self.log.control().pending_from.load(SeqCst) {
            self.begun(vtid as i32, digest).done = result as usize;
            self.keep_outside(self.sii);
            self.log.control().pending.store(NOTHING, SeqCst);
            return Ok(None);
        }
        crate::fault::point("settle-found", self.pid);
        self.begin_record(Kind::Call);
        for (at, bytes) in &outs {
            self.output(*at, bytes)?;
        }
        self.append(vtid as i32, nr as u16, result, digest, flag::FAST)?;
        crate::fault::point("settle-logged", self.pid);
        // Only now: a supervisor that dies before must leave it to the next one.
        self.log.control().pending.store(NOTHING, SeqCst);
        Ok(Some(result))
    }

    /// Counts what is in the log; the result of the last event.
    pub(crate) fn count_log(&mut self) -> Option<i64> {
        let (mut position, mut last) = (self.log.begin(), None);
        while let Some((bytes, next)) = self.log.read_at(position) {
            position = next;
            if let Ok((record, _)) = Record::parse(bytes) {
                self.sii = record.header.sii;
                last = Some(record.header.result);
            }
        }
        last
    }

    /// A thread came with a call of which the shim has handed over a part.
    pub(crate) fn take_part(&mut self, vtid: i32) {
        let control = self.log.control();
        if control.pending.load(SeqCst) & !COUNTED == SEND_ALL
            && control.pending_sii.load(SeqCst) == control.sii.load(SeqCst)
        {
            let (digest, length) = (control.pending_call[2].load(SeqCst), control.message.len.load(SeqCst) & NOT_YET);
            if length != NOT_YET {
                self.begun(vtid, digest).done = length as usize;
                self.keep_outside(self.sii);
            }
            self.log.control().pending.store(NOTHING, SeqCst);
        }
    }

    /// What came of an operation; `None` when it was not carried out.
    fn outcome(&mut self, what: u64, at: u64) -> Result<Option<Done>> {
        let control = self.log.control();
        let mut length = control.message.len.load(SeqCst) & NOT_YET;
        let fd = control.pending_fd.load(SeqCst) as i32;
        let (from, to) = (control.pending_from.load(SeqCst), control.offset.load(SeqCst));
        if what & COUNTED != 0 {
            self.log.forget_fds(Some(fd as usize), u8::MAX - FD_COUNTED);
            let counts = stream::counts(|nr, args: [u64; 6]| raw_call(nr, &args), fd as u64)
                .ok_or_else(|| Halt::Broken(format!("descriptor {fd} is no TCP socket any more")))?;
            let now = match what & !COUNTED {
                RECEIVE => counts.received,
                _ => Some(counts.sent),
            };
            match now.map(|now| now.wrapping_sub(to)) {
                Some(0) => return Ok(None),
                Some(n) if what & !COUNTED == RECEIVE || n <= from => length = n,
                Some(n) => return Err(Halt::Broken(format!("{n} bytes of {from} were sent"))),
                None => return Ok(Some(reset(fd))),
            }
        }
        let control = self.log.control();
        Ok(match what & !COUNTED {
            RECEIVE if length != NOT_YET => Some(Done(length as i64, self.received(at, length)?)),
            SEND | SEND_ALL if length != NOT_YET => Some(Done(length as i64, vec![])),
            EPOLL => {
                let reported = |event: &[u8; 12]| event[..4] != [0; 4];
                let n = control.events[..EPOLL_EVENTS_MAX].iter().take_while(|e| reported(e)).count();
                (n > 0).then(|| Done(n as i64, vec![(at, control.events[..n].concat())]))
            }
            OPEN if is_open(fd) => {
                let mut outs = vec![];
                if at != 0 {
                    let len = control.address_len.load(SeqCst);
                    outs.push((at, control.address[..len.min(from as u32) as usize].to_vec()));
                    outs.push((to, len.to_le_bytes().to_vec()));
                }
                Some(Done(i64::from(fd), outs))
            }
            CLOSE if !is_open(fd) => Some(Done(0, vec![])),
            QUEUE => {
                // Whether the shim has counted it nobody knows.
                let position = control.pending_set.load(SeqCst).to_le_bytes().to_vec();
                self.log.forget_fds(Some(fd as usize), u8::MAX - FD_COUNTED);
                let outs = if at == 0 { vec![] } else { vec![(at, position)] };
                (self.log.outputs().ring.end() != to).then_some(Done(from as i64, outs))
            }
            TRANSFER if to > from => Some(Done((to - from) as i64, vec![(at, to.to_le_bytes().to_vec())])),
            // `offset` is how many bytes there were to write.
            WRITE_FILE => match position(fd) {
                now if now > from => Some(Done((now - from).min(to) as i64, vec![])),
                // Somebody has cut the file meanwhile, and it was appended to what was left.
                now if now < from => Some(Done(now.min(to) as i64, vec![])),
                _ => None,
            },
            READ_FILE if position(fd) == to => Some(Done((to - from) as i64, self.received(at, to - from)?)),
            ENROL if self.is_enrolled(control.pending_set.load(SeqCst) as i32, fd) => Some(Done(0, vec![])),
            _ => None,
        })
    }

    /// Data that stands in the record that was begun.
    fn received(&self, at: u64, length: u64) -> Result<Vec<(u64, Vec<u8>)>> {
        if length == 0 {
            return Ok(vec![]);
        }
        let record = self.log.uncommitted().unwrap_or_default();
        let data = record.get(HEADER_BYTES + OUTPUT_HEADER_BYTES..).unwrap_or_default();
        match data.get(..length as usize) {
            Some(data) => Ok(vec![(at, data.to_vec())]),
            None => Err(Halt::Broken("a message was received and is not in the log".into())),
        }
    }

    /// An epoll set has this descriptor in it.
    fn is_enrolled(&self, set: i32, fd: i32) -> bool {
        // SAFETY: no arguments.
        let tracer = unsafe { libc::syscall(libc::SYS_gettid) };
        let path = format!("/proc/{}/task/{tracer}/fdinfo/{set}", std::process::id());
        let text = self.service.run(move || std::fs::read_to_string(path)).unwrap_or_default();
        text.lines().any(|l| l.strip_prefix("tfd:").and_then(|l| l.split_whitespace().next()?.parse().ok()) == Some(fd))
    }

    /// A thread faulted in the shim, over an address that the program gave to its call. The call is the
    /// supervisor's then, unless it has taken effect.
    pub(crate) fn fault_in_shim(&mut self, vtid: i32) -> Result<()> {
        let done = self.settle()?;
        let t = self.thread(vtid);
        let (tid, at) = (t.tid, area(t.slot));
        let mut regs = tracee::get_regs(tid)?;
        regs.rip = ftrun_shim::leave();
        regs.rsp = frame_at(at);
        regs.rax = u64::from(done.is_some());
        regs.orig_rax = u64::MAX;
        if let Some(result) = done {
            let top = at + AREA_BYTES;
            let word = |field: usize| top - FRAME_TOP + field as u64;
            let back = tracee::read_u64(tid, word(std::mem::offset_of!(Frame, back)))?;
            let distance = tracee::read_u32(tid, back + 3)? as i32;
            let back = (back + 7).wrapping_add_signed(i64::from(distance));
            tracee::write_mem(tid, word(std::mem::offset_of!(Frame, rax)), &result.to_le_bytes())?;
            tracee::write_mem(tid, word(std::mem::offset_of!(Frame, back)), &back.to_le_bytes())?;
        }
        tracee::set_regs(tid, &regs)?;
        Ok(tracee::cont(tid, 0)?)
    }
}

/// The connection was reset while data was being taken, and nobody can tell how much of it the program got: it is told
/// of the reset, and of nothing behind it, as may happen to data that a reset overtakes (RFC 9293, 3.10.7.4).
fn reset(fd: i32) -> Done {
    let mut lost = [0u8; 4096];
    // SAFETY: the buffer is as long as is said; a socket of the table that the unit shares with us.
    unsafe {
        while libc::recv(fd, lost.as_mut_ptr().cast(), lost.len(), libc::MSG_DONTWAIT) > 0 {}
        libc::shutdown(fd, libc::SHUT_RDWR);
    }
    Done(-i64::from(libc::ECONNRESET), vec![])
}

fn is_open(fd: i32) -> bool {
    // SAFETY: asks about a descriptor of the table that the unit shares with us.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

fn position(fd: i32) -> u64 {
    // SAFETY: as above.
    unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) as u64 }
}

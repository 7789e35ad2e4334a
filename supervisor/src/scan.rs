//! Instructions whose outcome is not the program's own doing: `rdtsc`, `rdtscp`, `cpuid`.
//!
//! Where the code that a unit maps is found to hold none but those that could be replaced by a trap, the
//! time-stamp counter need not be forbidden, and the shim can read the time without a system call. The code
//! of a file is judged function by function: bytes that look like such an instruction are one if decoding
//! from the beginning of their function comes to them. Where that cannot be told, which is mostly data between
//! functions, the page is guarded: it may be read, and should it ever be executed, the counter is forbidden
//! (`PR_SET_TSC`) before it is. Code that is written by the program itself cannot be judged at all, and has
//! the counter forbidden at once, which is as right and slower.

use std::collections::HashMap;
use std::rc::Rc;

use iced_x86::{Decoder, DecoderOptions};
use object::{Object, ObjectSegment, SegmentFlags};

use crate::fast::poke_bytes;
use crate::patch::functions;
use crate::signals::Trapped;
use crate::tracee;
use crate::unit::{Result, Unit};

/// An illegal instruction, in place of another.
const UD2: [u8; 2] = [0x0f, 0x0b];

/// What stands in a file: offset of each instruction, which it is, and whether it is one for certain; `None` if
/// the file cannot be read.
type Found = Option<Rc<Vec<(u64, Trapped, bool)>>>;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// What is known of files, by device and inode.
#[derive(Debug, Default)]
pub struct Scanned(HashMap<(u64, u64), Found>);

/// The trapped instruction that `code` begins with, by its bytes alone.
pub(crate) fn looks_like(code: &[u8]) -> Option<Trapped> {
    match code {
        [0x0f, 0x31, ..] => Some(Trapped(0x31)),
        [0x0f, 0x01, 0xf9, ..] => Some(Trapped(0xf9)),
        [0x0f, 0xa2, ..] => Some(Trapped(0xa2)),
        _ => None,
    }
}

fn scan(path: &str) -> Option<Vec<(u64, Trapped, bool)>> {
    const PF_X: u32 = 1;
    let file = std::fs::File::open(path).ok()?;
    // SAFETY: the file is only read; should it be changed meanwhile, what is found is compared with the bytes
    // in memory before anything is written.
    let data = unsafe { memmap2::Mmap::map(&file) }.ok()?;
    let elf = object::File::parse(&*data).ok()?;
    let functions = functions(&elf);
    let mut out = Vec::new();
    for segment in elf.segments() {
        let SegmentFlags::Elf { p_flags } = segment.flags() else { return None };
        if p_flags & PF_X == 0 {
            continue;
        }
        let (address, code, offset) = (segment.address(), segment.data().ok()?, segment.file_range().0);
        for (at, _) in code.windows(2).enumerate().filter(|(_, w)| w[0] == 0x0f) {
            let Some(which) = looks_like(&code[at..]) else { continue };
            match is_instruction(address, code, at, &functions) {
                Some(false) => {}
                told => out.push((offset + at as u64, which, told.is_some())),
            }
        }
    }
    Some(out)
}

/// Whether an instruction begins at `at`; `None` if that cannot be told.
pub(crate) fn is_instruction(address: u64, code: &[u8], at: usize, functions: &[(u64, u64)]) -> Option<bool> {
    let target = address + at as u64;
    let i = functions.partition_point(|f| f.0 <= target).checked_sub(1)?;
    // Between functions: what follows the one before is padding or code without a description.
    let begin = if target < functions[i].1 { functions[i].0 } else { functions[i].1 };
    let from = usize::try_from(begin.checked_sub(address)?).ok()?;
    let mut decoder = Decoder::with_ip(64, code.get(from..)?, begin, DecoderOptions::NONE);
    while decoder.ip() < target {
        if !decoder.can_decode() || decoder.decode().is_invalid() {
            return None;
        }
    }
    Some(decoder.ip() == target)
}

impl Unit {
    /// Judges the code that has just been mapped, or made executable, in a range of addresses. It is called at
    /// the same event in replay as live.
    pub(crate) fn judge_code(&mut self, vtid: i32, range: std::ops::Range<u64>) -> Result<()> {
        if !self.uses_shim() {
            return Ok(());
        }
        let tid = self.tid(vtid);
        for m in self.executable(&range)? {
            self.note_code(&(m.start..m.end));
            let own = m.inode == 0 || m.shared || m.prot & libc::PROT_WRITE as u32 != 0;
            let found = if own { None } else { self.scanned(&m) };
            let Some(found) = found else {
                self.forbid_counter()?;
                continue;
            };
            for (offset, which, certain) in found.iter() {
                let Some(at) = offset.checked_sub(m.offset).map(|o| m.start + o).filter(|a| *a + 3 <= m.end) else {
                    continue;
                };
                if !certain {
                    self.guard(vtid, at)?;
                    continue;
                }
                let mut code = [0u8; 3];
                tracee::read_mem(tid, at, &mut code)?;
                if looks_like(&code) == Some(*which) {
                    poke_bytes(tid, at, &UD2)?;
                    self.model.sites.traps.insert(at, (which.0, [code[0], code[1]]));
                } else if code[..2] != UD2 {
                    self.forbid_counter()?;
                }
            }
        }
        Ok(())
    }

    /// Makes the page of `at`, and the next one if the instruction would reach into it, not executable.
    fn guard(&mut self, vtid: i32, at: u64) -> Result<()> {
        for page in [at & !(PAGE - 1), (at + 2) & !(PAGE - 1)] {
            if self.model.sites.guarded.insert(page) {
                self.gate(vtid, libc::SYS_mprotect, [page, PAGE, libc::PROT_READ as u64, 0, 0, 0])?;
            }
        }
        Ok(())
    }

    /// A running thread was stopped by a fault: if a guarded page is to be executed after all, the counter is
    /// forbidden and the thread goes on. False if the fault was something else.
    pub(crate) fn enters_guarded(&mut self, vtid: i32) -> Result<bool> {
        let tid = self.tid(vtid);
        let regs = tracee::get_regs(tid)?;
        // An instruction may begin in the page before.
        let pages = [regs.rip & !(PAGE - 1), (regs.rip + 15) & !(PAGE - 1)];
        if !pages.iter().any(|page| self.model.sites.guarded.contains(page)) {
            return Ok(false);
        }
        self.thread(vtid).regs = regs;
        let code = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        for page in std::mem::take(&mut self.model.sites.guarded) {
            self.gate(vtid, libc::SYS_mprotect, [page, PAGE, code, 0, 0, 0])?;
        }
        self.forbid_counter()?;
        self.thread(vtid).place = crate::unit::Place::Program;
        tracee::set_regs(tid, &regs)?;
        tracee::cont(tid, 0)?;
        Ok(true)
    }

    fn scanned(&mut self, m: &ftrun_ckpt::state::Mapping) -> Found {
        let key = (m.dev, m.inode);
        if let Some(known) = self.scans.0.get(&key) {
            return known.clone();
        }
        let path = m.path.clone();
        let found = self.service.run(move || scan(&path)).map(Rc::new);
        self.scans.0.insert(key, found.clone());
        found
    }

    /// Memory was unmapped or mapped over: what was known of it is void.
    pub(crate) fn forget_code(&mut self, range: &std::ops::Range<u64>) {
        let sites = &mut self.model.sites;
        sites.traps.retain(|at, _| !range.contains(at));
        sites.guarded.retain(|page| !range.contains(page));
        sites.sites.retain(|at, _| !range.contains(at));
        sites.refused.retain(|at, _| !range.contains(at));
        self.follow_sites();
    }

    /// The trapped instruction at `rip`, as it is or as it was.
    pub(crate) fn trapped_at(&self, tid: i32, rip: u64) -> Result<Option<Trapped>> {
        if let Some((which, _)) = self.model.sites.traps.get(&rip) {
            return Ok(Some(Trapped(*which)));
        }
        let mut code = [0u8; 3];
        match tracee::read_some(tid, rip, &mut code) {
            Err(e @ tracee::TraceError::Gone(_)) => Err(e.into()),
            Err(_) => Ok(None),
            Ok(_) => Ok(looks_like(&code)),
        }
    }

    /// There is code that cannot be judged: from here on the counter is forbidden, in every thread.
    fn forbid_counter(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.model.sites.unjudged, true) {
            return Ok(());
        }
        self.follow_counter()
    }

    /// Sets, in every thread, whether the counter may be read; tells the shim whether it may use it.
    pub(crate) fn follow_counter(&mut self) -> Result<()> {
        let open = self.uses_shim() && !self.model.sites.unjudged && self.vdso_clock != 0;
        let clock = if open { self.vdso_clock } else { 0 };
        self.log.control().clock_gettime.store(clock, std::sync::atomic::Ordering::SeqCst);
        let how = if open { libc::PR_TSC_ENABLE } else { libc::PR_TSC_SIGSEGV };
        for vtid in self.threads.keys().copied().collect::<Vec<_>>() {
            self.unpark(vtid)?;
            self.gate(vtid, libc::SYS_prctl, [libc::PR_SET_TSC as u64, how as u64, 0, 0, 0, 0])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::is_instruction;

    #[test]
    fn an_instruction_is_told_from_bytes_inside_another() {
        // mov $0x310f,%eax; rdtsc; ret; nop...; then bytes that are no code.
        let code = [0xb8, 0x0f, 0x31, 0, 0, 0x0f, 0x31, 0xc3, 0x90, 0x0f, 0x31, 0x06, 0x0f, 0x31];
        let functions = [(0x1000, 0x1008)];
        assert_eq!(is_instruction(0x1000, &code, 1, &functions), Some(false));
        assert_eq!(is_instruction(0x1000, &code, 5, &functions), Some(true));
        // Behind the function: decoded from its end.
        assert_eq!(is_instruction(0x1000, &code, 9, &functions), Some(true));
        // 0x06 is no instruction in 64-bit code.
        assert_eq!(is_instruction(0x1000, &code, 12, &functions), None);
        assert_eq!(is_instruction(0x1000, &code, 5, &[(0x1006, 0x1008)]), None);
    }
}

//! The processor that a unit runs on.
//!
//! The tracer and every thread of a unit are bound to one processor. The unit's threads run one at a time
//! anyway; a stop that is served on the same processor costs half of one that wakes another; and what the
//! `cpuid` instruction tells of the processor (leaf 1, 0xb, 0x1f: the APIC id) comes out the same in
//! replay, where the kernel cannot trap the instruction. The program is shown the processors that it was
//! given, and what it asks for is remembered.

use crate::live::Outcome;
use crate::marshal::{Prepared, raw_call};
use crate::unit::Unit;

/// `sched_setaffinity(2)` on a thread; 0 is the caller.
fn set(tid: i32, mask: &[u8]) -> i64 {
    raw_call(libc::SYS_sched_setaffinity as u64, &[tid as u64, mask.len() as u64, mask.as_ptr() as u64, 0, 0, 0])
}

/// Processors that the calling thread may run on, in the kernel's form: bit n of byte n/8.
fn allowed() -> Vec<u8> {
    let mut mask = vec![0u8; 1024];
    let room = [0, mask.len() as u64, mask.as_mut_ptr() as u64, 0, 0, 0];
    let n = raw_call(libc::SYS_sched_getaffinity as u64, &room);
    mask.truncate(n.max(0) as usize);
    mask
}

/// Binds the calling thread, and what it starts from now on, to processor `cpu`. A processor that is not
/// there any more is passed over: the unit then runs where the kernel likes.
fn bind(cpu: u32) {
    let mut mask = vec![0u8; cpu as usize / 64 * 8 + 8];
    mask[cpu as usize / 8] |= 1 << (cpu % 8);
    set(0, &mask);
}

/// One of the processors in `mask`; which one hangs on the process id, so that units spread.
fn choose(mask: &[u8]) -> Option<u32> {
    let cpus: Vec<u32> = (0..mask.len() as u32 * 8).filter(|c| mask[*c as usize / 8] >> (c % 8) & 1 == 1).collect();
    cpus.get(std::process::id() as usize % cpus.len().max(1)).copied()
}

impl Unit {
    /// Chooses the processor of a new unit.
    pub(crate) fn choose_cpu(&mut self) {
        self.given_cpus = allowed();
        self.cpu = choose(&self.given_cpus);
    }

    /// Binds the tracer, from which the unit's process is made, to the unit's processor.
    pub(crate) fn bind_to_cpu(&self) {
        if let Some(cpu) = self.cpu {
            bind(cpu);
        }
    }

    /// A child runs on its own, where its parent was meant to.
    pub(crate) fn release_child(&self, parent: i32, child: i32) {
        set(child, self.cpus_of(parent));
    }

    /// Processors that a thread believes to run on.
    fn cpus_of(&self, vtid: i32) -> &[u8] {
        self.model.affinity.get(&vtid).map_or(&self.given_cpus, |m| m)
    }

    /// A thread that `vtid` has made runs where that does.
    pub(crate) fn inherit_cpus(&mut self, vtid: i32, new: i32) {
        if let Some(mask) = self.model.affinity.get(&vtid).cloned() {
            self.model.affinity.insert(new, mask);
        }
    }

    /// `sched_setaffinity` and `sched_getaffinity` of a thread of the unit, live and in replay.
    pub(crate) fn affinity(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Outcome {
        let target = if args[0] == 0 { vtid } else { args[0] as i32 };
        // The tracer stands in for the thread, so that the kernel judges the arguments.
        call.args[0] = 0;
        let result = call.run(nr);
        if result >= 0 && nr == libc::SYS_sched_setaffinity as u64 {
            let mask = allowed();
            self.bind_to_cpu();
            self.model.affinity.insert(target, mask);
        } else if result >= 0 {
            let mask = self.cpus_of(target).to_vec();
            if let Some(out) = call.out_mut(0) {
                let n = mask.len().min(out.len());
                out[..n].copy_from_slice(&mask[..n]);
            }
        }
        Outcome::With(result, call.written(result))
    }
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn only_a_processor_of_the_mask_is_chosen() {
        assert_eq!(choose(&[0, 0x10]), Some(12));
        assert!(choose(&[0b101]).is_some_and(|c| c == 0 || c == 2));
        assert_eq!(choose(&[0, 0]), None);
        assert_eq!(choose(&[]), None);
    }
}

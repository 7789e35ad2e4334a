//! The fast path: call sites that enter the shim, and the shim's place in the unit.
//!
//! A call site is rewritten when a call of it first stops at the filter: its two bytes, `syscall`, become a
//! short jump into padding near it, which jumps on to a stub (see [`crate::patch`] for where that is safe).
//! The stub enters the shim, which serves the call or lets the stub's own `syscall` stop as before. Because
//! sites are rewritten at their first stop, in replay as live, the same code is at the same place at the
//! same event, and what a checkpoint holds of it is right.
//!
//! The supervisor never sees a stub: [`Unit::stopped_regs`] shows a thread as if it had come from its site.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::fast::{
    AREA_BYTES, AREAS_BASE, Area, CODE_BASE, CODE_RANGES, CONTROL_BASE, FD_COUNTED, FD_PRIVATE, HELD, NOTHING, RECORD,
    RUNS, VDSO_BASE, area,
};
use ftrun_abi::stream;
use ftrun_abi::table::{self, Arg, Class};
use libc::user_regs_struct;
use serde::{Deserialize, Serialize};

use crate::launch::{self, LaunchError};
use crate::tracee::{self, Gate};
use crate::unit::{Result, Unit};

/// What the unit's memory holds of the fast path: it rolls back with it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sites {
    /// Rewritten call sites: address of the `syscall`.
    pub sites: BTreeMap<u64, Site>,
    /// How often sites stopped that have not been rewritten.
    pub stops: BTreeMap<u64, u32>,
    /// Memory of stubs: address and bytes used.
    pub pages: Vec<(u64, u64)>,
    /// Instructions that have been replaced by a trap: which, and the bytes that were there.
    pub traps: BTreeMap<u64, (u16, [u8; 2])>,
    /// Pages that are not executable because nobody knows what is in them (see [`crate::scan`]).
    pub guarded: BTreeSet<u64>,
    /// The code of the image has been judged (see [`crate::scan`]).
    pub judged: bool,
    /// There is code that cannot be judged.
    pub unjudged: bool,
    /// Call sites that cannot be rewritten, and why.
    pub refused: BTreeMap<u64, String>,
    /// The unit has a shim.
    pub used: bool,
    /// The program uses the register that the shim needs.
    pub off: bool,
}

/// One rewritten call site.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Site {
    /// Its stub.
    pub stub: u64,
    /// Where the near jump to the stub is: in padding near the site, or right before the site.
    pub padding: u64,
    /// What was there: at the site, at the near jump.
    pub original: ([u8; 2], [u8; 5]),
}

/// A site is rewritten when it stops for this many times: what only starts a program is left alone.
const STOPS: u32 = 4;

/// Bytes of one stub.
pub const STUB_BYTES: u64 = 40;
/// From the begin of a stub to its slow part, the `syscall` that stops.
pub const STUB_SLOW: u64 = 31;

/// The code of the stub at `at`, for a site whose calls go on at `back`. `first` is the instruction of five
/// bytes that the site's jump has replaced, or one without effect.
pub fn stub(at: u64, back: u64, first: [u8; 5]) -> [u8; STUB_BYTES as usize] {
    let mut code = [0xcc; STUB_BYTES as usize];
    code[..5].copy_from_slice(&first);
    // mov %rsp,%gs:0; mov %gs:8,%rsp; call *%gs:16
    code[5..31].copy_from_slice(&[
        0x65, 0x48, 0x89, 0x24, 0x25, 0, 0, 0, 0, 0x65, 0x48, 0x8b, 0x24, 0x25, 8, 0, 0, 0, 0x65, 0xff, 0x14, 0x25, 16,
        0, 0, 0,
    ]);
    // syscall; jmp back
    code[31..34].copy_from_slice(&[0x0f, 0x05, 0xe9]);
    let distance = back.wrapping_sub(at + STUB_SLOW + 7) as u32;
    code[34..38].copy_from_slice(&distance.to_le_bytes());
    code
}

/// In the shim's code, or in the kernel's that it calls.
fn in_shim(ip: u64) -> bool {
    (VDSO_BASE..AREAS_BASE).contains(&ip)
}

/// A structure as the bytes that the shim reads.
fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: used for `repr(C)` structures of integers without padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl Unit {
    /// Whether this unit uses the shim.
    pub(crate) fn uses_shim(&self) -> bool {
        self.shim && !self.model.sites.off
    }

    /// Maps the shim into a process under construction. Its main thread makes the calls.
    pub(crate) fn map_shim(&mut self, tid: i32, base: &user_regs_struct) -> Result<()> {
        if !self.shim {
            return Ok(());
        }
        let call = |nr: libc::c_long, args: [u64; 6]| -> Result<()> {
            let r = launch::gate_call(tid, base, nr as u64, args, &mut |_| {})?;
            if (-4095..0).contains(&r) {
                let source = std::io::Error::from_raw_os_error(-r as i32);
                return Err(LaunchError::Sys { what: "mapping the shim".into(), source }.into());
            }
            Ok(())
        };
        let fixed = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE) as u64;
        let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let code_bytes = (ftrun_shim::IMAGE.len() as u64).next_multiple_of(4096);
        call(libc::SYS_mmap, [CODE_BASE, code_bytes, rw, fixed, u64::MAX, 0])?;
        tracee::write_mem(tid, CODE_BASE, ftrun_shim::IMAGE)?;
        call(libc::SYS_mprotect, [CODE_BASE, code_bytes, (libc::PROT_READ | libc::PROT_EXEC) as u64, 0, 0, 0])?;
        call(libc::SYS_mmap, [AREAS_BASE, AREA_BYTES * (Gate::THREADS_MAX + 1), rw, fixed, u64::MAX, 0])?;
        let (fd, bytes) = self.log.file();
        let service = self.service.run(|| {
            // SAFETY: no arguments.
            unsafe { libc::syscall(libc::SYS_gettid) }
        });
        let path = format!("/proc/{}/task/{service}/fd/{fd}", std::process::id());
        let fd = crate::mapper::open_mapped(&path, true);
        let shared = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
        let mapped = call(libc::SYS_mmap, [CONTROL_BASE, bytes, rw, shared, fd as u64, 0]);
        if fd >= 0 {
            // SAFETY: opened above.
            unsafe { libc::close(fd) };
        }
        mapped?;
        // Children are not recorded: they must not write into the log.
        call(libc::SYS_madvise, [CONTROL_BASE, bytes, libc::MADV_DONTFORK as u64, 0, 0, 0])?;
        let control = self.log.control();
        control.slow.store(1, SeqCst);
        control.mode.store(RECORD, SeqCst);
        control.pending.store(NOTHING, SeqCst);
        control.turn.store(HELD, SeqCst);
        control.turn_calls.store(0, SeqCst);
        control.wanting.store(0, SeqCst);
        for slot in &control.slots {
            slot.state.store(RUNS, SeqCst);
            slot.waited.store(0, SeqCst);
            slot.again.store(0, SeqCst);
        }
        control.pid.store(self.vpid as u64, SeqCst);
        control.parent.store(self.parent() as u64, SeqCst);
        control.supervisor.store(u64::from(std::process::id()), SeqCst);
        // SAFETY: no arguments.
        control.tracer.store(unsafe { libc::syscall(libc::SYS_gettid) } as u32, SeqCst);
        control.free_fd.store(0, SeqCst);
        control.free_known.store(0, SeqCst);
        control.code_ranges.store(0, SeqCst);
        control.real_pid.store(self.pid as u64, SeqCst);
        // What is shared stays shared; what was counted is asked for anew.
        self.log.forget_fds(None, FD_PRIVATE);
        Ok(())
    }

    /// Gives a thread its area; `gs` points there from now on.
    pub(crate) fn give_area(&mut self, vtid: i32) -> Result<()> {
        if !self.uses_shim() {
            return Ok(());
        }
        let t = self.thread(vtid);
        let at = area(t.slot);
        t.regs.gs_base = at;
        let tid = t.tid;
        let fields = Area {
            user_sp: 0,
            stack: at + AREA_BYTES - 8,
            entry: ftrun_shim::entry(),
            slow: 0,
            tid: vtid as u64,
            this: at,
        };
        Ok(tracee::write_mem(tid, at, bytes_of(&fields))?)
    }

    /// Registers of a thread that stopped at the filter, as if the call had been made at its site: `rcx` and
    /// `r11` are what the kernel leaves there.
    pub(crate) fn stopped_regs(&mut self, vtid: i32) -> Result<user_regs_struct> {
        let regs = self.site_regs(vtid)?;
        if self.uses_shim() && !self.model.sites.sites.contains_key(&(regs.rip - 2)) {
            self.rewrite(vtid, regs.rip - 2)?;
        }
        Ok(regs)
    }

    /// As [`Unit::stopped_regs`], for a stop that is not the first of its call.
    pub(crate) fn site_regs(&self, vtid: i32) -> Result<user_regs_struct> {
        let mut regs = tracee::get_regs(self.tid(vtid))?;
        if let Some(site) = self.stubs.get(&regs.rip) {
            regs.rip = site + 2;
            regs.rcx = regs.rip;
        }
        Ok(regs)
    }

    /// Rewrites a call site that is used again, if that is safe.
    fn rewrite(&mut self, vtid: i32, site: u64) -> Result<()> {
        if self.model.sites.refused.contains_key(&site) {
            return Ok(());
        }
        let stops = self.model.sites.stops.entry(site).or_default();
        *stops += 1;
        if *stops < STOPS {
            return Ok(());
        }
        self.model.sites.stops.remove(&site);
        match self.patch_site(vtid, site)? {
            Ok(found) => {
                self.stubs.insert(found.stub + STUB_SLOW + 2, site);
                self.model.sites.sites.insert(site, found);
            }
            Err(why) => {
                tracing::info!(site = format!("{site:#x}"), why, "a call site stays slow");
                self.model.sites.refused.insert(site, why);
            }
        }
        Ok(())
    }

    /// Follows the model after a restore: which stub belongs to which site.
    pub(crate) fn follow_sites(&mut self) {
        self.stubs = self.model.sites.sites.iter().map(|(site, s)| (s.stub + STUB_SLOW + 2, *site)).collect();
    }

    /// Takes the rewriting out of a forked child, which runs on its own.
    pub(crate) fn restore_sites(&self, child: i32) -> Result<()> {
        for (site, s) in &self.model.sites.sites {
            poke_bytes(child, *site, &s.original.0)?;
            poke_bytes(child, s.padding, &s.original.1)?;
        }
        for (at, (_, original)) in &self.model.sites.traps {
            poke_bytes(child, *at, original)?;
        }
        Ok(())
    }

    /// The program sets `gs` itself: the shim has no place any more.
    pub(crate) fn end_shim(&mut self) -> Result<()> {
        let pid = self.pid;
        self.restore_sites(pid)?;
        self.model.sites.sites.clear();
        self.model.sites.traps.clear();
        self.model.sites.off = true;
        self.follow_counter()?;
        for t in self.threads.values_mut() {
            t.regs.gs_base = 0;
        }
        Ok(())
    }

    /// `arch_prctl` with `gs`: the program's own begins where the shim ends.
    pub(crate) fn before_arch_prctl(&mut self, vtid: i32, nr: u64, args: &[u64; 6]) -> Result<()> {
        const ARCH_SET_GS: u64 = 0x1001;
        const ARCH_GET_GS: u64 = 0x1004;
        if nr == libc::SYS_arch_prctl as u64 && self.uses_shim() {
            match args[0] {
                ARCH_SET_GS => self.end_shim()?,
                ARCH_GET_GS => self.thread(vtid).regs.gs_base = 0,
                _ => {}
            }
        }
        Ok(())
    }

    /// The supervisor is about to make a call that may take from a stream or give to it.
    /// `ancillary` data goes with it. What is no longer sure is forgotten now: the next supervisor finds it so if this one
    /// is killed behind the call.
    pub(crate) fn before_fd_call(&mut self, row: &table::Row, args: &[u64; 6], ancillary: bool) {
        const ALL: u8 = u8::MAX;
        /// What a second descriptor for the same socket leaves.
        const TWIN: u8 = ALL - FD_PRIVATE - FD_COUNTED;
        self.note_changes(row, args);
        self.log.control().free_known.store(0, SeqCst);
        for (arg, value) in row.args.iter().zip(args) {
            if *arg == Arg::Fd {
                self.log.forget_fds(Some(*value as usize), ALL - FD_COUNTED);
            }
        }
        match i64::from(row.nr) {
            _ if row.effect == table::Effect::Lock => self.log.control().locked.store(1, SeqCst),
            libc::SYS_setsockopt if stream::stays_plain(args[1], args[2]) => {}
            libc::SYS_setsockopt | libc::SYS_shutdown => self.log.forget_fds(Some(args[0] as usize), TWIN),
            libc::SYS_close => self.log.forget_fds(Some(args[0] as usize), 0),
            libc::SYS_close_range => self.log.forget_fds(None, 0),
            libc::SYS_fcntl if !matches!(args[1] as i32, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) => {}
            libc::SYS_fcntl | libc::SYS_dup | libc::SYS_dup2 | libc::SYS_dup3 => {
                self.log.control().duplicated.store(1, SeqCst);
                self.log.forget_fds(Some(args[0] as usize), TWIN);
                if matches!(i64::from(row.nr), libc::SYS_dup2 | libc::SYS_dup3) {
                    self.log.forget_fds(Some(args[1] as usize), 0);
                }
            }
            // Others may get descriptors with a message, or take them.
            libc::SYS_sendmsg if !ancillary => {}
            libc::SYS_sendmsg | libc::SYS_sendmmsg | libc::SYS_pidfd_getfd => self.share_fds(),
            _ if row.class == Class::Unknown => self.share_fds(),
            _ => {}
        }
    }

    /// Others may have the unit's sockets from now on.
    pub(crate) fn share_fds(&mut self) {
        self.log.forget_fds(None, u8::MAX - FD_COUNTED - FD_PRIVATE);
    }

    /// A call has changed what descriptors are.
    pub(crate) fn after_fd_call(&mut self, nr: u64, args: &[u64; 6], result: i64) {
        /// What a change of mode leaves.
        const MODE: u8 = FD_PRIVATE | FD_COUNTED;
        let control = self.log.control();
        let duplicated = control.duplicated.load(SeqCst) != 0;
        match nr as i64 {
            libc::SYS_close => drop(control.free_fd.fetch_min(args[0], SeqCst)),
            libc::SYS_close_range => control.free_fd.store(0, SeqCst),
            libc::SYS_fcntl if matches!(args[1] as i32, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) => {}
            libc::SYS_fcntl | libc::SYS_ioctl if duplicated => self.log.forget_fds(None, MODE),
            libc::SYS_fcntl | libc::SYS_ioctl => self.log.forget_fds(Some(args[0] as usize), MODE),
            // What is new in an epoll set is fresh no more.
            libc::SYS_epoll_ctl => self.log.forget_fds(Some(args[2] as usize), MODE),
            libc::SYS_accept | libc::SYS_accept4 | libc::SYS_socket if result >= 0 => {
                self.log.note_private(result as usize);
            }
            _ => {}
        }
    }

    /// Memory that may hold code from now on: what happens to it concerns the supervisor. Ranges beyond what the
    /// page can hold are merged with the nearest.
    pub(crate) fn note_code(&self, range: &std::ops::Range<u64>) {
        let control = self.log.control();
        let count = control.code_ranges.load(SeqCst) as usize;
        let mut ranges: Vec<(u64, u64)> =
            control.code[..count].iter().map(|[a, b]| (a.load(SeqCst), b.load(SeqCst))).collect();
        ranges.push((range.start, range.end));
        ranges.sort_unstable();
        ranges.dedup_by(|next, kept| {
            let joined = next.0 <= kept.1;
            if joined {
                kept.1 = kept.1.max(next.1);
            }
            joined
        });
        while ranges.len() > CODE_RANGES {
            let nearest = (1..ranges.len()).min_by_key(|i| ranges[*i].0 - ranges[*i - 1].1).unwrap_or(1);
            ranges[nearest - 1].1 = ranges[nearest].1;
            ranges.remove(nearest);
        }
        for ([first, end], range) in control.code.iter().zip(&ranges) {
            first.store(range.0, SeqCst);
            end.store(range.1, SeqCst);
        }
        control.code_ranges.store(ranges.len() as u32, SeqCst);
    }

    /// Takes notice of what the shim has done since the thread last stopped.
    pub(crate) fn follow_shim(&mut self) {
        if !self.shim {
            return;
        }
        self.sii = self.log.control().sii.load(SeqCst);
        self.publish_events();
        if let Some(journal) = &mut self.journal {
            journal.follow(&self.log);
        }
    }

    /// Lets a thread go on that was stopped on its way: if it waits in the shim, that call ends now (the kernel
    /// would begin it again, signal(7)).
    pub(crate) fn go_on(&self, tid: i32) -> Result<()> {
        const AGAIN: [i64; 4] = [-512, -513, -514, -516];
        let mut regs = tracee::get_regs(tid)?;
        if self.is_in_shim(regs.rip) && regs.orig_rax as i64 >= 0 && AGAIN.contains(&(regs.rax as i64)) {
            regs.rax = -i64::from(libc::EINTR) as u64;
            regs.orig_rax = u64::MAX;
            tracee::set_regs(tid, &regs)?;
        }
        Ok(tracee::cont(tid, 0)?)
    }

    /// The thread is in the shim, or on its way in: it will come out by itself.
    pub(crate) fn is_in_shim(&self, ip: u64) -> bool {
        self.shim && (in_shim(ip) || self.model.sites.pages.iter().any(|(at, used)| (*at..*at + *used).contains(&ip)))
    }
}

/// Writes a few bytes whatever the protection of the page is.
pub(crate) fn poke_bytes(tid: i32, at: u64, bytes: &[u8]) -> Result<()> {
    let base = at & !7;
    let mut words = vec![0u8; ((at - base) as usize + bytes.len()).next_multiple_of(8)];
    tracee::read_mem(tid, base, &mut words)?;
    words[(at - base) as usize..][..bytes.len()].copy_from_slice(bytes);
    for (i, word) in words.as_chunks::<8>().0.iter().enumerate() {
        tracee::poke(tid, base + i as u64 * 8, u64::from_le_bytes(*word))?;
    }
    Ok(())
}

//! Checkpoints: from the unit to a [`Snapshot`] and its pages, and back.

use std::fs;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use ftrun_abi::fast::{REGION_BASE, REGION_END};
use ftrun_ckpt::copy::copy_in;
use ftrun_ckpt::dirty::{Full, Kind, SoftDirty, UFFD_FLAGS, WpAsync};
use ftrun_ckpt::maps::read_maps;
use ftrun_ckpt::pages::{PageStore, StagedPages};
use ftrun_ckpt::runs::PageRun;
use ftrun_ckpt::state::{Mapping, Snapshot, ThreadState};
use libc::user_regs_struct;

use crate::desk::GROUPS_MAX;
use crate::fds;
use crate::launch::{self, GATE};
use crate::limits;
use crate::tracee::{self, Event};
use crate::unit::{Credentials, Halt, Place, Result, State, Thread, Unit, now};

/// What a checkpoint brought, to be written to disk.
#[derive(Debug)]
pub struct Capture {
    /// The state.
    pub snapshot: Arc<Snapshot>,
    /// SII of the checkpoint before, if the pages are only what changed since.
    pub parent: Option<u64>,
    /// Pages that changed.
    pub staged: StagedPages,
    /// Pages that are no longer there.
    pub gone: Vec<PageRun>,
}

/// The pages, to read.
pub(crate) fn read(pages: &RwLock<PageStore>) -> RwLockReadGuard<'_, PageStore> {
    pages.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn broken<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> Halt + '_ {
    move |e| Halt::Broken(format!("{what}: {e}"))
}

/// Mappings that belong to the program: not ours, not the kernel's.
pub(crate) fn program_maps(maps: Vec<Mapping>) -> Vec<Mapping> {
    maps.into_iter()
        .filter(|m| m.end <= REGION_BASE || m.start >= REGION_END)
        .filter(|m| !m.path.starts_with("[vdso") && !m.path.starts_with("[vvar") && !m.path.starts_with("[vsyscall"))
        .collect()
}

impl Unit {
    /// Takes a checkpoint. No thread of the unit is in user code when this is called.
    pub fn checkpoint(&mut self) -> Result<()> {
        let begin = now();
        crate::fault::point("checkpoint-begin", self.pid);
        let wanted = self.shared.checkpoint.load(SeqCst) && self.can_store();
        for vtid in self.threads.keys().copied().collect::<Vec<_>>() {
            self.read_thread(vtid)?;
        }
        if let Some(journal) = &self.journal {
            journal.before_checkpoint();
        }
        self.lost_a_file.store(false, SeqCst);
        let (pid, model_brk) = (self.pid, self.model.brk);
        let (pages, files) = (&self.pages, &mut self.mapped);
        let tracker = &mut self.tracker;
        let captured = self.service.run(move || -> std::io::Result<_> {
            let maps = program_maps(read_maps(pid)?);
            let mm = launch::read_mm(pid, Some(model_brk))?;
            let scan = tracker.scan(pid, &maps, &read(pages)).map_err(std::io::Error::other)?;
            let mem = fs::File::open(format!("/proc/{pid}/mem"))?;
            let mut gone = scan.gone;
            let staged = copy_in(pid, &scan.dirty, Some(&mem)).and_then(|mut staged| {
                let followed = files.follow(pid, &maps, &read(pages), &mut staged)?;
                gone.extend(followed.needless);
                for path in followed.left_out {
                    tracing::warn!(
                        "{path} is mapped, has no name, and is too large to be kept: the unit cannot be recovered"
                    );
                }
                Ok((staged, followed.files))
            });
            if staged.is_err() {
                tracker.forget();
            }
            let (staged, files) = staged?;
            Ok((maps, files, mm, gone, staged, comms(pid)))
        });
        let (maps, files, mm, gone, staged, comms) = match captured {
            Ok(x) => x,
            Err(e) => {
                // The unit may have been killed under our hands: then its end is reported next.
                self.tracker.forget();
                // SAFETY: asks whether our own child still exists.
                let gone = unsafe { libc::kill(pid, 0) } != 0 || self.is_dying(pid);
                return Err(if gone { Halt::Died } else { Halt::Broken(format!("checkpoint: {e}")) });
            }
        };
        crate::fault::point("checkpoint-copied", self.pid);
        {
            let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
            pages.drop_runs(&gone);
            pages.commit(&staged).map_err(broken("keeping pages"))?;
        }
        self.follow_limits();
        self.model.objects = self.look_at_objects(false);
        self.model.outside = self.standby.as_ref().and_then(|_| self.outside.to_bytes().ok());
        self.model.blocked.clear();
        self.model.user.clear();
        for (vtid, t) in &self.threads {
            match &t.state {
                State::Blocked(w) => self.model.blocked.push((*vtid, w.clone())),
                State::User => self.model.user.push(*vtid),
                State::Entry | State::Running => {}
            }
        }
        let mut threads = Vec::new();
        for (vtid, t) in &self.threads {
            let mut regs = t.regs;
            if t.state != State::User {
                regs.rip -= 2;
                regs.rax = regs.orig_rax;
            }
            regs.orig_rax = u64::MAX;
            if self.uses_shim() {
                // The program has not set it.
                regs.gs_base = 0;
            }
            threads.push(ThreadState {
                tid: *vtid,
                comm: comms.iter().find(|(tid, _)| *tid == t.tid).map_or(String::new(), |(_, c)| c.clone()),
                regs: tracee::regs_to_words(&regs),
                xstate: t.xstate.clone().unwrap_or_default(),
                sigmask: match t.own_mask {
                    Some(mask) => mask,
                    None => self.masks.get(vtid).copied().unwrap_or(0),
                },
                altstack: t.altstack,
                clear_child_tid: t.clear_tid,
                robust_list: t.robust,
            });
        }
        let main = threads.iter().position(|t| t.tid == self.vpid).unwrap_or(0);
        threads.swap(0, main);
        let snapshot = Arc::new(Snapshot {
            sii: self.sii,
            at_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
            incarnation: self.incarnation,
            maps,
            files,
            mm,
            threads,
            sigactions: self.model.actions.clone(),
            model: postcard::to_stdvec(&self.model).map_err(broken("encoding the model"))?,
        });
        (self.model.objects, self.model.outside) = (None, None);
        let irregular = self.model.irregular.take().is_some();
        let parent = self.snapshot.as_ref().map(|s| s.sii).filter(|sii| *sii != self.sii);
        self.snapshot = Some(Arc::clone(&snapshot));
        self.log.checkpointed();
        self.checkpoint_at = now();
        self.pause_ns = self.checkpoint_at - begin;
        let pages = staged.len() as u64;
        let slow_sites = self.slow_sites();
        {
            let mut status = crate::run::lock(&self.status);
            status.slow_sites = slow_sites;
            let pause_us = (now() - begin) / 1000;
            status.checkpoints.count += 1;
            status.checkpoints.bytes += staged.bytes();
            status.checkpoints.pause_us += pause_us;
            status.last_checkpoint = Some(crate::status::CheckpointInfo {
                sii: self.sii,
                pause_us,
                pages,
                bytes: staged.bytes(),
                at: crate::status::Timestamp::now(),
            });
        }
        tracing::debug!(sii = self.sii, pages, pause_us = self.pause_ns / 1000, "a checkpoint");
        let capture = Arc::new(Capture { snapshot, parent, staged, gone });
        if let Some(journal) = &mut self.journal {
            journal.checkpoint(&mut self.log, Arc::clone(&capture), &self.pages, wanted);
        }
        self.outlive(&capture, irregular)?;
        if wanted {
            self.shared.checkpoint.store(false, Relaxed);
            self.shared.checkpoints.fetch_add(1, SeqCst);
        }
        crate::fault::point("checkpoint-end", self.pid);
        Ok(())
    }

    /// Has a checkpoint kept for the next supervisor, complete when this returns if it is `irregular`. Without the first
    /// one the program is not started; a unit that runs goes on when there is no memory for it.
    pub(crate) fn outlive(&mut self, capture: &Arc<Capture>, irregular: bool) -> Result<()> {
        let Some(standby) = &self.standby else { return Ok(()) };
        match standby.checkpoint(&self.log, capture, &self.pages, irregular) {
            Err(why) if capture.snapshot.sii == 0 => return Err(Halt::Broken(why)),
            _told => {}
        }
        match &mut self.recorder {
            Some(recorder) => recorder.checkpoint(capture, &self.pages, irregular).map_err(Halt::Broken),
            None => Ok(()),
        }
    }

    /// The checkpoint before has been stored, if that is wanted and can be: the next one may be.
    pub(crate) fn can_store(&mut self) -> bool {
        self.journal.as_mut().is_none_or(|j| j.is_ready(self.snapshot.as_ref(), &self.pages))
    }

    /// The process (of the unit) has been killed, though its end has not been reported yet: it is on its way out (its
    /// memory goes before it becomes a zombie), or gone.
    pub(crate) fn is_dying(&self, pid: i32) -> bool {
        /// `flags` of proc_pid_stat(5): the thread is ending.
        const PF_EXITING: u64 = 4;
        self.service.run(move || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let mut fields = stat.rsplit_once(") ").map_or("X", |x| x.1).split_whitespace();
            let state = fields.next();
            // State is field 3, flags is field 9.
            let flags: u64 = fields.nth(5).and_then(|f| f.parse().ok()).unwrap_or(0);
            matches!(state, Some("Z" | "X") | None) || flags & PF_EXITING != 0
        })
    }

    /// Makes sure that extended state and mask of a thread are known.
    fn read_thread(&mut self, vtid: i32) -> Result<()> {
        if self.thread(vtid).place == Place::Waiting {
            self.unpark(vtid)?;
        }
        let t = self.thread(vtid);
        let tid = t.tid;
        let cached = t.xstate.is_some() && self.masks.contains_key(&vtid);
        if cached && self.thread(vtid).place == Place::Parked {
            return Ok(());
        }
        if self.thread(vtid).place == Place::Parked {
            self.unpark(vtid)?;
            let xstate = match self.thread(vtid).xstate.take() {
                Some(x) => x,
                None => tracee::get_xstate(tid)?,
            };
            self.thread(vtid).xstate = Some(xstate);
            self.masks.insert(vtid, tracee::get_sigmask(tid)?);
            return self.park(vtid);
        }
        let xstate = tracee::get_xstate(tid)?;
        self.thread(vtid).xstate = Some(xstate);
        self.masks.insert(vtid, tracee::get_sigmask(tid)?);
        Ok(())
    }

    /// Follows a change of resource limits.
    pub(crate) fn follow_limits(&mut self) {
        self.model.limits = limits::all_of(self.pid);
        // Descriptors are allocated by this process in the unit's name, or by the keeper. Only the soft limit counts there.
        if let Some(&(soft, _)) = self.model.limits.get(libc::RLIMIT_NOFILE as usize)
            && soft >= 64
        {
            let keeper = self.desk.filter(|_| self.standby.is_some()).map(|d| d.keeper.load(SeqCst));
            // Where descriptors are held this process needs more, and makes no calls.
            self.hold
                .is_none()
                .then_some(0)
                .into_iter()
                .chain(keeper)
                .for_each(|pid| limits::follow_numbers(pid, soft));
        }
    }

    /// Follows a change of credentials: files are accessed by this thread in the unit's name.
    pub(crate) fn follow_credentials(&mut self) -> Result<()> {
        let pid = self.pid;
        let credentials = self.service.run(move || read_credentials(pid)).map_err(broken("reading credentials"))?;
        self.apply_fs_credentials(&credentials)?;
        self.model.credentials = Some(credentials);
        Ok(())
    }

    /// Builds the process from the newest checkpoint. Every thread stands before a call or in user code.
    pub fn restore(&mut self) -> Result<()> {
        let snapshot = self.snapshot.clone().ok_or_else(|| Halt::Broken("there is no checkpoint".into()))?;
        self.mapped.restored(&snapshot.files);
        self.enter_table()?;
        self.threads.clear();
        self.vtids.clear();
        self.ready.clear();
        self.current = None;
        self.masks.clear();
        self.regenerated.clear();
        self.fault = None;
        self.unloggable = None;
        self.model = postcard::from_bytes(&snapshot.model).map_err(broken("decoding the model"))?;
        self.model.irregular = None;
        self.model.outside = None;
        let objects = self.model.objects.take();
        self.begin_cold(objects)?;
        self.cpu = self.model.cpu.or(self.cpu);
        self.shim = self.model.sites.used;
        self.bind_to_cpu();
        let want = (self.set_tid && self.vpid != 0).then_some(self.vpid);
        let locked = self.log.control().locked.load(SeqCst) != 0;
        let pid = launch::rebuild(&snapshot, &read(&self.pages), want, locked)?;
        self.pid = pid;
        if self.vpid == 0 {
            self.vpid = pid;
        }
        crate::fault::point("restore-memory", pid);
        // SAFETY: plain integers.
        let zero: user_regs_struct = unsafe { std::mem::zeroed() };
        let base = user_regs_struct { cs: 0x33, ss: 0x2b, eflags: 0x202, ..zero };
        for (i, state) in snapshot.threads.iter().enumerate() {
            // The first image was stored before its process had an id.
            let vtid = if state.tid == 0 { self.vpid } else { state.tid };
            let tid = if i == 0 { pid } else { launch::add_thread(pid, &base, self.set_tid.then_some(vtid))? };
            self.learn_id(tid, vtid);
            self.threads.insert(
                vtid,
                Thread {
                    tid,
                    slot: i + 1,
                    state: State::User,
                    place: Place::Stopped,
                    regs: tracee::words_to_regs(&state.regs),
                    own_mask: None,
                    xstate: None,
                    altstack: state.altstack,
                    clear_tid: state.clear_child_tid,
                    robust: state.robust_list,
                    yielded: false,
                    sent_back: 0,
                },
            );
        }
        self.map_shim(pid, &base)?;
        for m in snapshot.maps.iter().filter(|m| m.prot & libc::PROT_EXEC as u32 != 0) {
            self.note_code(&(m.start..m.end));
        }
        for page in &self.model.sites.guarded {
            self.note_code(&(*page..*page + 4096));
        }
        self.follow_sites();
        for vtid in self.threads.keys().copied().collect::<Vec<_>>() {
            self.give_area(vtid)?;
        }
        for state in &snapshot.threads {
            self.restore_thread(if state.tid == 0 { self.vpid } else { state.tid }, state, &base)?;
        }
        self.restore_limits_and_credentials(&base)?;
        self.shared.pid.store(pid, Relaxed);
        crate::run::lock(&self.status).pid = Some(pid);
        if let Some(desk) = self.desk {
            desk.pid.store(pid, SeqCst);
            desk.vpid.store(self.vpid, SeqCst);
        }
        for t in self.outside.timers.values_mut().chain(self.outside.itimers.values_mut()) {
            t.kernel_id = None;
        }
        self.new_tracker()?;
        if snapshot.threads.first().is_some_and(|t| t.tid == 0) {
            // Behind the tracker's back the next checkpoint would not have it.
            crate::systemd::environment::name_process(pid, &snapshot.mm, self.vpid)?;
        }
        let main = self.vpid;
        if !self.model.sites.judged {
            self.model.sites.judged = true;
            self.judge_code(main, 0..u64::MAX)?;
        }
        if self.shim {
            self.follow_counter()?;
        }
        crate::fault::point("restore-end", pid);
        self.sii = snapshot.sii;
        let user: Vec<i32> = self.model.user.iter().map(|v| if *v == 0 { self.vpid } else { *v }).collect();
        for vtid in self.threads.keys().copied().collect::<Vec<_>>() {
            if !user.contains(&vtid) {
                self.go_to_entry(vtid)?;
            }
        }
        for (vtid, waiting) in self.model.blocked.clone() {
            self.thread(vtid).state = State::Blocked(waiting);
        }
        Ok(())
    }

    /// Files of ours will be opened in the unit's table, to be mapped: until it runs.
    pub(crate) fn enter_table(&self) -> Result<()> {
        let Some(desk) = self.desk.filter(|d| self.standby.is_some() && d.entered_table().is_none()) else {
            return Ok(());
        };
        desk.enter_table(&self.open_numbers()?);
        Ok(())
    }

    /// What is open in the unit's table.
    pub(crate) fn open_numbers(&self) -> Result<Vec<i32>> {
        // SAFETY: no arguments.
        let tracer = unsafe { libc::gettid() };
        self.service.run(move || fds::list(tracer)).map_err(broken("listing the descriptors"))
    }

    fn restore_thread(&mut self, vtid: i32, state: &ThreadState, base: &user_regs_struct) -> Result<()> {
        let t = self.thread(vtid);
        let (tid, at) = (t.tid, GATE.slot(t.slot));
        let call = |nr: libc::c_long, args: [u64; 6]| launch::gate_call(tid, base, nr as u64, args, &mut |_| {});
        // Always, because the process has inherited the supervisor's own.
        let (sp, size, flags) = state.altstack;
        let flags = if size == 0 { libc::SS_DISABLE as u32 } else { flags & !1 };
        let mut bytes = sp.to_le_bytes().to_vec();
        bytes.extend_from_slice(&u64::from(flags).to_le_bytes());
        bytes.extend_from_slice(&size.to_le_bytes());
        tracee::write_mem(tid, at, &bytes)?;
        call(libc::SYS_sigaltstack, [at, 0, 0, 0, 0, 0])?;
        if state.clear_child_tid != 0 {
            call(libc::SYS_set_tid_address, [state.clear_child_tid, 0, 0, 0, 0, 0])?;
        }
        if state.robust_list.0 != 0 {
            call(libc::SYS_set_robust_list, [state.robust_list.0, state.robust_list.1, 0, 0, 0, 0])?;
        }
        let mut comm = state.comm.clone().into_bytes();
        comm.push(0);
        tracee::write_mem(tid, at, &comm)?;
        call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, at, 0, 0, 0, 0])?;
        tracee::set_xstate(tid, &state.xstate)?;
        tracee::set_sigmask(tid, state.sigmask)?;
        Ok(())
    }

    fn restore_limits_and_credentials(&mut self, base: &user_regs_struct) -> Result<()> {
        for (r, (soft, hard)) in self.model.limits.iter().enumerate() {
            let new = [*soft, *hard];
            crate::marshal::raw_call(
                libc::SYS_prlimit64 as u64,
                &[self.pid as u64, r as u64, new.as_ptr() as u64, 0, 0, 0],
            );
        }
        let Some(c) = self.model.credentials.clone() else { return Ok(()) };
        self.apply_fs_credentials(&c)?;
        for t in self.threads.values() {
            let groups: Vec<u8> = c.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
            let at = GATE.slot(t.slot);
            tracee::write_mem(t.tid, at, &groups)?;
            let [r, e, s] = c.gids.map(u64::from);
            let [ru, eu, su] = c.uids.map(u64::from);
            for (nr, args) in [
                (libc::SYS_setgroups, [c.groups.len() as u64, at, 0, 0, 0, 0]),
                (libc::SYS_setresgid, [r, e, s, 0, 0, 0]),
                (libc::SYS_setresuid, [ru, eu, su, 0, 0, 0]),
            ] {
                launch::gate_call(t.tid, base, nr as u64, args, &mut |_| {})?;
            }
        }
        Ok(())
    }

    /// File access in the unit's name, here and by the hands, follows its credentials.
    fn apply_fs_credentials(&self, c: &Credentials) -> Result<()> {
        // SAFETY: no arguments.
        if unsafe { libc::geteuid() } != 0 {
            return Ok(());
        }
        set_fs_credentials(c.uids[1], c.gids[1], &c.groups);
        if let Some(desk) = self.desk.filter(|_| self.standby.is_some()) {
            if c.groups.len() > GROUPS_MAX {
                return Err(Halt::Broken(format!("more than {GROUPS_MAX} supplementary groups")));
            }
            desk.owner.change(c.uids[1], c.gids[1], &c.groups);
        }
        Ok(())
    }

    /// Lets a thread that was saved before a call come to it again.
    fn go_to_entry(&mut self, vtid: i32) -> Result<()> {
        let t = self.thread(vtid);
        let (tid, regs) = (t.tid, t.regs);
        tracee::set_regs(tid, &regs)?;
        tracee::cont(tid, 0)?;
        loop {
            match tracee::wait_one(tid)? {
                Event::Seccomp => break,
                Event::Signal(_) => {
                    let info = tracee::get_siginfo(tid)?;
                    self.keep_signal(vtid, info);
                    tracee::cont(tid, 0)?;
                }
                Event::Ended(_) => return Err(Halt::Died),
                _ => tracee::cont(tid, 0)?,
            }
        }
        let regs = self.site_regs(vtid)?;
        let t = self.thread(vtid);
        t.regs = regs;
        t.state = State::Entry;
        Ok(())
    }

    /// Dirty-page tracking for a process that has just been filled from the store: what is written from here
    /// on differs from it.
    fn new_tracker(&mut self) -> Result<()> {
        // The old one owns a descriptor of the service thread's table: it must be closed there.
        let old = std::mem::replace(&mut self.tracker, Box::new(Full::new()));
        self.service.run(move || drop(old));
        self.tracker = match self.backend {
            Kind::WpAsync => {
                // Made inside the process, where it appears in the shared table, and taken from there.
                let main = self.vpid;
                let fd = self.gate(main, libc::SYS_userfaultfd, [UFFD_FLAGS as u64, 0, 0, 0, 0, 0])?;
                if fd < 0 {
                    Box::new(Full::new())
                } else {
                    let taken = self.service.run(move || fds::take(fd as i32));
                    // SAFETY: the number that the unit has just got; nobody else knows it.
                    unsafe { libc::close(fd as i32) };
                    let fd = taken.map_err(broken("taking the userfaultfd"))?;
                    let made = self.service.run(move || WpAsync::new(fd));
                    Box::new(made.map_err(broken("tracking dirty pages"))?)
                }
            }
            Kind::SoftDirty => Box::new(SoftDirty::new()),
            Kind::Full => Box::new(Full::new()),
        };
        if self.tracker.name() == Kind::Full.name() {
            return Ok(());
        }
        // The first scan arms. Its report, everything, is what the store holds.
        let (pid, pages, tracker) = (self.pid, &self.pages, &mut self.tracker);
        let armed = self.service.run(move || {
            let maps = program_maps(read_maps(pid)?);
            tracker.scan(pid, &maps, &read(pages)).map_err(std::io::Error::other)
        });
        if armed.is_err() {
            self.tracker.forget();
        }
        Ok(())
    }
}

/// Names of all threads.
fn comms(pid: i32) -> Vec<(i32, String)> {
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    dir.flatten()
        .filter_map(|e| {
            let tid = e.file_name().to_str()?.parse().ok()?;
            Some((tid, fs::read_to_string(e.path().join("comm")).ok()?.trim_end_matches('\n').to_owned()))
        })
        .collect()
}

pub(crate) fn read_credentials(pid: i32) -> std::io::Result<Credentials> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let numbers = |key: &str| -> Vec<u32> {
        status
            .lines()
            .find_map(|l| l.strip_prefix(key))
            .map(|l| l.split_whitespace().filter_map(|w| w.parse().ok()).collect())
            .unwrap_or_default()
    };
    let three =
        |v: Vec<u32>| [v.first().copied().unwrap_or(0), v.get(1).copied().unwrap_or(0), v.get(2).copied().unwrap_or(0)];
    Ok(Credentials { uids: three(numbers("Uid:")), gids: three(numbers("Gid:")), groups: numbers("Groups:") })
}

/// File access of the calling thread is in this name from now on.
pub(crate) fn set_fs_credentials(uid: u32, gid: u32, groups: &[u32]) {
    use crate::marshal::raw_call;
    raw_call(libc::SYS_setfsuid as u64, &[0; 6]);
    raw_call(libc::SYS_setgroups as u64, &[groups.len() as u64, groups.as_ptr() as u64, 0, 0, 0, 0]);
    raw_call(libc::SYS_setfsgid as u64, &[u64::from(gid), 0, 0, 0, 0, 0]);
    raw_call(libc::SYS_setfsuid as u64, &[u64::from(uid), 0, 0, 0, 0, 0]);
}

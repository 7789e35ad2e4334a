//! A program's image becomes the unit's first checkpoint: it is taken from a process that has just executed the
//! program, and which is not needed any more then.

use std::fs;
use std::sync::{Arc, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use ftrun_abi::fast::{REGION_BASE, REGION_END};
use ftrun_ckpt::copy::copy_in;
use ftrun_ckpt::dirty::{DirtyTracker, Full};
use ftrun_ckpt::maps::read_maps;
use ftrun_ckpt::state::{Snapshot, ThreadState};

use crate::capture::{Capture, broken, program_maps, read_credentials};
use crate::launch::{self, GATE};
use crate::tracee;
use crate::unit::{Halt, Model, Result, Unit, now};

impl Unit {
    /// Takes the first checkpoint from a process that stands before the first instruction of its image,
    /// and ends that process. Says why the checkpoint could not be stored, if it could not.
    pub fn adopt_image(&mut self, scratch: i32) -> Result<std::result::Result<(), String>> {
        if self.sii > 0 {
            crate::fault::point("exec-made", scratch);
        }
        let mut regs = tracee::get_regs(scratch)?;
        regs.rax = 0;
        regs.orig_rax = u64::MAX;
        let xstate = tracee::get_xstate(scratch)?;
        let sigmask = tracee::get_sigmask(scratch)?;
        let mapped = &mut self.mapped;
        let taken = self.service.run(|| -> std::io::Result<_> {
            let all = read_maps(scratch)?;
            let vdso = all.iter().find(|m| m.path == "[vdso]").map_or(0, |m| m.start);
            let maps = program_maps(all);
            let mut full = Full::new();
            let empty = ftrun_ckpt::pages::PageStore::new();
            let scan = full.scan(scratch, &maps, &empty).map_err(std::io::Error::other)?;
            let mem = fs::File::open(format!("/proc/{scratch}/mem"))?;
            let mut staged = copy_in(scratch, &scan.dirty, Some(&mem))?;
            mapped.restored(&[]);
            let files = mapped.follow(scratch, &maps, &empty, &mut staged)?.files;
            let status = fs::read_to_string(format!("/proc/{scratch}/status"))?;
            let comm = fs::read_to_string(format!("/proc/{scratch}/comm"))?.trim_end().to_owned();
            Ok((maps, files, vdso, staged, launch::read_mm(scratch, None)?, status, comm, read_credentials(scratch)?))
        });
        let (maps, files, vdso, staged, mut mm, status, comm, credentials) =
            taken.map_err(broken("reading the new image"))?;
        if maps.iter().any(|m| m.start < REGION_END && m.end > REGION_BASE) {
            return Err(Halt::Broken(format!("the program uses memory at {:#x}, which ftrun needs", GATE.base)));
        }
        if regs.cs != 0x33 {
            launch::kill_and_reap(scratch);
            return Err(Halt::Broken("this is a 32-bit program; ftrun runs 64-bit programs only".into()));
        }
        let ignored = status
            .lines()
            .find_map(|l| l.strip_prefix("SigIgn:"))
            .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
            .unwrap_or(0);
        if let Some(journal) = &self.journal {
            journal.before_checkpoint();
        }
        let mut pages = ftrun_ckpt::pages::PageStore::new();
        pages.commit(&staged).map_err(broken("keeping pages"))?;
        hide_vdso(&mut pages, &mut mm.auxv, regs.rsp, vdso).map_err(broken("hiding the vDSO"))?;
        self.pages = Arc::new(RwLock::new(pages));
        // Descriptors were closed: their numbers will be given to others.
        self.log.forget_fds(None, 0);
        let actions: Vec<[u64; 4]> = (1..=64)
            .map(|s| if s != 9 && s != 19 && ignored >> (s - 1) & 1 == 1 { [1, 0, 0, 0] } else { [0; 4] })
            .collect();
        self.note_all_changed();
        let objects = self.look_at_objects(self.sii == 0);
        self.model = Model {
            actions: actions.clone(),
            brk: mm.brk,
            user: vec![self.vpid],
            credentials: self.model.credentials.take().map(|_| credentials),
            // A supervisor that takes over may have other limits than the one that started the program.
            limits: if self.sii > 0 { self.model.limits.clone() } else { crate::limits::all_of(scratch) },
            irregular: Some("execve".into()),
            affinity: self.model.affinity.get(&self.vpid).map(|m| (self.vpid, m.clone())).into_iter().collect(),
            cpu: self.cpu,
            sites: crate::fast::Sites { used: self.shim, ..Default::default() },
            objects,
            outside: self.standby.as_ref().and_then(|_| self.outside.to_bytes().ok()),
            ..Model::default()
        };
        let snapshot = Snapshot {
            sii: self.sii,
            at_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
            incarnation: self.incarnation,
            maps,
            files,
            mm,
            threads: vec![ThreadState {
                tid: self.vpid,
                comm,
                regs: tracee::regs_to_words(&regs),
                xstate,
                sigmask,
                altstack: (0, 0, libc::SS_DISABLE as u32),
                clear_child_tid: 0,
                robust_list: (0, 0),
            }],
            sigactions: actions,
            model: postcard::to_stdvec(&self.model).map_err(broken("encoding the model"))?,
        };
        launch::kill_and_reap(scratch);
        let snapshot = Arc::new(snapshot);
        self.snapshot = Some(Arc::clone(&snapshot));
        self.log.checkpointed();
        self.checkpoint_at = now();
        let first = snapshot.sii == 0;
        let capture = Arc::new(Capture { snapshot, parent: None, staged, gone: vec![] });
        self.outlive(&capture, true)?;
        if let Some(journal) = &mut self.journal {
            if first {
                return Ok(journal.begin(&capture.snapshot, &self.pages));
            }
            journal.checkpoint(&mut self.log, capture, &self.pages, false);
        }
        Ok(Ok(()))
    }
}

/// Makes the auxiliary vector on the stack and in the kernel's copy forget the vDSO, so that time is asked
/// for by system calls. `sp` is the stack pointer at the first instruction (argc is there).
fn hide_vdso(pages: &mut ftrun_ckpt::pages::PageStore, auxv: &mut [u8], sp: u64, vdso: u64) -> std::io::Result<()> {
    const AT_IGNORE: u64 = 1;
    const AT_SYSINFO_EHDR: u64 = 33;
    for entry in auxv.chunks_exact_mut(16) {
        if entry[..8] == AT_SYSINFO_EHDR.to_le_bytes() {
            entry[..8].copy_from_slice(&AT_IGNORE.to_le_bytes());
        }
    }
    if vdso == 0 {
        return Ok(());
    }
    let word = |pages: &ftrun_ckpt::pages::PageStore, at: u64| -> u64 {
        let Some(page) = pages.get(at & !4095) else { return 0 };
        let o = (at & 4095) as usize;
        u64::from_le_bytes(page[o..o + 8].try_into().unwrap_or([0; 8]))
    };
    // argc, argv, NULL, envp, NULL, then the vector.
    let mut at = sp + 8 + (word(pages, sp) + 1) * 8;
    while word(pages, at) != 0 {
        at += 8;
    }
    at += 8;
    loop {
        let key = word(pages, at);
        if key == 0 {
            return Ok(());
        }
        if key == AT_SYSINFO_EHDR {
            let base = at & !4095;
            if let Some(page) = pages.get(base) {
                let mut copy = *page;
                let o = (at & 4095) as usize;
                copy[o..o + 8].copy_from_slice(&AT_IGNORE.to_le_bytes());
                pages.put(base, &copy)?;
            }
            return Ok(());
        }
        at += 16;
    }
}

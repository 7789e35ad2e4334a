//! Mapping files into a process that is stopped.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use ftrun_ckpt::files;
use ftrun_ckpt::pages::PageStore;
use ftrun_ckpt::state::Mapping;
use libc::user_regs_struct;

use crate::launch::{GATE, LaunchError, clone_through_gate, gate_call, sys};
use crate::service::outside_the_table;
use crate::tracee::{self, Event, Gate};

/// Who maps files into a process that is stopped. A file stands in the unit's table for the time of the calls that map it, while no
/// thread of the unit runs. But whatever closes a file in a table ends all record locks that the table's owner has of it
/// (fcntl(2)): where the unit has taken any, the calls are made by a further thread of the process, with a table of its own.
#[derive(Debug)]
pub struct Mapper {
    /// The thread that makes the calls.
    tid: i32,
    user: user_regs_struct,
    apart: bool,
    /// The file of the call before, kept open for the next one.
    open: Option<Open>,
    /// Signals that have come meanwhile.
    caught: Vec<tracee::SigInfo>,
}

/// A file that is open for calls.
#[derive(Debug)]
struct Open {
    fd: i32,
    /// Device and inode of the mappings that it is for.
    of: (u64, u64),
    _aside: Option<Aside>,
}

/// A file that is open in the table of the thread that opens files for the tracer: what has been looked at there is opened again by
/// whoever is to map it.
#[derive(Debug)]
pub struct Aside {
    file: Option<fs::File>,
    path: String,
}

impl Aside {
    /// Has a file opened there.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open<E: Send>(open: impl FnOnce() -> Result<Option<fs::File>, E> + Send) -> Result<Option<Self>, E> {
        outside_the_table(|| {
            let Some(file) = open()? else { return Ok(None) };
            // SAFETY: no arguments.
            let (pid, tid) = unsafe { (libc::getpid(), libc::gettid()) };
            let path = format!("/proc/{pid}/task/{tid}/fd/{}", file.as_raw_fd());
            Ok(Some(Self { file: Some(file), path }))
        })
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let file = self.file.take();
        outside_the_table(|| drop(file));
    }
}

impl Mapper {
    /// For the process with this main thread; `user` are registers to make calls on. `locked`: the unit has taken record locks.
    ///
    /// # Errors
    /// The process has died, or there can be no further thread.
    pub fn begin(main: i32, user: &user_regs_struct, locked: bool) -> Result<Self, LaunchError> {
        let mut mapper = Self { tid: main, user: *user, apart: locked, open: None, caught: Vec::new() };
        if locked {
            let flags =
                libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_SYSVSEM;
            let caught = &mut |info| mapper.caught.push(info);
            let made = clone_through_gate(main, user, flags as u64, [0; 4], None, caught)?;
            mapper.tid = made.map_err(sys("making a thread that maps files"))?;
            // Its table is a copy: the unit may have as many as its limit allows.
            mapper.call(libc::SYS_close_range, [0, u64::from(u32::MAX), 0, 0, 0, 0])?;
        }
        Ok(mapper)
    }

    /// Makes a call: what it returns.
    ///
    /// # Errors
    /// The process has died.
    pub fn call(&mut self, nr: libc::c_long, args: [u64; 6]) -> Result<i64, LaunchError> {
        Ok(gate_call(self.tid, &self.user, nr as u64, args, &mut |info| self.caught.push(info))?)
    }

    /// Opens what a mapping is to be made from; negative when there is nothing.
    ///
    /// # Errors
    /// The process has died, or the file has been replaced.
    pub fn open_for(
        &mut self,
        m: &Mapping,
        known: &[files::MappedFile],
        pages: &PageStore,
    ) -> Result<i32, LaunchError> {
        if m.inode == 0 {
            return Ok(-1);
        }
        if let Some(open) = self.open.as_ref().filter(|open| open.of == (m.dev, m.inode)) {
            return Ok(open.fd);
        }
        match Aside::open(|| files::open(m, known, pages))? {
            Some(aside) => self.open_aside(aside, &m.path, (m.dev, m.inode), m.shared),
            None => Ok(-1),
        }
    }

    /// Opens a file for calls; negative when it cannot be. It is closed when the next one is opened.
    ///
    /// # Errors
    /// The process has died.
    pub fn open(&mut self, path: &str, write: bool) -> Result<i32, LaunchError> {
        self.close()?;
        let fd = if self.apart { self.open_apart(path, write)? } else { open_mapped(path, write) };
        if fd >= 0 {
            self.open = Some(Open { fd, of: (0, 0), _aside: None });
        }
        Ok(fd)
    }

    /// The same of one that has been opened aside, by its `name` where the process may not reach it there.
    ///
    /// # Errors
    /// The process has died, or may not open it.
    pub fn open_aside(&mut self, aside: Aside, name: &str, of: (u64, u64), write: bool) -> Result<i32, LaunchError> {
        let mut fd = self.open(&aside.path, write)?;
        if fd < 0 && self.apart {
            fd = self.open(name, write)?;
        }
        if fd < 0 {
            return Err(sys(format!("opening {name} again"))(io::Error::last_os_error()));
        }
        if let Some(open) = &mut self.open {
            (open.of, open._aside) = (of, Some(aside));
        }
        Ok(fd)
    }

    fn open_apart(&mut self, path: &str, write: bool) -> Result<i32, LaunchError> {
        let bytes = [path.as_bytes(), &[0]].concat();
        if bytes.len() as u64 > Gate::SLOT_BYTES {
            return Ok(-1);
        }
        tracee::write_mem(self.tid, GATE.slot(0), &bytes)?;
        let modes = if write { &[libc::O_RDWR, libc::O_RDONLY][..] } else { &[libc::O_RDONLY] };
        let mut fd = -1;
        for mode in modes.iter().map(|mode| (mode | libc::O_CLOEXEC) as u64) {
            let at_cwd = libc::AT_FDCWD as i64 as u64;
            fd = self.call(libc::SYS_openat, [at_cwd, GATE.slot(0), mode, 0, 0, 0])?;
            if fd >= 0 {
                break;
            }
        }
        Ok(fd as i32)
    }

    fn close(&mut self) -> Result<(), LaunchError> {
        match self.open.take() {
            Some(open) if self.apart => self.call(libc::SYS_close, [open.fd as u64, 0, 0, 0, 0, 0]).map(drop),
            Some(open) => {
                // SAFETY: opened by `open`.
                unsafe { libc::close(open.fd) };
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Everything is mapped: the signals that have come meanwhile.
    ///
    /// # Errors
    /// The process has died.
    pub fn end(mut self) -> Result<Vec<tracee::SigInfo>, LaunchError> {
        self.close()?;
        if !self.apart {
            return Ok(std::mem::take(&mut self.caught));
        }
        tracee::set_regs(self.tid, &GATE.regs(&self.user, libc::SYS_exit as u64, [0; 6]))?;
        tracee::cont(self.tid, 0)?;
        loop {
            match tracee::wait_one(self.tid)? {
                Event::Ended(_) => return Ok(std::mem::take(&mut self.caught)),
                Event::Signal(_) => {
                    self.caught.push(tracee::get_siginfo(self.tid)?);
                    tracee::cont(self.tid, 0)?;
                }
                _ => tracee::cont(self.tid, 0)?,
            }
        }
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        if let Some(open) = self.open.take_if(|_| !self.apart) {
            // SAFETY: opened by `open`, of a process that has died since.
            unsafe { libc::close(open.fd) };
        }
    }
}

/// Opens a file to be mapped; negative when it cannot be.
pub fn open_mapped(path: &str, write: bool) -> i32 {
    let Ok(path) = CString::new(path) else { return -1 };
    let mode = if write { libc::O_RDWR } else { libc::O_RDONLY };
    // SAFETY: a NUL-terminated path.
    let fd = unsafe { libc::open(path.as_ptr(), mode | libc::O_CLOEXEC) };
    if fd < 0 && write {
        // SAFETY: as above; a mapping that is only read needs no more.
        return unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    }
    fd
}

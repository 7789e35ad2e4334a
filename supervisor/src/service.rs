//! A second thread for everything that needs descriptors of our own.
//!
//! The tracer's thread shares its descriptor table and its directory with the unit (ARCHITECTURE.md,
//! "One descriptor table"), so a file that it opened would appear in the program. Whatever needs one,
//! `/proc` files, images, sockets, runs here: this thread takes a private copy of the table and of
//! the directory first, and every other thread of the supervisor is started from it.

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};

type Job = Box<dyn FnOnce() + Send>;

/// Handle of the service thread.
#[derive(Debug, Clone)]
pub struct Service {
    jobs: Sender<Job>,
}

/// The tracer's.
static OURS: OnceLock<Service> = OnceLock::new();

/// Runs what opens files for a moment, for who has no handle: on the tracer's service thread. Without one (before there is a
/// unit, and where it is a shadow) nobody takes over what a killed tracer leaves.
pub fn outside_the_table<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    match OURS.get() {
        Some(service) => service.run(f),
        None => f(),
    }
}

impl Service {
    /// Starts the thread; returns when it has its own descriptor table.
    ///
    /// `unit_fds` are the descriptors that belong to the unit: they are closed in the private copy.
    pub fn start(unit_fds: Vec<i32>) -> std::io::Result<Self> {
        Self::thread(move || {
            // SAFETY: unshare concerns this thread alone.
            let r = unsafe { libc::unshare(libc::CLONE_FILES | libc::CLONE_FS) };
            let result = if r == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
            for fd in unit_fds {
                // SAFETY: nothing in the supervisor owns these numbers; they are the unit's.
                unsafe { libc::close(fd) };
            }
            result
        })
    }

    /// Starts a further thread that shares the descriptor table of the calling one.
    pub fn beside() -> std::io::Result<Self> {
        Self::thread(|| Ok(()))
    }

    fn thread(enter: impl FnOnce() -> std::io::Result<()> + Send + 'static) -> std::io::Result<Self> {
        let (jobs, queue): (Sender<Job>, Receiver<Job>) = channel();
        let (ready, wait) = channel();
        std::thread::Builder::new().name("ftrun-service".into()).spawn(move || {
            let result = enter();
            if ready.send(result).is_err() {
                return;
            }
            while let Ok(job) = queue.recv() {
                job();
            }
        })?;
        wait.recv().map_err(|_| std::io::Error::other("the service thread ended"))??;
        Ok(Self { jobs })
    }

    /// Has [`outside_the_table`] use this one, for as long as the process lives.
    pub fn be_the_tracers(&self) {
        OURS.get_or_init(|| self.clone());
    }

    /// Runs `f` on the service thread and waits for its result.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let (done, wait) = channel();
        let job: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
            // The receiver waits below, so sending cannot fail while this call lives.
            let _sent = done.send(f());
        });
        // SAFETY: only the lifetime changes. The job is run or dropped before `recv` returns, and this
        // function does not return before that, so everything it borrows outlives it.
        let job: Job = unsafe { std::mem::transmute(job) };
        if self.jobs.send(job).is_err() {
            panic!("the service thread is gone");
        }
        match wait.recv() {
            Ok(r) => r,
            Err(_) => panic!("the service thread dropped a job"),
        }
    }

    /// Queues `f` behind earlier jobs and returns at once.
    pub fn post(&self, f: impl FnOnce() + Send + 'static) {
        if self.jobs.send(Box::new(f)).is_err() {
            panic!("the service thread is gone");
        }
    }
}

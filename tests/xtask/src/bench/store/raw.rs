//! The limit: records of all writers go into one preallocated file by one thread, which syncs what has gathered. Nothing
//! is framed, checked, or found again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use ftrun_tests::{Error, error};

use super::Writer;

const FILE_BYTES: u64 = 256 << 20;

#[derive(Debug, Default)]
struct Queue {
    pending: Vec<u8>,
    /// Number of the group that is gathering; those below `done` are written.
    group: u64,
    done: u64,
    idle: bool,
    failed: Option<String>,
    ending: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    done: [Condvar; 2],
}

/// The file and its thread.
#[derive(Debug)]
pub(super) struct RawFile {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RawFile {
    pub(super) fn start(path: &Path, sync: bool) -> Result<Arc<Self>, Error> {
        let file = File::create(path)?;
        let zeros = vec![0; 1 << 20];
        for at in (0..FILE_BYTES).step_by(zeros.len()) {
            file.write_all_at(&zeros, at)?;
        }
        file.sync_all()?;
        let shared = Arc::new(Shared { queue: Mutex::default(), work: Condvar::new(), done: Default::default() });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || commit(&file, sync, &of_thread));
        Ok(Arc::new(Self { shared, thread: Some(thread) }))
    }

    pub(super) fn writer(&self) -> RawWriter {
        RawWriter { shared: Arc::clone(&self.shared), groups: std::collections::VecDeque::new() }
    }
}

impl Drop for RawFile {
    fn drop(&mut self) {
        lock(&self.shared).ending = true;
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.take() {
            // It says by `failed` what went wrong.
            let _ = thread.join();
        }
    }
}

fn commit(file: &File, sync: bool, shared: &Shared) {
    let (mut buffer, mut at) = (Vec::new(), 0);
    loop {
        let group = {
            let mut queue = lock(shared);
            while queue.pending.is_empty() {
                if queue.ending {
                    return;
                }
                queue.idle = true;
                queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            queue.idle = false;
            std::mem::swap(&mut queue.pending, &mut buffer);
            queue.group += 1;
            queue.group - 1
        };
        if at + buffer.len() as u64 > FILE_BYTES {
            at = 0;
        }
        let mut result = file.write_all_at(&buffer, at);
        if sync {
            result = result.and_then(|()| file.sync_data());
        }
        at += buffer.len() as u64;
        buffer.clear();
        let mut queue = lock(shared);
        queue.failed = result.err().map(|e| e.to_string());
        queue.done = group + 1;
        drop(queue);
        shared.done[(group % 2) as usize].notify_all();
    }
}

/// One writer.
#[derive(Debug)]
pub(super) struct RawWriter {
    shared: Arc<Shared>,
    /// Record and group of what has not been waited for.
    groups: std::collections::VecDeque<(u64, u64)>,
}

impl Writer for RawWriter {
    fn append(&mut self, n: u64, record: &[u8]) -> Result<(), Error> {
        let mut queue = lock(&self.shared);
        queue.pending.extend_from_slice(record);
        self.groups.push_back((n, queue.group));
        if queue.idle {
            queue.idle = false;
            self.shared.work.notify_one();
        }
        Ok(())
    }

    fn wait(&mut self, n: u64) -> Result<(), Error> {
        let mut last = None;
        while let Some((_, group)) = self.groups.pop_front_if(|(record, _)| *record <= n) {
            last = Some(group);
        }
        let Some(group) = last else { return Ok(()) };
        let mut queue = lock(&self.shared);
        while queue.done <= group {
            queue = self.shared.done[(group % 2) as usize].wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.failed.as_ref().map_or(Ok(()), |e| Err(error!("the raw file: {e}")))
    }
}

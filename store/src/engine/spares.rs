//! Files that are ready to become segments.

use std::collections::VecDeque;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::stream::Which;
use super::{Failure, lock};
use crate::disk::{Disk, DiskFile};

/// Files kept for the next segments; more are removed.
const KEPT: usize = 3;
const ZEROS: usize = 1 << 20;

/// The files, and a thread that makes them before they are needed.
#[derive(Debug)]
pub(super) struct Spares {
    disk: Arc<dyn Disk>,
    first_size: u64,
    size_max: u64,
    pool: Mutex<Pool>,
    /// The thread has made what it was making.
    made: Condvar,
    /// Sizes that will be needed; without it files are made when they are.
    ahead: Mutex<Option<Sender<u64>>>,
}

#[derive(Debug, Default)]
struct Pool {
    ready: VecDeque<(String, u64)>,
    /// Names that were used.
    made: u64,
    /// Size of the file that the thread is making.
    making: u64,
    /// There was no space for the file that should be ready by now.
    full: bool,
}

impl Spares {
    /// `first_size` is the size of the first segment of a stream; each next one is twice as large, up to `size_max`.
    pub(super) fn new(disk: Arc<dyn Disk>, first_size: u64, size_max: u64) -> Self {
        Self { disk, first_size, size_max, pool: Mutex::default(), made: Condvar::new(), ahead: Mutex::new(None) }
    }

    /// Makes files on a thread of its own from now on; ends with [`Spares::stop`].
    pub(super) fn start(self: &Arc<Self>) -> std::io::Result<std::thread::JoinHandle<()>> {
        let (sender, receiver) = channel::<u64>();
        *lock(&self.ahead) = Some(sender);
        let spares = Arc::clone(self);
        std::thread::Builder::new().name("store-spares".into()).spawn(move || {
            while let Ok(size) = receiver.recv() {
                {
                    let mut pool = lock(&spares.pool);
                    if pool.ready.iter().any(|(_, have)| *have >= size) {
                        continue;
                    }
                    pool.making = size;
                }
                let made = spares.make(size);
                let mut pool = lock(&spares.pool);
                pool.making = 0;
                spares.made.notify_all();
                pool.full = matches!(&made, Err(failure) if failure.full);
                // Any other failure is met by whoever needs the file.
                pool.ready.extend(made);
            }
        })
    }

    pub(super) fn stop(&self) {
        *lock(&self.ahead) = None;
    }

    pub(super) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub(super) fn first_size(&self) -> u64 {
        self.first_size
    }

    pub(super) fn size_max(&self) -> u64 {
        self.size_max
    }

    /// Has a file of this size made.
    pub(super) fn ask(&self, size: u64) {
        if let Some(ahead) = &*lock(&self.ahead) {
            // The thread ends after this value does.
            let _ = ahead.send(size);
        }
    }

    /// The last attempt to have a file ready found no space. Tries again.
    pub(super) fn is_full(&self) -> bool {
        let full = lock(&self.pool).full;
        if full {
            self.ask(self.first_size);
        }
        full
    }

    /// Files that a crash has left: they are not known to be whole.
    pub(super) fn is_spare(name: &str) -> bool {
        name.starts_with("free-")
    }

    fn make(&self, size: u64) -> Result<(String, u64), Failure> {
        let name = {
            let mut pool = lock(&self.pool);
            pool.made += 1;
            format!("free-{:016x}", pool.made)
        };
        let fill = || {
            let file = self.disk.create(&name)?;
            let zeros = vec![0; ZEROS.min(usize::try_from(size).unwrap_or(ZEROS))];
            let mut at = 0;
            while at < size {
                let n = (size - at).min(zeros.len() as u64);
                file.write_at(&zeros[..usize::try_from(n).expect("at most the zeros")], at)?;
                at += n;
            }
            file.sync()
        };
        fill().map_err(|e: std::io::Error| {
            // What there is of it is in the way only; opening the store removes it, too.
            let _ = self.disk.remove(&name);
            Failure::new("make a segment", &name, &e)
        })?;
        Ok((name, size))
    }

    /// A file of at least this size as segment `number`, its name durable.
    pub(super) fn take(&self, number: u64, size: u64) -> Result<(Arc<dyn DiskFile>, u64), Failure> {
        let ready = {
            let mut pool = lock(&self.pool);
            let fits = |(_, have): &(String, u64)| *have >= size;
            while !pool.ready.iter().any(fits) && pool.making >= size {
                pool = self.made.wait(pool).unwrap_or_else(PoisonError::into_inner);
            }
            let fitting = pool.ready.iter().position(fits);
            fitting.and_then(|i| pool.ready.remove(i))
        };
        let (name, size) = match ready {
            Some(ready) => ready,
            None => self.make(size)?,
        };
        let to = Which::file_name(number);
        let renamed = self.disk.rename(&name, &to).and_then(|()| self.disk.sync());
        renamed.map_err(|e| Failure::new("rename", &name, &e))?;
        let file = self.disk.open(&to).map_err(|e| Failure::new("open", &to, &e))?;
        Ok((file, size))
    }

    /// Takes over the file of a segment that is not needed. Only one that is large is worth keeping.
    pub(super) fn give_back(&self, disk: &dyn Disk, number: u64, bytes: u64) -> Result<(), Failure> {
        let name = Which::file_name(number);
        let (keep, small) = {
            let mut pool = lock(&self.pool);
            // A small one, left from the time when segments were, is in the way of one that can be used.
            let small = pool.ready.iter().position(|(_, have)| *have < self.size_max);
            let small = small.filter(|_| pool.ready.len() >= KEPT).and_then(|i| pool.ready.remove(i));
            let keep = pool.ready.len() < KEPT && bytes >= self.size_max;
            pool.made += u64::from(keep);
            (keep.then(|| format!("free-{:016x}", pool.made)), small)
        };
        if let Some((small, _)) = small {
            disk.remove(&small).map_err(|e| Failure::new("remove", &small, &e))?;
        }
        let done = match &keep {
            Some(spare) => disk.rename(&name, spare),
            None => disk.remove(&name),
        };
        done.map_err(|e| Failure::new("give back", &name, &e))?;
        if let Some(spare) = keep {
            lock(&self.pool).ready.push_back((spare, bytes));
        }
        lock(&self.pool).full = false;
        Ok(())
    }
}

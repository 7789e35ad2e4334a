//! A disk in memory that does what real ones do at the worst moment.
//!
//! Contents and directory are kept twice: as a process sees them now, and as they are durable. What was written
//! since the last sync survives a loss of power by sectors, each on its own (torn and reordered
//! writes); of directory changes a prefix survives. A failed sync drops dirty data for good and keeps them visible, as Linux
//! does. Everything random follows a seed.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::{Disk, DiskFile};

/// What survives a loss of power as one.
pub const SECTOR_BYTES: usize = 512;

/// What goes wrong, by the number of the operation (writes, syncs, creations, renames, removals, cuts; from 0).
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The process dies in this operation, which is done in part; every later one fails.
    pub die_at: Option<u64>,
    /// Writes from this operation on fail with EIO, having been done in part.
    pub write_error_at: Option<u64>,
    /// The first sync at or after this operation fails with EIO.
    pub sync_error_at: Option<u64>,
    /// The disk becomes read-only with this operation.
    pub read_only_at: Option<u64>,
    /// Bytes that all files together may have.
    pub space: Option<u64>,
    /// Every write and sync takes this long.
    pub slow: Duration,
}

/// A disk in memory; clones are the same disk.
#[derive(Clone, Debug)]
pub struct FaultDisk {
    world: Arc<Mutex<World>>,
}

#[derive(Debug)]
struct World {
    faults: Faults,
    operations: u64,
    dead: bool,
    random: u64,
    next_inode: u64,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    /// Names as they were after each directory change since the last sync.
    changes: Vec<BTreeMap<String, u64>>,
    inodes: BTreeMap<u64, Inode>,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

#[derive(Debug)]
struct FaultFile {
    world: Arc<Mutex<World>>,
    inode: u64,
}

fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn os(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

const EIO: i32 = 5;
const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;

/// How an operation ends.
enum Fate {
    Done,
    /// Done in part, then this error.
    Torn(io::Error),
}

impl World {
    fn draw(&mut self, below: u64) -> u64 {
        // xorshift64*, Vigna 2016.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) % below.max(1)
    }

    fn begin(&mut self, write: bool) -> io::Result<Fate> {
        if self.dead {
            return Err(io::Error::other("the process is dead"));
        }
        let number = self.operations;
        self.operations += 1;
        if self.faults.read_only_at.is_some_and(|at| number >= at) {
            return Err(os(EROFS));
        }
        if self.faults.die_at.is_some_and(|at| number >= at) {
            self.dead = true;
            return Ok(Fate::Torn(io::Error::other("the process is dead")));
        }
        if write && self.faults.write_error_at.is_some_and(|at| number >= at) {
            return Ok(Fate::Torn(os(EIO)));
        }
        Ok(Fate::Done)
    }

    fn directory(&mut self, change: impl FnOnce(&mut BTreeMap<String, u64>) -> io::Result<()>) -> io::Result<()> {
        let fate = self.begin(false)?;
        let done = !matches!(fate, Fate::Torn(_)) || self.draw(2) == 0;
        if done {
            change(&mut self.names)?;
            let names = self.names.clone();
            self.changes.push(names);
        }
        match fate {
            Fate::Done => Ok(()),
            Fate::Torn(e) => Err(e),
        }
    }

    fn used(&self) -> u64 {
        self.names.values().filter_map(|i| self.inodes.get(i)).map(|i| i.now.len() as u64).sum()
    }
}

fn apply(content: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let (from, to) = (offset as usize, offset as usize + data.len());
    if content.len() < to {
        content.resize(to, 0);
    }
    content[from..to].copy_from_slice(data);
}

impl FaultDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> Self {
        let world = World {
            faults: Faults::default(),
            operations: 0,
            dead: false,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            next_inode: 1,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            changes: Vec::new(),
            inodes: BTreeMap::new(),
        };
        Self { world: Arc::new(Mutex::new(world)) }
    }

    /// Says what will go wrong; operations count from now on.
    pub fn arm(&self, faults: Faults) {
        let mut world = lock(&self.world);
        world.faults = faults;
        world.operations = 0;
    }

    /// Operations since [`FaultDisk::arm`].
    pub fn operations(&self) -> u64 {
        lock(&self.world).operations
    }

    /// The process is dead and the disk has lost power: what was not synced survives by chance.
    pub fn lose_power(&self) {
        let world = &mut *lock(&self.world);
        let kept = world.draw(world.changes.len() as u64 + 1) as usize;
        if kept > 0 {
            world.durable_names = world.changes[kept - 1].clone();
        }
        world.names = world.durable_names.clone();
        world.changes.clear();
        // Sometimes nothing or everything, mostly something in between.
        let chance = [0, 1, 2, 3, 4][world.draw(5) as usize];
        let mut inodes = std::mem::take(&mut world.inodes);
        inodes.retain(|inode, _| world.names.values().any(|i| i == inode));
        for inode in inodes.values_mut() {
            for change in std::mem::take(&mut inode.pending) {
                match change {
                    Change::Length(len) if world.draw(4) < chance => inode.durable.resize(len as usize, 0),
                    Change::Length(_) => {}
                    Change::Write(offset, data) => {
                        let mut at = 0;
                        while at < data.len() {
                            let sector_end = SECTOR_BYTES - (offset as usize + at) % SECTOR_BYTES;
                            let end = data.len().min(at + sector_end);
                            if world.draw(4) < chance {
                                apply(&mut inode.durable, offset + at as u64, &data[at..end]);
                            }
                            at = end;
                        }
                    }
                }
            }
            inode.now = inode.durable.clone();
        }
        world.inodes = inodes;
        self.revive(world);
    }

    /// The process is dead; the page cache is as it was.
    pub fn kill(&self) {
        let world = &mut *lock(&self.world);
        self.revive(world);
    }

    #[expect(clippy::unused_self, reason = "reads as what it is")]
    fn revive(&self, world: &mut World) {
        world.dead = false;
        world.faults = Faults::default();
        world.operations = 0;
    }

    /// A copy of what is there now.
    pub fn copy(&self, seed: u64) -> Self {
        let world = lock(&self.world);
        let copy = Self::new(seed);
        {
            let mut other = lock(&copy.world);
            other.names = world.names.clone();
            other.durable_names = world.names.clone();
            other.next_inode = world.next_inode;
            let whole = |i: &Inode| Inode { now: i.now.clone(), durable: i.now.clone(), pending: Vec::new() };
            other.inodes = world.inodes.iter().map(|(n, i)| (*n, whole(i))).collect();
        }
        copy
    }

    /// The content of a file.
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let world = lock(&self.world);
        world.inodes.get(world.names.get(name)?).map(|i| i.now.clone())
    }

    /// Changes stored bytes behind everybody's back.
    pub fn damage(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut world = lock(&self.world);
        let inode = world.names.get(name).copied();
        if let Some(inode) = inode.and_then(|i| world.inodes.get_mut(&i)) {
            change(&mut inode.now);
            inode.durable = inode.now.clone();
            inode.pending.clear();
        }
    }

    fn file(&self, inode: u64) -> Arc<dyn DiskFile> {
        Arc::new(FaultFile { world: Arc::clone(&self.world), inode })
    }
}

impl Disk for FaultDisk {
    fn name(&self) -> String {
        "the test disk".to_owned()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(lock(&self.world).names.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let inode = lock(&self.world).names.get(name).copied();
        inode.map(|i| self.file(i)).ok_or_else(|| os(ENOENT))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut world = lock(&self.world);
        if world.names.contains_key(name) {
            return Err(os(EEXIST));
        }
        let inode = world.next_inode;
        world.next_inode += 1;
        world.inodes.insert(inode, Inode::default());
        world.directory(|names| {
            names.insert(name.to_owned(), inode);
            Ok(())
        })?;
        drop(world);
        Ok(self.file(inode))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        lock(&self.world).directory(|names| {
            let inode = names.remove(from).ok_or_else(|| os(ENOENT))?;
            names.insert(to.to_owned(), inode);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        lock(&self.world).directory(|names| names.remove(name).map(drop).ok_or_else(|| os(ENOENT)))
    }

    fn sync(&self) -> io::Result<()> {
        let world = &mut *lock(&self.world);
        match world.begin(false)? {
            Fate::Torn(e) => Err(e),
            Fate::Done => {
                if world.faults.sync_error_at.is_some_and(|at| world.operations > at) {
                    world.faults.sync_error_at = None;
                    return Err(os(EIO));
                }
                world.durable_names = world.names.clone();
                world.changes.clear();
                Ok(())
            }
        }
    }
}

impl FaultFile {
    fn with<T>(&self, work: impl FnOnce(&mut World, &mut Inode) -> io::Result<T>) -> io::Result<T> {
        let world = &mut *lock(&self.world);
        // A file that was removed lives while it is open.
        let mut inode = world.inodes.remove(&self.inode).unwrap_or_default();
        let result = work(world, &mut inode);
        world.inodes.insert(self.inode, inode);
        result
    }
}

impl DiskFile for FaultFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|_, inode| {
            let from = inode.now.len().min(offset as usize);
            let n = buf.len().min(inode.now.len() - from);
            buf[..n].copy_from_slice(&inode.now[from..from + n]);
            Ok(n)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let slow = lock(&self.world).faults.slow;
        std::thread::sleep(slow);
        let mut fate = None;
        self.with(|world, inode| {
            let used = world.used() + inode.now.len() as u64;
            let more = (offset + buf.len() as u64).saturating_sub(inode.now.len() as u64);
            let begun = world.begin(true)?;
            let part = match &begun {
                Fate::Done if world.faults.space.is_some_and(|space| used + more > space) => {
                    fate = Some(os(ENOSPC));
                    world.draw(buf.len() as u64) as usize
                }
                Fate::Done => buf.len(),
                Fate::Torn(_) => world.draw(buf.len() as u64 + 1) as usize,
            };
            apply(&mut inode.now, offset, &buf[..part]);
            inode.pending.push(Change::Write(offset, buf[..part].to_vec()));
            if let Fate::Torn(e) = begun {
                fate = Some(e);
            }
            Ok(())
        })?;
        fate.map_or(Ok(()), Err)
    }

    fn sync(&self) -> io::Result<()> {
        let slow = lock(&self.world).faults.slow;
        std::thread::sleep(slow);
        self.with(|world, inode| match world.begin(false)? {
            Fate::Torn(e) => Err(e),
            Fate::Done => {
                if world.faults.sync_error_at.is_some_and(|at| world.operations > at) {
                    world.faults.sync_error_at = None;
                    inode.pending.clear();
                    return Err(os(EIO));
                }
                // Only what is dirty is written: what an earlier, failed sync has dropped is not.
                for change in inode.pending.drain(..) {
                    match change {
                        Change::Write(offset, data) => apply(&mut inode.durable, offset, &data),
                        Change::Length(len) => inode.durable.resize(len as usize, 0),
                    }
                }
                Ok(())
            }
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|_, inode| Ok(inode.now.len() as u64))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|world, inode| {
            if let Fate::Torn(e) = world.begin(true)? {
                return Err(e);
            }
            inode.now.resize(len as usize, 0);
            inode.pending.push(Change::Length(len));
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_survives_and_the_rest_by_sectors() {
        let mut torn = 0;
        for seed in 0..200 {
            let disk = FaultDisk::new(seed);
            let file = disk.create("a").unwrap();
            file.write_at(&[1; 4096], 0).unwrap();
            file.sync().unwrap();
            disk.sync().unwrap();
            file.write_at(&[2; 4096], 0).unwrap();
            disk.create("b").unwrap();
            disk.lose_power();
            let content = disk.content("a").unwrap();
            assert!(content.chunks(SECTOR_BYTES).all(|s| s == [1; SECTOR_BYTES] || s == [2; SECTOR_BYTES]));
            torn += usize::from(content.contains(&1) && content.contains(&2));
        }
        assert!(torn > 20, "{torn}");
    }

    #[test]
    fn a_failed_sync_loses_what_it_was_to_write_and_the_next_one_succeeds() {
        let disk = FaultDisk::new(1);
        let file = disk.create("a").unwrap();
        disk.sync().unwrap();
        disk.arm(Faults { sync_error_at: Some(1), ..Faults::default() });
        file.write_at(b"x", 0).unwrap();
        assert!(file.sync().is_err());
        file.sync().unwrap();
        let mut byte = [0];
        assert_eq!(file.read_at(&mut byte, 0).unwrap(), 1);
        disk.lose_power();
        assert_eq!(disk.content("a").unwrap(), b"");
    }
}

//! What proc(5) says about the unit itself: paths to it, and descriptors of it.
//!
//! The program knows its process and its threads by ids that stay; the kernel's change where it doesn't let us choose
//! them. And whoever makes a call in the unit's place has a `/proc/self` of its own. So ids in paths are translated,
//! both ways. A descriptor of a file below `/proc/PID` is bound to the process that had the id when it was opened, and
//! to none that comes after it with the same id: it is opened again when the unit has another process.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::fds;
use crate::unit::Unit;

/// Where proc(5) is.
const PROC: &str = "/proc/";
/// Of a file whose process, or whose name, is gone.
const DELETED: &[u8] = b" (deleted)";

/// The path with the ids in `/proc/ID` and `/proc/ID/task/ID` translated; `None` if it isn't one of those, or the first
/// is nobody's of whom `id` knows.
fn translate(path: &[u8], id: impl Fn(i32) -> Option<i32>) -> Option<Vec<u8>> {
    let number = |part: &[u8]| id(std::str::from_utf8(part).ok()?.parse().ok()?);
    let mut parts = path.strip_prefix(PROC.as_bytes())?.split(|b| *b == b'/');
    let mut new = format!("{PROC}{}", number(parts.next()?)?).into_bytes();
    let mut of_threads = false;
    for (i, part) in parts.enumerate() {
        new.push(b'/');
        match number(part) {
            Some(id) if i == 1 && of_threads => new.extend_from_slice(id.to_string().as_bytes()),
            _ => new.extend_from_slice(part),
        }
        of_threads = i == 0 && part == b"task";
    }
    Some(new)
}

/// The same file as the unit's thread `tid` of process `pid` would find. `id` tells the kernel's id of one that the
/// program knows.
///
/// Descriptors are shared, so one below `/dev/fd` and `/proc/self/fd` is the same for whoever makes the call.
fn of_the_unit(path: Vec<u8>, pid: i32, tid: i32, id: impl Fn(i32) -> Option<i32>) -> Vec<u8> {
    let below = |directory: &str| {
        let rest = path.strip_prefix(directory.as_bytes())?;
        (rest.is_empty() || rest[0] == b'/').then_some(rest)
    };
    let with = |directory: String, rest: &[u8]| [directory.as_bytes(), rest].concat();
    let parts = |rest: &[u8]| rest.split(|b| *b == b'/').filter(|part| !part.is_empty()).count();
    if let Some(rest) = below("/proc/self") {
        let one_of_them = rest.starts_with(b"/fd") && parts(rest) > 1;
        return if one_of_them { path } else { with(format!("{PROC}{pid}"), rest) };
    }
    if let Some(rest) = below("/proc/thread-self") {
        return with(format!("{PROC}{pid}/task/{tid}"), rest);
    }
    match below("/dev/fd") {
        Some(rest) if parts(rest) == 0 => with(format!("{PROC}{pid}/fd"), rest),
        _ => translate(&path, id).unwrap_or(path),
    }
}

/// Where a descriptor of the calling thread's table leads, if that is below [`PROC`].
fn leads_to(fd: i32) -> Option<Vec<u8>> {
    // SAFETY: plain integers, for which zero is valid; the structure outlives the call.
    let there = unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        libc::fstatfs(fd, &raw mut fs) == 0 && fs.f_type == libc::PROC_SUPER_MAGIC
    };
    let link = there.then(|| std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).ok())??;
    let link = link.into_os_string().into_vec();
    Some(link.strip_suffix(DELETED).map(<[u8]>::to_vec).unwrap_or(link))
}

/// What can be polled (`mounts`, `net/tcp`) is about the process's surroundings and goes on without it; it may be in an
/// epoll set, too, and has to stay what it is.
fn outlives_its_process(set: &OwnedFd, fd: i32) -> bool {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: plain numbers, and a structure that outlives the calls.
    unsafe {
        let entered = libc::epoll_ctl(set.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) == 0;
        entered && libc::epoll_ctl(set.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, &raw mut event) == 0
    }
}

/// Opens `path` as `fd` is opened, in its position.
fn open_like(fd: i32, path: &[u8]) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(path)?;
    // SAFETY: a string that outlives the call, and plain numbers; the result is owned by nobody else.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        let position = libc::lseek(fd, 0, libc::SEEK_CUR);
        let new = libc::open(path.as_ptr(), flags | libc::O_CLOEXEC);
        if new < 0 {
            return Err(io::Error::last_os_error());
        }
        let new = OwnedFd::from_raw_fd(new);
        // What has no position refuses one; `mem` has the address there, which may be a negative number.
        libc::lseek(new.as_raw_fd(), position, libc::SEEK_SET);
        Ok(new)
    }
}

/// Puts what was opened in the place of these numbers, for process `pid`.
fn put(new: &OwnedFd, numbers: &[i32], pid: i32) {
    for fd in numbers {
        // SAFETY: numbers of the calling thread's table, in which nobody else opens anything now.
        unsafe {
            let on_exec = libc::fcntl(*fd, libc::F_GETFD) & libc::FD_CLOEXEC != 0;
            libc::dup3(new.as_raw_fd(), *fd, if on_exec { libc::O_CLOEXEC } else { 0 });
        }
        crate::fault::point("itself-opened", pid);
    }
}

/// The program's ids of threads by the kernel's.
#[derive(Debug)]
pub struct Ids(HashMap<i32, i32>);

impl Ids {
    /// A path that a file of the unit's has, with the ids that the program knows, which stay.
    pub(crate) fn lasting_path(&self, path: &[u8]) -> Option<Vec<u8>> {
        translate(path, |tid| self.0.get(&tid).copied())
    }
}

impl Unit {
    /// A path as the calling thread means it.
    pub(crate) fn path_of(&self, vtid: i32, path: Vec<u8>) -> Vec<u8> {
        of_the_unit(path, self.pid, self.tid(vtid), |id| self.threads.get(&id).map(|t| t.tid))
    }

    /// The unit has a thread with this id, which the program knows by that one.
    pub(crate) fn learn_id(&mut self, tid: i32, vtid: i32) {
        self.vtids.insert(tid, vtid);
        if tid != vtid {
            self.outside.ids.insert(tid, vtid);
        }
    }

    /// The ids of all threads that the unit has, and of those that it has had and that a descriptor may name.
    pub(crate) fn ids(&self) -> Ids {
        let same = self.threads.keys().map(|id| (*id, *id));
        Ids(same.chain(self.outside.ids.iter().map(|(tid, vtid)| (*tid, *vtid))).collect())
    }

    /// A path with the ids that the program knows, as the kernel has it now.
    pub(crate) fn path_now(&self, path: &Path) -> Option<PathBuf> {
        let now = translate(path.as_os_str().as_bytes(), |id| self.threads.get(&id).map(|t| t.tid))?;
        Some(PathBuf::from(std::ffi::OsString::from_vec(now)))
    }

    /// The descriptors in the calling thread's table that say something about a process that the unit has had are opened
    /// again, for the one that it has now. All its threads are there.
    ///
    /// Each changes at once (dup2(2)), and for whom they may be open, and which are copies, is kept before: whoever dies in the
    /// middle has left it to the next.
    pub(crate) fn open_itself_again(&mut self) -> io::Result<()> {
        let ids = self.ids();
        let kernel_id = |tid| self.threads.get(ids.0.get(&tid)?).map(|t| t.tid);
        // SAFETY: no arguments; a plain number. The result is owned by nobody else.
        let (us, set) = unsafe { (libc::gettid(), libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let set = unsafe { OwnedFd::from_raw_fd(set) };
        let mut gone: Vec<(i32, Vec<u8>)> = Vec::new();
        let mut stay: Vec<Vec<u8>> = Vec::new();
        for fd in fds::list(us)? {
            let Some(link) = leads_to(fd) else { continue };
            match translate(&link, kernel_id) {
                Some(now) if !outlives_its_process(&set, fd) => gone.push((fd, now)),
                _ => stay.push(link),
            }
        }
        drop(set);
        let known = std::mem::take(&mut self.outside.copies);
        let same = |one: i32, other: i32| {
            let both = |copies: &Vec<i32>| copies.contains(&one) && copies.contains(&other);
            fds::are_same(us, one, other) || known.iter().any(both)
        };
        let mut found: Vec<(Vec<i32>, Vec<u8>)> = Vec::new();
        for (fd, path) in gone {
            match found.iter_mut().find(|(copies, _)| same(copies[0], fd)) {
                Some((copies, _)) => copies.push(fd),
                None => found.push((vec![fd], path)),
            }
        }
        if !found.is_empty() {
            self.note_all_changed();
        }
        // Whoever dies between two copies leaves two descriptions, of which the next has to know that they were one.
        self.outside.copies =
            found.iter().map(|(copies, _)| copies).filter(|copies| copies.len() > 1).cloned().collect();
        self.keep_outside(self.sii);
        for (copies, path) in found {
            match open_like(copies[0], &path) {
                Ok(new) => put(&new, &copies, self.pid),
                // Its thread has ended.
                Err(e) => tracing::warn!("descriptor {}, {}: {e}", copies[0], String::from_utf8_lossy(&path)),
            }
        }
        self.outside.copies.clear();
        let named =
            |id: &i32| stay.iter().any(|link| link.split(|b| *b == b'/').any(|part| part == id.to_string().as_bytes()));
        let (ids, vtids) = (&mut self.outside.ids, &self.vtids);
        ids.retain(|tid, _| vtids.contains_key(tid) || named(tid));
        self.keep_outside(self.sii);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{of_the_unit, translate};

    fn known(id: i32) -> Option<i32> {
        [(7, 17), (8, 18)].iter().find(|(of, _)| *of == id).map(|(_, to)| *to)
    }

    #[test]
    fn the_unit_is_self() {
        let of = |path: &str| String::from_utf8(of_the_unit(path.into(), 17, 18, known)).expect("text");
        assert_eq!(of("/proc/self/stat"), "/proc/17/stat");
        assert_eq!(of("/proc/self"), "/proc/17");
        assert_eq!(of("/proc/thread-self/comm"), "/proc/17/task/18/comm");
        assert_eq!(of("/proc/self/fd/3"), "/proc/self/fd/3");
        assert_eq!(of("/proc/self/fdinfo//3"), "/proc/self/fdinfo//3");
        assert_eq!(of("/proc/self/fd"), "/proc/17/fd");
        assert_eq!(of("/proc/self/fd/"), "/proc/17/fd/");
        assert_eq!(of("/dev/fd"), "/proc/17/fd");
        assert_eq!(of("/dev/fd/3"), "/dev/fd/3");
        assert_eq!(of("/proc/selfish"), "/proc/selfish");
        assert_eq!(of("/proc/7/stat"), "/proc/17/stat");
        assert_eq!(of("/proc/9/stat"), "/proc/9/stat");
        assert_eq!(of("/tmp/x"), "/tmp/x");
    }

    #[test]
    fn ids_are_translated_where_they_are_ids() {
        let to = |path: &str| translate(path.as_bytes(), known).map(|p| String::from_utf8(p).expect("text"));
        assert_eq!(to("/proc/7").as_deref(), Some("/proc/17"));
        assert_eq!(to("/proc/7/task/8/comm").as_deref(), Some("/proc/17/task/18/comm"));
        assert_eq!(to("/proc/7/task/9/comm").as_deref(), Some("/proc/17/task/9/comm"));
        assert_eq!(to("/proc/7/map_files/8").as_deref(), Some("/proc/17/map_files/8"));
        assert_eq!(to("/proc/7/fd/8").as_deref(), Some("/proc/17/fd/8"));
        assert_eq!(to("/proc/9/stat"), None);
        assert_eq!(to("/proc/self/stat"), None);
        assert_eq!(to("/tmp/7"), None);
    }
}

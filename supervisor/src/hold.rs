//! The unit's descriptors are held for it, so that they outlive keeper, supervisor and program (ARCHITECTURE.md, "Death
//! of all three").
//!
//! What is held is in flight (unix(7), `SCM_RIGHTS`) in a **slot**: a datagram socket that sends to itself. The slots are in
//! flight in the **root**, a socket of the same kind, and that one the service manager has. So taking and
//! letting go are calls of our own, whatever there is, and process 1 sees one descriptor for each unit. The desk says
//! which slot holds what a number leads to ([`Desk::held`]): one store makes it so, and a slot that no number leads to
//! holds nothing that counts.
//!
//! [`calls`] follows the unit's calls, and [`returned`] is what the next keeper does with what comes back.

pub mod calls;
pub mod returned;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect,
    getsockname, recvmsg, sendmsg, socket,
};

use crate::desk::{Desk, HELD_MAX};
use crate::marshal::raw_call;
use crate::{fault, fds, limits};

/// Most descriptors of a message (`SCM_MAX_FD`).
const MESSAGE_FDS: usize = 253;
/// Slots that are made first.
const SLOTS_MIN: usize = 32;

/// A socket that sends to itself.
fn to_itself() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
    // The kernel chooses a name. Once it is connected nobody else may send there.
    bind(fd.as_raw_fd(), &UnixAddr::new_unnamed())?;
    let name: UnixAddr = getsockname(fd.as_raw_fd())?;
    connect(fd.as_raw_fd(), &name)?;
    Ok(fd)
}

fn send(socket: &OwnedFd, fds: &[i32]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(b".")], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Copies of what is in the first message, or in the one at `SO_PEEK_OFF`; it stays there. `None` when there is none.
fn peek(socket: &OwnedFd) -> io::Result<Option<Vec<OwnedFd>>> {
    let (mut byte, mut control) = ([0; 1], cmsg_space!([i32; MESSAGE_FDS]));
    let mut into = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
    let got = match recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), flags) {
        Err(nix::errno::Errno::EAGAIN) => return Ok(None),
        got => got?,
    };
    let cut = got.flags.contains(MsgFlags::MSG_CTRUNC);
    let mut fds = Vec::new();
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(got) = message {
            // SAFETY: the kernel has just made them for us, and nothing else knows them.
            fds.extend(got.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    // The kernel gives as many as the limit allows.
    if cut { Err(io::Error::from_raw_os_error(libc::EMFILE)) } else { Ok(Some(fds)) }
}

/// Lets go of what is in a slot: received without room for descriptors, they are closed.
fn drain(slot: &OwnedFd) {
    let mut byte = 0u8;
    // SAFETY: one byte that outlives the call.
    while unsafe { libc::recv(slot.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT) } >= 0 {}
}

/// A new root, with nothing in it.
///
/// # Errors
/// No descriptor.
pub fn root() -> io::Result<OwnedFd> {
    to_itself()
}

/// Every slot of a root, in their order.
fn slots(root: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
    let from = 0i32;
    // Each look begins behind the one before from here on: a message has one byte.
    // SAFETY: a number that outlives the call.
    let set = unsafe {
        let (at, len) = ((&raw const from).cast(), size_of::<i32>() as u32);
        libc::setsockopt(root.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, at, len)
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut slots = Vec::new();
    while let Some(more) = peek(root)? {
        slots.extend(more);
    }
    Ok(slots)
}

/// Numbers of which something is held, and how.
fn numbers(desk: &'static Desk) -> impl Iterator<Item = (i32, u32)> {
    let words = desk.held().iter().enumerate().map(|(number, word)| (number as i32, word.load(SeqCst)));
    words.filter(|(_, word)| *word != 0)
}

/// `execve` closes the number.
const ON_EXEC: u32 = 1;
/// What it leads to is in nonblocking mode: kept up to date for numbers below [`Desk::given`] alone.
const NONBLOCKING: u32 = 2;

/// How a descriptor is held, as the desk has it: in which slot, and with which of these flags.
fn word(slot: usize, flags: u32) -> u32 {
    (slot as u32 + 1) << 2 | flags
}

/// A word without its flags: the same for numbers that lead to the same description.
fn place(word: u32) -> u32 {
    word >> 2
}

fn slot_of(word: u32) -> Option<usize> {
    place(word).checked_sub(1).map(|slot| slot as usize)
}

/// What holds the unit's descriptors. It is used by a thread whose table is not the unit's.
#[derive(Debug)]
pub struct Hold {
    desk: &'static Desk,
    root: OwnedFd,
    slots: Vec<OwnedFd>,
    /// How many numbers lead to each.
    uses: Vec<u32>,
    free: Vec<usize>,
    /// This process: the table of its first thread is the unit's.
    process: OwnedFd,
}

impl Hold {
    /// Goes on with what is held, or begins with nothing.
    ///
    /// # Errors
    /// There are not enough descriptors.
    pub fn open(root: OwnedFd, desk: &'static Desk) -> io::Result<Self> {
        if desk.holds.load(SeqCst) == 0 {
            desk.held().iter().for_each(|word| word.store(0, SeqCst));
            desk.directory.store(0, SeqCst);
        }
        let process = fds::process(std::process::id() as i32)?;
        let slots = slots(&root)?;
        let mut hold = Self { desk, root, uses: vec![0; slots.len()], slots, free: Vec::new(), process };
        let words = desk.held().iter().map(|word| word.load(SeqCst));
        for slot in words.chain([desk.directory.load(SeqCst) as u32]).filter_map(slot_of) {
            if let Some(uses) = hold.uses.get_mut(slot) {
                *uses += 1;
            }
        }
        for (i, slot) in hold.slots.iter().enumerate().rev().filter(|(i, _)| hold.uses[*i] == 0) {
            // Left there by who was killed.
            drain(slot);
            hold.free.push(i);
        }
        Ok(hold)
    }

    fn pid(&self) -> i32 {
        self.desk.pid.load(SeqCst)
    }

    /// A slot that holds nothing.
    fn free_slot(&mut self) -> io::Result<usize> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        let count = self.slots.len().clamp(SLOTS_MIN, MESSAGE_FDS);
        // Who brings them back needs twice as many numbers; and there is other work for who holds them, checkpoints above all.
        let room = limits::numbers() / 2;
        let slot = |_| to_itself().ok().filter(|slot| (slot.as_raw_fd() as u64) < room);
        let fresh: Vec<OwnedFd> = (0..count).map_while(slot).collect();
        if fresh.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        send(&self.root, &fresh.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>())?;
        self.uses.resize(self.slots.len() + fresh.len(), 0);
        self.free.extend((self.slots.len()..self.uses.len()).rev());
        self.slots.extend(fresh);
        self.free_slot()
    }

    /// Sends a descriptor of this thread's table into a free slot: which.
    fn fill(&mut self, fd: &OwnedFd) -> io::Result<usize> {
        let slot = self.free_slot()?;
        send(&self.slots[slot], &[fd.as_raw_fd()]).inspect_err(|_| self.free.push(slot))?;
        self.uses[slot] = 0;
        Ok(slot)
    }

    /// Holds what a number of the unit's table leads to from now on.
    fn put(&mut self, number: i32, flags: u32) -> io::Result<()> {
        fault::point("hold-sending", self.pid());
        let copy = fds::take_from(&self.process, number)?;
        let slot = self.fill(&copy)?;
        fault::point("hold-sent", self.pid());
        self.note(number, word(slot, flags))?;
        fault::point("hold-noted", self.pid());
        Ok(())
    }

    /// A number leads to what another one leads to.
    fn put_same(&mut self, number: i32, as_number: i32, flags: u32) -> io::Result<()> {
        match self.at(as_number).and_then(slot_of) {
            Some(slot) => self.note(number, word(slot, flags)),
            None => self.put(number, flags),
        }
    }

    fn at(&self, number: i32) -> Option<u32> {
        Some(self.desk.held().get(number as usize)?.load(SeqCst))
    }

    /// Where a number leads; lets go of what it led to, if no other does.
    fn note(&mut self, number: i32, word: u32) -> io::Result<()> {
        let Some(at) = self.desk.held().get(number as usize) else {
            if word == 0 {
                return Ok(());
            }
            return Err(io::Error::other(format!("descriptor {number} is beyond {HELD_MAX}")));
        };
        if let Some(slot) = slot_of(word) {
            self.uses[slot] += 1;
        }
        let before = at.swap(word, SeqCst);
        self.leave(before);
        Ok(())
    }

    /// Nothing leads there from a number any more.
    fn leave(&mut self, word: u32) {
        let Some(slot) = slot_of(word).filter(|slot| *slot < self.slots.len()) else { return };
        self.uses[slot] -= 1;
        if self.uses[slot] == 0 {
            fault::point("hold-forgotten", self.pid());
            drain(&self.slots[slot]);
            self.free.push(slot);
        }
    }

    /// A number has been closed.
    fn close(&mut self, number: i32) {
        fault::point("hold-closed", self.pid());
        // Nothing is led to: that cannot fail.
        let _infallible = self.note(number, 0);
    }

    /// A number's flags are these now.
    fn mark(&mut self, number: i32, flags: u32) {
        if let Some(at) = self.desk.held().get(number as usize)
            && let Some(slot) = slot_of(at.load(SeqCst))
        {
            at.store(word(slot, flags), SeqCst);
        }
    }

    /// Numbers of which something is held.
    fn numbers(&self) -> impl Iterator<Item = (i32, u32)> + use<> {
        numbers(self.desk)
    }

    /// Holds the directory of a thread of this process, which the order on the desk has changed.
    fn put_directory(&mut self, tid: i32) -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = std::fs::OpenOptions::new();
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let directory = options.read(true).custom_flags(flags).open(format!("/proc/self/task/{tid}/cwd"))?;
        let slot = self.fill(&directory.into())?;
        self.uses[slot] += 1;
        let order = u64::from(self.desk.order.count.load(SeqCst));
        let before = self.desk.directory.swap(u64::from(word(slot, 0)) | order << 32, SeqCst);
        self.leave(before as u32);
        Ok(())
    }

    /// Whether a number still leads to what is held for it.
    fn is_same(&self, number: i32, word: u32) -> bool {
        const KCMP_FILE: u64 = 0;
        let held = slot_of(word).and_then(|slot| self.slots.get(slot)).and_then(|slot| peek(slot).ok()??.pop());
        // SAFETY: no arguments.
        let (process, us) = unsafe { (libc::getpid(), libc::gettid()) };
        held.is_some_and(|held| {
            let args = [process as u64, us as u64, KCMP_FILE, number as u64, held.as_raw_fd() as u64, 0];
            raw_call(libc::SYS_kcmp as u64, &args) == 0
        })
    }

    /// Lets go of everything, and of nothing before it is noted that nothing is held.
    fn end(&mut self) {
        self.desk.holds.store(0, SeqCst);
        self.desk.held().iter().for_each(|word| word.store(0, SeqCst));
        self.desk.directory.store(0, SeqCst);
        self.slots.iter().for_each(drain);
        self.uses.fill(0);
        self.free = (0..self.slots.len()).rev().collect();
    }
}

/// The descriptor that a call has returned.
fn owned(result: i64) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result as i32));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    /// A desk and a hold whose numbers are those of this process. Tests run in threads of one table: as the unit's.
    fn hold() -> (Hold, &'static Desk) {
        let desk = Desk::map(None).unwrap();
        (Hold::open(root().unwrap(), desk).unwrap(), desk)
    }

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0, far)
    }

    /// Break it: have [`Hold::leave`] drain nothing, or whenever one of several numbers is closed.
    #[test]
    fn the_last_number_that_is_closed_ends_a_connection() {
        let (mut hold, desk) = hold();
        desk.holds.store(1, SeqCst);
        let (near, mut far) = connection();
        let twin = near.try_clone().unwrap();
        let (a, b) = (near.as_raw_fd(), twin.as_raw_fd());
        hold.put(a, 0).unwrap();
        hold.put_same(b, a, ON_EXEC).unwrap();
        assert_eq!(desk.held()[a as usize].load(SeqCst) | 1, desk.held()[b as usize].load(SeqCst));
        drop((near, twin));
        far.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
        hold.close(a);
        assert_eq!(far.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        far.set_read_timeout(None).unwrap();
        hold.close(b);
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
    }

    /// Break it: begin to look for slots where the last look has ended.
    #[test]
    fn what_is_held_is_found_by_the_root_alone() {
        let (mut hold, desk) = hold();
        desk.holds.store(1, SeqCst);
        let pairs: Vec<_> = (0..100).map(|_| connection()).collect();
        for (near, _) in &pairs {
            hold.put(near.as_raw_fd(), 0).unwrap();
        }
        assert!(hold.slots.len() > SLOTS_MIN);
        let (root, count) = (hold.root.try_clone().unwrap(), hold.slots.len());
        drop(hold);
        for _ in 0..2 {
            let hold = Hold::open(root.try_clone().unwrap(), desk).unwrap();
            assert_eq!((hold.slots.len(), hold.free.len()), (count, count - 100));
            for (near, mut far) in pairs.iter().map(|(near, far)| (near, far)) {
                let word = hold.at(near.as_raw_fd()).unwrap();
                assert!(hold.is_same(near.as_raw_fd(), word));
                let held = peek(&hold.slots[slot_of(word).unwrap()]).unwrap().unwrap().pop().unwrap();
                TcpStream::from(held).write_all(b"x").unwrap();
                far.read_exact(&mut [0]).unwrap();
            }
        }
        // Nothing is noted: nothing stays.
        desk.holds.store(0, SeqCst);
        let numbers: Vec<_> = pairs.iter().map(|(near, _)| near.as_raw_fd()).collect();
        let far: Vec<_> = pairs.into_iter().map(|(_, far)| far).collect();
        let hold = Hold::open(root, desk).unwrap();
        assert!(numbers.iter().all(|number| hold.at(*number) == Some(0)));
        assert!(far.into_iter().all(|mut far| far.read(&mut [0]).unwrap() == 0));
    }
}

//! Datagrams of sd_notify(3): lines `KEY=VALUE`, with descriptors.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, UnixCredentials, bind,
    getsockname, recvmsg, sendmsg, setsockopt, socket, sockopt::PassCred,
};

/// Longest message. The service manager takes no more than a page either.
const MESSAGE_BYTES_MAX: usize = 4096;
/// Most descriptors of a message (`SCM_MAX_FD` of unix(7)).
const FDS_MAX: usize = 253;

/// A message.
#[derive(Debug, Default)]
pub(super) struct Message {
    /// Its lines.
    pub(super) text: String,
    /// What came along.
    pub(super) fds: Vec<OwnedFd>,
}

impl From<String> for Message {
    fn from(text: String) -> Self {
        Self { text, fds: Vec::new() }
    }
}

/// The address that `NOTIFY_SOCKET` names: a path, or after `@` an abstract name.
fn address(name: &OsStr) -> nix::Result<UnixAddr> {
    match name.as_bytes() {
        [b'@', rest @ ..] => UnixAddr::new_abstract(rest),
        [b'/', ..] => UnixAddr::new(name),
        _ => Err(Errno::EAFNOSUPPORT),
    }
}

fn open() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Datagram, flags, None)
}

/// Where messages are sent to.
#[derive(Debug)]
pub(super) struct Outbox {
    socket: OwnedFd,
    to: UnixAddr,
}

impl Outbox {
    /// For the address that `NOTIFY_SOCKET` names.
    ///
    /// # Errors
    /// `EAFNOSUPPORT` where it is neither a path nor an abstract name; no descriptor.
    pub(super) fn new(name: &OsStr) -> io::Result<Self> {
        Ok(Self { to: address(name)?, socket: open()? })
    }

    /// Sends a message; `WouldBlock` when the other side has too many waiting.
    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        let fds: Vec<RawFd> = message.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let text = [IoSlice::new(message.text.as_bytes())];
        let sent = sendmsg(self.socket.as_raw_fd(), &text, rights, MsgFlags::MSG_NOSIGNAL, Some(&self.to));
        Ok(sent.map(drop)?)
    }
}

impl Outbox {
    /// Sends a message, and waits until there is room for it.
    pub(super) fn send_now(&self, message: &Message) -> io::Result<()> {
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Self { socket, to: self.to }.send(message)
    }
}

/// A socket of ours that the program takes for the service manager's.
///
/// It has an abstract name, so that the program reaches it from any root directory and as any user; who may be heard is
/// decided by the sender's credentials, which the kernel attaches.
#[derive(Debug)]
pub(super) struct Inbox {
    socket: OwnedFd,
    name: OsString,
}

impl Inbox {
    /// A socket whose abstract name is `name`, or another one if somebody has that or it is too long.
    ///
    /// # Errors
    /// No descriptor.
    pub(super) fn bind(name: &OsStr) -> io::Result<Self> {
        let socket = open()?;
        setsockopt(&socket, PassCred, &true)?;
        let wanted = UnixAddr::new_abstract(name.as_bytes());
        if wanted.and_then(|a| bind(socket.as_raw_fd(), &a)).is_err() {
            bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?;
        }
        let bound: UnixAddr = getsockname(socket.as_raw_fd())?;
        let mut name = b"@".to_vec();
        name.extend_from_slice(bound.as_abstract().unwrap_or_default());
        Ok(Self { socket, name: OsString::from_vec(name) })
    }

    /// What `NOTIFY_SOCKET` has to say to lead here.
    pub(super) fn name(&self) -> &OsStr {
        &self.name
    }

    /// The next message of root or of the user that we are, `WouldBlock` if there is none. What others send, and what is no
    /// text or too long, is left out.
    pub(super) fn receive(&self) -> io::Result<Message> {
        loop {
            if let Some(message) = self.receive_any()? {
                return Ok(message);
            }
        }
    }

    fn receive_any(&self) -> io::Result<Option<Message>> {
        let mut bytes = [0; MESSAGE_BYTES_MAX];
        let mut control = cmsg_space!(UnixCredentials, [RawFd; FDS_MAX]);
        let (length, cut, controls) = {
            let mut into = [IoSliceMut::new(&mut bytes)];
            let got =
                recvmsg::<()>(self.socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
            let cut = got.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
            (got.bytes, cut, got.cmsgs().map(Iterator::collect::<Vec<_>>).unwrap_or_default())
        };
        let mut uid = None;
        let mut fds = Vec::new();
        for control in controls {
            match control {
                ControlMessageOwned::ScmCredentials(from) => uid = Some(from.uid()),
                ControlMessageOwned::ScmRights(got) => fds.extend(got.into_iter().map(|fd| {
                    // SAFETY: the kernel has just made it for us, and nothing else knows it.
                    unsafe { OwnedFd::from_raw_fd(fd) }
                })),
                _ => {}
            }
        }
        let known = uid.is_some_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw());
        let text = str::from_utf8(&bytes[..length]).ok().filter(|_| known && !cut);
        Ok(text.map(|text| Message { text: text.to_owned(), fds }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// Break it: leave the descriptors out of [`Outbox::send`].
    #[test]
    fn messages_arrive_with_their_descriptors() {
        let inbox = Inbox::bind(OsStr::new(&format!("ftrun-test-{}", std::process::id()))).unwrap();
        let outbox = Outbox::new(inbox.name()).unwrap();
        assert_eq!(inbox.receive().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let (mut read, write) = std::io::pipe().unwrap();
        outbox.send(&Message { text: "FDSTORE=1\nFDNAME=a".into(), fds: vec![write.into()] }).unwrap();
        outbox.send(&Message::from("READY=1".to_owned())).unwrap();
        let first = inbox.receive().unwrap();
        assert_eq!((first.text.as_str(), first.fds.len()), ("FDSTORE=1\nFDNAME=a", 1));
        for fd in first.fds {
            std::fs::File::from(fd).write_all(b"through").unwrap();
        }
        let mut said = String::new();
        read.read_to_string(&mut said).unwrap();
        assert_eq!(said, "through");
        assert_eq!(inbox.receive().unwrap().text, "READY=1");
    }

    #[test]
    fn what_is_no_message_is_left_out() {
        let name = format!("ftrun-test-odd-{}", std::process::id());
        let inbox = Inbox::bind(OsStr::new(&name)).unwrap();
        let outbox = Outbox::new(inbox.name()).unwrap();
        outbox.send(&Message::from("X=".repeat(MESSAGE_BYTES_MAX))).unwrap();
        sendmsg::<UnixAddr>(
            outbox.socket.as_raw_fd(),
            &[IoSlice::new(b"\xff\xfe")],
            &[],
            MsgFlags::empty(),
            Some(&outbox.to),
        )
        .unwrap();
        outbox.send(&Message::from("READY=1".to_owned())).unwrap();
        assert_eq!(inbox.receive().unwrap().text, "READY=1");
        // The name is taken: another one is found.
        let other = Inbox::bind(OsStr::new(&name)).unwrap();
        assert_ne!(other.name(), inbox.name());
        Outbox::new(other.name()).unwrap().send(&Message::from("A=1".to_owned())).unwrap();
        assert_eq!(other.receive().unwrap().text, "A=1");
        assert!(Outbox::new(OsStr::new("vsock:2:1")).is_err());
    }
}

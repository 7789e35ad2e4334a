//! A client of the Unix-socket server that passes descriptors both ways.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::echo::check;
use crate::load::{Client, Progress};
use crate::rng::Rng;
use crate::wire::{Fault, REPLY_LIMIT, excerpt};

/// One connection for the whole run.
#[derive(Debug)]
pub struct Rights {
    stream: UnixStream,
    rng: Rng,
    count: u64,
    highest: u64,
}

impl Rights {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path, rng: Rng) -> Result<Self, Fault> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(REPLY_LIMIT))?;
        Ok(Self { stream, rng, count: 0, highest: 0 })
    }

    /// Sends a line, a descriptor with it, and checks the answer.
    pub fn ask(&mut self, line: &str, attached: Option<&OwnedFd>) -> Result<(), Fault> {
        self.send(&format!("{line}\n"), attached)?;
        let (reply, came) = self.receive()?;
        self.count += 1;
        (self.highest, _) = check(&reply, self.count, self.highest, line.as_bytes())?;
        if came.is_some() { Err(Fault::error("a descriptor came that was not asked for")) } else { Ok(()) }
    }

    fn send(&self, line: &str, attached: Option<&OwnedFd>) -> Result<(), Fault> {
        let fds: Vec<RawFd> = attached.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let data = line.as_bytes();
        let sent = sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(data)], control, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(std::io::Error::from)?;
        if sent == data.len() { Ok(()) } else { Err(Fault::error(format!("{sent} of {} bytes sent", data.len()))) }
    }

    /// One line, and the descriptor that came with it.
    fn receive(&self) -> Result<(Vec<u8>, Option<OwnedFd>), Fault> {
        let (mut line, mut attached) = (Vec::new(), None);
        while line.last() != Some(&b'\n') {
            let mut chunk = [0; 4096];
            let mut parts = [IoSliceMut::new(&mut chunk)];
            let mut space = nix::cmsg_space!([RawFd; 4]);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), flags)
                .map_err(std::io::Error::from)?;
            for control in message.cmsgs().map_err(std::io::Error::from)? {
                let ControlMessageOwned::ScmRights(fds) = control else { continue };
                for fd in fds {
                    // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                    if attached.replace(fd).is_some() {
                        return Err(Fault::doubled("two descriptors came with one line"));
                    }
                }
            }
            let n = message.bytes;
            if n == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
            line.extend_from_slice(&chunk[..n]);
        }
        line.pop();
        Ok((line, attached))
    }
}

/// What a pipe holds, to its end. A writer that is still open would let this wait for ever, so it is
/// awaited with a limit first.
fn drain(end: OwnedFd) -> Result<Vec<u8>, Fault> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut data = Vec::new();
    let mut file = File::from(end);
    loop {
        let limit = PollTimeout::try_from(REPLY_LIMIT).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], limit).map_err(std::io::Error::from)?;
        if ready == 0 {
            return Err(Fault::error(format!("the pipe was not closed; it held {}", excerpt(&data))));
        }
        let mut chunk = [0; 1024];
        match file.read(&mut chunk)? {
            0 => return Ok(data),
            n => data.extend_from_slice(&chunk[..n]),
        }
    }
}

fn held(want: &str, got: &[u8]) -> Result<(), Fault> {
    if got == want.as_bytes() {
        return Ok(());
    }
    let text = format!("the pipe held {} instead of {}", excerpt(got), excerpt(want.as_bytes()));
    Err(if got.is_empty() {
        Fault::lost(text)
    } else if got.starts_with(want.as_bytes()) {
        Fault::doubled(text)
    } else {
        Fault::error(text)
    })
}

impl Client for Rights {
    fn step(&mut self, _: &Progress) -> Result<u64, Fault> {
        let verb = ["take ", "give ", ""][usize::try_from(self.rng.within(0..=2)).unwrap_or(2)];
        let text = String::from_utf8_lossy(&self.rng.text(30)).into_owned();
        let line = format!("{verb}{text}");
        let mut ours = None;
        if verb == "take " {
            let (read, write) = nix::unistd::pipe().map_err(std::io::Error::from)?;
            self.send(&format!("{line}\n"), Some(&write))?;
            ours = Some(read);
        } else {
            self.send(&format!("{line}\n"), None)?;
        }
        let (reply, attached) = self.receive()?;
        self.count += 1;
        (self.highest, _) = check(&reply, self.count, self.highest, line.as_bytes())?;
        match (verb, ours, attached) {
            ("take ", Some(end), None) => held(&format!("took {text}\n"), &drain(end)?)?,
            ("give ", _, Some(end)) => held(&format!("gave {text}\n"), &drain(end)?)?,
            ("give ", _, None) => return Err(Fault::lost("no descriptor came with the answer")),
            (_, _, Some(_)) => return Err(Fault::error("a descriptor came that was not asked for")),
            (_, _, None) => {}
        }
        Ok(1)
    }

    fn shared(&self) -> Option<(u64, u64)> {
        Some((self.count, self.highest))
    }
}

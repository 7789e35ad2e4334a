//! Sockets, and both ends of pairs, are made again.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::super::{Id, Kind, PairEnd, Socket, options, sockets};
use super::{Builder, Error, Result, c_path, set_nonblock, sys};

impl Builder<'_> {
    /// Something that has ended: reads find the end, writes fail with EPIPE.
    pub(super) fn at_its_end(&self) -> Result<i32> {
        self.closed_pair(libc::SOCK_STREAM, false)
    }

    /// A Unix socket whose other end is closed, or has been reset.
    fn closed_pair(&self, kind: i32, reset: bool) -> Result<i32> {
        let mut ends = [0i32; 2];
        // SAFETY: room for two numbers; a buffer as long as is said.
        unsafe {
            let r = libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr());
            sys(|| "a pair of sockets".into(), r.into())?;
            if reset {
                // Closed with something unread, the other end resets the connection (unix_release_sock).
                libc::send(ends[0], c"x".as_ptr().cast(), 1, libc::MSG_DONTWAIT);
            }
            libc::close(ends[1]);
        }
        self.raise(ends[0])
    }

    /// A connection that the other side has reset.
    pub(super) fn connection(&mut self, family: i32, kind: i32) -> Result<i32> {
        if !matches!(family, libc::AF_INET | libc::AF_INET6) || kind != libc::SOCK_STREAM {
            return self.closed_pair(if kind == libc::SOCK_SEQPACKET { kind } else { libc::SOCK_STREAM }, true);
        }
        let what = || "a connection that has been reset".to_owned();
        let (listener, port) = self.listen_for_own()?;
        // SAFETY: structures that outlive the calls, of the lengths that are said; numbers of this table.
        unsafe {
            let fd = self.raised(what, libc::socket(family, kind | libc::SOCK_CLOEXEC, 0).into())?;
            let address = loopback(family, port);
            let r = libc::connect(fd, address.as_ptr().cast(), address.len() as u32);
            sys(what, r.into())?;
            let far = sys(
                what,
                libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC).into(),
            )?;
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            let at = (&raw const linger).cast();
            libc::setsockopt(far, libc::SOL_SOCKET, libc::SO_LINGER, at, size_of::<libc::linger>() as u32);
            libc::close(far);
            let mut reset = libc::pollfd { fd, events: 0, revents: 0 };
            if libc::poll(&raw mut reset, 1, 1000) != 1 {
                return Err(Error::Sys { what: what(), source: io::Error::other("the loopback interface is down") });
            }
            Ok(fd)
        }
    }

    fn listen_for_own(&mut self) -> Result<(i32, u16)> {
        if let Some(listener) = self.listener {
            return Ok(listener);
        }
        let what = || "a socket on the loopback interface".to_owned();
        let mut address = loopback(libc::AF_INET, 0);
        let mut len = address.len() as u32;
        // SAFETY: as in `connection`.
        let fd = unsafe {
            let fd =
                self.raised(what, libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0).into())?;
            sys(what, libc::bind(fd, address.as_ptr().cast(), len).into())?;
            sys(what, libc::listen(fd, 16).into())?;
            sys(what, libc::getsockname(fd, address.as_mut_ptr().cast(), &raw mut len).into())?;
            fd
        };
        let listener = (fd, u16::from_be_bytes([address[2], address[3]]));
        self.listener = Some(listener);
        Ok(listener)
    }

    pub(super) fn socket(&self, socket: &Socket) -> Result<i32> {
        let Socket { family, kind, protocol, .. } = *socket;
        let text = socket.address.as_deref().map_or_else(|| "a socket".to_owned(), shown);
        let what = || text.clone();
        // SAFETY: plain numbers.
        let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
        let fd = self.raised(what, fd.into())?;
        for (level, name, value) in &socket.options {
            let now = options::get(fd, &(*level, *name, value.len().max(4)));
            if now.as_ref() != Some(value) {
                options::set(fd, *level, *name, &options::to_set(*level, *name, value));
            }
        }
        let reuse = |on: i32| options::set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &on.to_le_bytes());
        if let Some(address) = &socket.address {
            let stream = matches!(family, libc::AF_INET | libc::AF_INET6) && kind == libc::SOCK_STREAM;
            let reused = options::get(fd, &(libc::SOL_SOCKET, libc::SO_REUSEADDR, 4)).is_some_and(|v| v[0] != 0);
            if stream {
                // Connections of the processes that were killed may still be on their way out (TIME_WAIT).
                reuse(1);
            }
            if let Some(path) = sockets::unix_path(address) {
                clear_path(&path, kind);
            }
            // SAFETY: the buffer is as long as is said.
            let r = unsafe { libc::bind(fd, address.as_ptr().cast(), address.len() as u32) };
            sys(|| format!("{text} cannot be bound again"), r.into())?;
            if let (Some(path), Some((mode, uid, gid))) = (sockets::unix_path(address), socket.file) {
                let path = c_path(&path);
                // SAFETY: a string that outlives the calls.
                unsafe {
                    libc::chmod(path.as_ptr(), mode);
                    libc::chown(path.as_ptr(), uid, gid);
                }
            }
            if let Some(backlog) = socket.backlog {
                // SAFETY: plain numbers.
                let r = unsafe { libc::listen(fd, backlog) };
                sys(|| format!("{text} cannot be listened at again"), r.into())?;
            }
            if stream && !reused {
                reuse(0);
            }
        }
        if let Some(peer) = &socket.peer {
            // SAFETY: as above.
            let r = unsafe { libc::connect(fd, peer.as_ptr().cast(), peer.len() as u32) };
            sys(|| format!("{} cannot be connected to again", shown(peer)), r.into())?;
        }
        Ok(fd)
    }

    /// Both ends of a pair, and what waits in them.
    pub(super) fn pair(&mut self, id: Id, end: &PairEnd) -> Result<()> {
        let kind_of = |id: Id| match &self.objects.open.get(&id)?.kind {
            Kind::Socket(socket) => Some((socket, self.objects.open.get(&id)?.flags)),
            _ => None,
        };
        let Some((socket, flags)) = kind_of(id) else { return Ok(()) };
        let other = end.other.and_then(|other| Some((other, kind_of(other)?)));
        let mut ends = [0i32; 2];
        // SAFETY: room for two numbers.
        let r = unsafe {
            libc::socketpair(socket.family, socket.kind | libc::SOCK_CLOEXEC, socket.protocol, ends.as_mut_ptr())
        };
        sys(|| "a pair of sockets".into(), r.into())?;
        let ends = [self.raise(ends[0])?, self.raise(ends[1])?];
        fill(ends[1], &end.queue)?;
        let shut = |fd: i32, end: &PairEnd| {
            if let how @ 1..=3 = end.shut {
                // SAFETY: plain numbers.
                unsafe { libc::shutdown(fd, i32::from(how) - 1) };
            }
        };
        if let Some((other, (far, far_flags))) = other {
            let far = far.pair.clone().unwrap_or_default();
            fill(ends[0], &far.queue)?;
            shut(ends[1], &far);
            set_nonblock(ends[1], far_flags);
            self.made.insert(other, ends[1]);
        } else {
            // SAFETY: made above.
            unsafe { libc::close(ends[1]) };
        }
        shut(ends[0], end);
        set_nonblock(ends[0], flags);
        self.made.insert(id, ends[0]);
        Ok(())
    }
}

/// Sends messages that the other end finds waiting.
fn fill(fd: i32, queue: &[Vec<u8>]) -> Result<()> {
    for message in queue {
        // SAFETY: the buffer is as long as is said.
        let n =
            unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if n != message.len() as isize {
            return Err(Error::Sys {
                what: "what waits in a pair of sockets".into(),
                source: io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}

/// Removes the file of a socket that nobody has any more; what is not that stays.
fn clear_path(path: &Path, kind: i32) {
    let mut address = vec![0u8; 2];
    address[..2].copy_from_slice(&(libc::AF_UNIX as u16).to_le_bytes());
    address.extend_from_slice(path.as_os_str().as_bytes());
    address.push(0);
    let c = c_path(path);
    // SAFETY: strings and buffers that outlive the calls; a number that is closed again.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        let r = libc::connect(fd, address.as_ptr().cast(), address.len() as u32);
        let refused = r != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECONNREFUSED);
        libc::close(fd);
        if refused {
            libc::unlink(c.as_ptr());
        }
    }
}

/// An address of the loopback interface; of IPv6 the one that leads to IPv4.
fn loopback(family: i32, port: u16) -> Vec<u8> {
    let mut bytes = (family as u16).to_le_bytes().to_vec();
    bytes.extend_from_slice(&port.to_be_bytes());
    if family == libc::AF_INET6 {
        bytes.extend_from_slice(&[0; 14]);
        bytes.extend_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
        bytes.extend_from_slice(&[0; 4]);
    } else {
        bytes.extend_from_slice(&[127, 0, 0, 1]);
        bytes.extend_from_slice(&[0; 8]);
    }
    bytes
}

/// An address in words.
fn shown(address: &[u8]) -> String {
    use std::net::{Ipv4Addr, Ipv6Addr};
    let family = address.first().zip(address.get(1)).map_or(0, |(a, b)| i32::from(u16::from_le_bytes([*a, *b])));
    let port = || u16::from_be_bytes([address[2], address[3]]);
    match family {
        libc::AF_INET if address.len() >= 8 => {
            let ip: [u8; 4] = address[4..8].try_into().unwrap_or_default();
            format!("{}:{}", Ipv4Addr::from(ip), port())
        }
        libc::AF_INET6 if address.len() >= 24 => {
            let ip: [u8; 16] = address[8..24].try_into().unwrap_or_default();
            format!("[{}]:{}", Ipv6Addr::from(ip), port())
        }
        libc::AF_UNIX => match sockets::unix_path(address) {
            Some(path) => path.display().to_string(),
            None => format!("@{}", String::from_utf8_lossy(address.get(3..).unwrap_or_default())),
        },
        family => format!("an address of family {family}"),
    }
}

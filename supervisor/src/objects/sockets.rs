//! What a socket is, as the kernel tells it.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Kind, PairEnd, Socket, options};

fn int(fd: RawFd, level: i32, name: i32) -> Option<i32> {
    let bytes = options::get(fd, &(level, name, 4))?;
    Some(i32::from_le_bytes(bytes.try_into().ok()?))
}

type Namer = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut u32) -> i32;

fn address(fd: RawFd, ask: Namer) -> Option<Vec<u8>> {
    let mut bytes = vec![0u8; 128];
    let mut len = bytes.len() as u32;
    // SAFETY: the buffer is as long as is said.
    let r = unsafe { ask(fd, bytes.as_mut_ptr().cast(), &raw mut len) };
    bytes.truncate(len as usize);
    (r == 0).then_some(bytes)
}

/// What a socket is; `inode` is its own.
pub(super) fn look_at(fd: RawFd, inode: u64) -> Kind {
    let get = |name| int(fd, libc::SOL_SOCKET, name).unwrap_or(0);
    let (family, kind) = (get(libc::SO_DOMAIN), get(libc::SO_TYPE));
    let connected = matches!(kind, libc::SOCK_STREAM | libc::SOCK_SEQPACKET);
    let peer = address(fd, libc::getpeername);
    if connected && peer.is_some() && matches!(family, libc::AF_INET | libc::AF_INET6) {
        return Kind::Connection { family, kind };
    }
    let own = address(fd, libc::getsockname).unwrap_or_default();
    let listens = get(libc::SO_ACCEPTCONN) != 0;
    let mut socket = Socket { family, kind, protocol: get(libc::SO_PROTOCOL), ..Socket::default() };
    if family == libc::AF_UNIX && own.len() <= 2 && !listens && is_of_pair(fd, peer.as_deref()) {
        let queue = waiting(fd, kind);
        socket.pair = Some(PairEnd { other: None, queue, shut: 0 });
        return Kind::Socket(socket);
    }
    if connected && !listens && (peer.is_some() || was_connected(fd, family)) {
        return Kind::Connection { family, kind };
    }
    socket.peer = peer.filter(|_| !connected);
    socket.address = is_bound(family, &own).then_some(own);
    socket.backlog = listens.then(|| backlog(fd, family, inode));
    for row in options::of(&socket) {
        if let Some(value) = options::get(fd, row) {
            socket.options.push((row.0, row.1, value));
        }
    }
    if let Some(path) = socket.address.as_deref().and_then(unix_path)
        && let Ok(meta) = fs::symlink_metadata(&path)
    {
        use std::os::unix::fs::MetadataExt;
        socket.file = Some((meta.mode() & 0o7777, meta.uid(), meta.gid()));
    }
    Kind::Socket(socket)
}

/// The path of a Unix socket's address; none for an abstract name.
pub(super) fn unix_path(address: &[u8]) -> Option<PathBuf> {
    let family = u16::from_le_bytes([*address.first()?, *address.get(1)?]);
    let name = address.get(2..)?;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    (i32::from(family) == libc::AF_UNIX && end > 0)
        .then(|| Path::new(std::ffi::OsStr::from_bytes(&name[..end])).to_owned())
}

fn is_bound(family: i32, own: &[u8]) -> bool {
    match family {
        libc::AF_INET | libc::AF_INET6 => own.get(2..4).is_some_and(|port| port != [0, 0]),
        _ => own.len() > 2,
    }
}

/// A TCP socket that is, or was, a connection: another state than `TCP_CLOSE`, or an error that nobody has asked for.
fn was_connected(fd: RawFd, family: i32) -> bool {
    const TCP_CLOSE: u8 = 7;
    let inet = matches!(family, libc::AF_INET | libc::AF_INET6);
    let state = options::get(fd, &(libc::IPPROTO_TCP, libc::TCP_INFO, 8)).and_then(|info| info.first().copied());
    inet && state.is_some_and(|s| s != TCP_CLOSE) || {
        let mut p = libc::pollfd { fd, events: 0, revents: 0 };
        // SAFETY: one entry that outlives the call.
        unsafe { libc::poll(&raw mut p, 1, 0) };
        // A socket that has never been connected is at its end, too (POLLHUP), but not for writing.
        inet && p.revents & libc::POLLERR != 0
    }
}

/// A Unix socket without a name whose peer has none either, made by a process of this program: by socketpair(2).
fn is_of_pair(fd: RawFd, peer: Option<&[u8]>) -> bool {
    // ENOTCONN when the other end has been closed; a socket that was never connected has no credentials.
    let credentials = options::get(fd, &(libc::SOL_SOCKET, libc::SO_PEERCRED, 12));
    let made = credentials.and_then(|c| Some(i32::from_le_bytes(c.get(..4)?.try_into().ok()?))).unwrap_or(0) > 0;
    made && peer.is_none_or(|p| p.len() <= 2)
}

/// What waits in a Unix socket, without taking it.
fn waiting(fd: RawFd, kind: i32) -> Vec<Vec<u8>> {
    const ROOM: usize = 1 << 20;
    let mut queue = Vec::new();
    let peek = |bytes: &mut Vec<u8>| {
        bytes.resize(ROOM, 0);
        // SAFETY: the buffer is as long as is said.
        let n = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), ROOM, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
        bytes.truncate(n.max(0) as usize);
        n
    };
    if kind == libc::SOCK_STREAM {
        let mut bytes = Vec::new();
        if peek(&mut bytes) > 0 {
            queue.push(bytes);
        }
        return queue;
    }
    let (from, off) = (0i32.to_le_bytes(), (-1i32).to_le_bytes());
    if options::set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &from) {
        let mut bytes = Vec::new();
        // An empty message looks like the end, and what is behind it is not seen.
        while peek(&mut bytes) > 0 {
            queue.push(std::mem::take(&mut bytes));
        }
        options::set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &off);
    }
    queue
}

fn backlog(fd: RawFd, family: i32, inode: u64) -> i32 {
    if family == libc::AF_UNIX {
        return unix_diag(inode, SHOW_QUEUES).and_then(|a| a.get(&DIAG_QUEUES).cloned()).map_or(libc::SOMAXCONN, |b| {
            b.get(4..8).and_then(|b| b.try_into().ok()).map_or(libc::SOMAXCONN, i32::from_le_bytes)
        });
    }
    // Of a socket that listens, `tcpi_sacked` is the limit of its queue (tcp_get_info in the kernel).
    const SACKED: usize = 28;
    let info = options::get(fd, &(libc::IPPROTO_TCP, libc::TCP_INFO, 64));
    let limit = info.and_then(|i| Some(i32::from_le_bytes(i.get(SACKED..SACKED + 4)?.try_into().ok()?)));
    limit.unwrap_or(libc::SOMAXCONN)
}

/// The inode of the other end of a Unix socket, if there is one.
pub(super) fn peer_inode(inode: u64) -> Option<u64> {
    let bytes = unix_diag(inode, SHOW_PEER)?.remove(&DIAG_PEER)?;
    // One that is closed has none any more.
    Some(u64::from(u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?))).filter(|inode| *inode > 0)
}

/// `UDIAG_SHOW_PEER`, `UDIAG_SHOW_RQLEN`, and the attributes that answer (linux/unix_diag.h).
const SHOW_PEER: u32 = 4;
const SHOW_QUEUES: u32 = 16;
const DIAG_PEER: u16 = 2;
const DIAG_QUEUES: u16 = 4;

/// Asks the kernel about one Unix socket (sock_diag(7)): attributes by their number.
fn unix_diag(inode: u64, show: u32) -> Option<BTreeMap<u16, Vec<u8>>> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    // SAFETY: plain numbers; the result is owned by nobody else.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, libc::NETLINK_SOCK_DIAG) };
    if fd < 0 {
        return None;
    }
    // SAFETY: as above.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut ask = Vec::new();
    // struct nlmsghdr, then struct unix_diag_req.
    ask.extend_from_slice(&40u32.to_le_bytes());
    ask.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_le_bytes());
    ask.extend_from_slice(&(libc::NLM_F_REQUEST as u16).to_le_bytes());
    ask.extend_from_slice(&[0; 8]);
    ask.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
    ask.extend_from_slice(&u32::MAX.to_le_bytes());
    ask.extend_from_slice(&(inode as u32).to_le_bytes());
    ask.extend_from_slice(&show.to_le_bytes());
    ask.extend_from_slice(&u64::MAX.to_le_bytes());
    let mut answer = vec![0u8; 4096];
    // SAFETY: buffers as long as is said.
    let n = unsafe {
        if libc::send(fd.as_raw_fd(), ask.as_ptr().cast(), ask.len(), 0) < 0 {
            return None;
        }
        libc::recv(fd.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    answer.truncate(n.max(0) as usize);
    if u16::from_le_bytes(answer.get(4..6)?.try_into().ok()?) != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    // struct nlmsghdr and struct unix_diag_msg have 16 bytes each.
    let mut rest = answer.get(32..)?;
    let mut attributes = BTreeMap::new();
    while rest.len() >= 4 {
        let (length, kind) = (u16::from_le_bytes([rest[0], rest[1]]), u16::from_le_bytes([rest[2], rest[3]]));
        let length = usize::from(length);
        attributes.insert(kind, rest.get(4..length)?.to_vec());
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(attributes)
}

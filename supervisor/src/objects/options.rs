//! Socket options that a socket is given again.

use super::Socket;

/// Level, name, and bytes of the value.
type Row = (i32, i32, usize);

const INT: usize = 4;
const TIME: usize = 16;

const SOCKET: &[Row] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, INT),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, INT),
    (libc::SOL_SOCKET, libc::SO_BROADCAST, INT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, INT),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE, INT),
    (libc::SOL_SOCKET, libc::SO_PASSCRED, INT),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, INT),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP, INT),
    (libc::SOL_SOCKET, libc::SO_LINGER, 8),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, INT),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, TIME),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO, TIME),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16),
    (libc::SOL_SOCKET, libc::SO_MARK, INT),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, INT),
    (libc::SOL_SOCKET, libc::SO_SNDBUF, INT),
];
const IP: &[Row] = &[
    (libc::IPPROTO_IP, libc::IP_TOS, INT),
    (libc::IPPROTO_IP, libc::IP_TTL, INT),
    (libc::IPPROTO_IP, libc::IP_FREEBIND, INT),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT, INT),
    (libc::IPPROTO_IP, libc::IP_PKTINFO, INT),
    (libc::IPPROTO_IP, libc::IP_RECVERR, INT),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, INT),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, INT),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP, INT),
];
const IPV6: &[Row] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, INT),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, INT),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, INT),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP, INT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, INT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, INT),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, INT),
];
const TCP: &[Row] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, INT),
    (libc::IPPROTO_TCP, libc::TCP_CORK, INT),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, INT),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, INT),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, INT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT, INT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2, INT),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, INT),
    (libc::IPPROTO_TCP, libc::TCP_MAXSEG, INT),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, INT),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN, INT),
    (libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT, INT),
];
const TCP_NOTSENT_LOWAT: i32 = 25;

/// The options that a socket of this kind may have.
pub(super) fn of(socket: &Socket) -> impl Iterator<Item = &'static Row> + use<> {
    let internet = matches!(socket.family, libc::AF_INET | libc::AF_INET6);
    let tables = [
        (true, SOCKET),
        (internet, IP),
        (socket.family == libc::AF_INET6, IPV6),
        (internet && socket.kind == libc::SOCK_STREAM, TCP),
    ];
    tables.into_iter().filter(|(applies, _)| *applies).flat_map(|(_, table)| table)
}

/// What `getsockopt` says; `None` where the socket has no such option.
pub(super) fn get(fd: i32, &(level, name, bytes): &Row) -> Option<Vec<u8>> {
    let mut value = vec![0u8; bytes];
    let mut len = bytes as u32;
    // SAFETY: the buffer is as long as is said.
    let r = unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut len) };
    value.truncate(len as usize);
    (r == 0).then_some(value)
}

/// Sets an option; says whether it went well.
pub(super) fn set(fd: i32, level: i32, name: i32, value: &[u8]) -> bool {
    // SAFETY: as above.
    unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as u32) == 0 }
}

/// What `getsockopt` says of an option that was set to a value.
pub(super) fn told(level: i32, name: i32, value: &[u8]) -> Vec<u8> {
    match (level, name, <[u8; 4]>::try_from(value)) {
        (libc::SOL_SOCKET, libc::SO_RCVBUF | libc::SO_SNDBUF, Ok(bytes)) => {
            i32::from_le_bytes(bytes).saturating_mul(2).to_le_bytes().to_vec()
        }
        _ => value.to_vec(),
    }
}

/// The value with which an option comes to be what `getsockopt` has said: the kernel doubles sizes of buffers
/// (socket(7)).
pub(super) fn to_set(level: i32, name: i32, value: &[u8]) -> Vec<u8> {
    match (level, name, <[u8; 4]>::try_from(value)) {
        (libc::SOL_SOCKET, libc::SO_RCVBUF | libc::SO_SNDBUF, Ok(bytes)) => {
            (i32::from_le_bytes(bytes) / 2).to_le_bytes().to_vec()
        }
        _ => value.to_vec(),
    }
}

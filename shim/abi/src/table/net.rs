//! Sockets.

use super::Effect::*;
use super::make::*;
use super::{Arg, Command, Len, Row, Used};

/// Socket address or option value whose length lies in memory, before and after the call.
const ADDR1_LEN2: Arg = Out(Len::U32At(2), Used::U32At(2));
const MMSG: &str = "served as recvmsg and sendmsg, one message at a time, unless it asks for none";
const RIGHTS: &str = "may bring descriptors; SCM_CREDENTIALS names whoever executes it";

pub(super) const ROWS: &[Row] = &[
    object(41, "socket", &[Int, Hex, Int]).does(Socket),
    output(42, "connect", &[Fd, In(Len::Arg32(2)), Int]).does(Connect).special(),
    object(43, "accept", &[Fd, ADDR1_LEN2, INOUT4]).does(Accept).readable(),
    output(44, "sendto", &[Fd, In(Len::Arg(2)), Int, Hex, In(Len::Arg32(5)), Int]).does(Give).writable(),
    input(45, "recvfrom", &[Fd, Out(Len::Arg(2), Used::Result), Int, Hex, Out(Len::U32At(5), Used::U32At(5)), INOUT4])
        .does(Take)
        .readable(),
    output(46, "sendmsg", &[Fd, MsgIn, Hex]).does(Give).writable().note(RIGHTS),
    input(47, "recvmsg", &[Fd, MsgOut, Hex]).does(Take).readable().note(RIGHTS),
    output(48, "shutdown", &[Fd, Int]).does(Shut),
    object(49, "bind", &[Fd, In(Len::Arg32(2)), Int]).does(Bind),
    object(50, "listen", &[Fd, Int]).does(Listen),
    input(51, "getsockname", &[Fd, ADDR1_LEN2, INOUT4]).does(Name),
    input(52, "getpeername", &[Fd, ADDR1_LEN2, INOUT4]),
    object(53, "socketpair", &[Int, Hex, Int, OUT8]).does(Pair),
    object(54, "setsockopt", &[Fd, Int, Int, In(Len::Arg32(4)), Int]).does(Option),
    input(55, "getsockopt", &[Fd, Int, Int, Out(Len::U32At(4), Used::U32At(4)), INOUT4]),
    object(288, "accept4", &[Fd, ADDR1_LEN2, INOUT4, Hex]).does(Accept).readable(),
    unknown(299, "recvmmsg", &[Fd, Addr, Int, Hex, Addr]).note(MMSG),
    unknown(307, "sendmmsg", &[Fd, Addr, Int, Hex]).note(MMSG),
];

const SOL_IP: u32 = 0;
const SOL_SOCKET: u32 = 1;
const SOL_TCP: u32 = 6;
const SOL_IPV6: u32 = 41;
const SOL_SCTP: u64 = 132;

const SET_POINTER: Row =
    unknown(54, "setsockopt", &[Fd, Int, Int, Addr, Int]).note("the option value holds addresses of further memory");
const GET_POINTER: Row = unknown(55, "getsockopt", &[Fd, Int, Int, Addr, INOUT4])
    .note("the option value holds addresses, or its length is not counted in bytes");
const GET_FD: Row = object(55, "getsockopt", &[Fd, Int, Int, Out(Len::U32At(4), Used::U32At(4)), INOUT4]).does(Opaque);
/// An option whose value is also read.
const GET_INOUT: Row = input(55, "getsockopt", &[Fd, Int, Int, InOut(Len::U32At(4)), INOUT4]);

/// Socket options whose value is not plain bytes.
pub(super) const COMMANDS: &[Command] = &[
    SET_POINTER.when(2, 26, "SO_ATTACH_FILTER").and(1, SOL_SOCKET),
    SET_POINTER.when(2, 51, "SO_ATTACH_REUSEPORT_CBPF").and(1, SOL_SOCKET),
    SET_POINTER.when(2, 64, "IPT_SO_SET_REPLACE").and(1, SOL_IP),
    SET_POINTER.when(2, 96, "ARPT_SO_SET_REPLACE").and(1, SOL_IP),
    SET_POINTER.when(2, 128, "EBT_SO_SET_ENTRIES").and(1, SOL_IP),
    SET_POINTER.when(2, 129, "EBT_SO_SET_COUNTERS").and(1, SOL_IP),
    SET_POINTER.when(2, 64, "IP6T_SO_SET_REPLACE").and(1, SOL_IPV6),
    SET_POINTER.when(1, SOL_SCTP, "SOL_SCTP"),
    GET_POINTER.when(2, 26, "SO_GET_FILTER").and(1, SOL_SOCKET),
    GET_FD.when(2, 77, "SO_PEERPIDFD").and(1, SOL_SOCKET),
    GET_POINTER.when(2, 35, "TCP_ZEROCOPY_RECEIVE").and(1, SOL_TCP),
    GET_INOUT.when(2, 41, "IP_MSFILTER").and(1, SOL_IP),
    GET_INOUT.when(2, 48, "MCAST_MSFILTER").and(1, SOL_IP),
    GET_INOUT.when(2, 64, "IPT_SO_GET_INFO").and(1, SOL_IP),
    GET_INOUT.when(2, 65, "IPT_SO_GET_ENTRIES").and(1, SOL_IP),
    GET_INOUT.when(2, 66, "IPT_SO_GET_REVISION_MATCH").and(1, SOL_IP),
    GET_INOUT.when(2, 67, "IPT_SO_GET_REVISION_TARGET").and(1, SOL_IP),
    GET_INOUT.when(2, 96, "ARPT_SO_GET_INFO").and(1, SOL_IP),
    GET_INOUT.when(2, 97, "ARPT_SO_GET_ENTRIES").and(1, SOL_IP),
    GET_INOUT.when(2, 99, "ARPT_SO_GET_REVISION_TARGET").and(1, SOL_IP),
    GET_POINTER.when(2, 128, "EBT_SO_GET_INFO").and(1, SOL_IP),
    GET_POINTER.when(2, 129, "EBT_SO_GET_ENTRIES").and(1, SOL_IP),
    GET_POINTER.when(2, 130, "EBT_SO_GET_INIT_INFO").and(1, SOL_IP),
    GET_POINTER.when(2, 131, "EBT_SO_GET_INIT_ENTRIES").and(1, SOL_IP),
    GET_INOUT.when(2, 48, "MCAST_MSFILTER").and(1, SOL_IPV6),
    GET_INOUT.when(2, 64, "IP6T_SO_GET_INFO").and(1, SOL_IPV6),
    GET_INOUT.when(2, 65, "IP6T_SO_GET_ENTRIES").and(1, SOL_IPV6),
    GET_INOUT.when(2, 68, "IP6T_SO_GET_REVISION_MATCH").and(1, SOL_IPV6),
    GET_INOUT.when(2, 69, "IP6T_SO_GET_REVISION_TARGET").and(1, SOL_IPV6),
    GET_POINTER.when(1, SOL_SCTP, "SOL_SCTP"),
];

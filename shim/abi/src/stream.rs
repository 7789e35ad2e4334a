//! How much has gone through a TCP socket, as the kernel counts it (tcp(7), `struct tcp_info`).
//!
//! Both counts go on from a number that the connection began with, so that only differences mean something. They
//! change by what the owner of the socket takes and gives, and by nothing that the network does: data that arrives
//! is received and waiting at once, data that is acknowledged waits no more. The other side's end is counted by the
//! kernel as a byte that was received and does not wait; the state of the connection tells whether it has come.

/// Makes a system call: its number and arguments, and the result as the kernel returns it.
pub trait Kernel {
    /// Makes the call.
    fn call(&self, nr: u64, args: [u64; 6]) -> i64;
}

impl<F: Fn(u64, [u64; 6]) -> i64> Kernel for F {
    fn call(&self, nr: u64, args: [u64; 6]) -> i64 {
        self(nr, args)
    }
}

/// Whether an option (`setsockopt`) leaves a TCP stream what it is, and the counts with it.
pub fn stays_plain(level: u64, option: u64) -> bool {
    const SOL_SOCKET: u64 = 1;
    const SOL_TCP: u64 = 6;
    const TCP_REPAIR: u64 = 19;
    const TCP_REPAIR_QUEUE: u64 = 20;
    const TCP_QUEUE_SEQ: u64 = 21;
    const TCP_ULP: u64 = 31;
    match level {
        SOL_SOCKET => true,
        SOL_TCP => !matches!(option, TCP_REPAIR | TCP_REPAIR_QUEUE | TCP_QUEUE_SEQ | TCP_ULP),
        _ => false,
    }
}

/// Bytes of a TCP stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Taken by the owner of the socket; `None` when the connection was reset, or this side has ended it: then nobody
    /// can tell whether the other side's end is among them.
    pub received: Option<u64>,
    /// Given by it, and accepted by the kernel. This side's end counts as one.
    pub sent: u64,
}

const IOCTL: u64 = 16;
const GETSOCKOPT: u64 = 55;
const SOL_SOCKET: u64 = 1;
const SO_PROTOCOL: u64 = 38;
const IPPROTO_TCP: u32 = 6;
const TCP_INFO: u64 = 11;
const SIOCINQ: u64 = 0x541b;
const SIOCOUTQ: u64 = 0x5411;
/// `TCP_ESTABLISHED`.
const ESTABLISHED: u8 = 1;
/// `TCP_CLOSE_WAIT`: the other side has ended.
const ENDED: u8 = 8;
/// Words of `struct tcp_info` up to the counters.
const WORDS: usize = 17;
/// `tcpi_bytes_acked` and `tcpi_bytes_received`, in words.
const ACKED: usize = 15;
const RECEIVED: usize = 16;
/// How often the counters are read until they stand still meanwhile.
const TRIES: u32 = 1000;

/// Asks the kernel; `None` for what is no TCP socket.
pub fn counts(kernel: impl Kernel, fd: u64) -> Option<Counts> {
    let (mut protocol, mut len) = (0u32, 4u32);
    let of = |level, name, at, len| [fd, level, name, at, len, 0];
    let asked = of(SOL_SOCKET, SO_PROTOCOL, (&raw mut protocol) as u64, (&raw mut len) as u64);
    if kernel.call(GETSOCKOPT, asked) != 0 || protocol != IPPROTO_TCP {
        return None;
    }
    let info = || {
        let (mut words, mut len) = ([0u64; WORDS], (WORDS * 8) as u32);
        let asked = of(u64::from(IPPROTO_TCP), TCP_INFO, (&raw mut words) as u64, (&raw mut len) as u64);
        (kernel.call(GETSOCKOPT, asked) == 0 && len as usize == WORDS * 8).then_some(words)
    };
    let waiting = |what| {
        let mut n = 0u32;
        (kernel.call(IOCTL, [fd, what, (&raw mut n) as u64, 0, 0, 0]) == 0).then_some(u64::from(n))
    };
    let mut before = info()?;
    for _ in 0..TRIES {
        let (unread, unacknowledged) = (waiting(SIOCINQ)?, waiting(SIOCOUTQ)?);
        let after = info()?;
        if before[ACKED] == after[ACKED] && before[RECEIVED] == after[RECEIVED] {
            let taken = after[RECEIVED].wrapping_sub(unread);
            let received = match after[0] as u8 {
                ESTABLISHED => Some(taken),
                ENDED => Some(taken.wrapping_sub(1)),
                _ => None,
            };
            return Some(Counts { received, sent: after[ACKED].wrapping_add(unacknowledged) });
        }
        before = after;
    }
    None
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    fn ask(socket: &TcpStream) -> Counts {
        let kernel = |nr: u64, a: [u64; 6]| {
            let result: i64;
            // SAFETY: `counts` passes memory of its own.
            unsafe {
                core::arch::asm!("syscall", inlateout("rax") nr as i64 => result, in("rdi") a[0], in("rsi") a[1],
                    in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5], out("rcx") _, out("r11") _);
            }
            result
        };
        counts(kernel, socket.as_raw_fd() as u64).expect("a TCP socket")
    }

    fn taken(socket: &TcpStream) -> u64 {
        ask(socket).received.expect("an open connection")
    }

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let far = TcpStream::connect(listener.local_addr().expect("bound")).expect("a connection");
        (listener.accept().expect("a connection").0, far)
    }

    /// The kernel counts what is taken and given, whatever else goes on.
    #[test]
    fn only_what_the_owner_does_counts() {
        for active in [false, true] {
            let (mut near, mut far) = pair();
            if active {
                std::mem::swap(&mut near, &mut far);
            }
            let (start, before) = (taken(&near), ask(&near).sent);
            far.write_all(&[1; 1000]).expect("room");
            let mut buffer = [0; 4096];
            near.read_exact(&mut buffer[..300]).expect("data");
            assert_eq!(taken(&near) - start, 300);
            near.write_all(&[2; 5000]).expect("room");
            assert_eq!(ask(&near).sent - before, 5000);
            far.read_exact(&mut buffer[..1000]).expect("data");
            // Its end waits behind the data.
            far.shutdown(Shutdown::Write).expect("a connection");
            while near.peek(&mut buffer).expect("data") < 700 {}
            assert_eq!(taken(&near) - start, 300);
            near.read_exact(&mut buffer[..700]).expect("data");
            assert_eq!(taken(&near) - start, 1000);
            assert_eq!(near.read(&mut buffer).expect("the end"), 0);
            assert_eq!(taken(&near) - start, 1000);
            near.write_all(&[3; 70]).expect("room");
            assert_eq!(ask(&near).sent - before, 5070);
            near.shutdown(Shutdown::Write).expect("a connection");
            assert_eq!(ask(&near).received, None);
        }
    }

    /// What was sent can be told after a reset, and that there was one.
    #[test]
    fn after_a_reset_what_was_sent_can_be_told() {
        let (mut near, mut far) = pair();
        let before = ask(&near).sent;
        far.write_all(&[1; 500]).expect("room");
        near.write_all(&[2; 900]).expect("room");
        near.read_exact(&mut [0; 100]).expect("data");
        while far.peek(&mut [0; 1000]).expect("data") < 900 {}
        // Unread data makes it a reset.
        drop(far);
        while ask(&near).received.is_some() {}
        assert_eq!(ask(&near).sent - before, 900);
    }

    /// Counters that move while they are read give no wrong answer.
    #[test]
    fn a_busy_connection_is_counted_right() {
        let (mut near, mut far) = pair();
        let (start, before) = (taken(&near), ask(&near).sent);
        let stop = std::sync::atomic::AtomicBool::new(false);
        let mut wrong = None;
        std::thread::scope(|scope| {
            let mut reader = far.try_clone().expect("a descriptor");
            let writer = scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    far.write_all(&[1; 333]).expect("room");
                }
            });
            scope.spawn(move || while reader.read(&mut [0; 100]).is_ok_and(|n| n > 0) {});
            let (mut received, mut sent) = (0, 0);
            for _ in 0..2000 {
                received += near.read(&mut [0; 200]).expect("data") as u64;
                sent += near.write(&[2; 150]).expect("room") as u64;
                let (now, want) = (ask(&near), (Some(start + received), before + sent));
                if (now.received, now.sent) != want {
                    wrong = Some((now, want));
                    break;
                }
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
            // It may wait for room for the last of it.
            near.set_nonblocking(true).expect("a mode");
            while !writer.is_finished() {
                let _ = near.read(&mut [0; 65536]);
            }
            near.shutdown(Shutdown::Write).expect("a connection");
        });
        assert_eq!(wrong, None);
    }
}

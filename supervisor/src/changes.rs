//! What a call that was made has changed of the unit's descriptor table, directory or umask: told here alone, from the effects that
//! the table of calls has. Who holds descriptors follows it ([`crate::hold`]), who finds them again looks whether it had been followed
//! ([`crate::hold::returned`]), and the next checkpoint looks at what is new ([`crate::cold`]).

use ftrun_abi::table::{Class, Effect, Row};

use crate::desk::HELD_MAX;

/// A change.
#[derive(Debug)]
pub(crate) enum Change {
    /// These numbers are new, or lead elsewhere.
    Made(Vec<i32>),
    /// The first leads where the second does.
    Same(i32, i32),
    Closed(i32),
    ClosedFrom(i32, i32),
    /// These have other flags.
    Flags(Vec<i32>),
    Directory,
    Umask(u32),
    /// Others than before may be open.
    More,
    /// Nobody knows.
    Anything,
}

impl Change {
    /// What a call with this result has changed. `memory` has what it wrote at an address, if it wrote there.
    pub(crate) fn of<'a>(row: &Row, args: &[u64; 6], result: i64, memory: impl Fn(u64) -> &'a [u8]) -> Option<Self> {
        let (fd, made) = (args[0] as i32, result as i32);
        let numbers = |at: u64, count: usize| {
            let words = memory(at).chunks_exact(4).take(count);
            words.map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        Some(match row.effect {
            _ if row.class == Class::Unknown => Self::Anything,
            Effect::Open(_)
            | Effect::MemoryFile
            | Effect::Socket
            | Effect::Accept
            | Effect::Epoll
            | Effect::Counter
            | Effect::Timer => Self::Made(vec![made]),
            Effect::Opaque => Self::Made(match opaque_at(row, args) {
                Some(at) => numbers(at, 1),
                None => vec![made],
            }),
            Effect::Signals if fd < 0 => Self::Made(vec![made]),
            Effect::Duplicate => Self::Same(made, fd),
            Effect::Onto if made != fd => Self::Same(made, fd),
            Effect::Pipe => Self::Made(numbers(args[0], 2)),
            Effect::Pair => Self::Made(numbers(args[3], 2)),
            Effect::Close => Self::Closed(fd),
            Effect::CloseRange => {
                let last = (args[1] as u32).min(i32::MAX as u32) as i32;
                if args[2] as u32 & libc::CLOSE_RANGE_CLOEXEC != 0 {
                    Self::Flags((fd..=last.min(HELD_MAX as i32)).collect())
                } else {
                    Self::ClosedFrom(fd, last)
                }
            }
            Effect::OnExec | Effect::CloseOnExec(_) | Effect::Mode | Effect::NonBlocking => Self::Flags(vec![fd]),
            Effect::Directory | Effect::DirectoryOf => Self::Directory,
            Effect::Mask => Self::Umask(args[0] as u32 & 0o777),
            // Control messages have come: their length is in the header.
            Effect::Take if row.nr as i64 == libc::SYS_recvmsg => {
                memory(args[1] + 40).iter().take(8).any(|b| *b != 0).then_some(Self::More)?
            }
            _ => return None,
        })
    }
}

/// Where a call with [`Effect::Opaque`] wrote the descriptor, if it is not its result (`SO_PEERPIDFD`).
pub(crate) fn opaque_at(row: &Row, args: &[u64; 6]) -> Option<u64> {
    (row.nr as i64 == libc::SYS_getsockopt).then_some(args[3])
}

//! What a client and `ftstore serve` say to each other. No input or output happens here.
//!
//! A frame is, little endian: length of what follows the checksum (u32), CRC-32 of it (u32), length of the message (u32), the
//! message (postcard), and the rest is bytes that belong to it: records, pages, a manifest.
//!
//! A connection begins with [`Hello`] and [`Welcome`]; with a shared key [`Proof`] and [`Ready`] follow. Then each
//! [`Request`] but an append gets one [`Response::Reply`] of the same number, in any order. Appends are answered by
//! [`Response::Acknowledged`], for many of them at once, or by [`Response::AppendFailed`]: after that no append to the same
//! handle is taken before [`Op::Resume`].

use std::ops::Range;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{CheckpointInfo, Collected, Error, Fsck, OpenOptions, Reclaimed, UnitInfo, UnitName};

/// The protocol that this program speaks, and the oldest that it understands.
pub const VERSIONS: (u32, u32) = (1, 1);
/// First bytes of a hello.
pub const MAGIC: u64 = u64::from_le_bytes(*b"ftstore\n");
/// No frame is larger: a batch, and what is said about it.
pub const FRAME_BYTES_MAX: usize = crate::BATCH_BYTES_MAX + (1 << 20);
/// The same before the other side is known.
pub const HANDSHAKE_BYTES_MAX: usize = 4096;
/// Checkpoints that may come in at a time on one connection.
pub const PUTS_MAX: usize = 8;
/// Bytes before the message.
const HEAD_BYTES: usize = 12;
/// Label under which TLS gives out the keys that bind a proof to its connection (RFC 5705).
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-ftstore-proof";

/// Opens a connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: u64,
    /// Newest and oldest version that the client speaks.
    pub versions: (u32, u32),
    /// Who it is, where a key is shared.
    pub client: String,
    /// Random.
    pub nonce: [u8; 32],
}

/// Answers a hello.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Welcome {
    /// The version to speak. If `prove`, the client shows next that it has the key.
    Version {
        /// The newest that both speak.
        version: u32,
        /// A proof is wanted.
        prove: bool,
        /// Random.
        nonce: [u8; 32],
    },
    /// The connection ends.
    Refused(Error),
}

/// Shows that the client has the key.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Proof {
    /// See [`proof`].
    pub mac: [u8; 32],
}

/// The connection can be used; with the proof that the service has the key, too, if one is shared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ready {
    /// Welcome.
    Yes(Option<[u8; 32]>),
    /// The connection ends.
    Refused(Error),
}

/// Who shows that they have the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prover<'a> {
    /// The client of this name.
    Client(&'a str),
    /// The service.
    Service,
}

/// HMAC-SHA-256 under the shared key of who proves, both nonces and what TLS says of this connection, so that a
/// proof is worth nothing elsewhere: not on another connection, and not from the other side.
pub fn proof(key: &[u8], who: Prover<'_>, nonces: [&[u8; 32]; 2], channel: &[u8]) -> [u8; 32] {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
    let mut context = ring::hmac::Context::with_key(&key);
    let (side, name) = match who {
        Prover::Client(name) => (b"c", name),
        Prover::Service => (b"s", ""),
    };
    for part in [side, name.as_bytes(), b"\0", nonces[0], nonces[1], channel] {
        context.update(part);
    }
    let mut mac = [0; 32];
    mac.copy_from_slice(context.sign().as_ref());
    mac
}

/// Whether two proofs are the same, in a time that does not depend on where they differ.
pub fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

/// A random number for a proof.
///
/// # Errors
/// The system has none.
pub fn nonce() -> Result<[u8; 32], Error> {
    let mut nonce = [0; 32];
    let random = ring::rand::SystemRandom::new();
    ring::rand::SecureRandom::fill(&random, &mut nonce).map_err(|_| Error::Io {
        op: "get".into(),
        what: "random bytes".into(),
        cause: "the system has none".into(),
    })?;
    Ok(nonce)
}

/// What is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Given back in the reply.
    pub id: u64,
    /// What.
    pub op: Op,
}

/// An operation. `handle` is what an open has given.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the methods of the same names in StableStore and UnitStore say it")]
pub enum Op {
    Open {
        unit: UnitName,
        options: OpenOptions,
    },
    View {
        unit: UnitName,
    },
    Close {
        handle: u32,
    },
    Units,
    Remove {
        unit: UnitName,
    },
    Fsck,
    Gc,
    Log {
        handle: u32,
    },
    /// The body of the batch follows. No reply.
    Append {
        handle: u32,
        first: u64,
        count: u32,
    },
    /// Takes appends again after one has failed.
    Resume {
        handle: u32,
    },
    Read {
        handle: u32,
        from: u64,
        bytes_max: u64,
    },
    TruncateBelow {
        handle: u32,
        sii: u64,
    },
    TruncateFrom {
        handle: u32,
        sii: u64,
    },
    Collect {
        handle: u32,
        recovery: u64,
        spare: u64,
    },
    /// The manifest follows; then come [`Op::PutPages`] and [`Op::PutEnd`] of the same number. One reply, to the end.
    Put {
        handle: u32,
        sii: u64,
        parent: Option<u64>,
        gone: Vec<Range<u64>>,
    },
    /// Pages: address and contents.
    PutPages,
    /// `whole` is false when the client has given up.
    PutEnd {
        whole: bool,
    },
    Checkpoints {
        handle: u32,
    },
    Manifest {
        handle: u32,
        sii: u64,
    },
    Pages {
        handle: u32,
        sii: u64,
        range: Range<u64>,
    },
    Renew {
        handle: u32,
    },
    Release {
        handle: u32,
    },
    /// A second handle of a writer that another connection has opened with these options, for checkpoints: it is told
    /// of no acknowledgements.
    Join {
        unit: UnitName,
        epoch: u64,
        options: OpenOptions,
    },
}

/// What the service says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "plain")]
pub enum Response {
    Reply {
        id: u64,
        result: Result<Answer, Error>,
    },
    /// Handles, and the SIIs below which their records are acknowledged.
    Acknowledged(Vec<(u32, u64)>),
    /// What was acknowledged before stays so.
    AppendFailed {
        handle: u32,
        error: Error,
    },
    /// Why nothing will be acknowledged for now.
    Stuck {
        handle: u32,
        error: Error,
    },
}

/// What a reply holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "what the methods of the trait give")]
pub enum Answer {
    Done,
    Opened {
        handle: u32,
        epoch: u64,
        log: Range<u64>,
        acknowledged: u64,
    },
    Units(Vec<UnitInfo>),
    Fsck(Fsck),
    Gc(Reclaimed),
    Log(Range<u64>),
    /// First SII, number of records and bytes of each batch; the bodies follow.
    Batches(Vec<(u64, u32, u32)>),
    Collected(Collected),
    Checkpoints(Vec<CheckpointInfo>),
    /// It follows.
    Manifest,
    /// Addresses, and whether there is something other than zeros; the contents of those follow. `next` is where to go on.
    Pages {
        pages: Vec<(u64, bool)>,
        next: Option<u64>,
    },
}

/// Seconds without a sign of life after which the other side is asked for one.
const IDLE_SECONDS: u32 = 10;
/// Seconds between two such questions.
const ASK_SECONDS: u32 = 5;
/// So many questions without an answer, and the connection is lost.
const ASK_TIMES: u32 = 4;

/// Has the kernel find out that the other side of a connection is gone, machine and all, and end the connection: after
/// [`GONE_SECONDS`], see tcp(7), `TCP_KEEPIDLE` and `TCP_USER_TIMEOUT`.
///
/// # Errors
/// It is no TCP socket.
pub fn keep_alive(socket: &impl AsFd) -> std::io::Result<()> {
    setsockopt(socket, sockopt::TcpKeepIdle, &IDLE_SECONDS)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &ASK_SECONDS)?;
    setsockopt(socket, sockopt::TcpKeepCount, &ASK_TIMES)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &(1000 * GONE_SECONDS))?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    Ok(())
}

/// Seconds after which a connection to a machine that does not answer is lost.
pub const GONE_SECONDS: u32 = IDLE_SECONDS + ASK_TIMES * ASK_SECONDS;

/// Appends a frame to `out`.
///
/// # Panics
/// The frame is larger than 4 GiB.
pub fn encode(out: &mut Vec<u8>, message: &impl Serialize, bytes: &[u8]) {
    let message = postcard::to_stdvec(message).expect("plain data can be encoded");
    let at = out.len();
    let len = u32::try_from(4 + message.len() + bytes.len()).expect("a frame is bounded");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&u32::try_from(message.len()).expect("a part of it").to_le_bytes());
    out.extend_from_slice(&message);
    out.extend_from_slice(bytes);
    let crc = crc32fast::hash(&out[at + 8..]);
    out[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
}

/// What has come in and has not been taken apart.
#[derive(Debug, Default)]
pub struct Incoming {
    bytes: Vec<u8>,
    at: usize,
}

impl Incoming {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.space(bytes.len()).extend_from_slice(bytes);
    }

    /// Where `room` bytes more can be put, behind those that are there.
    pub fn space(&mut self, room: usize) -> &mut Vec<u8> {
        if self.at > 0 && self.at >= self.bytes.len() / 2 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.reserve(room);
        &mut self.bytes
    }

    /// Whether a frame has begun and is not whole.
    pub fn is_partial(&self) -> bool {
        self.at < self.bytes.len()
    }

    /// The next frame: the message and the bytes behind it.
    ///
    /// # Errors
    /// What is wrong with it; the connection cannot be used any more.
    pub fn next<M: DeserializeOwned>(&mut self, bytes_max: usize) -> Result<Option<(M, Vec<u8>)>, String> {
        let rest = &self.bytes[self.at..];
        let Some(head) = rest.first_chunk::<8>() else { return Ok(None) };
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let len = word(0) as usize;
        if len > bytes_max {
            return Err(format!("a frame of {len} bytes, and at most {bytes_max} are taken"));
        }
        let Some(frame) = rest.get(8..8 + len) else { return Ok(None) };
        if crc32fast::hash(frame) != word(4) {
            return Err("the checksum of a frame does not fit".into());
        }
        let (message, bytes) = frame
            .split_first_chunk::<4>()
            .and_then(|(n, rest)| rest.split_at_checked(u32::from_le_bytes(*n) as usize))
            .ok_or("the lengths in a frame do not fit")?;
        let message = postcard::from_bytes(message).map_err(|e| format!("a message that nobody sends: {e}"))?;
        let bytes = bytes.to_vec();
        self.at += 8 + len;
        if self.at == self.bytes.len() {
            self.bytes.clear();
            self.at = 0;
            if self.bytes.capacity() > 4 << 20 {
                self.bytes = Vec::new();
            }
        }
        Ok(Some((message, bytes)))
    }
}

const _: () = assert!(HEAD_BYTES == 12 && HANDSHAKE_BYTES_MAX < FRAME_BYTES_MAX, "the handshake is small");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_come_back_however_they_are_cut(ids: Vec<u64>, bytes: Vec<u8>, cut in 1usize..40) {
            let mut stream = Vec::new();
            for id in &ids {
                encode(&mut stream, &Request { id: *id, op: Op::Units }, &bytes);
            }
            let (mut incoming, mut got) = (Incoming::default(), Vec::new());
            for part in stream.chunks(cut) {
                incoming.push(part);
                while let Some((request, tail)) = incoming.next::<Request>(1 << 20).unwrap() {
                    prop_assert_eq!(&tail, &bytes);
                    got.push(request.id);
                }
            }
            prop_assert_eq!(got, ids);
            prop_assert!(!incoming.is_partial());
        }

        /// Whatever a client is called, its proof is not the service's: a false service has nothing to send back.
        #[test]
        fn a_proof_is_worth_nothing_from_the_other_side(name: String, key: [u8; 32]) {
            let nonces = [&[1; 32], &[2; 32]];
            for name in [&name[..], "ftstore", "", "s"] {
                let of_client = proof(&key, Prover::Client(name), nonces, &[0; 32]);
                prop_assert!(!same(&of_client, &proof(&key, Prover::Service, nonces, &[0; 32])));
            }
        }

        #[test]
        fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut incoming = Incoming::default();
            incoming.push(&bytes);
            while let Ok(Some(_)) = incoming.next::<Request>(64) {}
            let mut framed = Vec::new();
            framed.extend((bytes.len() as u32).to_le_bytes());
            framed.extend(crc32fast::hash(&bytes).to_le_bytes());
            framed.extend(&bytes);
            let mut incoming = Incoming::default();
            incoming.push(&framed);
            while let Ok(Some(_)) = incoming.next::<Request>(1 << 20) {}
        }
    }
}

//! The bytes of a frame, and the one place that checks them.
//!
//! Both streams consist of frames, each at a multiple of 8 bytes; all numbers are little endian.
//!
//! | offset | field |
//! |---|---|
//! | 0 | magic `FtF1` |
//! | 4 | kind, u8; flags, u8; two zero bytes |
//! | 8 | number of the segment, u64 |
//! | 16 | unit, u64 (batch, table) |
//! | 24 | first SII (batch), number of the table (table) |
//! | 32 | number of records (batch) or pages (pages), u32 |
//! | 36 | `len`: bytes of the body, u32 |
//! | 40 | `durable`: the segment had been synced up to here when this was written, u64 |
//! | 48 | CRC-32 of the first bytes of a pages frame (its keys), u32; else 0 |
//! | 52 | CRC-32 of the body and its padding, u32 |
//! | 56 | four zero bytes |
//! | 60 | CRC-32 of the 60 bytes before |
//! | 64 | the body, and zeros up to a multiple of 8 |

use crate::bytes::{u32_at, u64_at};

/// Bytes of a frame's header.
pub(super) const HEAD_BYTES: usize = 64;
/// Version of the format of segments.
pub(super) const FORMAT: u32 = 1;
const MAGIC: [u8; 4] = *b"FtF1";

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// First of a segment: what came before.
    Segment = 1,
    /// Records of one unit.
    Batch = 2,
    /// A change of the control state.
    Control = 3,
    /// Where the units' logs end: the log is idle.
    Mark = 4,
    /// Compressed pages.
    Pages = 5,
    /// Which pages a checkpoint has, and its manifest.
    Table = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Segment, Self::Batch, Self::Control, Self::Mark, Self::Pages, Self::Table]
            .into_iter()
            .find(|k| *k as u8 == byte)
    }
}

/// Flag of a batch that was written before and only has a new place.
pub(super) const MOVED: u8 = 1;

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: Kind,
    pub(super) flags: u8,
    pub(super) segment: u64,
    pub(super) unit: u64,
    pub(super) first: u64,
    pub(super) count: u32,
    pub(super) len: u32,
    pub(super) durable: u64,
    pub(super) keys_crc: u32,
    pub(super) body_crc: u32,
}

impl Head {
    /// A frame with this body; segment and `durable` are known when it is written.
    pub(super) fn new(kind: Kind, body: &[u8]) -> Self {
        Self { body_crc: body_crc(body), ..Self::unchecked(kind, body.len()) }
    }

    /// The same without the checksum of the body.
    pub(super) fn unchecked(kind: Kind, len: usize) -> Self {
        let len = u32::try_from(len).expect("a body is shorter than 4 GiB");
        let (segment, unit, first, durable) = (0, 0, 0, 0);
        Self { kind, flags: 0, segment, unit, first, count: 0, len, durable, keys_crc: 0, body_crc: 0 }
    }

    /// Bytes of the whole frame.
    pub(super) fn frame_bytes(&self) -> usize {
        frame_bytes(self.len as usize)
    }

    /// Bytes of the body with its padding.
    pub(super) fn padded(&self) -> usize {
        self.frame_bytes() - HEAD_BYTES
    }

    pub(super) fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut h = [0; HEAD_BYTES];
        h[..4].copy_from_slice(&MAGIC);
        h[4] = self.kind as u8;
        h[5] = self.flags;
        h[8..16].copy_from_slice(&self.segment.to_le_bytes());
        h[16..24].copy_from_slice(&self.unit.to_le_bytes());
        h[24..32].copy_from_slice(&self.first.to_le_bytes());
        h[32..36].copy_from_slice(&self.count.to_le_bytes());
        h[36..40].copy_from_slice(&self.len.to_le_bytes());
        h[40..48].copy_from_slice(&self.durable.to_le_bytes());
        h[48..52].copy_from_slice(&self.keys_crc.to_le_bytes());
        h[52..56].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32fast::hash(&h[..60]);
        h[60..].copy_from_slice(&crc.to_le_bytes());
        h
    }

    /// The header at the start of `bytes`, if it is one of this segment.
    pub(super) fn decode(bytes: &[u8], segment: u64) -> Option<Self> {
        let h = bytes.first_chunk::<HEAD_BYTES>()?;
        if h[..4] != MAGIC || h[8..16] != segment.to_le_bytes() || u32_at(h, 60) != crc32fast::hash(&h[..60]) {
            return None;
        }
        Some(Self {
            kind: Kind::from_byte(h[4])?,
            flags: h[5],
            segment,
            unit: u64_at(h, 16),
            first: u64_at(h, 24),
            count: u32_at(h, 32),
            len: u32_at(h, 36),
            durable: u64_at(h, 40),
            keys_crc: u32_at(h, 48),
            body_crc: u32_at(h, 52),
        })
    }

    /// Whether `padded`, the body with its padding, is what was written.
    pub(super) fn fits(&self, padded: &[u8]) -> bool {
        padded.len() == self.padded()
            && body_crc(&padded[..self.len as usize]) == self.body_crc
            && padded[self.len as usize..].iter().all(|&b| b == 0)
    }
}

/// Appends a frame to `out`.
pub(super) fn put(out: &mut Vec<u8>, head: &Head, body: &[u8]) {
    let at = out.len();
    out.extend_from_slice(&head.encode());
    out.extend_from_slice(body);
    out.resize(at + head.frame_bytes(), 0);
}

/// Gives the first of `frames`, which was made here, its segment and what is known durable; says how long it is.
pub(super) fn place(frames: &mut [u8], segment: u64, durable: u64) -> usize {
    let h = frames.first_chunk_mut::<HEAD_BYTES>().expect("a whole frame");
    debug_assert_eq!(h[..4], MAGIC, "a frame");
    h[8..16].copy_from_slice(&segment.to_le_bytes());
    h[40..48].copy_from_slice(&durable.to_le_bytes());
    let crc = crc32fast::hash(&h[..60]);
    h[60..].copy_from_slice(&crc.to_le_bytes());
    frame_bytes(u32_at(h, 36) as usize)
}

/// Bytes of a frame with a body of so many.
pub(super) fn frame_bytes(len: usize) -> usize {
    (HEAD_BYTES + len).next_multiple_of(8)
}

/// The checksum of a body. It does not depend on where the frame is.
pub(super) fn body_crc(body: &[u8]) -> u32 {
    crc32fast::hash(body)
}

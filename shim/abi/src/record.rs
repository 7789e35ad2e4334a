//! The layout of one event: a fixed header and the memory that the event wrote.
//!
//! Everything is little endian and in units of 8 bytes. After the [`Header`] come its `outs`
//! outputs, each `{ address u64, length u32, 0 u32 }` and the bytes, padded with zeros to a
//! multiple of 8. [`Record::parse`] accepts nothing else, so a record has one encoding.

use core::fmt;

/// Bytes of an encoded [`Header`].
pub const HEADER_BYTES: usize = 48;

/// A record is never longer than this.
pub const RECORD_BYTES_MAX: usize = 64 << 20;

/// Bytes before the data of each output.
pub const OUTPUT_HEADER_BYTES: usize = 16;

/// Bits of [`Header::flags`]. Values are part of the log format: append only.
pub mod flag {
    /// A signal was delivered after the thread's call completed rather than before its next call.
    pub const AFTER_CALL: u32 = 1;
    /// A signal was delivered under the temporary mask of `rt_sigsuspend` and its like.
    pub const SUSPENDED: u32 = 2;
    /// The interval that this event begins cannot be replayed: a checkpoint must follow.
    pub const UNLOGGABLE: u32 = 4;
    /// The operation was begun; whether it took effect is settled by a later record, or by recovery.
    pub const STARTED: u32 = 8;
    /// A call took a pending signal of the unit (signalfd): replay takes it as well.
    pub const TOOK_SIGNAL: u32 = 16;
    /// The call was served inside the process: it changes nothing that the supervisor keeps.
    pub const FAST: u32 = 32;
}

/// What kind of event a record describes. Values are part of the log format: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// A system call was completed with `result` and the outputs in the payload.
    Call = 1,
    /// A signal was delivered; the payload's only output is its `siginfo_t` (128 bytes, address 0).
    Signal = 2,
    /// A thread that stood in user code (new, or preempted) was given the turn.
    Sched = 3,
    /// A trapped instruction (`rdtsc`, `rdtscp`, `cpuid`) was given its result.
    Insn = 4,
    /// The unit ended by itself; `result` is its wait status.
    Exit = 5,
    /// The unit executed a new program image; a checkpoint follows.
    Exec = 6,
}

impl Kind {
    /// The kind with this value.
    pub const fn from_u16(value: u16) -> Option<Kind> {
        Some(match value {
            1 => Kind::Call,
            2 => Kind::Signal,
            3 => Kind::Sched,
            4 => Kind::Insn,
            5 => Kind::Exit,
            6 => Kind::Exec,
            _ => return None,
        })
    }
}

/// Header of a record, 48 bytes, little endian.
///
/// | offset | field |
/// |---|---|
/// | 0 | `len`: whole record in bytes, header included, a multiple of 8 |
/// | 4 | `kind` |
/// | 6 | `nr`: system call number, or signal number for `Kind::Signal` |
/// | 8 | `tid`: thread (as the program knows it) |
/// | 12 | `flags` |
/// | 16 | `sii`: state interval index that this event begins |
/// | 24 | `result` |
/// | 32 | `digest`: of the number, the arguments and the memory they point to |
/// | 40 | `outs`: number of outputs in the payload (u32), then 4 reserved bytes |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// Whole record in bytes.
    pub len: u32,
    /// A [`Kind`].
    pub kind: u16,
    /// System call or signal number.
    pub nr: u16,
    /// Thread id as the program knows it.
    pub tid: u32,
    /// Bits of [`flag`].
    pub flags: u32,
    /// State interval index.
    pub sii: u64,
    /// Result as the kernel returns it (negative errno on failure).
    pub result: i64,
    /// Digest of number, arguments and input memory.
    pub digest: u64,
    /// Number of outputs in the payload.
    pub outs: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<Header>() == HEADER_BYTES);
    assert!(offset_of!(Header, len) == 0);
    assert!(offset_of!(Header, kind) == 4);
    assert!(offset_of!(Header, nr) == 6);
    assert!(offset_of!(Header, tid) == 8);
    assert!(offset_of!(Header, flags) == 12);
    assert!(offset_of!(Header, sii) == 16);
    assert!(offset_of!(Header, result) == 24);
    assert!(offset_of!(Header, digest) == 32);
    assert!(offset_of!(Header, outs) == 40);
    assert!(offset_of!(Header, reserved) == 44);
};

impl Header {
    /// The encoded form.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        b[0..4].copy_from_slice(&self.len.to_le_bytes());
        b[4..6].copy_from_slice(&self.kind.to_le_bytes());
        b[6..8].copy_from_slice(&self.nr.to_le_bytes());
        b[8..12].copy_from_slice(&self.tid.to_le_bytes());
        b[12..16].copy_from_slice(&self.flags.to_le_bytes());
        b[16..24].copy_from_slice(&self.sii.to_le_bytes());
        b[24..32].copy_from_slice(&self.result.to_le_bytes());
        b[32..40].copy_from_slice(&self.digest.to_le_bytes());
        b[40..44].copy_from_slice(&self.outs.to_le_bytes());
        b[44..48].copy_from_slice(&self.reserved.to_le_bytes());
        b
    }

    /// Decodes without judging: [`Record::parse`] does.
    pub fn from_bytes(b: &[u8; HEADER_BYTES]) -> Header {
        let u16_at = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        Header {
            len: u32_at(b, 0),
            kind: u16_at(4),
            nr: u16_at(6),
            tid: u32_at(b, 8),
            flags: u32_at(b, 12),
            sii: u64_at(b, 16),
            result: u64_at(b, 24) as i64,
            digest: u64_at(b, 32),
            outs: u32_at(b, 40),
            reserved: u32_at(b, 44),
        }
    }
}

/// The caller makes sure that the bytes are there.
fn u32_at(b: &[u8], i: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&b[i..i + 4]);
    u32::from_le_bytes(n)
}

/// The caller makes sure that the bytes are there.
fn u64_at(b: &[u8], i: usize) -> u64 {
    let mut n = [0; 8];
    n.copy_from_slice(&b[i..i + 8]);
    u64::from_le_bytes(n)
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// The record goes on after the end of the bytes.
    Truncated,
    /// The length field cannot be that of a record.
    Length(u32),
    /// No [`Kind`] has this value.
    Kind(u16),
    /// A reserved field or padding is not zero.
    Reserved,
    /// Output `.0` (counted from 0) does not fit into the record, or the record goes on after the
    /// last one.
    Output(u32),
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            ParseError::Truncated => write!(f, "the record is cut off"),
            ParseError::Length(n) => write!(f, "{n} cannot be the length of a record"),
            ParseError::Kind(k) => write!(f, "no kind of event has the number {k}"),
            ParseError::Reserved => write!(f, "reserved bytes of the record are not zero"),
            ParseError::Output(i) => write!(f, "output {i} does not fit into the record"),
        }
    }
}

impl core::error::Error for ParseError {}

/// A record whose every length has been checked, in the bytes that it was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// The fixed part.
    pub header: Header,
    /// What [`Header::kind`] says.
    pub kind: Kind,
    payload: &'a [u8],
}

impl<'a> Record<'a> {
    /// The record at the start of `bytes`, and its length.
    pub fn parse(bytes: &'a [u8]) -> Result<(Record<'a>, usize), ParseError> {
        let head = bytes.first_chunk::<HEADER_BYTES>().ok_or(ParseError::Truncated)?;
        let header = Header::from_bytes(head);
        let len = header.len as usize;
        if !(HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len) || !len.is_multiple_of(8) {
            return Err(ParseError::Length(header.len));
        }
        let kind = Kind::from_u16(header.kind).ok_or(ParseError::Kind(header.kind))?;
        if header.reserved != 0 {
            return Err(ParseError::Reserved);
        }
        let payload = bytes.get(HEADER_BYTES..len).ok_or(ParseError::Truncated)?;
        let mut rest = payload;
        for i in 0..header.outs {
            let (output, padding, after) = split_output(rest).ok_or(ParseError::Output(i))?;
            if u32_at(output, 12) != 0 || padding.iter().any(|&b| b != 0) {
                return Err(ParseError::Reserved);
            }
            rest = after;
        }
        if !rest.is_empty() {
            return Err(ParseError::Output(header.outs));
        }
        Ok((Record { header, kind, payload }, len))
    }

    /// The memory that the event wrote: address and bytes, in the order of logging.
    pub fn outputs(&self) -> Outputs<'a> {
        Outputs { rest: self.payload }
    }
}

/// Cuts off the first output: its header and data, its padding, and the rest.
fn split_output(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    if bytes.len() < OUTPUT_HEADER_BYTES {
        return None;
    }
    let end = OUTPUT_HEADER_BYTES.checked_add(u32_at(bytes, 8) as usize)?;
    let padded = end.checked_next_multiple_of(8)?;
    let (all, rest) = bytes.split_at_checked(padded)?;
    let (output, padding) = all.split_at(end);
    Some((output, padding, rest))
}

/// Iterator over the outputs of a [`Record`].
#[derive(Clone, Debug)]
pub struct Outputs<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Outputs<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<(u64, &'a [u8])> {
        let (output, _, rest) = split_output(self.rest)?;
        self.rest = rest;
        Some((u64_at(output, 0), &output[OUTPUT_HEADER_BYTES..]))
    }
}

/// An output would make the record longer than [`RECORD_BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the record would be longer than {RECORD_BYTES_MAX} bytes")
    }
}

impl core::error::Error for TooLong {}

/// Builds records, one after the other in the same memory.
#[cfg(feature = "std")]
#[derive(Clone, Debug)]
pub struct RecordBuf {
    header: Header,
    /// Space for the header, then the outputs.
    bytes: Vec<u8>,
}

#[cfg(feature = "std")]
impl RecordBuf {
    /// An empty record of this kind.
    pub fn new(kind: Kind) -> RecordBuf {
        let mut buf = RecordBuf { header: EMPTY, bytes: Vec::with_capacity(4096) };
        buf.reset(kind);
        buf
    }

    /// Begins again, with every field 0 and no outputs. The memory is kept, unless an unusually
    /// long record left more than 1 MiB of it.
    pub fn reset(&mut self, kind: Kind) -> &mut RecordBuf {
        self.header = Header { kind: kind as u16, ..EMPTY };
        self.bytes.clear();
        self.bytes.shrink_to(1 << 20);
        self.bytes.resize(HEADER_BYTES, 0);
        self
    }

    /// Sets the number of the system call or signal.
    pub fn nr(&mut self, nr: u16) -> &mut RecordBuf {
        self.header.nr = nr;
        self
    }

    /// Sets the thread, as the program knows it.
    pub fn tid(&mut self, tid: u32) -> &mut RecordBuf {
        self.header.tid = tid;
        self
    }

    /// Sets the bits of [`flag`].
    pub fn flags(&mut self, flags: u32) -> &mut RecordBuf {
        self.header.flags = flags;
        self
    }

    /// Sets the state interval index that the event begins.
    pub fn sii(&mut self, sii: u64) -> &mut RecordBuf {
        self.header.sii = sii;
        self
    }

    /// Sets the result, a negative errno on failure.
    pub fn result(&mut self, result: i64) -> &mut RecordBuf {
        self.header.result = result;
        self
    }

    /// Sets the digest of number, arguments and input memory.
    pub fn digest(&mut self, digest: u64) -> &mut RecordBuf {
        self.header.digest = digest;
        self
    }

    /// Adds memory that the event wrote. A record that would become too long stays as it was.
    pub fn push_output(&mut self, addr: u64, data: &[u8]) -> Result<(), TooLong> {
        let end = self.bytes.len() + OUTPUT_HEADER_BYTES;
        if data.len() > RECORD_BYTES_MAX || (end + data.len()).next_multiple_of(8) > RECORD_BYTES_MAX {
            return Err(TooLong);
        }
        self.bytes.extend_from_slice(&addr.to_le_bytes());
        // At most RECORD_BYTES_MAX, so it fits; the upper half is the reserved field.
        self.bytes.extend_from_slice(&(data.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.header.outs += 1;
        Ok(())
    }

    /// The encoded record. More may be added and `finish` called again.
    pub fn finish(&mut self) -> &[u8] {
        self.header.len = self.bytes.len() as u32;
        self.bytes[..HEADER_BYTES].copy_from_slice(&self.header.to_bytes());
        &self.bytes
    }
}

#[cfg(feature = "std")]
const EMPTY: Header =
    Header { len: 0, kind: 0, nr: 0, tid: 0, flags: 0, sii: 0, result: 0, digest: 0, outs: 0, reserved: 0 };

/// A 64-bit streaming hash that notices divergence; it does not resist an adversary.
///
/// Each word `w` takes the state `s` to `fold((s ^ w) * M) + A`, where the product has 128 bits and
/// `fold` is the exclusive or of its halves (the step of wyhash). The result is part of the log
/// format: it never changes for the same sequence of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    const M: u64 = 0x9e37_79b9_7f4a_7c15;
    const A: u64 = 0xe703_7ed1_a0b4_28db;

    /// The digest of nothing.
    pub const fn new() -> Digest {
        Digest(Digest::A)
    }

    /// Adds a number.
    #[inline]
    pub const fn add_u64(&mut self, word: u64) {
        self.0 = Digest::mix(self.0, word);
    }

    #[inline]
    const fn mix(state: u64, word: u64) -> u64 {
        let product = (state ^ word) as u128 * Digest::M as u128;
        (product as u64 ^ (product >> 64) as u64).wrapping_add(Digest::A)
    }

    #[inline]
    const fn mix_two(state: u64, a: u64, b: u64) -> u64 {
        let product = (state ^ a) as u128 * (b ^ Digest::M) as u128;
        (product as u64 ^ (product >> 64) as u64).wrapping_add(Digest::A)
    }

    /// Adds bytes and their number, so that `add_bytes` twice differs from once with both.
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        // Long ones in four chains side by side, since each product of one chain waits for the one before it, and two
        // words to a product.
        let (blocks, rest) = if bytes.len() < 128 { (&[][..], bytes) } else { bytes.as_chunks::<64>() };
        if !blocks.is_empty() {
            let mut lanes = [self.0, self.0 ^ 1, self.0 ^ 2, self.0 ^ 3];
            for block in blocks {
                for (lane, words) in lanes.iter_mut().zip(block.as_chunks::<16>().0) {
                    let [a, b] = [&words[..8], &words[8..]].map(|w| u64::from_le_bytes(w.try_into().unwrap_or([0; 8])));
                    *lane = Digest::mix_two(*lane, a, b);
                }
            }
            for lane in lanes {
                self.add_u64(lane);
            }
        }
        let (words, tail) = rest.as_chunks::<8>();
        for word in words {
            self.add_u64(u64::from_le_bytes(*word));
        }
        if !tail.is_empty() {
            let mut word = [0; 8];
            word[..tail.len()].copy_from_slice(tail);
            self.add_u64(u64::from_le_bytes(word));
        }
        self.add_u64(bytes.len() as u64);
    }

    /// The hash of what was added so far.
    pub const fn finish(&self) -> u64 {
        let mut last = *self;
        last.add_u64(0);
        last.add_u64(0);
        last.0
    }
}

impl Default for Digest {
    fn default() -> Digest {
        Digest::new()
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    type Outs = Vec<(u64, Vec<u8>)>;

    fn any_header() -> impl Strategy<Value = Header> {
        (1..=6u16, any::<(u16, u32, u32, u64, i64, u64)>()).prop_map(|(kind, (nr, tid, flags, sii, result, digest))| {
            Header { kind, nr, tid, flags, sii, result, digest, ..EMPTY }
        })
    }

    fn any_outs() -> impl Strategy<Value = Outs> {
        vec((any::<u64>(), vec(any::<u8>(), 0..40)), 0..5)
    }

    fn encode(buf: &mut RecordBuf, h: &Header, outs: &Outs) -> Vec<u8> {
        buf.reset(Kind::from_u16(h.kind).expect("a kind"))
            .nr(h.nr)
            .tid(h.tid)
            .flags(h.flags)
            .sii(h.sii)
            .result(h.result)
            .digest(h.digest);
        for (addr, data) in outs {
            buf.push_output(*addr, data).expect("short");
        }
        buf.finish().to_vec()
    }

    proptest! {
        #[test]
        fn round_trip(
            records in vec((any_header(), any_outs()), 1..5),
            trailing in vec(any::<u8>(), 0..60),
        ) {
            let mut buf = RecordBuf::new(Kind::Exit);
            let mut log = Vec::new();
            for (header, outs) in &records {
                log.extend(encode(&mut buf, header, outs));
            }
            log.extend(trailing);
            let mut at = 0;
            for (header, outs) in &records {
                let (record, len) = Record::parse(&log[at..]).expect("a record");
                let expected = Header { len: len as u32, outs: outs.len() as u32, ..*header };
                prop_assert_eq!(record.header, expected);
                prop_assert_eq!(record.kind as u16, header.kind);
                let got: Outs = record.outputs().map(|(a, d)| (a, d.to_vec())).collect();
                prop_assert_eq!(&got, outs);
                at += len;
            }
        }

        #[test]
        fn truncation_is_an_error(header in any_header(), outs in any_outs()) {
            let bytes = encode(&mut RecordBuf::new(Kind::Call), &header, &outs);
            for n in 0..bytes.len() {
                prop_assert_eq!(Record::parse(&bytes[..n]), Err(ParseError::Truncated));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
            if let Ok((record, len)) = Record::parse(&bytes) {
                prop_assert!(len <= bytes.len());
                prop_assert_eq!(record.outputs().count(), record.header.outs as usize);
            }
        }

        /// Damage that leaves a record whole gives its one encoding back, so nothing is read into
        /// bytes that are not part of the format.
        #[test]
        fn a_damaged_record_is_refused_or_canonical(
            header in any_header(),
            outs in any_outs(),
            damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut buf = RecordBuf::new(Kind::Call);
            let mut bytes = encode(&mut buf, &header, &outs);
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok((record, len)) = Record::parse(&bytes) {
                let outs: Outs = record.outputs().map(|(a, d)| (a, d.to_vec())).collect();
                let again = encode(&mut buf, &record.header, &outs);
                prop_assert_eq!(&again[..], &bytes[..len]);
            }
        }

        #[test]
        fn digests_notice_a_changed_byte(
            bytes in vec(any::<u8>(), 1..64),
            at in any::<prop::sample::Index>(),
            change in 1..=255u8,
        ) {
            let digest = |b: &[u8]| {
                let mut d = Digest::new();
                d.add_bytes(b);
                d.finish()
            };
            let mut other = bytes.clone();
            other[at.index(bytes.len())] ^= change;
            prop_assert_ne!(digest(&bytes), digest(&other));
        }
    }

    #[test]
    fn lengths_are_bounded() {
        let mut bytes = RecordBuf::new(Kind::Call).finish().to_vec();
        for len in [0, 8, 40, 47, 49, RECORD_BYTES_MAX as u32 + 8, u32::MAX] {
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            assert_eq!(Record::parse(&bytes), Err(ParseError::Length(len)));
        }

        let mut buf = RecordBuf::new(Kind::Call);
        let most = vec![7; RECORD_BYTES_MAX - HEADER_BYTES - 16];
        buf.push_output(1, &most).expect("fits exactly");
        assert_eq!(buf.finish().len(), RECORD_BYTES_MAX);
        assert!(Record::parse(buf.finish()).is_ok());
        assert_eq!(buf.push_output(2, &[]), Err(TooLong));
        assert_eq!(buf.finish().len(), RECORD_BYTES_MAX);
        buf.reset(Kind::Call);
        assert_eq!(buf.push_output(1, &[0; RECORD_BYTES_MAX]), Err(TooLong));
        assert!(buf.bytes.capacity() <= 2 << 20, "the memory of a long record is given back");
    }

    #[test]
    fn reserved_bytes_are_zero() {
        let mut buf = RecordBuf::new(Kind::Call);
        buf.push_output(0x1000, b"abc").expect("short");
        let good = buf.finish().to_vec();
        assert!(Record::parse(&good).is_ok());
        for at in [44, HEADER_BYTES + 12, HEADER_BYTES + 16 + 3, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] = 1;
            assert_eq!(Record::parse(&bad), Err(ParseError::Reserved), "byte {at}");
        }
        let mut bad = good.clone();
        bad[40] = 2;
        assert_eq!(Record::parse(&bad), Err(ParseError::Output(1)));
        bad[40] = 0;
        assert_eq!(Record::parse(&bad), Err(ParseError::Output(0)));
        bad = good;
        bad[4] = 77;
        assert_eq!(Record::parse(&bad), Err(ParseError::Kind(77)));
    }

    #[test]
    fn reuse_does_not_allocate() {
        let mut buf = RecordBuf::new(Kind::Call);
        buf.push_output(1, &[1; 3000]).expect("short");
        let before = (buf.bytes.as_ptr(), buf.bytes.capacity());
        for _ in 0..10 {
            buf.reset(Kind::Signal).push_output(1, &[1; 3000]).expect("short");
        }
        assert_eq!((buf.bytes.as_ptr(), buf.bytes.capacity()), before);
    }

    /// These values are in logs.
    #[test]
    fn digests_are_stable() {
        let mut d = Digest::new();
        assert_eq!(d.finish(), 0x2f3f_8dbe_c0d7_97a4);
        d.add_u64(1);
        assert_eq!(d.finish(), 0xaaac_2797_0fa0_aa75);
        d.add_bytes(b"hello, world");
        assert_eq!(d.finish(), 0xb2a7_5da3_9cd8_7977);
    }

    #[test]
    fn boundaries_count() {
        let digest = |parts: &[&[u8]]| {
            let mut d = Digest::new();
            for part in parts {
                d.add_bytes(part);
            }
            d.finish()
        };
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        assert_ne!(digest(&[b"a\0"]), digest(&[b"a"]));
        assert_ne!(digest(&[b""]), digest(&[]));
    }
}

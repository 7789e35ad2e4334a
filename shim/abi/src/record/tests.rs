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

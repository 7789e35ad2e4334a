use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::VecDeque;

/// Memory as a mapping would give it.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Chunk([u8; 64]);

struct Memory {
    chunks: Vec<Chunk>,
    len: usize,
}

impl Memory {
    /// A ring's memory with `capacity` bytes of data, filled with garbage.
    fn new(capacity: usize) -> Memory {
        let len = Ring::HEADER_BYTES + capacity;
        Memory { chunks: vec![Chunk([0xa5; 64]); len.div_ceil(64)], len }
    }

    fn ptr(&mut self) -> *mut u8 {
        self.chunks.as_mut_ptr().cast()
    }

    fn create(&mut self) -> Ring {
        // SAFETY: the tests keep the memory longer than the handles and use it through one
        // producer and one consumer only.
        unsafe { Ring::create(self.ptr(), self.len) }.expect("a ring")
    }

    fn attach(&mut self) -> Result<Ring, RingError> {
        // SAFETY: as in `create`.
        unsafe { Ring::attach(self.ptr(), self.len) }
    }

    fn set(&mut self, at: usize, value: u64) {
        self.chunks[at / 64].0[at % 64..at % 64 + 8].copy_from_slice(&value.to_le_bytes());
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Reserve, fill, commit.
    Push(Vec<u8>),
    /// Reserve, fill a part, be killed; a new producer attaches.
    Kill(Vec<u8>, prop::sample::Index),
    /// Reserve and think better of it.
    Drop(usize),
    /// Look at a record without releasing it, be killed; a new consumer attaches.
    Peek,
    /// Take a record.
    Pop,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => vec(any::<u8>(), 0..90).prop_map(Op::Push),
        1 => (vec(any::<u8>(), 0..90), any::<prop::sample::Index>())
            .prop_map(|(data, n)| Op::Kill(data, n)),
        1 => (0..90usize).prop_map(Op::Drop),
        1 => Just(Op::Peek),
        4 => Just(Op::Pop),
    ]
}

proptest! {
    /// The ring behaves as a queue, whoever is killed when, and refuses a record only if it is
    /// more than half full or the record is too long.
    #[test]
    fn is_a_queue(
        capacity in 64..400usize,
        ops in vec(any_op(), 1..200),
    ) {
        let mut memory = Memory::new(capacity);
        let mut producer = memory.create();
        let mut consumer = memory.attach().expect("a ring");
        let mut model: VecDeque<Vec<u8>> = VecDeque::new();
        let max = producer.record_max();
        prop_assert!(framed(max as u64) as usize <= capacity / 2);
        for op in ops {
            match op {
                Op::Push(data) => match producer.reserve(data.len()) {
                    Some(room) => {
                        prop_assert_eq!(room.len(), data.len());
                        room.copy_from_slice(&data);
                        producer.commit();
                        model.push_back(data);
                    }
                    None => prop_assert!(data.len() > max || !model.is_empty()
                        || consumer.peek().expect("sound").is_none()),
                },
                Op::Kill(data, n) => {
                    if let Some(room) = producer.reserve(data.len()) {
                        let n = n.index(data.len() + 1);
                        room[..n].copy_from_slice(&data[..n]);
                    }
                    producer = memory.attach().expect("still a ring");
                    producer.commit();
                }
                Op::Drop(len) => {
                    producer.reserve(len);
                }
                Op::Peek => {
                    let front = consumer.peek().expect("sound");
                    prop_assert_eq!(front, model.front().map(Vec::as_slice));
                    consumer = memory.attach().expect("still a ring");
                    consumer.release();
                }
                Op::Pop => {
                    let front = consumer.peek().expect("sound").map(<[u8]>::to_vec);
                    prop_assert_eq!(front, model.pop_front());
                    consumer.release();
                }
            }
        }
        while let Some(expected) = model.pop_front() {
            prop_assert_eq!(consumer.peek().expect("sound"), Some(&expected[..]));
            consumer.release();
        }
        prop_assert_eq!(consumer.peek(), Ok(None));
        // Empty again, it takes the longest record wherever its head stands.
        prop_assert!(producer.reserve(max).is_some());
        prop_assert!(producer.reserve(max + 1).is_none());
    }

    /// Whatever is written over a ring, the consumer gets an error or bytes within the ring.
    #[test]
    fn damage_never_panics(
        records in vec(vec(any::<u8>(), 0..40), 0..6),
        damage in vec((0..Ring::HEADER_BYTES + 200, any::<u8>()), 1..8),
    ) {
        let mut memory = Memory::new(256);
        let mut ring = memory.create();
        for record in &records {
            if let Some(room) = ring.reserve(record.len()) {
                room.copy_from_slice(record);
                ring.commit();
            }
        }
        for (at, byte) in damage {
            memory.chunks[at / 64].0[at % 64] = byte;
        }
        if let Ok(mut ring) = memory.attach() {
            for _ in 0..40 {
                if !matches!(ring.peek(), Ok(Some(_))) {
                    break;
                }
                ring.release();
            }
            if let Some(room) = ring.reserve(20) {
                room.fill(1);
                ring.commit();
            }
        }
    }
}

#[test]
fn a_full_ring_refuses_until_it_is_read() {
    let mut memory = Memory::new(64);
    let mut producer = memory.create();
    let mut consumer = memory.attach().expect("a ring");
    for i in 0..4u8 {
        producer.reserve(8).expect("room").fill(i);
        producer.commit();
    }
    assert!(producer.reserve(0).is_none());
    producer.commit();
    assert_eq!(consumer.peek(), Ok(Some(&[0; 8][..])));
    assert!(producer.reserve(8).is_none(), "looking is not releasing");
    consumer.release();
    consumer.release();
    producer.reserve(8).expect("room").fill(4);
    producer.commit();
    for i in 1..5u8 {
        assert_eq!(consumer.peek(), Ok(Some(&[i; 8][..])));
        consumer.release();
    }
    assert_eq!(consumer.peek(), Ok(None));
}

#[test]
fn nothing_is_visible_before_commit() {
    let mut memory = Memory::new(128);
    let mut producer = memory.create();
    let mut consumer = memory.attach().expect("a ring");
    producer.reserve(16).expect("room").fill(1);
    assert_eq!(consumer.peek(), Ok(None));
    let mut next = memory.attach().expect("a ring");
    next.reserve(16).expect("room").fill(2);
    next.commit();
    assert_eq!(consumer.peek(), Ok(Some(&[2; 16][..])));
}

#[test]
fn attach_says_what_is_wrong() {
    let mut memory = Memory::new(256);
    assert_eq!(memory.attach().err(), Some(RingError::Magic));
    memory.create();
    assert!(memory.attach().is_ok());

    let (ptr, len) = (memory.ptr(), memory.len);
    // SAFETY: the memory is ours and no other handle is alive.
    unsafe {
        assert_eq!(Ring::attach(ptr.add(8), len - 8).err(), Some(RingError::Misaligned));
        assert_eq!(Ring::create(ptr.add(8), len - 8).err(), Some(RingError::Misaligned));
        assert_eq!(Ring::attach(core::ptr::null_mut(), len).err(), Some(RingError::Misaligned));
        assert_eq!(Ring::attach(ptr, len - 8).err(), Some(RingError::TooSmall));
        assert_eq!(Ring::attach(ptr, 100).err(), Some(RingError::TooSmall));
        assert_eq!(Ring::create(ptr, 192 + 63).err(), Some(RingError::TooSmall));
    }

    for (at, value, error) in [
        (0, 0, RingError::Magic),
        (8, 2, RingError::Version(2)),
        (16, 8, RingError::Corrupt),
        (16, 129, RingError::Corrupt),
        (16, 264, RingError::TooSmall),
        (64, 12, RingError::Corrupt),
        (128, 8, RingError::Corrupt),
    ] {
        memory.create();
        memory.set(at, value);
        assert_eq!(memory.attach().err(), Some(error), "{value} at {at}");
    }
}

#[test]
fn an_overwritten_frame_is_an_error() {
    let mut memory = Memory::new(256);
    let mut ring = memory.create();
    ring.reserve(16).expect("room").fill(1);
    ring.commit();
    for frame in [0, u64::from(TAG_RECORD) << 32 | 17, u64::from(TAG_PAD) << 32 | 16] {
        memory.set(Ring::HEADER_BYTES, frame);
        assert_eq!(memory.attach().expect("a ring").peek(), Err(RingError::Corrupt));
    }
}

#[test]
fn two_threads() {
    const COUNT: u64 = 100_000;
    let mut memory = Memory::new(1000);
    let mut producer = memory.create();
    let mut consumer = memory.attach().expect("a ring");
    let len = |i: u64| 8 + (i * 7 % 50) as usize;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for i in 0..COUNT {
                loop {
                    if let Some(room) = producer.reserve(len(i)) {
                        room.fill(i as u8);
                        room[..8].copy_from_slice(&i.to_le_bytes());
                        break;
                    }
                    std::thread::yield_now();
                }
                producer.commit();
            }
        });
        for i in 0..COUNT {
            loop {
                if let Some(record) = consumer.peek().expect("sound") {
                    assert_eq!(record.len(), len(i));
                    assert_eq!(record[..8], i.to_le_bytes());
                    assert!(record[8..].iter().all(|&b| b == i as u8));
                    break;
                }
                std::thread::yield_now();
            }
            consumer.release();
        }
    });
}

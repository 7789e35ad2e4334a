//! The image format: round trips, every kind of damage, chains.

use ftrun_ckpt::image::{self, BASE_CHAIN_MAX, Chain, Error, WriteOptions};
use ftrun_ckpt::pages::{Page, PageStore, StagedPages, ZERO_PAGE};
use ftrun_ckpt::runs::{self, PageRun};
use ftrun_ckpt::state::{Mapping, MmFields, PAGE_BYTES, Snapshot, ThreadState};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const BASE: u64 = 0x7000_0000_0000;

fn snapshot(sii: u64) -> Snapshot {
    Snapshot {
        sii,
        at_ns: 5,
        incarnation: 2,
        maps: vec![Mapping {
            start: BASE,
            end: BASE + 0x10_0000,
            prot: 3,
            shared: false,
            grows_down: false,
            offset: 0,
            dev: 0,
            inode: 0,
            path: "[heap]".into(),
        }],
        files: vec![],
        mm: MmFields::default(),
        threads: vec![ThreadState {
            tid: 7,
            comm: "x".into(),
            regs: [3; 27],
            xstate: vec![1; 64],
            sigmask: 4,
            altstack: (1, 2, 3),
            clear_child_tid: 8,
            robust_list: (9, 24),
        }],
        sigactions: vec![[1; 4]; 64],
        model: vec![1, 2, 3],
    }
}

fn page(tag: u8) -> Page {
    let mut page = ZERO_PAGE;
    page[99] = tag;
    page
}

fn stage(pages: &BTreeMap<u64, u8>) -> StagedPages {
    let mut staged = StagedPages::new();
    for (at, tag) in pages {
        staged.push(BASE + at * PAGE_BYTES, &page(*tag)).expect("stage");
    }
    staged
}

fn contents(store: &PageStore) -> BTreeMap<u64, u8> {
    store.iter().map(|(a, p)| ((a - BASE) / PAGE_BYTES, p[99])).collect()
}

fn put(dir: &Path, sii: u64, parent: Option<u64>, pages: &[(u64, u8)], gone: &[PageRun]) -> u64 {
    let staged = stage(&pages.iter().copied().collect());
    let options = WriteOptions { fsync: sii == 1, level: 3 };
    image::write(dir, &snapshot(sii), parent, &staged, gone, options).expect("write").bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_chain_equals_a_map(
        steps in prop::collection::vec(
            (
                any::<bool>(),
                prop::collection::btree_map(0u64..700, 0u8..4, 0..400),
                prop::collection::btree_set(0u64..700, 0..40),
            ),
            1..6,
        )
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut model: BTreeMap<u64, u8> = BTreeMap::new();
        let mut states = Vec::new();
        for (i, (base, pages, gone)) in steps.iter().enumerate() {
            let sii = i as u64 * 3 + 1;
            let gone: Vec<PageRun> = runs::normalize(
                gone.iter().map(|p| PageRun { start: BASE + p * PAGE_BYTES, pages: 2 }).collect(),
            );
            model.retain(|at, _| !gone.iter().any(|r| (r.start..r.end()).contains(&(BASE + at * PAGE_BYTES))));
            model.extend(pages);
            if *base || i == 0 {
                let mut store = PageStore::new();
                store.commit(&stage(&model)).unwrap();
                image::write(dir.path(), &snapshot(sii), None, &store, &[], WriteOptions::default()).unwrap();
            } else {
                let pages: Vec<_> = pages.iter().map(|(a, t)| (*a, *t)).collect();
                put(dir.path(), sii, Some(sii - 3), &pages, &gone);
            }
            states.push((sii, model.clone()));
        }
        let mut chain = Chain::open(dir.path()).unwrap();
        for (sii, model) in &states {
            prop_assert_eq!(chain.at_or_before(sii + 1), Some(*sii));
            let (found, store) = chain.load(*sii).unwrap();
            prop_assert_eq!(&found, &snapshot(*sii));
            prop_assert_eq!(&contents(&store), model);
        }
        // A rebase changes the file, not what it says; pruning keeps two.
        let last = chain.newest().unwrap();
        chain.rebase(last, WriteOptions::default()).unwrap();
        chain.prune(1).unwrap();
        for (sii, model) in states.iter().rev().take(2) {
            prop_assert_eq!(&contents(&chain.load(*sii).unwrap().1), model);
        }
    }
}

#[test]
fn truncation_and_flips_are_detected() {
    let dir = tempfile::tempdir().expect("dir");
    let gone = [PageRun { start: BASE, pages: 3 }];
    put(dir.path(), 1, None, &[(0, 1), (1, 0), (2, 7)], &gone);
    let path = dir.path().join(image::file_name(1));
    let good = std::fs::read(&path).expect("read");
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("write");
        let chain = Chain::open(dir.path()).expect("open");
        match chain.damaged().next() {
            None => chain.load(1).map(|(s, p)| (s, contents(&p))).map_err(|e| e.to_string()),
            Some((sii, e)) => {
                assert_eq!((sii, chain.damaged().count()), (1, 1));
                Err(e.to_string())
            }
        }
    };
    assert!(load(&good).is_ok());
    for len in 0..good.len() {
        let error = load(&good[..len]).expect_err("truncated");
        assert!(error.contains("damaged at byte"), "{len}: {error}");
        assert!(error.contains("ckpt-0000000000000001"), "{error}");
    }
    for at in 0..good.len() {
        for bit in [0, 3, 7] {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let error = load(&bad).expect_err("flipped");
            let version = (8..12).contains(&at);
            assert_eq!(error.contains("written by format"), version, "{at}: {error}");
        }
    }
    let longer = [&good[..], &[0]].concat();
    assert!(load(&longer).is_err(), "a byte too many");
}

#[test]
fn sections_cannot_be_lost_or_swapped() {
    let dir = tempfile::tempdir().expect("dir");
    let pages: Vec<_> = (0..600).map(|i| (i, 1 + (i % 200) as u8)).collect();
    put(dir.path(), 1, None, &pages, &[]);
    let path = dir.path().join(image::file_name(1));
    let good = std::fs::read(&path).expect("read");
    let mut cuts = vec![48];
    while let Some(&at) = cuts.last().filter(|at| **at < good.len()) {
        let len = u32::from_le_bytes(good[at + 12..at + 16].try_into().expect("four"));
        cuts.push(at + 24 + len as usize);
    }
    assert_eq!(cuts.len(), 6, "snapshot, three of pages, end");
    let part = |i: usize| &good[cuts[i]..cuts[i + 1]];
    for order in [&[0, 2, 3, 4][..], &[0, 2, 1, 3, 4], &[0, 1, 1, 2, 3, 4], &[1, 2, 3, 4], &[4]] {
        let mut bad = good[..48].to_vec();
        order.iter().for_each(|i| bad.extend(part(*i)));
        std::fs::write(&path, bad).expect("write");
        let chain = Chain::open(dir.path()).expect("open");
        assert!(matches!(chain.load(1), Err(Error::Damaged { .. })), "{order:?}");
    }
}

#[test]
fn huge_sizes_in_a_file_are_not_believed() {
    let dir = tempfile::tempdir().expect("dir");
    put(dir.path(), 1, None, &[(0, 1)], &[]);
    let path = dir.path().join(image::file_name(1));
    let good = std::fs::read(&path).expect("read");
    // The head of the first section, with a checksum that fits.
    for field in [4, 8, 12] {
        let mut bad = good.clone();
        bad[48 + field..48 + field + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32fast::hash(&bad[48..68]);
        bad[68..72].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(&path, bad).expect("write");
        let chain = Chain::open(dir.path()).expect("open");
        assert!(matches!(chain.load(1), Err(Error::Damaged { .. })), "field {field}");
    }
}

#[test]
fn a_new_base_is_asked_for_in_time() {
    let dir = tempfile::tempdir().expect("dir");
    let open = || Chain::open(dir.path()).expect("open");
    assert!(open().base_needed(), "nothing there");
    let noise = |seed: u64| -> Vec<(u64, u8)> { (0..200).map(|i| (i, (i * seed % 251) as u8)).collect() };
    let base = put(dir.path(), 1, None, &noise(7), &[]);
    assert!(!open().base_needed());
    let mut deltas = 0;
    let mut sii = 1;
    while deltas <= base {
        assert!(!open().base_needed());
        sii += 1;
        deltas += put(dir.path(), sii, Some(sii - 1), &noise(sii), &[]);
    }
    assert!(open().base_needed(), "the deltas have outgrown the base");

    let dir = tempfile::tempdir().expect("dir");
    let mut store = PageStore::new();
    let mut state = 1u64;
    for i in 0..200 {
        let mut noise = ZERO_PAGE;
        noise.iter_mut().for_each(|b| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *b = (state >> 56) as u8;
        });
        store.put(BASE + i * PAGE_BYTES, &noise).expect("put");
    }
    image::write(dir.path(), &snapshot(1), None, &store, &[], WriteOptions::default()).expect("base");
    let mut chain = Chain::open(dir.path()).expect("open");
    for sii in 2..=BASE_CHAIN_MAX as u64 + 1 {
        assert!(!chain.base_needed(), "{sii}");
        put(dir.path(), sii, Some(sii - 1), &[(1, 1)], &[]);
        chain.add(sii).expect("add");
    }
    assert!(chain.base_needed(), "too long");
    assert_eq!(chain.prune(2).expect("prune"), 0, "all are needed");
}

#[test]
fn pruning_keeps_two_and_what_they_need() {
    let dir = tempfile::tempdir().expect("dir");
    put(dir.path(), 1, None, &[(0, 1)], &[]);
    put(dir.path(), 2, Some(1), &[(1, 1)], &[]);
    put(dir.path(), 3, None, &[(0, 2)], &[]);
    put(dir.path(), 4, Some(3), &[(1, 2)], &[]);
    put(dir.path(), 5, Some(4), &[(2, 2)], &[]);
    std::fs::write(dir.path().join(".ckpt-0000000000000006.tmp"), "half").expect("write");
    std::fs::write(dir.path().join("other"), "not ours").expect("write");
    let mut chain = Chain::open(dir.path()).expect("open");
    assert_eq!(chain.prune(0).expect("prune"), 2);
    chain.remove_temporary().expect("remove");
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .expect("dir")
        .map(|e| e.expect("entry").file_name().into_string().expect("name"))
        .collect();
    names.sort();
    assert_eq!(names, [image::file_name(3), image::file_name(4), image::file_name(5), "other".into()]);
    assert_eq!(contents(&chain.load(5).expect("load").1), [(0, 2), (1, 2), (2, 2)].into());
}

#[test]
fn a_broken_chain_falls_back_and_says_why() {
    let dir = tempfile::tempdir().expect("dir");
    put(dir.path(), 1, None, &[(0, 1)], &[]);
    put(dir.path(), 2, Some(1), &[(1, 1)], &[]);
    put(dir.path(), 3, Some(2), &[(1, 2)], &[]);
    std::fs::remove_file(dir.path().join(image::file_name(2))).expect("remove");
    let chain = Chain::open(dir.path()).expect("open");
    let error = chain.load(3).expect_err("missing").to_string();
    assert!(error.contains("0x2 is missing") && error.contains("0x3"), "{error}");
    let (found, errors) = chain.load_newest(u64::MAX);
    assert_eq!(found.expect("the base").0.sii, 1);
    assert_eq!(errors.len(), 1);
    assert!(chain.base_needed(), "the newest cannot be built on");
    let (none, _) = chain.load_newest(0);
    assert!(none.is_none());
}

#[test]
fn a_failed_write_publishes_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let missing = dir.path().join("no");
    let pages = StagedPages::new();
    let error = image::write(&missing, &snapshot(1), None, &pages, &[], WriteOptions::default());
    assert!(error.expect_err("no directory").to_string().contains("no/.ckpt-"));
}

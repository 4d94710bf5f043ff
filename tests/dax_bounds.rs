//! The bound of resident plaintext: what it keeps, what it evicts, and what several maps of one volume do to each other.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod vault;

use std::sync::Arc;

use daxcrypt::dax::{DaxError, MapOptions};
use daxcrypt::pmem::Access;
use daxcrypt::volume::Volume;
use vault::{PAGE, Vault, load, pattern, store, writable};

/// The least bound there is.
const BOUND: u64 = 256 << 10;
const BOUND_PAGES: u64 = BOUND / PAGE;

/// Pages `0..BOUND_PAGES` in an order in which nothing is read ahead.
fn scattered() -> impl Iterator<Item = u64> {
    (0..BOUND_PAGES).map(|index| index * 37 % BOUND_PAGES)
}

#[test]
fn a_bound_that_comes_after_the_pages_is_kept_at_once() {
    const PAGES: u64 = 50_000;
    let volume = Arc::new(Volume::ephemeral(PAGES * PAGE).unwrap());
    let first = volume.map(0..volume.size(), &MapOptions::new()).unwrap();
    let before: Vec<u8> = (0..PAGES).step_by(2).map(|page| load(&first, page * PAGE)).collect();
    assert_eq!(volume.resident_bytes(), PAGES / 2 * PAGE);
    let second = volume.map(0..volume.size(), &writable().resident_max(BOUND)).unwrap();
    assert!(volume.resident_bytes() <= BOUND, "{} bytes are resident", volume.resident_bytes());
    for map in [&second, &first] {
        for (index, &byte) in before.iter().enumerate().step_by(97) {
            assert_eq!(load(map, index as u64 * 2 * PAGE), byte);
            assert!(volume.resident_bytes() <= BOUND);
        }
    }
}

#[test]
fn touching_what_another_map_has_brought_in_evicts_nothing() {
    let (_vault, volume) = Vault::new(4 << 20);
    let maps = [0, 1].map(|_| volume.map(0..4 << 20, &writable().resident_max(BOUND)).unwrap());
    scattered().for_each(|page| assert_eq!(load(&maps[0], page * PAGE), pattern(page * PAGE)));
    assert_eq!(volume.resident_bytes(), BOUND);
    for page in scattered() {
        assert_eq!(load(&maps[1], page * PAGE), pattern(page * PAGE));
        assert_eq!(volume.resident_bytes(), BOUND, "page {page}");
    }
}

fn is_eager<T>(result: &Result<T, DaxError>, wanted: (u64, u64)) -> bool {
    matches!(*result, Err(DaxError::Eager { len_bytes, resident_max }) if (len_bytes, resident_max) == wanted)
}

#[test]
fn a_bound_that_eager_maps_leave_no_room_in_is_refused() {
    const SIZE: u64 = 4 << 20;
    let (_vault, volume) = Vault::new(SIZE);
    let eager = |range| volume.map(range, &writable().eager());
    let lazy = |bound| volume.map(0..SIZE, &writable().resident_max(bound));

    let large = eager(0..1 << 20).unwrap();
    let overlapping = eager(512 << 10..3 << 19).unwrap();
    assert!(is_eager(&lazy(1 << 20), (3 << 19, 1 << 20)));
    assert!(is_eager(&lazy(3 << 19), (3 << 19, 3 << 19)), "no room for a page of the lazy map");
    assert!(is_eager(&volume.map(0..PAGE, &writable().eager().resident_max(1)), (3 << 19, BOUND)));
    drop((large, overlapping));

    let lazy = lazy(2 * BOUND).unwrap();
    assert!(is_eager(&eager(0..1 << 20), (1 << 20, 2 * BOUND)));
    let small = eager(0..BOUND).unwrap();
    for offset in (0..SIZE).step_by(512) {
        assert_eq!(load(&lazy, offset), pattern(offset));
        store(&lazy, offset, 7);
        assert!(volume.resident_bytes() <= 2 * BOUND);
    }
    assert!((0..BOUND).step_by(512).all(|offset| load(&small, offset) == 7));
    assert!((0..SIZE).step_by(512).all(|offset| load(&lazy, offset) == 7));
}

#[test]
fn a_pinned_page_keeps_only_itself_from_being_evicted() {
    let (_vault, volume) = Vault::new(1 << 20);
    let lazy = volume.map(0..1 << 20, &writable()).unwrap();
    let _pinned = volume.map(3 * PAGE..5 * PAGE, &writable().eager()).unwrap();
    lazy.prefetch(0..1 << 20).unwrap();
    assert_eq!(lazy.evict(0..1 << 20).unwrap(), (1 << 20) - 2 * PAGE);
    assert_eq!(volume.resident_bytes(), 2 * PAGE);
}

#[test]
fn closing_a_map_leaves_what_another_one_shows() {
    for options in [writable(), writable().trap_stores()] {
        let (vault, volume) = Vault::new(1 << 20);
        let first = volume.map(0..32 * PAGE, &options).unwrap();
        let second = volume.map(16 * PAGE..48 * PAGE, &options).unwrap();
        first.prefetch(0..32 * PAGE).unwrap();
        second.prefetch(0..32 * PAGE).unwrap();
        [5, 20].iter().for_each(|page| store(&first, page * PAGE, 0xc1));
        first.close().unwrap();
        assert_eq!(volume.resident_bytes(), 32 * PAGE, "neither more nor less than the second map shows");
        assert_eq!(load(&second, 4 * PAGE), 0xc1);
        store(&second, 5 * PAGE, 0xc2);
        second.close().unwrap();
        assert_eq!(volume.resident_bytes(), 0);
        drop(volume);
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        for (page, expected) in [(5, 0xc1), (20, 0xc1), (21, 0xc2), (22, pattern(22 * PAGE))] {
            let mut byte = [0];
            volume.read_at(&mut byte, page * PAGE).unwrap();
            assert_eq!(byte, [expected], "page {page}");
        }
    }
}

//! Much at a time: what is overwritten whole is not brought in before, and what nobody stored to leaves without being read.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

mod vault;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use daxcrypt::dax::{DaxError, DaxMapping, MapOptions};
use daxcrypt::pmem::{Access, Granularity};
use daxcrypt::volume::{Volume, VolumeError};
use vault::{DATA, PAGE, Vault, load, media_byte, pattern, store, writable};

const SIZE: u64 = 1 << 20;

fn contents(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; volume.size() as usize];
    volume.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Every way of knowing what is dirty, lazily.
fn lazy_options() -> [MapOptions; 3] {
    [writable(), writable().trap_stores(), writable().as_on_kernel(5, 15)]
}

#[test]
fn whole_absent_pages_are_written_without_being_brought_in() {
    for options in lazy_options() {
        for granularity in [Granularity::CacheLine, Granularity::Page] {
            let (vault, volume) = Vault::new(SIZE + 512);
            drop(volume);
            let volume = vault.reopen(granularity);
            let mut model = contents(&volume);
            let map = volume.map(0..volume.size(), &options).unwrap();
            let data: Vec<u8> = (0..volume.size()).map(|offset| (offset % 241) as u8).collect();
            let mut write = |range: std::ops::Range<u64>, resident_pages: u64| {
                let place = range.start as usize..range.end as usize;
                map.write(range.start, &data[place.clone()]).unwrap();
                model[place.clone()].copy_from_slice(&data[place]);
                assert_eq!(volume.resident_bytes(), resident_pages * PAGE, "{range:?}");
            };
            write(0..16 * PAGE, 0);
            write(SIZE - PAGE..SIZE + 512, 0); // the last page ends with the volume
            write(20 * PAGE + 100..40 * PAGE + 50, 2);
            write(30 * PAGE..31 * PAGE, 2);
            write(20 * PAGE..21 * PAGE, 2); // resident now, and so stored there
            write(50 * PAGE + 1..50 * PAGE + 2, 3);
            assert!(contents(&volume) == model, "requests see it at once");
            assert!((0..map.len()).all(|offset| load(&map, offset) == model[offset as usize]), "and so do loads");
            map.zero(60 * PAGE + 8..90 * PAGE).unwrap();
            model[60 * PAGE as usize + 8..90 * PAGE as usize].fill(0);
            map.persist(0..map.len()).unwrap();
            // What a process leaves that is killed now.
            let copy = vault.dir.path().join("copy.img");
            std::fs::copy(vault.path(), &copy).unwrap();
            assert!(contents(&Vault::open(&copy, Access::ReadOnly)) == model, "what was persisted is on media");
            map.close().unwrap();
            assert!(contents(&volume) == model);
        }
    }
}

#[test]
fn a_bulk_write_needs_no_room() {
    const BOUND: u64 = 256 << 10;
    let (_vault, volume) = Vault::new(4 << 20);
    let map = volume.map(0..4 << 20, &writable().resident_max(BOUND)).unwrap();
    map.prefetch(0..BOUND).unwrap();
    store(&map, 5, 0xee);
    map.write(BOUND, &vec![0x77; (4 << 20) - BOUND as usize]).unwrap();
    assert_eq!(volume.resident_bytes(), BOUND, "nobody had to leave");
    assert_eq!((load(&map, 5), load(&map, (4 << 20) - 1)), (0xee, 0x77));
}

#[test]
fn a_bulk_write_is_refused_as_every_write_is() {
    let (vault, volume) = Vault::new(SIZE);
    let map = volume.map(0..SIZE, &writable()).unwrap();
    let data = vec![1; SIZE as usize];
    assert!(matches!(map.write(1, &data), Err(DaxError::OutOfRange { .. })));
    assert_eq!(load(&map, 1), pattern(1), "nothing of it was written");
    volume.lock().unwrap();
    assert!(matches!(map.write(0, &data), Err(DaxError::Volume(VolumeError::Locked))));
    drop(map);
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadOnly);
    let map = volume.map(0..SIZE, &MapOptions::new()).unwrap();
    assert!(matches!(map.write(0, &data), Err(DaxError::ReadOnly)));
    assert!(contents(&volume).iter().zip(0..).all(|(byte, offset)| *byte == pattern(offset)));
}

/// Media cannot be read any more: whoever looks at them says so.
fn lose_media(vault: &Vault) {
    OpenOptions::new().write(true).open(vault.path()).unwrap().set_len(DATA).unwrap();
}

#[test]
fn pages_that_nobody_stored_to_leave_without_a_look_at_media() {
    for options in [writable(), writable().trap_stores(), MapOptions::new(), MapOptions::new().as_on_kernel(5, 15)] {
        let (vault, volume) = Vault::new(SIZE);
        let map = volume.map(0..SIZE, &options).unwrap();
        map.prefetch(0..SIZE / 2).unwrap();
        assert_eq!(load(&map, 3), pattern(3));
        if map.writable() {
            store(&map, PAGE, 0x44); // its mark is taken by the sync
            map.sync().unwrap();
            store(&map, 7 * PAGE, 0x45);
        }
        lose_media(&vault);
        let clean_pages = if map.writable() { 7 } else { 8 };
        assert_eq!(map.evict(0..clean_pages * PAGE).unwrap(), clean_pages * PAGE);
        assert_eq!(map.evict(8 * PAGE..SIZE).unwrap(), SIZE / 2 - 8 * PAGE);
        if map.writable() {
            assert!(map.evict(7 * PAGE..8 * PAGE).is_err(), "what was stored to is kept");
            assert_eq!(load(&map, 7 * PAGE), 0x45);
            assert!(map.close().is_err());
        } else {
            map.close().unwrap();
        }
    }
}

#[test]
fn a_map_that_was_synced_ends_without_a_look_at_media() {
    let (vault, volume) = Vault::new(SIZE);
    let map = volume.map(0..SIZE, &writable()).unwrap();
    map.prefetch(0..SIZE).unwrap();
    store(&map, 9, 0x99);
    map.sync().unwrap();
    // Who compared these pages with media would write them.
    let file = OpenOptions::new().write(true).open(vault.path()).unwrap();
    file.write_all_at(&[0xd1; SIZE as usize], DATA).unwrap();
    store(&map, 3 * PAGE, 0x33);
    map.close().unwrap();
    assert_eq!(volume.resident_bytes(), 0);
    let written = |page: u64| media_byte(&volume, page * PAGE) != 0xd1;
    assert_eq!((0..SIZE / PAGE).filter(|&page| written(page)).collect::<Vec<_>>(), [3]);
}

#[test]
fn a_page_is_dirty_for_all_maps_when_one_of_them_stored_to_it() {
    for options in lazy_options() {
        let (_vault, volume) = Vault::new(SIZE);
        let first = volume.map(0..SIZE, &options).unwrap();
        let second = volume.map(0..SIZE, &options).unwrap();
        for page in 0..64 {
            store(if page & 1 == 0 { &first } else { &second }, page * PAGE, 0x3c);
            load(&first, page * PAGE);
        }
        first.sync().unwrap();
        (0..64).for_each(|page| store(&second, page * PAGE + 1, 0x3d));
        assert!(first.evict(0..SIZE).unwrap() > 0);
        assert!((0..64).all(|page| (load(&first, page * PAGE), load(&second, page * PAGE + 1)) == (0x3c, 0x3d)));
        (0..64).for_each(|page| store(&second, page * PAGE + 2, 0x3e));
        second.close().unwrap();
        assert!((0..64).all(|page| load(&first, page * PAGE + 2) == 0x3e));
        first.evict(0..SIZE).unwrap();
        assert!((0..64).all(|page| load(&first, page * PAGE + 2) == 0x3e));
    }
}

/// The bytes of a run of pages are written again and again, each page full of one stamp; its ragged ends share cipher blocks
/// with the counters of two other threads.
const RUN: std::ops::Range<u64> = 10 * PAGE + 104..90 * PAGE + 56;
const COUNTERS: [u64; 2] = [RUN.start - 8, RUN.end];

fn count_up(map: &DaxMapping, offset: u64, stop: &AtomicBool) -> u64 {
    // SAFETY: an aligned word of the map, and this thread's alone.
    let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add(offset as usize).cast()) };
    word.store(0, Ordering::Relaxed);
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        assert_eq!(word.load(Ordering::Relaxed), count);
        count += 1;
        word.store(count, Ordering::Relaxed);
    }
    count
}

fn stamps_of(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

#[test]
fn bulk_writes_touches_evictions_and_syncs_of_the_same_pages_lose_nothing() {
    for options in [writable(), writable().trap_stores(), writable().resident_max(256 << 10)] {
        let (_vault, volume) = Vault::new(SIZE);
        let map = volume.map(0..SIZE, &options).unwrap();
        let data = |stamp: u64| stamp.to_le_bytes().repeat((RUN.end - RUN.start) as usize / 8);
        map.write(RUN.start, &data(1)).unwrap();
        let stop = AtomicBool::new(false);
        let counts: Vec<u64> = thread::scope(|scope| {
            let (map, volume, stop) = (&map, &volume, &stop);
            let counting: Vec<_> =
                COUNTERS.iter().map(|&offset| scope.spawn(move || count_up(map, offset, stop))).collect();
            scope.spawn(move || {
                for round in (0_u64..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    let page = 8 + round * 13 % 80;
                    map.evict(page * PAGE..(page + 10) * PAGE).unwrap();
                    if round % 3 == 0 {
                        map.sync().unwrap();
                    }
                }
            });
            scope.spawn(move || look(map, volume, stop));
            (2..200).for_each(|stamp| map.write(RUN.start, &data(stamp)).unwrap());
            stop.store(true, Ordering::Relaxed);
            counting.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let mut found = vec![0; (RUN.end - RUN.start) as usize];
        map.read(RUN.start, &mut found).unwrap();
        assert!(stamps_of(&found).iter().all(|&stamp| stamp == 199));
        map.close().unwrap();
        let bytes = contents(&volume);
        for (offset, count) in COUNTERS.into_iter().zip(counts) {
            assert_eq!(stamps_of(&bytes[offset as usize..offset as usize + 8]), [count]);
        }
        assert!(stamps_of(&bytes[RUN.start as usize..RUN.end as usize]).iter().all(|&stamp| stamp == 199));
    }
}

/// Whoever looks, through the pointer or by a request, finds words that were stored there, each no older than the one before.
fn look(map: &DaxMapping, volume: &Arc<Volume>, stop: &AtomicBool) {
    let mut seen = vec![0; (RUN.end - RUN.start) as usize / 8];
    let mut round = 0_usize;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let index = round * 509 % seen.len();
        let offset = RUN.start + index as u64 * 8;
        let stamp = if round & 1 == 0 {
            // SAFETY: an aligned word of the map.
            let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add(offset as usize).cast()) };
            word.load(Ordering::Relaxed)
        } else {
            let mut word = [0; 8];
            volume.read_at(&mut word, offset).unwrap();
            u64::from_le_bytes(word)
        };
        assert!(stamp >= seen[index] && stamp < 200, "{stamp:#x} after {}", seen[index]);
        seen[index] = stamp;
    }
}

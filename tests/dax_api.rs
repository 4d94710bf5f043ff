//! Every call of direct maps that hands out or takes places: what it does, and what it says of maps that are locked or read-only,
//! of ranges that are outside, reversed or empty, and when there are two of it. (Forked children: `dax_embedded.rs`.)
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod vault;

use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use daxcrypt::dax::{DaxError, DaxMapping, MapMode, MapOptions, Tracking};
use daxcrypt::namespace::Credential;
use daxcrypt::pmem::{Access, Granularity, OpenError};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::{BeginError, Volume, VolumeError};
use vault::{PAGE, Vault, credential, load, pattern, store, writable};

const SIZE: u64 = 1 << 20;

/// A range that ends before it begins.
const REVERSED: Range<u64> = Range { start: 9, end: 8 };

fn is_outside<T>(result: &Result<T, DaxError>) -> bool {
    matches!(result, Err(DaxError::OutOfRange { .. }))
}

fn is_locked<T>(result: &Result<T, DaxError>) -> bool {
    matches!(result, Err(DaxError::Volume(VolumeError::Locked)))
}

fn is_read_only<T>(result: &Result<T, DaxError>) -> bool {
    matches!(result, Err(DaxError::ReadOnly))
}

fn is_claimed<T>(result: &Result<T, DaxError>) -> bool {
    matches!(result, Err(DaxError::Volume(VolumeError::Claimed { .. })))
}

/// What somebody finds who opens a copy of the file: what was durable when this process was killed.
fn durable(vault: &Vault, range: Range<u64>) -> Vec<u8> {
    let copy = vault.dir.path().join("copy.img");
    fs::copy(vault.path(), &copy).unwrap();
    let mut bytes = vec![0; (range.end - range.start) as usize];
    Vault::open(&copy, Access::ReadOnly).read_at(&mut bytes, range.start).unwrap();
    bytes
}

fn read_only_map() -> (Vault, Arc<Volume>, DaxMapping) {
    let (vault, volume) = Vault::new(SIZE);
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadOnly);
    let map = volume.map(0..SIZE, &MapOptions::new()).unwrap();
    (vault, volume, map)
}

#[test]
fn write_persist_makes_durable_what_it_stores_and_brings_nothing_in() {
    for granularity in [Granularity::CacheLine, Granularity::Page] {
        let (vault, volume) = Vault::new(SIZE);
        drop(volume);
        let volume = vault.reopen(granularity);
        let map = volume.map(PAGE..SIZE, &writable()).unwrap();
        let data: Vec<u8> = (0..3 * PAGE + 40).map(|offset| (offset % 239) as u8).collect();
        for offset in [5, 4 * PAGE - 20] {
            map.write_persist(offset, &data).unwrap();
            assert_eq!(durable(&vault, PAGE + offset..PAGE + offset + data.len() as u64), data);
        }
        assert_eq!(volume.resident_bytes(), 0);
        store(&map, 20 * PAGE, 0x20);
        store(&map, 20 * PAGE + 9, 0x29);
        map.write_persist(20 * PAGE + 1, &[0x21; 8]).unwrap();
        assert_eq!(load(&map, 20 * PAGE + 8), 0x21);
        assert_eq!(durable(&vault, 21 * PAGE + 1..21 * PAGE + 9), [0x21; 8]);
        map.sync().unwrap();
        let expected = [0x20, 0x21, 0x21, 0x21, 0x21, 0x21, 0x21, 0x21, 0x21, 0x29];
        assert_eq!(durable(&vault, 21 * PAGE..21 * PAGE + 10), expected, "stores beside it are not forgotten");
        map.write_persist(map.len(), &[]).unwrap();
        assert!(is_outside(&map.write_persist(map.len(), &[1])) && is_outside(&map.write_persist(u64::MAX, &[1])));
        // Two at once, and a source in another map.
        let other = volume.map(0..SIZE, &writable()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| (0..500).for_each(|_| map.write_persist(30 * PAGE, &[1; 8]).unwrap()));
            scope.spawn(|| (0..500).for_each(|_| other.write_persist(31 * PAGE + 8, &[2; 8]).unwrap()));
        });
        assert_eq!(durable(&vault, 31 * PAGE..31 * PAGE + 16), [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]);
        volume.lock().unwrap();
        assert!(is_locked(&map.write_persist(0, &[1])));
    }
    let (_vault, _volume, map) = read_only_map();
    assert!(is_read_only(&map.write_persist(0, &[1])));
}

#[test]
fn words_of_a_map_are_atomics() {
    let (vault, volume) = Vault::new(SIZE);
    let map = volume.map(PAGE..SIZE, &writable()).unwrap();
    let word = map.atomic_u64(PAGE + 8).unwrap();
    let pattern_word = u64::from_le_bytes(std::array::from_fn(|index| pattern(2 * PAGE + 8 + index as u64)));
    assert_eq!(word.swap(0, Ordering::Relaxed), pattern_word);
    let other = volume.map(0..SIZE, &writable()).unwrap();
    thread::scope(|scope| {
        for count in [word, map.atomic_u64(PAGE + 8).unwrap(), other.atomic_u64(2 * PAGE + 8).unwrap()] {
            scope.spawn(move || {
                for _ in 0..1000 {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..50 {
                other.evict(2 * PAGE..3 * PAGE).unwrap();
            }
        });
    });
    assert_eq!(word.load(Ordering::Relaxed), 3000);
    map.persist(PAGE + 8..PAGE + 16).unwrap();
    assert_eq!(durable(&vault, 2 * PAGE + 8..2 * PAGE + 16), 3000_u64.to_le_bytes());
    map.atomic_u32(12).unwrap().store(7, Ordering::Relaxed);
    assert_eq!(load(&map, 12), 7);
    assert!(map.atomic_u64(map.len() - 8).is_ok());
    assert!(matches!(map.atomic_u64(12), Err(DaxError::Misaligned { offset: 12, alignment: 8 })));
    assert!(is_outside(&map.atomic_u64(map.len())) && is_outside(&map.atomic_u64(u64::MAX - 7)));
    assert!(is_outside(&map.atomic_u32(map.len())));
    volume.lock().unwrap();
    assert!(is_locked(&map.atomic_u64(0)) && is_locked(&map.atomic_u32(0)));
    let (_vault, _volume, map) = read_only_map();
    assert!(is_read_only(&map.atomic_u64(0)));
}

#[test]
fn persist_knows_a_place_by_its_address() {
    let (vault, volume) = Vault::new(SIZE);
    let map = volume.map(PAGE..SIZE, &writable()).unwrap();
    store(&map, 5000, 0x50);
    let place = map.as_ptr().wrapping_add(5000);
    assert_eq!(map.offset_of(place), Some(5000));
    map.persist_at(place, 1).unwrap();
    assert_eq!(durable(&vault, PAGE + 5000..PAGE + 5001), [0x50]);
    let end = map.as_ptr().wrapping_add(map.len() as usize);
    map.persist_at(end, 0).unwrap();
    map.persist_at(map.as_ptr(), map.len() as usize).unwrap();
    assert_eq!((map.offset_of(end), map.offset_of(end.wrapping_add(1))), (Some(map.len()), None));
    assert_eq!(map.offset_of(map.as_ptr().wrapping_sub(1)), None);
    assert!(is_outside(&map.persist_at(end, 1)) && is_outside(&map.persist_at(place, usize::MAX)));
    assert!(
        is_outside(&map.persist_at(std::ptr::null(), 1)) && is_outside(&map.persist_at(&raw const end as *const u8, 1))
    );
    volume.lock().unwrap();
    assert!(is_locked(&map.persist_at(place, 1)));
    let (_vault, _volume, map) = read_only_map();
    assert!(is_read_only(&map.persist_at(map.as_ptr(), 1)));
}

#[test]
fn a_part_has_offsets_of_its_own_and_ends_at_its_end() {
    let (vault, volume) = Vault::new(SIZE);
    let map = volume.map(PAGE..SIZE, &writable()).unwrap();
    let part = map.part(3 * PAGE..5 * PAGE + 8).unwrap();
    assert_eq!((part.range(), part.len()), (&(3 * PAGE..5 * PAGE + 8), 2 * PAGE + 8));
    assert_eq!(part.as_ptr(), map.as_ptr().wrapping_add(3 * PAGE as usize));
    part.write(10, &[0xa1; 6]).unwrap();
    part.persist(10..16).unwrap();
    part.write_persist(16, &[0xa2; 2]).unwrap();
    let mut bytes = [0; 8];
    part.read(10, &mut bytes).unwrap();
    assert_eq!(bytes, [0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa1, 0xa2, 0xa2]);
    assert_eq!(durable(&vault, 4 * PAGE + 10..4 * PAGE + 18), bytes);
    part.zero(11..12).unwrap();
    part.flush(0..part.len()).unwrap();
    map.drain().unwrap();
    assert_eq!(durable(&vault, 4 * PAGE + 10..4 * PAGE + 13), [0xa1, 0, 0xa1]);
    part.prefetch(0..part.len()).unwrap();
    let inner = part.part(PAGE..part.len()).unwrap();
    inner.atomic_u64(8).unwrap().store(5, Ordering::Relaxed);
    inner.atomic_u32(16).unwrap().store(6, Ordering::Relaxed);
    assert_eq!((load(&map, 4 * PAGE + 8), load(&map, 4 * PAGE + 16)), (5, 6));
    assert_eq!(part.clone().part(PAGE + 8..PAGE + 16).unwrap().atomic_u64(0).unwrap().load(Ordering::Relaxed), 5);
    let end = inner.len();
    assert!(is_outside(&inner.read(end - 7, &mut bytes)) && is_outside(&inner.write(end, &[1])));
    assert!(is_outside(&inner.write_persist(u64::MAX, &[1])) && is_outside(&inner.atomic_u64(end)));
    assert!(is_outside(&inner.zero(REVERSED)) && is_outside(&inner.persist(0..end + 1)));
    assert!(is_outside(&inner.flush(REVERSED)) && is_outside(&inner.prefetch(u64::MAX..u64::MAX)));
    for range in [REVERSED, 5..5, 0..map.len() + 1, u64::MAX - 1..u64::MAX] {
        assert!(is_outside(&map.part(range.clone())) && is_outside(&inner.part(range)));
    }
    inner.zero(end..end).unwrap();
    inner.persist(0..0).unwrap();
    volume.lock().unwrap();
    assert!(is_locked(&inner.write(0, &[1])) && is_locked(&inner.persist(0..1)) && is_locked(&inner.atomic_u64(0)));
    let (_vault, _volume, map) = read_only_map();
    let part = map.part(0..PAGE).unwrap();
    assert!(is_read_only(&part.write(0, &[1])) && is_read_only(&part.zero(0..1)) && is_read_only(&part.persist(0..1)));
    assert!(is_read_only(&part.write_persist(0, &[1])) && is_read_only(&part.atomic_u32(0)));
}

#[test]
fn an_exclusive_map_takes_options_and_has_the_calls_of_a_map() {
    let (vault, volume) = Vault::new(SIZE);
    let options = writable().trap_stores().resident_max(256 << 10);
    let mut map = volume.map_exclusive_with(16 * PAGE..SIZE, &options).unwrap();
    assert_eq!((map.range(), map.mode(), map.tracking()), (&(16 * PAGE..SIZE), MapMode::Lazy, Tracking::Trap));
    map.iter_mut().for_each(|byte| *byte ^= 0x80);
    assert!(volume.resident_bytes() <= 256 << 10, "the bound holds");
    assert!(map.iter().zip(16 * PAGE..).all(|(&byte, offset)| byte == pattern(offset) ^ 0x80));
    map.flush(0..PAGE).unwrap();
    map.drain().unwrap();
    map.write_persist(3, b"xyz").unwrap();
    assert_eq!((&map[3..6], &durable(&vault, 16 * PAGE + 3..16 * PAGE + 6)[..]), (&b"xyz"[..], &b"xyz"[..]));
    map.prefetch(0..8 * PAGE).unwrap();
    assert!(map.evict(0..map.len() as u64).unwrap() >= 8 * PAGE);
    assert_eq!((volume.resident_bytes(), &map[3..6]), (0, &b"xyz"[..]));
    let end = map.len() as u64;
    assert!(is_outside(&map.evict(0..end + 1)) && is_outside(&map.flush(REVERSED)) && is_outside(&map.evict(REVERSED)));
    assert_eq!(map.evict(end..end).unwrap(), 0);
    assert!(is_outside(&map.write_persist(end, &[1])));
    let (bytes, persister) = map.split();
    let (left, right) = bytes.split_at_mut(4096 * 4 + 100);
    thread::scope(|scope| {
        for (part, value) in [(left, 0x11), (right, 0x22)] {
            scope.spawn(move || {
                for index in (0..part.len()).step_by(5000) {
                    part[index] = value;
                    persister.persist(&part[index..=index]).unwrap();
                }
            });
        }
    });
    assert!(is_outside(&persister.persist(&[0; 4])));
    assert_eq!(
        (durable(&vault, 16 * PAGE..16 * PAGE + 1)[0], durable(&vault, 20 * PAGE + 100..20 * PAGE + 101)[0]),
        (0x11, 0x22)
    );
    let eager = volume.map_exclusive_with(0..PAGE, &MapOptions::new().eager()).unwrap();
    assert_eq!((eager.mode(), eager.evict(0..PAGE).unwrap()), (MapMode::Eager, 0));
    assert!(is_claimed(&volume.map_exclusive_with(0..PAGE, &options)), "two of it");
    volume.lock().unwrap();
    assert!(is_locked(&map.flush(0..1)) && is_locked(&map.write_persist(0, &[1])));
    assert!(
        is_locked(&volume.map_exclusive_with(0..PAGE, &options)) && is_locked(&volume.map_frozen(0..PAGE, &options))
    );
}

#[test]
fn the_background_write_back_of_an_exclusive_map_shows_to_readers() {
    let (_vault, volume) = Vault::new(SIZE);
    let options = MapOptions::new().write_back_interval(std::time::Duration::from_millis(1));
    let mut map = volume.map_exclusive_with(0..SIZE, &options).unwrap();
    map[77] = 0x7e;
    let mut byte = [0];
    while byte != [0x7e] {
        volume.read_at(&mut byte, 77).unwrap(); // ends with the test's time if it never comes
    }
}

#[test]
fn a_frozen_map_is_a_slice_that_nobody_changes() {
    let (vault, volume) = Vault::new(SIZE);
    let frozen = volume.map_frozen(4 * PAGE..8 * PAGE, &writable()).unwrap();
    assert!(frozen.iter().zip(4 * PAGE..).all(|(&byte, offset)| byte == pattern(offset)));
    assert_eq!((frozen.range(), frozen.mode()), (&(4 * PAGE..8 * PAGE), MapMode::Lazy));
    assert!(matches!(volume.write_at(&[1], 4 * PAGE), Err(VolumeError::Claimed { .. })));
    assert!(is_claimed(&volume.map_frozen(7 * PAGE..9 * PAGE, &MapOptions::new())), "two of it");
    assert!(is_claimed(&volume.map(0..SIZE, &writable())) && is_claimed(&volume.map_exclusive(4 * PAGE..5 * PAGE)));
    frozen.prefetch(0..PAGE).unwrap();
    assert_eq!(frozen.evict(0..4 * PAGE).unwrap(), 4 * PAGE);
    assert!(is_outside(&frozen.prefetch(0..4 * PAGE + 1)) && is_outside(&frozen.evict(REVERSED)));
    assert!(is_outside(&volume.map_frozen(REVERSED, &writable())) && is_outside(&volume.map_frozen(0..0, &writable())));
    assert!(matches!(volume.map_frozen(0..100, &writable()), Err(DaxError::Unaligned { start: 100 })));
    assert_eq!(frozen[5], pattern(4 * PAGE + 5));
    drop(frozen);
    volume.write_at(&[1], 4 * PAGE).unwrap();
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadOnly);
    let frozen = volume.map_frozen(0..SIZE, &MapOptions::new()).unwrap();
    assert_eq!((frozen[4 * PAGE as usize], frozen[9]), (1, pattern(9)));
    assert!(is_read_only(&volume.map_exclusive_with(0..PAGE, &MapOptions::new())));
    assert_eq!(frozen.len() as u64, SIZE);
}

#[test]
fn a_path_and_a_key_are_enough_to_begin() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("vault.img");
    assert!(matches!(Volume::open(&path, &credential()), Err(BeginError::Backing(_))));
    for size in [0, 5000, u64::MAX, u64::MAX / 2] {
        assert!(Volume::create(&path, size, &credential()).is_err() && !path.exists(), "{size}: no file is left");
    }
    let short = Credential::KeyFile(SecretBytes::copy_of(&[7; 3]));
    assert!(Volume::create(&path, SIZE, &short).is_err() && !path.exists());
    let volume = Volume::create(&path, SIZE, &credential()).unwrap();
    assert_eq!(volume.size(), SIZE);
    volume.write_at(b"here", 8).unwrap();
    assert!(matches!(Volume::open(&path, &credential()), Err(BeginError::Backing(OpenError::Busy))), "two of it");
    drop(volume);
    assert!(
        matches!(Volume::create(&path, SIZE, &credential()), Err(BeginError::Backing(_))),
        "nothing is overwritten"
    );
    let wrong = Credential::KeyFile(SecretBytes::copy_of(&[8; 32]));
    assert!(matches!(Volume::open(&path, &wrong), Err(BeginError::Unlock(_))));
    let readers = [(); 2].map(|()| Volume::open_read_only(&path, &credential()).unwrap());
    let mut bytes = [0; 4];
    readers[1].read_at(&mut bytes, 8).unwrap();
    assert_eq!(&bytes, b"here");
    assert!(matches!(readers[0].write_at(&bytes, 0), Err(VolumeError::ReadOnly)));
    drop(readers);
    assert!(Volume::open(&path, &credential()).unwrap().write_at(&bytes, 0).is_ok());
    fs::write(folder.path().join("noise"), [0x5a; 1 << 16]).unwrap();
    assert!(matches!(Volume::open(folder.path().join("noise"), &credential()), Err(BeginError::Namespace(_))));
}

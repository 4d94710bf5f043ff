//! Direct maps on the real kernel: lazy decryption, coherence, persistence, eviction, faults of every kind.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

mod vault;

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use daxcrypt::dax::{DaxError, DaxMapping, MapMode, MapOptions, Tracking};
use daxcrypt::pmem::Access;
use daxcrypt::volume::{Volume, VolumeError};
use vault::{DATA, PAGE, Random, Vault, load, media_byte, pattern, store, writable};

/// Every way of knowing what is dirty.
fn all_options() -> [(MapOptions, MapMode, Tracking); 3] {
    [
        (writable(), MapMode::Lazy, Tracking::Async),
        (writable().trap_stores(), MapMode::Lazy, Tracking::Trap),
        (writable().eager(), MapMode::Eager, Tracking::Compare),
    ]
}

#[test]
fn only_touched_pages_are_decrypted() {
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &MapOptions::new()).unwrap();
    assert_eq!((map.mode(), volume.resident_bytes()), (MapMode::Lazy, 0));
    assert_eq!(load(&map, 5 * PAGE + 17), pattern(5 * PAGE + 17));
    assert_eq!(volume.resident_bytes(), PAGE);
    assert_eq!(load(&map, 200 * PAGE), pattern(200 * PAGE));
    assert_eq!(volume.resident_bytes(), 2 * PAGE);
    drop(map);
    assert_eq!(volume.resident_bytes(), 0, "without a map there is no plaintext");
}

#[test]
fn sequential_touches_read_every_byte_of_every_mode() {
    let (_vault, volume) = Vault::new((1 << 20) + 512);
    for (options, mode, tracking) in all_options() {
        let map = volume.map(8 * PAGE..volume.size(), &options).unwrap();
        assert_eq!((map.mode(), map.tracking()), (mode, tracking));
        for offset in 0..map.len() {
            assert_eq!(load(&map, offset), pattern(8 * PAGE + offset), "{offset}");
        }
        map.close().unwrap();
    }
}

#[test]
fn stores_survive_by_persist_and_by_sync_in_every_mode() {
    for (options, _, _) in all_options() {
        let (vault, volume) = Vault::new((1 << 20) + 512);
        let size = volume.size();
        let map = volume.map(PAGE..size, &options).unwrap();
        store(&map, 100, 0xaa);
        map.persist(100..101).unwrap();
        let mut byte = [0];
        // A second look at media, past this volume's window.
        let read_only = |offset: u64, byte: &mut [u8; 1]| {
            let copy = vault.dir.path().join("copy.img");
            std::fs::copy(vault.path(), &copy).unwrap();
            Vault::open(&copy, Access::ReadOnly).read_at(byte, offset).unwrap();
        };
        read_only(PAGE + 100, &mut byte);
        assert_eq!(byte, [0xaa]);
        for round in 0..3_u8 {
            for offset in [0, 5000, 77 * PAGE, map.len() - 1] {
                store(&map, offset, round ^ 0x5a);
            }
            map.sync().unwrap();
            for offset in [0, 5000, 77 * PAGE, map.len() - 1] {
                read_only(PAGE + offset, &mut byte);
                assert_eq!(byte, [round ^ 0x5a], "round {round}, offset {offset}");
            }
        }
        store(&map, 9 * PAGE, 0xbb);
        map.close().unwrap();
        read_only(10 * PAGE, &mut byte);
        assert_eq!(byte, [0xbb], "closing syncs");
    }
}

#[test]
fn persist_writes_exactly_the_touched_blocks() {
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &writable()).unwrap();
    (0..64).for_each(|offset| store(&map, offset, 0));
    let before: Vec<u8> = (0..64).map(|offset| media_byte(&volume, offset)).collect();
    map.persist(20..28).unwrap();
    let after: Vec<u8> = (0..64).map(|offset| media_byte(&volume, offset)).collect();
    assert_eq!((&before[..16], &before[32..]), (&after[..16], &after[32..]));
    assert_ne!(before[16..32], after[16..32]);
}

#[test]
fn maps_and_requests_see_each_other_at_once() {
    let (_vault, volume) = Vault::new(1 << 20);
    let first = volume.map(0..1 << 20, &writable()).unwrap();
    let second = volume.map(4 * PAGE..64 * PAGE, &writable()).unwrap();
    store(&first, 5 * PAGE, 1);
    assert_eq!(load(&second, PAGE), 1);
    store(&second, PAGE, 2);
    assert_eq!(load(&first, 5 * PAGE), 2);
    let mut byte = [0];
    volume.read_at(&mut byte, 5 * PAGE).unwrap();
    assert_eq!(byte, [2], "a request reads what was stored and not persisted");
    volume.write_at(&[3; 3000], 5 * PAGE - 1500).unwrap();
    assert_eq!((load(&first, 5 * PAGE), load(&second, PAGE + 1499)), (3, 3));
    assert_eq!(load(&second, PAGE + 1500), pattern(5 * PAGE + 1500));
    let resident = volume.resident_bytes();
    volume.write_at(&[9; 4096], 100 * PAGE).unwrap();
    assert_eq!(volume.resident_bytes(), resident, "a write of an absent page leaves it absent");
    assert_eq!(load(&first, 100 * PAGE), 9);
    volume.write_zeroes(5 * PAGE - 100, 200).unwrap();
    assert_eq!((load(&first, 5 * PAGE), load(&first, 5 * PAGE + 100)), (0, 3));
}

#[test]
fn discards_under_a_live_map_show_at_once_and_later_stores_stay() {
    for (options, _, _) in all_options() {
        let (vault, volume) = Vault::made(64 * PAGE, true);
        volume.write_at(&vec![3; 64 * PAGE as usize], 0).unwrap();
        let map = volume.map(0..64 * PAGE, &options).unwrap();
        for page in 0..16 {
            store(&map, page * PAGE, 4);
        }
        // Touched and untouched pages, and the second half of one that stays.
        volume.discard(8 * PAGE, 24 * PAGE).unwrap();
        volume.discard(40 * PAGE + 2048, 2048).unwrap();
        let expected = |offset: u64| match offset {
            offset if (8 * PAGE..32 * PAGE).contains(&offset) => 0,
            offset if (40 * PAGE + 2048..41 * PAGE).contains(&offset) => 0,
            offset if offset < 16 * PAGE && offset % PAGE == 0 => 4,
            _ => 3,
        };
        for offset in (0..64 * PAGE).step_by(512) {
            assert_eq!(load(&map, offset), expected(offset), "{offset}");
        }
        store(&map, 9 * PAGE + 5, 6);
        store(&map, 30 * PAGE, 7);
        map.evict(0..64 * PAGE).unwrap();
        store(&map, 20 * PAGE, 8);
        map.persist(20 * PAGE..20 * PAGE + 1).unwrap();
        map.close().unwrap();
        drop(volume);
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        let mut found = vec![0; 64 * PAGE as usize];
        volume.read_at(&mut found, 0).unwrap();
        for (offset, byte) in found.iter().enumerate() {
            let expected = match offset as u64 {
                offset if offset == 9 * PAGE + 5 => 6,
                offset if offset == 30 * PAGE => 7,
                offset if offset == 20 * PAGE => 8,
                offset => expected(offset),
            };
            assert_eq!(*byte, expected, "{offset}");
        }
    }
}

#[test]
fn safe_copies_move_bytes_and_refuse_what_is_outside() {
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(16 * PAGE..32 * PAGE + 100, &writable()).unwrap();
    let mut model: Vec<u8> = (0..map.len()).map(|offset| pattern(16 * PAGE + offset)).collect();
    map.write(4090, b"hello world").unwrap();
    model[4090..4101].copy_from_slice(b"hello world");
    map.copy_within(100..9000, 300).unwrap();
    model.copy_within(100..9000, 300);
    map.copy_within(5000..20000, 4000).unwrap();
    model.copy_within(5000..20000, 4000);
    map.zero(30000..40001).unwrap();
    model[30000..40001].fill(0);
    let mut bytes = vec![0; model.len()];
    map.read(0, &mut bytes).unwrap();
    assert!(bytes == model);
    assert!((0..map.len()).all(|offset| load(&map, offset) == model[offset as usize]));
    assert!(matches!(map.write(map.len(), &[1]), Err(DaxError::OutOfRange { .. })));
    assert!(matches!(map.read(u64::MAX, &mut [0]), Err(DaxError::OutOfRange { .. })));
    assert!(matches!(volume.map(1..PAGE, &writable()), Err(DaxError::Unaligned { start: 1 })));
    assert!(matches!(volume.map(0..volume.size() + 1, &writable()), Err(DaxError::OutOfRange { .. })));
    let small = writable().eager().resident_max(PAGE);
    assert!(matches!(volume.map(0..1 << 20, &small), Err(DaxError::Eager { .. })));
    map.sync().unwrap();
    drop(map);
    let mut bytes = vec![0; model.len()];
    volume.read_at(&mut bytes, 16 * PAGE).unwrap();
    assert!(bytes == model, "what the safe calls stored is on media");
}

#[test]
fn a_read_only_volume_has_read_only_maps() {
    let (vault, volume) = Vault::new(1 << 20);
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadOnly);
    assert!(matches!(volume.map(0..PAGE, &writable()), Err(DaxError::ReadOnly)));
    let map = volume.map(0..1 << 20, &MapOptions::new()).unwrap();
    assert_eq!(load(&map, 12345), pattern(12345));
    assert!(matches!(map.write(0, &[1]), Err(DaxError::ReadOnly)));
    assert!(matches!(map.persist(0..1), Err(DaxError::ReadOnly)));
    map.evict(0..1 << 20).unwrap();
    assert_eq!((volume.resident_bytes(), load(&map, 12345)), (0, pattern(12345)));
}

#[test]
fn system_calls_fault_pages_in() {
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &MapOptions::new()).unwrap();
    // SAFETY: nobody stores to the map while the slice lives.
    let untouched = unsafe { std::slice::from_raw_parts(map.as_ptr().add(40 * PAGE as usize), 3 * PAGE as usize) };
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(untouched).unwrap();
    let mut back = vec![0; untouched.len()];
    rustix::io::pread(file.as_fd(), &mut back, 0).unwrap();
    assert!(back.iter().zip(40 * PAGE..).all(|(&byte, offset)| byte == pattern(offset)));
}

/// How a forked child ends that runs `body`.
fn child(body: impl FnOnce()) -> i32 {
    // SAFETY: the child touches memory and exits without running anything of the parent's.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        body();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }
}

#[test]
fn a_forked_child_has_no_map_and_leaves_no_zero_pages() {
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &writable()).unwrap();
    assert_eq!(
        child(|| {
            load(&map, 9 * PAGE);
        }),
        libc::SIGSEGV
    );
    assert_eq!(load(&map, 9 * PAGE), pattern(9 * PAGE));
}

#[test]
fn a_store_to_a_read_only_map_faults() {
    let (_vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &MapOptions::new()).unwrap();
    assert!(!map.writable());
    let mut maps = String::new();
    for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
        if line.starts_with(&format!("{:x}-", map.as_ptr() as usize)) {
            maps = line.split(' ').nth(1).unwrap().to_owned();
        }
    }
    assert_eq!(maps, "r--s");
}

#[test]
fn a_media_error_is_an_error_of_that_page_alone() {
    let (vault, volume) = Vault::new(1 << 20);
    let map = volume.map(0..1 << 20, &MapOptions::new()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(vault.path()).unwrap();
    file.set_len(DATA + 128 * PAGE).unwrap();
    let mut byte = [1];
    assert!(map.read(200 * PAGE, &mut byte).is_err());
    assert!(map.prefetch(200 * PAGE..201 * PAGE).is_err());
    assert_eq!(load(&map, 127 * PAGE), pattern(127 * PAGE));
    assert_eq!(volume.resident_bytes(), PAGE);
}

#[test]
fn a_bounded_map_walks_a_volume_and_keeps_every_store() {
    const SIZE: u64 = 16 << 20;
    const BOUND: u64 = 512 << 10;
    for options in [writable(), writable().trap_stores()] {
        let (vault, volume) = Vault::new(SIZE);
        let map = volume.map(0..SIZE, &options.resident_max(BOUND)).unwrap();
        for page in 0..SIZE / PAGE {
            assert_eq!(load(&map, page * PAGE + 1), pattern(page * PAGE + 1));
            store(&map, page * PAGE, 0x33);
            assert!(volume.resident_bytes() <= BOUND);
        }
        assert_eq!(load(&map, 0), 0x33);
        map.close().unwrap();
        drop(volume);
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        let mut page = vec![0; PAGE as usize];
        for start in (0..SIZE).step_by(PAGE as usize) {
            volume.read_at(&mut page, start).unwrap();
            assert_eq!((page[0], page[1]), (0x33, pattern(start + 1)), "{start}");
        }
    }
}

#[test]
fn the_background_write_back_reaches_media() {
    let (_vault, volume) = Vault::new(1 << 20);
    let options = MapOptions::new().writable().write_back_interval(Duration::from_millis(20));
    let map = volume.map(0..1 << 20, &options).unwrap();
    let before = media_byte(&volume, 3 * PAGE);
    let block: Vec<u8> = (0..16).map(|offset| media_byte(&volume, 3 * PAGE + offset)).collect();
    (0..16).for_each(|offset| store(&map, 3 * PAGE + offset, 0xee));
    let deadline = Instant::now() + Duration::from_secs(20);
    while (0..16).all(|offset| media_byte(&volume, 3 * PAGE + offset) == block[offset as usize]) {
        assert!(Instant::now() < deadline, "still {before}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Threads store to words of their own while pages are evicted under them, synced, and rewritten through the volume: no
/// store is ever lost or torn, and all of them are there after reopening.
#[test]
fn concurrent_stores_survive_eviction() {
    const SIZE: u64 = 4 << 20;
    const THREADS: u64 = 4;
    for options in [writable(), writable().trap_stores()] {
        let (vault, volume) = Vault::new(SIZE);
        let map = volume.map(0..SIZE, &options.resident_max(256 << 10)).unwrap();
        let stop = AtomicBool::new(false);
        let last: Vec<Vec<u64>> = thread::scope(|scope| {
            let (map, volume, stop) = (&map, &volume, &stop);
            let workers: Vec<_> = (0..THREADS).map(|id| scope.spawn(move || store_words(map, id, THREADS))).collect();
            scope.spawn(move || disturb(map, volume, stop));
            let last = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
            stop.store(true, Ordering::Relaxed);
            last
        });
        map.close().unwrap();
        drop(volume);
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        for (id, words) in last.iter().enumerate() {
            for (page, &expected) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                let mut word = [0; 8];
                volume.read_at(&mut word, page as u64 * PAGE + id as u64 * 8).unwrap();
                assert_eq!(u64::from_le_bytes(word), expected, "thread {id}, page {page}");
            }
        }
    }
}

/// Stores counters to the thread's word of random pages and checks that each holds what was stored last.
fn store_words(map: &DaxMapping, id: u64, threads: u64) -> Vec<u64> {
    let page_count = map.len() / PAGE;
    let mut last = vec![0; page_count as usize];
    let mut random = Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(id + 1));
    for round in 1..=6000_u64 {
        let page = random.below(page_count);
        assert!(id < threads);
        // SAFETY: the word is aligned and within the map; all threads use atomics on words of their own.
        let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add((page * PAGE + id * 8) as usize).cast()) };
        let found = word.load(Ordering::Relaxed);
        let expected = &mut last[page as usize];
        assert!(*expected == 0 || found == *expected, "thread {id}, page {page}: {found} is not {expected}");
        *expected = round * threads + id;
        word.store(*expected, Ordering::Relaxed);
        if round % 16 == 0 {
            map.persist(page * PAGE + id * 8..page * PAGE + id * 8 + 8).unwrap();
        }
    }
    last
}

/// Syncs, evicts and writes the second half of pages through the volume, until told to stop.
fn disturb(map: &DaxMapping, volume: &Volume, stop: &AtomicBool) {
    let page_count = map.len() / PAGE;
    for round in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
        let page = (round * 37) % page_count;
        match round % 3 {
            0 => map.sync().unwrap(),
            1 => drop(map.evict(page * PAGE..(page + 8).min(page_count) * PAGE).unwrap()),
            _ => volume.write_at(&[7; 1000], page * PAGE + 2048).unwrap(),
        }
    }
}

#[test]
fn a_volume_that_is_or_was_mapped_keeps_its_size_and_one_that_is_is_not_closed() {
    let (vault, volume) = Vault::new(64 << 10);
    volume.mark_in_use().unwrap();
    let map = volume.map_exclusive(0..PAGE).unwrap();
    assert!(matches!(volume.resize(PAGE, true), Err(VolumeError::WasMapped)));
    assert!(matches!(volume.mark_closed(), Err(VolumeError::Mapped)));
    drop(map);
    volume.resize(32 << 10, true).unwrap();
    let map = volume.map(0..32 << 10, &writable()).unwrap();
    assert!(matches!(volume.map(0..33 << 10, &writable()), Err(DaxError::OutOfRange { .. })));
    store(&map, 5, 77);
    map.close().unwrap();
    assert!(matches!(volume.resize(PAGE, true), Err(VolumeError::WasMapped)));
    volume.mark_closed().unwrap();
    drop(volume);
    let volume = Vault::open(&vault.path(), Access::ReadWrite);
    assert!(!volume.header().unclean);
    volume.resize(PAGE, true).unwrap();
    assert_eq!(load(&volume.map(0..PAGE, &writable()).unwrap(), 5), 77);
}

//! Many direct maps in one process: what they cost, and that one does not hold up or end another.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::multiple_unsafe_ops_per_block,
    clippy::undocumented_unsafe_blocks,
    unsafe_code
)]

mod vault;

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use daxcrypt::dax::{DaxMapping, ExclusiveMap, MapOptions};
use daxcrypt::pmem::Access;
use daxcrypt::volume::Volume;
use vault::{PAGE, Vault, child, child_argument, load, pattern, store, writable};

fn count(folder: &str) -> usize {
    fs::read_dir(folder).unwrap().count()
}

fn threads() -> usize {
    count("/proc/self/task")
}

fn descriptors() -> usize {
    count("/proc/self/fd")
}

/// Runs `case` in a process of its own, whose threads and descriptors are nobody else's.
fn alone(name: &str, case: impl FnOnce()) {
    if child_argument().is_none() {
        assert!(child(name, "case").success(), "{name}");
        return;
    }
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur = limit.rlim_max;
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    case();
}

/// A map of each of the first `count` pages.
fn page_maps(volume: &Arc<Volume>, count: u64) -> Vec<DaxMapping> {
    let options = MapOptions::new().writable().write_back_interval(Duration::from_secs(3600));
    (0..count).map(|page| volume.map(page * PAGE..(page + 1) * PAGE, &options).unwrap()).collect()
}

#[test]
fn a_thousand_maps_of_a_page_cost_a_descriptor_each_and_no_thread() {
    alone("a_thousand_maps_of_a_page_cost_a_descriptor_each_and_no_thread", || {
        const MAPS: u64 = 1000;
        let (vault, volume) = Vault::new(MAPS * PAGE);
        let threads_before = threads();
        let first = page_maps(&volume, 1);
        let (threads_of_one, descriptors_of_one) = (threads(), descriptors());
        drop(first);
        let maps = page_maps(&volume, MAPS);
        assert_eq!(threads(), threads_of_one, "the first map began the threads of all");
        assert_eq!(descriptors() - descriptors_of_one, MAPS as usize - 1);
        thread::scope(|scope| {
            for (quarter, maps) in maps.chunks(250).enumerate() {
                scope.spawn(move || {
                    for (map, page) in maps.iter().zip(quarter as u64 * 250..) {
                        assert_eq!(load(map, 9), pattern(page * PAGE + 9), "page {page}");
                        store(map, 5, page as u8);
                    }
                });
            }
        });
        // A child has none of it, and ends nothing of it.
        match unsafe { libc::fork() } {
            0 => {
                let refused = maps.iter().all(|map| map.sync().is_err());
                drop(maps);
                unsafe { libc::_exit(i32::from(!refused)) }
            }
            pid => {
                let mut status = 0;
                assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                assert_eq!(status, 0);
            }
        }
        for map in &maps {
            map.evict(0..PAGE).unwrap();
        }
        assert!(maps.iter().zip(0_u64..).all(|(map, page)| load(map, 5) == page as u8), "faults are still answered");
        maps.into_iter().for_each(|map| map.close().unwrap());
        assert_eq!(threads(), threads_before, "the last map ends the threads");
        assert!(Arc::into_inner(volume).is_some(), "nobody has anything of a map any more");
        let volume = Vault::open(&vault.path(), Access::ReadOnly);
        for page in 0..MAPS {
            let mut byte = [0];
            volume.read_at(&mut byte, page * PAGE + 5).unwrap();
            assert_eq!(byte, [page as u8]);
        }
    });
}

#[test]
fn an_exclusive_map_of_a_page_costs_two_descriptors_and_no_thread() {
    alone("an_exclusive_map_of_a_page_costs_two_descriptors_and_no_thread", || {
        let (_vault, volume) = Vault::new(100 * PAGE);
        let map = |page: u64| volume.map_exclusive(page * PAGE..(page + 1) * PAGE).unwrap();
        let mut maps: Vec<ExclusiveMap> = vec![map(0)];
        let before = (threads(), descriptors());
        maps.extend((1..100).map(map));
        assert_eq!((threads(), descriptors() - before.1), (before.0, 2 * 99));
        for (map, page) in maps.iter_mut().zip(0..) {
            assert_eq!(map[7], pattern(page * PAGE + 7));
            map[7] = !map[7];
        }
        drop(maps);
        let mut byte = [0];
        volume.read_at(&mut byte, 99 * PAGE + 7).unwrap();
        assert_eq!(byte, [!pattern(99 * PAGE + 7)]);
    });
}

#[test]
fn maps_begin_and_end_while_others_fault_and_are_synced() {
    let (_vault, volume) = Vault::new(1 << 20);
    let often = writable().write_back_interval(Duration::from_micros(100));
    let lasting = volume.map(0..1 << 20, &often).unwrap();
    thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (volume, often) = (&volume, &often);
            scope.spawn(move || {
                for round in 0..100 {
                    let map = volume.map(thread * 8 * PAGE..(thread + 1) * 8 * PAGE, often).unwrap();
                    for page in 0..8 {
                        store(&map, page * PAGE + thread, round);
                    }
                    map.evict(0..map.len()).unwrap();
                    assert!((0..8).all(|page| load(&map, page * PAGE + thread) == round));
                    map.close().unwrap();
                }
            });
        }
        scope.spawn(|| {
            for round in 0..2000_u64 {
                let page = 32 + round * 37 % 200;
                store(&lasting, page * PAGE + 1, round as u8);
                lasting.evict(page * PAGE..(page + 1) * PAGE).unwrap();
                assert_eq!(load(&lasting, page * PAGE + 1), round as u8);
            }
        });
    });
    lasting.close().unwrap();
    assert!(Arc::into_inner(volume).is_some());
}

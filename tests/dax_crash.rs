//! Power cuts under a direct map, on simulated media: what a call promised to be durable is there, and every other byte is
//! old or new. Then every flush and fence is left out once, and the loss must be seen.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

mod vault;

use std::ops::Range;
use std::sync::Arc;

use daxcrypt::dax::DaxMapping;
use daxcrypt::namespace::{self, FormatOptions, LockedNamespace};
use daxcrypt::pmem::sim::{Bounds, CrashImage, SimHandle, SimOptions};
use daxcrypt::pmem::{Backing, Granularity};
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;
use vault::{DATA, PAGE, credential, store, writable};

const SIZE: u64 = 16 * PAGE;

/// Stores that a call made durable: from this event on they must be there.
struct Acknowledged {
    position: usize,
    range: Range<u64>,
}

/// What is stored at `offset`; before, there are zeroes.
fn new_byte(offset: u64) -> u8 {
    (offset % 251) as u8 + 1
}

fn open(media: Vec<u8>, granularity: Granularity) -> (Arc<Volume>, SimHandle) {
    let (backing, handle) = Backing::from_media(media, SimOptions::new(granularity));
    (Arc::new(LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&credential()).unwrap()), handle)
}

/// A volume of zeroes on media whose recording begins now.
fn volume(granularity: Granularity) -> (Arc<Volume>, SimHandle) {
    let len = (DATA + SIZE) as usize;
    let backing = Arc::new(Backing::simulated(len, SimOptions::new(granularity)).0);
    let format = FormatOptions { size_bytes: Some(SIZE), ..FormatOptions::default() };
    let namespace = namespace::format(Arc::clone(&backing), format, &credential()).unwrap();
    Volume::new(namespace, Backend::detect()).write_zeroes(0, SIZE).unwrap();
    let mut media = vec![0; len];
    backing.read(0..len as u64, |source| source.copy_to(&mut media)).unwrap();
    open(media, granularity)
}

/// Stores of every kind, each made durable in its own way, at places of their own.
fn work(volume: &Arc<Volume>, handle: &SimHandle) -> Vec<Acknowledged> {
    let map = volume.map(0..SIZE, &writable()).unwrap();
    let mut acknowledged = Vec::new();
    let mut durable = |range: Range<u64>| acknowledged.push(Acknowledged { position: handle.position(), range });
    let by_pointer = |map: &DaxMapping, range: Range<u64>| range.for_each(|at| store(map, at, new_byte(at)));
    let by_call = |map: &DaxMapping, range: Range<u64>| {
        let bytes: Vec<u8> = range.clone().map(new_byte).collect();
        map.write(range.start, &bytes).unwrap();
    };

    for range in [8..16, 64..128, 200..701] {
        by_pointer(&map, range.clone());
        map.persist(range.clone()).unwrap();
        durable(range);
    }
    let range = PAGE + 17..PAGE + 117;
    by_call(&map, range.clone());
    map.persist(range.clone()).unwrap();
    durable(range);

    let range = 3 * PAGE - 100..3 * PAGE + 60;
    by_pointer(&map, range.clone());
    map.persist(range.clone()).unwrap();
    durable(range);

    let range = 4 * PAGE + 1000..4 * PAGE + 1050;
    by_pointer(&map, range.clone());
    map.flush(range.clone()).unwrap();
    map.drain().unwrap();
    durable(range);

    let ranges = [5 * PAGE..5 * PAGE + 8, 6 * PAGE + 4000..7 * PAGE + 40];
    by_pointer(&map, ranges[0].clone());
    by_call(&map, ranges[1].clone());
    map.sync().unwrap();
    ranges.into_iter().for_each(&mut durable);

    // What was evicted before it was persisted or synced.
    let ranges = [9 * PAGE + 5..9 * PAGE + 50, 10 * PAGE - 5..10 * PAGE + 50];
    by_pointer(&map, ranges[0].clone());
    map.evict(0..SIZE).unwrap();
    map.persist(ranges[0].clone()).unwrap();
    durable(ranges[0].clone());
    by_pointer(&map, ranges[1].clone());
    map.evict(0..SIZE).unwrap();
    map.sync().unwrap();
    durable(ranges[1].clone());

    let range = 12 * PAGE + 3..12 * PAGE + 77;
    by_pointer(&map, range.clone());
    map.close().unwrap();
    durable(range);
    acknowledged
}

fn check(image: CrashImage<'_>, granularity: Granularity, acknowledged: &[Acknowledged]) -> Result<(), String> {
    let (volume, _) = open(image.media.to_vec(), granularity);
    let mut found = vec![0; SIZE as usize];
    volume.read_at(&mut found, 0).unwrap();
    for (&byte, at) in found.iter().zip(0..) {
        if byte != 0 && byte != new_byte(at) {
            return Err(format!("byte {at} is garbled"));
        }
    }
    for Acknowledged { position, range } in acknowledged {
        let durable = *position <= image.position;
        if durable && !range.clone().all(|at| found[at as usize] == new_byte(at)) {
            return Err(format!("bytes {range:?} were durable and are lost"));
        }
    }
    Ok(())
}

fn survives(granularity: Granularity) {
    const REACH: usize = 24;
    let (volume, handle) = volume(granularity);
    let acknowledged = work(&volume, &handle);
    let trace = handle.trace();
    let bounds = Bounds { exhaustive_max: 8, singles_max: 3, samples: 4, ..Bounds::default() };
    let explored = trace.explore(&bounds, None, |image| check(image, granularity, &acknowledged));
    let explored = explored.unwrap_or_else(|failure| panic!("event {}: {}", failure.position, failure.error));
    assert!(explored.crash_points > acknowledged.len() && explored.states > 40, "{explored:?}");
    let mutants = trace.mutants(&bounds, REACH, |image| check(image, granularity, &acknowledged));
    println!("crash direct map, {granularity:?}: {explored}, {mutants}");
    assert!(mutants.killed + 1 >= acknowledged.len(), "one sync serves two ranges: {mutants}");
    mutants.assert_only_fences_survive("direct map");
}

#[test]
fn what_a_map_made_durable_survives_a_power_cut_at_cache_line_granularity() {
    survives(Granularity::CacheLine);
}

#[test]
fn what_a_map_made_durable_survives_a_power_cut_at_page_granularity() {
    survives(Granularity::Page);
}

//! Tables in simulated media: damage, overlap, space, and a power cut at any store.

use std::sync::Arc;

use super::{REGION_ALIGNMENT_BYTES, Region, RegionError};
use crate::namespace::CopyState;
use crate::pmem::sim::{Bounds, CrashImage, Fault, PageCache, SimOptions};
use crate::pmem::{Backing, Granularity};

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;

fn media(bytes: Vec<u8>) -> Arc<Backing> {
    Arc::new(Backing::from_media(bytes, SimOptions::new(Granularity::Page)).0)
}

fn bytes_of(backing: &Backing) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(backing.len_bytes()).unwrap()];
    backing.read(0..backing.len_bytes(), |source| source.copy_to(&mut bytes)).unwrap();
    bytes
}

/// A region of 32 MiB with namespaces `a` (4 MiB) and `b` (8 MiB).
fn region() -> (Arc<Backing>, Region) {
    let backing = media(vec![0; 32 << 20]);
    let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
    for (name, len) in [("a", 4 * MIB), ("b", 8 * MIB)] {
        let place = region.place(len).unwrap();
        region.add(name, place).unwrap();
    }
    (backing, region)
}

fn names(region: &Region) -> Vec<String> {
    region.partitions().into_iter().map(|partition| partition.name).collect()
}

#[test]
fn space_is_found_first_fit_and_given_back() {
    let (backing, mut region) = region();
    let find = |region: &Region, name: &str| region.find(name).unwrap().range;
    assert_eq!(find(&region, "a"), 2 * MIB..6 * MIB);
    assert_eq!(find(&region, "b"), 6 * MIB..14 * MIB);
    region.remove("a").unwrap();
    assert_eq!(region.place(3 * MIB).unwrap(), 2 * MIB..6 * MIB, "rounded up, and the first gap");
    assert_eq!(region.place(5 * MIB).unwrap().start, 14 * MIB, "the first gap is too small");
    let place = region.place(2 * MIB).unwrap();
    region.add("c", place).unwrap();
    assert_eq!(find(&region, "b"), 6 * MIB..14 * MIB, "the others stay, with their numbers");
    let reopened = Region::open(backing).unwrap();
    assert_eq!(reopened.partitions(), region.partitions());
    assert_eq!(reopened.find("b").unwrap().number, 2);
    assert!(reopened.free().iter().all(|free| free.start % REGION_ALIGNMENT_BYTES == 0));
}

#[test]
fn a_full_region_says_how_much_is_free_and_where() {
    let (_, mut region) = region();
    region.remove("a").unwrap();
    let error = region.place(30 * MIB).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("31457280 bytes do not fit: 20971520 bytes are free: 4194304 bytes at byte 2097152"),
        "{text}"
    );
    assert!(text.contains("16777216 bytes at byte 14680064"), "{text}");
    assert!(matches!(region.place(u64::MAX).unwrap_err(), RegionError::Full { .. }));
}

#[test]
fn a_partition_grows_into_what_is_free_behind_it() {
    let (_, mut region) = region();
    assert_eq!(region.resize("b", 12 * MIB).unwrap(), 6 * MIB..18 * MIB);
    assert!(matches!(region.resize("a", 6 * MIB).unwrap_err(), RegionError::Full { .. }), "b is in the way");
    assert!(matches!(region.resize("b", 30 * MIB).unwrap_err(), RegionError::Full { .. }));
    assert!(matches!(region.resize("b", u64::MAX).unwrap_err(), RegionError::Full { .. }));
    assert_eq!(region.resize("b", 3 * MIB).unwrap(), 6 * MIB..10 * MIB);
    assert!(matches!(region.resize("z", MIB).unwrap_err(), RegionError::NoSuchName { .. }));
}

#[test]
fn names_are_unique_and_bounded() {
    let (_, mut region) = region();
    let place = region.place(MIB).unwrap();
    assert!(matches!(region.add("a", place.clone()).unwrap_err(), RegionError::NameInUse { number: 1 }));
    for name in ["", "x\n", "x".repeat(37).as_str(), "\u{1f512}".repeat(19).as_str()] {
        assert!(matches!(region.add(name, place.clone()).unwrap_err(), RegionError::Name { .. }), "{name:?}");
    }
    assert!(matches!(region.add("c", 2 * MIB..4 * MIB).unwrap_err(), RegionError::Full { .. }), "it is taken");
    region.add(&"\u{1f512}".repeat(18), place).unwrap();
}

#[test]
fn one_damaged_table_is_made_up_for_and_two_are_an_error() {
    let (backing, region) = region();
    let good = bytes_of(&backing);
    let last = good.len() - SECTOR;
    // Signature, a field, an entry of the primary; then of the backup.
    for (copy, offsets) in
        [(0, [SECTOR, SECTOR + 50, 2 * SECTOR + 10]), (1, [last, last + 50, last - 32 * SECTOR + 10])]
    {
        for at in offsets {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            let mut damaged = Region::open(media(bytes)).unwrap();
            assert_eq!(damaged.partitions(), region.partitions(), "byte {at}");
            assert!(matches!(damaged.copies()[copy], CopyState::Bad { .. }), "byte {at}");
            assert!(matches!(damaged.copies()[1 - copy], CopyState::Good { .. }), "byte {at}");
            // The next change mends it.
            damaged.remove("a").unwrap();
            let healed = Region::open(Arc::clone(&damaged.backing)).unwrap();
            assert!(healed.copies().iter().all(|copy| matches!(copy, CopyState::Good { .. })));
            assert_eq!(names(&healed), ["b"]);
        }
    }
    let mut bytes = good;
    (bytes[SECTOR + 50], bytes[last + 50]) = (0xff, 0xff);
    let error = Region::open(media(bytes)).unwrap_err();
    assert!(matches!(error, RegionError::BothTablesDamaged { .. }), "{error}");
    assert!(matches!(Region::open(media(vec![0; 8 << 20])).unwrap_err(), RegionError::NoTable));
    assert!(matches!(Region::open(media(vec![0; 100])).unwrap_err(), RegionError::NoTable));
    let small = Region::create(media(vec![0; 4 << 20]), 512).unwrap_err();
    assert!(matches!(small, RegionError::TooSmall { .. }), "{small}");
}

/// Edits entry `number` of both copies at `offset`, with the checksums made right.
fn edited(bytes: &mut [u8], number: usize, offset: usize, value: u64) {
    let last = bytes.len() - SECTOR;
    for (header, entries) in [(SECTOR, 2 * SECTOR), (last, last - 32 * SECTOR)] {
        let at = entries + (number - 1) * 128 + offset;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let crc = crc32fast::hash(&bytes[entries..entries + 128 * 128]);
        bytes[header + 88..header + 92].copy_from_slice(&crc.to_le_bytes());
        bytes[header + 16..header + 20].fill(0);
        let crc = crc32fast::hash(&bytes[header..header + 92]);
        bytes[header + 16..header + 20].copy_from_slice(&crc.to_le_bytes());
    }
}

#[test]
fn partitions_that_overlap_or_leave_the_region_are_refused() {
    let (backing, _) = region();
    let good = bytes_of(&backing);
    let opened = |offset: usize, value: u64| {
        let mut bytes = good.clone();
        edited(&mut bytes, 2, offset, value);
        Region::open(media(bytes))
    };
    assert!(opened(32, 6 * MIB / 512).is_ok(), "nothing but the edit");
    let error = opened(32, 6 * MIB / 512 - 1).unwrap_err();
    assert!(matches!(error, RegionError::Overlap { first: 1, second: 2 }), "{error}");
    for (offset, value) in [(32, 0), (32, u64::MAX), (40, u64::MAX), (40, 0), (40, 32 * MIB / 512 - 1)] {
        let error = opened(offset, value).unwrap_err();
        assert!(matches!(error, RegionError::OutOfBounds { number: 2, .. }), "{offset} {value}: {error}");
    }
}

#[test]
fn a_power_cut_at_any_store_leaves_the_old_table_or_the_new_one() {
    let backing = media(vec![0; 8 << 20]);
    let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
    region.add("a", 2 * MIB..4 * MIB).unwrap();
    // Once with both copies whole, and once with a damaged primary that the first change mends.
    for damaged in [false, true] {
        let mut before = bytes_of(&backing);
        before[SECTOR] ^= u8::from(damaged);
        let (recorded, handle) = Backing::from_media(before, SimOptions::new(Granularity::Page));
        let mut region = Region::open(Arc::new(recorded)).unwrap();
        region.add("c", 4 * MIB..6 * MIB).unwrap();
        region.remove("a").unwrap();
        let states = [vec!["a"], vec!["a", "c"], vec!["c"]];
        let mut seen = [false; 3];
        let check = |image: CrashImage<'_>| {
            let region = Region::open(media(image.media.to_vec())).map_err(|error| error.to_string())?;
            let names = names(&region);
            let state = states.iter().position(|state| *state == names).ok_or_else(|| format!("{names:?}"))?;
            seen[state] = true;
            Ok::<_, String>(())
        };
        handle.trace().explore(&Bounds::default(), None, check).unwrap();
        assert_eq!(seen, [true; 3], "every state was reached");
    }
}

#[test]
fn a_table_in_sectors_of_4096_replaces_one_in_sectors_of_512_and_the_reverse() {
    let backing = media(vec![0; 32 << 20]);
    for (sector_bytes, name) in [(512, "old"), (4096, "new"), (512, "newest")] {
        let mut region = Region::create(Arc::clone(&backing), sector_bytes).unwrap();
        assert!(region.partitions().is_empty());
        let place = region.place(4 * MIB).unwrap();
        region.add(name, place).unwrap();
        region.resize(name, 6 * MIB).unwrap();
        let region = Region::open(Arc::clone(&backing)).unwrap();
        assert_eq!(names(&region), [name]);
        assert_eq!(region.find(name).unwrap().range, 2 * MIB..8 * MIB);
        // Each copy alone is enough.
        let bytes = bytes_of(&backing);
        let sector = usize::try_from(sector_bytes).unwrap();
        for damaged in [sector, bytes.len() - sector] {
            let mut bytes = bytes.clone();
            bytes[damaged + 20] ^= 1;
            assert_eq!(names(&Region::open(media(bytes)).unwrap()), [name]);
        }
    }
    let refused = Region::create(backing, 2048).unwrap_err();
    assert!(matches!(refused, RegionError::SectorSize { sector_bytes: 2048 }), "{refused}");
}

/// A region of 12 MiB with namespaces `a` (2 MiB) and `b` (4 MiB).
fn small_region() -> Vec<u8> {
    let backing = media(vec![0; 12 << 20]);
    let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
    region.add("a", 2 * MIB..4 * MIB).unwrap();
    region.add("b", 4 * MIB..8 * MIB).unwrap();
    bytes_of(&backing)
}

#[test]
fn a_change_that_was_killed_and_another_one_after_it_survive_a_power_cut() {
    let (backing, handle) = Backing::from_media(small_region(), SimOptions::new(Granularity::Page));
    let backing = Arc::new(backing);
    let mut first = Region::open(Arc::clone(&backing)).unwrap();
    let place = first.place(2 * MIB).unwrap();
    first.add("c", place).unwrap();
    let trace = handle.trace();
    let mut states = 0;
    for barrier in trace.barriers() {
        for cache in [PageCache::Kept, PageCache::Evicted] {
            let (backings, handle) = trace.restart(barrier.position, cache);
            let mut second = Region::open(Arc::clone(&backings[0])).unwrap();
            second.resize("b", 2 * MIB).unwrap();
            let bounds = Bounds { positions: (barrier.position, usize::MAX), samples: 2, ..Bounds::default() };
            let explored = handle.trace().explore(&bounds, None, |image: CrashImage<'_>| {
                let found = Region::open(media(image.media.to_vec())).map_err(|error| error.to_string())?;
                let has_old = ["a", "b"].iter().all(|name| found.find(name).is_ok());
                if has_old { Ok(()) } else { Err(format!("only {:?} are left", names(&found))) }
            });
            states += explored.unwrap_or_else(|failure| panic!("killed at {}, {failure}", barrier.position)).states;
        }
    }
    assert!(states > 50, "{states} states");
}

#[test]
fn a_flush_of_the_table_that_failed_is_made_up_for_by_the_next_change() {
    let media_before = small_region();
    let open = || {
        let (backing, handle) = Backing::from_media(&media_before, SimOptions::new(Granularity::Page));
        (Arc::new(backing), handle)
    };
    let (whole, handle) = open();
    let mut counted = Region::open(Arc::clone(&whole)).unwrap();
    let first = handle.calls();
    counted.remove("a").unwrap();
    for call in first..handle.calls() {
        let (failing, handle) = open();
        let mut region = Region::open(Arc::clone(&failing)).unwrap();
        handle.fail_call(call, Fault::Io);
        region.remove("a").unwrap_err();
        let trace = handle.trace();
        let (backings, handle) = trace.restart(trace.end(), PageCache::Kept);
        let mut again = Region::open(Arc::clone(&backings[0])).unwrap();
        let place = again.place(2 * MIB).unwrap();
        again.add("c", place).unwrap();
        let bounds = Bounds { positions: (trace.end(), usize::MAX), samples: 2, ..Bounds::default() };
        let explored = handle.trace().explore(&bounds, None, |image: CrashImage<'_>| {
            let found = Region::open(media(image.media.to_vec())).map_err(|error| error.to_string())?;
            if found.find("b").is_ok() { Ok(()) } else { Err("b is lost".to_owned()) }
        });
        explored.unwrap_or_else(|failure| panic!("call {call}: {failure}"));
    }
}

#[test]
fn a_table_that_somebody_else_changed_is_not_written_over() {
    let (backing, mut first) = region();
    let mut second = Region::open(Arc::clone(&backing)).unwrap();
    first.remove("a").unwrap();
    let before = bytes_of(&backing);
    assert!(matches!(second.resize("b", 4 * MIB), Err(RegionError::Changed)));
    assert!(bytes_of(&backing) == before, "nothing was written");
}

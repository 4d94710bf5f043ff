//! Power cuts while a namespace is relocated within a region: from the emptied place to the erased source, one of both opens
//! with all its content, what does not have all its content never opens, and no barrier can be left out.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::super::new_place::Prepared;
use super::super::pace::Unwatched;
use super::copy::Copy;
use super::target::Target;
use super::*;
use crate::namespace::{
    self, CopyState, Credential, FormatOptions, HEADER_AREA_BYTES, LockedNamespace, Namespace, Region,
};
use crate::pmem::sim::{Bounds, CrashImage, SimHandle, SimOptions};
use crate::pmem::{Backing, Granularity};
use crate::secret::SecretBytes;
use crate::volume::Volume;
use crate::xts::Backend;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 << 10;
const PART: u64 = 4 * MIB;
const REACH: usize = 1000;

fn key_file(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

fn plaintext() -> Vec<u8> {
    (0..SIZE).map(|index| u8::try_from(index * 31 % 251).unwrap()).collect()
}

fn backing_of(media: &[u8], options: SimOptions) -> (Arc<Backing>, SimHandle) {
    let (backing, handle) = Backing::from_media(media, options);
    (Arc::new(backing), handle)
}

/// A region with the namespace `a` of key 1; behind it, in free space, a forgotten one of key 9.
fn media(from: u64, to: u64) -> Vec<u8> {
    let len = usize::try_from(12 * MIB).unwrap();
    let backing = Arc::new(Backing::simulated(len, SimOptions::new(Granularity::Page)).0);
    let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
    for (base, key) in [(from, 1), (to, 9)] {
        let (size_bytes, available_bytes) = (Some(SIZE), Some(PART));
        let options = FormatOptions { base, size_bytes, available_bytes, ..FormatOptions::default() };
        let namespace = namespace::format(Arc::clone(&backing), options, &key_file(key)).unwrap();
        Volume::new(namespace, Backend::detect()).write_at(&plaintext(), 0).unwrap();
    }
    region.add("a", from..from + PART).unwrap();
    let mut media = vec![0; len];
    backing.read(0..len as u64, |source| source.copy_to(&mut media)).unwrap();
    media
}

/// A recording, and when what was acknowledged.
struct Story {
    options: SimOptions,
    to: u64,
    handle: SimHandle,
    made: usize,
    published: usize,
    erased: usize,
    removed: usize,
}

/// What `relocate` does between two partitions.
fn tell(options: SimOptions, from: u64, to: u64) -> Story {
    let (backing, handle) = backing_of(&media(from, to), options);
    let region = Region::open(Arc::clone(&backing)).unwrap();
    let source = open(&backing, "a", 1).unwrap();
    let place = Location::of_region(Path::new("simulated"), "b");
    let (data, range) = (Arc::clone(&backing), to..to + PART);
    let prepared = Prepared { data, range, header: None, made: Vec::new(), region: Some(region) };
    let target = Target::make_in(prepared, &place, &source, &key_file(1)).unwrap();
    let made = handle.position();
    let operation = Operation::RelocateSource;
    let copy = Copy { operation, from: Path::new("a"), to: Path::new("b"), sparse: false };
    let (mut watch, stop) = (Unwatched, AtomicBool::new(false));
    let mut run = Run::new(&mut watch, &stop, None);
    let (source, _) = copy.run(source, target.namespace, Backend::detect(), &mut run).unwrap();
    let published = handle.position();
    source.erase().unwrap();
    let erased = handle.position();
    Region::open(Arc::clone(&backing)).unwrap().remove("a").unwrap();
    Story { options, to, removed: handle.position(), handle, made, published, erased }
}

fn open(backing: &Arc<Backing>, name: &str, key: u8) -> Result<Namespace, String> {
    let region = Region::open(Arc::clone(backing)).map_err(|error| format!("no region: {error}"))?;
    let range = region.find(name).map_err(|error| error.to_string())?.range;
    let locked = LockedNamespace::open_at(Arc::clone(backing), range.start, range.end - range.start);
    locked.map_err(|error| error.to_string())?.unlock_key(&key_file(key)).map_err(|error| error.to_string())
}

fn all_good(copies: &[CopyState; 2]) -> bool {
    copies.iter().all(|copy| matches!(copy, CopyState::Good { .. }))
}

impl Story {
    fn check(&self, image: CrashImage<'_>) -> Result<(), String> {
        let (backing, _) = backing_of(image.media, self.options);
        let region = Region::open(Arc::clone(&backing)).map_err(|error| format!("no region: {error}"))?;
        // Before the first opening, which makes one good copy two.
        let published = LockedNamespace::open_at(Arc::clone(&backing), self.to, PART);
        let is_published = published.is_ok_and(|published| all_good(&published.header().copies));
        let (source, target) = (open(&backing, "a", 1), open(&backing, "b", 1));
        let reached = |position: usize| image.position >= position;
        if reached(self.made) && !reached(self.erased) && !(all_good(&region.copies()) && region.find("b").is_ok()) {
            return Err("the partition was acknowledged, and a table does not know it".into());
        }
        let stale = LockedNamespace::open_at(Arc::clone(&backing), self.to, PART);
        if reached(self.made) && stale.is_ok_and(|stale| stale.unlock_key(&key_file(9)).is_ok()) {
            return Err("what was there before opens".into());
        }
        if reached(self.published) && !(is_published && target.is_ok()) {
            return Err("the new place was acknowledged, and does not open, or one header copy is not there".into());
        }
        let erased =
            &image.media[usize::try_from(self.from()).unwrap()..][..usize::try_from(HEADER_AREA_BYTES).unwrap()];
        if reached(self.erased) && erased.iter().any(|&byte| byte != 0) {
            return Err("the erased header is there".into());
        }
        if reached(self.removed) && !(all_good(&region.copies()) && region.find("a").is_err()) {
            return Err("the partition that was removed is there".into());
        }
        let opened: Vec<_> = [source, target].into_iter().flatten().collect();
        if opened.is_empty() {
            return Err("neither place opens".into());
        }
        for namespace in opened {
            let mut found = vec![0; plaintext().len()];
            Volume::new(namespace, Backend::detect()).read_at(&mut found, 0).map_err(|error| error.to_string())?;
            if found != plaintext() {
                return Err("a place opens without its content".into());
            }
        }
        Ok(())
    }

    /// There are two places.
    const fn from(&self) -> u64 {
        if self.to == 2 * MIB { 6 * MIB } else { 2 * MIB }
    }
}

fn survives(name: &str, options: SimOptions, [from, to]: [u64; 2]) {
    let began = Instant::now();
    let story = tell(options, from, to);
    let samples: usize = std::env::var("DAXCRYPT_CRASH_SAMPLES").map_or(2, |samples| samples.parse().unwrap());
    let bounds = Bounds { exhaustive_max: 4 * samples as u64, singles_max: samples, samples, ..Bounds::default() };
    let trace = story.handle.trace();
    let explored = trace.explore(&bounds, None, |image| story.check(image));
    let explored = explored.unwrap_or_else(|failure| panic!("{name}: event {}: {}", failure.position, failure.error));
    let mutants = trace.mutants(&bounds, REACH, |image| story.check(image));
    println!("crash {name}: {explored}, {mutants}, {:.1} s", began.elapsed().as_secs_f64());
    assert!(explored.crash_points > 15 && explored.states > 40, "{explored:?}");
    mutants.assert_only_fences_survive(name);
}

#[test]
fn a_relocation_survives_at_page_granularity() {
    survives("relocate up, page", SimOptions::new(Granularity::Page), [2 * MIB, 6 * MIB]);
}

#[test]
fn a_relocation_survives_at_cache_line_granularity() {
    survives("relocate down, cache line", SimOptions::new(Granularity::CacheLine), [6 * MIB, 2 * MIB]);
}

/// The negative: a target whose header is not withheld is found half written, and the check sees.
#[test]
fn a_header_before_its_data_would_be_noticed() {
    let options = SimOptions::new(Granularity::Page);
    let mut story = tell(options, 2 * MIB, 6 * MIB);
    let (backing, handle) = backing_of(&media(2 * MIB, 6 * MIB), options);
    let mut region = Region::open(Arc::clone(&backing)).unwrap();
    region.add("b", 6 * MIB..10 * MIB).unwrap();
    let (size_bytes, available_bytes) = (Some(SIZE), Some(PART));
    let format = FormatOptions { base: 6 * MIB, size_bytes, available_bytes, ..FormatOptions::default() };
    let target = namespace::format(Arc::clone(&backing), format, &key_file(1)).unwrap();
    Volume::new(target, Backend::detect()).write_at(&plaintext(), 0).unwrap();
    story.handle = handle;
    let failure = story.handle.trace().explore(&Bounds::default(), None, |image| story.check(image)).unwrap_err();
    assert!(failure.error.contains("without its content"), "{}", failure.error);
}

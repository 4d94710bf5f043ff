//! Power cuts, kills and failing calls while a namespace is relocated, within a region and from one file to another: from the
//! emptied place to the erased source, one of both opens with all its content, what does not have all its content never
//! opens, and no barrier can be left out.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::super::new_place::Prepared;
use super::super::pace::Unwatched;
use super::super::story_parts::text;
use super::copy::Copy;
use super::target::Target;
use super::*;
use crate::leftovers::{Old, nothing_old_is_left};
use crate::namespace::{self, CopyState, FormatOptions, LockedNamespace, Region};
use crate::pmem::sim::{BarrierKind, Bounds, CrashImage, Effort, SimOptions, Story, Told, assert_proof, visible_bytes};
use crate::pmem::{Backing, Granularity};
use crate::secret::SecretBytes;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 << 10;
const PART: u64 = 4 * MIB;

fn key_file(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

fn plaintext() -> Vec<u8> {
    (0..SIZE).map(|index| u8::try_from(index * 31 % 251).unwrap()).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Note {
    /// The destination is in the table, and has no header.
    Made,
    /// It has.
    Published,
    Erased,
    /// The partition of the source is gone.
    Removed,
}

/// From place to place of a region, or from file to file.
struct Relocation {
    options: SimOptions,
    /// Whether the header of the destination is in a file of its own, the third.
    detached: bool,
    /// Where source and destination begin; in files of their own both are 0.
    places: [u64; 2],
    beginning: Vec<Vec<u8>>,
    old: Old,
}

/// A namespace with the content, which `key` opens.
fn put(backing: &Arc<Backing>, base: u64, key: u8) -> Namespace {
    let options =
        FormatOptions { base, size_bytes: Some(SIZE), available_bytes: Some(PART), ..FormatOptions::default() };
    let namespace = namespace::format(Arc::clone(backing), options, &key_file(key)).unwrap();
    let volume = Volume::new(namespace, Backend::detect());
    volume.write_at(&plaintext(), 0).unwrap();
    volume.into_namespace().unwrap()
}

fn memory(len: u64) -> Arc<Backing> {
    Arc::new(Backing::simulated(usize::try_from(len).unwrap(), SimOptions::new(Granularity::Page)).0)
}

impl Relocation {
    /// A region with the namespace `a` of key 1; behind it, in free space, a forgotten one of key 9.
    fn in_region(granularity: Granularity, places: [u64; 2]) -> Self {
        let backing = memory(12 * MIB);
        let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
        for (base, key) in places.into_iter().zip([1, 9]) {
            drop(put(&backing, base, key));
        }
        region.add("a", places[0]..places[0] + PART).unwrap();
        Self::of(granularity, places, vec![visible_bytes(&backing)])
    }

    /// A file with the namespace of key 1, and one with a forgotten one of key 9.
    fn between_files(granularity: Granularity) -> Self {
        let files = [1, 9].map(|key| {
            let backing = memory(PART);
            drop(put(&backing, 0, key));
            visible_bytes(&backing)
        });
        Self::of(granularity, [0, 0], files.to_vec())
    }

    /// The same to a file whose header is in another one: the forgotten namespace is in what becomes data.
    fn to_a_detached_header(granularity: Granularity) -> Self {
        let mut story = Self::between_files(granularity);
        story.beginning.push(vec![0; 2 << 20]);
        Self { detached: true, ..story }
    }

    fn of(granularity: Granularity, places: [u64; 2], beginning: Vec<Vec<u8>>) -> Self {
        let old = Old::of(&beginning.concat());
        assert_eq!(old.len(), 4, "a slot at each place, sealed twice");
        Self { options: SimOptions::new(granularity), detached: false, places, beginning, old }
    }

    const fn is_region(&self) -> bool {
        self.places[0] != self.places[1]
    }

    /// The source (0) or the destination (1).
    fn site(&self, backings: &[Arc<Backing>], which: usize) -> Result<Site, String> {
        let start = self.places[which];
        if !self.is_region() {
            let header = backings.get(2).filter(|_| which == 1).map(Arc::clone);
            return Ok(Site::part(Arc::clone(&backings[which]), start, PART).with_header(header));
        }
        let range = self.region(backings)?.find(["a", "b"][which]).map_err(text)?.range;
        assert_eq!(range, start..start + PART);
        Ok(Site::part(Arc::clone(&backings[0]), start, PART))
    }

    fn region(&self, backings: &[Arc<Backing>]) -> Result<Region, String> {
        Region::open(Arc::clone(&backings[0])).map_err(|error| format!("no region: {error}"))
    }

    fn open(&self, backings: &[Arc<Backing>], which: usize) -> Result<Namespace, String> {
        LockedNamespace::open_in(self.site(backings, which)?).map_err(text)?.unlock_key(&key_file(1)).map_err(text)
    }

    /// Does what is still to be done.
    fn go_on(&self, backings: &[Arc<Backing>], tell: &dyn Fn(Note)) -> Result<(), String> {
        if self.is_region() {
            self.region(backings)?.confirm().map_err(text)?;
        }
        if self.open(backings, 1).is_err() {
            self.copy(backings, tell)?;
        }
        // Also when there is no header any more: that may be seen and not be durable.
        if !self.is_region() || self.region(backings)?.find("a").is_ok() {
            namespace::destroy(&self.site(backings, 0)?).map_err(text)?;
        }
        tell(Note::Erased);
        if self.is_region() {
            let mut region = self.region(backings)?;
            if region.find("a").is_ok() {
                region.remove("a").map_err(text)?;
            }
        }
        tell(Note::Removed);
        Ok(())
    }

    fn copy(&self, backings: &[Arc<Backing>], tell: &dyn Fn(Note)) -> Result<(), String> {
        let source = self.open(backings, 0)?;
        let mut region = if self.is_region() { Some(self.region(backings)?) } else { None };
        if let Some(region) = region.as_mut().filter(|region| region.find("b").is_ok()) {
            region.remove("b").map_err(text)?; // what a killed process leaves, and its user removes
        }
        let to = self.places[1];
        let (path, name) = (Path::new("simulated"), Path::new("b"));
        let place = if self.is_region() { Location::of_region(path, "b") } else { Location::new(path, None) };
        let (data, range) = (Arc::clone(&backings[usize::from(!self.is_region())]), to..to + PART);
        let prepared = Prepared { data, range, header: backings.get(2).map(Arc::clone), made: Vec::new(), region };
        let target = Target::make_in(prepared, &place, &source, &key_file(1)).map_err(text)?;
        tell(Note::Made);
        let copy = Copy { operation: Operation::RelocateSource, from: Path::new("a"), to: name, sparse: false };
        let (mut watch, stop) = (Unwatched, AtomicBool::new(false));
        let mut run = Run::new(&mut watch, &stop, None);
        copy.run(source, target.namespace, Backend::detect(), &mut run).map_err(text)?;
        tell(Note::Published);
        Ok(())
    }

    fn check_region(&self, backings: &[Arc<Backing>], told: &[Note]) -> Result<(), String> {
        let region = self.region(backings)?;
        let is_known = region.find("b").is_ok() && (told.contains(&Note::Erased) || all_good(&region.copies()));
        if told.contains(&Note::Made) && !is_known {
            return Err("the partition was acknowledged, and a table does not know it".into());
        }
        match told.contains(&Note::Removed) && (region.find("a").is_ok() || !all_good(&region.copies())) {
            true => Err("the partition that was removed is there".into()),
            false => Ok(()),
        }
    }

    /// The header area of the source or the destination, as it is on the media.
    fn area<'a>(&self, image: CrashImage<'a>, which: usize) -> &'a [u8] {
        let media = if which == 0 { image.media } else { image.others.last().unwrap_or(&image.media) };
        &media[usize::try_from(self.places[which]).unwrap()..][..2 << 20]
    }
}

fn all_good(copies: &[CopyState; 2]) -> bool {
    copies.iter().all(|copy| matches!(copy, CopyState::Good { .. }))
}

impl Story for Relocation {
    type Note = Note;
    type Seen = ();

    /// Who brings it to its end removes a partition without a header, and makes it again.
    fn lasts(note: &Note) -> bool {
        *note != Note::Made
    }

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        self.beginning.clone()
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<Note>) -> Result<(), String> {
        self.go_on(backings, &|note| told.tell(note))
    }

    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[Note]) -> Result<(), String> {
        if self.is_region() {
            self.check_region(backings, told)?;
        }
        let is_left = |media: &[u8]| self.old.found_in(media).is_some();
        if told.contains(&Note::Made) && (is_left(self.area(image, 1)) || self.detached && is_left(image.others[0])) {
            return Err("what was there before is still there".into());
        }
        if told.contains(&Note::Published) {
            let settled = nothing_old_is_left(self.area(image, 1), &[0], &Old::default());
            settled.map_err(|error| format!("the new place was acknowledged: {error}"))?;
        }
        if told.contains(&Note::Erased) && self.area(image, 0).iter().any(|&byte| byte != 0) {
            return Err("the erased header is there".into());
        }
        let opened: Vec<_> = [0, 1].into_iter().filter_map(|which| self.open(backings, which).ok()).collect();
        if opened.is_empty() || (told.contains(&Note::Published) && self.open(backings, 1).is_err()) {
            return Err("neither place opens, or the new one does not".into());
        }
        for namespace in opened {
            if namespace.header().detached && namespace.header().tag_offset != Some(SIZE) {
                return Err("detached data without its tag".into());
            }
            let mut found = vec![0; plaintext().len()];
            Volume::new(namespace, Backend::detect()).read_at(&mut found, 0).map_err(text)?;
            if found != plaintext() {
                return Err("a place opens without its content".into());
            }
        }
        Ok(())
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        self.go_on(backings, &drop)
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        let place: &[u64] = &[self.places[1]];
        match image.others {
            [] => nothing_old_is_left(image.media, place, &self.old)?,
            [others @ .., destination] => {
                nothing_old_is_left(image.media, &[], &self.old)?;
                others.iter().try_for_each(|data| nothing_old_is_left(data, &[], &self.old))?;
                nothing_old_is_left(destination, place, &self.old)?;
            }
        }
        let all = [Note::Made, Note::Published, Note::Erased, Note::Removed];
        self.check(&image.reopen(self.options).0, image, &all)
    }
}

fn survives(name: &str, story: &Relocation) {
    let all = Effort::of_environment();
    let effort = Effort { seconds_every: 12, kills: all.kills / 2, faults: all.faults * 2 / 3, ..all };
    let proof = assert_proof(name, story, &effort);
    assert!(proof.explored.crash_points > 9 && proof.explored.states > 20, "{proof}");
    if !story.detached {
        return proof.mutants.assert_only_fences_survive(name);
    }
    // Zeros over what was in the place of the data are synced once more at their end, and the flush of all the data does for
    // the tag what its own did.
    let flushes = proof.mutants.survivors.iter().filter(|barrier| barrier.kind == BarrierKind::Flush).count();
    assert!(flushes <= 3, "{name}: {:?}", proof.mutants.survivors);
}

#[test]
fn a_relocation_within_a_region_survives() {
    survives("relocate up, page", &Relocation::in_region(Granularity::Page, [2 * MIB, 6 * MIB]));
    survives("relocate down, cache line", &Relocation::in_region(Granularity::CacheLine, [6 * MIB, 2 * MIB]));
}

#[test]
fn a_relocation_between_files_survives() {
    survives("relocate to a file, page", &Relocation::between_files(Granularity::Page));
    survives("relocate to a file, cache line", &Relocation::between_files(Granularity::CacheLine));
}

#[test]
fn a_relocation_to_a_detached_header_survives() {
    survives("relocate to a detached header, page", &Relocation::to_a_detached_header(Granularity::Page));
    survives("relocate to a detached header, cache line", &Relocation::to_a_detached_header(Granularity::CacheLine));
}

/// The negative: a target whose header is not withheld is found half written, and the check sees.
#[test]
fn a_header_before_its_data_would_be_noticed() {
    let story = Relocation::in_region(Granularity::Page, [2 * MIB, 6 * MIB]);
    let (backing, handle) = Backing::from_media(&story.beginning[0], story.options);
    let backing = Arc::new(backing);
    let mut region = Region::open(Arc::clone(&backing)).unwrap();
    region.add("b", 6 * MIB..10 * MIB).unwrap();
    drop(put(&backing, 6 * MIB, 1));
    let check = |image: CrashImage<'_>| story.check(&image.reopen(story.options).0, image, &[]);
    let failure = handle.trace().explore(&Bounds::default(), None, check).unwrap_err();
    assert!(failure.error.contains("without its content"), "{}", failure.error);
}

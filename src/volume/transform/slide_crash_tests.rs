//! Power cuts, kills and failing calls while a namespace slides towards the start of its region: whatever instant, its name
//! leads to it, its key opens it, and its content is there; and no barrier can be left out.

use std::ops::Range;
use std::sync::Arc;

use super::crash_tests::{LINE, MIB, PAGE, assert_apart, content, key_file, pattern, small_effort, volume};
use super::*;
use crate::leftovers::{Old, nothing_old_is_left};
use crate::namespace::{self, CopyState, FormatOptions, KdfCost, LockedNamespace, OpenError, Region, begin_slide};
use crate::pmem::Backing;
use crate::pmem::sim::{CrashImage, Effort, SimOptions, Story, Told, assert_proof, visible_bytes};

/// Where it is to begin: the first place of a region.
const TO: u64 = 2 * MIB;
/// How many barriers after the one that was left out its absence must show.
const REACH: usize = 24;

/// One slide: `gap` bytes down, of `size` bytes of content.
struct Slide {
    name: &'static str,
    options: SimOptions,
    gap: u64,
    base: Vec<u8>,
    window: u64,
    beginning: Vec<u8>,
    old: Old,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Note {
    Begun,
    /// The old header is wiped.
    Settled,
    /// A window begins to move, or has moved: the one that came last is true.
    Moving,
    Resting,
    Ended,
    /// The partition has its new size.
    Short,
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

impl Slide {
    /// A region in which the namespace `a`, which key 1 and key 2 open, has free space before it.
    fn new(name: &'static str, options: SimOptions, gap: u64, base: Vec<u8>, window: u64) -> Self {
        let mut slide = Self { name, options, gap, base, window, beginning: Vec::new(), old: Old::default() };
        let (size, part) = (slide.base.len() as u64, slide.part());
        let len = usize::try_from(slide.from() + part + 2 * MIB).unwrap();
        let backing = Arc::new(Backing::simulated(len, PAGE).0);
        let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
        region.add("a", slide.from()..slide.from() + part).unwrap();
        let (base, available_bytes) = (slide.from(), Some(part));
        let options = FormatOptions { size_bytes: Some(size), base, available_bytes, ..FormatOptions::default() };
        let mut namespace = namespace::format(Arc::clone(&backing), options, &key_file(1)).unwrap();
        namespace.add_slot(None, "", &key_file(2), KdfCost::LEAST).unwrap();
        volume(namespace).write_at(&slide.base, 0).unwrap();
        slide.beginning = visible_bytes(&backing);
        slide.old = Old::of(&slide.beginning);
        assert_eq!(slide.old.len(), 4, "two slots, each sealed twice");
        slide
    }

    fn from(&self) -> u64 {
        TO + self.gap
    }

    /// Bytes of the partition that the namespace needs.
    fn part(&self) -> u64 {
        (2 * MIB + self.base.len() as u64).next_multiple_of(2 * MIB)
    }

    /// Opens it by its name, and finds its content; and whether it is on its way and no window has moved.
    fn opens(&self, backing: &Arc<Backing>) -> Result<(Region, Range<u64>, namespace::Header, bool), String> {
        let (region, range, header, namespace) = open(backing, 1)?;
        let fresh = namespace.pending_transform().is_some_and(|pending| pending.record().is_untouched());
        let found = content(&volume(namespace)).map_err(|error| format!("cannot be read: {error}"))?;
        if found == self.base { Ok((region, range, header, fresh)) } else { Err("the content is garbled".into()) }
    }

    /// From wherever it is to the end.
    fn go_on(&self, backing: &Arc<Backing>, tell: &dyn Fn(Note)) -> Result<(), String> {
        let (mut region, range, _, mut namespace) = open(backing, 1)?;
        region.confirm().map_err(text)?;
        if range.start == self.from() {
            let options = RekeyOptions::default();
            namespace = begin_slide(&mut region, "a", namespace, TO, &key_file(1), &options).map_err(text)?;
            tell(Note::Begun);
            tell(Note::Resting);
            namespace.settle_header().map_err(text)?;
            tell(Note::Settled);
        }
        let moving = volume(namespace);
        loop {
            tell(Note::Moving);
            if moving.transform_step(self.window).map_err(text)?.is_none() {
                break;
            }
            tell(Note::Resting);
        }
        tell(Note::Ended);
        drop(moving);
        region.resize("a", self.part()).map_err(text)?;
        tell(Note::Short);
        Ok(())
    }

    /// While no window moves neither record of the journal is older than the other: the loss of a sector costs nothing.
    fn check_lost_record(&self, image: CrashImage<'_>) -> Result<(), String> {
        let progress = |media: &[u8]| {
            let (.., namespace) = open(&Arc::new(Backing::from_media(media, self.options).0), 1)?;
            let record = namespace.pending_transform().map(Pending::record);
            Ok::<_, String>(record.map(|record| (record.done_bytes, record.window_bytes)))
        };
        let whole = progress(image.media)?;
        for start in [TO + MIB, TO + MIB + 4096].map(|start| usize::try_from(start).unwrap()) {
            let mut media = image.media.to_vec();
            media[start..start + 512].fill(0);
            let without = progress(&media).map_err(|error| format!("without the record at {start}: {error}"))?;
            if without != whole {
                return Err(format!("without the record at {start} it has come to {without:?}, and not to {whole:?}"));
            }
        }
        Ok(())
    }

    fn survives(&self, effort: &Effort) {
        let proof = assert_proof(self.name, self, effort);
        assert!(proof.explored.crash_points > 30 && proof.explored.states > 60 && proof.seconds > 5, "{proof}");
        assert_apart(self.name, &proof.mutants, self.base.len().div_ceil(usize::try_from(self.window).unwrap()));
    }
}

impl Story for Slide {
    type Note = Note;
    type Seen = ();

    fn lasts(note: &Note) -> bool {
        !matches!(note, Note::Moving | Note::Resting)
    }

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        vec![self.beginning.clone()]
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<Note>) -> Result<(), String> {
        self.go_on(&backings[0], &|note| told.tell(note))
    }

    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[Note]) -> Result<(), String> {
        let backing = &backings[0];
        let (region, range, header, fresh) = self.opens(backing)?;
        let is_old = range.start == self.from();
        if open(backing, 2).is_ok() != is_old || (is_old && header.rekeying) {
            return Err(format!("at byte {}, the keys of the other place open it", range.start));
        }
        if fresh && !is_old && !all_good(&header.copies) {
            return Err("the table leads to it, and a copy of its header is not there".into());
        }
        if told.contains(&Note::Begun) && (is_old || (fresh && !all_good(&region.copies()))) {
            return Err("it has begun, and a copy of the table does not know".into());
        }
        let former = LockedNamespace::open_at(Arc::clone(backing), self.from(), self.part());
        let data_is_there = self.base.len() as u64 + 2 * MIB > self.gap;
        if told.contains(&Note::Settled) && !data_is_there && !matches!(former, Err(OpenError::NotANamespace { .. })) {
            return Err("the old header is still there".into());
        }
        if told.contains(&Note::Settled) && self.old.found_in(image.media).is_some() {
            return Err("an old slot is still there".into());
        }
        if told.contains(&Note::Ended)
            && (header.rekeying || nothing_old_is_left(image.media, &[TO], &self.old).is_err())
        {
            return Err("it has ended, and the old key or the journal is still there".into());
        }
        if told.iter().rfind(|note| !Self::lasts(note)) == Some(&Note::Resting) {
            self.check_lost_record(image)?;
        }
        if told.contains(&Note::Short) { self.ended(image, None) } else { Ok(()) }
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<(), String> {
        self.go_on(&backings[0], &drop)
    }

    fn ended(&self, image: CrashImage<'_>, _seen: Option<&()>) -> Result<(), String> {
        nothing_old_is_left(image.media, &[TO], &self.old)?;
        let (region, range, ..) = self.opens(&image.reopen(self.options).0[0])?;
        match range == (TO..TO + self.part()) && all_good(&region.copies()) {
            true => Ok(()),
            false => Err(format!("the partition is {range:?}")),
        }
    }
}

fn all_good(copies: &[CopyState; 2]) -> bool {
    copies.iter().all(|copy| matches!(copy, CopyState::Good { .. }))
}

/// The region, the partition, the header as it was found, and the namespace.
fn open(backing: &Arc<Backing>, key: u8) -> Result<(Region, Range<u64>, namespace::Header, Namespace), String> {
    let region = Region::open(Arc::clone(backing)).map_err(|error| format!("no region: {error}"))?;
    let range = region.find("a").map_err(text)?.range;
    let locked = LockedNamespace::open_at(Arc::clone(backing), range.start, range.end - range.start);
    let locked = locked.map_err(|error| format!("does not open: {error}"))?;
    let header = locked.header().clone();
    let namespace = locked.unlock_key(&key_file(key)).map_err(|error| format!("does not unlock: {error}"))?;
    Ok((region, range, header, namespace))
}

#[test]
fn a_slide_over_its_own_place_survives() {
    let base = pattern(0, usize::try_from(2 * MIB + (96 << 10)).unwrap());
    Slide::new("overlapping slide, page", PAGE, 2 * MIB, base, WINDOW_BYTES_MAX).survives(&small_effort());
}

#[test]
fn a_slide_into_free_space_survives() {
    let all = Effort::of_environment();
    let effort = Effort { kills: all.kills / 2, faults: all.faults / 2, reach: REACH, ..all };
    Slide::new("slide, cache line", LINE, 4 * MIB, pattern(0, 40 << 10), 16 << 10).survives(&effort);
}

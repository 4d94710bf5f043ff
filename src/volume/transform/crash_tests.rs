//! Power cuts, kills and failing calls while a volume is being re-keyed, moved or adopted, and every barrier left out once.
//!
//! `DAXCRYPT_CRASH_SAMPLES` (default 2) says how much is tried at each crash point; `tools/crash` sets it.

use std::sync::Arc;

use super::*;
use crate::leftovers::{Old, nothing_old_is_left};
use crate::namespace::{
    self, Cipher, DataUnit, FormatOptions, KdfCost, LockedNamespace, MovedNamespace, OtherSlots, Site,
};
use crate::pmem::sim::{
    BarrierKind, Bounds, CrashImage, Effort, Mutants, Proof, SimOptions, Story, Told, assert_proof, prove,
    visible_bytes,
};
use crate::pmem::{Backing, Granularity};
use crate::secret::SecretBytes;
use crate::xts::Backend;

pub(super) const MIB: u64 = 1 << 20;
const SIZE: u64 = 40 << 10;
const WINDOW: u64 = 16 << 10;
pub(super) const LINE: SimOptions = SimOptions::new(Granularity::CacheLine);
pub(super) const PAGE: SimOptions = SimOptions::new(Granularity::Page);
/// How many barriers after the one that was left out its absence must show.
const REACH: usize = 10;
const UNIT: usize = 4096;

/// What is done to the data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    InPlace,
    /// From one data offset to another, in MiB.
    Move(u64, u64),
    /// The namespace was copied from byte 0 to 2 MiB.
    Adopt,
    /// In place, and the header is in a file of its own.
    Detached,
}

/// A transform from its first header update to its end, with writes and discards in between.
struct Transform {
    name: &'static str,
    options: SimOptions,
    way: Way,
    rekey: RekeyOptions,
    window: usize,
    base: Vec<u8>,
    discards: bool,
    beginning: Vec<Vec<u8>>,
    old: Old,
    old_key: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Note {
    Begun,
    /// A window begins to move, or has moved: the one that came last is true.
    Moving,
    Resting,
    /// The write with this number, or the discard, is durable.
    Wrote(usize),
    Discarded(usize),
    Ended,
}

pub(super) fn key_file(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

pub(super) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|index| (1 + (index * 31 + seed * 7 + (index >> 8) * 13) % 251).to_le_bytes()[0]).collect()
}

pub(super) fn volume(namespace: Namespace) -> Volume {
    Volume::new(namespace, Backend::detect())
}

pub(super) fn content(volume: &Volume) -> Result<Vec<u8>, VolumeError> {
    let mut all = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut all, 0)?;
    Ok(all)
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

fn memory(len: u64) -> Arc<Backing> {
    Arc::new(Backing::simulated(usize::try_from(len).unwrap(), PAGE).0)
}

pub(super) fn open(backing: &Arc<Backing>, key: u8) -> Result<Namespace, String> {
    LockedNamespace::open(Arc::clone(backing)).map_err(text)?.unlock_key(&key_file(key)).map_err(text)
}

/// A namespace that key 1 and key 2 open, whose data begins at `data_mib`.
fn format_at(
    data: &Arc<Backing>,
    header: Option<Arc<Backing>>,
    data_mib: u64,
    size: u64,
    allow_discards: bool,
) -> Namespace {
    let format = FormatOptions { size_bytes: Some(size), allow_discards, header, ..FormatOptions::default() };
    let mut namespace = namespace::format(Arc::clone(data), format, &key_file(1)).unwrap();
    if data_mib != 2 {
        namespace.begin_move(data_mib * MIB, &key_file(1), &RekeyOptions::default()).unwrap();
        let moving = volume(namespace);
        while moving.transform_step(WINDOW).unwrap().is_some() {}
        drop(moving);
        namespace = open(data, 1).unwrap();
    }
    namespace.add_slot(None, "", &key_file(2), KdfCost::LEAST).unwrap();
    namespace
}

/// Media with such a namespace, which holds `base`, and room for its data at `end_mib`.
pub(super) fn formatted(data_mib: u64, end_mib: u64, base: &[u8]) -> Vec<u8> {
    let size = base.len() as u64;
    let data = memory(end_mib * MIB + size);
    volume(format_at(&data, None, data_mib, size, false)).write_at(base, 0).unwrap();
    visible_bytes(&data)
}

impl Transform {
    fn new(name: &'static str, options: SimOptions, way: Way, rekey: RekeyOptions) -> Self {
        let base = pattern(0, usize::try_from(SIZE).unwrap());
        let window = usize::try_from(WINDOW).unwrap();
        let (beginning, old, old_key) = (Vec::new(), Old::default(), Vec::new());
        Self { name, options, way, rekey, window, base, discards: false, beginning, old, old_key }.formatted()
    }

    /// With `size` bytes, which windows of the greatest size move.
    fn large(name: &'static str, options: SimOptions, way: Way, size: u64) -> Self {
        let base = pattern(0, usize::try_from(size).unwrap());
        let window = usize::try_from(WINDOW_BYTES_MAX).unwrap();
        Self { window, base, ..Self::new(name, options, way, RekeyOptions::default()) }.formatted()
    }

    fn with_discards(self) -> Self {
        let base = pattern(0, usize::try_from(SIZE + WINDOW).unwrap());
        Self { discards: true, base, ..self }.formatted()
    }

    /// Makes the media: a namespace that key 1 and key 2 open.
    fn formatted(mut self) -> Self {
        let size = self.base.len() as u64;
        let (from_mib, end_mib) = match self.way {
            Way::Move(from, to) => (from, from.max(to)),
            _ => (2, 2),
        };
        let is_detached = self.way == Way::Detached;
        let len = if is_detached { size } else { end_mib * MIB + size };
        let [data, header] = [len, 2 * MIB].map(memory);
        let header = is_detached.then_some(header);
        let namespace = format_at(&data, header.clone(), from_mib, size, self.discards);
        self.old_key = namespace.volume_key().bytes().to_vec();
        volume(namespace).write_at(&self.base, 0).unwrap();
        let mut media = visible_bytes(&data);
        if self.way == Way::Adopt {
            media.splice(0..0, vec![0; usize::try_from(2 * MIB).unwrap()]);
        }
        let media: Vec<_> = [media].into_iter().chain(header.iter().map(|header| visible_bytes(header))).collect();
        self.old = Old::of(media.last().unwrap());
        assert_eq!(self.old.len(), 4, "two slots, each sealed twice");
        self.beginning = media;
        self
    }

    fn site(&self, backings: &[Arc<Backing>]) -> Site {
        let start = if self.way == Way::Adopt { 2 * MIB } else { 0 };
        Site::part(Arc::clone(&backings[0]), start, u64::MAX).with_header(backings.get(1).cloned())
    }

    fn open(&self, backings: &[Arc<Backing>], key: u8) -> Result<Namespace, String> {
        LockedNamespace::open_in(self.site(backings)).map_err(text)?.unlock_key(&key_file(key)).map_err(text)
    }

    /// Opens it, also where it is before it was adopted.
    fn find(&self, backings: &[Arc<Backing>]) -> Result<Option<Namespace>, String> {
        match MovedNamespace::open_in(self.site(backings)) {
            Ok(_) if self.way == Way::Adopt => Ok(None),
            _ => self.open(backings, 1).map(Some),
        }
    }

    fn begin(&self, backings: &[Arc<Backing>]) -> Result<Namespace, String> {
        if self.way == Way::Adopt {
            let moved = MovedNamespace::open_in(self.site(backings)).map_err(text)?;
            return moved.adopt(&key_file(1), &self.rekey).map_err(text);
        }
        let mut namespace = self.open(backings, 1)?;
        match self.way {
            Way::Move(_, to_mib) => namespace.begin_move(to_mib * MIB, &key_file(1), &self.rekey).map_err(text)?,
            _ => namespace.begin_rekey(&key_file(1), &self.rekey).map_err(text)?,
        }
        Ok(namespace)
    }

    /// Ranges that are written when so many windows have moved, and one before: on both sides of the boundary, each in whole
    /// blocks of one side, so that it has one flush and one drain, none of which can be spared.
    fn writes(&self) -> Vec<(usize, usize, usize)> {
        let mut writes = vec![(0, 16, 48)];
        let size = self.base.len();
        for round in 1..=size.div_ceil(self.window) {
            let moved = round * self.window;
            let in_round = if self.is_backward() {
                // The window begins at the boundary, and what has not moved ends there.
                let start = size.saturating_sub(moved).next_multiple_of(UNIT);
                let before = |len: usize| start.checked_sub(len).unwrap_or(size);
                [(start + 96, 304), (start + 512, 64), (start, 16), (before(64), 64), (before(4192), 704)]
            } else {
                let start = moved - self.window;
                [(start + 96, 304), (start + 512, 64), (moved - 48, 48), (moved, 64), (moved + 4000, 704)]
            };
            writes.extend(in_round.map(|(offset, len)| (round, offset, len)));
        }
        writes.retain(|(_, offset, len)| offset + len <= size);
        writes
    }

    /// Whether the last window moves first.
    fn is_backward(&self) -> bool {
        matches!(self.way, Way::Move(from, to) if from < to)
    }

    /// Units that are discarded when so many windows have moved, and whether a flush follows: in a window that has moved,
    /// and in one that will.
    fn discards(&self) -> Vec<(usize, usize, bool)> {
        if self.discards {
            vec![(1, 2 * UNIT, true), (0, self.window + 2 * UNIT, false), (2, 2 * self.window + 2 * UNIT, true)]
        } else {
            Vec::new()
        }
    }

    fn work(&self, volume: &Volume, round: usize, told: &Told<Note>) -> Result<(), String> {
        for (number, (_, offset, len)) in self.writes().into_iter().enumerate().filter(|(_, write)| write.0 == round) {
            // By another thread, as in a server: its drains commit nothing of the engine's.
            let write = || write_durably(volume, offset as u64, &pattern(offset, len));
            std::thread::scope(|scope| scope.spawn(write).join()).unwrap().map_err(text)?;
            told.tell(Note::Wrote(number));
        }
        for (number, (_, offset, flush)) in self.discards().into_iter().enumerate().filter(|(_, one)| one.0 == round) {
            volume.discard(offset as u64, UNIT as u64).map_err(text)?;
            if flush {
                volume.flush().map_err(text)?;
                told.tell(Note::Discarded(number));
            }
        }
        Ok(())
    }

    /// Exactly the old or the new set of keys opens, and the new one once that was acknowledged.
    fn check_slots(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, begun: bool) -> Result<(), String> {
        let is_old = self.find(backings)?.is_none_or(|namespace| namespace.volume_key().bytes() == self.old_key);
        let kept = self.rekey.other_slots == OtherSlots::Keep;
        if !(is_old && self.way == Way::Adopt) && self.open(backings, 2).is_ok() != (is_old || kept) {
            return Err(format!("the header is old: {is_old}, and key 2 does not say so"));
        }
        if begun && (is_old || self.old.found_in(self.header_area(image)).is_some()) {
            return Err("the new header was acknowledged, and a copy still has the old slots".into());
        }
        Ok(())
    }

    fn header_area<'a>(&self, image: CrashImage<'a>) -> &'a [u8] {
        let start = if self.way == Way::Adopt { 2 * MIB } else { 0 };
        &image.others.first().unwrap_or(&image.media)[usize::try_from(start).unwrap()..][..2 << 20]
    }

    fn check_readable(&self, backings: &[Arc<Backing>], told: &[Note]) -> Result<(), String> {
        let Some(namespace) = self.find(backings)? else { return Ok(()) };
        let found = content(&volume(namespace)).map_err(|error| format!("cannot be read: {error}"))?;
        self.check_content(&found, told)
    }

    /// No header copy by itself tells of a transform whose journal is gone.
    fn check_journal(&self, image: CrashImage<'_>) -> Result<(), String> {
        let area = self.header_area(image);
        let records = [MIB, MIB + 4096].map(|start| usize::try_from(start).unwrap());
        if !contains(area, b"transform") || records.iter().any(|&at| area[at..].starts_with(b"DAXJRNL1")) {
            return Ok(());
        }
        for start in [0, 256 << 10] {
            let place = if self.way == Way::Adopt { 2 << 20 } else { 0 };
            let mut media = Self::media_of(image);
            media.last_mut().unwrap()[place + start..place + start + (64 << 10)].fill(0);
            let alone = LockedNamespace::open_in(self.site(&self.reopened(&media)));
            if alone.is_ok_and(|alone| alone.header().rekeying) {
                return Err("a header copy tells of a transform whose journal is gone".into());
            }
        }
        Ok(())
    }

    fn media_of(image: CrashImage<'_>) -> Vec<Vec<u8>> {
        [image.media].into_iter().chain(image.others.iter().copied()).map(<[u8]>::to_vec).collect()
    }

    fn reopened(&self, media: &[Vec<u8>]) -> Vec<Arc<Backing>> {
        media.iter().map(|media| Arc::new(Backing::from_media(media, self.options).0)).collect()
    }

    /// While no window moves neither record of the journal is older than the other: the loss of a sector costs nothing.
    fn check_lost_record(&self, image: CrashImage<'_>, told: &[Note]) -> Result<(), String> {
        let place = if self.way == Way::Adopt { 2 * MIB } else { 0 };
        for start in [MIB, MIB + 4096].map(|start| usize::try_from(place + start).unwrap()) {
            let mut media = Self::media_of(image);
            media.last_mut().unwrap()[start..start + 512].fill(0);
            let readable = self.check_readable(&self.reopened(&media), told);
            readable.map_err(|error| format!("without the record at {start}: {error}"))?;
        }
        Ok(())
    }

    fn check_content(&self, found: &[u8], told: &[Note]) -> Result<(), String> {
        let writes = self.writes().into_iter().enumerate();
        let writes = writes.map(|(number, (_, offset, len))| (Note::Wrote(number), offset, pattern(offset, len)));
        let discards = self.discards().into_iter().enumerate();
        let discards = discards.map(|(number, (_, offset, _))| (Note::Discarded(number), offset, vec![0; UNIT]));
        let changes: Vec<_> = writes.chain(discards).collect();
        for (note, offset, bytes) in &changes {
            if told.contains(note) && found[*offset..offset + bytes.len()] != **bytes {
                return Err(format!("{} acknowledged bytes at {offset} are lost", bytes.len()));
            }
        }
        let is_change = |index: usize| {
            let at = |(_, offset, bytes): &(Note, usize, Vec<u8>)| bytes.get(index.checked_sub(*offset)?).copied();
            changes.iter().any(|change| at(change) == Some(found[index]))
        };
        match (0..found.len()).find(|&index| found[index] != self.base[index] && !is_change(index)) {
            Some(index) => Err(format!("byte {index} is garbled")),
            None => Ok(()),
        }
    }

    fn prove(&self, effort: &Effort) -> Proof {
        let proof = assert_proof(self.name, self, effort);
        assert!(proof.explored.crash_points > 20 && proof.explored.states > 60 && proof.seconds > 5, "{proof}");
        assert!(proof.kills > 1 && proof.faults > 2, "{proof}");
        proof
    }

    /// And every barrier that is left out shows, but fences that are made up for.
    fn survives(&self) {
        let mutants = self.prove(&Effort { reach: REACH, ..Effort::of_environment() }).mutants;
        assert!(mutants.all > 10, "{mutants}");
        mutants.assert_only_fences_survive(self.name);
    }

    /// With fewer kills and faults and, in the gate and with discards, without mutants: the way is that of the others.
    fn survives_as_the_others_do(&self) {
        let all = Effort::of_environment();
        if all.is_gate() || self.discards {
            self.prove(&Effort { kills: all.kills / 2, faults: all.faults / 2, reach: 0, ..all });
        } else {
            self.survives();
        }
    }
}

/// At cache-line granularity a write is durable when it returns.
fn write_durably(volume: &Volume, offset: u64, bytes: &[u8]) -> Result<(), VolumeError> {
    volume.write_at(bytes, offset)?;
    if volume.granularity() == Granularity::Page {
        volume.persist(offset..offset + bytes.len() as u64)?;
    }
    Ok(())
}

impl Story for Transform {
    type Note = Note;
    type Seen = Vec<u8>;

    fn lasts(note: &Note) -> bool {
        !matches!(note, Note::Moving | Note::Resting)
    }

    fn options(&self) -> SimOptions {
        self.options
    }

    fn beginning(&self) -> Vec<Vec<u8>> {
        self.beginning.clone()
    }

    fn run(&self, backings: &[Arc<Backing>], told: &Told<Note>) -> Result<(), String> {
        let volume = volume(self.begin(backings)?);
        told.tell(Note::Begun);
        for round in 0.. {
            told.tell(Note::Resting);
            self.work(&volume, round, told)?;
            told.tell(Note::Moving);
            if volume.transform_step(self.window as u64).map_err(text)?.is_none() {
                break;
            }
        }
        told.tell(Note::Ended);
        Ok(())
    }

    fn check(&self, backings: &[Arc<Backing>], image: CrashImage<'_>, told: &[Note]) -> Result<(), String> {
        self.check_slots(backings, image, told.contains(&Note::Begun))?;
        self.check_journal(image)?;
        self.check_readable(backings, told)?;
        if told.iter().rfind(|note| !Self::lasts(note)) == Some(&Note::Resting) {
            self.check_lost_record(image, told)?;
        }
        if told.contains(&Note::Ended) { self.ended(image, None) } else { Ok(()) }
    }

    fn finish(&self, backings: &[Arc<Backing>]) -> Result<Vec<u8>, String> {
        let found = self.find(backings)?.filter(|namespace| namespace.volume_key().bytes() != self.old_key);
        let volume = volume(found.map_or_else(|| self.begin(backings), Ok)?);
        while volume.transform_step(self.window as u64).map_err(text)?.is_some() {}
        volume.flush().map_err(text)?;
        content(&volume).map_err(text)
    }

    fn ended(&self, image: CrashImage<'_>, seen: Option<&Vec<u8>>) -> Result<(), String> {
        let places: &[u64] = if self.way == Way::Adopt { &[2 * MIB] } else { &[0] };
        match image.others {
            [] => nothing_old_is_left(image.media, places, &self.old)?,
            [header, ..] => {
                nothing_old_is_left(image.media, &[], &self.old)?;
                nothing_old_is_left(header, &[0], &self.old)?;
            }
        }
        let (backings, _) = image.reopen(self.options);
        let found = content(&volume(self.open(&backings, 1)?)).map_err(text)?;
        match seen.is_some_and(|seen| *seen != found) {
            true => Err("what was seen after it is gone".into()),
            false => Ok(()),
        }
    }
}

/// Whether the beginning of either header copy holds `part`.
fn contains(area: &[u8], part: &[u8]) -> bool {
    [0, 256 << 10].into_iter().any(|start| area[start..start + 4096].windows(part.len()).any(|window| window == part))
}

/// Where old and new place are apart, a window that was saved and whose record is lost is done again from the old place:
/// that record's flush, one a window, may be left out. Nothing else but fences that are made up for.
pub(super) fn assert_apart(name: &str, mutants: &Mutants, windows: usize) {
    let flushes = mutants.survivors.iter().filter(|barrier| barrier.kind != BarrierKind::Drain);
    assert!(flushes.count() <= windows, "{name}: not noticed: {:?}", mutants.survivors);
}

/// Of the large ones, which take long: in the gate, every third crash point and few of the rest.
pub(super) fn small_effort() -> Effort {
    let effort = Effort { reach: 0, ..Effort::of_environment() };
    if effort.is_gate() {
        let bounds = Bounds { every: 3, ..effort.bounds };
        return Effort { bounds, kills: 2, faults: 3, ..effort };
    }
    Effort { kills: effort.kills / 2, faults: effort.faults / 3, ..effort }
}

#[test]
fn a_rekey_in_place_survives_at_cache_line_granularity() {
    Transform::new("rekey, cache line", LINE, Way::InPlace, RekeyOptions::default()).survives();
}

#[test]
fn a_rekey_in_place_survives_at_page_granularity() {
    Transform::new("rekey, page", PAGE, Way::InPlace, RekeyOptions::default()).survives();
}

#[test]
fn a_rekey_that_keeps_the_other_slots_survives() {
    let rekey = RekeyOptions { other_slots: OtherSlots::Keep, ..RekeyOptions::default() };
    Transform::new("rekey, slots kept, page", PAGE, Way::InPlace, rekey).survives_as_the_others_do();
}

#[test]
fn a_change_of_cipher_and_unit_survives() {
    let (cipher, unit) = (Some(Cipher::Aes128Xts), Some(DataUnit::Bytes512));
    let rekey = RekeyOptions { cipher, unit, ..RekeyOptions::default() };
    Transform::new("rekey, other cipher and unit, cache line", LINE, Way::InPlace, rekey).survives_as_the_others_do();
}

#[test]
fn a_rekey_with_discards_survives_at_cache_line_granularity() {
    let story = Transform::new("rekey, discards, cache line", LINE, Way::InPlace, RekeyOptions::default());
    story.with_discards().survives_as_the_others_do();
}

#[test]
fn a_rekey_with_discards_survives_at_page_granularity() {
    let story = Transform::new("rekey, discards, page", PAGE, Way::InPlace, RekeyOptions::default());
    story.with_discards().survives_as_the_others_do();
}

#[test]
fn a_rekey_with_a_detached_header_survives() {
    Transform::new("rekey, detached, page", PAGE, Way::Detached, RekeyOptions::default()).survives_as_the_others_do();
}

#[test]
fn an_adoption_survives() {
    Transform::new("adopt, page", PAGE, Way::Adopt, RekeyOptions::default()).survives_as_the_others_do();
}

#[test]
fn a_move_to_another_place_survives_in_both_directions() {
    let (down, up) = (("move down, cache line", LINE, Way::Move(4, 2)), ("move up, page", PAGE, Way::Move(2, 4)));
    for (name, options, way) in [down, up] {
        let story = Transform::new(name, options, way, RekeyOptions::default());
        let effort = Effort::of_environment();
        // In the gate the barriers of one of them are enough.
        let reach = if effort.is_gate() && options == LINE { 0 } else { REACH };
        let mutants = story.prove(&Effort { reach, ..effort }).mutants;
        assert_apart(name, &mutants, story.base.len().div_ceil(story.window));
    }
}

#[test]
fn a_move_to_an_overlapping_place_survives_in_both_directions() {
    let size = 2 * MIB + (96 << 10);
    Transform::large("overlapping move down, page", PAGE, Way::Move(4, 2), size).prove(&small_effort());
    Transform::large("overlapping move up, page", PAGE, Way::Move(2, 4), size).prove(&small_effort());
}

/// The negative: were media torn at 8 bytes, a half-written block of a user's write would be garbled, and the check sees.
#[test]
fn a_torn_unit_below_the_block_garbles_and_is_seen() {
    let torn = LINE.torn_bytes(8);
    let story = Transform::new("rekey, torn at 8", torn, Way::InPlace, RekeyOptions::default());
    let bounds = Bounds { exhaustive_max: 64, singles_max: 8, samples: 8, ..Bounds::default() };
    let (kills, faults, reach) = (0, 0, 0);
    let failure = prove(&story, &Effort { bounds, seconds_every: usize::MAX, kills, faults, reach });
    assert!(failure.unwrap_err().contains("garbled"));
}

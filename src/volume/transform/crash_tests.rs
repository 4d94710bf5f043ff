//! Power cuts while a volume is being re-keyed or moved, a second one during recovery, and every barrier left out once.
//!
//! `DAXCRYPT_CRASH_SAMPLES` (default 2) says how many random media are tried at each crash point; `tools/crash` sets it.

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Instant;

use super::*;
use crate::memory::Source;
use crate::namespace::{self, FormatOptions, KdfCost, LockedNamespace};
use crate::pmem::sim::{Bounds, CrashImage, Mutants, SimHandle, SimOptions};
use crate::pmem::{Backing, Granularity};
use crate::secret::SecretBytes;
use crate::xts::Backend;

pub(super) const MIB: u64 = 1 << 20;
const SIZE: u64 = 40 << 10;
const WINDOW: u64 = 16 << 10;
/// How many barriers after the one that was left out its absence must show.
const REACH: usize = 10;

/// A write that began and, at `position`, was acknowledged as durable.
struct Write {
    position: usize,
    offset: usize,
    bytes: Vec<u8>,
}

/// Second crashes are explored after one state of so many.
const SECONDS_EVERY: usize = 12;

/// What was explored after a second crash.
#[derive(Default)]
struct Seconds {
    states: Cell<usize>,
    explored: Cell<usize>,
}

impl Seconds {
    fn is_next(&self) -> bool {
        self.states.set(self.states.get() + 1);
        self.states.get().is_multiple_of(SECONDS_EVERY)
    }
}

/// A recording of a transform from its first header update to its end, with writes in between.
struct Story {
    name: &'static str,
    options: SimOptions,
    base: Vec<u8>,
    writes: Vec<Write>,
    /// From when to when no window moved, and what was acknowledged could be relied on.
    rests: Vec<RangeInclusive<usize>>,
    /// When the new header was acknowledged.
    begun: usize,
    /// When the end was acknowledged.
    ended: usize,
    handle: SimHandle,
}

pub(super) fn key_file(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

pub(super) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|index| ((index * 31 + seed * 7 + (index >> 8) * 13) % 251).to_le_bytes()[0]).collect()
}

pub(super) fn open(backing: &Arc<Backing>, key: u8) -> Result<Namespace, String> {
    let locked = LockedNamespace::open(Arc::clone(backing)).map_err(|error| error.to_string())?;
    locked.unlock_key(&key_file(key)).map_err(|error| error.to_string())
}

pub(super) fn volume(namespace: Namespace) -> Volume {
    Volume::new(namespace, Backend::detect())
}

pub(super) fn content(volume: &Volume) -> Result<Vec<u8>, VolumeError> {
    let mut all = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut all, 0)?;
    Ok(all)
}

pub(super) fn media_of(backing: &Backing) -> Vec<u8> {
    let mut media = vec![0; usize::try_from(backing.len_bytes()).unwrap()];
    backing.read(0..backing.len_bytes(), |source: Source<'_>| source.copy_to(&mut media)).unwrap();
    media
}

/// Media with a namespace that key 1 and key 2 open, whose data begins at `data_mib`, and room for data at `end_mib`.
pub(super) fn formatted(data_mib: u64, end_mib: u64, base: &[u8]) -> Vec<u8> {
    let size = base.len() as u64;
    let len = usize::try_from(end_mib * MIB + size).unwrap();
    let backing = Arc::new(Backing::simulated(len, SimOptions::new(Granularity::Page)).0);
    let format = FormatOptions { size_bytes: Some(size), ..FormatOptions::default() };
    let mut namespace = namespace::format(Arc::clone(&backing), format, &key_file(1)).unwrap();
    if data_mib != 2 {
        namespace.begin_move(data_mib * MIB, &key_file(1), &RekeyOptions::default()).unwrap();
        let moving = volume(namespace);
        while moving.transform_step(WINDOW).unwrap().is_some() {}
        namespace = open(&backing, 1).unwrap();
    }
    namespace.add_slot(None, "", &key_file(2), KdfCost::LEAST).unwrap();
    volume(namespace).write_at(base, 0).unwrap();
    media_of(&backing)
}

/// Moves from `from_mib` to `to_mib`, which is a re-key in place when they are the same.
fn tell(name: &'static str, options: SimOptions, [from_mib, to_mib]: [u64; 2], size: u64, window_bytes: u64) -> Story {
    let base = pattern(0, usize::try_from(size).unwrap());
    let (backing, handle) = Backing::from_media(formatted(from_mib, from_mib.max(to_mib), &base), options);
    let backing = Arc::new(backing);
    let mut namespace = open(&backing, 1).unwrap();
    namespace.begin_move(to_mib * MIB, &key_file(1), &RekeyOptions::default()).unwrap();
    let begun = handle.position();
    let volume = volume(namespace);
    let mut writes = Vec::new();
    // Before the first window too.
    let bytes = pattern(1, 48);
    write_durably(&volume, 16, &bytes);
    writes.push(Write { position: handle.position(), offset: 16, bytes });
    let mut rests = vec![begun..=handle.position()];
    let mut round = 0;
    loop {
        let moved = volume.transform_step(window_bytes).unwrap();
        if moved.is_none() {
            break;
        }
        let rests_from = handle.position();
        // On both sides of the boundary. Each in whole blocks of one side, so that it has one flush and one drain, none of
        // which can be spared.
        let window_bytes = usize::try_from(window_bytes).unwrap();
        let window = round * window_bytes;
        for (offset, len) in
            [(96, 304), (512, 64), (window_bytes - 48, 48), (window_bytes, 64), (window_bytes + 4000, 704)]
        {
            let offset = window + offset;
            if offset + len <= base.len() {
                let bytes = pattern(offset, len);
                // By another thread, as in a server: its drains commit nothing of the engine's.
                let written =
                    std::thread::scope(|scope| scope.spawn(|| write_durably(&volume, offset as u64, &bytes)).join());
                written.unwrap();
                writes.push(Write { position: handle.position(), offset, bytes });
            }
        }
        rests.push(rests_from..=handle.position());
        round += 1;
    }
    Story { name, options, base, writes, rests, begun, ended: handle.position(), handle }
}

/// At cache-line granularity a write is durable when it returns.
fn write_durably(volume: &Volume, offset: u64, bytes: &[u8]) {
    volume.write_at(bytes, offset).unwrap();
    if volume.granularity() == Granularity::Page {
        volume.persist(offset..offset + bytes.len() as u64).unwrap();
    }
}

impl Story {
    fn check(&self, image: CrashImage<'_>, seconds: Option<&Seconds>) -> Result<(), String> {
        let (backing, handle) = Backing::from_media(image.media, self.options);
        let backing = Arc::new(backing);
        let namespace = open(&backing, 1).map_err(|error| format!("key 1 does not open: {error}"))?;
        let header = namespace.header();
        self.check_slots(&backing, &header, image)?;
        let records = [MIB, MIB + 4096].map(|start| usize::try_from(start).unwrap());
        if copies_contain(image, b"transform") && !records.iter().any(|&at| image.media[at..].starts_with(b"DAXJRNL1"))
        {
            return Err("a header copy tells of a transform whose journal is gone".into());
        }
        let volume = volume(namespace);
        let found = content(&volume).map_err(|error| format!("cannot be read: {error}"))?;
        self.check_content(&found, image.position)?;
        self.check_end(&header, image)?;
        self.check_lost_record(image)?;
        let Some(seconds) = seconds.filter(|seconds| seconds.is_next()) else { return Ok(()) };
        if volume.transform().is_none() {
            return Ok(());
        }
        volume.transform_step(WINDOW).map_err(|error| format!("does not go on: {error}"))?;
        self.check_second_crash(&handle, &found, &seconds.explored)?;
        while volume.transform_step(WINDOW).map_err(|error| format!("does not end: {error}"))?.is_some() {}
        drop(volume);
        let end = content(&Volume::new(open(&backing, 1).unwrap(), Backend::detect()));
        if end.is_ok_and(|end| end == found) { Ok(()) } else { Err("the end differs from the middle".into()) }
    }

    /// While no window moves, the loss of one sector of the journal costs nothing: neither record is older than the other.
    fn check_lost_record(&self, image: CrashImage<'_>) -> Result<(), String> {
        if !self.rests.iter().any(|rest| rest.contains(&image.position)) {
            return Ok(());
        }
        for start in [MIB, MIB + 4096].map(|start| usize::try_from(start).unwrap()) {
            let mut media = image.media.to_vec();
            media[start..start + 512].fill(0);
            let backing = Arc::new(Backing::from_media(media, self.options).0);
            let lost = |error: String| format!("without the record at {start}: {error}");
            let found = content(&volume(open(&backing, 1).map_err(lost)?)).map_err(|error| lost(error.to_string()))?;
            self.check_content(&found, image.position).map_err(lost)?;
        }
        Ok(())
    }

    /// Exactly the old or the new set of keys opens, and the new one once that was acknowledged.
    fn check_slots(
        &self,
        backing: &Arc<Backing>,
        header: &namespace::Header,
        image: CrashImage<'_>,
    ) -> Result<(), String> {
        let old = open(backing, 2).is_ok();
        let is_new = header.rekeying || header.slots.len() == 1;
        if old == is_new {
            return Err(format!("key 2 opens: {old}, the header is new: {is_new}"));
        }
        if image.position >= self.begun && copies_contain(image, b"\"id\":1,") {
            return Err("the new header was acknowledged, and a copy still has the old slot".into());
        }
        Ok(())
    }

    fn check_content(&self, found: &[u8], position: usize) -> Result<(), String> {
        let mut allowed = self.base.clone();
        let mut written = vec![false; found.len()];
        for write in &self.writes {
            let range = write.offset..write.offset + write.bytes.len();
            if write.position <= position && found[range.clone()] != write.bytes {
                return Err(format!("{} acknowledged bytes at {} are lost", write.bytes.len(), write.offset));
            }
            allowed[range.clone()].copy_from_slice(&write.bytes);
            written[range].fill(true);
        }
        for (index, (&found, &new)) in found.iter().zip(&allowed).enumerate() {
            if found != new && !(written[index] && found == self.base[index]) {
                return Err(format!("byte {index} is garbled"));
            }
        }
        Ok(())
    }

    /// Once the end was acknowledged, neither header copy and no journal remember anything.
    fn check_end(&self, header: &namespace::Header, image: CrashImage<'_>) -> Result<(), String> {
        if image.position < self.ended {
            return Ok(());
        }
        let journal = &image.media[usize::try_from(MIB).unwrap()..usize::try_from(2 * MIB).unwrap()];
        if header.rekeying || copies_contain(image, b"transform") || journal.iter().any(|&byte| byte != 0) {
            return Err("the end was acknowledged, and the old key or the journal is still there".into());
        }
        Ok(())
    }

    /// A power cut while the recovery runs or the next window moves.
    fn check_second_crash(&self, recovery: &SimHandle, expected: &[u8], count: &Cell<usize>) -> Result<(), String> {
        let bounds = Bounds { exhaustive_max: 2, singles_max: 0, samples: 1, ..Bounds::default() };
        let explored = recovery.trace().explore(&bounds, None, |image| {
            let backing = Arc::new(Backing::from_media(image.media, self.options).0);
            let found = open(&backing, 1).map(|namespace| content(&volume(namespace)));
            match found {
                Ok(Ok(found)) if found == expected => Ok(()),
                Ok(Ok(_)) => Err("a second power cut garbles".to_owned()),
                Ok(Err(error)) => Err(format!("unreadable after a second power cut: {error}")),
                Err(error) => Err(format!("does not open after a second power cut: {error}")),
            }
        });
        let explored = explored.map_err(|failure| failure.error)?;
        count.set(count.get() + explored.states);
        Ok(())
    }
}

/// Whether either header copy holds `text`.
fn copies_contain(image: CrashImage<'_>, text: &[u8]) -> bool {
    [0, 256 << 10]
        .into_iter()
        .any(|start| image.media[start..start + 4096].windows(text.len()).any(|part| part == text))
}

pub(super) fn bounds() -> Bounds {
    let samples: usize = std::env::var("DAXCRYPT_CRASH_SAMPLES").map_or(2, |samples| samples.parse().unwrap());
    Bounds { exhaustive_max: 4 * samples as u64, singles_max: samples.div_ceil(2), samples, ..Bounds::default() }
}

/// Explores every crash point and, with `mutants`, leaves every barrier out once.
fn survives(story: &Story, mutants: bool) {
    let began = Instant::now();
    let seconds = Seconds::default();
    let trace = story.handle.trace();
    let explored = trace.explore(&bounds(), None, |image| story.check(image, Some(&seconds)));
    let explored =
        explored.unwrap_or_else(|failure| panic!("{}: event {}: {}", story.name, failure.position, failure.error));
    let mutants =
        if mutants { trace.mutants(&bounds(), REACH, |image| story.check(image, None)) } else { Mutants::default() };
    println!(
        "crash {}: {} crash points, {} states, {} unique media, {} second crashes, {} of {} mutants killed, {:.1} s",
        story.name,
        explored.crash_points,
        explored.states,
        explored.unique_media,
        seconds.explored.get(),
        mutants.killed,
        mutants.all,
        began.elapsed().as_secs_f64()
    );
    assert!(explored.crash_points > 30 && explored.states > 60 && seconds.explored.get() > 40, "{explored:?}");
    // The fence after the first records is made up for by that of the header, before which nobody knows of them.
    mutants.assert_only_fences_survive(story.name);
}

pub(super) const LINE: SimOptions = SimOptions::new(Granularity::CacheLine);
pub(super) const PAGE: SimOptions = SimOptions::new(Granularity::Page);

#[test]
fn a_rekey_in_place_survives_at_cache_line_granularity() {
    survives(&tell("rekey, cache line", LINE, [2, 2], SIZE, WINDOW), true);
}

#[test]
fn a_rekey_in_place_survives_at_page_granularity() {
    survives(&tell("rekey, page", PAGE, [2, 2], SIZE, WINDOW), true);
}

/// Where old and new place are apart, a window that is written too early does no harm: no mutants.
#[test]
fn a_move_to_another_place_survives_in_both_directions() {
    survives(&tell("move down, cache line", LINE, [4, 2], SIZE, WINDOW), false);
    survives(&tell("move up, page", PAGE, [2, 4], SIZE, WINDOW), false);
}

#[test]
fn a_move_to_an_overlapping_place_survives_in_both_directions() {
    let size = 2 * MIB + (96 << 10);
    survives(&tell("overlapping move down, page", PAGE, [4, 2], size, WINDOW_BYTES_MAX), false);
    survives(&tell("overlapping move up, page", PAGE, [2, 4], size, WINDOW_BYTES_MAX), false);
}

/// The negative: were media torn at 8 bytes, a half-written block of a user's write would be garbled, and the check sees.
#[test]
fn a_torn_unit_below_the_block_garbles_and_is_seen() {
    let story = tell("rekey, torn at 8", LINE.torn_bytes(8), [2, 2], SIZE, WINDOW);
    let bounds = Bounds { exhaustive_max: 64, singles_max: 8, samples: 8, ..Bounds::default() };
    let failure = story.handle.trace().explore(&bounds, None, |image| story.check(image, None));
    assert!(failure.unwrap_err().error.contains("garbled"));
}

//! Power cuts while a namespace slides towards the start of its region: whatever instant, its name leads to it, its key opens
//! it, and its content is there; and the steps that change headers and the table do not survive a barrier left out.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::crash_tests::{LINE, MIB, PAGE, bounds, content, key_file, media_of, pattern, volume};
use super::*;
use crate::namespace::{self, CopyState, FormatOptions, KdfCost, LockedNamespace, OpenError, Region, begin_slide};
use crate::pmem::Backing;
use crate::pmem::sim::{Bounds, CrashImage, Explored, Mutants, SimHandle, SimOptions};

/// Where it is to begin: the first place of a region.
const TO: u64 = 2 * MIB;
/// The stories are short: a barrier that is left out may show anywhere behind it.
const REACH: usize = 1000;
/// Second crashes are explored after one state of so many.
const SECONDS_EVERY: usize = 12;

/// One slide: `gap` bytes down, of `size` bytes of content.
struct Slide {
    name: &'static str,
    options: SimOptions,
    gap: u64,
    base: Vec<u8>,
    window: u64,
}

/// A recording of one stage.
struct Stage {
    handle: SimHandle,
    /// What was acknowledged when, in order.
    acknowledged: Vec<usize>,
}

type Check<'a> = dyn Fn(&Stage, CrashImage<'_>) -> Result<(), String> + 'a;

impl Slide {
    fn from(&self) -> u64 {
        TO + self.gap
    }

    /// Bytes of the partition that the namespace needs.
    fn part(&self) -> u64 {
        (2 * MIB + self.base.len() as u64).next_multiple_of(2 * MIB)
    }

    /// A region in which the namespace `a`, which key 1 and key 2 open, has free space before it.
    fn media(&self) -> Vec<u8> {
        let (size, part) = (self.base.len() as u64, self.part());
        let len = usize::try_from(self.from() + part + 2 * MIB).unwrap();
        let backing = Arc::new(Backing::simulated(len, PAGE).0);
        let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
        region.add("a", self.from()..self.from() + part).unwrap();
        let (base, available_bytes) = (self.from(), Some(part));
        let options = FormatOptions { size_bytes: Some(size), base, available_bytes, ..FormatOptions::default() };
        let mut namespace = namespace::format(Arc::clone(&backing), options, &key_file(1)).unwrap();
        namespace.add_slot(None, "", &key_file(2), KdfCost::LEAST).unwrap();
        volume(namespace).write_at(&self.base, 0).unwrap();
        media_of(&backing)
    }

    fn backing(&self, media: &[u8]) -> (Arc<Backing>, SimHandle) {
        let (backing, handle) = Backing::from_media(media, self.options);
        (Arc::new(backing), handle)
    }

    /// Runs a stage on media, which it leaves changed.
    fn stage(&self, media: &mut Vec<u8>, run: impl FnOnce(&Arc<Backing>, &SimHandle, &mut Vec<usize>)) -> Stage {
        let (backing, handle) = self.backing(media);
        let mut acknowledged = Vec::new();
        run(&backing, &handle, &mut acknowledged);
        *media = media_of(&backing);
        Stage { handle, acknowledged }
    }

    /// The new header, the table, and the end of the old header.
    fn begin(&self, media: &mut Vec<u8>) -> Stage {
        self.stage(media, |backing, handle, acknowledged| {
            let (mut region, _, _, namespace) = open(backing, 1).unwrap();
            let options = RekeyOptions::default();
            let mut moving = begin_slide(&mut region, "a", namespace, TO, &key_file(1), &options).unwrap();
            acknowledged.push(handle.position());
            moving.settle_header().unwrap();
            acknowledged.push(handle.position());
        })
    }

    fn move_data(&self, media: &mut Vec<u8>) -> Stage {
        self.stage(media, |backing, _, _| {
            let moving = volume(open(backing, 1).unwrap().3);
            while moving.transform().is_some_and(|progress| progress.done_bytes < progress.total_bytes) {
                moving.transform_step(self.window).unwrap();
            }
        })
    }

    /// The end of the transform, and of what the partition does not need.
    fn end(&self, media: &mut Vec<u8>) -> Stage {
        self.stage(media, |backing, handle, acknowledged| {
            let (mut region, _, _, namespace) = open(backing, 1).unwrap();
            let opened = handle.position();
            assert!(volume(namespace).transform_step(self.window).unwrap().is_none());
            acknowledged.push(handle.position());
            region.resize("a", self.part()).unwrap();
            acknowledged.extend([handle.position(), opened]);
        })
    }

    /// Opens it by its name, and finds its content.
    fn opens(&self, backing: &Arc<Backing>) -> Result<(Region, Range<u64>, namespace::Header), String> {
        let (region, range, header, namespace) = open(backing, 1)?;
        let found = content(&volume(namespace)).map_err(|error| format!("cannot be read: {error}"))?;
        if found == self.base { Ok((region, range, header)) } else { Err("the content is garbled".into()) }
    }

    fn check_begin(&self, stage: &Stage, image: CrashImage<'_>) -> Result<(), String> {
        let (backing, _) = self.backing(image.media);
        let (region, range, header) = self.opens(&backing)?;
        let is_old = range.start == self.from();
        if open(&backing, 2).is_ok() != is_old || header.rekeying == is_old {
            return Err(format!("at byte {}, the keys of the other place open it", range.start));
        }
        if image.position >= stage.acknowledged[0]
            && (is_old || !all_good(&region.copies()) || !all_good(&header.copies))
        {
            return Err("it has begun, and a copy of header or table does not know".into());
        }
        if image.position >= stage.acknowledged[0] {
            self.check_lost_record(image)?;
        }
        let former = LockedNamespace::open_at(backing, self.from(), self.part());
        if image.position >= stage.acknowledged[1] && !matches!(former, Err(OpenError::NotANamespace { .. })) {
            return Err("the old header is still there".into());
        }
        Ok(())
    }

    /// While no window moves, the loss of one sector of the journal costs nothing.
    fn check_lost_record(&self, image: CrashImage<'_>) -> Result<(), String> {
        for start in [TO + MIB, TO + MIB + 4096].map(|start| usize::try_from(start).unwrap()) {
            let mut media = image.media.to_vec();
            media[start..start + 512].fill(0);
            self.opens(&self.backing(&media).0).map_err(|error| format!("without the record at {start}: {error}"))?;
        }
        Ok(())
    }

    fn check_moving(&self, image: CrashImage<'_>, seconds: &Cell<[usize; 2]>) -> Result<(), String> {
        let (backing, handle) = self.backing(image.media);
        let (_, range, _) = self.opens(&backing)?;
        if range != (TO..self.from() + self.part()) {
            return Err(format!("the partition is {range:?}"));
        }
        let [states, explored] = seconds.get();
        seconds.set([states + 1, explored]);
        if states % SECONDS_EVERY > 0 {
            return Ok(());
        }
        // Opening has done a window again that was being moved, and the next one moves: the power fails again.
        let again = volume(open(&backing, 1)?.3);
        again.transform_step(self.window).map_err(|error| format!("does not go on: {error}"))?;
        let bounds = Bounds { exhaustive_max: 2, singles_max: 0, samples: 1, ..Bounds::default() };
        let second = handle.trace().explore(&bounds, None, |image| {
            self.opens(&self.backing(image.media).0).map(drop).map_err(|error| format!("second time: {error}"))
        });
        let second = second.map_err(|failure| failure.error)?;
        seconds.set([states + 1, explored + second.states]);
        while again.transform_step(self.window).map_err(|error| format!("does not end: {error}"))?.is_some() {}
        drop(again);
        self.opens(&backing).map(drop)
    }

    fn check_end(&self, stage: &Stage, image: CrashImage<'_>) -> Result<(), String> {
        let (backing, _) = self.backing(image.media);
        let (region, range, header) = self.opens(&backing)?;
        let journal = usize::try_from(TO + MIB).unwrap();
        let is_clear = image.media[journal..][..1 << 20].iter().all(|&byte| byte == 0);
        if image.position >= stage.acknowledged[0] && (header.rekeying || !all_good(&header.copies) || !is_clear) {
            return Err("it has ended, and the old key or the journal is still there".into());
        }
        if image.position >= stage.acknowledged[2] && header.rekeying {
            self.check_lost_record(image)?;
        }
        let is_short = range == (TO..TO + self.part()) && all_good(&region.copies());
        if image.position >= stage.acknowledged[1] && !is_short {
            return Err(format!("the partition is {range:?}"));
        }
        Ok(())
    }

    fn survives(&self) {
        let began = Instant::now();
        let mut media = self.media();
        let (begin, moving, end) = (self.begin(&mut media), self.move_data(&mut media), self.end(&mut media));
        let seconds = Cell::new([0, 0]);
        let (mut explored, mut mutants) = (Explored::default(), Mutants::default());
        let stages: [(&Stage, bool, &Check<'_>); 3] = [
            (&begin, true, &|stage, image| self.check_begin(stage, image)),
            // What a window is moved onto has moved long before, unless the namespace moves less than a window: barriers
            // between windows are for that, and proven by the re-key in place.
            (&moving, false, &|_, image| self.check_moving(image, &seconds)),
            (&end, true, &|stage, image| self.check_end(stage, image)),
        ];
        for (stage, with_mutants, check) in stages {
            let trace = stage.handle.trace();
            let one = trace.explore(&bounds(), None, |image| check(stage, image));
            let one =
                one.unwrap_or_else(|failure| panic!("{}: event {}: {}", self.name, failure.position, failure.error));
            explored.crash_points += one.crash_points;
            explored.states += one.states;
            explored.unique_media += one.unique_media;
            if with_mutants {
                let one = trace.mutants(&bounds(), REACH, |image| check(stage, image));
                mutants.all += one.all;
                mutants.killed += one.killed;
                mutants.survivors.extend(one.survivors);
            }
        }
        let (name, [_, seconds]) = (self.name, seconds.get());
        let wall = began.elapsed().as_secs_f64();
        println!("crash {name}: {explored}, {seconds} second crashes, {mutants}, {wall:.1} s");
        assert!(explored.crash_points > 30 && explored.states > 60 && seconds > 20, "{explored:?}");
        mutants.assert_only_fences_survive(name);
    }
}

fn all_good(copies: &[CopyState; 2]) -> bool {
    copies.iter().all(|copy| matches!(copy, CopyState::Good { .. }))
}

/// The region, the partition, the header as it was found, and the namespace.
fn open(backing: &Arc<Backing>, key: u8) -> Result<(Region, Range<u64>, namespace::Header, Namespace), String> {
    let region = Region::open(Arc::clone(backing)).map_err(|error| format!("no region: {error}"))?;
    let range = region.find("a").map_err(|error| error.to_string())?.range;
    let locked = LockedNamespace::open_at(Arc::clone(backing), range.start, range.end - range.start);
    let locked = locked.map_err(|error| format!("does not open: {error}"))?;
    let header = locked.header().clone();
    let namespace = locked.unlock_key(&key_file(key)).map_err(|error| format!("does not unlock: {error}"))?;
    Ok((region, range, header, namespace))
}

#[test]
fn a_slide_over_its_own_place_survives() {
    let base = pattern(0, usize::try_from(2 * MIB + (96 << 10)).unwrap());
    let window = WINDOW_BYTES_MAX;
    Slide { name: "overlapping slide, page", options: PAGE, gap: 2 * MIB, base, window }.survives();
}

#[test]
fn a_slide_into_free_space_survives() {
    let base = pattern(0, 40 << 10);
    Slide { name: "slide, cache line", options: LINE, gap: 4 * MIB, base, window: 16 << 10 }.survives();
}

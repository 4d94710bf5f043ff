//! What was cut or failed, and then went on in another process: nothing that was seen is trusted before it is durable.
//!
//! Each test cuts one operation at every step at which something else could be left, lets the next process open the namespace
//! as any command does, and looks at what a power cut leaves then.

use std::sync::Arc;

use super::crash_tests::{LINE, PAGE, content, formatted, key_file, open, pattern, volume};
use super::*;
use crate::namespace::{self, CopyState, FormatOptions, KdfCost, LockedNamespace, Region, Site, begin_slide};
use crate::pmem::sim::{Bounds, CrashImage, Fault, PageCache, SimHandle, SimOptions, Trace, visible_bytes};
use crate::pmem::{Backing, Granularity};

const SIZE: usize = 40 << 10;
const WINDOW: u64 = 16 << 10;
const BOTH: [PageCache; 2] = [PageCache::Kept, PageCache::Evicted];

/// Few states at each crash point: it is their number that tells.
const FEW: Bounds =
    Bounds { exhaustive_max: 2, singles_max: 0, samples: 1, seed: 7, positions: (0, usize::MAX), every: 1 };

fn backing(media: &[u8], options: SimOptions) -> (Arc<Backing>, SimHandle) {
    let (backing, handle) = Backing::from_media(media, options);
    (Arc::new(backing), handle)
}

/// The positions at which somebody who is killed leaves the most undone: before each barrier that has an effect, and at the
/// end.
fn cuts(trace: &Trace) -> Vec<usize> {
    let barriers = trace.barriers().into_iter().filter(|barrier| barrier.effective).map(|barrier| barrier.position);
    barriers.chain([trace.end()]).collect()
}

fn reads(image: CrashImage<'_>, options: SimOptions, base: &[u8]) -> Result<(), String> {
    let found = content(&volume(open(&backing(image.media, options).0, 1)?)).map_err(|error| error.to_string())?;
    if found == base { Ok(()) } else { Err("the content is garbled".into()) }
}

/// The header as it is on media, and the bytes of both copies.
fn copies(media: &[u8]) -> [&[u8]; 2] {
    [0, 256 << 10].map(|start| &media[start..start + (64 << 10)])
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|part| part == text)
}

#[test]
fn a_rekey_that_was_killed_goes_on_in_another_process_and_then_the_power_fails() {
    for options in [PAGE, LINE] {
        let base = pattern(0, SIZE);
        let (first, handle) = backing(&formatted(2, 2, &base), options);
        let rekeyed = volume(open(&first, 1).unwrap());
        rekeyed.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
        while rekeyed.transform_step(WINDOW).unwrap().is_some() {}
        let trace = handle.trace();
        let mut states = 0;
        for position in cuts(&trace) {
            let (backings, handle) = trace.restart(position, PageCache::Kept);
            let second = volume(open(&backings[0], 1).unwrap());
            second.transform_step(WINDOW).unwrap();
            let bounds = Bounds { positions: (position, usize::MAX), every: 2, ..FEW };
            let explored = handle.trace().explore(&bounds, None, |image| reads(image, options, &base));
            states += explored.unwrap_or_else(|failure| panic!("killed at {position}, then {failure}")).states;
        }
        println!("killed and continued, {:?}: {states} states", options.granularity());
        assert!(states > 200, "{states} states");
    }
}

#[test]
fn the_beginning_fails_at_any_call_is_tried_again_and_both_copies_are_worth_something() {
    let base = pattern(1, SIZE);
    let media = formatted(2, 2, &base);
    let (whole, handle) = backing(&media, PAGE);
    let mut namespace = open(&whole, 1).unwrap();
    let first = handle.calls();
    namespace.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    let calls = first..handle.calls();
    assert!(calls.len() >= 8, "two records and two copies, each stored and flushed: {calls:?}");
    for (call, cache) in calls.flat_map(|call| BOTH.map(|cache| (call, cache))) {
        let (failing, handle) = backing(&media, PAGE);
        let mut namespace = open(&failing, 1).unwrap();
        handle.fail_call(call, Fault::Io);
        namespace.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap_err();
        let _ = namespace.begin_rekey(&key_file(1), &RekeyOptions::default()); // as a user does who sees the error
        let trace = handle.trace();
        let bounds = Bounds { positions: (trace.end(), trace.end()), samples: 8, ..FEW };
        let cut = trace.explore(&bounds, None, |image| reads(image, PAGE, &base));
        cut.unwrap_or_else(|failure| panic!("call {call}: {failure}"));
        let (backings, handle) = trace.restart(trace.end(), cache);
        let again = volume(open(&backings[0], 1).unwrap_or_else(|error| panic!("call {call}, {cache:?}: {error}")));
        assert_eq!(content(&again).unwrap(), base);
        while again.transform_step(WINDOW).unwrap().is_some() {}
        let bounds = Bounds { positions: (trace.end(), usize::MAX), every: 4, ..FEW };
        let after = handle.trace().explore(&bounds, None, |image| reads(image, PAGE, &base));
        after.unwrap_or_else(|failure| panic!("call {call}, {cache:?}, then {failure}"));
    }
}

#[test]
fn a_journal_that_was_lost_before_anything_moved_costs_nothing_while_one_copy_is_from_before() {
    let base = pattern(2, SIZE);
    let media = formatted(2, 2, &base);
    let (whole, handle) = backing(&media, PAGE);
    let mut namespace = open(&whole, 1).unwrap();
    let calls = handle.calls();
    namespace.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    drop(namespace);
    let mut lost = visible_bytes(&whole);
    assert!(handle.calls() > calls);
    // The older copy as it was, and no record.
    let newer = copies(&media).map(|copy| u64::from_le_bytes(copy[24..32].try_into().unwrap()));
    let older = if newer[0] < newer[1] { 0 } else { 256 << 10 };
    lost[older..older + (64 << 10)].copy_from_slice(&media[older..older + (64 << 10)]);
    lost[1 << 20..2 << 20].fill(0);
    let (found, _) = backing(&lost, PAGE);
    let namespace = open(&found, 1).unwrap();
    assert!(!namespace.header().rekeying && namespace.header().slots.len() == 2, "{:?}", namespace.header());
    assert_eq!(content(&volume(namespace)).unwrap(), base);
    let settled = visible_bytes(&found);
    assert!(copies(&settled).iter().all(|copy| !contains(copy, b"transform")), "it is finished");
}

#[test]
fn a_removed_slot_is_in_neither_copy_after_the_next_opening_for_writing() {
    for options in [PAGE, LINE] {
        let (first, handle) = backing(&formatted(2, 2, &pattern(3, SIZE)), options);
        let mut namespace = open(&first, 1).unwrap();
        let began = handle.position();
        namespace.remove_slot(1, false).unwrap();
        let trace = handle.trace();
        let mut removed = 0;
        let bounds = Bounds { positions: (began, usize::MAX), samples: 4, ..FEW };
        let explored = trace.explore(&bounds, None, |image| {
            let (found, _) = backing(image.media, options);
            let header = open(&found, 1)?.header();
            let is_gone = header.slots.len() == 1;
            removed += usize::from(is_gone);
            let media = visible_bytes(&found);
            let [a, b] = copies(&media);
            let is_settled = a == b && contains(a, b"\"id\":1,") != is_gone;
            if is_settled { Ok(()) } else { Err(format!("a copy was left behind; gone: {is_gone}")) }
        });
        explored.unwrap_or_else(|failure| panic!("{failure}"));
        assert!(removed > 1, "some cuts leave the removal half done");
    }
}

#[test]
fn the_end_of_a_rekey_that_was_cut_is_finished_by_whoever_opens_for_writing() {
    let base = pattern(4, SIZE);
    let (first, handle) = backing(&formatted(2, 2, &base), PAGE);
    let rekeyed = volume(open(&first, 1).unwrap());
    rekeyed.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    while rekeyed.transform().is_some_and(|progress| progress.done_bytes < progress.total_bytes) {
        rekeyed.transform_step(WINDOW).unwrap();
    }
    let last = handle.position();
    assert!(rekeyed.transform_step(WINDOW).unwrap().is_none());
    let is_clean = |found: &Arc<Backing>| {
        let header = open(found, 1)?.header();
        let media = visible_bytes(found);
        let has_journal = media[1 << 20..2 << 20].iter().any(|&byte| byte != 0);
        let has_key = copies(&media).iter().any(|copy| contains(copy, b"transform"));
        let is_clean = header.rekeying || !(has_journal || has_key);
        if is_clean { Ok(()) } else { Err(format!("journal: {has_journal}, old key: {has_key}")) }
    };
    let trace = handle.trace();
    let bounds = Bounds { positions: (last, usize::MAX), samples: 8, ..FEW };
    let explored = trace.explore(&bounds, None, |image| is_clean(&backing(image.media, PAGE).0));
    explored.unwrap_or_else(|failure| panic!("{failure}"));
    for position in cuts(&trace).into_iter().filter(|&position| position >= last) {
        is_clean(&trace.restart(position, PageCache::Kept).0[0]).unwrap();
    }
}

#[test]
fn who_did_not_see_a_change_of_the_header_cannot_write_over_it() {
    let base = pattern(5, SIZE);
    let (shared, _) = backing(&formatted(2, 2, &base), PAGE);
    let mut older = open(&shared, 1).unwrap();
    let newer = volume(open(&shared, 1).unwrap());
    newer.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    newer.transform_step(WINDOW).unwrap();
    let before = visible_bytes(&shared);
    assert!(matches!(older.set_unclean(true), Err(UpdateError::Changed)));
    let refused = older.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap_err();
    assert!(matches!(refused, TransformError::Update(UpdateError::Changed)), "{refused}");
    assert!(visible_bytes(&shared) == before, "nothing was written");
    while newer.transform_step(WINDOW).unwrap().is_some() {}
    assert_eq!(content(&newer).unwrap(), base);
}

#[test]
fn two_who_move_data_stop_each_other() {
    let base = pattern(6, SIZE);
    let (shared, _) = backing(&formatted(2, 2, &base), PAGE);
    let mut namespace = open(&shared, 1).unwrap();
    namespace.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    drop(namespace);
    let mut other = open(&shared, 1).unwrap();
    let one = volume(open(&shared, 1).unwrap());
    one.transform_step(WINDOW).unwrap();
    let stopped = other.pending_transform_mut().unwrap().advance(&[0; 4096]).unwrap_err();
    assert!(matches!(stopped, TransformError::Update(UpdateError::Changed)), "{stopped}");
    while one.transform_step(WINDOW).unwrap().is_some() {}
    assert_eq!(content(&one).unwrap(), base);
}

#[test]
fn a_full_disk_ends_a_move_with_every_byte_readable_and_the_move_goes_on_when_there_is_room() {
    let base = pattern(7, SIZE);
    let media = formatted(2, 4, &base);
    let begun = || {
        let (backing, handle) = backing(&media, PAGE);
        let mut namespace = open(&backing, 1).unwrap();
        namespace.begin_move(4 << 20, &key_file(1), &RekeyOptions::default()).unwrap();
        (volume(namespace), handle)
    };
    let (whole, handle) = begun();
    let first = handle.calls();
    whole.transform_step(WINDOW).unwrap();
    for (call, fault) in (first..handle.calls()).flat_map(|call| [(call, Fault::NoSpace), (call, Fault::Io)]) {
        let (moving, handle) = begun();
        handle.fail_call(call, fault);
        moving.transform_step(WINDOW).unwrap_err();
        assert_eq!(content(&moving).unwrap(), base, "call {call}, {fault:?}");
        drop(moving);
        let trace = handle.trace();
        for cache in BOTH {
            let again = volume(open(&trace.restart(trace.end(), cache).0[0], 1).unwrap());
            assert_eq!(content(&again).unwrap(), base, "call {call}, {fault:?}, {cache:?}");
            while again.transform_step(WINDOW).unwrap().is_some() {}
            assert_eq!(content(&again).unwrap(), base);
        }
    }
}

/// Media with a namespace whose discards punch holes.
fn with_discards(base: &[u8]) -> Vec<u8> {
    let backing = Arc::new(Backing::simulated((2 << 20) + base.len(), PAGE).0);
    let size_bytes = Some(base.len() as u64);
    let options = FormatOptions { size_bytes, allow_discards: true, ..FormatOptions::default() };
    let namespace = namespace::format(Arc::clone(&backing), options, &key_file(1)).unwrap();
    volume(namespace).write_at(base, 0).unwrap();
    visible_bytes(&backing)
}

#[test]
fn discards_during_a_rekey_leave_old_bytes_or_zeroes_after_a_power_cut() {
    for options in [PAGE, LINE] {
        let base = pattern(8, SIZE);
        let (first, handle) = backing(&with_discards(&base), options);
        let rekeyed = volume(open(&first, 1).unwrap());
        rekeyed.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
        let began = handle.position();
        // The first is passed over as a hole, the others are parts of windows; before and behind the boundary.
        let discards =
            [(0, 8 << 10), (12 << 10, 4 << 10), (20 << 10, 4 << 10), (36 << 10, 4 << 10), (16 << 10, 4 << 10)];
        for &(offset, len) in &discards {
            rekeyed.discard(offset, len).unwrap();
            rekeyed.transform_step(WINDOW).unwrap();
        }
        while rekeyed.transform_step(WINDOW).unwrap().is_some() {}
        let bounds = Bounds { positions: (began, usize::MAX), samples: 3, ..FEW };
        let explored = handle.trace().explore(&bounds, None, |image| {
            let found = content(&volume(open(&backing(image.media, options).0, 1)?));
            let found = found.map_err(|error| error.to_string())?;
            for (index, (&found, &old)) in found.iter().zip(&base).enumerate() {
                let discarded = discards.iter().any(|&(offset, len)| (offset..offset + len).contains(&(index as u64)));
                if found != old && !(discarded && found == 0) {
                    return Err(format!("byte {index} is garbled"));
                }
            }
            Ok(())
        });
        explored.unwrap_or_else(|failure| panic!("{:?}: {failure}", options.granularity()));
    }
}

/// The pages of a discard whose flush failed count as clean, and are seen as holes all the same: the next process makes them
/// holes again, in a window and where it passes over them, before it says that they have moved.
#[test]
fn a_hole_whose_flush_failed_is_made_again_before_a_rekey_relies_on_it() {
    let base = pattern(8, SIZE);
    for (offset, len) in [(4 << 10, 4 << 10), (0, 8 << 10)] {
        let (first, handle) = backing(&with_discards(&base), PAGE);
        let rekeyed = volume(open(&first, 1).unwrap());
        rekeyed.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
        rekeyed.discard(offset, len).unwrap();
        handle.fail_call(handle.calls(), Fault::Io);
        rekeyed.flush().unwrap_err();
        drop(rekeyed);
        let trace = handle.trace();
        let (backings, handle) = trace.restart(trace.end(), PageCache::Kept);
        let again = volume(open(&backings[0], 1).unwrap());
        while again.transform_step(WINDOW).unwrap().is_some() {}
        let bounds = Bounds { positions: (trace.end(), usize::MAX), samples: 3, ..FEW };
        let explored = handle.trace().explore(&bounds, None, |image| {
            let found = content(&volume(open(&backing(image.media, PAGE).0, 1)?)).map_err(|error| error.to_string())?;
            let discarded = |index: usize| (offset..offset + len).contains(&(index as u64));
            match (0..SIZE).find(|&index| found[index] != base[index] && !(discarded(index) && found[index] == 0)) {
                Some(index) => Err(format!("byte {index} is garbled")),
                None => Ok(()),
            }
        });
        explored.unwrap_or_else(|failure| panic!("{len} discarded bytes at {offset}: {failure}"));
    }
}

#[test]
fn the_first_flush_makes_durable_what_a_dead_process_has_discarded() {
    let base = pattern(9, SIZE);
    let (first, handle) = backing(&with_discards(&base), LINE);
    let served = volume(open(&first, 1).unwrap());
    served.flush().unwrap();
    served.discard(0, 4096).unwrap();
    let trace = handle.trace();
    let (backings, handle) = trace.restart(trace.end(), PageCache::Kept);
    let again = volume(open(&backings[0], 1).unwrap());
    let mut seen = vec![0; 4096];
    again.read_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|&byte| byte == 0), "it is seen");
    again.flush().unwrap();
    let end = handle.trace().end();
    let bounds = Bounds { positions: (end, end), ..FEW };
    let explored = handle.trace().explore(&bounds, None, |image| {
        let found = content(&volume(open(&backing(image.media, LINE).0, 1)?)).map_err(|error| error.to_string())?;
        if found[..4096] == seen { Ok(()) } else { Err("what a flush has acknowledged came back".to_owned()) }
    });
    explored.unwrap_or_else(|failure| panic!("{failure}"));
}

/// A region whose namespace `a` begins at 4 MiB, with 2 MiB free before it.
fn in_region(base: &[u8]) -> Vec<u8> {
    let backing = Arc::new(Backing::simulated(10 << 20, PAGE).0);
    let mut region = Region::create(Arc::clone(&backing), 512).unwrap();
    region.add("a", 4 << 20..8 << 20).unwrap();
    let (size_bytes, available_bytes) = (Some(base.len() as u64), Some(4 << 20));
    let options = FormatOptions { size_bytes, base: 4 << 20, available_bytes, ..FormatOptions::default() };
    let namespace = namespace::format(Arc::clone(&backing), options, &key_file(1)).unwrap();
    volume(namespace).write_at(base, 0).unwrap();
    visible_bytes(&backing)
}

fn open_in_region(backing: &Arc<Backing>) -> Result<(Region, Namespace), String> {
    let region = Region::open(Arc::clone(backing)).map_err(|error| format!("no region: {error}"))?;
    let range = region.find("a").map_err(|error| error.to_string())?.range;
    let locked = LockedNamespace::open_at(Arc::clone(backing), range.start, range.end - range.start);
    let namespace = locked.map_err(|error| format!("does not open: {error}"))?.unlock_key(&key_file(1));
    Ok((region, namespace.map_err(|error| format!("does not unlock: {error}"))?))
}

#[test]
fn a_slide_that_was_killed_goes_on_in_another_process_and_then_the_power_fails() {
    let base = pattern(11, SIZE);
    let (first, handle) = backing(&in_region(&base), PAGE);
    let (mut region, namespace) = open_in_region(&first).unwrap();
    let moving = begin_slide(&mut region, "a", namespace, 2 << 20, &key_file(1), &RekeyOptions::default()).unwrap();
    volume(moving).transform_step(WINDOW).unwrap();
    let trace = handle.trace();
    let mut states = 0;
    for position in cuts(&trace) {
        let (backings, handle) = trace.restart(position, PageCache::Kept);
        let second = volume(open_in_region(&backings[0]).unwrap().1);
        second.transform_step(WINDOW).unwrap();
        let bounds = Bounds { positions: (position, usize::MAX), ..FEW };
        let explored = handle.trace().explore(&bounds, None, |image| {
            let found = content(&volume(open_in_region(&backing(image.media, PAGE).0)?.1));
            if found.map_err(|error| error.to_string())? == base { Ok(()) } else { Err("garbled".to_owned()) }
        });
        states += explored.unwrap_or_else(|failure| panic!("killed at {position}, then {failure}")).states;
    }
    assert!(states > 100, "{states} states");
}

#[test]
fn who_destroys_a_namespace_destroys_every_place_that_its_header_names() {
    let (sliding, _) = backing(&in_region(&pattern(12, SIZE)), PAGE);
    let (mut region, namespace) = open_in_region(&sliding).unwrap();
    drop(begin_slide(&mut region, "a", namespace, 2 << 20, &key_file(1), &RekeyOptions::default()).unwrap());
    let has_header = || [2 << 20, 4 << 20].map(|start| &visible_bytes(&sliding)[start..start + 8] == b"DAXCRYPT");
    assert_eq!(has_header(), [true; 2], "the old one is there until the first window moves");
    let range = region.find("a").unwrap().range;
    namespace::destroy(&Site::part(Arc::clone(&sliding), range.start, range.end - range.start)).unwrap();
    assert_eq!(has_header(), [false; 2]);
    let left = visible_bytes(&sliding);
    let areas = [2 << 20..4 << 20, 4 << 20..6 << 20].map(|area: Range<usize>| &left[area]);
    assert!(areas.iter().all(|area| area.iter().all(|&byte| byte == 0)), "no slot, no old key, no journal");
}

#[test]
fn a_slide_that_was_cut_before_the_table_knew_leaves_nothing_when_the_namespace_is_removed() {
    let (first, handle) = backing(&in_region(&pattern(13, SIZE)), PAGE);
    let (mut region, namespace) = open_in_region(&first).unwrap();
    let uuid = namespace.header().uuid;
    drop(begin_slide(&mut region, "a", namespace, 2 << 20, &key_file(1), &RekeyOptions::default()).unwrap());
    let trace = handle.trace();
    let mut swept = 0;
    for position in cuts(&trace) {
        let (backings, _) = trace.restart(position, PageCache::Kept);
        let mut region = Region::open(Arc::clone(&backings[0])).unwrap();
        let range = region.find("a").unwrap().range;
        namespace::destroy(&Site::part(Arc::clone(&backings[0]), range.start, range.end - range.start)).unwrap();
        swept += region.sweep(uuid).unwrap();
        region.remove("a").unwrap();
        let left = visible_bytes(&backings[0]);
        assert!(!contains(&left[2 << 20..8 << 20], b"DAXCRYPT"), "killed at {position}");
    }
    assert!(swept > 1, "some cuts leave a header where nobody would look");
}

/// What was cleared by somebody who was killed, or whose flush failed, is seen as zeros and may be on media all the same.
#[test]
fn the_header_of_a_cut_slide_is_gone_from_media_although_an_earlier_sweep_was_killed_or_failed() {
    let (first, handle) = backing(&in_region(&pattern(14, SIZE)), PAGE);
    let (mut region, namespace) = open_in_region(&first).unwrap();
    drop(begin_slide(&mut region, "a", namespace, 2 << 20, &key_file(1), &RekeyOptions::default()).unwrap());
    let trace = handle.trace();
    let stray = cuts(&trace).into_iter().find_map(|position| {
        let (backings, _) = trace.restart(position, PageCache::Kept);
        let begins_there = visible_bytes(&backings[0])[2 << 20..].starts_with(b"DAXCRYPT");
        (begins_there && open_in_region(&backings[0]).unwrap().0.find("a").unwrap().range.start == 4 << 20)
            .then(|| visible_bytes(&backings[0]))
    });
    let stray = stray.expect("a cut after the header and before the table");
    let sweep = |backing: &Arc<Backing>| Region::open(Arc::clone(backing)).unwrap().end_cut_slides();
    let is_gone = |backing: &Arc<Backing>, handle: &SimHandle, what: &str| {
        sweep(backing).unwrap_or_else(|error| panic!("{what}: {error}"));
        let trace = handle.trace();
        let bounds = Bounds { positions: (trace.end(), trace.end()), samples: 8, ..FEW };
        let left =
            trace.explore(&bounds, None, |image| match image.media[2 << 20..4 << 20].iter().all(|&byte| byte == 0) {
                true => Ok(()),
                false => Err("the header is on media"),
            });
        left.unwrap_or_else(|failure| panic!("{what}: {failure}"));
    };
    let (whole, handle) = backing(&stray, PAGE);
    let begin = handle.calls();
    assert_eq!(sweep(&whole).unwrap(), 1);
    let (calls, trace) = (begin..handle.calls(), handle.trace());
    for position in cuts(&trace) {
        let (backings, handle) = trace.restart(position, PageCache::Kept);
        is_gone(&backings[0], &handle, &format!("killed at {position}"));
    }
    for (call, cache) in calls.flat_map(|call| BOTH.map(|cache| (call, cache))) {
        let (failing, handle) = backing(&stray, PAGE);
        handle.fail_call(call, Fault::Io);
        let _ = Region::open(failing).map(|region| region.end_cut_slides()); // the call may be one of the opening
        let trace = handle.trace();
        let (backings, handle) = trace.restart(trace.end(), cache);
        is_gone(&backings[0], &handle, &format!("call {call} failed, {cache:?}"));
    }
}

#[test]
fn both_copies_are_whole_after_the_next_opening_for_writing() {
    let (found, _) = backing(&formatted(2, 2, &pattern(10, SIZE)), PAGE);
    found.write(256 << 10..(256 << 10) + 64, |mut target| target.fill(7)).unwrap();
    let before = LockedNamespace::open(Arc::clone(&found)).unwrap();
    assert!(before.header().copies.iter().any(|copy| matches!(copy, CopyState::Bad { .. })));
    let mut namespace = open(&found, 1).unwrap();
    assert!(namespace.header().copies.iter().all(|copy| matches!(copy, CopyState::Good { .. })));
    namespace.add_slot(None, "", &key_file(9), KdfCost::LEAST).unwrap();
    assert_eq!(found.granularity(), Granularity::Page);
}

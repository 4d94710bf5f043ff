use std::collections::BTreeSet;

use super::*;
use crate::pmem::{Backing, MediaError};

const PAGE: u64 = 4096;
const BOTH: [Granularity; 2] = [Granularity::CacheLine, Granularity::Page];

fn put(backing: &Backing, offset: u64, bytes: &[u8]) {
    backing.write(offset..offset + bytes.len() as u64, |mut target| target.copy_from(bytes)).unwrap();
}

/// Every value that the bytes at the offsets can have together after a power cut at the end.
fn outcomes(handle: &SimHandle, offsets: &[usize]) -> BTreeSet<Vec<u8>> {
    let mut seen = BTreeSet::new();
    let end = handle.position();
    let explored = handle.trace().explore(&Bounds::default(), None, |image| {
        if image.position == end {
            seen.insert(offsets.iter().map(|&offset| image.media[offset]).collect());
        }
        Ok::<_, ()>(())
    });
    assert!(explored.unwrap().states > 0);
    seen
}

fn set<const N: usize>(values: [&[u8]; N]) -> BTreeSet<Vec<u8>> {
    values.into_iter().map(<[u8]>::to_vec).collect()
}

#[test]
fn unflushed_lines_are_lost_or_kept_independently() {
    let (backing, handle) = Backing::simulated(8192, SimOptions::new(Granularity::CacheLine));
    put(&backing, 0, &[1]);
    put(&backing, 64, &[2]);
    assert_eq!(outcomes(&handle, &[0, 64]), set([&[0, 0], &[1, 0], &[0, 2], &[1, 2]]));
}

#[test]
fn stores_to_one_line_are_kept_in_their_order() {
    let (backing, handle) = Backing::simulated(8192, SimOptions::new(Granularity::CacheLine));
    put(&backing, 48, &[1]);
    put(&backing, 0, &[2]);
    put(&backing, 48, &[3]);
    assert_eq!(outcomes(&handle, &[48, 0]), set([&[0, 0], &[1, 0], &[1, 2], &[3, 2]]));
}

#[test]
fn a_flush_alone_promises_nothing_and_a_drain_commits_what_was_flushed_before_it() {
    let (backing, handle) = Backing::simulated(8192, SimOptions::new(Granularity::CacheLine));
    put(&backing, 0, &[1]);
    backing.flush(0..1).unwrap();
    assert_eq!(outcomes(&handle, &[0]), set([&[0], &[1]]));
    put(&backing, 0, &[2]);
    put(&backing, 64, &[9]);
    backing.drain().unwrap();
    assert_eq!(outcomes(&handle, &[0, 64]), set([&[1, 0], &[2, 0], &[1, 9], &[2, 9]]));
    backing.persist(0..65).unwrap();
    assert_eq!(outcomes(&handle, &[0, 64]), set([&[2, 9]]));
}

#[test]
fn the_torn_unit_decides_what_stays_together() {
    for (torn_bytes, expected) in [
        (8, set([&[0, 0, 0], &[1, 0, 0], &[1, 1, 0], &[1, 1, 1]])),
        (16, set([&[0, 0, 0], &[1, 1, 0], &[1, 1, 1]])),
        (64, set([&[0, 0, 0], &[1, 1, 1]])),
    ] {
        let options = SimOptions::new(Granularity::CacheLine).torn_bytes(torn_bytes);
        let (backing, handle) = Backing::simulated(64, options);
        put(&backing, 0, &[1; 32]);
        let seen = outcomes(&handle, &[0, 8, 16]);
        assert_eq!(seen, expected, "torn unit {torn_bytes}");
    }
}

#[test]
fn streamed_lines_need_a_drain_but_no_flush_and_their_edges_are_flushed() {
    let (backing, handle) = Backing::simulated(8192, SimOptions::new(Granularity::CacheLine));
    backing.write_streaming(48..208, |mut target| target.fill(1)).unwrap();
    assert_eq!(outcomes(&handle, &[48, 64, 128, 192]).len(), 16);
    backing.drain().unwrap();
    assert_eq!(outcomes(&handle, &[48, 64, 128, 192]), set([&[1, 1, 1, 1]]));
    backing.write_streaming(1..3, |mut target| target.fill(7)).unwrap();
    backing.drain().unwrap();
    assert_eq!(outcomes(&handle, &[1]), set([&[7]]));
}

#[test]
fn pages_are_committed_by_msync_and_sync_and_torn_at_sectors() {
    let (backing, handle) = Backing::simulated(4 * 4096, SimOptions::new(Granularity::Page));
    put(&backing, 0, &[1; 1024]);
    put(&backing, PAGE, &[2]);
    backing.drain().unwrap();
    let torn = set([&[0, 0, 0], &[0, 0, 2], &[0, 1, 0], &[0, 1, 2], &[1, 0, 0], &[1, 0, 2], &[1, 1, 0], &[1, 1, 2]]);
    assert_eq!(outcomes(&handle, &[0, 512, 4096]), torn);
    backing.flush(5..6).unwrap();
    assert_eq!(outcomes(&handle, &[0, 512, 4096]), set([&[1, 1, 0], &[1, 1, 2]]));
    backing.sync_all().unwrap();
    assert_eq!(outcomes(&handle, &[0, 512, 4096]), set([&[1, 1, 2]]));
}

#[test]
fn a_new_length_is_there_for_certain_after_a_sync_only() {
    for granularity in BOTH {
        let (backing, handle) = Backing::simulated(4096, SimOptions::new(granularity));
        backing.grow(8192, crate::pmem::Allocation::Full).unwrap();
        let lengths = |handle: &SimHandle| {
            let mut seen = BTreeSet::new();
            let end = handle.position();
            let look = |image: CrashImage<'_>| {
                if image.position == end {
                    seen.insert(image.media.len());
                }
                Ok::<_, ()>(())
            };
            handle.trace().explore(&Bounds::default(), None, look).unwrap();
            seen
        };
        assert_eq!(lengths(&handle), BTreeSet::from([4096, 8192]));
        put(&backing, 8000, &[1]);
        backing.persist(8000..8001).unwrap();
        backing.sync_all().unwrap();
        assert_eq!(lengths(&handle), BTreeSet::from([8192]));
        assert_eq!(outcomes(&handle, &[8000]), set([&[1]]));
    }
}

#[test]
fn a_hole_is_a_store_of_zeros() {
    let (backing, handle) = Backing::from_media(vec![5; 4096], SimOptions::new(Granularity::Page));
    backing.punch_hole(0..512).unwrap();
    assert_eq!(outcomes(&handle, &[0, 512]), set([&[0, 5], &[5, 5]]));
}

#[test]
fn crash_media_open_again_and_unchanged_blocks_are_no_stores() {
    let (backing, handle) = Backing::from_media(b"0123456789abcdef".repeat(4), SimOptions::new(Granularity::CacheLine));
    put(&backing, 0, b"0123456789abcdef");
    let explored = handle.trace().explore(&Bounds::default(), None, |_| Ok::<_, ()>(())).unwrap();
    assert_eq!(explored.states, 1, "nothing to keep or to lose: {explored}");
    assert_eq!(backing.len_bytes(), 64);
    assert!(matches!(backing.read(60..65, |_| ()), Err(MediaError::OutOfRange { .. })));
    assert_eq!(backing.granularity_reason().to_string(), "cache line: a simulated medium");
}

#[test]
fn beyond_the_bound_the_corners_are_explored_and_samples_repeat_with_the_seed() {
    let (backing, handle) = Backing::simulated(64 * 64, SimOptions::new(Granularity::CacheLine));
    for line in 0..64 {
        put(&backing, line * 64, &[1]);
    }
    let bounds = Bounds { samples: 10, ..Bounds::default() };
    let explore = |bounds: &Bounds| {
        let mut kept = Vec::new();
        let look = |image: CrashImage<'_>| {
            kept.push(image.media.iter().map(|&byte| u64::from(byte)).sum::<u64>());
            Ok::<_, ()>(())
        };
        let explored = handle.trace().explore(bounds, None, look).unwrap();
        (kept, explored)
    };
    let (kept, explored) = explore(&bounds);
    assert_eq!((explored.crash_points, explored.states, explored.unique_media), (1, 2 + 128 + 10, 140));
    for (count, times) in [(0, 1), (64, 1), (1, 64), (63, 64)] {
        assert_eq!(kept.iter().filter(|&&sum| sum == count).count(), times, "{count} lines kept");
    }
    assert_eq!(explore(&bounds).0, kept);
    assert_ne!(explore(&Bounds { seed: 1, ..bounds }).0, kept);
}

#[test]
fn what_a_dead_process_stored_is_seen_by_the_next_one_and_still_not_durable() {
    for granularity in BOTH {
        let (backing, handle) = Backing::simulated(8192, SimOptions::new(granularity));
        put(&backing, 0, &[1]);
        backing.persist(0..1).unwrap();
        put(&backing, 4096, &[2]);
        backing.flush(4096..4097).unwrap(); // marked, at cache-line granularity, and then nobody fences
        let killed = if granularity == Granularity::Page { handle.position() - 1 } else { handle.position() };
        let (backings, next) = handle.trace().restart(killed, PageCache::Kept);
        let [backing] = backings.try_into().unwrap();
        assert_eq!(visible_bytes(&backing)[..1], [1]);
        assert_eq!(visible_bytes(&backing)[4096..4097], [2], "{granularity:?}");
        backing.drain().unwrap();
        assert_eq!(outcomes(&next, &[0, 4096]), set([&[1, 0], &[1, 2]]), "{granularity:?}");
        backing.persist(4096..4097).unwrap();
        assert_eq!(outcomes(&next, &[0, 4096]), set([&[1, 2]]));
        put(&backing, 64, &[3]);
        assert_eq!(outcomes(&next, &[64, 4096]), set([&[0, 2], &[3, 2]]));
    }
}

#[test]
fn a_page_is_clean_after_a_failed_flush_and_only_another_store_to_it_makes_it_durable() {
    let (backing, handle) = Backing::simulated(3 * 4096, SimOptions::new(Granularity::Page));
    for at in [0, PAGE, 2 * PAGE] {
        put(&backing, at, &[1]);
    }
    handle.fail_call(handle.calls(), Fault::Io);
    assert!(matches!(backing.flush(0..PAGE + 1), Err(MediaError::Flush(_))));
    assert!(matches!(backing.flush(2 * PAGE..2 * PAGE + 1), Err(MediaError::Poisoned)));
    let (backings, next) = handle.trace().restart(handle.position(), PageCache::Kept);
    let backing = &backings[0];
    backing.sync_all().unwrap();
    // The third page was never tried: it is dirty, and durable now. The others look the same to whoever reads.
    let at = [0, 4096, 8192];
    assert_eq!(at.map(|at| visible_bytes(backing)[at]), [1, 1, 1]);
    assert_eq!(outcomes(&next, &at), set([&[0, 0, 1], &[0, 1, 1], &[1, 0, 1], &[1, 1, 1]]));
    put(backing, PAGE, &[1]);
    backing.persist(PAGE..PAGE + 1).unwrap();
    assert_eq!(outcomes(&next, &at), set([&[0, 1, 1], &[1, 1, 1]]));

    let (backings, evicted) = next.trace().restart(next.position(), PageCache::Evicted);
    assert_eq!(at.map(|at| visible_bytes(&backings[0])[at]), [0, 1, 1]);
    assert_eq!(outcomes(&evicted, &at), set([&[0, 1, 1]]));
}

#[test]
fn every_call_that_reaches_the_medium_can_fail() {
    type Call = fn(&Backing) -> Result<(), MediaError>;
    let calls: [Call; 6] = [
        |backing| backing.write(0..64, |mut target| target.fill(9)),
        |backing| backing.flush(0..64),
        |backing| backing.sync_all(),
        |backing| backing.punch_hole(0..4096),
        |backing| backing.allocate(0..4096),
        |backing| backing.grow(8192, crate::pmem::Allocation::Sparse),
    ];
    for (number, call) in calls.iter().enumerate() {
        for fault in [Fault::Io, Fault::NoSpace] {
            let (backing, handle) = Backing::from_media(vec![5; 4096], SimOptions::new(Granularity::Page));
            handle.fail_call(0, fault);
            let failed = call(&backing);
            assert!(failed.is_err(), "call {number}, {fault:?}");
            assert_eq!(handle.calls(), 1);
            let bytes = visible_bytes(&backing);
            assert_eq!(bytes.len(), 4096);
            let stored = bytes.iter().filter(|&&byte| byte != 5).count();
            assert_eq!(stored, if number == 0 && fault == Fault::Io { 32 } else { 0 }, "half of what was stored");
            assert_eq!(matches!(failed, Err(MediaError::Flush(_))), number == 1 || number == 2);
            assert_eq!(call(&backing).is_ok(), number != 1 && number != 2, "a failed flush poisons");
        }
    }
}

#[test]
fn a_sync_at_cache_line_granularity_makes_a_system_call_when_blocks_have_changed() {
    let (backing, handle) = Backing::from_media(vec![5; 8192], SimOptions::new(Granularity::CacheLine));
    backing.sync_all().unwrap();
    let before = handle.calls();
    backing.sync_all().unwrap();
    assert_eq!(handle.calls(), before, "nothing is owed: it is a fence");
    backing.punch_hole(0..4096).unwrap();
    assert_eq!(outcomes(&handle, &[0]), set([&[0], &[5]]));
    backing.sync_all().unwrap();
    assert_eq!(outcomes(&handle, &[0]), set([&[0]]));
}

#[test]
fn two_backings_lose_their_stores_at_once_and_are_synced_apart() {
    for granularity in BOTH {
        let (first, handle) = Backing::simulated(4096, SimOptions::new(granularity));
        let second = handle.beside(&[0; 8192], SimOptions::new(Granularity::Page));
        put(&first, 64, &[1]);
        put(&second, 64, &[2]);
        let seen = |handle: &SimHandle| {
            let mut seen = BTreeSet::new();
            let end = handle.position();
            let explored = handle.trace().explore(&Bounds::default(), None, |image| {
                assert_eq!((image.media.len(), image.others[0].len()), (4096, 8192));
                if image.position == end {
                    seen.insert(vec![image.media[64], image.others[0][64]]);
                }
                Ok::<_, ()>(())
            });
            explored.unwrap();
            seen
        };
        assert_eq!(seen(&handle), set([&[0, 0], &[0, 2], &[1, 0], &[1, 2]]));
        first.persist(64..65).unwrap();
        assert_eq!(seen(&handle), set([&[1, 0], &[1, 2]]), "{granularity:?}");
        let (backings, next) = handle.trace().restart(handle.position(), PageCache::Kept);
        backings[1].sync_all().unwrap();
        assert_eq!(seen(&next), set([&[1, 2]]));
    }
}

/// A header of two copies, each with a sequence number, a payload and a checksum, written alternately.
mod two_copies {
    use super::*;

    const COPY_BYTES: usize = 192;
    const AT: [u64; 2] = [0, PAGE];

    fn encode(sequence: u64) -> [u8; COPY_BYTES] {
        let mut copy = [0; COPY_BYTES];
        copy[..8].copy_from_slice(&sequence.to_le_bytes());
        for (index, byte) in copy[8..COPY_BYTES - 4].iter_mut().enumerate() {
            *byte = sequence.wrapping_mul(31).to_le_bytes()[0] ^ index.to_le_bytes()[0];
        }
        let crc = crc32fast::hash(&copy[..COPY_BYTES - 4]);
        copy[COPY_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        copy
    }

    fn update(backing: &Backing, sequence: u64) -> Result<(), MediaError> {
        let at = AT[usize::try_from(sequence % 2).unwrap()];
        let range = at..at + COPY_BYTES as u64;
        backing.write(range.clone(), |mut target| target.copy_from(&encode(sequence)))?;
        backing.persist(range)
    }

    /// The newest sequence number whose copy is whole.
    fn newest(media: &[u8]) -> Option<u64> {
        let whole = AT.iter().filter_map(|&at| {
            let copy = &media[usize::try_from(at).unwrap()..][..COPY_BYTES];
            let sequence = u64::from_le_bytes(copy[..8].try_into().unwrap());
            (copy == encode(sequence)).then_some(sequence)
        });
        whole.max()
    }

    /// Runs updates and returns the trace with what was acknowledged at which position.
    fn run(
        options: SimOptions,
        update: impl Fn(&Backing, u64) -> Result<(), MediaError>,
    ) -> (Trace, Vec<(usize, u64)>) {
        let mut media = vec![0; 8192];
        for (sequence, at) in [(2, 0), (1, 4096)] {
            media[at..at + COPY_BYTES].copy_from_slice(&encode(sequence));
        }
        let (backing, handle) = Backing::from_media(media, options);
        let mut acknowledged = vec![(0, 2)];
        for sequence in 3..7 {
            update(&backing, sequence).unwrap();
            acknowledged.push((handle.position(), sequence));
        }
        (handle.trace(), acknowledged)
    }

    /// Whether the newest header is the last acknowledged one, or the one that was on its way.
    fn check(acknowledged: &[(usize, u64)], image: CrashImage<'_>) -> Result<(), String> {
        let (_, last) = acknowledged.iter().rfind(|(position, _)| *position <= image.position).unwrap();
        match newest(image.media) {
            Some(found) if found == *last || found == last + 1 => Ok(()),
            found => Err(format!("found {found:?}, acknowledged {last}")),
        }
    }

    #[test]
    fn the_right_protocol_survives_every_power_cut_at_any_torn_unit() {
        for options in [
            SimOptions::new(Granularity::CacheLine).torn_bytes(8),
            SimOptions::new(Granularity::CacheLine),
            SimOptions::new(Granularity::CacheLine).torn_bytes(64),
            SimOptions::new(Granularity::Page),
            SimOptions::new(Granularity::Page).torn_bytes(16),
        ] {
            let (trace, acknowledged) = run(options, update);
            let explored = trace.explore(&Bounds::default(), None, |image| check(&acknowledged, image)).unwrap();
            assert_eq!(explored.crash_points, 9);
            assert!(
                explored.unique_media >= 5, // the five headers, whole
                "{options:?}: {explored:?}"
            );
        }
    }

    #[test]
    fn every_dropped_flush_or_fence_is_caught() {
        for granularity in BOTH {
            let (trace, acknowledged) = run(SimOptions::new(granularity), update);
            let barriers = trace.barriers();
            assert_eq!(barriers.len(), 8);
            let effective: Vec<_> = barriers.iter().filter(|barrier| barrier.effective).collect();
            assert_eq!(effective.len(), if granularity == Granularity::CacheLine { 8 } else { 4 });
            for barrier in effective {
                let explored =
                    trace.explore(&Bounds::default(), Some(barrier.number), |image| check(&acknowledged, image));
                assert!(explored.is_err(), "{granularity:?}: {barrier:?} was not missed");
            }
        }
    }

    #[test]
    fn a_protocol_that_overwrites_both_copies_before_a_fence_is_caught() {
        let careless = |backing: &Backing, sequence: u64| {
            for at in AT {
                put(backing, at, &encode(sequence));
            }
            backing.sync_all()?;
            backing.persist(0..8192)
        };
        for granularity in BOTH {
            // At 512 bytes a copy lies in one sector and is never torn, so that this protocol would be right.
            let (trace, acknowledged) = run(SimOptions::new(granularity).torn_bytes(16), careless);
            let failure = trace.explore(&Bounds::default(), None, |image| check(&acknowledged, image)).unwrap_err();
            assert!(matches!(newest(&failure.media), None | Some(1)), "a lost or an old header: {failure}");
            assert_eq!(failure.media.len(), 8192);
        }
    }

    #[test]
    fn a_pair_of_words_is_torn_at_8_bytes_and_not_at_16() {
        for (torn_bytes, is_torn) in [(8, true), (16, false)] {
            let options = SimOptions::new(Granularity::CacheLine).torn_bytes(torn_bytes);
            let (backing, handle) = Backing::simulated(64, options);
            for value in 1..5 {
                put(&backing, 16, &[value; 16]);
                backing.persist(16..32).unwrap();
            }
            let explored = handle.trace().explore(&Bounds::default(), None, |image| {
                if image.media[16..24] == image.media[24..32] { Ok(()) } else { Err("torn") }
            });
            assert_eq!(explored.is_err(), is_torn, "torn unit {torn_bytes}: {explored:?}");
        }
    }

    /// What is asked of an operation is asked of these updates: is a process that goes on after a dead one careful enough
    /// to store again what it trusts?
    struct Updates {
        granularity: Granularity,
        careful: bool,
    }

    impl Story for Updates {
        type Note = u64;
        type Seen = u64;

        fn options(&self) -> SimOptions {
            SimOptions::new(self.granularity).torn_bytes(16)
        }

        fn beginning(&self) -> Vec<Vec<u8>> {
            let mut media = vec![0; 8192];
            for (sequence, at) in [(2, 0), (1, 4096)] {
                media[at..at + COPY_BYTES].copy_from_slice(&encode(sequence));
            }
            vec![media]
        }

        fn run(&self, backings: &[Arc<Backing>], told: &Told<u64>) -> Result<(), String> {
            for sequence in 3..7 {
                update(&backings[0], sequence).map_err(|error| error.to_string())?;
                told.tell(sequence);
            }
            Ok(())
        }

        fn check(&self, _: &[Arc<Backing>], image: CrashImage<'_>, told: &[u64]) -> Result<(), String> {
            let (found, last) = (newest(image.media), told.last().copied().unwrap_or(2));
            if found >= Some(last) { Ok(()) } else { Err(format!("found {found:?}, acknowledged {last}")) }
        }

        fn finish(&self, backings: &[Arc<Backing>]) -> Result<u64, String> {
            let found = newest(&visible_bytes(&backings[0])).ok_or("nothing")?;
            let first = if self.careful { found } else { found + 1 };
            for sequence in first..=found + 1 {
                update(&backings[0], sequence).map_err(|error| error.to_string())?;
            }
            Ok(found + 1)
        }

        fn ended(&self, image: CrashImage<'_>, seen: Option<&u64>) -> Result<(), String> {
            let found = newest(image.media);
            if seen.is_none() || found.as_ref() == seen { Ok(()) } else { Err(format!("{found:?}, not {seen:?}")) }
        }
    }

    #[test]
    fn a_process_that_trusts_what_it_sees_is_caught_and_one_that_stores_it_again_is_not() {
        for granularity in BOTH {
            let effort = Effort { kills: 100, faults: 100, seconds_every: 3, ..Effort::new(8) };
            let proof = prove(&Updates { granularity, careful: true }, &effort).unwrap();
            assert!(proof.kills >= 8 && proof.faults >= 4 && proof.seconds > 20, "{proof}");
            assert!(proof.kill_states > proof.kills && proof.fault_states > proof.faults, "{proof}");
            assert!(proof.mutants.all >= 4 && proof.mutants.survivors.is_empty(), "{proof}");

            let careless = Updates { granularity, careful: false };
            let error = prove(&careless, &Effort { faults: 0, ..effort }).unwrap_err();
            assert!(error.contains("killed at event") && error.contains("acknowledged"), "{error}");
            let error = prove(&careless, &Effort { kills: 0, ..effort }).err();
            let is_caught = error.is_some_and(|error| error.contains("fails (") && error.contains("another process"));
            assert_eq!(is_caught, granularity == Granularity::Page, "a flush of lines does not fail");
        }
    }
}

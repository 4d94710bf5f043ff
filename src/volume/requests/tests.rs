//! What others may do while a long request is in the middle: buffers with a page that does not come until the test lets it.

#![allow(clippy::cast_possible_truncation)]

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use memmap2::MmapMut;

use super::*;
use crate::uffd::{Faults, Features, Install, Uffd};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// Memory with one page that is absent: whoever touches it waits for [`Gate::open`].
struct Gate {
    memory: MmapMut,
    page: Range<u64>,
    faults: Uffd,
}

impl Gate {
    fn new(len: usize, at: usize) -> Self {
        let memory = MmapMut::map_anon(len).unwrap();
        let start = (memory.as_ptr().addr() + at) as u64;
        let page = start..start + PAGE as u64;
        let faults = Uffd::open(Features::of_kernel(None).unwrap().trapping(), Faults::All).unwrap();
        faults.register_absent(&page).unwrap();
        Self { memory, page, faults }
    }
}

/// Waits until somebody touches the page, and then until `meanwhile` has ended; lets the page come in any case.
fn while_it_waits(faults: &Uffd, page: &Range<u64>, meanwhile: impl FnOnce() + Send) {
    while faults.next_fault().unwrap().is_none() {
        thread::yield_now();
    }
    thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        scope.spawn(move || {
            meanwhile();
            done.send(()).unwrap();
        });
        let ended = is_done.recv_timeout(Duration::from_secs(60));
        let how = Install { protect_new: false, protect_present: false, wake: true };
        faults.map_absent(page, Source::from_slice(&[0; PAGE]), how).1.unwrap();
        ended.expect("somebody waits for the whole request");
    });
}

#[test]
fn a_long_read_holds_a_piece_at_a_time() {
    let volume = Volume::ephemeral(4 * MIB as u64).unwrap();
    volume.write_zeroes(0, volume.size()).unwrap();
    let Gate { mut memory, page, faults } = Gate::new(4 * MIB, 2 * MIB + 5 * PAGE);
    thread::scope(|scope| {
        scope.spawn(|| volume.read_at(&mut memory, 0).unwrap());
        while_it_waits(&faults, &page, || {
            volume.write_at(&[7; 9], 1).unwrap(); // partial blocks: exclusive
            volume.write_at(&[7; 9], 3 * MIB as u64 + 1).unwrap();
        });
    });
    assert_eq!(memory[1], 0);
    assert_eq!(memory[3 * MIB + 1], 7, "the piece came after the write");
}

#[test]
fn an_unaligned_write_holds_only_its_ends_alone() {
    let volume = Volume::ephemeral(4 * MIB as u64).unwrap();
    volume.write_zeroes(0, volume.size()).unwrap();
    let Gate { memory, page, faults } = Gate::new(2 * MIB, MIB / 2);
    thread::scope(|scope| {
        scope.spawn(|| volume.write_at(&memory, 1).unwrap());
        while_it_waits(&faults, &page, || {
            let mut bytes = [0; 100];
            for at in [0, 16, MIB / 2, MIB - 50, 2 * MIB - 50] {
                volume.read_at(&mut bytes, at as u64).unwrap();
            }
            volume.write_at(&bytes, MIB as u64 + 7).unwrap();
        });
    });
    let mut byte = [9; 2];
    volume.read_at(&mut byte, 2 * MIB as u64).unwrap();
    assert_eq!(byte, [0; 2]);
}

#[test]
fn ranges_are_cut_at_multiples_and_complete() {
    let pieces: Vec<_> = cut(5..25, 10).collect();
    assert_eq!(pieces, [5..10, 10..20, 20..25]);
    assert_eq!(cut(7..7, 10).count(), 0);
    assert_eq!(cut(u64::MAX - 5..u64::MAX, 10).map(|piece| piece.end - piece.start).sum::<u64>(), 5);
}

#[test]
fn every_cut_of_reads_and_writes_moves_the_same_bytes() {
    let volume = Volume::ephemeral(3 * MIB as u64).unwrap();
    let mut expected = vec![0; 3 * MIB];
    volume.write_at(&expected, 0).unwrap();
    for (index, (start, end)) in
        [(0, 3 * MIB), (1, 2 * MIB + 9), (MIB - 1, MIB + 1), (15, 4111), (16, 4112), (MIB + 3, MIB + 7)]
            .into_iter()
            .enumerate()
    {
        let data: Vec<u8> = (start..end).map(|at| (at * 7 + at / 251 + index) as u8).collect();
        volume.write_at(&data, start as u64).unwrap();
        expected[start..end].copy_from_slice(&data);
        let mut found = vec![0; 3 * MIB];
        volume.read_at(&mut found, 0).unwrap();
        assert!(found == expected, "{start}..{end}");
        volume.write_zeroes(start as u64 + 5, (end - start) as u64 / 2).unwrap();
        expected[start + 5..start + 5 + (end - start) / 2].fill(0);
        volume.read_at(&mut found[7..], 7).unwrap();
        assert!(found[7..] == expected[7..], "zeroes in {start}..{end}");
    }
}

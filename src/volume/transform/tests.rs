//! Re-keying a volume that lives: content, both sides of the boundary, slots, and what is left on media.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::memory::Source;
use crate::namespace::{self, Cipher, DataUnit, FormatOptions, KdfCost, LockedNamespace, OtherSlots, UnlockError};
use crate::pmem::sim::SimOptions;
use crate::pmem::{Access, Backing, Granularity};
use crate::secret::SecretBytes;
use crate::xts::Backend;

const DATA: u64 = 2 << 20;
const SIZE: u64 = 100 << 10;
const WINDOW: u64 = 12 << 10;

fn key_file(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

/// Noise that can be made again.
fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33).to_le_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

fn backing() -> Arc<Backing> {
    let len = usize::try_from(3 * DATA + SIZE).unwrap();
    Arc::new(Backing::simulated(len, SimOptions::new(Granularity::Page)).0)
}

fn formatted(options: FormatOptions) -> (Arc<Backing>, Namespace) {
    let backing = backing();
    let options = FormatOptions { size_bytes: Some(SIZE), ..options };
    let mut namespace = namespace::format(Arc::clone(&backing), options, &key_file(1)).unwrap();
    namespace.add_slot(None, "other", &key_file(2), KdfCost::LEAST).unwrap();
    (backing, namespace)
}

fn open(backing: &Arc<Backing>, key: u8) -> Result<Namespace, UnlockError> {
    LockedNamespace::open(Arc::clone(backing)).unwrap().unlock_key(&key_file(key))
}

fn volume(namespace: Namespace) -> Volume {
    Volume::new(namespace, Backend::detect())
}

fn content(volume: &Volume) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut all, 0).unwrap();
    all
}

fn bytes_at(backing: &Backing, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
    backing.read(range, |source: Source<'_>| source.copy_to(&mut bytes)).unwrap();
    bytes
}

fn run_to_the_end(volume: &Volume) -> usize {
    let mut steps = 0;
    while volume.transform_step(WINDOW).unwrap().is_some() {
        steps += 1;
    }
    steps
}

#[test]
fn content_stays_and_every_byte_of_ciphertext_changes() {
    let (backing, namespace) = formatted(FormatOptions::default());
    let volume = volume(namespace);
    let before = noise(1, SIZE);
    volume.write_at(&before, 0).unwrap();
    let old_ciphertext = bytes_at(&backing, DATA..DATA + SIZE);

    volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    assert_eq!(volume.transform(), Some(TransformProgress { done_bytes: 0, total_bytes: SIZE }));
    assert_eq!(run_to_the_end(&volume), 9, "windows of 12 KiB in 100 KiB");
    assert_eq!(volume.transform(), None);
    assert_eq!(content(&volume), before);
    drop(volume);

    let ciphertext = bytes_at(&backing, DATA..DATA + SIZE);
    let same = old_ciphertext.chunks(16).zip(ciphertext.chunks(16)).filter(|(old, new)| old == new).count();
    assert_eq!(same, 0, "blocks still under the old key");
    assert!(bytes_at(&backing, DATA / 2..DATA).iter().all(|&byte| byte == 0), "the journal is wiped");
    let namespace = open(&backing, 1).unwrap();
    assert!(!namespace.header().rekeying);
    assert_eq!(content(&Volume::new(namespace, Backend::detect())), before);
}

#[test]
fn cipher_and_unit_can_change_on_the_way() {
    let (c128, c256) = (Cipher::Aes128Xts, Cipher::Aes256Xts);
    let (u512, u4096) = (DataUnit::Bytes512, DataUnit::Bytes4096);
    for (cipher, unit, new_cipher, new_unit) in
        [(c256, u4096, c128, u512), (c128, u512, c256, u4096), (c128, u512, c128, u4096), (c256, u512, c128, u512)]
    {
        let (backing, namespace) = formatted(FormatOptions { cipher, unit, ..FormatOptions::default() });
        let volume = volume(namespace);
        let before = noise(2, SIZE);
        volume.write_at(&before, 0).unwrap();
        let options = RekeyOptions { cipher: Some(new_cipher), unit: Some(new_unit), ..RekeyOptions::default() };
        volume.begin_rekey(&key_file(1), &options).unwrap();
        volume.transform_step(WINDOW).unwrap();
        assert_eq!(content(&volume), before);
        run_to_the_end(&volume);
        drop(volume);
        let namespace = open(&backing, 1).unwrap();
        assert_eq!((namespace.cipher(), namespace.geometry().unit()), (new_cipher, new_unit));
        assert_eq!(content(&Volume::new(namespace, Backend::detect())), before);
    }
}

#[test]
fn a_size_that_the_new_unit_does_not_divide_is_refused_and_nothing_changes() {
    let (backing, namespace) = formatted(FormatOptions { unit: DataUnit::Bytes512, ..FormatOptions::default() });
    drop(namespace);
    let mut namespace = open(&backing, 1).unwrap();
    namespace.resize(SIZE - 512, true).unwrap();
    let options = RekeyOptions { unit: Some(DataUnit::Bytes4096), ..RekeyOptions::default() };
    let refused = namespace.begin_rekey(&key_file(1), &options).unwrap_err();
    assert!(matches!(refused, TransformError::Geometry(_)), "{refused}");
    assert!(!open(&backing, 1).unwrap().header().rekeying);
}

#[test]
fn data_moves_within_the_namespace_in_both_directions_overlapping_or_not() {
    for (from, to) in [(2, 4), (4, 2), (2, 6), (6, 2)] {
        for size_bytes in [SIZE, (3 << 20) - (96 << 10) - 512] {
            let len = usize::try_from((from.max(to) << 20) + size_bytes).unwrap();
            let backing = Arc::new(Backing::simulated(len, SimOptions::new(Granularity::Page)).0);
            let unit = DataUnit::Bytes512;
            let format = FormatOptions { size_bytes: Some(size_bytes), unit, ..FormatOptions::default() };
            let mut namespace = namespace::format(Arc::clone(&backing), format, &key_file(1)).unwrap();
            if from != 2 {
                namespace.begin_move(from << 20, &key_file(1), &RekeyOptions::default()).unwrap();
                run_to_the_end(&volume(namespace));
                namespace = open(&backing, 1).unwrap();
            }
            let before = noise(3, size_bytes);
            volume(namespace).write_at(&before, 0).unwrap();
            let mut namespace = open(&backing, 1).unwrap();
            namespace.begin_move(to << 20, &key_file(1), &RekeyOptions::default()).unwrap();
            let moving = volume(namespace);
            for _ in 0..3 {
                moving.transform_step(256 << 10).unwrap();
                assert!(content(&moving) == before, "{from} to {to} MiB, {size_bytes} bytes, on the way");
            }
            while moving.transform_step(WINDOW_BYTES).unwrap().is_some() {}
            assert!(content(&moving) == before, "{from} to {to} MiB, {size_bytes} bytes");
            drop(moving);
            let namespace = open(&backing, 1).unwrap();
            assert_eq!(namespace.geometry().data_start(), to << 20);
            assert!(content(&volume(namespace)) == before);
        }
    }
}

#[test]
fn after_every_step_it_opens_with_its_key_and_goes_on() {
    let (backing, namespace) = formatted(FormatOptions::default());
    let mut expected = noise(4, SIZE);
    let first = volume(namespace);
    first.write_at(&expected, 0).unwrap();
    first.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    drop(first);
    for round in 0.. {
        let namespace = open(&backing, 1).unwrap();
        let is_under_way = namespace.header().rekeying;
        let volume = volume(namespace);
        assert_eq!(content(&volume), expected, "round {round}");
        assert_eq!(is_under_way, volume.transform().is_some());
        if !is_under_way {
            break;
        }
        // Across the boundary, wherever that is, and not aligned to anything.
        let offset = (round * WINDOW).saturating_sub(777).min(SIZE - 1);
        let data = noise(100 + round, 2000.min(SIZE - offset));
        volume.write_at(&data, offset).unwrap();
        let start = usize::try_from(offset).unwrap();
        expected[start..start + data.len()].copy_from_slice(&data);
        volume.transform_step(WINDOW).unwrap();
    }
    assert_eq!(content(&volume(open(&backing, 1).unwrap())), expected);
}

#[test]
fn who_only_reads_finds_the_window_that_was_being_moved_in_the_journal() {
    for allow_discards in [false, true] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(DATA + SIZE).unwrap();
        let open = |access| open(&Arc::new(Backing::open(file.path(), access).unwrap()), 1).unwrap();
        let options = FormatOptions { size_bytes: Some(SIZE), allow_discards, ..FormatOptions::default() };
        let backing = Arc::new(Backing::open(file.path(), Access::ReadWrite).unwrap());
        let moving = volume(namespace::format(backing, options, &key_file(1)).unwrap());
        let before = noise(4, SIZE);
        moving.write_at(&before, 0).unwrap();
        moving.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
        moving.transform_step(WINDOW).unwrap();
        // As far as a window comes before the power fails: saved and recorded, and half written over.
        let mut namespace = moving.into_namespace().unwrap();
        let window = DATA + WINDOW..DATA + 2 * WINDOW;
        let saved = bytes_at(namespace.backing(), window.clone());
        namespace.backing().write(window.start..window.start + 5000, |mut target| target.fill(0xee)).unwrap();
        let pending = namespace.pending_transform_mut().unwrap();
        pending.journal().save(&saved).unwrap();
        pending.advance(&saved).unwrap();
        drop(namespace);

        let reader = volume(open(Access::ReadOnly));
        assert!(content(&reader) == before);
        for (start, end) in [(WINDOW - 9, WINDOW + 9), (WINDOW + 100, 2 * WINDOW + 7), (WINDOW, WINDOW + 1)] {
            let mut found = vec![0; usize::try_from(end - start).unwrap()];
            reader.read_at(&mut found, start).unwrap();
            assert!(found == before[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()], "{start}..{end}");
        }
        let runs = reader.extents(0, SIZE, 100).unwrap();
        assert_eq!(runs.iter().map(|run| run.len_bytes).sum::<u64>(), SIZE);
        assert!(runs.iter().all(|run| !run.hole));
        drop(reader);
        let writer = volume(open(Access::ReadWrite));
        run_to_the_end(&writer);
        assert!(content(&writer) == before);
    }
}

#[test]
fn other_slots_are_dropped_or_kept_as_asked() {
    for (other_slots, opens) in [(OtherSlots::Drop, false), (OtherSlots::Keep, true)] {
        let (backing, namespace) = formatted(FormatOptions::default());
        let volume = volume(namespace);
        volume.begin_rekey(&key_file(1), &RekeyOptions { other_slots, ..RekeyOptions::default() }).unwrap();
        for _ in 0..2 {
            assert!(open(&backing, 1).is_ok());
            assert_eq!(open(&backing, 2).is_ok(), opens, "{other_slots:?}");
            run_to_the_end(&volume);
        }
    }
}

#[test]
fn one_old_header_copy_put_back_changes_nothing() {
    let (backing, namespace) = formatted(FormatOptions::default());
    let volume = volume(namespace);
    let before = noise(5, SIZE);
    volume.write_at(&before, 0).unwrap();
    let old = [0, 256 << 10].map(|start| (start, bytes_at(&backing, start..start + (64 << 10))));
    volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    volume.transform_step(WINDOW).unwrap();
    drop(volume);
    for (start, image) in &old {
        let range = *start..*start + (64 << 10);
        let new = bytes_at(&backing, range.clone());
        backing.write(range.clone(), |mut target| target.copy_from(image)).unwrap();
        assert!(open(&backing, 2).is_err(), "the old slot is back");
        assert_eq!(content(&Volume::new(open(&backing, 1).unwrap(), Backend::detect())), before);
        backing.write(range, |mut target| target.copy_from(&new)).unwrap();
    }
}

#[test]
fn a_journal_that_is_not_genuine_is_not_acted_on() {
    let (backing, namespace) = formatted(FormatOptions::default());
    let volume = volume(namespace);
    volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    volume.transform_step(WINDOW).unwrap();
    drop(volume);
    let records = [1 << 20, (1 << 20) + 4096].map(|start| (start, bytes_at(&backing, start..start + 96)));
    let put = |start: u64, bytes: &[u8]| {
        backing.write(start..start + 96, |mut target| target.copy_from(bytes)).unwrap();
    };
    for byte in [0, 8, 24, 32, 40, 48, 64, 95] {
        for (start, record) in &records {
            let mut forged = record.clone();
            forged[byte] ^= 1;
            put(*start, &forged);
        }
        let refused = open(&backing, 1).unwrap_err();
        assert!(matches!(refused, UnlockError::Transform(TransformError::JournalLost)), "byte {byte}: {refused}");
    }
    // A record in the place of the other one is of the wrong step.
    put(records[0].0, &records[1].1);
    put(records[1].0, &records[0].1);
    assert!(open(&backing, 1).is_err());
    for (start, record) in &records {
        put(*start, record);
    }
    assert!(open(&backing, 1).is_ok());
}

#[test]
fn a_second_rekey_and_a_resize_wait_for_the_first() {
    let (backing, namespace) = formatted(FormatOptions::default());
    let volume = volume(namespace);
    volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    let refused = volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap_err();
    assert!(matches!(refused, TransformError::UnderWay), "{refused}");
    drop(volume);
    let mut namespace = open(&backing, 1).unwrap();
    assert!(matches!(namespace.resize(SIZE + 4096, false), Err(UpdateError::Transforming)));
}

#[test]
fn holes_stay_holes() {
    let (backing, namespace) = formatted(FormatOptions { allow_discards: true, ..FormatOptions::default() });
    let volume = volume(namespace);
    let mut expected = noise(6, SIZE);
    volume.write_at(&expected, 0).unwrap();
    volume.discard(8192, 40960).unwrap();
    expected[8192..49152].fill(0);
    volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    volume.transform_step(WINDOW).unwrap();
    assert_eq!(content(&volume), expected);
    run_to_the_end(&volume);
    assert_eq!(content(&volume), expected);
    assert!(bytes_at(&backing, DATA + 8192..DATA + 49152).iter().all(|&byte| byte == 0), "still a hole on media");
}

/// Readers and writers of every size run while windows move; each writer has a range of its own and knows what it wrote.
#[test]
fn reads_and_writes_are_right_while_windows_move() {
    let (backing, namespace) = formatted(FormatOptions::default());
    let volume = volume(namespace);
    volume.write_at(&noise(7, SIZE), 0).unwrap();
    let (stop, checks) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (volume, stop, checks) = (&volume, &stop, &checks);
            scope.spawn(move || {
                let (start, len) = (thread * (SIZE / 4), SIZE / 4);
                let mut own = vec![0; usize::try_from(len).unwrap()];
                volume.read_at(&mut own, start).unwrap();
                let mut found = own.clone();
                for round in 0.. {
                    let at = (round * 3_701 + thread * 13) % (len - 5000);
                    let data = noise(round * 4 + thread, 1 + round * 61 % 5000);
                    let place = usize::try_from(at).unwrap();
                    volume.write_at(&data, start + at).unwrap();
                    own[place..place + data.len()].copy_from_slice(&data);
                    volume.read_at(&mut found, start).unwrap();
                    assert!(found == own, "thread {thread}, round {round}");
                    checks.fetch_add(1, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        for _ in 0..3 {
            volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
            while volume.transform_step(4096).unwrap().is_some() {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(checks.into_inner() > 20);
    let expected = content(&volume);
    drop(volume);
    assert_eq!(content(&Volume::new(open(&backing, 1).unwrap(), Backend::detect())), expected);
}

/// Bytes of blocks that a file has.
fn held_bytes(file: &tempfile::NamedTempFile) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.as_file().sync_all().unwrap();
    file.as_file().metadata().unwrap().blocks() * 512
}

#[test]
fn a_sparse_file_stays_sparse() {
    const LEN: u64 = 64 << 20;
    for allow_discards in [false, true] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(LEN).unwrap();
        let backing = Arc::new(Backing::open(file.path(), Access::ReadWrite).unwrap());
        let options = FormatOptions { allow_discards, ..FormatOptions::default() };
        let namespace = namespace::format(Arc::clone(&backing), options, &key_file(1)).unwrap();
        let volume = volume(namespace);
        // A step of 1 MiB has blocks wherever something was written; with discards holes between pages come back.
        let written = [(0, noise(3, 64 << 10)), (10 << 20, noise(4, 4096)), (40 << 20, noise(5, 100 << 10))];
        for (offset, bytes) in &written {
            volume.write_at(bytes, *offset).unwrap();
        }
        volume.discard(8192, 32 << 10).unwrap();
        volume.discard((10 << 20) + 4096, (1 << 20) - 4096).unwrap();
        volume.flush().unwrap();
        let expected = written.clone().map(|(offset, bytes)| {
            let mut found = vec![0; bytes.len()];
            volume.read_at(&mut found, offset).unwrap();
            found
        });
        let before = held_bytes(&file);
        assert!(before < 8 << 20, "{before} bytes");
        assert_eq!(volume.blocks_needed(volume.geometry().data_offset()).unwrap(), 0);
        volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
        let mut steps = 0;
        while volume.transform_step(WINDOW_BYTES).unwrap().is_some() {
            steps += 1;
        }
        assert!(steps < 20, "holes are passed over at once: {steps} steps");
        let after = held_bytes(&file);
        assert!(after <= before + (64 << 10), "discards: {allow_discards}: {before} bytes became {after}");
        for ((offset, _), expected) in written.iter().zip(&expected) {
            let mut found = vec![0; expected.len()];
            volume.read_at(&mut found, *offset).unwrap();
            assert!(found == *expected, "discards: {allow_discards}: at {offset}");
        }
    }
}

#[test]
fn a_file_with_all_its_blocks_keeps_every_byte_also_those_that_were_never_written() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0; 4 << 20]).unwrap();
    file.as_file().sync_all().unwrap();
    let backing = Arc::new(Backing::open(file.path(), Access::ReadWrite).unwrap());
    let volume = volume(namespace::format(Arc::clone(&backing), FormatOptions::default(), &key_file(1)).unwrap());
    let before = content(&volume);
    volume.begin_rekey(&key_file(1), &RekeyOptions::default()).unwrap();
    run_to_the_end(&volume);
    assert!(content(&volume) == before);
}

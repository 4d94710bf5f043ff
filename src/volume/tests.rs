//! The volume against a model, and its ciphertext against an independent XTS at the physical offsets.

use std::sync::Arc;
use std::thread;

use aes::cipher::KeyInit;
use aes::{Aes128, Aes256};
use proptest::prelude::*;
use xts_mode::Xts128;

use super::*;
use crate::memory::Source;
use crate::namespace::DataUnit::{Bytes512, Bytes4096};
use crate::namespace::{self, Cipher, Credential, FormatOptions};
use crate::pmem::Allocation;
use crate::secret::{SecretBytes, VolumeKey};

const SIZE: u64 = 64 << 10;
const DATA: u64 = 2 << 20;

struct Fixture {
    dir: tempfile::TempDir,
    cipher: Cipher,
    unit: namespace::DataUnit,
    discards: bool,
}

fn credential() -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[7; 32]))
}

impl Fixture {
    fn new(cipher: Cipher, unit: namespace::DataUnit, discards: bool) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), cipher, unit, discards }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("vault.img")
    }

    /// A fresh volume, with a copy of its key for the oracle.
    fn format(&self) -> (Volume, VolumeKey) {
        let backing = Backing::create(&self.path(), DATA + SIZE, Allocation::Full).unwrap();
        let options = FormatOptions {
            cipher: self.cipher,
            unit: self.unit,
            size_bytes: Some(SIZE),
            allow_discards: self.discards,
            ..FormatOptions::default()
        };
        let namespace = namespace::format(Arc::new(backing), options, &credential()).unwrap();
        let key = VolumeKey::new(SecretBytes::copy_of(namespace.volume_key().bytes())).unwrap();
        (Volume::new(namespace, Backend::detect()), key)
    }

    fn reopen(&self, access: Access) -> Volume {
        let backing = Backing::open(&self.path(), access).unwrap();
        LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&credential()).unwrap()
    }
}

/// What `xts-mode` makes of `plaintext` at the start of the data area: 16-byte tweak = physical offset / 512.
fn oracle(key: &VolumeKey, unit_bytes: u32, plaintext: &[u8]) -> Vec<u8> {
    let mut bytes = plaintext.to_vec();
    for (index, unit) in bytes.chunks_mut(unit_bytes as usize).enumerate() {
        let physical = DATA + index as u64 * u64::from(unit_bytes);
        let tweak = u128::from(physical / 512).to_le_bytes();
        if key.bytes().len() == 32 {
            let xts = Xts128::new(
                Aes128::new_from_slice(key.data_half()).unwrap(),
                Aes128::new_from_slice(key.tweak_half()).unwrap(),
            );
            xts.encrypt_sector(unit, tweak.into());
        } else {
            let xts = Xts128::new(
                Aes256::new_from_slice(key.data_half()).unwrap(),
                Aes256::new_from_slice(key.tweak_half()).unwrap(),
            );
            xts.encrypt_sector(unit, tweak.into());
        }
    }
    bytes
}

fn ciphertext(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    volume.backing().read(DATA..DATA + SIZE, |source: Source<'_>| source.copy_to(&mut bytes)).unwrap();
    bytes
}

fn plaintext(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    volume.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[derive(Clone, Debug)]
enum Op {
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, len: u64 },
    PunchZeroes { offset: u64, len: u64 },
    Read { offset: u64, len: usize },
    Persist { offset: u64, len: u64 },
    Flush,
    Reopen,
}

/// Offsets near block, line, unit and volume edges as well as anywhere.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..SIZE,
        (0..SIZE / 512, -17_i64..17)
            .prop_map(|(sector, shift)| { (sector * 512).saturating_add_signed(shift).min(SIZE - 1) }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let len = prop_oneof![0_u64..40, 500..530_u64, 4000..9000_u64];
    prop_oneof![
        5 => (offset(), len.clone(), any::<u8>()).prop_map(|(offset, len, seed)| {
            let len = len.min(SIZE - offset);
            let bytes = (0..len).map(|i| seed.wrapping_add((i % 251) as u8)).collect();
            Op::Write { offset, bytes }
        }),
        1 => (offset(), len.clone()).prop_map(|(offset, len)| Op::Zero { offset, len: len.min(SIZE - offset) }),
        1 => (offset(), len.clone()).prop_map(|(offset, len)| Op::PunchZeroes { offset, len: len.min(SIZE - offset) }),
        3 => (offset(), 0_usize..9000).prop_map(|(offset, len)| {
            Op::Read { offset, len: len.min(usize::try_from(SIZE - offset).unwrap()) }
        }),
        1 => (offset(), len).prop_map(|(offset, len)| Op::Persist { offset, len: len.min(SIZE - offset) }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

fn range(offset: u64, len: u64) -> Range<usize> {
    usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap()
}

/// Runs `ops` on a volume and on a model of plain bytes.
fn against_model(fixture: &Fixture, ops: &[Op]) {
    let (volume, key) = fixture.format();
    let mut volume = Some(volume);
    let mut model = plaintext(volume.as_ref().unwrap());
    for op in ops {
        let open = volume.as_ref().unwrap();
        match op {
            Op::Write { offset, bytes } => {
                open.write_at(bytes, *offset).unwrap();
                model[range(*offset, bytes.len() as u64)].copy_from_slice(bytes);
            }
            Op::Zero { offset, len } => {
                open.write_zeroes(*offset, *len).unwrap();
                model[range(*offset, *len)].fill(0);
            }
            Op::PunchZeroes { offset, len } => {
                open.punch_zeroes(*offset, *len).unwrap();
                model[range(*offset, *len)].fill(0);
            }
            Op::Read { offset, len } => {
                let mut bytes = vec![0xee; *len];
                open.read_at(&mut bytes, *offset).unwrap();
                assert_eq!(bytes, model[range(*offset, *len as u64)], "{op:?}");
            }
            Op::Persist { offset, len } => open.persist(*offset..offset + len).unwrap(),
            Op::Flush => open.flush().unwrap(),
            Op::Reopen => {
                drop(volume.take());
                volume = Some(fixture.reopen(Access::ReadWrite));
            }
        }
    }
    let open = volume.as_ref().unwrap();
    assert_eq!(plaintext(open), model);
    if !open.discards() {
        assert!(ciphertext(open) == oracle(&key, fixture.unit.bytes(), &model), "ciphertext differs from xts-mode");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_operations_agree_with_the_model_and_with_xts_mode(
        aes_256: bool,
        small_units: bool,
        discards: bool,
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let cipher = if aes_256 { Cipher::Aes256Xts } else { Cipher::Aes128Xts };
        let fixture = Fixture::new(cipher, if small_units { Bytes512 } else { Bytes4096 }, discards);
        against_model(&fixture, &ops);
    }
}

#[test]
fn writers_of_neighbouring_bytes_in_one_block_do_not_disturb_each_other() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, false);
    let (volume, _) = fixture.format();
    thread::scope(|scope| {
        for thread in 0..4_u8 {
            let volume = &volume;
            scope.spawn(move || {
                // Each thread owns bytes 4n..4n+4 of every block and, as a whole-block writer, block 100 + n.
                for round in 0..400_u32 {
                    for block in 0..3_u64 {
                        volume.write_at(&round.to_le_bytes(), block * 16 + u64::from(thread) * 4).unwrap();
                    }
                    volume.write_at(&[thread; 16], (100 + u64::from(thread)) * 16).unwrap();
                }
            });
        }
    });
    let bytes = plaintext(&volume);
    for word in bytes[..48].chunks(4) {
        assert_eq!(word, 399_u32.to_le_bytes());
    }
    for thread in 0..4_u8 {
        let start = (100 + usize::from(thread)) * 16;
        assert_eq!(bytes[start..start + 16], [thread; 16]);
    }
}

#[test]
fn ranges_past_the_end_are_refused_without_overflow() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, false);
    let (volume, _) = fixture.format();
    for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 8)] {
        let mut bytes = vec![0; len];
        let refused = |result: Result<(), VolumeError>| match result {
            Err(VolumeError::OutOfRange { offset: at, len_bytes, size_bytes }) => {
                assert_eq!((at, len_bytes, size_bytes), (offset, len as u64, SIZE));
            }
            other => panic!("{offset} + {len}: {other:?}"),
        };
        refused(volume.read_at(&mut bytes, offset));
        refused(volume.write_at(&bytes, offset));
        refused(volume.write_zeroes(offset, len as u64));
        refused(volume.discard(offset, len as u64));
    }
    volume.read_at(&mut [], SIZE).unwrap();
    volume.write_at(&[], SIZE).unwrap();
}

#[test]
fn a_read_only_volume_refuses_every_write() {
    let fixture = Fixture::new(Cipher::Aes128Xts, Bytes512, true);
    drop(fixture.format());
    let volume = fixture.reopen(Access::ReadOnly);
    assert!(volume.read_only());
    for result in
        [volume.write_at(&[1], 0), volume.write_zeroes(0, 1), volume.discard(0, 4096), volume.punch_zeroes(0, 9)]
    {
        assert!(matches!(result, Err(VolumeError::ReadOnly)), "{result:?}");
    }
    volume.flush().unwrap();
}

#[test]
fn a_backing_that_shrinks_gives_errors_and_the_rest_goes_on() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, false);
    let (volume, _) = fixture.format();
    volume.write_at(&[1; 8192], 0).unwrap();
    volume.flush().unwrap();
    std::fs::OpenOptions::new().write(true).open(fixture.path()).unwrap().set_len(DATA + 4096).unwrap();
    let mut bytes = [0xee; 4096];
    assert!(matches!(volume.read_at(&mut bytes, 4096), Err(VolumeError::Media(_))));
    assert_eq!(bytes, [0; 4096], "nothing of a failed read is passed on");
    assert!(volume.write_at(&[2; 64], 8192).is_err());
    volume.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 4096]);
}

#[test]
fn discards_punch_whole_units_and_read_as_zeroes() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, true);
    let (volume, _) = fixture.format();
    volume.write_at(&vec![0x77; usize::try_from(SIZE).unwrap()], 0).unwrap();
    volume.discard(4096 - 100, 8192 + 200).unwrap();
    let bytes = plaintext(&volume);
    assert!(bytes[..4096].iter().all(|&byte| byte == 0x77), "a part of a unit is kept");
    assert!(bytes[4096..12_288].iter().all(|&byte| byte == 0));
    assert!(bytes[12_288..].iter().all(|&byte| byte == 0x77));
    let extents = volume.extents(0, 16_384, 10).unwrap();
    let found: Vec<_> = extents.iter().map(|extent| (extent.len_bytes, extent.hole)).collect();
    assert_eq!(found, [(4096, false), (8192, true), (4096, false)]);
    // A write of a part fills in the block around it, and the rest of the hole stays zero.
    volume.write_at(&[5; 3], 5000).unwrap();
    let bytes = plaintext(&volume);
    assert_eq!(bytes[5000..5003], [5; 3]);
    assert!(bytes[4096..5000].iter().chain(&bytes[5003..12_288]).all(|&byte| byte == 0));
}

#[test]
fn without_discards_nothing_is_punched() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, false);
    let (volume, _) = fixture.format();
    volume.write_at(&[0x77; 8192], 0).unwrap();
    volume.discard(0, 8192).unwrap();
    assert!(plaintext(&volume)[..8192].iter().all(|&byte| byte == 0x77));
    assert_eq!(volume.extents(0, SIZE, 1).unwrap(), [VolumeExtent { len_bytes: SIZE, hole: false }]);
}

/// A reader beside writers must see old or new bytes of every block, and zeroes of a hole; never noise.
#[test]
fn holes_that_are_written_while_they_are_read_never_read_as_noise() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, true);
    let (volume, _) = fixture.format();
    volume.punch_zeroes(0, SIZE).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                volume.punch_zeroes(0, SIZE).unwrap();
                for block in 0..64 {
                    volume.write_at(&[0xaa; 16], block * 1024).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let bytes = plaintext(&volume);
            assert!(bytes.iter().all(|&byte| byte == 0 || byte == 0xaa), "noise");
        }
    });
}

#[test]
fn the_mark_of_a_volume_in_use_is_not_for_read_only_and_locked_ones() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, false);
    fixture.format().0.mark_in_use().unwrap();
    let volume = fixture.reopen(Access::ReadOnly);
    assert!(volume.header().unclean);
    assert!(matches!(volume.mark_closed(), Err(VolumeError::ReadOnly)));
    drop(volume);
    fixture.reopen(Access::ReadWrite).mark_closed().unwrap();
    let volume = fixture.reopen(Access::ReadWrite);
    assert!(!volume.header().unclean);
    volume.lock().unwrap();
    assert!(matches!(volume.mark_in_use(), Err(VolumeError::Locked)));
    assert!(matches!(volume.resize(SIZE, true), Err(VolumeError::Locked)));
}

#[test]
fn a_volume_changes_its_size_while_it_is_used_and_nothing_is_written_behind_the_end() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes512, false);
    let volume = Arc::new(fixture.format().0);
    let bytes: Vec<u8> = (0..SIZE).map(|offset| (offset % 251) as u8).collect();
    volume.write_at(&bytes, 0).unwrap();
    assert!(matches!(volume.resize(2 * SIZE, false), Err(VolumeError::Update(_))), "there is no room");
    volume.backing().grow(DATA + 2 * SIZE, Allocation::Full).unwrap();
    volume.set_available_bytes(u64::MAX);
    let ciphertext = || {
        let media = fixture.dir.path().join("vault.img");
        std::fs::read(media).unwrap().split_off(usize::try_from(DATA + SIZE / 2).unwrap())
    };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for offset in [SIZE / 2 - 100, SIZE / 2 + 1000, SIZE - 512, SIZE + 4096] {
            let (volume, stop) = (&volume, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut found = [0; 700];
                    for result in [volume.read_at(&mut found, offset), volume.write_at(&found, offset)] {
                        assert!(matches!(result, Ok(()) | Err(VolumeError::OutOfRange { .. })), "{result:?}");
                    }
                }
            });
        }
        for _ in 0..20 {
            volume.resize(2 * SIZE, false).unwrap();
            assert_eq!(volume.size(), 2 * SIZE);
            volume.write_at(&[9; 4096], 2 * SIZE - 4096).unwrap();
            assert!(matches!(volume.resize(SIZE / 2, false), Err(VolumeError::Update(_))));
            volume.resize(SIZE / 2, true).unwrap();
            let behind = ciphertext();
            thread::yield_now();
            assert!(matches!(volume.read_at(&mut [0; 16], SIZE / 2), Err(VolumeError::OutOfRange { .. })));
            assert!(ciphertext() == behind);
        }
        stop.store(true, Ordering::Relaxed);
    });
    volume.resize(SIZE, false).unwrap();
    drop(volume);
    let volume = fixture.reopen(Access::ReadWrite);
    let mut found = vec![0; bytes.len() / 2 - 100];
    volume.read_at(&mut found, 0).unwrap();
    assert!(found == bytes[..found.len()]);
}

#[test]
fn what_is_read_or_written_once_is_what_everybody_else_sees() {
    for (unit, discards) in [(Bytes4096, false), (Bytes512, true)] {
        let fixture = Fixture::new(Cipher::Aes256Xts, unit, discards);
        let (volume, _) = fixture.format();
        let mut model = vec![0_u8; usize::try_from(SIZE).unwrap()];
        volume.punch_zeroes(0, SIZE).unwrap();
        let mut scratch = Vec::new();
        for (seed, start, end) in [(1_u8, 0, 20_000), (2, 16, 48), (3, 4099, 8000), (4, 32_768, 65_536), (5, 512, 1024)]
        {
            let data: Vec<u8> = (seed..=250).cycle().take(end - start).collect();
            volume.write_once(&data, start as u64, &mut scratch).unwrap();
            model[start..end].copy_from_slice(&data);
            let (mut once, mut found) = (vec![1; model.len()], vec![2; model.len()]);
            volume.read_at(&mut found, 0).unwrap();
            volume.read_once(&mut once, 0, &mut scratch).unwrap();
            assert!(found == model && once == model, "after {start}..{end}");
            let part = &mut once[start..end];
            volume.read_once(part, start as u64, &mut scratch).unwrap();
            assert!(part == &model[start..end]);
        }
        assert!(matches!(volume.write_once(&[0; 32], SIZE - 16, &mut scratch), Err(VolumeError::OutOfRange { .. })));
        assert!(matches!(volume.read_once(&mut [0; 32], SIZE - 16, &mut scratch), Err(VolumeError::OutOfRange { .. })));
        volume.flush().unwrap();
        drop(volume);
        let reader = fixture.reopen(Access::ReadOnly);
        assert!(matches!(reader.write_once(&[0; 32], 0, &mut scratch), Err(VolumeError::ReadOnly)));
        let mut found = vec![0; model.len()];
        reader.read_once(&mut found, 0, &mut scratch).unwrap();
        assert!(found == model);
    }
}

#[test]
fn a_resize_waits_for_accesses_that_a_transform_has_left_behind() {
    let fixture = Fixture::new(Cipher::Aes256Xts, Bytes4096, false);
    let volume = Arc::new(fixture.format().0);
    let held = volume.area.hold(SIZE - 4096..SIZE);
    let (sender, receiver) = std::sync::mpsc::channel();
    let resizing = Arc::clone(&volume);
    let thread = thread::spawn(move || {
        resizing.resize(SIZE / 2, true).unwrap();
        sender.send(()).unwrap();
    });
    assert!(receiver.recv_timeout(std::time::Duration::from_millis(100)).is_err(), "it did not wait");
    drop(held);
    receiver.recv().unwrap();
    thread.join().unwrap();
    assert_eq!(volume.size(), SIZE / 2);
}

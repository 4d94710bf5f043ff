//! Locking a volume under its maps, exclusive maps, ephemeral volumes, and what is left in memory afterwards.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::multiple_unsafe_ops_per_block, unsafe_code)]

mod vault;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use daxcrypt::dax::{DaxError, MapMode, MapOptions};
use daxcrypt::namespace::{self, FormatOptions};
use daxcrypt::nbd_server::{Export, ExportError};
use daxcrypt::pmem::{Access, Allocation, Backing};
use daxcrypt::secret::{SecretBytes, VolumeKey};
use daxcrypt::volume::{Volume, VolumeError};
use daxcrypt::xts::Backend;
use vault::{DATA, PAGE, Vault, child, child_argument, load, media_byte, pattern, store, writable};

fn is_locked<T>(result: &Result<T, DaxError>) -> bool {
    matches!(result, Err(DaxError::Volume(VolumeError::Locked)))
}

fn is_claimed<T>(result: &Result<T, VolumeError>) -> bool {
    matches!(result, Err(VolumeError::Claimed { .. }))
}

#[test]
fn locking_keeps_every_store_and_refuses_everything_after() {
    for options in [writable(), writable().trap_stores(), writable().eager()] {
        let (vault, volume) = Vault::new(1 << 20);
        let map = volume.map(0..1 << 20, &options).unwrap();
        store(&map, 5, 0x11);
        map.write(9 * PAGE, &[0x22]).unwrap();
        volume.lock().unwrap();
        volume.lock().unwrap();
        assert!(volume.locked());
        assert_eq!(volume.resident_bytes(), 0);
        assert!(matches!(volume.read_at(&mut [0], 0), Err(VolumeError::Locked)));
        assert!(matches!(volume.write_at(&[0], 0), Err(VolumeError::Locked)));
        assert!(matches!(volume.write_zeroes(0, 512), Err(VolumeError::Locked)));
        assert!(matches!(volume.flush(), Err(VolumeError::Locked)));
        assert!(is_locked(&volume.map(0..PAGE, &MapOptions::new())));
        let export: &dyn Export = &*volume;
        assert!(matches!(export.read_at(0, &mut [0]), Err(ExportError::Locked)));
        assert!(matches!(export.write_at(0, &[0]), Err(ExportError::Locked)));
        assert!(is_locked(&map.read(0, &mut [0])));
        assert!(is_locked(&map.write(0, &[0])));
        assert!(is_locked(&map.persist(0..1)));
        assert!(is_locked(&map.sync()));
        assert!(is_locked(&map.prefetch(0..PAGE)));
        map.close().unwrap();
        drop(volume);
        let reopened = Vault::open(&vault.path(), Access::ReadOnly);
        for (offset, expected) in [(5, 0x11), (9 * PAGE, 0x22), (6, pattern(6))] {
            let mut byte = [0];
            reopened.read_at(&mut byte, offset).unwrap();
            assert_eq!(byte, [expected]);
        }
    }
}

#[test]
fn an_exclusive_map_is_a_slice_that_nobody_else_writes() {
    let (vault, volume) = Vault::new(1 << 20);
    let range = 4 * PAGE..12 * PAGE;
    let mut map = volume.map_exclusive(range.clone()).unwrap();
    assert_eq!(map.len(), 8 * PAGE as usize);
    assert!(map.iter().zip(range.clone()).all(|(&byte, offset)| byte == pattern(offset)));
    map[100..110].copy_from_slice(b"0123456789");

    let mut bytes = [0; 10];
    volume.read_at(&mut bytes, range.start + 100).unwrap();
    assert_eq!(bytes[0], pattern(range.start + 100), "others see what was persisted last");
    map.persist(100..110).unwrap();
    volume.read_at(&mut bytes, range.start + 100).unwrap();
    assert_eq!(&bytes, b"0123456789");

    assert!(is_claimed(&volume.write_at(&[0; 2], range.start - 1)));
    assert!(is_claimed(&volume.write_at(&[0; 2], range.end - 1)));
    assert!(is_claimed(&volume.write_zeroes(range.start, 4096)));
    volume.write_at(&[1; 16], range.start - 16).unwrap();
    volume.write_at(&[1; 16], range.end).unwrap();
    let shared = volume.map(0..range.start, &writable()).unwrap();
    let overlapping = volume.map(0..range.start + 1, &writable());
    assert!(matches!(overlapping, Err(DaxError::Volume(VolumeError::Claimed { .. }))));
    let both = volume.map_exclusive(11 * PAGE..13 * PAGE);
    assert!(matches!(both, Err(DaxError::Volume(VolumeError::Claimed { .. }))));
    let mapped = volume.map_exclusive(0..PAGE);
    assert!(matches!(mapped, Err(DaxError::Volume(VolumeError::Claimed { .. }))));
    drop(shared);
    assert!(matches!(volume.map_exclusive(0..100), Err(DaxError::Unaligned { start: 100 })));

    map[0] = 0xee;
    map.close().unwrap();
    assert_eq!(volume.resident_bytes(), 0);
    volume.write_at(&[1; 16], range.start + 16).unwrap();
    drop(volume);
    let mut byte = [0];
    Vault::open(&vault.path(), Access::ReadOnly).read_at(&mut byte, range.start).unwrap();
    assert_eq!(byte, [0xee], "closing syncs");
}

#[test]
fn locking_ends_an_exclusive_map_too() {
    let (vault, volume) = Vault::new(1 << 20);
    let mut map = volume.map_exclusive(0..1 << 20).unwrap();
    map[77] = 0x77;
    assert_eq!(volume.resident_bytes(), PAGE);
    volume.lock().unwrap();
    assert_eq!(volume.resident_bytes(), 0);
    assert!(is_locked(&map.persist(0..1)));
    map.close().unwrap();
    drop(volume);
    let mut byte = [0];
    Vault::open(&vault.path(), Access::ReadOnly).read_at(&mut byte, 77).unwrap();
    assert_eq!(byte, [0x77]);
}

#[test]
fn an_ephemeral_volume_is_a_bounded_map_over_ciphertext_in_memory() {
    const SIZE: u64 = 8 << 20;
    let volume = Arc::new(Volume::ephemeral(SIZE).unwrap());
    let map = volume.map(0..SIZE, &writable().resident_max(512 << 10)).unwrap();
    assert_eq!(map.mode(), MapMode::Lazy);
    for offset in (0..SIZE).step_by(256) {
        store(&map, offset, pattern(offset));
        assert!(volume.resident_bytes() <= 512 << 10);
    }
    for offset in (0..SIZE).step_by(256) {
        assert_eq!(load(&map, offset), pattern(offset));
    }
    map.zero(0..SIZE / 2).unwrap();
    map.sync().unwrap();
    let zeroes = (0..4096).filter(|&offset| media_byte(&volume, offset) == 0).count();
    assert!(zeroes < 100, "what lies in memory is ciphertext: {zeroes} of 4096 bytes are zero");
    map.close().unwrap();
    let other = Volume::ephemeral(SIZE).unwrap();
    assert_ne!(
        (0..64).map(|offset| media_byte(&other, offset)).collect::<Vec<_>>(),
        (0..64).map(|offset| media_byte(&volume, offset)).collect::<Vec<_>>()
    );
    assert!(Volume::ephemeral(0).is_err() && Volume::ephemeral(100).is_err());
}

/// Bytes that are in no memory before they are asked for: what lies in the program is their complement.
fn hidden(complement: &[u8; 32]) -> impl Iterator<Item = u8> + Clone {
    complement.iter().map(|byte| std::hint::black_box(!byte))
}

const SECRET: [u8; 32] = *b"\x91\x03\x5c\xd7\xe0\x44\x8b\x1f\xaa\x27\x36\xc9\x72\x0d\xb5\xfe\x19\x68\x83\x4e\xcc\x5a\xf1\x07\x3d\x96\xe8\x2b\x71\xb0\x4f\xda";
const DATA_KEY: [u8; 32] = *b"\x2e\x81\x5d\x60\xb9\xc4\x17\xf3\x48\x0a\xde\x95\x6b\x32\xa7\x7c\xe1\x56\x29\x98\x0f\xc3\x74\xbd\x8a\x41\xf6\x13\x5f\xa2\xcd\x38";

/// How often the first 16 bytes of `wanted` stand in this process's memory, at any address that can be read.
fn count_in_memory(wanted: &(impl Iterator<Item = u8> + Clone)) -> usize {
    let memory = File::open("/proc/self/mem").unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut buffer = vec![0; 1 << 20];
    let first = wanted.clone().next().unwrap();
    let mut found = 0;
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        if !rest.starts_with('r') || line.ends_with("[vvar]") || line.ends_with("[vsyscall]") {
            continue;
        }
        let mut at = start;
        while at < end {
            let len = buffer.len().min((end - at) as usize);
            // A page of a map that is absent cannot be read so, and ends what is read before it.
            let read = memory.read_at(&mut buffer[..len], at).unwrap_or(0);
            at += match read {
                0 if line.contains("daxcrypt-window") => PAGE,
                0 => buffer.len() as u64,
                read => read as u64,
            };
            let starts = buffer[..read]
                .windows(16)
                .filter(|window| window[0] == first && window.iter().copied().eq(wanted.clone().take(16)));
            let count = starts.count();
            if count > 0 {
                println!("{count} in {line}");
            }
            found += count;
        }
        buffer.fill(0);
    }
    found
}

/// Stores a secret through a map, locks or drops, and looks for secret and key in this process's memory.
fn leave_nothing(lock: bool) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("v");
    let mut key = SecretBytes::zeroed(64);
    key.iter_mut().zip(hidden(&DATA_KEY).chain(hidden(&SECRET))).for_each(|(byte, value)| *byte = value);
    let backing = Backing::create(&path, DATA + (1 << 20), Allocation::Full).unwrap();
    let options = FormatOptions { volume_key: Some(VolumeKey::new(key).unwrap()), ..FormatOptions::default() };
    let namespace = namespace::format(Arc::new(backing), options, &vault::credential()).unwrap();
    let volume = Arc::new(Volume::new(namespace, Backend::detect()));
    let map = volume.map(0..1 << 20, &writable()).unwrap();
    for start in (0..1 << 20).step_by(64 << 10) {
        hidden(&SECRET).enumerate().for_each(|(index, byte)| store(&map, start + index as u64, byte));
        // What is handled last of a page lies on the stack the longest.
        let end = start + PAGE - SECRET.len() as u64;
        hidden(&SECRET).enumerate().for_each(|(index, byte)| store(&map, end + index as u64, byte));
    }
    map.persist(0..32).unwrap();
    map.sync().unwrap();
    map.evict(0..4 * PAGE).unwrap();
    assert_eq!(load(&map, 0), !SECRET[0]);
    assert!(count_in_memory(&hidden(&SECRET)) >= 32, "the search finds what is there");
    assert!(count_in_memory(&hidden(&DATA_KEY)) >= 1, "the search finds the key in use");
    if lock {
        volume.lock().unwrap();
        assert_eq!(count_in_memory(&hidden(&SECRET)), 0, "plaintext after lock");
        assert_eq!(count_in_memory(&hidden(&DATA_KEY)), 0, "key after lock");
    }
    map.close().unwrap();
    assert_eq!(volume.resident_bytes(), 0);
    drop(volume);
    assert_eq!(count_in_memory(&hidden(&SECRET)), 0, "plaintext after drop");
    assert_eq!(count_in_memory(&hidden(&DATA_KEY)), 0, "key after drop");
}

#[test]
fn nothing_is_left_in_memory_after_lock_and_drop() {
    match child_argument().as_deref() {
        Some(how) => leave_nothing(how == "lock"),
        None => ["lock", "drop"].iter().for_each(|how| {
            let status = child("nothing_is_left_in_memory_after_lock_and_drop", how);
            assert!(status.success(), "{how}: {status}");
        }),
    }
}

#[test]
fn plaintext_is_left_out_of_core_dumps_and_of_children() {
    let (_vault, volume) = Vault::new(1 << 20);
    let maps = [writable(), writable().eager()].map(|options| volume.map(0..1 << 20, &options).unwrap());
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines();
    let mut windows = 0;
    while let Some(head) = lines.by_ref().find(|line| line.contains("/memfd:daxcrypt-window")) {
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        // `dd` is MADV_DONTDUMP, `dc` MADV_DONTFORK (proc(5)).
        for wanted in ["dd", "dc"] {
            assert!(flags.split(' ').any(|flag| flag == wanted), "{wanted} is not in {flags} of {head}");
        }
        windows += 1;
    }
    assert!(windows > maps.len(), "the maps and the volume's own mapping: {windows}");
}

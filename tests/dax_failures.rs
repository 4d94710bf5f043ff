//! Direct maps over media that refuse writes: nothing that was stored is forgotten while it can still be written, no other
//! page is harmed, and everybody is told.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod vault;

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use daxcrypt::dax::DaxError;
use daxcrypt::namespace::{self, FormatOptions};
use daxcrypt::pmem::{Access, Allocation, Backing, MediaError};
use daxcrypt::volume::{Volume, VolumeError};
use daxcrypt::xts::Backend;
use vault::{DATA, PAGE, Vault, credential, load, pattern, store, writable};

const BOUND: u64 = 256 << 10;

/// Pages from this one on are lost by the file.
fn truncate(vault: &Vault, page: u64) {
    OpenOptions::new().write(true).open(vault.path()).unwrap().set_len(DATA + page * PAGE).unwrap();
}

#[test]
fn pages_that_nobody_can_write_leave_with_the_last_map_that_shows_them() {
    let (vault, volume) = Vault::new(1 << 20);
    let other = volume.map(0..64 * PAGE, &writable()).unwrap();
    let map = volume.map(32 * PAGE..256 * PAGE, &writable()).unwrap();
    other.prefetch(30 * PAGE..34 * PAGE).unwrap();
    [200, 202].iter().for_each(|page| store(&map, (page - 32) * PAGE, 0xaa));
    truncate(&vault, 190);
    assert!(matches!(map.evict(100 * PAGE..200 * PAGE), Err(DaxError::Volume(VolumeError::Media(_)))));
    assert_eq!(load(&map, 168 * PAGE), 0xaa, "what could not be written stays");
    assert!(matches!(map.sync(), Err(DaxError::Volume(VolumeError::Media(_)))));
    assert!(matches!(map.close(), Err(DaxError::Volume(VolumeError::Media(_)))));
    assert_eq!(volume.resident_bytes(), 4 * PAGE, "only what the other map shows");
    assert!(volume.read_at(&mut [0], 200 * PAGE).is_err(), "no page hides what media have");
}

#[test]
fn victims_that_cannot_be_written_do_not_harm_other_pages() {
    let (vault, volume) = Vault::new(4 << 20);
    let map = volume.map(0..4 << 20, &writable().resident_max(BOUND)).unwrap();
    // A run of the file's last pages that cannot be written, and one page before it that can.
    (799..832).for_each(|page| store(&map, page * PAGE, 0xbb));
    truncate(&vault, 800);
    for round in 0..3 {
        for page in (0..700).map(|index| index * 37 % 700) {
            assert_eq!(load(&map, page * PAGE), pattern(page * PAGE), "round {round}, page {page}");
        }
    }
    assert!((799..832).all(|page| load(&map, page * PAGE) == 0xbb));
    let mut byte = [0];
    map.evict(799 * PAGE..800 * PAGE).unwrap();
    volume.read_at(&mut byte, 799 * PAGE).unwrap();
    assert_eq!(byte, [0xbb]);
    assert!(map.close().is_err());
}

/// A small tmpfs, unmounted in the end; nothing without root.
struct SmallDisk {
    at: PathBuf,
    _folder: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("disk");
        fs::create_dir(&at).unwrap();
        let option = format!("size={size}");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(&at).status();
        status.is_ok_and(|status| status.success()).then_some(Self { at, _folder: folder })
    }

    /// Fills what is free.
    fn fill(&self) -> PathBuf {
        let path = self.at.join("ballast");
        let mut file = File::create(&path).unwrap();
        while file.write(&[1; PAGE as usize]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// A volume of 64 MiB with blocks for the header and what is written.
fn sparse(path: &Path) -> Arc<Volume> {
    let backing = Backing::create(path, DATA + (64 << 20), Allocation::Sparse).unwrap();
    let namespace = namespace::format(Arc::new(backing), FormatOptions::default(), &credential()).unwrap();
    Arc::new(Volume::new(namespace, Backend::detect()))
}

fn is_no_space<T>(result: &Result<T, DaxError>) -> bool {
    matches!(result, Err(DaxError::Volume(VolumeError::Media(MediaError::NoSpace))))
}

/// Stores wait in memory while the disk is full. Nobody loses anything who waits until there is room again.
#[test]
fn a_full_disk_stops_eviction_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount("24m") else {
        assert!(!rustix::process::geteuid().is_root(), "mount failed");
        return eprintln!("skipped: mount needs root");
    };
    let path = disk.at.join("vault.img");
    let volume = sparse(&path);
    volume.write_at(&[9; 1 << 20], 0).unwrap();
    let map = volume.map(0..64 << 20, &writable().resident_max(BOUND)).unwrap();
    let pages = || (0..BOUND / PAGE).map(|index| (4 << 20) + index % 3 * (1 << 20) + index * PAGE);
    // Enough of each page that it differs from the noise below it.
    pages().for_each(|offset| (0..8).for_each(|byte| store(&map, offset + byte, 0xdd)));
    assert_eq!(volume.resident_bytes(), BOUND);
    let ballast = disk.fill();

    assert!(is_no_space(&map.sync()));
    assert!(is_no_space(&map.evict(0..64 << 20)));
    assert_eq!(volume.resident_bytes(), BOUND, "nothing was forgotten");
    let refused = map.prefetch(0..PAGE).unwrap_err();
    assert!(matches!(refused, DaxError::Volume(VolumeError::WindowFull { resident_max: BOUND, .. })), "{refused}");
    let cause = refused.source().and_then(Error::source).map(ToString::to_string);
    assert!(cause.is_some(), "{refused} without a cause");

    thread::scope(|scope| {
        let touch = scope.spawn(|| load(&map, 5));
        thread::sleep(Duration::from_millis(200));
        assert!(!touch.is_finished(), "a touch waits for room");
        assert!(pages().all(|offset| load(&map, offset) == 0xdd), "and keeps nobody else waiting");
        fs::remove_file(&ballast).unwrap();
        assert_eq!(touch.join().unwrap(), 9);
    });
    map.sync().unwrap();
    map.evict(0..64 << 20).unwrap();
    assert!(pages().all(|offset| load(&map, offset) == 0xdd));

    // And once more, without room until the end: the close says so.
    (0..8).for_each(|page| store(&map, (40 << 20) + page * PAGE, 0xee));
    disk.fill();
    assert!(is_no_space(&map.close()));
    assert_eq!(volume.resident_bytes(), 0);
    drop(volume);
    let volume = Vault::open(&path, Access::ReadOnly);
    for offset in pages() {
        let mut byte = [0];
        volume.read_at(&mut byte, offset).unwrap();
        assert_eq!(byte, [0xdd], "{offset}");
    }
}

//! Backings that need root to set up: loop block devices and file systems that are full.
//!
//! Without root (or without loop devices) each test says so and passes.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use daxcrypt::pmem::{Access, Allocation, Backing, BackingKind, Granularity, MediaError, OpenError, OpenOptions};

const MIB: u64 = 1 << 20;

/// Something set up by a command, undone when it is dropped.
struct Undo {
    command: &'static str,
    arguments: Vec<PathBuf>,
}

impl Drop for Undo {
    fn drop(&mut self) {
        let _ = Command::new(self.command).args(&self.arguments).status();
    }
}

fn output_of(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn loop_device(image: &Path) -> Option<(PathBuf, Undo)> {
    let device = PathBuf::from(output_of(Command::new("losetup").args(["--find", "--show"]).arg(image))?);
    let undo = Undo { command: "losetup", arguments: vec!["--detach".into(), device.clone()] };
    Some((device, undo))
}

fn mount(arguments: &[&str], at: &Path) -> Option<Undo> {
    fs::create_dir_all(at).unwrap();
    output_of(Command::new("mount").args(arguments).arg(at))?;
    Some(Undo { command: "umount", arguments: vec![at.to_path_buf()] })
}

/// Root has everything that the tests need; without it a word is left.
#[track_caller]
fn skip(what: &str) {
    assert!(!rustix::process::geteuid().is_root(), "{what} failed");
    eprintln!("skipped: {what} needs root");
}

#[test]
fn a_block_device_is_a_backing_at_page_granularity() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::write(&image, vec![0; 4 << 20]).unwrap();
    let Some((device, _undo)) = loop_device(&image) else { return skip("a loop device") };
    let backing = Backing::open(&device, Access::ReadWrite).unwrap();
    assert_eq!(backing.kind(), BackingKind::BlockDevice);
    assert_eq!(backing.len_bytes(), 4 * MIB);
    assert_eq!(backing.granularity(), Granularity::Page);
    assert!(backing.granularity_reason().to_string().contains("block device"), "{}", backing.granularity_reason());
    assert_eq!(backing.physical_address(), None);
    backing.write(MIB - 2..MIB + 2, |mut target| target.copy_from(b"abcd")).unwrap();
    backing.persist(MIB - 2..MIB + 2).unwrap();
    assert_eq!(&fs::read(&image).unwrap()[(1 << 20) - 2..(1 << 20) + 2], b"abcd");
    backing.write(0..1, |mut target| target.fill(9)).unwrap();
    backing.sync_all().unwrap();
    assert_eq!(fs::read(&image).unwrap()[0], 9);
    assert!(matches!(Backing::open(&device, Access::ReadWrite), Err(OpenError::Busy)));
    assert_eq!(backing.extents(0..4 * MIB, 9).unwrap().len(), 1);
    assert!(matches!(backing.write(4 * MIB..4 * MIB + 1, |_| ()), Err(MediaError::OutOfRange { .. })));
}

#[test]
fn a_mounted_block_device_is_busy() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::write(&image, vec![0; 8 << 20]).unwrap();
    let Some(_) = output_of(Command::new("mkfs.ext4").arg("-q").arg(&image)) else { return skip("mkfs.ext4") };
    let Some((device, _undo)) = loop_device(&image) else { return skip("a loop device") };
    let Some(_mounted) = mount(&[device.to_str().unwrap()], &dir.path().join("mnt")) else { return skip("mount") };
    assert!(matches!(Backing::open(&device, Access::ReadWrite), Err(OpenError::Busy)));
}

#[test]
fn two_nodes_of_one_device_lock_each_other_out() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::File::create(&image).unwrap().set_len(32 * MIB).unwrap();
    let Some((device, _undo)) = loop_device(&image) else { return skip("a loop device") };
    let number = fs::metadata(&device).unwrap().rdev();
    let numbers = [rustix::fs::major(number), rustix::fs::minor(number)].map(|number| number.to_string());
    let nodes = ["one", "two"].map(|name| folder.path().join(name));
    for node in &nodes {
        let made = Command::new("mknod").arg(node).args(["b", &numbers[0], &numbers[1]]).status().unwrap();
        assert!(made.success());
    }
    let open = |path: &Path, access, range| OpenOptions::new(access).lock_range(range).open(path);
    let all = [&device, &nodes[0], &nodes[1]];
    for first in all {
        let opened = open(first, Access::ReadWrite, 2 * MIB..4 * MIB).unwrap();
        for second in all {
            for access in [Access::ReadWrite, Access::ReadOnly] {
                let refused = open(second, access, 3 * MIB..5 * MIB);
                assert!(matches!(refused, Err(OpenError::Busy)), "{first:?} {second:?} {refused:?}");
            }
            let beside = open(second, Access::ReadWrite, 4 * MIB..6 * MIB).unwrap();
            assert!(matches!(opened.lock_range(2 * MIB..5 * MIB), Err(OpenError::Busy)), "{first:?} {second:?}");
            drop(beside);
            opened.lock_range(2 * MIB..6 * MIB).unwrap();
            assert!(matches!(open(second, Access::ReadWrite, 5 * MIB..6 * MIB), Err(OpenError::Busy)));
            opened.lock_range(2 * MIB..4 * MIB).unwrap();
        }
        drop(opened);
        let readers = all.map(|path| open(path, Access::ReadOnly, 0..4 * MIB).unwrap());
        assert!(matches!(open(first, Access::ReadWrite, 0..MIB), Err(OpenError::Busy)));
        drop(readers);
    }
}

#[test]
fn a_full_tmpfs_is_an_error_and_not_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("mnt");
    let Some(_mounted) = mount(&["-t", "tmpfs", "-o", "size=8m", "tmpfs"], &at) else { return skip("mount") };
    fill_a_small_file_system(&at);
}

#[test]
fn a_full_ext4_is_an_error_and_not_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::write(&image, vec![0; 16 << 20]).unwrap();
    let Some(_) = output_of(Command::new("mkfs.ext4").arg("-q").arg(&image)) else { return skip("mkfs.ext4") };
    let at = dir.path().join("mnt");
    let Some(_mounted) = mount(&["-o", "loop", image.to_str().unwrap()], &at) else { return skip("mount") };
    fill_a_small_file_system(&at);
}

/// Runs into the end of a file system that holds between 2 and 63 MiB, in every way there is.
fn fill_a_small_file_system(at: &Path) {
    let len_bytes = 64 * MIB;
    let full = at.join("full");
    assert!(matches!(Backing::create(&full, len_bytes, Allocation::Full), Err(OpenError::NoSpace { .. })));
    assert!(!full.exists(), "the failed file was removed");

    let backing = Backing::create(&at.join("sparse"), len_bytes, Allocation::Sparse).unwrap();
    let store = |step: u64| backing.write(step * MIB..(step + 1) * MIB, |mut target| target.fill(7));
    let stored = (0..64).take_while(|&step| store(step).is_ok()).count() as u64;
    assert!((2..64).contains(&stored), "stored {stored} MiB");
    assert!(matches!(store(stored), Err(MediaError::NoSpace)));
    assert!(matches!(backing.allocate(0..len_bytes), Err(MediaError::NoSpace)));
    assert!(matches!(backing.grow(2 * len_bytes, Allocation::Full), Err(MediaError::NoSpace)));
    assert_eq!(backing.len_bytes(), len_bytes);
    assert_eq!(fs::metadata(backing.path()).unwrap().len(), len_bytes);

    // What was stored stays good, and space that is given back can be used.
    backing.sync_all().unwrap();
    backing.punch_hole(0..MIB).unwrap();
    store(0).unwrap();
    backing.sync_all().unwrap();
    for step in 0..stored {
        let mut bytes = vec![0; 1 << 20];
        backing.read(step * MIB..(step + 1) * MIB, |source| source.copy_to(&mut bytes)).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 7), "MiB {step}");
    }
}

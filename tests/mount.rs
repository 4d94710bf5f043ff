//! Real filesystems on a served namespace: mkfs, mount, use, unmount, reopen with the key, and after a crash.
//!
//! nbdfuse and a loop device stand in for the kernel's NBD client, which the build machine does not have (`tools/guest`
//! boots one that does). Needs root.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::path::Path;

use common::mount::{Disk, Mount, check_tree, file_contains, write_tree};
use common::{Bench, noise, tool, tool_command};

/// What no backing may contain.
const MARKER: &[u8] = b"the eagle flies at midnight, over persistent memory";

struct Filesystem {
    mkfs: &'static [&'static str],
    fsck: &'static [&'static str],
    options: &'static str,
}

const EXT4: Filesystem =
    Filesystem { mkfs: &["mkfs.ext4", "-q", "-F"], fsck: &["e2fsck", "-f", "-n"], options: "noatime" };
const XFS: Filesystem = Filesystem { mkfs: &["mkfs.xfs", "-q", "-f"], fsck: &["xfs_repair", "-n"], options: "noatime" };
const BTRFS: Filesystem =
    Filesystem { mkfs: &["mkfs.btrfs", "-q", "-f"], fsck: &["btrfs", "check", "--readonly"], options: "noatime" };

#[track_caller]
fn on_device(command: &[&str], device: &str) {
    let mut args = command[1..].to_vec();
    args.push(device);
    tool(command[0], &args);
}

fn survives_reopening(filesystem: &Filesystem, size: &str, format: &[&str]) {
    let bench = Bench::new();
    bench.format("vault.img", size, format);
    let server = bench.serve("vault.img", &[]);
    let disk = Disk::attach(&bench.path("fuse"), &server.uri("vault"));
    on_device(filesystem.mkfs, &disk.device);
    let mount = Mount::new(&disk.device, &bench.path("mnt"), filesystem.options);
    let files = write_tree(&mount.at, 1, MARKER);
    tool("sync", &["-f", mount.at.to_str().unwrap()]);
    check_tree(&mount.at, &files);
    mount.unmount();
    disk.detach();
    server.stop();

    assert!(!file_contains(&bench.path("vault.img"), &MARKER[..24]), "plaintext on media");

    let server = bench.serve("vault.img", &[]);
    let disk = Disk::attach(&bench.path("fuse"), &server.uri("vault"));
    on_device(filesystem.fsck, &disk.device);
    let mount = Mount::new(&disk.device, &bench.path("mnt"), filesystem.options);
    check_tree(&mount.at, &files);
    mount.unmount();
    disk.detach();
    server.stop();
}

#[test]
fn ext4_survives_reopening() {
    survives_reopening(&EXT4, "64M", &[]);
}

#[test]
fn ext4_survives_reopening_with_512_byte_units_and_aes_128() {
    survives_reopening(&EXT4, "64M", &["--unit", "512", "--cipher", "aes-128-xts"]);
}

#[test]
fn xfs_survives_reopening() {
    survives_reopening(&XFS, "320M", &["--sparse"]);
}

#[test]
fn btrfs_survives_reopening() {
    survives_reopening(&BTRFS, "160M", &["--sparse"]);
}

#[test]
fn the_wrong_key_mounts_nothing() {
    let bench = Bench::new();
    bench.format("vault.img", "16M", &[]);
    fs::write(bench.path("other.key"), noise(9, 64)).unwrap();
    bench.run(&["serve", "vault.img", "--key-file", "other.key", "--socket", "x.sock"]).fails(2, &["vault.img"]);
    assert!(!bench.path("x.sock").exists());
}

/// kill -9 of the server while files are written: each file whose fsync returned is there afterwards, whole.
#[test]
fn what_a_flush_acknowledged_survives_a_killed_server() {
    let bench = Bench::new();
    bench.format("vault.img", "64M", &[]);
    for round in 0..3 {
        let server = bench.serve("vault.img", &[]);
        let disk = Disk::attach(&bench.path(&format!("fuse{round}")), &server.uri("vault"));
        if round == 0 {
            on_device(EXT4.mkfs, &disk.device);
        } else {
            // The journal replays what the crash left, then nothing may be wrong.
            let replay = tool_command("e2fsck", &["-f", "-p", &disk.device]).status().unwrap();
            assert!(replay.code().is_some_and(|code| code <= 1), "e2fsck -p: {replay}");
            on_device(EXT4.fsck, &disk.device);
        }
        let mount = Mount::new(&disk.device, &bench.path(&format!("mnt{round}")), "noatime");
        for earlier in 0..round {
            check_synced(&mount.at, earlier);
        }
        write_until_killed(&mount.at, round, server);
        mount.abandon();
        drop(disk);
    }
    let server = bench.serve("vault.img", &[]);
    let disk = Disk::attach(&bench.path("fuse-last"), &server.uri("vault"));
    let replay = tool_command("e2fsck", &["-f", "-p", &disk.device]).status().unwrap();
    assert!(replay.code().is_some_and(|code| code <= 1), "e2fsck -p: {replay}");
    let mount = Mount::new(&disk.device, &bench.path("mnt-last"), "noatime");
    for round in 0..3 {
        check_synced(&mount.at, round);
    }
    mount.unmount();
    disk.detach();
    server.stop();
}

const SYNCED_FILES: u64 = 12;

fn write_until_killed(root: &Path, round: u64, server: common::Server) {
    for index in 0..SYNCED_FILES {
        let path = root.join(format!("r{round}-{index}"));
        fs::write(&path, synced_content(round, index)).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
    }
    File::open(root).unwrap().sync_all().unwrap();
    // More writes are under way, unsynced, when the server dies.
    fs::write(root.join(format!("r{round}-unsynced")), noise(round, 4 << 20)).unwrap();
    server.kill();
}

#[track_caller]
fn check_synced(root: &Path, round: u64) {
    for index in 0..SYNCED_FILES {
        let found = fs::read(root.join(format!("r{round}-{index}"))).unwrap();
        assert!(found == synced_content(round, index), "round {round}, file {index}");
    }
}

fn synced_content(round: u64, index: u64) -> Vec<u8> {
    noise(round * 100 + index, 10_000 + 7919 * usize::try_from(index).unwrap())
}

//! Partitions that the kernel has made of a block device, as namespaces: the base is the offset on the disk.
//!
//! Without root each test says so and passes.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use common::{Bench, Server, loop_device, noise, tool};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const KEY: [&str; 2] = ["--key-file", "vault.key"];

/// A loop device with partitions, which goes when it is dropped.
struct Disk {
    device: String,
}

impl Disk {
    /// Of `region.img`, with the partitions `(start, length)` in bytes. The kernel is told of them, because not every kernel
    /// looks for a table by itself.
    fn new(bench: &Bench, partitions: &[(u64, u64)]) -> Option<Self> {
        let disk = Self { device: loop_device(&bench.path("region.img"), &[])? };
        for (number, (start, len)) in (1..).zip(partitions) {
            let sectors = [start, len].map(|bytes| (bytes / 512).to_string());
            tool("addpart", &[&disk.device, &format!("{number}"), &sectors[0], &sectors[1]]);
        }
        Some(disk)
    }

    fn partition(&self, number: u32) -> String {
        format!("{}p{number}", self.device)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for number in 1..=2 {
            let _ = Command::new("delpart").args([&self.device, &number.to_string()]).output();
        }
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

fn serve(bench: &Bench, path: &str) -> Server {
    let socket = bench.path("s");
    let args = ["serve", path, KEY[0], KEY[1], "--socket", socket.to_str().unwrap()];
    Server::start(bench.command(&args), socket)
}

/// Serves `path` and gives its content.
fn content(bench: &Bench, path: &str) -> Vec<u8> {
    let server = serve(bench, path);
    let out: PathBuf = bench.path("out.img");
    tool("nbdcopy", &[&server.uri(""), out.to_str().unwrap()]);
    server.stop();
    fs::read(out).unwrap()
}

/// `region.img` of 32 MiB with the namespace `a` at 2 MiB, whose 4 MiB are known.
fn region() -> (Bench, Vec<u8>) {
    let bench = Bench::new();
    bench.run(&["region", "create", "region.img", "--size", "32M"]).succeeds();
    bench.run(&["format", "region.img#a", "--size", "4M", "--label", "a", KEY[0], KEY[1]]).succeeds();
    let bytes = noise(11, 4 << 20);
    fs::write(bench.path("in.img"), &bytes).unwrap();
    bench.run(&["import", "in.img", "region.img#a", KEY[0], KEY[1]]).succeeds();
    (bench, bytes)
}

#[test]
fn the_partition_of_the_kernel_and_the_name_in_the_region_are_one_namespace() {
    let (bench, bytes) = region();
    let Some(disk) = Disk::new(&bench, &[(2 * MIB, 6 * MIB)]) else { return };
    let partition = disk.partition(1);
    let info: Value = serde_json::from_str(&bench.run(&["info", &partition, "--json"]).succeeds().stdout).unwrap();
    assert_eq!((&info["base"], &info["data_offset"]), (&(2 * MIB).into(), &(2 * MIB).into()));
    assert!(content(&bench, &partition) == bytes);
    let by_name = format!("{}#a", disk.device);
    for (served, other) in [(&partition, &by_name), (&by_name, &partition)] {
        let server = serve(&bench, served);
        bench.run(&["key", "change", other, KEY[0], KEY[1], "--new-key-file", "vault.key"]).fails(5, &["busy"]);
        server.stop();
    }
    // The tweaks are those of the disk; the place is that of the device that is named.
    let table = bench.run(&["dmtable", &partition, KEY[0], KEY[1]]).succeeds().stdout;
    assert!(table.contains(&format!(" 8192 {partition} 4096 1 ")), "{table}");
    let table = bench.run(&["dmtable", &format!("{}#a", disk.device), KEY[0], KEY[1]]).succeeds().stdout;
    assert!(table.contains(&format!(" 8192 {}#a 8192 1 ", disk.device)), "{table}");
    // What is written through the one is read through the other, after both have let go.
    let server = serve(&bench, &partition);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 64k", &server.uri("a")]);
    server.stop();
    drop(disk);
    let mut changed = bytes;
    changed[1 << 20..][..64 << 10].fill(9);
    assert!(content(&bench, "region.img#a") == changed);
}

#[test]
fn a_namespace_is_made_on_a_partition_and_fills_it() {
    let (bench, _) = region();
    // The usual start of a first partition is no multiple of 2 MiB: the data begins at the next one of the disk.
    let Some(disk) = Disk::new(&bench, &[(17 * MIB, 8 * MIB)]) else { return };
    let partition = disk.partition(1);
    bench.run(&["format", &partition, "--label", "p", KEY[0], KEY[1]]).succeeds();
    let info: Value = serde_json::from_str(&bench.run(&["info", &partition, "--json"]).succeeds().stdout).unwrap();
    let numbers = ["base", "data_offset", "data_start", "size_bytes"].map(|name| info[name].as_u64().unwrap() / MIB);
    assert_eq!(numbers, [17, 3, 3, 5]);
    bench.run(&["rekey", &partition, KEY[0], KEY[1]]).succeeds();
    let server = serve(&bench, &partition);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 5M", "-c", "read -P 3 0 5M", &server.uri("p")]);
    server.stop();
    bench.run(&["erase", &partition, "--yes", "--wipe-data"]).succeeds();
    drop(disk);
    let image = fs::read(bench.path("region.img")).unwrap();
    assert!(image[17 << 20..25 << 20].iter().all(|&byte| byte == 0));
}

#[test]
fn a_partition_that_dd_has_moved_is_refused_and_adopted() {
    let (bench, bytes) = region();
    let Some(disk) = Disk::new(&bench, &[(2 * MIB, 6 * MIB), (9 * MIB, 8 * MIB)]) else { return };
    let (from, to) = (disk.partition(1), disk.partition(2));
    tool("dd", &[&format!("if={from}"), &format!("of={to}"), "bs=1M", "conv=fsync,nocreat", "status=none"]);
    let words = ["relocated", "2097152", "9437184", &format!("relocate --in-place {to}")];
    bench.run(&["info", &to]).fails(3, &words);
    bench.run(&["serve", &to, KEY[0], KEY[1], "--socket", "s"]).fails(3, &words);
    bench.run(&["relocate", "--in-place", &to, KEY[0], KEY[1]]).succeeds();
    assert!(content(&bench, &to) == bytes);
    let info: Value = serde_json::from_str(&bench.run(&["info", &to, "--json"]).succeeds().stdout).unwrap();
    assert_eq!(info["base"], 9 * MIB);
    // The first one is still at home.
    assert!(content(&bench, &from) == bytes);
}

//! `daxcrypt relocate` into, out of and within regions, with detached headers, and in place after a partition has moved.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;

use common::{Bench, Run, noise, tool};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MIB: usize = 1 << 20;
const KEY: [&str; 2] = ["--key-file", "vault.key"];
/// The partition type of a namespace.
const TYPE: &str = "9D1F6B0E-5C4A-4F1B-8E57-3A2C64F7D0B1";

fn run(bench: &Bench, command: &[&str]) -> Run {
    bench.run(&[command, &KEY[..]].concat())
}

/// `region.img` of 32 MiB, empty, and `vault.img` with 3 MiB of content.
fn bench() -> (Bench, Vec<u8>) {
    let bench = Bench::new();
    bench.run(&["region", "create", "region.img", "--size", "32M"]).succeeds();
    bench.format("vault.img", "3M", &["--label", "tank"]);
    let bytes = fill(&bench, &["vault.img"], 3 * MIB);
    (bench, bytes)
}

fn fill(bench: &Bench, place: &[&str], len: usize) -> Vec<u8> {
    let bytes = noise(4, len);
    fs::write(bench.path("in.img"), &bytes).unwrap();
    run(bench, &[&["import", "in.img"], place].concat()).succeeds();
    bytes
}

fn content(bench: &Bench, place: &[&str]) -> Vec<u8> {
    let _ = fs::remove_file(bench.path("out.img"));
    run(bench, &[&["export"], place, &["out.img"]].concat()).succeeds();
    fs::read(bench.path("out.img")).unwrap()
}

fn list(bench: &Bench) -> Value {
    serde_json::from_str(&bench.run(&["region", "list", "region.img", "--json"]).succeeds().stdout).unwrap()
}

fn names(bench: &Bench) -> Vec<String> {
    let list = list(bench);
    let names = list["namespaces"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn a_namespace_moves_into_a_region_within_it_and_out_again() {
    let (bench, bytes) = bench();
    let said = run(&bench, &["relocate", "vault.img", "region.img#a"]).succeeds().stdout;
    assert!(said.contains("verified; the source is erased"), "{said}");
    run(&bench, &["key", "test", "vault.img"]).fails(3, &["not a daxcrypt namespace"]);
    let entry = list(&bench)["namespaces"][0].clone();
    assert_eq!((&entry["start"], &entry["len_bytes"]), (&(2 << 20).into(), &(6 << 20).into()));
    assert_eq!(entry["label"], "tank");
    assert!(content(&bench, &["region.img#a"]) == bytes);

    let said = run(&bench, &["relocate", "region.img#a", "region.img#b"]).succeeds().stdout;
    assert!(said.contains("its partition removed"), "{said}");
    assert_eq!(names(&bench), ["b"]);
    assert_eq!(list(&bench)["namespaces"][0]["start"], 8 << 20);
    assert!(content(&bench, &["region.img#b"]) == bytes);

    run(&bench, &["relocate", "region.img#b", "region.img#c", "--keep-source"]).succeeds();
    assert_eq!(names(&bench), ["b", "c"]);
    assert!(content(&bench, &["region.img#b"]) == bytes && content(&bench, &["region.img#c"]) == bytes);

    run(&bench, &["relocate", "region.img#c", "new.img"]).succeeds();
    assert_eq!(names(&bench), ["b"]);
    assert!(content(&bench, &["new.img"]) == bytes);
    let image = fs::read(bench.path("region.img")).unwrap();
    let start = 2 * MIB; // where the first free place was taken for c
    assert!(image[start..start + 2 * MIB].iter().all(|&byte| byte == 0), "the header of what has left is still there");
    tool("sgdisk", &["--verify", bench.path("region.img").to_str().unwrap()]);
}

#[test]
fn a_full_region_and_a_place_in_use_are_refused_and_nothing_changes() {
    let (bench, bytes) = bench();
    bench.run(&["format", "region.img#x", "--size", "20M", KEY[0], KEY[1]]).succeeds();
    let before = fs::read(bench.path("region.img")).unwrap();
    bench.format("large.img", "9M", &[]);
    let words = ["11534336 bytes do not fit", "8388608 bytes are free: 8388608 bytes at byte 25165824"];
    run(&bench, &["relocate", "large.img", "region.img#a"]).fails(1, &words[..1]);
    run(&bench, &["relocate", "vault.img", "region.img#x"]).fails(1, &["already holds data", "--force"]);
    run(&bench, &["relocate", "vault.img", "vault.img"]).fails(1, &["is there already", "rekey"]);
    assert!(fs::read(bench.path("region.img")).unwrap() == before);
    assert!(content(&bench, &["vault.img"]) == bytes);
}

#[test]
fn detached_headers_move_along() {
    let bench = Bench::new();
    bench.run(&["region", "create", "region.img", "--size", "32M"]).succeeds();
    bench.format("data.img", "4M", &["--header", "data.header"]);
    let bytes = fill(&bench, &["data.img", "--header", "data.header"], 4 * MIB);
    run(&bench, &["relocate", "data.img", "region.img#a"]).fails(3, &["not a daxcrypt namespace"]);
    assert!(names(&bench).is_empty());

    let args = ["relocate", "data.img", "--header", "data.header", "region.img#a", "--destination-header", "a.header"];
    run(&bench, &args).succeeds();
    run(&bench, &["key", "test", "data.img", "--header", "data.header"]).fails(3, &["not a daxcrypt namespace"]);
    assert_eq!(list(&bench)["namespaces"][0]["len_bytes"], 6 << 20, "the page of the tag is in it");
    assert!(content(&bench, &["region.img#a", "--header", "a.header"]) == bytes);

    run(&bench, &["relocate", "region.img#a", "--header", "a.header", "vault.img"]).succeeds();
    assert!(names(&bench).is_empty());
    assert!(content(&bench, &["vault.img"]) == bytes);
}

#[test]
fn a_relocation_into_a_region_that_is_stopped_leaves_nothing_and_that_is_killed_nothing_that_opens() {
    let (bench, bytes) = bench();
    let args = [&["relocate", "vault.img", "region.img#a", "--max-rate", "1M", "--json"], &KEY[..]].concat();
    let mut child = bench.under_way(&args);
    assert_eq!(names(&bench), ["a"], "the place is taken from the beginning");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert!(names(&bench).is_empty(), "the partition is taken back");
    assert!(content(&bench, &["vault.img"]) == bytes);

    let mut child = bench.under_way(&args);
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
    assert!(content(&bench, &["vault.img"]) == bytes);
    run(&bench, &["key", "test", "region.img#a"]).fails(3, &["not a daxcrypt namespace"]);
    run(&bench, &["relocate", "vault.img", "region.img#a"]).succeeds();
    assert!(content(&bench, &["region.img#a"]) == bytes);
}

/// Moves partition 1 as dd and a partition editor do: ciphertext, and the table.
fn move_partition(bench: &Bench, from: usize, to: usize, len: usize) {
    let file = fs::File::options().read(true).write(true).open(bench.path("region.img")).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, from as u64).unwrap();
    file.write_all_at(&bytes, to as u64).unwrap();
    let image = bench.path("region.img");
    let (first, last) = (to / 512, (to + len) / 512 - 1);
    let new = format!("1:{first}:{last}");
    let (type_code, name) = (format!("1:{TYPE}"), "1:a");
    tool("sgdisk", &["-a", "1", "-d", "1", "-n", &new, "-t", &type_code, "-c", name, image.to_str().unwrap()]);
}

#[test]
fn a_partition_that_was_moved_as_ciphertext_is_adopted_where_it_lies() {
    let (bench, bytes) = bench();
    run(&bench, &["relocate", "vault.img", "region.img#a"]).succeeds();
    let mut from = 2 * MIB;
    // Apart, overlapping upwards, and at no multiple of 2 MiB, where the data moves behind its header again.
    for (to, len) in [(16 * MIB, 6 * MIB), (18 * MIB, 6 * MIB), (13 * MIB, 8 * MIB)] {
        move_partition(&bench, from, to, len);
        let (old, new) = (from.to_string(), to.to_string());
        run(&bench, &["key", "test", "region.img#a"])
            .fails(3, &["relocated", &old, &new, "relocate --in-place region.img#a"]);
        let args = ["relocate", "--in-place", "region.img#a", "--max-rate", "1M", "--json"];
        let mut child = bench.under_way(&[&args[..], &KEY[..]].concat());
        kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
        child.wait().unwrap();
        assert!(content(&bench, &["region.img#a"]) == bytes, "half way at {to}");
        run(&bench, &["rekey", "--resume", "region.img#a"]).succeeds();
        assert!(content(&bench, &["region.img#a"]) == bytes, "at {to}");
        run(&bench, &["relocate", "--in-place", "region.img#a"]).fails(1, &["is where its header says"]);
        from = to;
    }
}

#[test]
fn a_partition_whose_detached_header_is_elsewhere_is_adopted_too() {
    let bench = Bench::new();
    bench.run(&["region", "create", "region.img", "--size", "32M"]).succeeds();
    let header = ["--header", "a.header"];
    bench.run(&[&["format", "region.img#a", "--size", "4M"], &header[..], &KEY[..]].concat()).succeeds();
    let bytes = fill(&bench, &["region.img#a", "--header", "a.header"], 4 * MIB);
    for (from, to, len) in [(2 * MIB, 12 * MIB, 6 * MIB), (12 * MIB, 17 * MIB, 6 * MIB)] {
        move_partition(&bench, from, to, len);
        run(&bench, &["relocate", "--in-place", "region.img#a"]).fails(3, &[]);
        let said = run(&bench, &["relocate", "--in-place", "region.img#a", "--header", "a.header"]).succeeds().stdout;
        assert!(said.contains(&format!("written for byte {from}, now at home at byte {to}")), "{said}");
        assert!(content(&bench, &["region.img#a", "--header", "a.header"]) == bytes);
    }
}

//! `daxcrypt region compact`: namespaces move together over their own old places, and survive SIGKILL at any instant.
//!
//! `DAXCRYPT_KILLS` is how often the last test kills (15 in the gate).
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use common::{Bench, noise, tool};
use serde_json::Value;

const MIB: usize = 1 << 20;
const NAMES: [&str; 3] = ["a", "b", "c"];

fn key(name: &str) -> [String; 2] {
    ["--key-file".into(), format!("{name}.key")]
}

fn run(bench: &Bench, command: &[&str], name: &str) -> common::Run {
    let key = key(name);
    bench.run(&[command, &[&key[0], &key[1]]].concat())
}

/// A region with free places before `a`, `b` and `c`, each with a key and `len` bytes of its own: one place is smaller
/// than the namespace behind it, one larger, and one as small as can be.
fn region(parent: &Path, len: usize) -> Bench {
    let bench = Bench::under(parent);
    let size = format!("{}", 4 * len + 40 * MIB);
    bench.run(&["region", "create", "region.img", "--size", &size, "--sparse"]).succeeds();
    let len_text = len.to_string();
    let larger = (len + 8 * MIB).to_string();
    for (gap, name, seed) in [("2M", "a", 1), (&larger[..], "b", 2), ("4096", "c", 3)] {
        bench.secret(&format!("{name}.key"), &[seed; 32]);
        let gap_name = format!("region.img#before-{name}");
        run(&bench, &["format", &gap_name, "--size", gap], name).succeeds();
        let path = format!("region.img#{name}");
        run(&bench, &["format", &path, "--size", &len_text], name).succeeds();
        fs::write(bench.path("in.img"), plaintext(name, len)).unwrap();
        run(&bench, &["import", "in.img", &path], name).succeeds();
    }
    for name in NAMES {
        bench.run(&["remove", &format!("region.img#before-{name}"), "--yes"]).succeeds();
    }
    bench
}

fn plaintext(name: &str, len: usize) -> Vec<u8> {
    noise(u64::from(name.as_bytes()[0]), len)
}

fn list(bench: &Bench) -> Value {
    serde_json::from_str(&bench.run(&["region", "list", "region.img", "--json"]).succeeds().stdout).unwrap()
}

/// Start and length of each namespace, by name.
fn places(bench: &Bench) -> Vec<(String, u64, u64)> {
    let list = list(bench);
    let mut places: Vec<_> = list["namespaces"].as_array().unwrap().iter().map(place).collect();
    places.sort_by_key(|place| place.1);
    places
}

fn place(entry: &Value) -> (String, u64, u64) {
    let number = |field: &str| entry[field].as_u64().unwrap();
    (entry["name"].as_str().unwrap().to_owned(), number("start"), number("len_bytes"))
}

#[track_caller]
fn assert_content(bench: &Bench, name: &str, len: usize, when: &str) {
    let _ = fs::remove_file(bench.path("out.img"));
    run(bench, &["export", &format!("region.img#{name}"), "out.img"], name).succeeds();
    assert!(fs::read(bench.path("out.img")).unwrap() == plaintext(name, len), "{name} {when}");
}

/// Everything is together at the start, in its old order.
fn assert_compact(bench: &Bench, len: usize) {
    let part = (2 * MIB + len) as u64;
    let expected = |index: u64| 2 * MIB as u64 + index * part;
    let wanted: Vec<_> = NAMES.iter().zip(0..).map(|(name, at)| ((*name).to_owned(), expected(at), part)).collect();
    assert_eq!(places(bench), wanted);
    assert_eq!(list(bench)["free"].as_array().unwrap().len(), 1);
    tool("sgdisk", &["--verify", bench.path("region.img").to_str().unwrap()]);
}

const ALL_KEYS: [&str; 6] = ["--key", "a=a.key", "--key", "b=b.key", "--key", "c=c.key"];

#[test]
fn namespaces_move_together_under_new_keys_and_those_without_a_key_stay() {
    let len = 6 * MIB;
    let bench = region(Path::new("/tmp"), len);
    let before = places(&bench);
    let old = fs::read(bench.path("region.img")).unwrap();
    // The first two only: the third has another key, and stays.
    let said = bench.run(&["region", "compact", "region.img", "--key", "a=a.key", "--key-file", "b.key"]).succeeds();
    assert!(said.stdout.contains("#a: moved from byte 6291456 to byte 2097152"), "{}", said.stdout);
    assert!(said.stdout.contains("#c: left where it is: cannot unlock region.img#c"), "{}", said.stdout);
    let after = places(&bench);
    assert_eq!((&after[2], after[1].1), (&before[2], 2 * MIB as u64 + after[0].2));
    NAMES.iter().for_each(|name| assert_content(&bench, name, len, "after a part"));
    // One at a time, and then there is nothing left to do, for which no key is needed.
    run(&bench, &["region", "compact", "region.img#c"], "c").succeeds();
    assert_compact(&bench, len);
    let said = bench.run(&["region", "compact", "region.img", "--key-file", "a.key"]).succeeds().stdout;
    assert_eq!(said.matches("is where it should be").count(), 3, "{said}");
    NAMES.iter().for_each(|name| assert_content(&bench, name, len, "at the end"));

    let new = fs::read(bench.path("region.img")).unwrap();
    let headers = |image: &[u8]| image.chunks(256 << 10).filter(|chunk| chunk.starts_with(b"DAXCRYPT")).count();
    assert_eq!(headers(&new), 6, "two copies each, and none of those that were left behind");
    let first = |image: &[u8], start: usize| image[start..start + MIB].to_vec();
    assert!(first(&old, 8 * MIB) != first(&new, 4 * MIB), "ciphertext that moved as it was");
}

#[test]
fn a_dry_run_tells_what_then_happens_and_changes_nothing() {
    let len = 6 * MIB;
    let bench = region(Path::new("/tmp"), len);
    let image = || fs::read(bench.path("region.img")).unwrap();
    // The free places were in use, and would need no blocks.
    let path = bench.path("region.img");
    for free in list(&bench)["free"].as_array().unwrap() {
        let [start, len] = ["start", "len_bytes"].map(|field| free[field].as_u64().unwrap().to_string());
        tool("fallocate", &["--punch-hole", "--offset", &start, "--length", &len, path.to_str().unwrap()]);
    }
    let before = image();
    let said = bench.run(&["region", "compact", "region.img", "--dry-run", "--json"]).succeeds().stdout;
    let planned: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let shown = bench.run(&["region", "compact", "region.img", "--dry-run"]).succeeds().stdout;
    assert!(shown.contains("region.img#a: would move from byte 6291456 to byte 2097152 with 8 MiB"), "{shown}");
    assert!(shown.contains("of blocks will be needed besides; "), "{shown}");
    let alone = bench.run(&["region", "compact", "region.img#c", "--dry-run"]).succeeds().stdout;
    assert!(alone.lines().count() <= 2 && alone.contains("#c: would move"), "{alone}");
    assert!(image() == before, "a dry run writes nothing");

    let blocks = || fs::metadata(bench.path("region.img")).unwrap().blocks() * 512;
    let before = blocks();
    bench.run(&[&["region", "compact", "region.img"], &ALL_KEYS[..]].concat()).succeeds();
    let number = |entry: &Value, field: &str| entry[field].as_u64().unwrap();
    let expected = planned
        .iter()
        .map(|entry| (entry["name"].as_str().unwrap().to_owned(), number(entry, "to"), number(entry, "len_bytes")));
    assert_eq!(places(&bench), expected.collect::<Vec<_>>());
    let needed: u64 = planned.iter().map(|entry| number(entry, "blocks_bytes")).sum();
    // Headers and journals come on top: a header area for each.
    assert!(blocks() <= before + needed + 3 * 2 * MIB as u64, "{before} and {needed} became {}", blocks());
}

/// What a compaction leaves that was killed after the header at the new place and before the table: found by its uuid.
#[test]
fn the_header_of_a_slide_that_was_cut_goes_when_the_namespace_is_opened_for_writing() {
    let bench = region(Path::new("/tmp"), 2 * MIB);
    let places = places(&bench);
    let [(_, a, _), (_, b, b_len), _] = &places[..] else { panic!("{places:?}") };
    let image = fs::OpenOptions::new().read(true).write(true).open(bench.path("region.img")).unwrap();
    let header_at = |start: u64| {
        let mut bytes = vec![0; 2 * MIB];
        image.read_exact_at(&mut bytes, start).unwrap();
        bytes
    };
    let is_empty = |start: u64| header_at(start).iter().all(|&byte| byte == 0);
    // Before a lies a header of it, before b one of c, which is none of b's business.
    let c = header_at(places[2].1);
    let before_b = a + 4 * MIB as u64;
    assert!(before_b + 2 * MIB as u64 <= *b && b + b_len <= places[2].1);
    image.write_all_at(&header_at(*a), 2 * MIB as u64).unwrap();
    image.write_all_at(&c, before_b).unwrap();
    run(&bench, &["key", "test", "region.img#a"], "a").succeeds();
    assert!(!is_empty(2 * MIB as u64), "who reads writes nothing");
    bench.secret("spare.key", &[9; 32]);
    for name in ["a", "b"] {
        let path = format!("region.img#{name}");
        run(&bench, &["key", "add", &path, "--new-key-file", "spare.key"], name).succeeds();
    }
    assert!(is_empty(2 * MIB as u64));
    assert!(header_at(before_b) == c);
    for name in NAMES {
        assert_content(&bench, name, 2 * MIB, "after the sweep");
    }
}

/// The free place before a namespace becomes larger when its neighbour goes: the header must be gone by then, because a slide
/// would begin elsewhere.
#[test]
fn the_header_of_a_slide_that_was_cut_goes_before_the_table_changes() {
    let bench = region(Path::new("/tmp"), 2 * MIB);
    let places = places(&bench);
    let [(_, _, _), (_, b, b_len), (_, c, _)] = &places[..] else { panic!("{places:?}") };
    let before_c = b + b_len;
    assert!(before_c + 2 * MIB as u64 <= *c, "{places:?}");
    let image = fs::OpenOptions::new().read(true).write(true).open(bench.path("region.img")).unwrap();
    let mut header = vec![0; 2 * MIB];
    image.read_exact_at(&mut header, *c).unwrap();
    image.write_all_at(&header, before_c).unwrap();
    bench.run(&["remove", "region.img#b", "--yes"]).succeeds();
    image.read_exact_at(&mut header, before_c).unwrap();
    assert!(header.iter().all(|&byte| byte == 0));
    for name in ["a", "c"] {
        assert_content(&bench, name, 2 * MIB, "after the sweep");
    }
}

#[test]
fn what_cannot_move_is_named_and_nothing_changes() {
    let len = 2 * MIB;
    let bench = region(Path::new("/tmp"), len);
    let refused = |args: &[&str], code: i32, words: &[&str]| {
        let before = fs::read(bench.path("region.img")).unwrap();
        bench.run(&[&["region", "compact"], args].concat()).fails(code, words);
        assert!(fs::read(bench.path("region.img")).unwrap() == before, "{args:?}");
    };
    bench.secret("wrong.key", &[77; 32]);
    refused(&["region.img", "--key-file", "wrong.key"], 2, &["cannot unlock region.img#a"]);
    refused(&["region.img#b", "--key-file", "a.key"], 2, &["none of 1 key slots"]);
    refused(&["region.img#nobody", "--key-file", "a.key"], 1, &["no namespace \"nobody\""]);
    refused(&["region.img", "--key", "nobody=a.key"], 1, &["no such namespace"]);
    refused(&["region.img", "--key", "nobody"], 1, &["NAME=FILE"]);
    run(&bench, &["key", "add", "region.img#b", "--new-key-file", "c.key", "--label", "spare"], "b").succeeds();
    refused(&["region.img#b", "--key-file", "b.key"], 1, &["(spare)", "--drop-slots"]);
    // A namespace that is in use is left alone, and so is its place.
    let socket = bench.path("a.sock");
    let key = key("a");
    let serve = ["serve", "region.img#a", &key[0], &key[1], "--socket", socket.to_str().unwrap()];
    let server = common::Server::start(bench.command(&serve), socket.clone());
    refused(&["region.img#a", "--key-file", "a.key"], 5, &["busy"]);
    server.stop();
    bench.run(&["region", "compact", "region.img#b", "--key-file", "b.key", "--keep-slots"]).succeeds();
    run(&bench, &["key", "test", "region.img#b"], "c").succeeds();
    assert_content(&bench, "b", len, "with both slots");
    // A wrong key of its own is a mistake, also when the others move.
    let keys = ["--key", "a=wrong.key", "--key", "b=b.key", "--key", "c=c.key", "--keep-slots"];
    let said = bench.run(&[&["region", "compact", "region.img"], &keys[..]].concat()).fails(2, &["cannot unlock"]);
    assert!(said.stdout.contains("#c: moved from"), "{}", said.stdout);
    NAMES.iter().for_each(|name| assert_content(&bench, name, len, "but for one"));
}

#[test]
fn a_compaction_that_is_stopped_goes_on_as_a_rekey_or_when_it_is_run_again() {
    let len = 4 * MIB;
    let bench = region(Path::new("/tmp"), len);
    let args = [&["region", "compact", "region.img", "--max-rate", "2M", "--json"], &ALL_KEYS[..]].concat();
    let mut child = bench.under_way(&args);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert_content(&bench, "a", len, "half way");
    assert_eq!(places(&bench)[0].1, 2 * MIB as u64);
    run(&bench, &["rekey", "region.img#a", "--resume"], "a").succeeds();
    assert_content(&bench, "a", len, "after the re-key");
    bench.run(&[&["region", "compact", "region.img"], &ALL_KEYS[..]].concat()).succeeds();
    assert_compact(&bench, len);
    NAMES.iter().for_each(|name| assert_content(&bench, name, len, "at the end"));
}

/// How long a process lives: different each time; the longest life follows how far kills come.
fn life(round: u64, max_us: u64) -> Duration {
    let word = u64::from_le_bytes(noise(1000 + round, 8).try_into().unwrap());
    Duration::from_micros(500 + word % max_us)
}

#[test]
fn compactions_survive_being_killed() {
    let kills: u64 = std::env::var("DAXCRYPT_KILLS").map_or(15, |kills| kills.parse().unwrap());
    let len = 16 * MIB;
    let bench = region(Path::new("/dev/shm"), len);
    fs::copy(bench.path("region.img"), bench.path("before.img")).unwrap();
    let args = [&["region", "compact", "region.img"], &ALL_KEYS[..]].concat();
    let (mut max_us, mut ended, mut mid_way) = (60_000, 0, 0);
    for round in 0..kills {
        let mut child = bench.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(life(round, max_us));
        child.kill().unwrap();
        child.wait().unwrap();
        for name in NAMES {
            assert_content(&bench, name, len, &format!("after kill {round}"));
        }
        let places = places(&bench);
        let moving = places.iter().any(|place| place.2 > (2 * MIB + len) as u64);
        mid_way += u64::from(moving);
        if list(&bench)["free"].as_array().unwrap().len() == 1 && !moving {
            ended += 1;
            max_us = max_us * 9 / 10;
            assert_compact(&bench, len);
            fs::copy(bench.path("before.img"), bench.path("region.img")).unwrap();
        } else if !moving {
            max_us = (max_us * 5 / 4).min(10_000_000);
        }
    }
    println!("kills of compactions: {kills} kills, {ended} compactions ended, {mid_way} found mid way");
    assert!(mid_way > 0, "no kill has met a namespace on its way");
    bench.run(&args).succeeds();
    assert_compact(&bench, len);
    NAMES.iter().for_each(|name| assert_content(&bench, name, len, "at the end"));
}

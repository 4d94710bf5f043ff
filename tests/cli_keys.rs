//! The life of keys on the program: slots listed, added, tested, changed, removed; the namespace erased.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use common::{Bench, CHEAP_KDF, Run};

const KEY: [&str; 2] = ["--key-file", "vault.key"];
const DESK: [&str; 2] = ["--passphrase-file", "desk"];
const NEW_DESK: [&str; 2] = ["--new-passphrase-file", "desk"];

/// `vault.img` with the key file in slot 0, and files for further keys.
fn vault() -> Bench {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    for (name, content) in [("desk", &b"correct horse\n"[..]), ("other", b"battery staple"), ("second.key", &[8; 32])] {
        fs::write(bench.path(name), content).unwrap();
        fs::set_permissions(bench.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    bench
}

fn key(bench: &Bench, command: &str, more: &[&[&str]]) -> Run {
    bench.run(&[&["key", command, "vault.img"][..], &more.concat()].concat())
}

/// Runs it; `vault.img` must stay as it is.
#[track_caller]
fn refused(bench: &Bench, command: &str, more: &[&[&str]], code: i32, words: &[&str]) {
    let before = fs::read(bench.path("vault.img")).unwrap();
    key(bench, command, more).fails(code, words);
    assert!(fs::read(bench.path("vault.img")).unwrap() == before, "key {command} {more:?} changed the namespace");
}

fn with_input(mut command: Command, input: &[u8]) -> Run {
    let (reader, mut writer) = std::io::pipe().unwrap();
    command.stdin(reader);
    writer.write_all(input).unwrap();
    drop(writer);
    Run::of(command)
}

#[test]
fn a_slot_is_added_tested_changed_and_removed() {
    let bench = vault();
    let added = key(&bench, "add", &[&KEY, &NEW_DESK, &CHEAP_KDF, &["--label", "desk"]]).succeeds();
    assert_eq!(added.stdout.trim(), "added key slot 1");
    assert_eq!(key(&bench, "test", &[&DESK]).succeeds().stdout.trim(), "key slot 1 opens with it");
    assert_eq!(key(&bench, "test", &[&KEY]).succeeds().stdout.trim(), "key slot 0 opens with it");

    // Without --slot, the one that the present key opens is changed.
    let new = ["--new-passphrase-file", "other"];
    key(&bench, "change", &[&DESK, &new, &CHEAP_KDF]).succeeds();
    key(&bench, "test", &[&DESK]).fails(2, &["wrong passphrase"]);
    key(&bench, "test", &[&["--passphrase-file", "other"], &["--slot", "1"]]).succeeds();
    // With it, any present key will do.
    key(&bench, "change", &[&KEY, &NEW_DESK, &CHEAP_KDF, &["--slot", "1"]]).succeeds();
    key(&bench, "test", &[&DESK]).succeeds();

    key(&bench, "remove", &[&DESK, &["--slot", "0"]]).succeeds();
    key(&bench, "test", &[&KEY]).fails(2, &["no key slot is of that kind"]);
    bench.run(&[&["dmtable", "vault.img"][..], &DESK].concat()).succeeds();
}

#[test]
fn the_list_needs_no_key_and_shows_no_secret() {
    let bench = vault();
    key(&bench, "add", &[&KEY, &NEW_DESK, &CHEAP_KDF, &["--label", "desk", "--slot", "31"]]).succeeds();
    let text = key(&bench, "list", &[]).succeeds().stdout;
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.contains(" 0  key file, HKDF-SHA256"), "{text}");
    assert!(text.contains("31  passphrase, Argon2id with 8 MiB and 1 passes"), "{text}");
    let json = key(&bench, "list", &[&["--json"]]).succeeds().stdout;
    let slots: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(slots.as_array().unwrap().len(), 2);
    assert_eq!(slots[1]["id"], 31);
    assert_eq!(slots[1]["label"], "desk");
    assert_eq!(slots[1]["kdf"]["argon2id"]["memory_kib"], 8192);
    assert!(!json.contains("salt") && !json.contains("wrapped"), "{json}");
    let server = bench.serve("vault.img", &[]);
    key(&bench, "list", &[]).succeeds();
    refused(&bench, "add", &[&KEY, &NEW_DESK], 5, &["busy"]);
    server.stop();
}

#[test]
fn wrong_slots_are_refused() {
    let bench = vault();
    let add = |slot: &'static str| [&KEY[..], &["--new-key-file", "second.key", "--slot", slot]].concat();
    refused(&bench, "add", &[&add("0")], 1, &["key slot 0 is in use", "key list"]);
    refused(&bench, "add", &[&add("32")], 1, &["key slot 32 does not exist", "0 to 31"]);
    refused(&bench, "remove", &[&KEY, &["--slot", "7"]], 1, &["key slot 7 is empty"]);
    refused(&bench, "remove", &[&KEY, &["--slot", "99"]], 1, &["key slot 99 does not exist"]);
    refused(&bench, "change", &[&KEY, &["--new-key-file", "second.key", "--slot", "7"]], 1, &["slot 7 is empty"]);
    refused(&bench, "test", &[&KEY, &["--slot", "7"]], 1, &["key slot 7 is empty"]);
    refused(&bench, "add", &[&DESK, &["--new-key-file", "second.key"]], 2, &["no key slot is of that kind"]);
    refused(&bench, "add", &[&KEY, &["--new-key-file", "none.key"]], 1, &["none.key"]);
    for _ in 1..32 {
        key(&bench, "add", &[&KEY, &["--new-key-file", "second.key"]]).succeeds();
    }
    refused(&bench, "add", &[&KEY, &["--new-key-file", "second.key"]], 1, &["all 32 key slots are in use"]);
}

#[test]
fn the_last_slot_and_the_slot_in_use_go_by_force_only() {
    let bench = vault();
    refused(&bench, "remove", &[&KEY, &["--slot", "0"]], 1, &["key slot 0 is the last one", "try: --force"]);
    key(&bench, "add", &[&KEY, &["--new-key-file", "second.key"]]).succeeds();
    refused(&bench, "remove", &[&KEY, &["--slot", "0"]], 1, &["the key given here opens", "--force"]);
    key(&bench, "remove", &[&KEY, &["--slot", "0", "--force"]]).succeeds();
    key(&bench, "remove", &[&["--key-file", "second.key", "--slot", "1", "--force"]]).succeeds();
    key(&bench, "test", &[&KEY]).fails(3, &["no key slot", "erased"]);
}

#[test]
fn passphrases_come_from_standard_input_one_at_a_time() {
    let bench = vault();
    let add = [&["key", "add", "vault.img"][..], &KEY, &["--new-passphrase-file", "-"], &CHEAP_KDF].concat();
    with_input(bench.command(&add), b"correct horse\n").succeeds();
    key(&bench, "test", &[&DESK]).succeeds();
    let both = [&["--passphrase-file", "-"][..], &["--new-passphrase-file", "-"]];
    refused(&bench, "change", &both, 1, &["only one passphrase can come from standard input"]);
    refused(&bench, "add", &[&KEY], 1, &["cannot ask for a passphrase"]);
}

#[test]
fn erase_asks_for_the_label_and_leaves_no_header() {
    let bench = vault();
    let erase = || bench.command(&["erase", "vault.img"]);
    let before = fs::read(bench.path("vault.img")).unwrap();
    with_input(erase(), b"other\n").fails(1, &["type its label (vault)", "nothing was erased"]);
    with_input(erase(), b"").fails(1, &["nothing was erased"]);
    assert!(fs::read(bench.path("vault.img")).unwrap() == before);
    let run = with_input(erase(), b"vault\n").succeeds();
    assert!(run.stdout.contains("Backups of the header"), "{}", run.stdout);
    let after = fs::read(bench.path("vault.img")).unwrap();
    assert!(after[..2 << 20].iter().all(|&byte| byte == 0));
    assert!(after[2 << 20..] == before[2 << 20..], "the data area is not touched");
    bench.run(&["info", "vault.img"]).fails(3, &["not a daxcrypt namespace"]);
    bench.format("more.img", "4M", &[]);
    bench.run(&["erase", "more.img", "--yes"]).succeeds();
    bench.run(&["erase", "more.img", "--yes"]).fails(3, &["not a daxcrypt namespace"]);
}

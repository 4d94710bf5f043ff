//! The life of keys on the program: slots listed, added, tested, changed, removed; the namespace erased.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use common::{Bench, CHEAP_KDF, Run};

const KEY: [&str; 2] = ["--key-file", "vault.key"];
const DESK: [&str; 2] = ["--passphrase-file", "desk"];
const NEW_DESK: [&str; 2] = ["--new-passphrase-file", "desk"];

/// `vault.img` with the key file in slot 0, and files for further keys.
fn vault() -> Bench {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    for (name, content) in [("desk", &b"correct horse\n"[..]), ("other", b"battery staple"), ("second.key", &[8; 32])] {
        bench.secret(name, content);
    }
    bench
}

fn key(bench: &Bench, command: &str, more: &[&[&str]]) -> Run {
    bench.run(&[&["key", command, "vault.img"][..], &more.concat()].concat())
}

/// Runs it; `vault.img` must stay as it is.
#[track_caller]
fn refused(bench: &Bench, command: &str, more: &[&[&str]], code: i32, words: &[&str]) {
    bench.refused(&[&["key", command, "vault.img"][..], &more.concat()].concat(), code, words);
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
    Run::with_input(bench.command(&add), b"correct horse\n").succeeds();
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
    Run::with_input(erase(), b"other\n").fails(1, &["type its label (vault)", "nothing was erased"]);
    Run::with_input(erase(), b"").fails(1, &["nothing was erased"]);
    assert!(fs::read(bench.path("vault.img")).unwrap() == before);
    let run = Run::with_input(erase(), b"vault\n").succeeds();
    assert!(run.stdout.contains("Backups of the header"), "{}", run.stdout);
    let after = fs::read(bench.path("vault.img")).unwrap();
    assert!(after[..2 << 20].iter().all(|&byte| byte == 0));
    assert!(after[2 << 20..] == before[2 << 20..], "the data area is not touched");
    bench.run(&["info", "vault.img"]).fails(3, &["not a daxcrypt namespace"]);
    bench.format("more.img", "4M", &[]);
    bench.run(&["erase", "more.img", "--yes"]).succeeds();
    bench.run(&["erase", "more.img", "--yes"]).fails(3, &["not a daxcrypt namespace"]);
}

#[test]
fn a_removed_or_changed_slot_leaves_no_byte_behind() {
    let bench = vault();
    key(&bench, "add", &[&KEY, &NEW_DESK, &CHEAP_KDF]).succeeds();
    // What only slot 1 holds: hexadecimal strings of its metadata, in both copies.
    let of_slot = |id: u64| -> Vec<String> {
        let bytes = fs::read(bench.path("vault.img")).unwrap();
        let start = 128;
        let len = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
        let metadata: serde_json::Value = serde_json::from_slice(&bytes[start..start + len]).unwrap();
        let slot = metadata["slots"].as_array().unwrap().iter().find(|slot| slot["id"] == id).unwrap().clone();
        ["salt", "nonce", "wrapped", "rewrap"].map(|field| slot[field].as_str().unwrap().to_owned()).into()
    };
    let left = |strings: &[String]| {
        let bytes = fs::read(bench.path("vault.img")).unwrap();
        let found = |text: &String| bytes.windows(text.len()).filter(|window| *window == text.as_bytes()).count();
        strings.iter().map(found).sum::<usize>()
    };
    let first = of_slot(1);
    assert_eq!(left(&first), 8, "four strings in two copies");
    key(&bench, "change", &[&KEY, &["--new-passphrase-file", "other", "--slot", "1"], &CHEAP_KDF]).succeeds();
    assert_eq!(left(&first), 0);
    let second = of_slot(1);
    assert_eq!(left(&second), 8);
    key(&bench, "remove", &[&KEY, &["--slot", "1"]]).succeeds();
    assert_eq!(left(&second), 0);
}

#[test]
fn a_recovery_phrase_is_printed_once_and_opens_its_slot() {
    let bench = vault();
    let added = key(&bench, "add", &[&KEY, &["--recovery-key"]]).succeeds().stdout;
    let phrase = added.lines().nth(1).unwrap();
    assert_eq!((phrase.len(), phrase.split('-').count()), (47, 8), "{added}");
    bench.secret("phrase", phrase.as_bytes());
    let test = key(&bench, "test", &[&["--passphrase-file", "phrase"]]).succeeds();
    assert_eq!(test.stdout.trim(), "key slot 1 opens with it");
    assert!(key(&bench, "list", &[]).succeeds().stdout.contains("(recovery)"));
    let made =
        bench.run(&["format", "two.img", "--size", "4M", "--key-file", "vault.key", "--recovery-key"]).succeeds();
    let other = made.stdout.lines().nth(2).unwrap().to_owned();
    assert_ne!(other, phrase);
    bench.secret("other.phrase", other.as_bytes());
    bench.run(&["key", "test", "two.img", "--passphrase-file", "other.phrase"]).succeeds();
    bench.run(&["key", "test", "two.img", "--key-file", "vault.key"]).succeeds();
    refused(&bench, "add", &[&KEY, &NEW_DESK, &["--recovery-key"]], 1, &["cannot be used with"]);
}

#[test]
fn a_recovery_phrase_that_nobody_has_read_makes_no_slot() {
    let bench = vault();
    let before = fs::read(bench.path("vault.img")).unwrap();
    let add = ["key", "add", "vault.img", KEY[0], KEY[1], "--recovery-key"];
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    for stdout in [Stdio::from(writer), Stdio::from(full)] {
        let mut command = bench.command(&add);
        let output = command.stdout(stdout).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        assert!(fs::read(bench.path("vault.img")).unwrap() == before, "no slot was made");
    }
    // A file keeps it, and a terminal has shown it (tests/cli_prompt.rs).
    let kept = fs::File::create(bench.path("kept")).unwrap();
    assert!(bench.command(&add).stdout(kept).status().unwrap().success());
    let phrase = fs::read_to_string(bench.path("kept")).unwrap().lines().nth(1).unwrap().to_owned();
    bench.secret("phrase", phrase.as_bytes());
    key(&bench, "test", &[&["--passphrase-file", "phrase"]]).succeeds();
}

#[test]
fn a_recovery_phrase_is_taken_as_people_type_it_and_a_passphrase_as_it_is() {
    let bench = vault();
    let added = key(&bench, "add", &[&KEY, &["--recovery-key"]]).succeeds().stdout;
    let phrase = added.lines().nth(1).unwrap();
    let typed = phrase.replace('-', " ").to_uppercase();
    bench.secret("typed", typed.as_bytes());
    let test = key(&bench, "test", &[&["--passphrase-file", "typed"]]).succeeds();
    assert_eq!(test.stdout.trim(), "key slot 1 opens with it");
    bench.secret("wrong", typed.replace(&typed[..5], "AAAAA").as_bytes());
    key(&bench, "test", &[&["--passphrase-file", "wrong"]]).fails(2, &["wrong passphrase"]);
    // The slot that a relocation makes of it opens with what is on the paper.
    let relocate = ["relocate", "vault.img", "moved.img", "--passphrase-file", "typed", "--drop-slots"];
    bench.run(&relocate).succeeds();
    bench.secret("phrase", phrase.as_bytes());
    bench.run(&["key", "test", "moved.img", "--passphrase-file", "phrase"]).succeeds();
    // A passphrase that only looks like one keeps its capitals.
    let add = [&["--passphrase-file", "phrase", "--new-passphrase-file", "typed"][..], &CHEAP_KDF].concat();
    bench.run(&[&["key", "add", "moved.img"][..], &add].concat()).succeeds();
    bench.run(&["key", "remove", "moved.img", "--passphrase-file", "typed", "--slot", "0", "--force"]).succeeds();
    bench.run(&["key", "test", "moved.img", "--passphrase-file", "typed"]).succeeds();
    bench.run(&["key", "test", "moved.img", "--passphrase-file", "phrase"]).fails(2, &["wrong passphrase"]);
}

#[test]
fn a_changed_slot_keeps_its_cost_and_weak_keys_get_a_word() {
    let bench = vault();
    let cost = |slot: usize| {
        let list: serde_json::Value =
            serde_json::from_str(&key(&bench, "list", &[&["--json"]]).succeeds().stdout).unwrap();
        list[slot]["kdf"]["argon2id"].clone()
    };
    bench.secret("one", b"first");
    bench.secret("two", b"second");
    let dear = ["--new-passphrase-file", "one", "--kdf-memory", "300M", "--kdf-time", "1"];
    key(&bench, "add", &[&KEY, &dear]).succeeds();
    let added = cost(1);
    assert_eq!(added["memory_kib"], 300 << 10);
    key(&bench, "change", &[&KEY, &["--slot", "1", "--new-passphrase-file", "two"]]).succeeds();
    assert_eq!(cost(1), added);
    let cheaper = ["--slot", "1", "--new-passphrase-file", "one", "--kdf-memory", "8M"];
    let run = key(&bench, "change", &[&KEY, &cheaper]).succeeds();
    assert_eq!((cost(1)["memory_kib"].as_u64(), run.stderr.as_str()), (Some(8 << 10), ""));
    let cheapest = ["--slot", "1", "--new-passphrase-file", "two", "--kdf-memory", "8K"];
    let run = key(&bench, "change", &[&KEY, &cheapest]).succeeds();
    assert!(run.stderr.contains("makes guessing cheap"), "{}", run.stderr);
    // Such a slot is for what a machine made up: whatever else it gets is to be guarded as any passphrase.
    key(&bench, "change", &[&KEY, &["--slot", "1", "--new-passphrase-file", "one"]]).succeeds();
    assert_eq!(cost(1)["memory_kib"], 256 << 10);

    bench.secret("zeros", &[0; 64]);
    let run = key(&bench, "add", &[&KEY, &["--new-key-file", "zeros"]]).succeeds();
    assert!(run.stderr.contains("every byte of zeros is the same"), "{}", run.stderr);
    assert_eq!(key(&bench, "test", &[&["--key-file", "zeros"]]).succeeds().stderr, "", "it is told once");
}

#[test]
fn info_tells_of_copies_that_differ() {
    let bench = vault();
    let before = fs::read(bench.path("vault.img")).unwrap();
    key(&bench, "add", &[&KEY, &["--recovery-key"]]).succeeds();
    // A power cut between the two copies.
    let image = fs::File::options().write(true).open(bench.path("vault.img")).unwrap();
    let older = if before[24] < fs::read(bench.path("vault.img")).unwrap()[24] { 256 << 10 } else { 0 };
    image.write_all_at(&before[older..older + (64 << 10)], older as u64).unwrap();
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(info.contains("two copies of the header differ"), "{info}");
    key(&bench, "add", &[&KEY, &["--recovery-key"]]).succeeds();
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(!info.contains("differ"), "{info}");
}

#[test]
fn a_volume_key_in_escrow_unlocks_when_no_slot_does() {
    let bench = vault();
    let dump = ["--volume-key-file", "vault.escrow"];
    let run = key(&bench, "dump", &[&KEY, &dump]).succeeds();
    assert!(run.stderr.contains("vault.escrow decrypts everything"), "{}", run.stderr);
    let escrow = fs::read(bench.path("vault.escrow")).unwrap();
    assert_eq!(escrow.len(), 64);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(bench.path("vault.escrow")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let line = bench.run(&["dmtable", "vault.img", "--key-file", "vault.key", "--show-key"]).succeeds().stdout;
    let hex: String = escrow.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(line.contains(&hex), "the file is dm-crypt's key");
    refused(&bench, "dump", &[&KEY, &dump], 1, &["vault.escrow", "exists"]);

    key(&bench, "remove", &[&KEY, &["--slot", "0", "--force"]]).succeeds();
    let by_escrow = ["--escrow-file", "vault.escrow"];
    assert!(key(&bench, "test", &[&by_escrow]).succeeds().stdout.contains("the volume key is that"));
    key(&bench, "add", &[&by_escrow, &["--new-key-file", "second.key"]]).succeeds();
    key(&bench, "test", &[&["--key-file", "second.key"]]).succeeds();
    refused(&bench, "change", &[&by_escrow, &["--new-key-file", "vault.key"]], 1, &["--slot"]);

    bench.secret("wrong.escrow", &(0..64).collect::<Vec<u8>>());
    refused(&bench, "test", &[&["--escrow-file", "wrong.escrow"]], 2, &["not the volume key of this namespace"]);
    bench.secret("short.escrow", &[1; 31]);
    refused(&bench, "test", &[&["--escrow-file", "short.escrow"]], 1, &["31 bytes"]);
    bench.run(&["format", "new.img", "--size", "4M", "--escrow-file", "vault.escrow"]).fails(1, &["cannot be the key"]);
}

#[test]
fn the_volume_key_can_be_specified_in_the_words_of_mktme() {
    let bench = vault();
    let (key_half, tweak_half) = ("000102030405060708090a0b0c0d0e0f", "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff");
    let format = ["format", "mk.img", "--size", "4M", "--key-file", "vault.key", "--key-spec", "spec"];
    bench.secret("spec", format!("type=user algorithm=aes-xts-128 key={key_half} tweak={tweak_half}\n").as_bytes());
    assert!(bench.run(&format).succeeds().stdout.contains("aes-128-xts"));
    let line = bench.run(&["dmtable", "mk.img", "--key-file", "vault.key", "--show-key"]).succeeds().stdout;
    assert!(line.contains(&format!(" {key_half}{tweak_half} ")), "{line}");

    bench.secret("spec", format!("type=cpu algorithm=aes-xts-256 key={}", "ff".repeat(32)).as_bytes());
    let force = [&format[..], &["--force"]].concat();
    let mut keys = Vec::new();
    for _ in 0..2 {
        assert!(bench.run(&force).succeeds().stdout.contains("aes-256-xts"));
        keys.push(bench.run(&["dmtable", "mk.img", "--key-file", "vault.key", "--show-key"]).succeeds().stdout);
    }
    assert_ne!(keys[0], keys[1], "entropy does not make it less random");
    assert!(!keys[0].contains(&"ff".repeat(32)));

    let before = fs::read(bench.path("mk.img")).unwrap();
    for (spec, word) in [
        ("type=user algorithm=aes-xts-128 tweak=00", "option `key` is missing"),
        ("type=user type=cpu", "option `type` is repeated"),
        ("type=user algorithm=null", "option `algorithm`"),
        ("type=user algorithm=aes-xts-128 key=00 tweak=01", "option `key` has 2 digits"),
        ("type=user iv=3", "word 2"),
        ("type=gpu algorithm=aes-xts-128", "option `type` must be user or cpu"),
        (&format!("type=user algorithm=aes-xts-128 key={key_half}"), "option `tweak` is missing"),
        (&format!("type=cpu algorithm=aes-xts-128 tweak={}", "0g".repeat(16)), "option `tweak` must be hexadecimal"),
        (&format!("type=cpu algorithm=aes-xts-256 key={key_half}"), "option `key` has 32 digits"),
        (&format!("type=user algorithm=aes-xts-128 key={key_half} tweak={key_half}"), "options `key` and `tweak`"),
        ("", "option `type` is missing"),
    ] {
        bench.secret("spec", spec.as_bytes());
        bench.run(&force).fails(1, &["key specification spec", word]);
    }
    bench.run(&[&force[..], &["--cipher", "aes-128-xts"]].concat()).fails(1, &["cannot be used with"]);
    assert!(fs::read(bench.path("mk.img")).unwrap() == before);
}

#[test]
fn an_ephemeral_namespace_needs_no_key_and_forgets() {
    let bench = vault();
    bench.run(&["format", "swap.img", "--size", "4M", "--ephemeral"]).succeeds();
    assert!(bench.run(&["info", "swap.img"]).succeeds().stdout.contains("ephemeral"));
    let socket = bench.path("swap.sock");
    let serve = ["serve", "swap.img", "--socket", socket.to_str().unwrap()];
    let mut contents = Vec::new();
    for _ in 0..2 {
        let server = common::Server::start(bench.command(&serve), socket.clone());
        common::tool("nbdcopy", &[server.uri("swap"), bench.path("out.img").to_str().unwrap().to_owned()]);
        contents.push(fs::read(bench.path("out.img")).unwrap());
        fs::remove_file(bench.path("out.img")).unwrap();
        server.stop();
    }
    assert_ne!(contents[0], contents[1], "each opening has another key");
    let dump = ["key", "dump", "swap.img", "--volume-key-file", "swap.escrow"];
    bench.run(&dump).fails(1, &["it is ephemeral"]);
    assert!(!bench.path("swap.escrow").exists());
    bench.run(&["key", "add", "swap.img", "--new-key-file", "second.key"]).fails(1, &["ephemeral"]);
    bench.run(&["key", "test", "swap.img", "--key-file", "vault.key"]).fails(1, &["ephemeral", "without a key"]);
    bench
        .run(&["format", "x.img", "--size", "4M", "--ephemeral", "--key-file", "vault.key"])
        .fails(1, &["cannot be used with"]);
}

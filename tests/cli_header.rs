//! Headers on the program: backup, restore, inspect, detached ones, and the end of a namespace.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::{Bench, Run, Server, noise, tool};

const MIB: usize = 1 << 20;
const KEY: [&str; 2] = ["--key-file", "vault.key"];
/// Exit code of a copy that was chosen although it is not genuine.
const WRONG_COPY: i32 = 3;
const HEADER: [&str; 2] = ["--header", "vault.header"];

fn vault() -> Bench {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    bench.secret("second.key", &[8; 32]);
    bench
}

fn inspect(bench: &Bench, path: &str) -> serde_json::Value {
    serde_json::from_str(&bench.run(&["header", "inspect", path, "--json"]).succeeds().stdout).unwrap()
}

#[test]
fn a_backup_brings_an_erased_namespace_back() {
    let bench = vault();
    let made = bench.run(&["header", "backup", "vault.img", "vault.backup"]).succeeds();
    assert!(made.stdout.contains("keep it as a key"), "{}", made.stdout);
    let metadata = fs::metadata(bench.path("vault.backup")).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (65536, 0o600));
    bench.run(&["header", "backup", "vault.img", "vault.backup"]).fails(1, &["vault.backup", "exists"]);
    assert_eq!(inspect(&bench, "vault.backup")[0]["header"]["label"], "vault");

    let restore = ["header", "restore", "vault.img", "vault.backup", "--key-file", "vault.key"];
    bench.run(&["erase", "vault.img", "--yes"]).succeeds();
    bench.refused(&[&restore[..4], &["--key-file", "second.key"]].concat(), 2, &["none of 1 key slots"]);
    bench.run(&restore).succeeds();
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
    // A removed slot comes back with a backup: this is what the warning is about.
    bench.run(&["key", "add", "vault.img", KEY[0], KEY[1], "--new-key-file", "second.key"]).succeeds();
    bench.run(&["key", "remove", "vault.img", "--key-file", "second.key", "--slot", "0"]).succeeds();
    let words = ["slot 0 removed since would open it again", "slot 1 made since would not", "--replace-slots"];
    bench.refused(&restore, 1, &words);
    bench.run(&[&restore[..], &["--replace-slots"]].concat()).succeeds();
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
    bench.run(&["key", "test", "vault.img", "--key-file", "second.key"]).fails(2, &["none of 1"]);
}

#[test]
fn a_backup_takes_back_neither_discards_nor_growth() {
    let bench = vault();
    bench.run(&["header", "backup", "vault.img", "vault.backup"]).succeeds();
    let restore = ["header", "restore", "vault.img", "vault.backup", KEY[0], KEY[1]];
    let server = bench.serve("vault.img", &["--allow-discards"]);
    server.stop();
    let header = |path: &str| inspect(&bench, path)[0]["header"].clone();
    assert_eq!((&header("vault.backup")["discards"], &header("vault.img")["discards"]), (&false.into(), &true.into()));
    bench.run(&restore).succeeds();
    assert_eq!(header("vault.img")["discards"], true, "holes are zeroes for ever");
    bench.run(&["resize", "vault.img", "--size", "8M", KEY[0], KEY[1]]).succeeds();
    bench.refused(&restore, 1, &["8388608 bytes", "had 4194304", "would be lost"]);
}

#[test]
fn force_keeps_what_it_replaces_and_asks() {
    let bench = vault();
    bench.format("other.img", "4M", &[]);
    bench.run(&["header", "backup", "other.img", "other.backup"]).succeeds();
    let force = ["header", "restore", "vault.img", "other.backup", "--force"];
    let before = fs::read(bench.path("vault.img")).unwrap();
    for answer in [&b"no\n"[..], b""] {
        Run::with_input(bench.command(&force), answer).fails(1, &["type yes", "was not replaced"]);
        assert!(fs::read(bench.path("vault.img")).unwrap() == before && !bench.path("other.backup.replaced").exists());
    }
    Run::with_input(bench.command(&force), b"yes\n").succeeds();
    bench.refused(&[&force[..], &["--yes"]].concat(), 1, &["other.backup.replaced", "exists"]);
    // What was replaced is a backup like any other.
    let back = ["header", "restore", "vault.img", "other.backup.replaced", "--force", "--yes", "--save", "second"];
    bench.run(&back).succeeds();
    assert!(fs::read(bench.path("vault.img")).unwrap()[..65536] == before[..65536]);
    // What is no header is kept whole.
    let mut damaged = before.clone();
    (damaged[200], damaged[(256 << 10) + 200]) = (0, 0);
    fs::write(bench.path("vault.img"), &damaged).unwrap();
    bench.run(&[&force[..], &["--yes", "--save", "area"]].concat()).succeeds();
    assert!(fs::read(bench.path("area")).unwrap() == damaged[..2 * MIB]);
}

#[test]
fn a_backup_within_a_rekey_is_refused() {
    let bench = vault();
    let mut rekey = bench.under_way(&["rekey", "vault.img", KEY[0], KEY[1], "--max-rate", "1K", "--json"]);
    rekey.kill().unwrap();
    rekey.wait().unwrap();
    bench.run(&["header", "backup", "vault.img", "vault.backup"]).fails(1, &["re-key is under way", "--resume"]);
    bench.run(&["rekey", "vault.img", KEY[0], KEY[1], "--resume"]).succeeds();
    let made = bench.run(&["header", "backup", "vault.img", "vault.backup"]).succeeds().stdout;
    assert!(made.contains("until the next re-key"), "{made}");
}

/// Puts a copy with a greater sequence number beside the header: `change` is made to its metadata, under a CRC that is right
/// and a MAC that is not.
fn forge_newer_copy(bench: &Bench, change: impl Fn(&mut serde_json::Value)) -> (&'static str, &'static str) {
    let mut image = fs::read(bench.path("vault.img")).unwrap();
    let sequence = |at: usize| u64::from_le_bytes(image[at + 24..at + 32].try_into().unwrap());
    let newest = sequence(0).max(sequence(256 << 10));
    let mut copy = image[..65536].to_vec();
    let len = u32::from_le_bytes(copy[16..20].try_into().unwrap()) as usize;
    let mut metadata = serde_json::from_slice(&copy[128..128 + len]).unwrap();
    change(&mut metadata);
    let text = serde_json::to_vec(&metadata).unwrap();
    copy[128..].fill(0);
    copy[128..128 + text.len()].copy_from_slice(&text);
    copy[16..20].copy_from_slice(&u32::try_from(text.len()).unwrap().to_le_bytes());
    copy[24..32].copy_from_slice(&(newest + 5).to_le_bytes());
    copy[20..24].fill(0);
    let crc = crc32fast::hash(&copy[..128 + text.len()]);
    copy[20..24].copy_from_slice(&crc.to_le_bytes());
    image[256 << 10..][..65536].copy_from_slice(&copy);
    fs::write(bench.path("vault.img"), image).unwrap();
    ("A", "B")
}

#[test]
fn a_forged_copy_is_told_and_the_genuine_one_chosen() {
    let slots = |metadata: &mut serde_json::Value| metadata["slots"][0]["wrapped"] = "00".repeat(80).into();
    let label = |metadata: &mut serde_json::Value| metadata["label"] = "theirs".into();
    let gone = |metadata: &mut serde_json::Value| metadata["slots"] = serde_json::json!([]);
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let changes: [(Change<'_>, &str); 3] = [(&slots, "not_opened"), (&label, "forged"), (&gone, "not_opened")];
    for (change, verdict) in changes {
        let bench = vault();
        bench.run(&["key", "dump", "vault.img", KEY[0], KEY[1], "--volume-key-file", "escrow"]).succeeds();
        bench.run(&["header", "backup", "vault.img", "vault.backup"]).succeeds();
        let (genuine, forged) = forge_newer_copy(&bench, change);
        let words = ["header copy B is the newer one", "copy A opens and is genuine", "header repair vault.img"];
        bench.refused(&["key", "test", "vault.img", KEY[0], KEY[1]], 3, &words);
        bench.refused(&["serve", "vault.img", "--socket", "s", "--escrow-file", "escrow"], 3, &words[..2]);
        // Another key says nothing of either.
        let other = ["key", "test", "vault.img", "--key-file", "second.key"];
        assert!(!bench.run(&other).stderr.contains("genuine"));

        let repair = ["header", "repair", "vault.img", KEY[0], KEY[1]];
        let json: serde_json::Value =
            serde_json::from_str(&bench.run(&[&repair[..], &["--json"]].concat()).succeeds().stdout).unwrap();
        assert_eq!((&json[0]["proof"], &json[1]["proof"]), (&"genuine".into(), &verdict.into()), "{json}");
        assert_eq!((&json[0]["slot"], &json[0]["copy"]), (&0.into(), &"A".into()), "{json}");
        bench.refused(&[&repair[..], &["--copy", forged]].concat(), WRONG_COPY, &["copy A opens and is genuine"]);
        let unanswered = Run::with_input(bench.command(&repair), b"\n");
        assert!(unanswered.stdout.contains("genuine: key slot 0 opens"), "{}", unanswered.stdout);
        unanswered.fails(1, &["was not replaced"]);
        bench.run(&[&repair[..4], &[KEY[1], "--copy", genuine]].concat()).succeeds();
        bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
        let copies = inspect(&bench, "vault.img");
        assert_eq!(copies[0]["header"], copies[1]["header"]);
        assert_eq!(copies[0]["header"]["label"], "vault");

        // A backup is as good a way out.
        forge_newer_copy(&bench, label);
        bench.run(&["header", "restore", "vault.img", "vault.backup", KEY[0], KEY[1]]).succeeds();
        bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
        assert_eq!(inspect(&bench, "vault.img")[1]["header"]["label"], "vault");
    }
}

#[test]
fn a_key_that_was_removed_is_wrong_and_no_proof_of_a_forgery() {
    let bench = vault();
    bench.run(&["key", "add", "vault.img", KEY[0], KEY[1], "--new-key-file", "second.key"]).succeeds();
    let before = fs::read(bench.path("vault.img")).unwrap();
    bench.run(&["key", "remove", "vault.img", "--key-file", "second.key", "--slot", "0"]).succeeds();
    // The update was cut between its two copies.
    let mut image = fs::read(bench.path("vault.img")).unwrap();
    image[..65536].copy_from_slice(&before[..65536]);
    fs::write(bench.path("vault.img"), image).unwrap();
    bench.refused(&["key", "test", "vault.img", KEY[0], KEY[1]], 2, &["wrong passphrase or key file"]);
    bench.run(&["key", "test", "vault.img", "--key-file", "second.key"]).succeeds();
}

/// Two clones were changed apart, and somebody mixed their headers.
#[test]
fn copies_of_one_sequence_with_different_contents_are_told() {
    let bench = vault();
    fs::copy(bench.path("vault.img"), bench.path("clone.img")).unwrap();
    for (image, label) in [("vault.img", "one"), ("clone.img", "two")] {
        let add = ["key", "add", image, KEY[0], KEY[1], "--new-key-file", "second.key", "--label", label];
        bench.run(&add).succeeds();
    }
    let mut image = fs::read(bench.path("vault.img")).unwrap();
    let clone = fs::read(bench.path("clone.img")).unwrap();
    image[256 << 10..320 << 10].copy_from_slice(&clone[256 << 10..320 << 10]);
    fs::write(bench.path("vault.img"), image).unwrap();
    let said = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(said.contains("header copy B is not usable: it has the sequence of copy A, but another content"), "{said}");
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
    bench.run(&["key", "remove", "vault.img", KEY[0], KEY[1], "--slot", "1"]).succeeds();
    assert!(!bench.run(&["info", "vault.img"]).succeeds().stdout.contains("warning"), "an update writes both");
}

#[test]
fn a_detached_header_that_was_lost_is_restored_to_a_file_that_is_made() {
    let bench = detached();
    bench.run(&["header", "backup", "data.img", "data.backup", HEADER[0], HEADER[1]]).succeeds();
    let restore = [&["header", "restore", "data.img", "data.backup"][..], &HEADER].concat();
    let with = |key: &'static str| [&restore[..], &["--key-file", key]].concat();
    fs::remove_file(bench.path("vault.header")).unwrap();
    bench.run(&with("second.key")).fails(2, &["wrong passphrase"]);
    assert!(!bench.path("vault.header").exists(), "what was made for nothing is gone");
    bench.run(&with("vault.key")).succeeds();
    let metadata = fs::metadata(bench.path("vault.header")).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (2 << 20, 0o600));
    bench.run(&[&["key", "test", "data.img"][..], &HEADER, &KEY].concat()).succeeds();
    for len in [0, 4096] {
        fs::File::options().write(true).open(bench.path("vault.header")).unwrap().set_len(len).unwrap();
        bench.run(&with("vault.key")).succeeds();
        bench.run(&[&["key", "test", "data.img"][..], &HEADER, &KEY].concat()).succeeds();
    }
    fs::remove_file(bench.path("vault.header")).unwrap();
    bench.run(&[&restore[..], &["--force"]].concat()).succeeds();
    bench.run(&[&["key", "test", "data.img"][..], &HEADER, &KEY].concat()).succeeds();
}

#[test]
fn a_detached_header_and_an_attached_one_are_never_in_one_place() {
    let bench = vault();
    let format = [&["format", "vault.img"][..], &HEADER, &["--key-file", "second.key"]].concat();
    bench.refused(&format, 1, &["a daxcrypt namespace", "--force"]);
    bench.run(&[&format[..], &["--force"]].concat()).succeeds();
    let head = fs::read(bench.path("vault.img")).unwrap()[..2 * MIB].to_vec();
    assert!(head.iter().all(|&byte| byte == 0), "the attached header and its keys are gone");
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).fails(3, &["not a daxcrypt namespace"]);

    // Other data than that of the header, which tells what it is.
    let key = [&HEADER[..], &["--key-file", "second.key"]].concat();
    let foreign: [(usize, &[u8], &str); 4] = [
        (0, b"DAXCRYPT", "a daxcrypt namespace"),
        (256 << 10, b"DAXCRYPT", "a daxcrypt namespace"),
        (0, b"LUKS\xba\xbe", "a LUKS volume"),
        (512, b"EFI PART", "a GPT"),
    ];
    for (at, magic, name) in foreign {
        let mut data = fs::read(bench.path("vault.img")).unwrap();
        data[..2 * MIB].fill(0);
        data[at..at + magic.len()].copy_from_slice(magic);
        fs::write(bench.path("vault.img"), data).unwrap();
        let serve = [&["serve", "vault.img", "--socket", "s"][..], &key].concat();
        bench.refused(&serve, 3, &[name, "the detached header belongs to other data"]);
    }
}

#[test]
fn erase_does_not_claim_data_that_is_elsewhere() {
    let bench = detached();
    let erase = ["erase", "vault.header", "--yes", "--wipe-data"];
    bench.refused(&erase, 1, &["its data is not there", "erase DATA --header vault.header --wipe-data"]);
    bench.run(&[&["key", "test", "data.img"][..], &HEADER, &KEY].concat()).succeeds();
    bench.run(&erase[..3]).succeeds();
    assert!(fs::read(bench.path("vault.header")).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn a_backup_from_before_a_rekey_is_refused() {
    let bench = vault();
    bench.run(&["header", "backup", "vault.img", "vault.backup"]).succeeds();
    bench.run(&["rekey", "vault.img", KEY[0], KEY[1]]).succeeds();
    let restore = ["header", "restore", "vault.img", "vault.backup", KEY[0], KEY[1]];
    bench.refused(&restore, 1, &["re-keyed since the backup", "keep the header that is there"]);
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
}

#[test]
fn a_backup_of_another_namespace_or_place_is_refused() {
    let bench = vault();
    bench.format("other.img", "4M", &[]);
    bench.format("larger.img", "8M", &[]);
    bench.run(&["header", "backup", "other.img", "other.backup"]).succeeds();
    bench.run(&["header", "backup", "larger.img", "larger.backup"]).succeeds();
    let restore = |backup: &'static str| vec!["header", "restore", "vault.img", backup, KEY[0], KEY[1]];
    bench.refused(&restore("other.backup"), 1, &["of namespace", "but the header here is that of", "--force"]);
    bench.refused(&restore("none.backup"), 1, &["none.backup", "No such file"]);
    fs::write(bench.path("short.backup"), b"DAXCRYPT").unwrap();
    bench.refused(&restore("short.backup"), 3, &["65536 bytes, but this one has 8"]);
    let mut damaged = fs::read(bench.path("other.backup")).unwrap();
    damaged[200] ^= 1;
    fs::write(bench.path("damaged.backup"), damaged).unwrap();
    bench.refused(&restore("damaged.backup"), 3, &["CRC-32"]);
    bench.refused(
        &[&restore("larger.backup")[..], &["--force", "--yes"]].concat(),
        3,
        &["geometry", "needs 10485760 bytes"],
    );
    // By force, without a key.
    bench.run(&["header", "restore", "vault.img", "other.backup", "--force", "--yes"]).succeeds();
    let uuid = |path: &str| inspect(&bench, path)[0]["header"]["uuid"].clone();
    assert_eq!(uuid("vault.img"), uuid("other.img"));
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
}

#[test]
fn inspect_tells_what_each_copy_says() {
    let bench = vault();
    let mut bytes = fs::read(bench.path("vault.img")).unwrap();
    bytes[4096] ^= 1; // behind the metadata: ignored
    bytes[200] ^= 1;
    fs::write(bench.path("vault.img"), bytes).unwrap();
    let copies = inspect(&bench, "vault.img");
    assert!(copies[0]["fault"].as_str().unwrap().contains("CRC-32"), "{copies}");
    assert_eq!(copies[1]["header"]["size_bytes"], 4 << 20);
    let text = bench.run(&["header", "inspect", "vault.img"]).succeeds().stdout;
    assert!(text.contains("copy A\n  not usable: its CRC-32") && text.contains("copy B\n  label"), "{text}");
    for secret in ["salt", "nonce", "wrapped"] {
        assert!(!text.contains(secret) && !copies.to_string().contains(secret));
    }
}

/// A namespace of 4 MiB with a detached header.
fn detached() -> Bench {
    let bench = vault();
    let format = ["format", "data.img", "--size", "4M"];
    bench.run(&[&format[..], &HEADER, &KEY].concat()).succeeds();
    bench
}

fn serve(bench: &Bench, args: &[&str]) -> Server {
    let socket = bench.path("data.sock");
    let listen = ["--socket", socket.to_str().unwrap()];
    Server::start(bench.command(&[&["serve", "data.img"][..], args, &listen].concat()), socket.clone())
}

#[test]
fn a_detached_header_leaves_nothing_but_ciphertext_in_the_backing() {
    let bench = detached();
    let fresh = fs::read(bench.path("data.img")).unwrap();
    assert_eq!(fresh.len(), 4 * MIB + 4096);
    let (data, tag_page) = fresh.split_at(4 * MIB);
    assert!(data.iter().all(|&byte| byte == 0), "nothing is written there yet");
    assert!(
        tag_page.chunks(16).all(|block| block.iter().any(|&byte| byte != 0)),
        "the page of the tag looks like data"
    );
    fs::write(bench.path("in.img"), noise(5, 4 * MIB)).unwrap();
    let server = serve(&bench, &[&HEADER[..], &KEY].concat());
    tool("nbdcopy", &[bench.path("in.img").to_str().unwrap(), &server.uri("data")]);
    // The header's file is in use as well.
    bench
        .run(&[&["key", "add", "data.img"][..], &HEADER, &KEY, &["--new-key-file", "second.key"]].concat())
        .fails(5, &["busy"]);
    server.stop();
    let ciphertext = fs::read(bench.path("data.img")).unwrap();
    for magic in [&b"DAXCRYPT"[..], b"data"] {
        assert!(!ciphertext.windows(magic.len()).any(|window| window == magic));
    }
    // The first unit is at byte 0 and has tweak 0, as in a LUKS2 volume with a detached header.
    let table = bench.run(&[&["dmtable", "data.img"][..], &HEADER, &KEY].concat()).succeeds().stdout;
    assert_eq!(table.trim(), "0 8192 crypt aes-xts-plain64 KEY 0 data.img 0 1 sector_size:4096");
    let server = serve(&bench, &[&HEADER[..], &KEY, &["--read-only"]].concat());
    tool("nbdcopy", &[&server.uri("data"), bench.path("out.img").to_str().unwrap()]);
    server.stop();
    assert!(fs::read(bench.path("out.img")).unwrap() == fs::read(bench.path("in.img")).unwrap());
}

#[test]
fn every_command_takes_a_detached_header() {
    let bench = detached();
    let run = |args: &[&str]| bench.run(&[args, &HEADER].concat());
    let info = run(&["info", "data.img"]).succeeds().stdout;
    assert!(info.contains("header in      vault.header") && info.contains("detached"), "{info}");
    run(&["key", "add", "data.img", KEY[0], KEY[1], "--new-key-file", "second.key"]).succeeds();
    assert_eq!(run(&["key", "list", "data.img"]).succeeds().stdout.lines().count(), 2);
    run(&["key", "test", "data.img", "--key-file", "second.key"]).succeeds();
    run(&["header", "backup", "data.img", "data.backup"]).succeeds();
    run(&["erase", "data.img", "--yes"]).succeeds();
    assert!(fs::read(bench.path("vault.header")).unwrap().iter().all(|&byte| byte == 0));
    run(&["header", "restore", "data.img", "data.backup", KEY[0], KEY[1]]).succeeds();
    run(&["key", "test", "data.img", KEY[0], KEY[1]]).succeeds();
}

#[test]
fn the_wrong_header_file_is_told() {
    let bench = detached();
    bench.run(&["info", "data.img"]).fails(3, &["data.img", "not a daxcrypt namespace"]);
    bench.run(&["info", "vault.header"]).fails(3, &["this is a detached header", "--header"]);
    bench.run(&["info", "data.img", "--header", "vault.img"]).fails(3, &["not a detached one"]);
    bench.run(&["info", "data.img", "--header", "none"]).fails(1, &["cannot open none"]);
    let format = ["format", "other.img", "--size", "4M", "--header", "vault.header", KEY[0], KEY[1]];
    bench.run(&format).fails(1, &["vault.header already holds data"]);
    assert!(!bench.path("other.img").exists(), "what was made for nothing is gone");
    let both = ["serve", "data.img", "vault.img", "--header", "vault.header", "--socket", "s", KEY[0], KEY[1]];
    bench.run(&both).fails(1, &["--header is for one namespace"]);
}

#[test]
fn erase_works_without_a_readable_header() {
    let bench = vault();
    let mut bytes = fs::read(bench.path("vault.img")).unwrap();
    for copy in [0, 256 << 10] {
        bytes[copy + 200] ^= 1;
    }
    fs::write(bench.path("vault.img"), &bytes).unwrap();
    let erase = |input: &[u8]| Run::with_input(bench.command(&["erase", "vault.img"]), input);
    erase(b"vault\n").fails(1, &["both copies of the header are damaged", "type its path (vault.img)", "nothing was"]);
    assert!(fs::read(bench.path("vault.img")).unwrap() == bytes);
    erase(b"vault.img\n").succeeds();
    assert!(fs::read(bench.path("vault.img")).unwrap()[..2 * MIB].iter().all(|&byte| byte == 0));
    // Nothing that looks like a header: only by force.
    bytes[0] ^= 1;
    bytes[256 << 10] ^= 1;
    fs::write(bench.path("vault.img"), &bytes).unwrap();
    bench.refused(&["erase", "vault.img", "--yes"], 3, &["not a daxcrypt namespace"]);
    bench.run(&["erase", "vault.img", "--yes", "--force"]).succeeds();
    assert!(fs::read(bench.path("vault.img")).unwrap()[..2 * MIB].iter().all(|&byte| byte == 0));
}

#[test]
fn wipe_data_overwrites_everything_and_reports() {
    let bench = vault();
    let fill = |path: &str, len| fs::write(bench.path(path), noise(1, len)).unwrap();
    let header = fs::read(bench.path("vault.img")).unwrap()[..2 * MIB].to_vec();
    fill("vault.img", 7 * MIB);
    let mut bytes = fs::read(bench.path("vault.img")).unwrap();
    bytes[..2 * MIB].copy_from_slice(&header);
    fs::write(bench.path("vault.img"), &bytes).unwrap();
    let run = bench.run(&["erase", "vault.img", "--yes", "--wipe-data", "--json"]).succeeds();
    let last = run.stdout.lines().rfind(|line| line.starts_with('{')).unwrap();
    let last: serde_json::Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["event"], "done");
    assert_eq!((last["done_bytes"].as_u64(), last["total_bytes"].as_u64()), (Some(4 << 20), Some(4 << 20)));
    assert_eq!(last["seconds_left"], 0);
    let after = fs::read(bench.path("vault.img")).unwrap();
    assert!(after[..6 * MIB].iter().all(|&byte| byte == 0));
    assert!(after[6 * MIB..] == bytes[6 * MIB..], "what is not the namespace's stays");
}

#[test]
fn format_wipe_leaves_no_block_that_looks_unused() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &["--wipe"]);
    let bytes = fs::read(bench.path("vault.img")).unwrap();
    let mut blocks: Vec<_> = bytes[2 * MIB..].chunks(16).collect();
    assert!(blocks.iter().all(|block| block.iter().any(|&byte| byte != 0)));
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(blocks.len(), 4 * MIB / 16, "no two blocks are equal");
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
}

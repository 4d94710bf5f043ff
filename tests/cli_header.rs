//! Headers on the program: backup, restore, inspect, detached ones, and the end of a namespace.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::{Bench, Run, Server, noise, tool};

const MIB: usize = 1 << 20;
const KEY: [&str; 2] = ["--key-file", "vault.key"];
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
    bench.run(&restore).succeeds();
    bench.run(&["key", "test", "vault.img", KEY[0], KEY[1]]).succeeds();
    bench.run(&["key", "test", "vault.img", "--key-file", "second.key"]).fails(2, &["none of 1"]);
}

#[test]
fn a_backup_from_before_a_rekey_is_refused() {
    let bench = vault();
    bench.run(&["header", "backup", "vault.img", "vault.backup"]).succeeds();
    bench.run(&["rekey", "vault.img", KEY[0], KEY[1]]).succeeds();
    let restore = ["header", "restore", "vault.img", "vault.backup", KEY[0], KEY[1]];
    bench.refused(&restore, 1, &["re-keyed since the backup", "--force"]);
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
    bench.refused(&[&restore("larger.backup")[..], &["--force"]].concat(), 3, &["geometry", "needs 10485760 bytes"]);
    // By force, without a key.
    bench.run(&["header", "restore", "vault.img", "other.backup", "--force"]).succeeds();
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
    assert_eq!(fs::metadata(bench.path("data.img")).unwrap().len(), 4 << 20);
    assert!(fs::read(bench.path("data.img")).unwrap().iter().all(|&byte| byte == 0), "nothing is written there yet");
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

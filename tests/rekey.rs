//! `daxcrypt rekey` as people use it: new key, slots, dry run, interruption, serving meanwhile.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Bench, CHEAP_KDF, Run, noise, open_when_free};
use daxcrypt::namespace::{Credential, LockedNamespace};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use rustix::process::{Pid, Signal, kill_process};

const KEY: [&str; 2] = ["--key-file", "vault.key"];

fn volume(bench: &Bench, key: &str) -> Volume {
    let key = Credential::KeyFile(SecretBytes::copy_of(&fs::read(bench.path(key)).unwrap()));
    let backing = open_when_free(&bench.path("vault.img"));
    LockedNamespace::open(Arc::new(backing)).unwrap().unlock(&key).unwrap()
}

fn content(volume: &Volume) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut all, 0).unwrap();
    all
}

/// `vault.img` with known content.
fn vault(size: &str) -> (Bench, Vec<u8>) {
    let bench = Bench::new();
    bench.format("vault.img", size, &[]);
    let volume = volume(&bench, "vault.key");
    let bytes = noise(8, usize::try_from(volume.size()).unwrap());
    volume.write_at(&bytes, 0).unwrap();
    drop(volume);
    (bench, bytes)
}

/// Waits until nobody holds the lock: a child that another test has just forked has our descriptors until it executes.
fn settle(bench: &Bench, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    // It takes the lock, and then there is nothing to adopt.
    while bench.run(&[&["relocate", "--in-place", name], &KEY[..]].concat()).status.code() == Some(5) {
        assert!(Instant::now() < deadline, "{name} stays busy");
        thread::sleep(Duration::from_millis(2));
    }
}

fn rekey(bench: &Bench, more: &[&str]) -> Run {
    settle(bench, "vault.img");
    bench.run(&[&["rekey", "vault.img"], &KEY[..], more].concat())
}

fn add_slot(bench: &Bench, name: &str) {
    fs::write(bench.path(name), noise(3, 40)).unwrap();
    settle(bench, "vault.img");
    let added = ["key", "add", "vault.img", "--new-key-file", name, "--label", "spare"];
    bench.run(&[&added, &KEY[..], &CHEAP_KDF].concat()).succeeds();
}

fn sectors_in_common(old: &[u8], path: &Path) -> usize {
    let new = fs::read(path).unwrap();
    let data = 2 << 20;
    old[data..].chunks(512).zip(new[data..].chunks(512)).filter(|(old, new)| old == new).count()
}

#[test]
fn a_rekey_changes_every_sector_of_the_data_and_no_byte_of_the_content() {
    let (bench, bytes) = vault("5M");
    let old = fs::read(bench.path("vault.img")).unwrap();
    let said = rekey(&bench, &[]).succeeds();
    assert!(said.stdout.contains("every byte is under the new volume key"), "{}", said.stdout);
    assert_eq!(sectors_in_common(&old, &bench.path("vault.img")), 0);
    assert!(content(&volume(&bench, "vault.key")) == bytes);
    // The whole old header opens with the key that it was made for, and gives noise.
    let mut image = fs::read(bench.path("vault.img")).unwrap();
    image[..2 << 20].copy_from_slice(&old[..2 << 20]);
    fs::write(bench.path("vault.img"), image).unwrap();
    let noise = content(&volume(&bench, "vault.key"));
    assert_eq!(noise.chunks(16).zip(bytes.chunks(16)).filter(|(found, old)| found == old).count(), 0);
}

#[test]
fn cipher_and_unit_change_and_an_independent_xts_agrees() {
    let (bench, bytes) = vault("1M");
    rekey(&bench, &["--cipher", "aes-128-xts", "--unit", "512"]).succeeds();
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(info.contains("aes-128-xts") && info.contains("512 bytes"), "{info}");
    let table = bench.run(&[&["dmtable", "vault.img", "--show-key"], &KEY[..]].concat()).succeeds().stdout;
    let key = table.split_whitespace().nth(4).unwrap();
    let key: Vec<u8> = (0..32).map(|at| u8::from_str_radix(&key[2 * at..2 * at + 2], 16).unwrap()).collect();
    let (data, tweak) = key.split_at(16);
    let cipher = |half: &[u8]| <aes::Aes128 as aes::cipher::KeyInit>::new_from_slice(half).unwrap();
    let xts = xts_mode::Xts128::new(cipher(data), cipher(tweak));
    let mut sector = fs::read(bench.path("vault.img")).unwrap()[(2 << 20) + 512 * 5..][..512].to_vec();
    xts.decrypt_sector(&mut sector, xts_mode::get_tweak_default(4096 + 5));
    assert!(sector == bytes[512 * 5..512 * 6]);
}

#[test]
fn other_slots_are_lost_or_kept_only_when_that_was_said() {
    let (bench, bytes) = vault("1M");
    add_slot(&bench, "spare.key");
    let before = fs::read(bench.path("vault.img")).unwrap();
    rekey(&bench, &[]).fails(1, &["1, key file, HKDF-SHA256 (spare)", "--keep-slots", "--drop-slots"]);
    assert!(fs::read(bench.path("vault.img")).unwrap() == before);

    let said = rekey(&bench, &["--keep-slots"]).succeeds();
    assert!(said.stdout.contains("kept: key slot 1"), "{}", said.stdout);
    assert!(content(&volume(&bench, "spare.key")) == bytes);
    let said = rekey(&bench, &["--drop-slots"]).succeeds();
    assert!(said.stdout.contains("dropped: key slot 1"), "{}", said.stdout);
    bench.run(&["key", "test", "vault.img", "--key-file", "spare.key"]).fails(2, &["wrong passphrase or key file"]);
    assert!(content(&volume(&bench, "vault.key")) == bytes);
}

#[test]
fn a_dry_run_tells_and_changes_nothing() {
    let (bench, _) = vault("1M");
    add_slot(&bench, "spare.key");
    let before = fs::read(bench.path("vault.img")).unwrap();
    let said = rekey(&bench, &["--dry-run"]).succeeds().stdout;
    assert!(said.contains("1048576 bytes") && said.contains("(spare)") && said.contains("at least"), "{said}");
    assert!(fs::read(bench.path("vault.img")).unwrap() == before);
    rekey(&bench, &["--status"]).succeeds();
    rekey(&bench, &["--resume"]).fails(1, &["no re-key is under way"]);
    rekey(&bench, &["--pause"]).fails(1, &["no re-key is under way"]);
}

/// Starts a slow re-key, waits until it has moved something, and sends SIGINT.
fn interrupted(bench: &Bench) {
    settle(bench, "vault.img");
    let args = [&["rekey", "vault.img", "--max-rate", "2M", "--json"], &KEY[..]].concat();
    let mut child = bench.command(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let json = |line: String| serde_json::from_str::<serde_json::Value>(&line).unwrap();
    let moved = lines.by_ref().map(|line| json(line.unwrap())).find(|line| line["done_bytes"].as_u64() > Some(0));
    let moved = moved.unwrap();
    assert_eq!(moved["event"], "progress");
    assert!(moved["seconds_left"].is_u64() && moved["bytes_per_second"].is_u64(), "{moved}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let last = json(lines.last().unwrap().unwrap());
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert_eq!(last["event"], "stopped", "{last}");
    assert!(last["done_bytes"].as_u64() < last["total_bytes"].as_u64(), "{last}");
}

#[test]
fn an_interrupted_rekey_opens_with_its_key_and_goes_on_when_asked() {
    let (bench, bytes) = vault("6M");
    interrupted(&bench);
    let status = bench.run(&["rekey", "vault.img", "--status"]).succeeds().stdout;
    assert!(status.contains("a re-key is under way"), "{status}");
    // Every source of a key is one.
    let command = ["rekey", "vault.img", "--status", "--passphrase-command", "echo wrong"];
    assert!(!bench.run(&command).status.success());
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert_eq!(info.lines().filter(|line| line.starts_with("re-key ")).count(), 1, "{info}");
    let status = rekey(&bench, &["--status", "--json"]).succeeds().stdout;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert!(status["done_bytes"].as_u64() > Some(0) && status["paused"] == false, "{status}");
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(info.contains("re-key"), "{info}");
    assert!(content(&volume(&bench, "vault.key")) == bytes, "both halves are readable");
    rekey(&bench, &[]).fails(1, &["a re-key is under way", "rekey --resume vault.img"]);
    bench.run(&[&["dmtable", "vault.img"], &KEY[..]].concat()).fails(1, &["a re-key is under way"]);
    rekey(&bench, &["--resume"]).succeeds();
    assert!(content(&volume(&bench, "vault.key")) == bytes);
    let status = bench.run(&["rekey", "vault.img", "--status"]).succeeds().stdout;
    assert!(status.contains("no re-key is under way"), "{status}");
}

fn is_rekeying(bench: &Bench) -> bool {
    let info = bench.run(&["info", "vault.img", "--json"]).succeeds().stdout;
    serde_json::from_str::<serde_json::Value>(&info).unwrap()["rekeying"].as_bool().unwrap()
}

#[test]
fn serve_goes_on_with_an_interrupted_rekey_unless_it_is_paused() {
    let (bench, bytes) = vault("6M");
    interrupted(&bench);
    rekey(&bench, &["--pause"]).succeeds();
    let server = bench.serve("vault.img", &[]);
    thread::sleep(Duration::from_millis(300));
    assert!(is_rekeying(&bench), "paused");
    server.stop();
    // A pause ends with --resume; stop that one at once, so that the server has something left to do.
    let mut child =
        bench.under_way(&[&["rekey", "vault.img", "--resume", "--max-rate", "1K", "--json"], &KEY[..]].concat());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));

    let server = bench.serve("vault.img", &[]);
    let mut writer = Writer::new(&server, bytes);
    writer.until(|| !is_rekeying(&bench));
    server.stop();
    assert!(content(&volume(&bench, "vault.key")) == writer.bytes);
}

/// A client that knows what it wrote.
struct Writer {
    socket: std::path::PathBuf,
    bytes: Vec<u8>,
    round: u64,
}

impl Writer {
    fn new(server: &common::Server, bytes: Vec<u8>) -> Self {
        Self { socket: server.socket.clone(), bytes, round: 0 }
    }

    /// Writes and compares everything, again and again, until `done`.
    fn until(&mut self, mut done: impl FnMut() -> bool) {
        use std::io::{Read, Seek, SeekFrom, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(&self.socket).unwrap();
        let chosen = nbd::client::handshake(&mut stream, b"vault").unwrap();
        let mut client = nbd::client::NbdClient::new(&mut stream, &chosen);
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done() {
            let (at, data) = ((self.round * 1_000_003) % (5 << 20), noise(self.round, 5000));
            client.seek(SeekFrom::Start(at)).unwrap();
            client.write_all(&data).unwrap();
            self.bytes[usize::try_from(at).unwrap()..][..data.len()].copy_from_slice(&data);
            let mut found = vec![0; self.bytes.len()];
            client.seek(SeekFrom::Start(0)).unwrap();
            client.read_exact(&mut found).unwrap();
            assert!(found == self.bytes, "round {}", self.round);
            assert!(Instant::now() < deadline, "the server does not end the re-key");
            self.round += 1;
        }
    }
}

#[test]
fn a_running_server_rekeys_pauses_and_goes_on_while_a_client_writes() {
    let (bench, bytes) = vault("6M");
    add_slot(&bench, "spare.key");
    let old = fs::read(bench.path("vault.img")).unwrap();
    let control = bench.path("control");
    let control = ["--control", control.to_str().unwrap()];
    settle(&bench, "vault.img");
    let server = bench.serve("vault.img", &control);
    let ask = |more: &[&str]| bench.run(&[&["rekey", "vault.img"], &control[..], more].concat());
    let mut writer = Writer::new(&server, bytes);

    fs::write(bench.path("wrong.key"), noise(77, 64)).unwrap();
    ask(&["--key-file", "wrong.key"]).fails(2, &["no key slot opens"]);
    ask(&KEY).fails(1, &["(spare)", "--drop-slots"]);
    ask(&["--resume"]).fails(1, &["no re-key is under way"]);
    assert!(ask(&["--status"]).succeeds().stdout.contains("no re-key is under way"));
    assert!(!is_rekeying(&bench));

    let args = [&["rekey", "vault.img", "--drop-slots", "--max-rate", "2M", "--json"], &control[..], &KEY].concat();
    let mut follower = bench.command(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    assert!(is_rekeying(&bench));
    ask(&[&["--drop-slots"], &KEY[..]].concat()).fails(1, &["under way"]);
    let paused = ask(&["--pause"]).succeeds().stdout;
    assert!(paused.contains("of 6 MiB done"), "{paused}");
    // Who follows may leave; nothing ends by that.
    kill_process(Pid::from_child(&follower), Signal::INT).unwrap();
    assert_eq!(follower.wait().unwrap().code(), Some(0));
    let mut rounds = 0;
    writer.until(|| {
        rounds += 1;
        rounds > 3
    });
    assert_eq!(ask(&["--status"]).succeeds().stdout, paused);

    let resumed = [&["rekey", "vault.img", "--resume", "--max-rate", "8M"], &control[..]].concat();
    let mut follower = bench.command(&resumed).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    writer.until(|| !is_rekeying(&bench));
    assert_eq!(follower.wait().unwrap().code(), Some(0));
    server.stop();
    assert!(content(&volume(&bench, "vault.key")) == writer.bytes);
    bench.run(&["key", "test", "vault.img", "--key-file", "spare.key"]).fails(2, &["wrong"]);
    assert_eq!(sectors_in_common(&old, &bench.path("vault.img")), 0);
}

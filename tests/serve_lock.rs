//! Locking and unlocking exports while they are served.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/memory.rs"]
mod memory;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::{self, File};
use std::process::Command;

use common::{Bench, CHEAP_KDF, Run, Server, noise, tool};
use memory::{data_needles, describe, in_process};
use nbd::{Raw, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const READ: u16 = 0;
const FLUSH: u16 = 3;
const ZEROES: u16 = 6;
const FUA: u16 = 1;
const ESHUTDOWN: u32 = 108;

const CONTROL: [&str; 2] = ["--control", "control"];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The volume key of `vault.img`, made when it is needed, so that this program has no copy.
fn volume_key() -> Vec<u8> {
    noise(77, 64)
}

fn key_needles() -> Vec<(String, Vec<u8>)> {
    let pieces = [volume_key(), noise(78, 64)].concat();
    pieces.chunks(16).enumerate().map(|(index, piece)| (format!("key, piece {index}"), piece.to_vec())).collect()
}

/// `vault.img` of 8 MiB, which the key file and the passphrase in `pass` open.
fn vault() -> Bench {
    let bench = Bench::new();
    bench.secret("vault.key", &noise(78, 64));
    bench.secret("pass", b"the passphrase of these tests");
    let (key, tweak) = (hex(&volume_key()[..32]), hex(&volume_key()[32..]));
    bench.secret("spec", format!("type=user algorithm=aes-xts-256 key={key} tweak={tweak}").as_bytes());
    bench.run(&["format", "vault.img", "--size", "8M", "--key-spec", "spec", "--key-file", "vault.key"]).succeeds();
    let add = ["key", "add", "vault.img", "--key-file", "vault.key", "--new-passphrase-file", "pass"];
    bench.run(&[&add[..], &CHEAP_KDF].concat()).succeeds();
    bench
}

fn serve(bench: &Bench, more: &[&str]) -> Server {
    let socket = bench.path("sock");
    let args = ["serve", "--socket", socket.to_str().unwrap()];
    let mut command = bench.command(&[&args[..], &CONTROL, more].concat());
    command.stderr(File::create(bench.path("said")).unwrap());
    Server::start(command, socket)
}

fn serve_vault(bench: &Bench) -> Server {
    serve(bench, &["vault.img", "--key-file", "vault.key"])
}

fn client(server: &Server, name: &str) -> Raw {
    let mut raw = Raw::greeted(&server.socket);
    raw.go(name);
    raw
}

fn ask(bench: &Bench, args: &[&str]) -> Run {
    bench.run(&[args, &CONTROL].concat())
}

fn lock(bench: &Bench) {
    let said = ask(bench, &["lock", "vault", "--wait"]).succeeds().stdout;
    assert!(said.contains("vault: locked; requests wait"), "{said}");
}

fn unlock(bench: &Bench) {
    assert_eq!(ask(bench, &["unlock", "vault", "--key-file", "vault.key"]).succeeds().stdout, "vault: unlocked\n");
}

fn status(bench: &Bench) -> Value {
    serde_json::from_str(&ask(bench, &["status", "--json"]).succeeds().stdout).unwrap()
}

fn closed_in_order(bench: &Bench) -> bool {
    let info = bench.run(&["info", "vault.img"]).succeeds().stdout;
    let line = info.lines().find(|line| line.starts_with("closed")).unwrap();
    line.ends_with("in order")
}

#[test]
fn what_is_asked_while_it_is_locked_waits_and_is_answered_after_the_unlock() {
    let bench = vault();
    let server = serve_vault(&bench);
    let data = noise(1, 1 << 20);
    let mut raw = client(&server, "vault");
    assert_eq!(raw.write(0, 0, &data), 0);
    assert!(!closed_in_order(&bench));
    lock(&bench);
    assert!(closed_in_order(&bench), "nobody can write to what is locked");
    assert_eq!(status(&bench)["exports"][0]["locked"], true);
    assert!(ask(&bench, &["status"]).succeeds().stdout.contains("locked"));
    // Everything that may wait: small and large, in the connection and beside it.
    let other = noise(2, 4096);
    raw.request(READ, 0, 1, 0, 4096);
    raw.request(READ, 0, 2, 0, 1 << 20);
    let mut writer = client(&server, "vault");
    writer.request(1, FUA, 3, 4096, 4096);
    writer.send(&other);
    let mut flusher = client(&server, "vault");
    flusher.request(FLUSH, 0, 4, 0, 0);
    let mut eraser = client(&server, "vault");
    eraser.request(ZEROES, 0, 5, 2 << 20, 4 << 20);
    // One that leaves while it waits is gone at once.
    let mut leaver = client(&server, "vault");
    leaver.request(READ, 0, 6, 0, 4096);
    eventually("five clients", || status(&bench)["connections"] == 5);
    drop(leaver);
    eventually("the one that left is forgotten", || status(&bench)["connections"] == 4);

    fs::write(bench.path("wrong.key"), noise(9, 64)).unwrap();
    ask(&bench, &["unlock", "vault", "--key-file", "wrong.key"]).fails(2, &["does not open vault"]);
    ask(&bench, &["unlock", "other", "--key-file", "vault.key"]).fails(1, &["no export"]);
    ask(&bench, &["resize", "vault.img", "--size", "4M", "--force"])
        .fails(1, &["it is locked", "daxcrypt unlock vault"]);
    lock(&bench); // once more changes nothing
    assert_eq!(status(&bench)["exports"][0]["locked"], true);
    unlock(&bench);

    assert_eq!(raw.errno(), 0);
    let before_or_after = raw.take(4096);
    assert!(before_or_after == data[..4096]);
    assert_eq!(raw.errno(), 0);
    let large = raw.take(1 << 20);
    assert!(large[..4096] == data[..4096] && large[8192..] == data[8192..]);
    assert!(large[4096..8192] == data[4096..8192] || large[4096..8192] == other);
    assert_eq!((writer.errno(), flusher.errno(), eraser.errno()), (0, 0, 0));
    assert!(raw.read(0, 4096, 4096).unwrap() == other);
    assert!(raw.read(0, 2 << 20, 4 << 20).unwrap() == vec![0; 4 << 20]);
    assert!(!closed_in_order(&bench));
    ask(&bench, &["unlock", "vault", "--key-file", "vault.key"]).fails(1, &["vault is not locked"]);
    server.stop();
    assert!(closed_in_order(&bench));
}

#[test]
fn nothing_is_left_of_key_and_data_when_it_is_locked() {
    let bench = vault();
    let server = serve_vault(&bench);
    let pid = server.child.id();
    let page = noise(4711, 4096);
    let needles = [data_needles(&page), key_needles()].concat();
    // Clients that stay, with large buffers and small ones, and one that wrote last.
    let mut large = client(&server, "vault");
    let mut small = client(&server, "vault");
    assert_eq!(large.write(0, 0, &page.repeat(1024)), 0);
    assert!(small.read(0, 0, 4096).unwrap() == page);
    assert_eq!(small.write(FUA, 4096, &page), 0);
    assert!(large.read(0, 0, 4 << 20).unwrap() == page.repeat(1024));
    let key = ["key", "add", "vault.img", "--new-key-file", "pass2", "--key-file", "vault.key"];
    bench.secret("pass2", &noise(78, 64));
    ask(&bench, &key).succeeds();
    let found = describe(&in_process(pid, &needles));
    assert!(found.iter().any(|line| line.starts_with("key")), "the search works: {found:?}");
    assert!(found.iter().any(|line| line.starts_with("data")), "the search works: {found:?}");
    for round in 0..2 {
        lock(&bench);
        let found = describe(&in_process(pid, &needles));
        assert!(found.is_empty(), "round {round}, {} places: {:#?}", found.len(), &found[..found.len().min(8)]);
        small.request(READ, 0, 1, 0, 4096);
        unlock(&bench);
        assert_eq!(small.errno(), 0);
        assert!(small.take(4096) == page);
        assert!(large.read(0, 0, 4 << 20).unwrap() == page.repeat(1024));
    }
    server.stop();
}

#[test]
fn without_wait_requests_fail_and_who_waits_can_be_failed() {
    let bench = vault();
    let server = serve_vault(&bench);
    let mut raw = client(&server, "vault");
    lock(&bench);
    raw.request(READ, 0, 1, 0, 4096);
    let mut beside = client(&server, "vault");
    beside.request(FLUSH, 0, 2, 0, 0);
    // Of a second lock counts what it says of requests.
    assert!(ask(&bench, &["lock", "vault"]).succeeds().stdout.contains("requests fail"));
    assert_eq!((raw.errno(), beside.errno()), (ESHUTDOWN, ESHUTDOWN));
    assert_eq!(raw.read(0, 0, 4096), Err(ESHUTDOWN));
    assert_eq!(raw.write(0, 0, &[1; 2 << 20]), ESHUTDOWN);
    assert_eq!(raw.run(FLUSH, 0, 0, 0), ESHUTDOWN);
    assert_eq!(raw.run(ZEROES, 0, 0, 4 << 20), ESHUTDOWN);
    assert_eq!(
        ask(&bench, &["lock", "vault", "--json"]).succeeds().stdout,
        "[{\"name\":\"vault\",\"waits\":false,\"failed\":null}]\n"
    );
    assert_eq!(ask(&bench, &["unlock", "vault", "--passphrase-file", "pass"]).succeeds().stdout, "vault: unlocked\n");
    assert_eq!(raw.write(FUA, 0, &[1; 2 << 20]), 0);
    // The volume key itself opens it too.
    let dump = ["key", "dump", "copy.img", "--key-file", "vault.key", "--volume-key-file", "escrow"];
    fs::copy(bench.path("vault.img"), bench.path("copy.img")).unwrap();
    bench.run(&dump).succeeds();
    lock(&bench);
    assert_eq!(ask(&bench, &["unlock", "vault", "--escrow-file", "escrow"]).succeeds().stdout, "vault: unlocked\n");
    assert!(raw.read(0, 0, 4096).unwrap() == [1; 4096]);
    server.stop();
}

#[test]
fn a_server_stops_while_an_export_is_locked_and_clients_wait() {
    for more in [&[][..], &["--hang-up"]] {
        let bench = vault();
        let server = serve(&bench, &[&["vault.img", "--key-file", "vault.key"], more].concat());
        let mut raw = client(&server, "vault");
        assert_eq!(raw.write(0, 0, &[7; 4096]), 0);
        lock(&bench);
        raw.request(READ, 0, 1, 0, 4096);
        let mut beside = client(&server, "vault");
        beside.request(FLUSH, 0, 2, 0, 0);
        kill_process(Pid::from_child(&server.child), Signal::TERM).unwrap();
        if more.is_empty() {
            assert_eq!((raw.errno(), beside.errno()), (ESHUTDOWN, ESHUTDOWN));
        } else {
            assert!(raw.is_closed() && beside.is_closed(), "they repeat their requests elsewhere");
        }
        server.stop();
        assert!(closed_in_order(&bench));
        let server = serve_vault(&bench);
        assert!(client(&server, "vault").read(0, 0, 4096).unwrap() == [7; 4096]);
        server.stop();
    }
}

#[test]
fn a_rekey_rests_while_it_is_locked_and_goes_on_after_it() {
    let bench = vault();
    let server = serve_vault(&bench);
    let data = noise(3, 8 << 20);
    let mut raw = client(&server, "vault");
    for (index, piece) in data.chunks(1 << 20).enumerate() {
        assert_eq!(raw.write(0, (index as u64) << 20, piece), 0);
    }
    let begin = ["rekey", "vault.img", "--key-file", "vault.key", "--drop-slots", "--max-rate", "4M", "--json"];
    let mut follower = bench.command(&[&begin[..], &CONTROL].concat());
    let mut follower =
        follower.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let rekey = || status(&bench)["rekeys"][0].clone();
    eventually("the re-key has begun", || rekey()["progress"]["done_bytes"].as_u64() > Some(0));
    kill_process(Pid::from_child(&follower), Signal::INT).unwrap();
    follower.wait().unwrap();
    lock(&bench);
    ask(&bench, &["rekey", "vault.img", "--status"]).fails(1, &["it is locked", "daxcrypt unlock vault"]);
    let found = describe(&in_process(server.child.id(), &key_needles()));
    assert!(found.is_empty(), "the old key: {found:?}");
    unlock(&bench);
    assert_eq!(rekey()["running"], true);
    assert!(raw.read(0, 0, 8 << 20).unwrap() == data);
    // One that rests by itself goes on resting.
    ask(&bench, &["rekey", "vault.img", "--stop"]).succeeds();
    lock(&bench);
    unlock(&bench);
    assert_eq!(rekey()["running"], false);
    ask(&bench, &["rekey", "vault.img", "--resume", "--max-rate", "1G"]).succeeds();
    eventually("the re-key has ended", || rekey().is_null());
    assert!(raw.read(0, 0, 8 << 20).unwrap() == data);
    server.stop();
}

#[test]
fn other_exports_go_on_and_every_kind_of_export_can_be_locked() {
    let bench = vault();
    bench.run(&["region", "create", "region.img", "--size", "32M"]).succeeds();
    bench.run(&["format", "region.img#part", "--size", "4M", "--key-file", "vault.key"]).succeeds();
    bench.run(&["format", "data.img", "--header", "data.header", "--size", "4M", "--key-file", "vault.key"]).succeeds();
    File::create(bench.path("luks.img")).unwrap().set_len(24 << 20).unwrap();
    let (luks, key) = (bench.path("luks.img"), bench.path("vault.key"));
    let cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--batch-mode"];
    let luks = ["luksFormat", "--type", "luks2", luks.to_str().unwrap(), key.to_str().unwrap()];
    tool("cryptsetup", &[&luks[..], &cheap].concat());
    let namespace = |path: &str, more: &str| format!("[[namespace]]\npath = \"{path}\"\n{more}\n");
    let key = "key_file = \"vault.key\"";
    let config = [
        namespace("vault.img", key),
        namespace("region.img#part", &format!("{key}\nname = \"part\"")),
        namespace("data.img", &format!("{key}\nheader = \"data.header\"")),
        namespace("luks.img", &format!("{key}\nluks2 = true")),
    ];
    fs::write(bench.path("server.toml"), config.concat()).unwrap();
    let server = serve(&bench, &["--config", "server.toml"]);
    let names = ["part", "data", "luks"];
    for (index, name) in names.into_iter().enumerate() {
        let data = noise(index as u64, 1 << 20);
        let (mut raw, mut other) = (client(&server, name), client(&server, "vault"));
        assert_eq!(raw.write(0, 0, &data), 0);
        ask(&bench, &["lock", name, "--wait"]).succeeds();
        raw.request(READ, 0, 1, 0, 1 << 20);
        assert_eq!(other.write(FUA, 0, &data), 0);
        let wrong = ask(&bench, &["unlock", name, "--passphrase-file", "pass"]);
        assert_eq!(wrong.status.code(), Some(2), "{name}: {}", wrong.stderr);
        ask(&bench, &["unlock", name, "--key-file", "vault.key"]).succeeds();
        assert_eq!(raw.errno(), 0);
        assert!(raw.take(1 << 20) == data, "{name}");
        assert_eq!(raw.write(FUA, 4096, &data), 0);
    }
    let locked = ask(&bench, &["lock", "--all"]).succeeds().stdout;
    assert_eq!(locked.lines().count(), 4, "{locked}");
    server.stop();
    // One that is only read, and one whose key ends with its server.
    let before = fs::read(bench.path("vault.img")).unwrap();
    let server = serve(&bench, &["vault.img", "--key-file", "vault.key", "--read-only"]);
    let mut raw = client(&server, "vault");
    lock(&bench);
    raw.request(READ, 0, 1, 4096, 4096);
    unlock(&bench);
    assert_eq!(raw.errno(), 0);
    assert!(raw.take(4096) == noise(2, 1 << 20)[4096..8192]);
    server.stop();
    assert!(fs::read(bench.path("vault.img")).unwrap() == before);
    bench.run(&["format", "brief.img", "--size", "4M", "--ephemeral"]).succeeds();
    let server = serve(&bench, &["brief.img"]);
    ask(&bench, &["lock", "brief"]).fails(1, &["ephemeral"]);
    assert_eq!(ask(&bench, &["lock", "--all"]).succeeds().stdout, "");
    assert_eq!(client(&server, "brief").write(0, 0, &[1; 512]), 0);
    server.stop();
}

#[test]
fn an_idle_export_locks_itself() {
    let bench = vault();
    let server = serve(&bench, &["vault.img", "--key-file", "vault.key", "--lock-after", "40ms"]);
    let mut raw = client(&server, "vault");
    for round in 0..3_u8 {
        // Of one that is locked already it is answered after the unlock.
        raw.request(1, 0, 1, 0, 512);
        raw.send(&[round; 512]);
        eventually("it is locked", || status(&bench)["exports"][0]["locked"] == true);
        unlock(&bench);
        assert_eq!(raw.errno(), 0);
    }
    server.stop();
    let only = ["serve", "vault.img", "--key-file", "vault.key", "--socket", "s", "--lock-after", "1m"];
    bench.run(&only).fails(1, &["needs a control socket"]);
}

#[test]
fn a_copy_survives_locks_in_the_middle_of_it() {
    let bench = vault();
    let server = serve_vault(&bench);
    let data = noise(5, 8 << 20);
    fs::write(bench.path("in"), &data).unwrap();
    let (from, to) = (bench.path("in"), bench.path("out"));
    let uri = server.uri("vault");
    for (source, target) in [(from.to_str().unwrap(), &*uri), (&*uri, to.to_str().unwrap())] {
        for size in ["--request-size=4096", "--request-size=262144"] {
            let mut copy = Command::new("nbdcopy").args([size, "--flush", source, target]).spawn().unwrap();
            let mut locks = 0;
            while copy.try_wait().unwrap().is_none() {
                lock(&bench);
                unlock(&bench);
                locks += 1;
            }
            assert!(copy.wait().unwrap().success() && locks > 0);
        }
    }
    assert!(fs::read(to).unwrap() == data);
    server.stop();
}

//! What is changed of a running server over its control socket: its exports, its clients, its lists.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::thread;

use common::{Bench, Run, Server, noise, tool};
use nbd::{Raw, eventually};
use serde_json::Value;

const READ: u16 = 0;
const FUA: u16 = 1;
const CONTROL: [&str; 2] = ["--control", "control"];
const KEY: [&str; 2] = ["--key-file", "vault.key"];

fn serve(bench: &Bench, args: &[&str]) -> Server {
    let socket = bench.path("sock");
    let serve = ["serve", "--export-folder", ".", "--socket", socket.to_str().unwrap()];
    let mut command = bench.command(&[&serve[..], &CONTROL, args].concat());
    command.stderr(File::create(bench.path("said")).unwrap());
    Server::start(command, socket)
}

fn ask(bench: &Bench, args: &[&str]) -> Run {
    bench.run(&[args, &CONTROL].concat())
}

fn client(server: &Server, name: &str) -> Raw {
    let mut raw = Raw::greeted(&server.socket);
    raw.go(name);
    raw
}

fn status(bench: &Bench) -> Value {
    serde_json::from_str(&ask(bench, &["status", "--json"]).succeeds().stdout).unwrap()
}

fn names(bench: &Bench) -> Vec<String> {
    let status = status(bench);
    status["exports"].as_array().unwrap().iter().map(|export| export["name"].as_str().unwrap().to_owned()).collect()
}

fn closed_in_order(bench: &Bench, path: &str) -> bool {
    let info = bench.run(&["info", path]).succeeds().stdout;
    info.lines().find(|line| line.starts_with("closed")).unwrap().ends_with("in order")
}

#[test]
fn exports_come_and_go_while_others_are_used() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    bench.format("other.img", "8M", &[]);
    let server = serve(&bench, &[&["vault.img"], &KEY[..]].concat());
    let data = noise(1, 1 << 20);
    let mut stays = client(&server, "vault");
    for round in 0..3 {
        let added = ask(&bench, &[&["exports", "add", "other.img", "--name", "second"], &KEY[..]].concat());
        assert_eq!(added.succeeds().stdout, "other.img: served as \"second\"\n");
        assert_eq!(names(&bench), ["vault", "second"]);
        assert!(!closed_in_order(&bench, "other.img"));
        let mut raw = client(&server, "second");
        if round > 0 {
            assert!(raw.read(0, 0, 1 << 20).unwrap() == data, "what was flushed at the end is there");
        }
        assert_eq!((raw.write(0, 0, &data), stays.write(FUA, 0, &data)), (0, 0));
        assert_eq!(status(&bench)["exports"][1]["stats"]["written_bytes"], 1 << 20, "nothing of an earlier one");
        if round == 2 {
            ask(&bench, &["lock", "second", "--wait"]).succeeds();
            raw.request(READ, 0, 1, 0, 512);
        }
        assert_eq!(ask(&bench, &["exports", "remove", "second"]).succeeds().stdout, "second: not served any more\n");
        assert!(raw.is_closed());
        assert_eq!(names(&bench), ["vault"]);
        assert!(closed_in_order(&bench, "other.img"));
        // It belongs to nobody any more.
        bench.run(&[&["export", "other.img", "out"], &KEY[..]].concat()).succeeds();
        assert!(fs::read(bench.path("out")).unwrap()[..1 << 20] == data);
        fs::remove_file(bench.path("out")).unwrap();
        assert!(stays.read(0, 0, 1 << 20).unwrap() == data);
    }
    server.stop();
}

#[test]
fn what_is_added_has_every_option_of_the_file() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    bench.format("other.img", "8M", &[]);
    let server = serve(&bench, &[&["vault.img"], &KEY[..]].concat());
    let add = |more: &[&str]| ask(&bench, &[&["exports", "add", "other.img"], &KEY[..], more].concat());
    let uid = rustix::process::getuid().as_raw();
    let other = (uid + 1).to_string();
    let options = ["--description", "for one", "--allow-discards", "--max-client-connections", "1"];
    add(&[&options[..], &["--allowed-uids", &uid.to_string(), "--write-uids", &other]].concat()).succeeds();
    let mut raw = Raw::greeted(&server.socket);
    let (_, flags) = raw.go("other");
    assert_eq!(flags & 0b10, 0b10, "it is read-only for us");
    assert!(raw.read(0, 0, 512).is_ok());
    assert!(client(&server, "other").is_closed(), "one connection of each client");
    drop(raw);
    ask(&bench, &["exports", "remove", "other"]).succeeds();
    let info = bench.run(&["info", "other.img"]).succeeds().stdout;
    assert!(info.lines().any(|line| line.starts_with("discards") && line.contains("allowed")), "{info}");
    // A reload leaves what was added as it is.
    add(&["--allowed-uids", &other]).succeeds();
    for reloaded in [false, true] {
        assert_eq!(
            Raw::greeted(&server.socket).ask(7, &nbd::info_payload("other", &[])).kind,
            (1 << 31) + 6,
            "{reloaded}"
        );
        ask(&bench, &["reload"]).succeeds();
    }
    ask(&bench, &["exports", "remove", "other"]).succeeds();
    for (more, words) in [
        (&["--read-only", "--allow-discards"][..], "both read_only and allow_discards"),
        (&["--tls-required"], "TLS is off"),
        (&["--write-certificates", "cn:a"], "TLS is off"),
        (&["--allowed-certificates", "a"], "dns:a"),
        (&["--allowed-addresses", "10.0.0.7/8"], "10.0.0.0/24"),
    ] {
        add(more).fails(1, &[words]);
    }
    assert_eq!(names(&bench), ["vault"]);
    server.stop();
}

/// Memory of a process, in bytes.
fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_command_that_derives_a_key_delays_no_other() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    bench.secret("pass", b"correct horse\n");
    let slow = ["format", "slow.img", "--size", "4M", "--passphrase-file", "pass"];
    bench.run(&[&slow[..], &["--kdf-memory", "256M", "--kdf-time", "6"]].concat()).succeeds();
    let server = serve(&bench, &[&["vault.img"], &KEY[..]].concat());
    let before = resident_bytes(server.child.id());
    eventually("an answer in the middle of a derivation", || {
        let add = ["exports", "add", "slow.img", "--passphrase-file", "pass"];
        let mut adds = bench.command(&[&add[..], &CONTROL].concat()).stdout(Stdio::null()).spawn().unwrap();
        // The derivation has begun when its memory is there.
        while resident_bytes(server.child.id()) < before + (128 << 20) && adds.try_wait().unwrap().is_none() {
            thread::yield_now();
        }
        status(&bench);
        let in_the_middle = adds.try_wait().unwrap().is_none();
        assert!(adds.wait().unwrap().success());
        ask(&bench, &["exports", "remove", "slow"]).succeeds();
        in_the_middle
    });
    server.stop();
}

#[test]
fn what_cannot_be_added_or_removed_changes_nothing() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    bench.format("other.img", "8M", &[]);
    fs::write(bench.path("wrong.key"), noise(9, 64)).unwrap();
    fs::write(bench.path("text"), "no namespace").unwrap();
    let server = serve(&bench, &[&["vault.img"], &KEY[..]].concat());
    let before = fs::read(bench.path("other.img")).unwrap();
    ask(&bench, &["exports", "add", "other.img", "--key-file", "wrong.key"]).fails(2, &["does not open other.img"]);
    ask(&bench, &[&["exports", "add", "nothing.img"], &KEY[..]].concat()).fails(1, &["nothing.img"]);
    ask(&bench, &[&["exports", "add", "text"], &KEY[..]].concat()).fails(1, &["text"]);
    ask(&bench, &[&["exports", "add", "vault.img", "--name", "again"], &KEY[..]].concat()).fails(1, &["vault.img"]);
    assert!(fs::read(bench.path("other.img")).unwrap() == before);
    ask(&bench, &[&["exports", "add", "other.img", "--name", "vault"], &KEY[..]].concat()).fails(1, &["name"]);
    assert!(closed_in_order(&bench, "other.img"));
    ask(&bench, &["exports", "remove", "other"]).fails(1, &["no export"]);
    assert_eq!(names(&bench), ["vault"]);
    // One that is only read, and one that has no key.
    let before = fs::read(bench.path("other.img")).unwrap();
    ask(&bench, &[&["exports", "add", "other.img", "--read-only"], &KEY[..]].concat()).succeeds();
    bench.run(&["format", "brief.img", "--size", "4M", "--ephemeral"]).succeeds();
    ask(&bench, &["exports", "add", "brief.img", "--ephemeral"]).succeeds();
    assert_eq!(client(&server, "brief").write(FUA, 0, &[1; 512]), 0);
    assert_eq!(client(&server, "other").write(0, 0, &[1; 512]), 1, "EPERM");
    ask(&bench, &["exports", "remove", "other"]).succeeds();
    assert!(fs::read(bench.path("other.img")).unwrap() == before);
    server.stop();
}

#[test]
fn clients_are_listed_and_kicked() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let server = serve(&bench, &[&["vault.img"], &KEY[..]].concat());
    let mut stays = client(&server, "vault");
    let mut goes = client(&server, "vault");
    assert_eq!((stays.write(0, 0, &[1; 512]), goes.write(0, 0, &[2; 1024])), (0, 0));
    let listed = ask(&bench, &["client", "list", "--json"]).succeeds().stdout;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let number = |bytes: u64| {
        let written = |client: &&Value| client["stats"]["written_bytes"] == bytes;
        listed.as_array().unwrap().iter().find(written).unwrap()["id"].as_u64().unwrap().to_string()
    };
    assert!(ask(&bench, &["client", "list"]).succeeds().stdout.starts_with("CLIENT"));
    ask(&bench, &["client", "kick", &number(1024)]).succeeds();
    assert!(goes.is_closed());
    assert!(stays.read(0, 0, 1024).unwrap() == [2; 1024]);
    eventually("it is forgotten", || status(&bench)["clients"].as_array().unwrap().len() == 1);
    ask(&bench, &["client", "kick", &number(1024)]).fails(1, &["no client"]);
    assert!(fs::read_to_string(bench.path("said")).unwrap().contains("somebody asked for it"));
    server.stop();
}

#[test]
fn a_reload_says_what_became_of_it() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let file = |more: &str| {
        let namespace = "[[namespace]]\npath = \"vault.img\"\nkey_file = \"vault.key\"\n";
        fs::write(bench.path("server.toml"), format!("{namespace}{more}")).unwrap();
    };
    file("");
    let server = serve(&bench, &["--config", "server.toml"]);
    let mut raw = client(&server, "vault");
    file("allowed_uids = [\"nobody\"]\n");
    ask(&bench, &["reload"]).fails(1, &["nothing is changed", "server.toml"]);
    assert_eq!(raw.write(0, 0, &[1; 512]), 0);
    file("allowed_uids = [4711]\n");
    ask(&bench, &["reload"]).succeeds();
    assert!(raw.is_closed(), "it is not admitted any more");
    file("");
    ask(&bench, &["reload"]).succeeds();
    assert!(client(&server, "vault").read(0, 0, 512).unwrap() == [1; 512]);
    server.stop();
}

#[test]
fn only_the_user_of_the_server_and_root_command_it() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let server = serve(&bench, &[&["vault.img"], &KEY[..]].concat());
    // Somebody has opened the socket to all.
    fs::set_permissions(bench.path("control"), fs::Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let program = bench.path("daxcrypt");
    fs::copy(bench.command(&[]).get_program(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let control = bench.path("control");
    let mut other =
        common::tool_command(program.to_str().unwrap(), &["lock", "vault", "--control", control.to_str().unwrap()]);
    other.uid(4711).gid(4711);
    Run::of(other).fails(1, &["only the user of the server and root"]);
    assert_eq!(status(&bench)["exports"][0]["locked"], false);
    tool("qemu-io", &["-f", "raw", "-c", "read 0 4k", &server.uri("vault")]);
    server.stop();
}

/// What /proc says of every thread of a process.
fn of_threads(pid: u32, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let value = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    status.map(value).collect()
}

#[test]
fn every_thread_of_a_server_has_given_up_what_it_does_not_need() {
    let bench = Bench::new();
    bench.format("vault.img", "8M", &[]);
    let start = |more: &[&str]| {
        let (socket, args) = (bench.path("sock"), ["serve", "vault.img", "--threads", "2", "--socket", "sock"]);
        Server::start(bench.command(&[&args[..], &CONTROL, &KEY, more].concat()), socket)
    };
    let server = start(&[]);
    let _client = client(&server, "vault");
    let pid = server.child.id();
    assert!(of_threads(pid, "Seccomp").iter().all(|mode| mode == "2"));
    assert!(of_threads(pid, "NoNewPrivs").iter().all(|bit| bit == "1"));
    for capabilities in of_threads(pid, "CapPrm") {
        // CAP_DAC_OVERRIDE, CAP_NET_ADMIN and CAP_IPC_LOCK.
        let others = u64::from_str_radix(&capabilities, 16).unwrap() & !(1 << 1 | 1 << 12 | 1 << 14);
        assert_eq!(others, 0, "{capabilities}");
    }
    // What lies outside of the folders that were named is not opened, and the refusal says what helps.
    let elsewhere = Bench::new();
    elsewhere.format("other.img", "4M", &[]);
    let (path, key) = (elsewhere.path("other.img"), elsewhere.path("vault.key"));
    let add = ["exports", "add", path.to_str().unwrap(), "--key-file", key.to_str().unwrap()];
    ask(&bench, &add).fails(1, &["ermission denied", "--export-folder"]);
    server.stop();
    let server = start(&["--no-sandbox"]);
    assert!(of_threads(server.child.id(), "Seccomp").iter().all(|mode| mode == "0"));
    ask(&bench, &add).succeeds();
    server.stop();
}

//! What a lock meets: commands that are killed, servers that are, media that fail or are full, other commands, and requests
//! that have begun.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/memory.rs"]
mod memory;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use common::{Bench, Run, Server, noise, tool, tool_command};
use memory::{data_needles, describe, in_process};
use nbd::{Raw, eventually};
use serde_json::Value;

const WRITE: u16 = 1;
const FUA: u16 = 1;
const ENOSPC: u32 = 28;
const CONTROL: [&str; 2] = ["--control", "control"];
const UNLOCK: [&str; 4] = ["unlock", "vault", "--key-file", "vault.key"];

/// `vault.img`, served.
fn serve(bench: &Bench, more: &[&str]) -> Server {
    let socket = bench.path("sock");
    let args = ["serve", "vault.img", "--key-file", "vault.key", "--socket", socket.to_str().unwrap()];
    let mut command = bench.command(&[&args[..], &CONTROL, more].concat());
    command.stderr(File::create(bench.path("said")).unwrap());
    Server::start(command, socket)
}

fn vault(size: &str) -> Bench {
    let bench = Bench::new();
    bench.format("vault.img", size, &[]);
    bench
}

fn client(server: &Server) -> Raw {
    let mut raw = Raw::greeted(&server.socket);
    raw.go("vault");
    raw
}

fn ask(bench: &Bench, args: &[&str]) -> Run {
    bench.run(&[args, &CONTROL].concat())
}

fn export(bench: &Bench) -> Value {
    let status: Value = serde_json::from_str(&ask(bench, &["status", "--json"]).succeeds().stdout).unwrap();
    status["exports"][0].clone()
}

fn is_locked(bench: &Bench) -> bool {
    export(bench)["locked"] == true
}

const LOCK: &str = r#"{"what":{"export":{"name":"vault","command":{"lock":{"wait":true}}}},"credentials":[]}"#;

#[test]
fn a_lock_command_that_is_killed_has_locked_or_has_not() {
    let bench = vault("8M");
    let server = serve(&bench, &[]);
    let mut raw = client(&server);
    assert_eq!(raw.write(FUA, 0, &noise(1, 1 << 20)), 0);
    // It is killed behind its question: the export is locked, and nobody hears of it but who asks.
    let mut killed = UnixStream::connect(bench.path("control")).unwrap();
    killed.write_all(format!("{LOCK}\n").as_bytes()).unwrap();
    drop(killed);
    eventually("it is locked", || is_locked(&bench));
    ask(&bench, &UNLOCK).succeeds();
    // In the middle of its question: nothing has happened.
    let mut killed = UnixStream::connect(bench.path("control")).unwrap();
    killed.write_all(&LOCK.as_bytes()[..LOCK.len() / 2]).unwrap();
    drop(killed);
    assert!(raw.read(0, 0, 1 << 20).unwrap() == noise(1, 1 << 20));
    // The program itself, at any time: what was asked is either done or not.
    for round in 0..20_u64 {
        let mut lock = bench.command(&[&["lock", "vault", "--wait"], &CONTROL[..]].concat());
        let mut lock = lock.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_micros(round * 400));
        lock.kill().unwrap();
        lock.wait().unwrap();
        // One that was read is obeyed before this one, which waits for it.
        ask(&bench, &["lock", "vault", "--wait"]).succeeds();
        raw.request(0, 0, round, 0, 4096);
        ask(&bench, &UNLOCK).succeeds();
        assert_eq!(raw.errno(), 0);
        assert!(raw.take(4096) == noise(1, 4096));
    }
    server.stop();
}

#[test]
fn a_server_that_is_killed_while_it_locks_has_lost_nothing_that_was_durable() {
    let bench = vault("8M");
    for round in 0..12_u64 {
        let server = serve(&bench, &[]);
        let mut raw = client(&server);
        if round > 0 {
            assert!(raw.read(0, 0, 4 << 20).unwrap() == noise(round - 1, 4 << 20), "round {round}");
        }
        assert_eq!(raw.write(FUA, 0, &noise(round, 4 << 20)), 0);
        let mut lock = bench.command(&[&["lock", "vault", "--wait"], &CONTROL[..]].concat());
        let mut lock = lock.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(round));
        server.kill();
        lock.wait().unwrap();
        // The sockets of the dead are taken over.
    }
    let server = serve(&bench, &[]);
    assert!(client(&server).read(0, 0, 4 << 20).unwrap() == noise(11, 4 << 20));
    server.stop();
}

/// Unmounts.
struct Mounted(String);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = tool_command("umount", &["--lazy", &self.0]).status();
    }
}

#[test]
fn on_a_full_disk_it_locks_and_what_was_answered_is_there() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a mount needs root");
        return;
    }
    let outer = Bench::new();
    let place = outer.path("small");
    fs::create_dir(&place).unwrap();
    tool("mount", &["-t", "tmpfs", "-o", "size=6M", "none", place.to_str().unwrap()]);
    let _mounted = Mounted(place.display().to_string());
    let bench = Bench::under(&place);
    bench.format("vault.img", "16M", &["--sparse"]);
    let server = serve(&bench, &[]);
    let mut raw = client(&server);
    let mut answered = Vec::new();
    for piece in 0..64_u64 {
        match raw.write(0, piece << 18, &noise(piece, 1 << 18)) {
            0 => answered.push(piece),
            error => {
                assert_eq!(error, ENOSPC);
                break;
            }
        }
    }
    assert!((1..64).contains(&answered.len()), "the disk was never full");
    ask(&bench, &["lock", "vault", "--wait"]).succeeds();
    assert!(is_locked(&bench));
    let found = describe(&in_process(server.child.id(), &data_needles(&noise(0, 4096))));
    assert!(found.is_empty(), "{found:?}");
    ask(&bench, &UNLOCK).succeeds();
    for &piece in &answered {
        assert!(raw.read(0, piece << 18, 1 << 18).unwrap() == noise(piece, 1 << 18), "piece {piece}");
    }
    server.stop();
    assert!(bench.run(&["info", "vault.img"]).succeeds().stdout.contains("in order"));
}

#[test]
fn where_nothing_becomes_durable_it_locks_all_the_same_and_says_what_is_lost() {
    let bench = vault("8M");
    let server = serve(&bench, &[]);
    let mut raw = client(&server);
    let page = noise(4711, 4096);
    assert_eq!(raw.write(0, 0, &page), 0);
    assert_eq!(raw.write(0, 6 << 20, &page), 0);
    let needles = data_needles(&page);
    assert!(!in_process(server.child.id(), &needles).is_empty(), "the search works");
    File::options().write(true).open(bench.path("vault.img")).unwrap().set_len(6 << 20).unwrap();
    ask(&bench, &["lock", "vault", "--wait"]).fails(4, &["vault is locked", "may be lost"]);
    assert!(is_locked(&bench), "a lock that is asked for is more urgent than what is lost already");
    let found = describe(&in_process(server.child.id(), &needles));
    assert!(found.is_empty(), "{found:?}");
    assert_eq!(export(&bench)["poisoned"], true);
    assert!(fs::read_to_string(bench.path("said")).unwrap().contains("may be lost"));
    // Whether it was told or not, the next one to ask hears that it is locked.
    ask(&bench, &["lock", "vault"]).succeeds();
    raw.request(0, 0, 1, 0, 4096);
    assert_ne!(raw.errno(), 0);
    server.kill();
}

#[test]
fn locks_at_once_all_succeed_and_one_unlock_ends_them() {
    let bench = vault("8M");
    let server = serve(&bench, &[]);
    let mut raw = client(&server);
    assert_eq!(raw.write(0, 0, &noise(1, 1 << 20)), 0);
    for _ in 0..5 {
        let together = Barrier::new(6);
        thread::scope(|scope| {
            for who in 0..6 {
                let (bench, together) = (&bench, &together);
                scope.spawn(move || {
                    together.wait();
                    let how: &[&str] =
                        if who == 5 { &["lock", "--all", "--wait"] } else { &["lock", "vault", "--wait"] };
                    assert!(ask(bench, how).succeeds().stdout.contains("vault: locked"));
                });
            }
        });
        raw.request(0, 0, 1, 0, 4096);
        ask(&bench, &UNLOCK).succeeds();
        ask(&bench, &UNLOCK).fails(1, &["vault is not locked"]);
        assert_eq!(raw.errno(), 0);
        assert!(raw.take(4096) == noise(1, 4096));
    }
    server.stop();
}

#[test]
fn a_lock_and_a_resize_at_once_come_one_after_the_other() {
    let bench = vault("8M");
    let server = serve(&bench, &[]);
    let data = noise(1, 4 << 20);
    let mut raw = client(&server);
    assert_eq!(raw.write(0, 0, &data), 0);
    let mut resized = 0;
    for round in 0..10 {
        let size = if round % 2 == 0 { "12M" } else { "8M" };
        thread::scope(|scope| {
            let resize = scope.spawn(|| ask(&bench, &["resize", "vault.img", "--size", size, "--force"]));
            ask(&bench, &["lock", "vault", "--wait"]).succeeds();
            let run = resize.join().unwrap();
            if run.status.success() {
                resized += 1;
            } else {
                run.fails(1, &["it is locked"]);
            }
        });
        assert!(is_locked(&bench));
        ask(&bench, &UNLOCK).succeeds();
        let expected: u64 = if export(&bench)["size_bytes"] == 12 << 20 { 12 << 20 } else { 8 << 20 };
        assert_eq!(export(&bench)["size_bytes"], expected);
        assert!(raw.read(0, 0, 4 << 20).unwrap() == data, "round {round}");
    }
    println!("{resized} of 10 were resized before the lock");
    server.stop();
}

#[test]
fn an_idle_lock_in_the_middle_of_a_request_makes_it_wait() {
    let bench = vault("8M");
    let server = serve(&bench, &["--lock-after", "40ms"]);
    let mut raw = client(&server);
    let data = noise(1, 1 << 17);
    for round in 0..3_u64 {
        // Half of what it writes has come when the time is over: a client that says nothing is idle. The rest fits in the socket.
        raw.request(WRITE, FUA, round, 0, 1 << 17);
        raw.send(&data[..1 << 16]);
        eventually("it is locked", || is_locked(&bench));
        raw.send(&data[1 << 16..]);
        ask(&bench, &UNLOCK).succeeds();
        assert_eq!(raw.errno(), 0, "round {round}");
    }
    // It may be locked again by now, and then the answer comes with the next unlock.
    raw.request(0, 0, 9, 0, 1 << 17);
    eventually("it is locked", || is_locked(&bench));
    ask(&bench, &UNLOCK).succeeds();
    assert_eq!(raw.errno(), 0);
    assert!(raw.take(1 << 17) == data);
    server.stop();
}

//! How much may be asked of an export: rates, requests and connections, of all clients and of each.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::{self, File};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Bench, Run, Server};
use nbd::{Raw, eventually, request_bytes};
use rustix::process::{Pid, Signal, kill_process};

const READ: u16 = 0;
const ESHUTDOWN: u32 = 108;
const CONTROL: [&str; 2] = ["--control", "control"];

fn serve(bench: &Bench, args: &[&str]) -> Server {
    bench.format("vault.img", "8M", &[]);
    let socket = bench.path("sock");
    let serve = ["serve", "--socket", socket.to_str().unwrap()];
    let mut command = bench.command(&[&serve[..], &CONTROL, args].concat());
    command.stderr(File::create(bench.path("said")).unwrap());
    Server::start(command, socket)
}

fn serve_vault(bench: &Bench, limits: &[&str]) -> Server {
    serve(bench, &[&["vault.img", "--key-file", "vault.key"], limits].concat())
}

fn ask(bench: &Bench, args: &[&str]) -> Run {
    bench.run(&[args, &CONTROL].concat())
}

fn client(server: &Server) -> Raw {
    let mut raw = Raw::greeted(&server.socket);
    raw.go("vault");
    raw
}

#[test]
fn rates_are_kept_by_all_clients_together_and_by_each() {
    // Of 4 MiB the last 256 KiB are not waited for, nor what a tenth of a second allows.
    for limit in ["--max-rate", "--max-client-rate"] {
        let bench = Bench::new();
        let server = serve_vault(&bench, &[limit, "4M"]);
        let mut clients = [client(&server), client(&server)];
        let start = Instant::now();
        for _ in 0..8 {
            for raw in &mut clients {
                raw.request(READ, 0, 1, 0, 256 << 10);
            }
            for raw in &mut clients {
                assert_eq!(raw.errno(), 0);
                raw.take(256 << 10);
            }
        }
        let least = if limit == "--max-rate" { 800 } else { 340 };
        assert!(start.elapsed() >= Duration::from_millis(least), "{limit}: {:?}", start.elapsed());
        server.stop();
    }
}

#[test]
fn one_client_at_full_load_leaves_another_its_share() {
    let bench = Bench::new();
    let server = serve_vault(&bench, &["--max-iops", "2000"]);
    let served = Arc::new(AtomicU64::new(0));
    let (mut greedy, counted) = (client(&server), Arc::clone(&served));
    for cookie in 0..64 {
        greedy.request(READ, 0, cookie, 0, 512);
    }
    let flood = thread::spawn(move || {
        // As many requests are under way as a greedy client likes.
        while counted.load(Ordering::Relaxed) < u64::MAX / 2 {
            assert_eq!(greedy.errno(), 0);
            greedy.take(512);
            greedy.request(READ, 0, 1, 0, 512);
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut modest = client(&server);
    assert!(modest.read(0, 0, 512).is_ok());
    let before = served.load(Ordering::Relaxed);
    for _ in 0..300 {
        assert!(modest.read(0, 0, 512).is_ok());
    }
    let meanwhile = served.load(Ordering::Relaxed) - before;
    served.store(u64::MAX / 2, Ordering::Relaxed);
    flood.join().unwrap();
    // Turn and turn about, but for what has been answered and not been read yet.
    assert!(meanwhile <= 2 * 300 + 64, "{meanwhile} of the one for 300 of the other");
    server.stop();
}

#[test]
fn who_waits_for_its_turn_may_leave_and_the_limit_may_be_lifted() {
    let bench = Bench::new();
    let file = |limits: &str| {
        let namespace = "[[namespace]]\npath = \"vault.img\"\nkey_file = \"vault.key\"\n";
        fs::write(bench.path("server.toml"), format!("{namespace}limits = {{ {limits} }}\n")).unwrap();
    };
    file("max_rate = \"1\"");
    let server = serve(&bench, &["--config", "server.toml"]);
    let mut raw = client(&server);
    assert!(raw.read(0, 0, 1 << 20).is_ok(), "the first has nothing before it");
    let mut leaves = client(&server);
    leaves.request(READ, 0, 1, 0, 512); // in twelve days
    drop(leaves);
    let connections = || {
        let status = ask(&bench, &["status", "--json"]).succeeds().stdout;
        serde_json::from_str::<serde_json::Value>(&status).unwrap()["connections"].as_u64().unwrap()
    };
    eventually("the one that left is forgotten", || connections() == 1);
    raw.request(READ, 0, 1, 0, 512);
    file("max_rate = \"1G\"");
    ask(&bench, &["reload"]).succeeds();
    assert_eq!(raw.errno(), 0);
    raw.take(512);
    file("max_client_iops = 1");
    ask(&bench, &["reload"]).succeeds();
    assert!(raw.read(0, 0, 512).is_ok());
    file("max_rate = \"1\"");
    ask(&bench, &["reload"]).succeeds();
    assert!(raw.read(0, 0, 1 << 20).is_ok());
    raw.request(READ, 0, 1, 0, 512);
    kill_process(Pid::from_child(&server.child), Signal::TERM).unwrap();
    let last = raw.errno();
    assert!(last == ESHUTDOWN || last == 0);
    server.stop();
}

#[test]
fn an_export_has_no_more_connections_than_it_may() {
    let bench = Bench::new();
    let server = serve_vault(&bench, &["--max-export-connections", "2"]);
    let (mut first, second) = (client(&server), client(&server));
    assert!(client(&server).is_closed());
    assert!(first.read(0, 0, 512).is_ok());
    drop(second);
    eventually("there is room again", || {
        let mut raw = client(&server);
        let asked = raw.stream.write_all(&request_bytes(false, READ, 0, 1, 0, 512)).is_ok();
        asked && !raw.is_closed()
    });
    bench.run(&["serve", "vault.img", "--socket", "s", "--max-iops", "0"]).fails(1, &["--max-iops"]);
    server.stop();
}

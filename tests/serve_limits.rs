//! How much may be asked of an export: rates, requests and connections, of all clients and of each.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Bench, Run, Server};
use nbd::{Raw, eventually, request_bytes};
use rustix::net::RecvFlags;
use rustix::process::{Pid, Signal, kill_process};

const READ: u16 = 0;
const WRITE: u16 = 1;
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
fn rates_are_kept_by_all_clients_together_and_by_all_connections_of_one() {
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
        assert!(start.elapsed() >= Duration::from_millis(800), "{limit}: {:?}", start.elapsed());
        server.stop();
    }
}

/// Nothing comes of what would otherwise be there at once.
fn is_silent(raw: &mut Raw) -> bool {
    raw.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let nothing = rustix::net::recv(&raw.stream, &mut [0; 1][..], RecvFlags::PEEK).is_err();
    raw.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    nothing
}

/// A server with a Unix socket and a TCP address, which make two clients of us.
fn serve_two_ways(bench: &Bench, limits: &[&str]) -> (Server, SocketAddr) {
    let address = TcpListener::bind("127.78.0.1:0").unwrap().local_addr().unwrap();
    (serve_vault(bench, &[&["--listen", &address.to_string()], limits].concat()), address)
}

fn other_client(address: SocketAddr) -> Raw {
    let mut raw = Raw::from_address([127, 78, 0, 2], address);
    raw.go("vault");
    raw
}

#[test]
fn what_one_client_owes_is_owed_by_all_of_its_connections_and_by_no_other_client() {
    let bench = Bench::new();
    // What comes after the first is let through in twelve days.
    let (server, address) = serve_two_ways(&bench, &["--max-client-rate", "1"]);
    let (mut first, mut second) = (client(&server), client(&server));
    assert!(first.read(0, 0, 1 << 20).is_ok(), "nothing came before");
    second.request(READ, 0, 1, 0, 512);
    assert!(is_silent(&mut second));
    assert!(other_client(address).read(0, 0, 1 << 20).is_ok());
    drop((first, second));
    let mut again = client(&server);
    again.request(READ, 0, 1, 0, 512);
    assert!(is_silent(&mut again), "connecting again pays for nothing");
    drop(again);
    server.stop();
}

#[test]
fn bytes_under_way_are_bounded_for_each_client_and_for_all() {
    for (limit, other_waits) in [("--max-client-in-flight", false), ("--max-in-flight", true)] {
        let bench = Bench::new();
        let (server, address) = serve_two_ways(&bench, &[limit, "1M"]);
        let (mut writer, mut reader, mut other) = (client(&server), client(&server), other_client(address));
        writer.request(WRITE, 0, 1, 0, 1 << 20);
        // It is under way as soon as its header is received.
        writer.send(&vec![7; 1 << 19]);
        let mut passed = 0;
        loop {
            reader.request(READ, 0, 2, 0, 4096);
            if is_silent(&mut reader) {
                break;
            }
            assert_eq!(reader.errno(), 0);
            reader.take(4096);
            passed += 1;
            assert!(passed < 1000, "{limit}: nothing waits");
        }
        other.request(READ, 0, 3, 0, 4096);
        assert_eq!(is_silent(&mut other), other_waits, "{limit}");
        writer.send(&vec![7; 1 << 19]);
        assert_eq!(writer.errno(), 0);
        assert_eq!(reader.errno(), 0);
        assert_eq!(reader.take(4096), [7; 4096]);
        assert_eq!(other.errno(), 0);
        other.take(4096);
        drop((writer, reader, other));
        server.stop();
    }
}

#[test]
fn a_client_that_connects_asks_and_leaves_takes_nothing_from_others() {
    let bench = Bench::new();
    let server = serve_vault(&bench, &["--max-rate", "1M"]);
    let mut stays = client(&server);
    let left = |bench: &Bench| {
        let status = ask(bench, &["status", "--json"]).succeeds().stdout;
        serde_json::from_str::<serde_json::Value>(&status).unwrap()["connections"].as_u64().unwrap() == 1
    };
    for _ in 0..20 {
        let mut leaves = client(&server);
        leaves.request(WRITE, 0, 1, 0, 8 << 20); // eight seconds' worth
        drop(leaves);
        eventually("it is forgotten", || left(&bench));
    }
    // Of what none of them has brought nothing is waited for.
    assert!(stays.read(0, 0, 512).is_ok());
    server.stop();
}

#[test]
fn a_client_has_no_more_connections_than_it_may() {
    let bench = Bench::new();
    let (server, address) = serve_two_ways(&bench, &["--max-client-connections", "1"]);
    let mut first = client(&server);
    assert!(first.read(0, 0, 512).is_ok(), "it has its place");
    assert!(client(&server).is_closed());
    assert!(other_client(address).read(0, 0, 512).is_ok());
    assert!(first.read(0, 0, 512).is_ok());
    server.stop();
}

#[test]
fn one_client_at_full_load_leaves_another_its_share() {
    let bench = Bench::new();
    let (server, address) = serve_two_ways(&bench, &["--max-iops", "2000"]);
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
    let mut modest = other_client(address);
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
    let (mut first, mut second) = (client(&server), client(&server));
    // They have their places before a third one asks.
    assert!(first.read(0, 0, 512).is_ok() && second.read(0, 0, 512).is_ok());
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

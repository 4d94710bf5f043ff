//! The server under many, slow and rude clients, and under signals. Memory is what /proc says of the real program.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[path = "common/nbd.rs"]
mod raw;

use std::io::Read;
use std::path::Path;
use std::process::Child;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Bench, noise};
use raw::{MemoryExport, Raw, eventually};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

const MIB: u64 = 1 << 20;
/// The default budget for large buffers.
const BUDGET: u64 = 128 * MIB;
const READ: u16 = 0;

/// Lifts the limit on descriptors as far as this process may: a test and its server hold both ends of each connection.
fn allow_many_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
}

/// A line of /proc/PID/status, in bytes.
fn memory(server: &Child, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let value = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
    let kib: u64 = value.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
    kib * 1024
}

/// In transmission on `export`, with simple replies.
fn client(socket: &Path, export: &str) -> Raw {
    let mut raw = Raw::greeted(socket);
    raw.go(export);
    raw
}

fn volume(size: &str) -> (Bench, common::Server) {
    let bench = Bench::new();
    bench.format("disk", size, &[]);
    let server = bench.serve("disk", &[]);
    (bench, server)
}

#[test]
fn ten_thousand_clients_come_and_go() {
    let server = raw::serve(MemoryExport::new(MIB));
    for index in 0..10_000 {
        match index % 10 {
            0 => drop(client(&server.path, "disk")),
            1 => drop(Raw::greeted(&server.path)),
            _ => drop(Raw::connect(&server.path)),
        }
    }
    eventually("the end of all connections", || server.handle.connection_count() == 0);
    assert_eq!(server.handle.buffer_bytes(), 0);
    assert_eq!(client(&server.path, "disk").read(0, 0, 3).unwrap(), [0; 3]);
}

#[test]
fn a_thousand_idle_clients_beside_one_that_works() {
    allow_many_descriptors();
    let server = raw::serve(MemoryExport::new(MIB));
    let mut idle: Vec<_> = (0..1000).map(|_| client(&server.path, "disk")).collect();
    let mut working = client(&server.path, "disk");
    for round in 0..2000u64 {
        let (offset, data) = (round * 509 % 1_000_000, noise(round, 4096));
        assert_eq!(working.write(0, offset, &data), 0);
        assert!(working.read(0, offset, 4096).unwrap() == data);
    }
    assert_eq!(server.handle.connection_count(), 1001);
    assert!(server.handle.buffer_bytes() <= 2 << 20, "idle clients hold large buffers");
    for client in &mut idle {
        assert_eq!(client.read(0, 0, 8).unwrap().len(), 8);
    }
}

#[test]
fn five_hundred_idle_clients_fit_64_mib() {
    allow_many_descriptors();
    let (_bench, server) = volume("64M");
    let mut clients: Vec<_> = (0..500).map(|_| client(&server.socket, "disk")).collect();
    for client in &mut clients {
        assert_eq!(client.read(0, 0, 4096).unwrap().len(), 4096);
    }
    thread::sleep(Duration::from_millis(200));
    let resident = memory(&server.child, "VmRSS:");
    println!("resident with 500 idle clients: {} KiB", resident / 1024);
    assert!(resident < 64 * MIB, "{resident} bytes");
    drop(clients);
    server.stop();
}

#[test]
fn sixty_four_clients_with_reads_of_32_mib_stay_inside_the_budget() {
    let (_bench, server) = volume("32M");
    let data = noise(1, 32 << 20);
    assert_eq!(client(&server.socket, "disk").write(0, 0, &data), 0);
    let together = Barrier::new(64);
    thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                let mut client = client(&server.socket, "disk");
                together.wait();
                client.request(READ, 0, 1, 0, 32 << 20);
                // Nobody reads before every request has been received and begun.
                together.wait();
                thread::sleep(Duration::from_millis(300));
                client.take(16);
                let (mut piece, mut rest) = (vec![0; 1 << 16], &data[..]);
                while !rest.is_empty() {
                    let len = client.stream.read(&mut piece).unwrap();
                    assert!(piece[..len] == rest[..len]);
                    rest = &rest[len..];
                }
            });
        }
    });
    let peak = memory(&server.child, "VmHWM:");
    println!("peak with 64 reads of 32 MiB at once: {} KiB", peak / 1024);
    assert!(peak < BUDGET + 64 * MIB, "{peak} bytes");
    server.stop();
}

#[test]
fn a_client_that_never_reads_pins_a_bounded_buffer() {
    let (_bench, server) = volume("32M");
    let mut other = client(&server.socket, "disk");
    other.read(0, 0, 32 << 20).unwrap();
    let before = memory(&server.child, "VmRSS:");
    let mut stuck = client(&server.socket, "disk");
    stuck.stream.set_nonblocking(true).unwrap();
    let request = raw::request_bytes(false, READ, 0, 1, 0, 32 << 20).repeat(64);
    let mut sent = 0;
    // Until the server takes no more: it does not read requests that it cannot answer.
    for _ in 0..100 {
        while let Ok(len) = std::io::Write::write(&mut stuck.stream, &request) {
            sent += len;
            assert!(sent < 64 << 20, "the server swallows requests without end");
        }
        thread::sleep(Duration::from_millis(2));
    }
    assert!(sent > 28 * 64, "{sent} bytes of requests");
    assert_eq!(other.read(0, 77, 4096).unwrap().len(), 4096);
    let grown = memory(&server.child, "VmRSS:").saturating_sub(before);
    println!("grown by {} KiB for a client that does not read", grown / 1024);
    assert!(grown < 4 * MIB, "{grown} bytes");
    drop(stuck);
    drop(other);
    server.stop();
}

/// Reads and writes until the server ends; what is answered has to be right.
fn work(socket: &Path, seed: u64, stop: &AtomicBool) {
    let mut client = client(socket, "disk");
    let offset = seed * MIB;
    for round in 0.. {
        let data = noise(seed ^ round, 70_000);
        // Later errors are the server's leave to go; a panic in these would be a wrong or broken reply.
        let mut bytes = raw::request_bytes(false, 1, 0, 1, offset, data.len() as u64);
        bytes.extend_from_slice(&data);
        bytes.extend_from_slice(&raw::request_bytes(false, READ, 0, 2, offset, data.len() as u64));
        if std::io::Write::write_all(&mut client.stream, &bytes).is_err() {
            break;
        }
        let mut heads = [0; 16];
        if client.stream.read_exact(&mut heads).is_err() || heads[4..8] != [0; 4] {
            break;
        }
        if client.stream.read_exact(&mut heads).is_err() || heads[4..8] != [0; 4] {
            break;
        }
        let mut read = vec![0; data.len()];
        client.stream.read_exact(&mut read).unwrap();
        assert!(read == data, "wrong data in round {round}");
    }
    assert!(stop.load(Ordering::SeqCst), "the server left before it was told to");
}

/// Clients in every phase, some of them busy, while `storm` runs.
fn under_load(socket: &Path, storm: impl FnOnce()) {
    let told = AtomicBool::new(false);
    let phases = (Raw::connect(socket), Raw::greeted(socket), client(socket, "disk"));
    let mut unread = client(socket, "disk");
    unread.request(READ, 0, 1, 0, 8 << 20);
    thread::scope(|scope| {
        for seed in 0..4 {
            let told = &told;
            scope.spawn(move || work(socket, seed, told));
        }
        thread::sleep(Duration::from_millis(100));
        told.store(true, Ordering::SeqCst);
        storm();
    });
    drop((phases, unread));
}

/// CVE-2015-0847 and CVE-2024-7409: signals under load, clients in every phase.
#[test]
fn a_storm_of_sigterm_under_load_ends_in_order() {
    let (_bench, mut server) = volume("32M");
    under_load(&server.socket, || {
        let pid = Pid::from_child(&server.child);
        for round in 0..300 {
            let signal = if round % 2 == 0 { Signal::TERM } else { Signal::INT };
            // Not waited for yet, so the number cannot be another process's.
            kill_process(pid, signal).unwrap();
            thread::sleep(Duration::from_micros(100));
        }
    });
    let status = server.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(!server.socket.exists());
}

/// Every system call of the server may be interrupted; SIGHUP stands for any signal that has a handler.
#[test]
fn a_storm_of_sighup_under_load_is_not_felt() {
    let seen = std::sync::Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGHUP, seen.clone()).unwrap();
    let server = raw::serve(MemoryExport::new(32 * MIB));
    let handle = server.handle.clone();
    under_load(&server.path, || {
        for _ in 0..2000 {
            kill_process(rustix::process::getpid(), Signal::HUP).unwrap();
            thread::sleep(Duration::from_micros(100));
        }
        assert!(seen.load(Ordering::SeqCst));
        assert!(client(&server.path, "disk").read(0, 0, 9).is_ok(), "the server is alive");
        handle.stop();
    });
}

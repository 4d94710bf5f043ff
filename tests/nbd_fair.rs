//! Clients beside each other without any limit: each has its share, however much another one asks for. Counted in what was
//! served in one run, never by a clock.
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use common::{Raw, info};
use daxcrypt::nbd_server::{
    Export, ExportError, Exports, Handle, Hole, Limits, Listener, Options, Server, ServerError,
};

const MIB: u64 = 1 << 20;
const READ: u16 = 0;
const ZEROES: u16 = 6;
const NO_HOLE: u16 = 1 << 1;
/// The clients: who asks for as much as can be asked for works in the first half of the export.
const GREEDY: [u8; 4] = [127, 0, 0, 2];
const MODEST: [u8; 4] = [127, 0, 0, 3];
const SIZE: u64 = 64 * MIB;

/// A device of which every piece of work takes a processor for a while.
#[derive(Default)]
struct Busy {
    /// Pieces of work that were done in each half.
    done: [AtomicU64; 2],
    /// Threads at work in the first half, and the sum of them over the pieces that were done in the second.
    inside: AtomicU64,
    beside: AtomicU64,
}

/// What happened while a client had its requests.
struct Meanwhile {
    greedy: u64,
    modest: u64,
    /// Threads of the greedy one that were at work when one of the modest one was, on average.
    threads: u64,
}

impl Busy {
    fn work(&self, offset: u64) {
        let half = usize::from(offset >= SIZE / 2);
        if half == 0 {
            self.inside.fetch_add(1, Ordering::Relaxed);
        }
        let sum = (0..200_000_u64).fold(offset, |sum, next| black_box(sum.rotate_left(5) ^ next));
        black_box(sum);
        if half == 0 {
            self.inside.fetch_sub(1, Ordering::Relaxed);
        } else {
            self.beside.fetch_add(self.inside.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.done[half].fetch_add(1, Ordering::Relaxed);
    }

    fn done(&self) -> [u64; 3] {
        [&self.done[0], &self.done[1], &self.beside].map(|count| count.load(Ordering::Relaxed))
    }
}

impl Export for Busy {
    fn size_bytes(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.work(offset);
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, _: &[u8]) -> Result<(), ExportError> {
        self.work(offset);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, _: u64, _: Hole) -> Result<(), ExportError> {
        self.work(offset);
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), ExportError> {
        Err(ExportError::Unsupported)
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
}

/// A server over TCP, where the source address says which client it is.
struct Running {
    handle: Handle,
    address: SocketAddr,
    thread: JoinHandle<Result<(), ServerError>>,
}

fn serve(export: Arc<dyn Export>) -> Running {
    serve_limited(export, Limits::default())
}

fn serve_limited(export: Arc<dyn Export>, limits: Limits) -> Running {
    let mut exports = Exports::new();
    exports.add(info("disk"), export).unwrap();
    let listener = Listener::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = listener.tcp_address().unwrap();
    let server = Server::new(exports, limits, Options::default()).unwrap().listen(listener);
    let handle = server.handle();
    Running { handle, address, thread: thread::spawn(|| server.run()) }
}

impl Running {
    fn client(&self, source: [u8; 4]) -> Raw {
        let mut raw = Raw::from_address(source, self.address);
        raw.go("disk");
        raw
    }
}

/// Keeps so many requests under way, until it is told to stop.
fn keep_asking(mut raw: Raw, request: (u16, u16, u64, u64), depth: u64, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
    let stop = Arc::clone(stop);
    thread::spawn(move || {
        let (command, flags, offset, len) = request;
        let data = if command == READ { usize::try_from(len).unwrap() } else { 0 };
        for cookie in 0..depth {
            raw.request(command, flags, cookie, offset, len);
        }
        while !stop.load(Ordering::Relaxed) {
            assert_eq!(raw.errno(), 0);
            raw.take(data);
            raw.request(command, flags, 1, offset, len);
        }
    })
}

/// What each half did while a client with one connection had `count` reads, beside a greedy one with so many connections.
fn beside(connections: usize, request: (u16, u16, u64, u64), depth: u64, count: u64) -> Meanwhile {
    let export = Arc::new(Busy::default());
    let running = serve(export.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let mut greedy = Vec::new();
    for _ in 0..connections {
        greedy.push(keep_asking(running.client(GREEDY), request, depth, &stop));
    }
    let mut modest = running.client(MODEST);
    common::eventually("the greedy one is at full load", || export.done()[0] > 20);
    for cookie in 0..4 {
        modest.request(READ, 0, cookie, SIZE / 2, 512);
    }
    let mut answered = |count: u64| {
        for _ in 0..count {
            assert_eq!(modest.errno(), 0);
            modest.take(512);
            modest.request(READ, 0, 1, SIZE / 2, 512);
        }
    };
    answered(20);
    let before = export.done();
    answered(count);
    let after = export.done();
    stop.store(true, Ordering::Relaxed);
    greedy.into_iter().for_each(|thread| thread.join().unwrap());
    drop(modest);
    running.handle.stop();
    running.thread.join().unwrap().unwrap();
    let [greedy, modest, beside] = [0, 1, 2].map(|index| after[index] - before[index]);
    Meanwhile { greedy, modest, threads: beside / modest.max(1) }
}

/// Checks that a greedy client that would have `threads` threads at work has its part of the processors. How fast its threads are
/// beside the other's is the scheduler's, and what else the machine does.
fn check(meanwhile: &Meanwhile, threads: u64) {
    let Meanwhile { greedy, modest, threads: had } = meanwhile;
    let share = thread::available_parallelism().unwrap().get().div_ceil(2) as u64;
    println!("{greedy} of the one with {had} threads for {modest} of the other");
    assert!(*had <= 2 * share, "{had} threads at work, and not {share}");
    assert!(*greedy <= threads / 2 * modest, "{greedy} of the one for {modest} of the other");
}

#[test]
fn many_connections_are_no_larger_share_than_one() {
    let processors = thread::available_parallelism().unwrap().get();
    let meanwhile = beside(8 * processors, (READ, 0, 0, 512), 4, 300);
    check(&meanwhile, 8 * processors as u64);
    assert!(meanwhile.greedy > 0, "the greedy one has its share, too");
}

#[test]
fn long_requests_beside_their_connections_are_no_larger_share() {
    let processors = thread::available_parallelism().unwrap().get();
    check(&beside(processors, (ZEROES, NO_HOLE, 0, 32 * MIB), 16, 300), 16 * processors as u64);
}

#[test]
fn who_connects_often_does_not_push_out_who_connects_once() {
    let limits = Limits { handshaking_max: 4, ..Limits::default() };
    let running = serve_limited(Arc::new(Busy::default()), limits);
    let mut modest = Raw::from_address(MODEST, running.address);
    let many: Vec<_> = (0..12).map(|_| Raw::from_address(GREEDY, running.address)).collect();
    modest.go("disk");
    modest.request(READ, 0, 1, 0, 512);
    assert_eq!(modest.errno(), 0);
    running.handle.stop();
    drop((many, modest));
    running.thread.join().unwrap().unwrap();
}

#[test]
fn a_client_that_is_alone_has_all_of_the_processors() {
    let export = Arc::new(Gathering::default());
    let running = serve(export.clone());
    let mut clients: Vec<_> = (0..6).map(|_| running.client(GREEDY)).collect();
    // None of these is answered before all of them are at work at once.
    for raw in &mut clients {
        raw.request(READ, 0, 1, 0, 512);
    }
    for raw in &mut clients {
        assert_eq!(raw.errno(), 0);
        raw.take(512);
    }
    running.handle.stop();
    drop(clients);
    running.thread.join().unwrap().unwrap();
}

/// A device whose reads wait until six of them are there.
#[derive(Default)]
struct Gathering(std::sync::Mutex<usize>, std::sync::Condvar);

impl Export for Gathering {
    fn size_bytes(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, _: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        let mut there = self.0.lock().unwrap();
        *there += 1;
        self.1.notify_all();
        drop(self.1.wait_while(there, |there| *there < 6).unwrap());
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), ExportError> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: Hole) -> Result<(), ExportError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), ExportError> {
        Err(ExportError::Unsupported)
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
}

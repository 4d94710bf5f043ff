//! What one client can do to others, to the server and to itself: slow requests beside quick ones, ranges without end, buffers
//! that are held for nothing, handshakes that do not end.
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::{MemoryExport, Raw, Reply, Running, eventually, info, option_bytes, request_bytes, serve, serve_with};
use daxcrypt::nbd_server::{Export, ExportError, Exports, Extent, ExtentKind, Hole, Limits, Options};

const DIALECTS: [&str; 3] = ["simple", "structured", "extended"];
const MIB: u64 = 1 << 20;
const ESHUTDOWN: u32 = 108;
const EINVAL: u32 = 22;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;
const FUA: u16 = 1;
const REQ_ONE: u16 = 1 << 3;

/// A device without contents whose slow operations wait while its gate is closed.
#[derive(Default)]
struct Gated {
    size: u64,
    /// How many may still pass; `u64::MAX`: all.
    permits: Mutex<u64>,
    opened: Condvar,
    waiting: AtomicU64,
    passed: AtomicU64,
    /// Zeroes, discards and persists, with their lengths.
    calls: Mutex<Vec<(&'static str, u64)>>,
    status_calls: AtomicU64,
}

impl Gated {
    fn closed(size: u64) -> Arc<Self> {
        Arc::new(Self { size, ..Self::default() })
    }

    fn open(size: u64) -> Arc<Self> {
        Arc::new(Self { size, permits: u64::MAX.into(), ..Self::default() })
    }

    fn let_through(&self) {
        *self.permits.lock().unwrap() = u64::MAX;
        self.opened.notify_all();
    }

    /// Lets one operation pass, and waits until it has.
    fn let_one_through(&self) {
        let passed = self.passed.load(Ordering::SeqCst);
        *self.permits.lock().unwrap() += 1;
        self.opened.notify_one();
        eventually("a slow operation that passes", || self.passed.load(Ordering::SeqCst) > passed);
    }

    fn pass(&self, call: &'static str, len_bytes: u64) -> Result<(), ExportError> {
        self.calls.lock().unwrap().push((call, len_bytes));
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut permits = self.permits.lock().unwrap();
        while *permits == 0 {
            permits = self.opened.wait(permits).unwrap();
        }
        if *permits != u64::MAX {
            *permits -= 1;
        }
        self.passed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Waits until so many slow operations have begun since the start.
    fn await_begun(&self, count: u64) {
        eventually("the begin of slow operations", || self.waiting.load(Ordering::SeqCst) >= count);
    }
}

impl Export for Gated {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_at(&self, _: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        buf.fill(7);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), ExportError> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, len_bytes: u64, _: Hole) -> Result<(), ExportError> {
        self.pass("zeroes", len_bytes)
    }

    fn discard(&self, _: u64, len_bytes: u64) -> Result<(), ExportError> {
        self.pass("discard", len_bytes)
    }

    fn persist(&self, _: u64, len_bytes: u64) -> Result<(), ExportError> {
        self.pass("persist", len_bytes)
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.pass("flush", 0)
    }

    fn discards(&self) -> bool {
        true
    }

    /// One run of data.
    fn extents(&self, offset: u64, _: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        self.status_calls.fetch_add(1, Ordering::SeqCst);
        assert_eq!(limit, 1, "more is looked for than was asked");
        Ok(vec![Extent { len_bytes: self.size - offset, kind: ExtentKind::Allocated }])
    }
}

fn serve_limited(export: Arc<dyn Export>, limits: Limits, options: Options) -> Running {
    let mut exports = Exports::new();
    exports.add(info("disk"), export).unwrap();
    serve_with(exports, limits, options)
}

/// The cookie of the next reply, which has to be a success without data.
fn success(raw: &mut Raw) -> u64 {
    match raw.reply() {
        Reply::Simple { error: 0, cookie } | Reply::Chunk { flags: 1, kind: 0, cookie, .. } => cookie,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_slow_request_leaves_its_connection_free() {
    let slow = [(FLUSH, 0, 0, 0), (WRITE, FUA, 0, 4096), (ZEROES, 0, 0, 8 * MIB), (TRIM, 0, 0, 4096)];
    for dialect in DIALECTS {
        for (command, flags, offset, len) in slow {
            let export = Gated::closed(64 * MIB);
            let server = serve(export.clone());
            let mut raw = Raw::in_transmission(&server.path, dialect);
            let flags = if raw.extended && command == WRITE { flags | 1 << 5 } else { flags };
            raw.request(command, flags, 1, offset, len);
            if command == WRITE {
                raw.send(&[3; 4096]);
            }
            export.await_begun(1);
            // While it waits, others are answered.
            for _ in 0..3 {
                assert_eq!(raw.read(0, 4096, 512).unwrap(), [7; 512], "{dialect} {command}");
                assert_eq!(raw.write(0, 4096, b"data"), 0);
            }
            export.let_through();
            assert_eq!(success(&mut raw), 1);
        }
    }
}

#[test]
fn more_slow_requests_than_there_are_threads_are_all_answered_once() {
    const CLIENTS: u64 = 6;
    const EACH: u64 = 40;
    let export = Gated::closed(64 * MIB);
    let server = serve(export.clone());
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| Raw::in_transmission(&server.path, "structured")).collect();
    for client in &mut clients {
        (0..EACH).for_each(|cookie| client.request(FLUSH, 0, cookie, 0, 0));
    }
    // So many run beside their connections, and the connections whose turn it was not run one themselves.
    export.await_begun(64);
    export.let_through();
    for client in &mut clients {
        let mut cookies: Vec<_> = (0..EACH).map(|_| success(client)).collect();
        cookies.sort_unstable();
        assert!(cookies.into_iter().eq(0..EACH));
    }
}

#[test]
fn a_client_that_disconnects_gets_what_is_still_under_way() {
    let export = Gated::closed(64 * MIB);
    let server = serve(export.clone());
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        let begun = export.waiting.load(Ordering::SeqCst);
        raw.request(FLUSH, 0, 1, 0, 0);
        raw.request(DISC, 0, 2, 0, 0);
        export.await_begun(begun + 1);
        export.let_through();
        assert_eq!(success(&mut raw), 1);
        assert!(raw.is_closed());
    }
}

#[test]
fn a_client_that_is_gone_with_replies_and_work_under_way_is_forgotten() {
    let export = Gated::closed(MIB);
    let mut running = serve(export.clone());
    let mut raw = Raw::in_transmission(&running.path, "simple");
    for cookie in 0..3 {
        raw.request(FLUSH, 0, cookie, 0, 0);
    }
    eventually("the flushes have begun", || export.waiting.load(Ordering::SeqCst) == 3);
    // Its socket is broken before the reply to this can leave.
    raw.stream.shutdown(Shutdown::Read).unwrap();
    raw.request(READ, 0, 9, 0, 512);
    drop(raw);
    export.let_through();
    eventually("the client is forgotten", || running.handle.connection_count() == 0);
    running.stop().unwrap();
}

#[test]
fn a_range_without_end_is_cut_in_slices_and_ends_when_its_client_leaves() {
    for (command, call) in [(ZEROES, "zeroes"), (TRIM, "discard")] {
        let export = Gated::closed(1 << 62);
        let server = serve(export.clone());
        let mut raw = Raw::in_transmission(&server.path, "extended");
        raw.request(command, 0, 1, 5, 1 << 60);
        export.await_begun(1);
        drop(raw);
        export.let_through();
        eventually("the end of the connection", || server.handle.connection_count() == 0);
        let calls = export.calls.lock().unwrap();
        assert!(calls.iter().all(|(name, len)| *name == call && *len <= 4 * MIB), "{:?}", &calls[..3.min(calls.len())]);
    }
}

/// The replies to what ends first cannot be sent any more when the next ends.
#[test]
fn a_client_that_leaves_slow_requests_behind_is_forgotten_when_they_have_ended_one_by_one() {
    let export = Gated::closed(64 * MIB);
    let server = serve(export.clone());
    let mut raw = Raw::in_transmission(&server.path, "extended");
    for cookie in 0..2 {
        raw.request(FLUSH, 0, cookie, 0, 0);
    }
    export.await_begun(2);
    drop(raw);
    export.let_one_through();
    export.let_through();
    eventually("the end of the connection", || server.handle.connection_count() == 0);
}

#[test]
fn a_range_without_end_does_not_keep_a_server_from_stopping() {
    let limits = Limits { drain_deadline: Duration::from_millis(400), ..Limits::default() };
    let export = Gated::open(1 << 62);
    let mut server = serve_limited(export.clone(), limits, Options::default());
    let mut raw = Raw::in_transmission(&server.path, "extended");
    raw.request(ZEROES, 0, 1, 0, 1 << 60);
    export.await_begun(1);
    server.stop().unwrap();
    assert_eq!(raw.errno(), ESHUTDOWN, "it is told before it is cut off");
}

#[test]
fn one_extent_is_one_look_and_a_run_of_data_is_found_once() {
    let export = Gated::open(64 << 30);
    let server = serve(export.clone());
    let mut raw = Raw::in_transmission(&server.path, "extended");
    for flags in [REQ_ONE, 0] {
        for index in 0..100u64 {
            raw.request(STATUS, flags, 5, index * MIB, MIB);
            let Reply::Chunk { kind: 6, payload, .. } = raw.reply() else { panic!("not status") };
            assert_eq!(payload.len(), 8 + 16, "one extent");
        }
        assert_eq!(export.status_calls.load(Ordering::SeqCst), 1, "the end of one run was found again and again");
    }
    // What this connection may have changed it asks for again.
    assert_eq!(raw.run(TRIM, 0, 0, 4096), 0);
    raw.request(STATUS, REQ_ONE, 5, 0, MIB);
    raw.reply();
    assert_eq!(export.status_calls.load(Ordering::SeqCst), 2);
}

#[test]
fn a_long_write_is_made_durable_once() {
    let export = Gated::open(64 * MIB);
    let server = serve(export.clone());
    let mut raw = Raw::in_transmission(&server.path, "simple");
    assert_eq!(raw.write(FUA, 3, &vec![1; 32 << 20]), 0);
    assert_eq!(*export.calls.lock().unwrap(), [("persist", 32 * MIB)]);
}

#[test]
fn clients_with_one_byte_each_hold_no_large_buffers() {
    let server = serve(MemoryExport::new(8 * MIB));
    let mut clients: Vec<_> = (0..90).map(|_| Raw::in_transmission(&server.path, "simple")).collect();
    for client in &mut clients {
        // The first byte of a request, behind a request that needs large buffers.
        assert_eq!(client.read(0, 0, 1 << 20).unwrap().len(), 1 << 20);
        client.send(&request_bytes(false, READ, 0, 1, 0, 512)[..1]);
    }
    eventually("the return of the buffers", || server.handle.buffer_bytes() == 0);
    for client in &mut clients {
        client.send(&request_bytes(false, READ, 0, 1, 0, 512)[1..]);
        assert_eq!(client.errno(), 0);
        client.take(512);
    }
}

#[test]
fn a_payload_that_stops_in_the_middle_holds_no_large_buffers() {
    let export = MemoryExport::new(8 * MIB);
    let server = serve(export.clone());
    let mut raw = Raw::in_transmission(&server.path, "simple");
    let data: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251).to_be_bytes()[3]).collect();
    raw.request(WRITE, 0, 1, 77, data.len() as u64);
    let mut sent = 0;
    for stop in [1, 100_001, 300_000, 999_999, data.len()] {
        raw.send(&data[sent..stop]);
        sent = stop;
        if stop < data.len() {
            eventually("the return of the buffers", || server.handle.buffer_bytes() == 0);
        }
    }
    assert_eq!(raw.errno(), 0);
    assert!(export.bytes(77, data.len()) == data);
}

#[test]
fn the_budget_counts_what_the_kernel_was_asked_for() {
    let sockets = 3 << 20;
    let options = Options { socket_buffer_bytes: sockets, ..Options::default() };
    let server = serve_limited(MemoryExport::new(32 * MIB), Limits::default(), options);
    let mut raw = Raw::in_transmission(&server.path, "simple");
    raw.request(READ, 0, 1, 0, 32 << 20);
    raw.take(16);
    // It does not read on, so the server cannot rest.
    assert!(server.handle.buffer_bytes() >= 2 * sockets, "{} bytes", server.handle.buffer_bytes());
    raw.take(32 << 20);
    eventually("the return of the buffers", || server.handle.buffer_bytes() == 0);
}

#[test]
fn a_client_that_asks_and_does_not_read_ends_with_the_handshake() {
    let limits = Limits { handshake_deadline: Duration::from_millis(300), ..Limits::default() };
    let server = serve_limited(MemoryExport::new(MIB), limits, Options::default());
    let mut raw = Raw::greeted(&server.path);
    raw.stream.set_nonblocking(true).unwrap();
    let list = option_bytes(3, &[]).repeat(1000);
    let flooded = loop {
        if let Err(error) = raw.stream.write_all(&list) {
            break error.kind();
        }
    };
    assert!(matches!(flooded, ErrorKind::WouldBlock | ErrorKind::BrokenPipe), "{flooded}");
    eventually("the end of the handshake", || server.handle.connection_count() == 0);
}

#[test]
fn chunks_are_made_of_whole_units() {
    let server = serve(MemoryExport::new(8 * MIB));
    for (budget, len) in [(usize::MAX, 5 * MIB), (0, 100_000)] {
        let limits = Limits { buffer_bytes_max: budget, ..Limits::default() };
        let server = serve_limited(MemoryExport::new(8 * MIB), limits, Options::default());
        let mut raw = Raw::in_transmission(&server.path, "structured");
        raw.request(READ, 0, 1, 4096 + 512, len);
        let mut chunks = 0;
        loop {
            let Reply::Chunk { flags, kind: 1, payload, .. } = raw.reply() else { panic!("not data") };
            chunks += 1;
            if flags & 1 == 1 {
                break;
            }
            let end = u64::from_be_bytes(*payload.first_chunk().unwrap()) + payload.len() as u64 - 8;
            assert_eq!(end % 4096, 0, "a chunk ends inside of a unit");
        }
        assert!(chunks > 1);
    }
    drop(server);
}

#[test]
fn holes_are_not_sent() {
    let export = Arc::new(MemoryExport { discards: true, ..MemoryExport::plain(8 * MIB) });
    let server = serve(export.clone());
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        assert_eq!(raw.write(0, MIB + 100, &[5; 10_000]), 0);
        let model = export.bytes(1000, 3 << 20);
        assert!(raw.read(0, 1000, 3 << 20).unwrap() == model, "{dialect}");
        assert!(raw.read(1 << 2, 1000, 3 << 20).is_ok() || dialect == "simple", "DF has no holes");
        if dialect == "simple" {
            continue;
        }
        raw.request(READ, 0, 79, 0, 3 * MIB);
        let mut kinds = Vec::new();
        let mut sent = 0;
        loop {
            let Reply::Chunk { flags, kind, payload, .. } = raw.reply() else { panic!("not a chunk") };
            kinds.push(kind);
            sent += payload.len();
            if flags & 1 == 1 {
                break;
            }
        }
        assert_eq!(kinds, [2, 1, 2]);
        assert!(sent < 20_000, "{sent} bytes");
    }
}

#[test]
fn what_does_not_prefetch_does_not_say_so() {
    for (export, offered) in [(Gated::open(MIB) as Arc<dyn Export>, false), (MemoryExport::new(MIB), true)] {
        let server = serve(export);
        let mut raw = Raw::greeted(&server.path);
        let (_, flags) = raw.go("disk");
        assert_eq!(flags & 1 << 10 != 0, offered);
        assert_eq!(raw.run(CACHE, 0, 0, 4096), if offered { 0 } else { EINVAL });
    }
}

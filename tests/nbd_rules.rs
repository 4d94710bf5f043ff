//! More of the protocol's rules (numbers of section 1.5 of the NBD notes): what reaches the export, what one connection
//! promises another, and the shape of long replies.
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{MemoryExport, Raw, Reply, Running, eventually, info, info_payload, request_bytes, serve};
use daxcrypt::nbd_server::handshake::{CloseReason, Handshake, Outcome, Step};
use daxcrypt::nbd_server::{Export, ExportError, Exports, Extent, ExtentKind, Hole, Peer, TlsMode};

const SIZE: u64 = 1 << 20;
const DIALECTS: [&str; 3] = ["simple", "structured", "extended"];
const EIO: u32 = 5;
const READ: u16 = 0;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;
const FUA: u16 = 1;
const NO_HOLE: u16 = 1 << 1;
const DF: u16 = 1 << 2;

/// A device without contents that remembers what was done to it and what is durable: a write cache until a flush.
#[derive(Default)]
struct Recorder {
    size: u64,
    calls: Mutex<Vec<(&'static str, Option<Hole>)>>,
    cached: Mutex<Vec<u64>>,
    durable: Mutex<Vec<u64>>,
}

impl Recorder {
    fn of_size(size: u64) -> Arc<Self> {
        Arc::new(Self { size, ..Self::default() })
    }

    fn note(&self, call: &'static str, hole: Option<Hole>) {
        self.calls.lock().unwrap().push((call, hole));
    }

    fn calls(&self) -> Vec<(&'static str, Option<Hole>)> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Export for Recorder {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_at(&self, _: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, _: &[u8]) -> Result<(), ExportError> {
        self.note("write", None);
        self.cached.lock().unwrap().push(offset);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, _: u64, hole: Hole) -> Result<(), ExportError> {
        self.note("zeroes", Some(hole));
        self.cached.lock().unwrap().push(offset);
        Ok(())
    }

    fn discard(&self, offset: u64, _: u64) -> Result<(), ExportError> {
        self.note("discard", None);
        self.cached.lock().unwrap().push(offset);
        Ok(())
    }

    fn persist(&self, _: u64, _: u64) -> Result<(), ExportError> {
        self.note("persist", None);
        self.flush()
    }

    fn flush(&self) -> Result<(), ExportError> {
        let cached = std::mem::take(&mut *self.cached.lock().unwrap());
        self.durable.lock().unwrap().extend(cached);
        Ok(())
    }

    fn discards(&self) -> bool {
        true
    }

    /// Alternating extents of 3 GiB; the last one reaches beyond what was asked.
    fn extents(&self, offset: u64, len_bytes: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        const RUN: u64 = 3 << 30;
        let kind = |index: u64| if index.is_multiple_of(2) { ExtentKind::Allocated } else { ExtentKind::Hole };
        let first = offset / RUN;
        let runs = (first..).take_while(|index| index * RUN < offset + len_bytes).take(limit);
        Ok(runs
            .map(|index| Extent { len_bytes: (index + 1) * RUN - (index * RUN).max(offset), kind: kind(index) })
            .collect())
    }
}

fn disk() -> Running {
    serve(MemoryExport::new(SIZE))
}

/// What an old client, which knows neither fixed newstyle nor TLS, gets after `option`.
fn old_client(mode: TlsMode, option: u32, payload: &[u8]) -> Step {
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(SIZE)).unwrap();
    let mut machine = Handshake::new(Arc::new(exports), mode, Peer::default());
    let mut output = Vec::new();
    assert!(matches!(machine.step(&[0; 4], &mut output), (4, Step::Continue)));
    let step = machine.step(&common::option_bytes(option, payload), &mut output).1;
    assert!(!matches!(step, Step::Done(Outcome::Closed(_))) || output.is_empty(), "text for a client that is dropped");
    step
}

#[test]
fn rule_5_without_fixed_newstyle_there_is_no_tls() {
    for mode in [TlsMode::Off, TlsMode::Allow, TlsMode::Require] {
        let refused = old_client(mode, 5, &[]);
        assert!(matches!(refused, Step::Done(Outcome::Closed(CloseReason::NotFixedNewstyle))), "{mode:?}: {refused:?}");
        let chosen = old_client(mode, 1, b"disk");
        if mode == TlsMode::Require {
            assert!(matches!(chosen, Step::Done(Outcome::Closed(CloseReason::ExportNameRefused))), "{chosen:?}");
        } else {
            assert!(matches!(chosen, Step::Done(Outcome::Transmission(_))), "{mode:?}: {chosen:?}");
        }
    }
}

#[test]
fn rule_11_block_sizes_need_not_be_asked_for() {
    let server = disk();
    let mut raw = Raw::greeted(&server.path);
    raw.option(6, &info_payload("disk", &[3]));
    let block_size = loop {
        let reply = raw.option_reply();
        assert_eq!(reply.kind, 3);
        if reply.payload[..2] == [0, 3] {
            break reply.payload;
        }
    };
    assert_eq!(block_size[2..], [1u32, 4096, 64 << 20].map(u32::to_be_bytes).concat());
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        let mut model = vec![0xa5; 3 * 4096];
        assert_eq!(raw.write(0, 0, &model), 0);
        for (offset, len) in [(1usize, 1usize), (2, 4094), (4095, 2), (511, 8191), (4097, 1), (12_287, 1)] {
            let data = vec![u8::try_from(offset & 255).unwrap(); len];
            model[offset..offset + len].copy_from_slice(&data);
            assert_eq!(raw.write(0, offset as u64, &data), 0);
            assert_eq!(raw.read(0, offset as u64, len).unwrap(), data);
        }
        assert!(raw.read(0, 0, model.len()).unwrap() == model, "{dialect}: an unaligned write hit its neighbours");
    }
}

#[test]
fn rule_13_chunks_cover_the_request_once_and_done_comes_last() {
    let export = MemoryExport::new(8 << 20);
    let server = serve(export.clone());
    let (offset, len) = (777u64, (5u64 << 20) | 3);
    for dialect in ["structured", "extended"] {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        // Two at once: the second one's chunks must not say the first one's cookie.
        raw.request(READ, 0, 1, offset, len);
        raw.request(READ, 0, 2, offset, len);
        for expected in [1, 2] {
            let mut next = offset;
            loop {
                let Reply::Chunk { flags, kind: 1, cookie, payload, .. } = raw.reply() else { panic!("not data") };
                assert_eq!(cookie, expected);
                assert_eq!(u64::from_be_bytes(*payload.first_chunk().unwrap()), next, "a gap or an overlap");
                assert!(payload.len() > 8, "a chunk without data");
                next += payload.len() as u64 - 8;
                assert_eq!(flags & 1 == 1, next == offset + len, "DONE is for the last chunk");
                if flags & 1 == 1 {
                    break;
                }
            }
        }
        for bad in [offset, offset + (3 << 20), offset + len - 1] {
            export.bad_byte.store(bad, Ordering::Relaxed);
            for flags in [0, DF] {
                raw.request(READ, flags, 3, offset, len);
                let (at, error) = error_of(&mut raw);
                assert_eq!(error, EIO);
                assert!((offset..=bad).contains(&at), "an error at {at}, outside {offset}..={bad}");
            }
        }
        export.bad_byte.store(u64::MAX, Ordering::Relaxed);
    }
}

/// The offset and number of the error that ends a reply.
fn error_of(raw: &mut Raw) -> (u64, u32) {
    loop {
        let Reply::Chunk { flags, kind, payload, .. } = raw.reply() else { panic!("not a chunk") };
        if flags & 1 == 1 {
            assert_eq!(kind, 0x8002);
            return (
                u64::from_be_bytes(*payload.last_chunk().unwrap()),
                u32::from_be_bytes(*payload.first_chunk().unwrap()),
            );
        }
    }
}

#[test]
fn rule_14_status_queries_near_4_gib_stay_inside_32_bits() {
    let server = serve(Recorder::of_size(20 << 30));
    // CVE-2025-47711 and 47712.
    for offset in [0, 1 << 30, (3 << 30) - 1] {
        for len in [0xffff_ffff_u64, 0xffff_fe00] {
            let mut raw = Raw::in_transmission(&server.path, "structured");
            raw.request(STATUS, 0, 5, offset, len);
            let Reply::Chunk { flags: 1, kind: 5, payload, .. } = raw.reply() else { panic!("not status") };
            let lengths: Vec<u64> =
                payload[4..].chunks(8).map(|pair| u32::from_be_bytes(*pair.first_chunk().unwrap()).into()).collect();
            assert!(lengths.iter().all(|len| *len > 0) && lengths.len() > 1, "{lengths:?}");
            assert_eq!(lengths.iter().sum::<u64>(), len);
            raw.request(STATUS, 1 << 3, 5, offset, len);
            let Reply::Chunk { kind: 5, payload, .. } = raw.reply() else { panic!("not status") };
            assert_eq!(payload.len(), 12, "one extent");
        }
    }
    let mut raw = Raw::in_transmission(&server.path, "extended");
    raw.request(STATUS, 0, 5, 0, 20 << 30);
    let Reply::Chunk { kind: 6, payload, .. } = raw.reply() else { panic!("not status") };
    let lengths: Vec<u64> =
        payload[8..].chunks(16).map(|pair| u64::from_be_bytes(*pair.first_chunk().unwrap())).collect();
    assert_eq!(lengths, [3u64 << 30, 3 << 30, 3 << 30, 3 << 30, 3 << 30, 3 << 30, 2 << 30]);
}

#[test]
fn rule_16_fua_reaches_the_export() {
    for dialect in DIALECTS {
        let export = Recorder::of_size(SIZE);
        let server = serve(export.clone());
        let mut raw = Raw::in_transmission(&server.path, dialect);
        for (flags, persist) in [(0, None), (FUA, Some("persist"))] {
            assert_eq!(raw.write(flags, 0, b"data"), 0);
            assert_eq!(raw.run(TRIM, flags, 0, 4096), 0);
            assert_eq!(raw.run(ZEROES, flags, 0, 4096), 0);
            let calls: Vec<_> = export.calls().into_iter().map(|call| call.0).collect();
            let wanted: Vec<_> =
                ["write", "discard", "zeroes"].into_iter().flat_map(|call| [Some(call), persist]).flatten().collect();
            assert_eq!(calls, wanted);
        }
    }
}

#[test]
fn rule_16_a_flush_covers_what_other_connections_wrote() {
    let export = Recorder::of_size(SIZE);
    let server = serve(export.clone());
    let mut writers: Vec<_> = DIALECTS.iter().map(|dialect| Raw::in_transmission(&server.path, dialect)).collect();
    let mut flusher = Raw::in_transmission(&server.path, "simple");
    for round in 0..100u64 {
        for (index, writer) in writers.iter_mut().enumerate() {
            assert_eq!(writer.write(0, (round * 3 + index as u64) * 8, b"written"), 0);
        }
        assert_eq!(export.cached.lock().unwrap().len(), 3, "a write is durable too early for this test");
        assert_eq!(flusher.run(FLUSH, 0, 0, 0), 0);
        let durable = export.durable.lock().unwrap();
        assert!((0..(round + 1) * 3).all(|index| durable.contains(&(index * 8))), "round {round}");
    }
}

#[test]
fn rule_18_no_hole_reaches_the_export() {
    let export = Recorder::of_size(SIZE);
    let server = serve(export.clone());
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        assert_eq!(raw.run(ZEROES, NO_HOLE, 0, SIZE), 0);
        assert_eq!(raw.run(ZEROES, 0, 0, SIZE), 0);
        let holes: Vec<_> = export.calls().into_iter().map(|call| call.1).collect();
        assert_eq!(holes, [Some(Hole::Forbidden), Some(Hole::Allowed)]);
    }
}

#[test]
fn rule_20_cookies_are_opaque_and_a_full_payload_has_its_overhead_on_top() {
    let server = serve(MemoryExport::new(32 << 20));
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        let cookies = [0, u64::MAX, 7, 7, 0x6744_6698_6744_6698, 0x2560_9513_0000_0000];
        let requests: Vec<_> =
            cookies.iter().map(|cookie| request_bytes(raw.extended, FLUSH, 0, *cookie, 0, 0)).collect();
        raw.send(&requests.concat());
        let mut replied = cookies.map(|_| {
            let (Reply::Simple { cookie, .. } | Reply::Chunk { cookie, .. }) = raw.reply();
            cookie
        });
        let mut asked = cookies;
        asked.sort_unstable();
        replied.sort_unstable();
        assert_eq!(replied, asked);
        if dialect != "simple" {
            raw.request(READ, DF, 1, 0, 32 << 20);
            let Reply::Chunk { flags, payload, .. } = raw.reply() else { panic!("not a chunk") };
            assert_eq!(payload.len(), (32 << 20) + 8);
            assert!(flags & 1 == 1 || raw.errno() == 0);
        }
    }
}

#[test]
fn a_client_that_hangs_up_in_the_middle_of_a_reply_leaves_nothing_behind() {
    let server = serve(MemoryExport::new(8 << 20));
    let mut witness = Raw::in_transmission(&server.path, "structured");
    for round in 0..300usize {
        let mut raw = Raw::in_transmission(&server.path, DIALECTS[round % 3]);
        for cookie in 0..4 {
            raw.request(READ, 0, cookie, 0, 8 << 20);
        }
        raw.take(round * 997 % 300_000);
        drop(raw);
        if round % 50 == 0 {
            assert_eq!(witness.read(0, 5, 3).unwrap(), [0; 3]);
        }
    }
    eventually("the end of those who left", || server.handle.connection_count() == 1);
    assert_eq!(witness.read(0, 0, 8 << 20).unwrap().len(), 8 << 20);
    drop(witness);
    eventually("the return of all buffers", || server.handle.buffer_bytes() == 0);
}

#[test]
fn a_client_that_closes_its_sending_side_gets_its_replies() {
    let server = serve(MemoryExport::new(8 << 20));
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        let request = request_bytes(raw.extended, READ, 0, 1, 0, 8 << 20);
        raw.send(&request.repeat(3));
        raw.stream.shutdown(Shutdown::Write).unwrap();
        let mut replies = Vec::new();
        std::io::Read::read_to_end(&mut raw.stream, &mut replies).unwrap();
        assert!(replies.len() > 3 * (8 << 20), "{dialect}: {} bytes", replies.len());
    }
}

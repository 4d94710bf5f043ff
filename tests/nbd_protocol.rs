//! The protocol's rules that implementations get wrong, by a raw client. Numbers are those of the rule list in the
//! NBD notes (section 1.5).
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{
    MemoryExport, Raw, Reply, Running, eventually, info, info_payload, meta_payload, option_bytes, request_bytes,
    serve, serve_with,
};
use daxcrypt::nbd_server::{ExportInfo, Exports, Limits, ListenError, Listener, Options};

const SIZE: u64 = 1 << 20;
const DIALECTS: [&str; 3] = ["simple", "structured", "extended"];
const ACK: u32 = 1;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_POLICY: u32 = 0x8000_0002;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_TOO_BIG: u32 = 0x8000_0009;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

fn disk() -> Running {
    serve(MemoryExport::new(SIZE))
}

fn read_only() -> Running {
    let mut exports = Exports::new();
    exports.add(ExportInfo { read_only: true, ..info("disk") }, MemoryExport::new(SIZE)).unwrap();
    serve_with(exports, Limits::default(), Options::default())
}

fn sparse() -> (Arc<MemoryExport>, Running) {
    let export = Arc::new(MemoryExport { discards: true, ..MemoryExport::plain(SIZE) });
    (export.clone(), serve(export))
}

#[test]
fn rule_1_unknown_and_oversized_options_stay_in_sync() {
    let server = disk();
    let mut raw = Raw::greeted(&server.path);
    assert_eq!(raw.ask(0x0765_4321, &[7; 3000]).kind, ERR_UNSUP);
    assert_eq!(raw.ask(4, b"peek").kind, ERR_UNSUP);
    assert_eq!(raw.ask(0x0765_4321, &vec![7; 100_000]).kind, ERR_UNSUP);
    assert_eq!(raw.ask(7, &vec![7; 100_000]).kind, ERR_TOO_BIG);
    assert_eq!(raw.ask(8, &[]).kind, ACK);
    // CVE-2017-15119: a payload of 4 GiB ends the connection at once.
    raw.send(b"IHAVEOPT\x00\x00\x00\x03\xff\xff\xff\xff");
    assert!(raw.is_closed());
}

#[test]
fn rule_2_client_flags_that_were_not_offered_close() {
    let server = disk();
    for flags in [4u32, 0x8000_0000, 7] {
        let mut raw = Raw::connect(&server.path);
        raw.take(18);
        raw.send(&flags.to_be_bytes());
        assert!(raw.is_closed());
    }
}

#[test]
fn rule_3_lengths_and_strings_of_options() {
    let server = disk();
    let mut raw = Raw::greeted(&server.path);
    assert_eq!(raw.ask(8, &[]).kind, ACK);
    for option in [6, 7, 9, 10] {
        let counted = |name: &str| if option < 9 { info_payload(name, &[]) } else { meta_payload(name, &[]) };
        for len in [257, 3000, 4096] {
            let reply = raw.ask(option, &counted(&"n".repeat(len)));
            assert_eq!(reply.kind, ERR_UNKNOWN);
            assert!(reply.payload.len() < 4096);
        }
        assert_eq!(raw.ask(option, &counted(&"n".repeat(4097))).kind, ERR_INVALID);
        assert_eq!(raw.ask(option, &counted("di\0sk")).kind, ERR_INVALID);
        let mut bad = counted("disk");
        bad[4] = 0xff; // not UTF-8
        assert_eq!(raw.ask(option, &bad).kind, ERR_INVALID);
        for len in [5u32, 100, u32::MAX] {
            let mut bad = counted("disk");
            bad[..4].copy_from_slice(&len.to_be_bytes());
            assert_eq!(raw.ask(option, &bad).kind, ERR_INVALID, "name length {len}");
        }
        let mut bad = counted("disk");
        *bad.last_mut().unwrap() = 1; // one item announced, none there
        assert_eq!(raw.ask(option, &bad).kind, ERR_INVALID);
        for cut in 0..counted("disk").len() {
            assert_eq!(raw.ask(option, &counted("disk")[..cut]).kind, ERR_INVALID);
        }
        assert_eq!(raw.ask(option, &[&counted("disk")[..], &[0; 2000]].concat()).kind, ERR_INVALID);
    }
    for option in [3, 8, 11] {
        assert_eq!(raw.ask(option, b"x").kind, ERR_INVALID);
    }
    let reply = raw.ask(6, &info_payload("a\x1b[2J\u{e9}", &[]));
    assert!(reply.payload.is_ascii() && !reply.payload.contains(&0x1b), "{reply:?}");
    raw.go("disk");
}

#[test]
fn rule_4_without_tls_nothing_asks_for_it() {
    let server = disk();
    let mut raw = Raw::greeted(&server.path);
    assert_eq!(raw.ask(5, &[]).kind, ERR_POLICY);
    raw.go("disk");
}

#[test]
fn rule_6_ranges_are_checked_without_overflow() {
    let (_export, server) = sparse();
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0), (u64::MAX, 1), (u64::MAX, 0xffff), (0, SIZE + 1)]
        {
            for (command, error) in [(READ, EINVAL), (TRIM, EINVAL), (CACHE, EINVAL), (ZEROES, ENOSPC)] {
                assert_eq!(raw.run(command, 0, offset, len), error, "{dialect} {command} {offset}+{len}");
            }
            if dialect != "simple" {
                assert_eq!(raw.run(STATUS, 0, offset, len), EINVAL);
            }
        }
        assert_eq!(raw.write(0, SIZE - 1, b"ab"), ENOSPC);
        assert_eq!(raw.write(0, u64::MAX, b"ab"), ENOSPC);
        assert_eq!(raw.write(0, SIZE - 2, b"ab"), 0);
        assert_eq!(raw.read(0, SIZE - 2, 2).unwrap(), b"ab");
    }
}

#[test]
fn rule_7_read_only_exports_refuse_writes_and_advertise_none() {
    let server = read_only();
    let (_, flags) = Raw::greeted(&server.path).go("disk");
    assert_eq!(flags & (1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 11), 1 << 1);
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        assert_eq!(raw.write(0, 0, &[1; 70_000]), EPERM);
        assert_eq!(raw.run(TRIM, 0, 0, 512), EPERM);
        assert_eq!(raw.run(ZEROES, 0, 0, 512), EPERM);
        assert_eq!(raw.read(0, 0, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn rule_8_unknown_commands_and_flags_keep_the_connection() {
    let server = disk();
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        for command in [8, 9, 0x7fff] {
            assert_eq!(raw.run(command, 0, 0, 0), EINVAL);
        }
        for (command, flags) in [(READ, 2), (READ, 1 << 6), (FLUSH, 2), (CACHE, 4), (ZEROES, 8), (READ, 0x8000)] {
            assert_eq!(raw.run(command, flags, 0, 0), EINVAL, "{dialect} {command} {flags}");
        }
        assert_eq!(raw.write(1 << 1, 0, b"data"), EINVAL);
        assert_eq!(raw.run(TRIM, 0, 0, 512), EINVAL, "TRIM is not advertised here");
        assert_eq!(raw.run(FLUSH, 0, 0, 1), EINVAL);
        assert_eq!(raw.run(FLUSH, 0, 1, 0), EINVAL);
        assert_eq!(raw.read(0, 0, 4).unwrap(), [0; 4]);
    }
    let mut raw = Raw::in_transmission(&server.path, "simple");
    assert_eq!(raw.run(READ, 4, 0, 4), EINVAL, "DF needs structured replies");
    assert_eq!(raw.run(STATUS, 0, 0, 4), EINVAL, "no context was negotiated");
}

#[test]
fn rule_9_requests_of_no_bytes() {
    let (_export, server) = sparse();
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        raw.request(READ, 0, 5, 0, 0);
        match raw.reply() {
            Reply::Simple { error, .. } => assert!(dialect == "simple" && error == 0),
            Reply::Chunk { flags, kind, payload, .. } => assert!(flags == 1 && kind == 0 && payload.is_empty()),
        }
        for command in [TRIM, CACHE, ZEROES] {
            assert_eq!(raw.run(command, 0, SIZE, 0), 0);
        }
        assert_eq!(raw.write(0, 0, b""), 0);
        assert_eq!(raw.run(STATUS, 0, 0, 0), EINVAL);
        assert_eq!(raw.run(FLUSH, 0, 0, 0), 0);
    }
}

#[test]
fn rule_10_sizes_up_to_64_mib_and_beyond() {
    let export = MemoryExport::new(80 << 20);
    let server = serve(export);
    let largest = 64usize << 20;
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        let data: Vec<u8> = (0..largest).map(|i| u8::try_from((i * 7 + (i >> 12)) & 255).unwrap()).collect();
        assert_eq!(raw.write(0, 12_345, &data), 0);
        assert!(raw.read(0, 12_345, largest).unwrap() == data, "{dialect}");
        assert_eq!(raw.run(READ, 0, 0, (64 << 20) + 1), EOVERFLOW);
        assert_eq!(raw.run(READ, 0, 0, 0xffff_ffff), EINVAL);
        assert_eq!(raw.run(ZEROES, 0, 0, 80 << 20), 0, "zeroes have no payload");
    }
    let mut raw = Raw::in_transmission(&server.path, "simple");
    assert_eq!(raw.write(0, 0, &vec![1; largest + 1]), EINVAL);
    assert_eq!(raw.read(0, 0, 1).unwrap(), [0]);
    raw.request(WRITE, 0, 1, 0, 0xffff_ffff);
    assert!(raw.is_closed(), "nobody drains 4 GiB");
}

#[test]
fn rule_12_df_gets_one_chunk() {
    let server = serve(MemoryExport::new(8 << 20));
    for dialect in ["structured", "extended"] {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        for len in [1, 65_536, 4 << 20] {
            raw.request(READ, 1 << 2, 5, 0, len);
            let Reply::Chunk { flags, kind: 1, payload, .. } = raw.reply() else { panic!("not data") };
            assert_eq!(payload.len() as u64, len + 8);
            if flags & 1 == 0 {
                assert_eq!(raw.errno(), 0);
            }
        }
    }
}

#[test]
fn rule_13_a_read_that_fails_late() {
    let export = MemoryExport::new(8 << 20);
    let server = serve(export.clone());
    export.bad_byte.store(3 << 20, Ordering::Relaxed);
    for dialect in ["structured", "extended"] {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        assert_eq!(raw.read(0, 0, 4 << 20), Err(EIO));
        // In one chunk: padded out with zeroes, then the error with its offset and a text.
        raw.request(READ, 1 << 2, 5, 0, 4 << 20);
        let Reply::Chunk { flags: 0, kind: 1, payload, .. } = raw.reply() else { panic!("not data") };
        assert_eq!(payload.len(), (4 << 20) + 8);
        assert!(payload[8..].iter().all(|byte| *byte == 0));
        let Reply::Chunk { flags: 1, kind: 0x8002, payload, .. } = raw.reply() else { panic!("not an error") };
        assert_eq!(payload[..4], EIO.to_be_bytes());
        let at = u64::from_be_bytes(*payload.last_chunk().unwrap());
        assert!(at < 4 << 20 && payload.windows(5).any(|text| text == b"media"));
        assert_eq!(raw.read(0, 0, 1 << 20).unwrap(), vec![0; 1 << 20]);
    }
    let mut raw = Raw::in_transmission(&server.path, "simple");
    assert_eq!(raw.read(0, 3 << 20, 4096), Err(EIO));
    assert_eq!(raw.read(0, 0, 4096).unwrap(), [0; 4096]);
    raw.request(READ, 0, 5, 0, 4 << 20);
    raw.take(16);
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut raw.stream, &mut rest);
    assert!(rest.len() < 4 << 20, "a simple reply can only be cut off");
}

#[test]
fn rule_14_extents_are_clamped_and_cover_the_range() {
    let (_export, server) = sparse();
    let mut raw = Raw::in_transmission(&server.path, "structured");
    assert_eq!(raw.write(0, 8192, &[1; 4096]), 0);
    let mut extents = |flags: u16, offset: u64, len: u64| {
        raw.request(STATUS, flags, 5, offset, len);
        let Reply::Chunk { flags: 1, kind: 5, payload, .. } = raw.reply() else { panic!("not status") };
        assert_eq!(payload[..4], [0, 0, 0, 1]);
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        payload[4..].chunks(8).map(|pair| (word(&pair[..4]), word(&pair[4..]))).collect::<Vec<_>>()
    };
    assert_eq!(extents(0, 0, 20_000), [(8192, 3), (4096, 0), (20_000 - 12_288, 3)]);
    assert_eq!(extents(1 << 3, 100, 20_000), [(8092, 3)]);
    assert_eq!(extents(1 << 3, 0, 10), [(10, 3)]);
}

#[test]
fn rule_15_extended_headers() {
    let (_export, server) = sparse();
    let mut raw = Raw::greeted(&server.path);
    assert_eq!(raw.ask(11, &[]).kind, ACK);
    assert_eq!(raw.ask(11, &[]).kind, ERR_INVALID);
    assert_eq!(raw.ask(8, &[]).kind, 0x8000_000a);
    drop(raw);
    let mut raw = Raw::in_transmission(&server.path, "extended");
    raw.request(FLUSH, 0, 9, 0, 0);
    let done = Reply::Chunk { flags: 1, kind: 0, cookie: 9, offset: Some(0), payload: vec![] };
    assert_eq!(raw.reply(), done);
    raw.request(CACHE, 0, 9, 512, 512);
    let done = Reply::Chunk { flags: 1, kind: 0, cookie: 9, offset: Some(512), payload: vec![] };
    assert_eq!(raw.reply(), done);
    raw.request(STATUS, 0, 9, 0, SIZE);
    let Reply::Chunk { kind: 6, payload, offset: Some(0), .. } = raw.reply() else { panic!("not status") };
    assert_eq!(payload[..8], [0, 0, 0, 1, 0, 0, 0, 1]);
    assert_eq!(payload[8..], [&SIZE.to_be_bytes()[..], &3u64.to_be_bytes()[..]].concat());
    // A payload on a command that takes none is drained.
    raw.send(&[request_bytes(true, READ, 1 << 5, 9, 0, 100), vec![0x25; 100]].concat());
    assert_eq!(raw.errno(), EINVAL);
    // A status query by payload: length, then contexts.
    let by_payload = |raw: &mut Raw, payload: &[u8]| {
        raw.send(&[&request_bytes(true, STATUS, 1 << 5, 9, 0, payload.len() as u64)[..], payload].concat());
    };
    by_payload(&mut raw, &[&4096u64.to_be_bytes()[..], &1u32.to_be_bytes()].concat());
    let Reply::Chunk { kind: 6, payload, .. } = raw.reply() else { panic!("not status") };
    assert_eq!(payload[8..16], 4096u64.to_be_bytes());
    for bad in [&[][..], &[0; 7], &[0, 0, 0, 0, 0, 0, 0, 1, 0], &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2]] {
        by_payload(&mut raw, bad);
        assert_eq!(raw.errno(), EINVAL);
    }
    assert_eq!(raw.run(READ, 0, 0, u64::MAX), EINVAL);
    raw.request(WRITE, 1 << 5, 9, 0, (64 << 20) + 1);
    assert!(raw.is_closed());
}

#[test]
fn rule_16_fua_everywhere_and_flush_counts() {
    let export = Arc::new(MemoryExport { discards: true, ..MemoryExport::plain(SIZE) });
    let server = serve(export.clone());
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        for command in [TRIM, CACHE, ZEROES] {
            assert_eq!(raw.run(command, 1, 0, 4096), 0);
        }
        assert_eq!(raw.run(FLUSH, 1, 0, 0), 0);
        assert_eq!(raw.write(1, 0, b"fua"), 0);
        assert_eq!(raw.read(1, 0, 3).unwrap(), b"fua");
    }
    assert_eq!(export.flushes.load(Ordering::Relaxed), 3);
}

#[test]
fn rule_17_fast_zero_is_fast_or_refused_unchanged() {
    let server = disk();
    let mut raw = Raw::in_transmission(&server.path, "structured");
    assert_eq!(raw.write(0, 0, b"keep"), 0);
    assert_eq!(raw.run(ZEROES, 1 << 4, 0, 4), ENOTSUP);
    assert_eq!(raw.read(0, 0, 4).unwrap(), b"keep");
    assert_eq!(raw.run(ZEROES, 1 << 1, 0, 4), 0);
    assert_eq!(raw.read(0, 0, 4).unwrap(), [0; 4]);
    let (_export, server) = sparse();
    let mut raw = Raw::in_transmission(&server.path, "structured");
    assert_eq!(raw.run(ZEROES, 1 << 4, 0, 4096), 0);
}

#[test]
fn rule_19_stopping_answers_with_eshutdown_and_disc_finishes_what_runs() {
    let export = MemoryExport::new(SIZE);
    let mut server = serve(export.clone());
    let mut raw = Raw::in_transmission(&server.path, "simple");
    let requests = [
        [request_bytes(false, WRITE, 0, 1, 0, 4), b"last".to_vec()].concat(),
        request_bytes(false, READ, 0, 2, 0, 4),
        request_bytes(false, DISC, 0, 3, 0, 0),
    ];
    raw.send(&requests.concat());
    assert_eq!(raw.errno(), 0);
    assert_eq!(raw.errno(), 0);
    assert_eq!(raw.take(4), b"last");
    assert!(raw.is_closed());

    export.slow.store(50, Ordering::Relaxed);
    let mut raw = Raw::in_transmission(&server.path, "simple");
    let mut idle = Raw::greeted(&server.path);
    let mut silent = Raw::connect(&server.path);
    let reads = export.reads.load(Ordering::Relaxed);
    raw.request(READ, 0, 1, 0, 4);
    eventually("a running request", || export.reads.load(Ordering::Relaxed) > reads);
    server.handle.stop();
    assert_eq!(raw.errno(), 0, "a running request is answered");
    raw.take(4);
    assert_eq!(raw.run(READ, 0, 0, 4), ESHUTDOWN);
    server.stop().unwrap();
    assert!(raw.is_closed() && idle.is_closed());
    silent.take(18);
    assert!(silent.is_closed());
    assert_eq!(export.flushes.load(Ordering::Relaxed), 1);
    assert!(!server.path.exists());
}

#[test]
fn a_server_that_hangs_up_answers_what_it_has_and_refuses_nothing() {
    let export = MemoryExport::new(SIZE);
    let mut exports = Exports::new();
    exports.add(info("disk"), export.clone()).unwrap();
    let mut server = serve_with(exports, Limits::default(), Options { hang_up: true, ..Options::default() });
    let mut idle = Raw::in_transmission(&server.path, "simple");
    let mut raw = Raw::in_transmission(&server.path, "simple");
    export.slow.store(50, Ordering::Relaxed);
    let reads = export.reads.load(Ordering::Relaxed);
    raw.request(READ, 0, 1, 0, 4);
    eventually("a running request", || export.reads.load(Ordering::Relaxed) > reads);
    server.handle.stop();
    // Comes after the stop, so it is for the next server.
    raw.request(READ, 0, 2, 0, 4);
    assert_eq!(raw.errno(), 0, "a running request is answered");
    raw.take(4);
    assert!(raw.is_closed() && idle.is_closed());
    server.stop().unwrap();
    assert_eq!(export.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn info_then_other_options_in_every_order() {
    let server = disk();
    let asked: [(u32, Vec<u8>); 6] = [
        (6, info_payload("disk", &[3, 1, 2, 0xffff])),
        (8, vec![]),
        (3, vec![]),
        (10, meta_payload("disk", &["base:allocation"])),
        (11, vec![]),
        (0x7777, vec![1]),
    ];
    for order in 0..asked.len().pow(3) {
        let mut raw = Raw::greeted(&server.path);
        let picks = [order % 6, order / 6 % 6, order / 36];
        for pick in picks {
            let (option, payload) = &asked[pick];
            raw.option(*option, payload);
            let last = |kind: u32| kind == ACK || kind & 0x8000_0000 != 0;
            while !last(raw.option_reply().kind) {}
        }
        raw.go("disk");
    }
}

#[test]
fn a_context_is_forgotten_by_a_later_failure_or_another_export() {
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(SIZE)).unwrap();
    exports.add(info("other"), MemoryExport::new(SIZE)).unwrap();
    let server = serve_with(exports, Limits::default(), Options::default());
    for spoil in [meta_payload("nobody", &["base:allocation"]), meta_payload("disk", &["base:"]), vec![1]] {
        let mut raw = Raw::greeted(&server.path);
        assert_eq!(raw.ask(8, &[]).kind, ACK);
        raw.option(10, &meta_payload("disk", &["base:allocation", "x-none:none"]));
        assert_eq!((raw.option_reply().kind, raw.option_reply().kind), (4, ACK));
        raw.ask(10, &spoil);
        raw.go("disk");
        assert_eq!(raw.run(STATUS, 0, 0, 512), EINVAL);
    }
    let mut raw = Raw::greeted(&server.path);
    assert_eq!(raw.ask(8, &[]).kind, ACK);
    raw.option(10, &meta_payload("disk", &["base:allocation"]));
    assert_eq!((raw.option_reply().kind, raw.option_reply().kind), (4, ACK));
    raw.go("other");
    assert_eq!(raw.run(STATUS, 0, 0, 512), EINVAL);
}

#[test]
fn every_byte_may_come_alone_and_any_may_be_the_last() {
    let server = disk();
    let stream = [
        3u32.to_be_bytes().to_vec(),
        option_bytes(8, &[]),
        option_bytes(7, &info_payload("disk", &[3])),
        request_bytes(false, WRITE, 0, 1, 5, 6),
        b"abcdef".to_vec(),
        request_bytes(false, READ, 0, 2, 5, 6),
        request_bytes(false, DISC, 0, 3, 0, 0),
    ]
    .concat();
    let mut raw = Raw::connect(&server.path);
    for byte in &stream {
        raw.send(&[*byte]);
    }
    let mut answer = Vec::new();
    std::io::Read::read_to_end(&mut raw.stream, &mut answer).unwrap();
    assert_eq!(answer[answer.len() - 6..], *b"abcdef");
    for cut in 0..stream.len() {
        let mut raw = Raw::connect(&server.path);
        raw.send(&stream[..cut]);
        raw.stream.shutdown(Shutdown::Write).unwrap();
        let _ = std::io::Read::read_to_end(&mut raw.stream, &mut answer);
    }
    eventually("the end of all connections", || server.handle.connection_count() == 0);
    assert_eq!(server.handle.buffer_bytes(), 0);
}

#[test]
fn garbage_ends_the_connection_only() {
    let server = disk();
    for garbage in [&b"GET / HTTP/1.0\r\n\r\n"[..], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", &[0xff; 5000]] {
        let mut raw = Raw::connect(&server.path);
        let _ = raw.stream.write_all(garbage);
        raw.take(18);
        assert!(raw.is_closed());
        let mut raw = Raw::in_transmission(&server.path, "structured");
        let _ = raw.stream.write_all(garbage);
        let _ = raw.stream.shutdown(Shutdown::Write);
        assert!(raw.is_closed());
    }
    Raw::in_transmission(&server.path, "simple");
}

#[test]
fn clients_that_never_negotiate_do_not_keep_others_out() {
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(SIZE)).unwrap();
    let limits = Limits { handshaking_max: 8, handshake_deadline: Duration::from_millis(300), ..Limits::default() };
    let server = serve_with(exports, limits, Options::default());
    let idle: Vec<_> = (0..100).map(|_| Raw::connect(&server.path)).collect();
    Raw::in_transmission(&server.path, "simple");
    eventually("the handshake deadline", || server.handle.connection_count() == 0);
    drop(idle);
}

#[test]
fn a_client_that_does_not_read_pins_its_own_buffers_only() {
    let server = serve(MemoryExport::new(32 << 20));
    let mut stuck = Raw::in_transmission(&server.path, "simple");
    for cookie in 0..16 {
        stuck.request(READ, 0, cookie, 0, 32 << 20);
    }
    eventually("a buffer in use", || server.handle.buffer_bytes() > 0);
    let mut other = Raw::in_transmission(&server.path, "simple");
    assert_eq!(other.read(0, 0, 32 << 20).unwrap().len(), 32 << 20);
    assert!(server.handle.buffer_bytes() <= 16 << 20);
    drop(stuck);
    eventually("the end of the stuck client", || server.handle.connection_count() == 1);
}

#[test]
fn without_budget_small_buffers_do_the_same_work() {
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(8 << 20)).unwrap();
    let server = serve_with(exports, Limits { buffer_bytes_max: 0, ..Limits::default() }, Options::default());
    for dialect in DIALECTS {
        let mut raw = Raw::in_transmission(&server.path, dialect);
        let data: Vec<u8> = (0..1_000_003u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        assert_eq!(raw.write(0, 777, &data), 0);
        assert!(raw.read(0, 777, data.len()).unwrap() == data, "{dialect}");
    }
    assert_eq!(server.handle.buffer_bytes(), 0);
}

#[test]
fn disk_full_is_enospc_and_the_connection_goes_on() {
    let export = MemoryExport::new(SIZE);
    let server = serve(export.clone());
    let mut raw = Raw::in_transmission(&server.path, "structured");
    export.full.store(true, Ordering::Relaxed);
    assert_eq!(raw.write(0, 0, &[1; 300_000]), ENOSPC);
    export.full.store(false, Ordering::Relaxed);
    assert_eq!(raw.write(0, 0, &[1; 300_000]), 0);
}

#[test]
fn no_export_is_touched_before_it_is_chosen() {
    let export = MemoryExport::new(SIZE);
    let server = serve(export.clone());
    let mut raw = Raw::greeted(&server.path);
    raw.ask(8, &[]);
    raw.option(6, &info_payload("disk", &[]));
    raw.option_reply();
    assert_eq!(export.reads.load(Ordering::Relaxed), 0);
}

#[test]
fn a_live_socket_is_busy_and_a_stale_one_is_recovered() {
    use std::os::unix::fs::PermissionsExt;
    let server = disk();
    assert!(matches!(Listener::unix(&server.path), Err(ListenError::Busy { .. })));
    assert_eq!(std::fs::metadata(&server.path).unwrap().permissions().mode() & 0o777, 0o600);
    Raw::in_transmission(&server.path, "simple");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let first = Listener::unix(&path).unwrap();
    // Somebody else's socket at our path is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let theirs = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(theirs);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"data").unwrap();
    assert!(matches!(Listener::unix(&path), Err(ListenError::NotASocket { .. })));
}

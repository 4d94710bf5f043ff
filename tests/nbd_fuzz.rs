//! Random and dictionary-driven input for everything that reads what somebody else wrote: handshakes, requests, namespace
//! headers. `tools/fuzz SECONDS` runs it for long; in the gate it runs a second for each target.
//!
//! `DAXCRYPT_FUZZ_SECONDS` is the time for each target, `DAXCRYPT_FUZZ_SEED` the seed; a failure names the execution.
//! It is not guided by coverage: the dictionaries and repaired checksums take it past the first checks.
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{MemoryExport, Raw, eventually, info, info_payload, meta_payload, option_bytes, request_bytes, serve};
use daxcrypt::namespace::{Credential, FormatOptions, KdfCost, LockedNamespace, format};
use daxcrypt::nbd_server::handshake::{Handshake, Outcome, Step};
use daxcrypt::nbd_server::{Exports, Peer, TlsMode};
use daxcrypt::pmem::{Access, Allocation, Backing};
use daxcrypt::secret::SecretBytes;

const SIZE: u64 = 1 << 20;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_be_bytes()[0]).collect()
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Runs `execute` until the time is over, and says how often.
fn fuzz(target: &str, mut execute: impl FnMut(&mut Random)) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let seconds = number("DAXCRYPT_FUZZ_SECONDS").unwrap_or(1);
    let seed = number("DAXCRYPT_FUZZ_SEED").unwrap_or(1);
    let (start, mut executions) = (Instant::now(), 0u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        let mut random = Random(seed.wrapping_add(executions << 20));
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| execute(&mut random)));
        if let Err(panic) = ran {
            println!("{target}: seed {seed}, execution {executions}");
            std::panic::resume_unwind(panic);
        }
        executions += 1;
    }
    println!("{target}: {executions} executions in {seconds} s, seed {seed}");
    assert!(executions > 20, "{target}: only {executions} executions");
}

fn option_piece(random: &mut Random) -> Vec<u8> {
    let option = u32::try_from(random.below(14)).unwrap();
    let name = random.pick(&["disk", "", "other", "disk\0", "d\u{e9}"]);
    match random.below(9) {
        0 => option_bytes(option, &[]),
        1 => option_bytes(option, name.as_bytes()),
        2 => option_bytes(random.pick(&[6, 7]), &info_payload(name, &[0, 1, 2, 3, 9][..random.below(6)])),
        3 => option_bytes(
            random.pick(&[9, 10]),
            &meta_payload(name, &["base:allocation", "base:", "", "x:y"][..random.below(5)]),
        ),
        4 => option_bytes(random.next().to_be_bytes()[0].into(), &vec![7; random.below(70_000)]),
        5 => {
            // A valid option with one byte changed.
            let mut bytes = option_bytes(7, &info_payload(name, &[3]));
            let at = random.below(bytes.len());
            bytes[at] = random.next().to_be_bytes()[0];
            bytes
        }
        6 => option_bytes(random.pick(&[8, 11, 5]), &[]),
        7 => {
            let len = random.below(50);
            option_bytes(option, &random.bytes(len))
        }
        _ => {
            let len = random.below(30);
            random.bytes(len)
        }
    }
}

#[test]
fn handshakes() {
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(SIZE)).unwrap();
    let exports = Arc::new(exports);
    fuzz("handshakes", |random| {
        let mut stream = random.pick(&[[0u8, 0, 0, 3], [0; 4], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 3]]).to_vec();
        for _ in 0..random.below(12) {
            stream.extend(option_piece(random));
        }
        let mode = random.pick(&[TlsMode::Off, TlsMode::Allow, TlsMode::Require]);
        let mut machine = Handshake::new(exports.clone(), mode, Peer::default());
        let (mut from, mut visible, mut output) = (0, 0, Vec::new());
        for steps in 0.. {
            assert!(steps < 2 * stream.len() + 2, "the machine goes round in circles");
            output.clear();
            let (consumed, step) = machine.step(&stream[from..visible], &mut output);
            assert!(consumed <= visible - from && output.len() < 16 << 10);
            from += consumed;
            match step {
                Step::Continue => assert!(consumed > 0),
                Step::NeedMore if visible == stream.len() => break,
                Step::NeedMore => visible = (visible + 1 + random.below(5000)).min(stream.len()),
                Step::Done(Outcome::StartTls) => machine.tls_started(Peer::default()),
                Step::Done(_) => break,
            }
        }
    });
}

/// A request and, for a write, its payload.
fn request_piece(random: &mut Random, extended: bool, cookie: u64) -> (Vec<u8>, u16, u64) {
    let command = random.pick(&[0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 7, 8, 0xffff]);
    let command = if command == 2 && random.below(8) > 0 { 0 } else { command };
    let flags = random.pick(&[0, 0, 0, 1, 2, 4, 8, 16, 32, 36, 0x8000]);
    let edge =
        random.pick(&[0, 1, 4095, 4096, SIZE - 4096, SIZE - 1, SIZE, SIZE + 1, u64::MAX, u64::MAX - 4095, 1 << 32]);
    let offset = if random.below(2) == 0 { edge } else { random.next() % SIZE };
    let len = random.pick(&[0, 1, 2, 12, 20, 511, 4096, 4097, 65_536, 70_001]);
    let len = if command != 1 && flags & 32 == 0 && random.below(8) == 0 {
        random.pick(&[u64::from(u32::MAX), SIZE, (32 << 20) + 1, 0xffff_fe00])
    } else {
        len
    };
    let mut bytes = request_bytes(extended, command, flags, cookie, offset, len);
    if command == 1 || (extended && flags & 32 != 0) {
        let payload = random.bytes(usize::try_from(len.min(128)).unwrap());
        bytes.extend(payload.iter().cycle().take(usize::try_from(len).unwrap()));
    }
    (bytes, command, len)
}

/// Walks over the replies: known magics, known cookies, nothing cut off.
fn check_replies(mut replies: &[u8], sent: &[(u16, u64)]) {
    let mut finished = vec![false; sent.len()];
    while !replies.is_empty() {
        let number = |from: usize, to: usize| replies[from..to].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (cookie, last, bytes) = match number(0, 4) {
            0x6744_6698 => {
                let (error, cookie) = (number(4, 8), number(8, 16));
                let (command, len) = sent[usize::try_from(cookie).unwrap()];
                (cookie, true, 16 + if error == 0 && command == 0 { len } else { 0 })
            }
            0x668e_33ef => (number(8, 16), number(4, 6) & 1 == 1, 20 + number(16, 20)),
            0x6e8a_278c => (number(8, 16), number(4, 6) & 1 == 1, 32 + number(24, 32)),
            magic => panic!("reply magic {magic:#x}"),
        };
        let cookie = usize::try_from(cookie).unwrap();
        assert!(!finished[cookie], "a reply after the last one");
        finished[cookie] = last;
        replies = &replies[usize::try_from(bytes).unwrap()..];
    }
    assert!(finished.iter().skip_while(|done| **done).all(|done| !done), "a request was passed over");
}

#[test]
fn requests() {
    let export = Arc::new(MemoryExport { discards: true, ..MemoryExport::plain(SIZE) });
    let server = serve(export);
    fuzz("requests", |random| {
        let dialect = random.pick(&["simple", "structured", "extended"]);
        let mut raw = Raw::in_transmission(&server.path, dialect);
        let (mut stream, mut sent) = (Vec::new(), Vec::new());
        for cookie in 0..random.below(40) {
            let (bytes, command, len) = request_piece(random, raw.extended, cookie as u64);
            stream.extend(bytes);
            sent.push((command, len));
        }
        if random.below(3) == 0 {
            let len = random.below(60);
            let garbage = random.bytes(len);
            stream.extend(garbage);
        }
        let mut sender = raw.stream.try_clone().unwrap();
        let pieces = random.pick(&[1, 27, 5000, 1 << 20]).max(stream.len() / 50 + 1);
        let replies = std::thread::scope(|scope| {
            scope.spawn(move || {
                // The server may leave early, which is its right.
                let _ = stream.chunks(pieces).try_for_each(|piece| sender.write_all(piece));
                let _ = sender.shutdown(Shutdown::Write);
            });
            let mut replies = Vec::new();
            // A reset instead of an end is what a server with unread requests leaves.
            if let Err(error) = raw.stream.read_to_end(&mut replies) {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            }
            replies
        });
        check_replies(&replies, &sent);
    });
    eventually("the end of all connections", || server.handle.connection_count() == 0);
    assert_eq!(server.handle.buffer_bytes(), 0);
    assert_eq!(Raw::in_transmission(&server.path, "simple").run(3, 0, 0, 0), 0);
}

/// Damages a header copy and makes lengths and checksum right again, mostly.
fn damage(random: &mut Random, copy: &[u8]) -> Vec<u8> {
    const PREFIX: usize = 128;
    let word = |at: usize| usize::try_from(u32::from_le_bytes(*copy[at..].first_chunk().unwrap())).unwrap();
    let mut json = copy[PREFIX..PREFIX + word(16)].to_vec();
    let mut prefix = copy[..PREFIX].to_vec();
    for _ in 0..random.below(4) {
        let at = random.below(json.len());
        let to = (at + random.below(24)).min(json.len());
        match random.below(5) {
            0 => json[at] = random.next().to_be_bytes()[0],
            1 => drop(json.drain(at..to)),
            2 => drop(json.splice(at..at, json[at..to].to_vec())),
            3 => {
                let digits = json[at..].iter().position(u8::is_ascii_digit).map_or(at, |digit| at + digit);
                let end = json[digits..]
                    .iter()
                    .position(|byte| !byte.is_ascii_digit())
                    .map_or(json.len(), |len| digits + len);
                let number = random
                    .pick(&["0", "-1", "1", "4294967296", "18446744073709551615", "1e99", "9".repeat(400).as_str()])
                    .to_owned();
                drop(json.splice(digits..end, number.into_bytes()));
            }
            _ => {
                let at = random.below(PREFIX);
                prefix[at] = random.next().to_be_bytes()[0];
            }
        }
        json.push(b' ');
    }
    if random.below(4) > 0 {
        prefix[16..20].copy_from_slice(&u32::try_from(json.len()).unwrap().to_le_bytes());
    }
    prefix[20..24].fill(0);
    let mut bytes = [prefix, json].concat();
    let checksum = crc32fast::hash(&bytes);
    bytes[20..24].copy_from_slice(&checksum.to_le_bytes());
    bytes.resize(copy.len(), 0);
    bytes
}

#[test]
fn namespace_headers() {
    const COPY: usize = 64 << 10;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vault.img");
    let credential = Credential::KeyFile(SecretBytes::copy_of(&[7; 32]));
    let options = FormatOptions { kdf_cost: KdfCost::LEAST, ..FormatOptions::default() };
    let backing = Backing::create(&path, 4 << 20, Allocation::Sparse).unwrap();
    drop(format(Arc::new(backing), options, &credential).unwrap());
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut good = vec![0; COPY];
    file.read_exact_at(&mut good, 0).unwrap();
    let (mut intact, mut well_formed) = (0u64, 0u64);
    fuzz("namespace headers", |random| {
        let copies = [damage(random, &good), damage(random, &good)];
        file.write_all_at(&copies[0], 0).unwrap();
        file.write_all_at(&copies[1], 256 << 10).unwrap();
        let opened = LockedNamespace::open(Arc::new(Backing::open(&path, Access::ReadOnly).unwrap()));
        if let Ok(locked) = opened {
            well_formed += 1;
            if locked.unlock_key(&credential).is_ok() {
                intact += 1;
                assert!(copies.contains(&good), "a changed header passed for genuine");
            }
        }
    });
    println!("of these {well_formed} were well-formed and {intact} unchanged");
    assert!(intact > 0 && well_formed > intact, "the damage is never or always seen");
}

//! Any bytes as a client's requests, to a server on a socket: it answers with replies that are whole and known, or closes.
//!
//! The first byte chooses the reply style.
#![no_main]

#[path = "../../../tests/common/nbd.rs"]
mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, OnceLock};

use common::{MemoryExport, Raw, Running, serve};
use libfuzzer_sys::fuzz_target;

/// Small, so that the replies to a few hundred requests fit in memory and time.
const SIZE: u64 = 16 << 10;

static SERVER: OnceLock<Running> = OnceLock::new();

fn start() -> Running {
    serve(Arc::new(MemoryExport { discards: true, ..MemoryExport::plain(SIZE) }))
}

fuzz_target!(|data: &[u8]| {
    let [dialect, stream @ ..] = data else { return };
    let dialect = ["simple", "structured", "extended"][usize::from(*dialect) % 3];
    let mut raw = Raw::in_transmission(&SERVER.get_or_init(start).path, dialect);
    // The server may leave early, which is its right; all that is sent fits in the socket's buffer.
    let _ = raw.stream.write_all(stream);
    let _ = raw.stream.shutdown(Shutdown::Write);
    let mut replies = Vec::new();
    if let Err(error) = raw.stream.read_to_end(&mut replies) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    if dialect != "simple" {
        check(&replies);
    }
});

/// Walks over structured and extended replies. (The length of a simple one is known only to who knows the request.)
fn check(mut replies: &[u8]) {
    while let [magic @ .., _, _] = replies.get(..6).unwrap_or_default() {
        let number = |from: usize, to: usize| replies[from..to].iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        let len = match magic {
            [0x66, 0x8e, 0x33, 0xef] => 20 + number(16, 20),
            [0x6e, 0x8a, 0x27, 0x8c] => 32 + number(24, 32),
            // A simple reply carries no data after structured replies were negotiated.
            [0x67, 0x44, 0x66, 0x98] => 16,
            other => panic!("reply magic {other:x?}"),
        };
        replies = replies.get(len..).expect("a reply is cut off");
    }
    assert!(replies.is_empty(), "half a reply");
}

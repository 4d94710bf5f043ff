//! The protocol machines without sockets: random streams from a dictionary never make them panic, lose their place or
//! say more than one option's worth; the `nbd` crate as an independent client.
#![allow(clippy::unwrap_used)]

#[path = "common/nbd.rs"]
mod common;

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::{MemoryExport, info, info_payload, meta_payload, option_bytes, request_bytes, serve};
use daxcrypt::nbd_server::handshake::{Handshake, Outcome, Step};
use daxcrypt::nbd_server::transmission::{Request, Transmission, Verdict};
use daxcrypt::nbd_server::{Exports, Negotiated, Peer, ReplyStyle, TlsMode};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

fn exports() -> Arc<Exports> {
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(SIZE)).unwrap();
    Arc::new(exports)
}

/// Pieces of handshakes, whole and broken.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(b"IHAVEOPT".to_vec()),
        Just(vec![0, 0, 0, 3]),
        Just(vec![0, 0, 0, 0]),
        Just(vec![0xff; 4]),
        (0u32..14).prop_map(|option| option_bytes(option, &[])),
        (0u32..14, 0usize..40).prop_map(|(option, len)| option_bytes(option, &vec![b'd'; len])),
        (6u32..8).prop_map(|option| option_bytes(option, &info_payload("disk", &[0, 1, 2, 3, 9]))),
        (9u32..11).prop_map(|option| option_bytes(option, &meta_payload("disk", &["base:allocation", "base:"]))),
        Just(option_bytes(0x7777, &vec![1; 50_000])),
        proptest::collection::vec(any::<u8>(), 0..40),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_handshake_ends_the_same_whole_or_in_pieces(pieces in proptest::collection::vec(piece(), 0..12), cut in 1usize..70) {
        let stream = [vec![0, 0, 0, 3], pieces.concat()].concat();
        let drive = |step_bytes: usize| {
            let mut machine = Handshake::new(exports(), TlsMode::Allow, Peer::default());
            let (mut from, mut visible, mut output) = (0, 0, Vec::new());
            loop {
                let before = output.len();
                let (consumed, step) = machine.step(&stream[from..visible], &mut output);
                assert!(output.len() - before < 4096 && consumed <= visible - from);
                from += consumed;
                match step {
                    Step::Continue => assert!(consumed > 0, "a step without progress"),
                    Step::NeedMore if visible == stream.len() => return (from, output, "starved".to_owned()),
                    Step::NeedMore => visible = (visible + step_bytes).min(stream.len()),
                    Step::Done(Outcome::Transmission(negotiated)) => return (from, output, format!("{:?}", negotiated.replies)),
                    Step::Done(other) => return (from, output, format!("{other:?}")),
                }
            }
        };
        prop_assert_eq!(drive(cut), drive(stream.len()));
    }

    #[test]
    fn what_may_run_is_in_range(
        extended: bool, flags in any::<u16>(), command in 0u16..10, context: bool,
        offset in prop_oneof![0..2 * SIZE, any::<u64>()], len in prop_oneof![0..2 * SIZE, 0..u64::from(u32::MAX)],
    ) {
        let served = exports().find("disk").unwrap().clone();
        let replies = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
        let machine = Transmission::new(Negotiated { size_bytes: served.size_bytes(), read_only: served.info.read_only, served, replies, allocation_context: context });
        let bytes = request_bytes(extended, command, flags, 1, offset, len);
        let header = machine.parse_header(&bytes).unwrap().unwrap();
        for cut in 0..bytes.len() {
            prop_assert_eq!(machine.parse_header(&bytes[..cut]), Ok(None));
        }
        let Verdict::Run(request) = machine.validate_request(&header, false) else { return Ok(()) };
        let range = match request {
            Request::Read { offset, len_bytes, .. } | Request::Write { offset, len_bytes, .. } => {
                prop_assert!(len_bytes <= 32 << 20);
                (offset, u64::from(len_bytes))
            }
            Request::Trim { offset, len_bytes, .. }
            | Request::Cache { offset, len_bytes }
            | Request::WriteZeroes { offset, len_bytes, .. } => (offset, len_bytes),
            Request::BlockStatus(query) => (query.offset, query.len_bytes),
            Request::Disconnect | Request::Flush | Request::BlockStatusPayload { .. } => (0, 0),
        };
        prop_assert!(range.0.checked_add(range.1).is_some_and(|end| end <= SIZE));
    }
}

#[test]
fn the_nbd_crate_reads_what_it_wrote() {
    let server = serve(MemoryExport::new(SIZE));
    let mut stream = UnixStream::connect(&server.path).unwrap();
    let chosen = nbd::client::handshake(&mut stream, b"disk").unwrap();
    let mut client = nbd::client::NbdClient::new(&mut stream, &chosen);
    client.seek(SeekFrom::Start(4096)).unwrap();
    client.write_all(b"an independent client").unwrap();
    client.seek(SeekFrom::Start(4096)).unwrap();
    let mut data = [0; 21];
    client.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"an independent client");
}

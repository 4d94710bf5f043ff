//! Where source and destination lie: at the edge of mapped memory, at any address, in the same place or not.

use super::guard::{Edge, Guarded};
use super::*;

/// Around what a run may write.
const CANARY: u8 = 0xa5;

/// Lengths that leave every tail of every kernel: up to two groups of the widest and some.
fn lengths() -> impl Iterator<Item = usize> {
    (BLOCK_BYTES..=640).step_by(BLOCK_BYTES).chain([1024, 1040, 4096, 4096 + 16, 4096 + 240])
}

#[test]
fn nothing_outside_of_source_and_destination_is_touched() {
    let (mut from, mut to) = (Guarded::new(8192), Guarded::new(8192));
    let text = pattern(8192, 9);
    let edges = [Edge::Before, Edge::Behind];
    for key in keys(32) {
        for (unit, len_bytes) in
            [DataUnit::Bytes512, DataUnit::Bytes4096].into_iter().flat_map(|unit| lengths().map(move |len| (unit, len)))
        {
            let span = Span { unit, tweak: 8, skip_bytes: 48 };
            let expected = oracle_run(Direction::Encrypt, 32, span, &text[..len_bytes]);
            for (at, dst_at) in edges.into_iter().flat_map(|edge| edges.map(|other| (edge, other))) {
                for store in [Store::Cached, Store::NonTemporal] {
                    from.target(at, len_bytes).copy_from(&text[..len_bytes]);
                    key.encrypt(span, from.source(at, len_bytes), to.target(dst_at, len_bytes), store);
                    let mut out = vec![0; len_bytes];
                    to.source(dst_at, len_bytes).copy_to(&mut out);
                    assert_eq!(
                        out,
                        expected,
                        "{span:?} {at:?} {dst_at:?} {store:?} {len_bytes} with {}",
                        key.backend()
                    );
                }
                key.decrypt(span, to.source(dst_at, len_bytes), from.target(at, len_bytes));
                key.encrypt_in_place(span, from.target(at, len_bytes));
                let mut out = vec![0; len_bytes];
                from.source(at, len_bytes).copy_to(&mut out);
                assert_eq!(out, expected, "in place {span:?} {at:?} {len_bytes} with {}", key.backend());
            }
        }
    }
}

/// Runs between buffers whose starts lie `from_at` and `to_at` bytes behind a line, with canaries around the output.
fn check_placed(key: &XtsKey, span: Span, text: &[u8], expected: &[u8], from_at: usize, to_at: usize, store: Store) {
    let place = |buffer: &[u8], at: usize| buffer.as_ptr().addr().next_multiple_of(64) - buffer.as_ptr().addr() + at;
    let mut from = vec![0; text.len() + 192];
    let start = place(&from, from_at);
    from[start..start + text.len()].copy_from_slice(text);
    let source = Source::from_slice(&from[start..start + text.len()]);
    let mut to = vec![CANARY; text.len() + 256];
    let start = place(&to, to_at);
    let end = start + text.len();
    key.encrypt(span, source, Target::from_slice(&mut to[start..end]), store);
    let context = format!("{span:?} {from_at} {to_at} {store:?} {} bytes with {}", text.len(), key.backend());
    assert_eq!(&to[start..end], expected, "{context}");
    assert!(to[..start].iter().chain(&to[end..]).all(|byte| *byte == CANARY), "written around: {context}");
    let mut plain = vec![CANARY; text.len() + 256];
    let plain_at = place(&plain, from_at);
    let target = Target::from_slice(&mut plain[plain_at..plain_at + text.len()]);
    key.decrypt(span, Source::from_slice(&to[start..end]), target);
    assert_eq!(&plain[plain_at..plain_at + text.len()], text, "decrypt {context}");
    let around = plain[..plain_at].iter().chain(&plain[plain_at + text.len()..]);
    assert!(around.copied().all(|byte| byte == CANARY), "written around: decrypt {context}");
}

#[test]
fn any_two_addresses_do() {
    let text = pattern(4096 + 1072, 21);
    for key in keys(16) {
        for len_bytes in [16, 64, 112, 560, 4096 + 1072] {
            let span = Span { unit: DataUnit::Bytes512, tweak: 77, skip_bytes: 16 };
            let expected = oracle_run(Direction::Encrypt, 16, span, &text[..len_bytes]);
            for from_at in [0, 1, 8, 15, 16, 31, 32, 33, 63] {
                for to_at in [0, 1, 8, 15, 16, 31, 32, 33, 63] {
                    for store in [Store::Cached, Store::NonTemporal] {
                        check_placed(&key, span, &text[..len_bytes], &expected, from_at, to_at, store);
                    }
                }
            }
        }
    }
}

#[test]
fn non_temporal_stores_give_the_same_bytes_at_every_block_of_a_line() {
    let text = pattern(4096 * 2 + 640, 33);
    for (unit, skip_bytes) in [(DataUnit::Bytes512, 0), (DataUnit::Bytes512, 496), (DataUnit::Bytes4096, 4000)] {
        let span = Span { unit, tweak: 800, skip_bytes };
        for len_bytes in lengths().chain([4096 * 2 + 640]) {
            let expected = oracle_run(Direction::Encrypt, 32, span, &text[..len_bytes]);
            for key in keys(32) {
                for to_at in [0, 16, 32, 48] {
                    check_placed(&key, span, &text[..len_bytes], &expected, 0, to_at, Store::NonTemporal);
                }
            }
        }
    }
}

/// The panics of one backend after the other would need as many tests: the checks come before any of them.
fn encrypt(span: Span, src: &[u8], dst: &mut [u8]) {
    keys(32)[0].encrypt(span, Source::from_slice(src), Target::from_slice(dst), Store::Cached);
}

const SPAN: Span = Span { unit: DataUnit::Bytes512, tweak: 0, skip_bytes: 0 };

#[test]
#[should_panic(expected = "must have equal lengths")]
fn lengths_that_differ_panic() {
    encrypt(SPAN, &[0; 32], &mut [0; 16]);
}

#[test]
#[should_panic(expected = "a run of 24 bytes is not whole 16-byte blocks")]
fn a_part_of_a_block_panics() {
    encrypt(SPAN, &[0; 24], &mut [0; 24]);
}

#[test]
#[should_panic(expected = "cannot begin 512 bytes into a unit of 512")]
fn a_run_that_begins_behind_its_unit_panics() {
    encrypt(Span { skip_bytes: 512, ..SPAN }, &[0; 16], &mut [0; 16]);
}

#[test]
#[should_panic(expected = "cannot begin 8 bytes into a unit of 512")]
fn a_run_that_begins_inside_a_block_panics() {
    encrypt(Span { skip_bytes: 8, ..SPAN }, &[0; 16], &mut [0; 16]);
}

#[test]
#[should_panic(expected = "overlap in part")]
fn ranges_that_overlap_in_part_panic() {
    let mut map = Guarded::new(64);
    let mut buffer = map.target(Edge::Before, 64);
    let (src, dst) = buffer.in_place();
    keys(32)[0].encrypt(SPAN, src.slice(0..48), dst.slice(16..64), Store::Cached);
}

#[test]
fn an_empty_run_is_nothing() {
    encrypt(SPAN, &[], &mut []);
    encrypt(Span { skip_bytes: 496, ..SPAN }, &[], &mut []);
}

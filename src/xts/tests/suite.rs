//! The suite that every backend passes: any run equals what the `xts-mode` crate makes of it.

use proptest::prelude::*;

use super::*;

const UNITS: [DataUnit; 2] = [DataUnit::Bytes512, DataUnit::Bytes4096];

/// Encrypts and decrypts `text` out of place and in place, and compares with `expected` ciphertext.
fn check(key: &XtsKey, span: Span, text: &[u8], expected: &[u8], store: Store) {
    let mut cipher = vec![0xee; text.len()];
    key.encrypt(span, Source::from_slice(text), Target::from_slice(&mut cipher), store);
    assert_eq!(cipher, expected, "encrypt {span:?} {store:?} {} bytes with {}", text.len(), key.backend());
    let mut plain = vec![0xee; text.len()];
    key.decrypt(span, Source::from_slice(&cipher), Target::from_slice(&mut plain));
    assert_eq!(plain, text, "decrypt {span:?} {} bytes with {}", text.len(), key.backend());
    key.encrypt_in_place(span, Target::from_slice(&mut plain));
    assert_eq!(plain, cipher, "encrypt in place {span:?} {} bytes with {}", text.len(), key.backend());
    key.decrypt_in_place(span, Target::from_slice(&mut plain));
    assert_eq!(plain, text, "decrypt in place {span:?} {} bytes with {}", text.len(), key.backend());
}

#[test]
fn every_length_up_to_several_units() {
    for half_bytes in [16, 32] {
        let keys = keys(half_bytes);
        for (unit, len_max) in [(DataUnit::Bytes512, 2560), (DataUnit::Bytes4096, 4096 + 640)] {
            let text = pattern(len_max, 3);
            for len_bytes in (0..=len_max).step_by(BLOCK_BYTES) {
                let span = Span { unit, tweak: 0x1234_5678, skip_bytes: 0 };
                let expected = oracle_run(Direction::Encrypt, half_bytes, span, &text[..len_bytes]);
                for key in &keys {
                    check(key, span, &text[..len_bytes], &expected, Store::Cached);
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn any_run_equals_the_oracle(
        half_bytes in prop_oneof![Just(16_usize), Just(32)],
        unit in prop_oneof![Just(DataUnit::Bytes512), Just(DataUnit::Bytes4096)],
        tweak: u64,
        skip_blocks in 0_usize..256,
        len_blocks in 0_usize..1200,
        seed: u8,
        stream: bool,
    ) {
        let span = Span { unit, tweak, skip_bytes: skip_blocks * BLOCK_BYTES % unit.len_bytes() };
        let text = pattern(len_blocks * BLOCK_BYTES, seed);
        let expected = oracle_run(Direction::Encrypt, half_bytes, span, &text);
        let store = if stream { Store::NonTemporal } else { Store::Cached };
        for key in keys(half_bytes) {
            check(&key, span, &text, &expected, store);
        }
    }
}

proptest! {
    #[test]
    fn any_backend_equals_the_portable_one(
        halves in prop_oneof![prop::collection::vec(any::<u8>(), 32), prop::collection::vec(any::<u8>(), 64)],
        unit in prop_oneof![Just(DataUnit::Bytes512), Just(DataUnit::Bytes4096)],
        tweak: u64,
        skip_blocks in 0_usize..256,
        text in prop::collection::vec(any::<[u8; BLOCK_BYTES]>(), 0..700),
    ) {
        let span = Span { unit, tweak, skip_bytes: skip_blocks * BLOCK_BYTES % unit.len_bytes() };
        let (data, tweak_half) = halves.split_at(halves.len() / 2);
        let key = |backend| XtsKey::from_halves(data, tweak_half, backend);
        let text = text.as_flattened();
        let mut expected = vec![0; text.len()];
        let portable = key(Backend::from_name("portable").unwrap());
        portable.encrypt(span, Source::from_slice(text), Target::from_slice(&mut expected), Store::Cached);
        for backend in Backend::available() {
            check(&key(backend), span, text, &expected, Store::NonTemporal);
        }
    }
}

/// 70 units make two full batches of first tweaks and a rest.
#[test]
fn units_in_one_call_equal_a_call_for_every_unit() {
    for half_bytes in [16, 32] {
        for unit in UNITS {
            let text = pattern(70 * unit.len_bytes(), 11);
            for key in keys(half_bytes) {
                for unit_count in [1, 2, 3, 31, 32, 33, 64, 70] {
                    let text = &text[..unit_count * unit.len_bytes()];
                    let mut singly = vec![0; text.len()];
                    for (i, (from, to)) in
                        (0..).zip(text.chunks(unit.len_bytes()).zip(singly.chunks_mut(unit.len_bytes())))
                    {
                        let span = Span {
                            unit,
                            tweak: 5_u64.wrapping_sub(16).wrapping_add(i * unit.tweak_step()),
                            skip_bytes: 0,
                        };
                        key.encrypt(span, Source::from_slice(from), Target::from_slice(to), Store::Cached);
                    }
                    let span = Span { unit, tweak: 5_u64.wrapping_sub(16), skip_bytes: 0 };
                    check(&key, span, text, &singly, Store::Cached);
                }
            }
        }
    }
}

/// Every cache line and every block of a unit alone, as small writes use them.
#[test]
fn pieces_of_a_unit_equal_the_unit() {
    for half_bytes in [16, 32] {
        for unit in UNITS {
            let text = pattern(unit.len_bytes(), 13);
            let span = Span { unit, tweak: 1 << 40, skip_bytes: 0 };
            let expected = oracle_run(Direction::Encrypt, half_bytes, span, &text);
            for key in keys(half_bytes) {
                for piece_bytes in [16, 32, 48, 64, 80, 128, 512] {
                    for at in (0..=unit.len_bytes() - piece_bytes).step_by(BLOCK_BYTES) {
                        let range = at..at + piece_bytes;
                        let span = Span { skip_bytes: at, ..span };
                        check(&key, span, &text[range.clone()], &expected[range], Store::Cached);
                    }
                }
            }
        }
    }
}

#[test]
fn tweak_values_carry_and_wrap() {
    for unit in UNITS {
        for tweak in [(1 << 32) - 24, u64::MAX - 23, u64::MAX - 7, u64::MAX] {
            let span = Span { unit, tweak, skip_bytes: 32 };
            let text = pattern(9 * unit.len_bytes(), 5);
            let expected = oracle_run(Direction::Encrypt, 32, span, &text);
            for key in keys(32) {
                check(&key, span, &text, &expected, Store::Cached);
            }
        }
    }
}

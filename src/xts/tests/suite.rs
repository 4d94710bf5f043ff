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

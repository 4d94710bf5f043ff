//! Tests of AES-XTS, every one of them through every backend that this CPU has.

mod guard;
mod memory;
mod suite;
mod vectors;

use aes::cipher::consts::U16;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes256};
use xts_mode::Xts128;

use super::*;

/// Bytes that repeat with no short period.
fn pattern(len_bytes: usize, seed: u8) -> Vec<u8> {
    (0..len_bytes).map(|i| (i * 167 + i / 251 + i / 4099 * 31 + usize::from(seed)).to_le_bytes()[0]).collect()
}

/// Two different halves of `half_bytes` bytes.
fn halves(half_bytes: usize) -> (Vec<u8>, Vec<u8>) {
    (pattern(half_bytes, 1), pattern(half_bytes, 101))
}

/// The key of [`halves`] for every backend.
fn keys(half_bytes: usize) -> Vec<XtsKey> {
    let (data, tweak) = halves(half_bytes);
    Backend::available().into_iter().map(|backend| XtsKey::from_halves(&data, &tweak, backend)).collect()
}

/// What the `xts-mode` crate makes of one unit (or one message) with a 128-bit tweak.
fn oracle(direction: Direction, data: &[u8], tweak_half: &[u8], tweak: u128, text: &[u8]) -> Vec<u8> {
    fn run<C>(direction: Direction, data: &[u8], tweak_half: &[u8], tweak: u128, text: &mut [u8])
    where
        C: KeyInit + BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt,
    {
        let cipher = |half| C::new_from_slice(half).unwrap();
        let xts = Xts128::new(cipher(data), cipher(tweak_half));
        match direction {
            Direction::Encrypt => xts.encrypt_sector(text, Array(tweak.to_le_bytes())),
            Direction::Decrypt => xts.decrypt_sector(text, Array(tweak.to_le_bytes())),
        }
    }
    let mut text = text.to_vec();
    match data.len() {
        16 => run::<Aes128>(direction, data, tweak_half, tweak, &mut text),
        _ => run::<Aes256>(direction, data, tweak_half, tweak, &mut text),
    }
    text
}

/// What the `xts-mode` crate makes of a run: every unit apart, whole, with the run's bytes cut out afterwards.
fn oracle_run(direction: Direction, half_bytes: usize, span: Span, text: &[u8]) -> Vec<u8> {
    let (data, tweak_half) = halves(half_bytes);
    let mut padded = vec![0; span.skip_bytes];
    padded.extend_from_slice(text);
    let mut tweak = span.tweak;
    let mut out = Vec::new();
    for unit in padded.chunks(span.unit.len_bytes()) {
        out.extend(oracle(direction, &data, &tweak_half, tweak.into(), unit));
        tweak = tweak.wrapping_add(span.unit.len_bytes() as u64 / 512);
    }
    out.split_off(span.skip_bytes)
}

//! AES round keys as the x86 instructions take them (FIPS 197, 5.2 and 5.3.5), in locked memory.
//!
//! The S-box of the expansion is `AESENCLAST` on a word repeated four times, which makes ShiftRows the identity: no
//! table, so no index depends on the key. Round keys are written straight to their place.

use std::arch::x86_64::*;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, Direction};
use crate::secret::SecretBox;

/// Round keys of AES-256, the most there can be.
const KEYS_MAX: usize = 15;
const PART_BYTES: usize = KEYS_MAX * BLOCK_BYTES;

/// Round keys for data both ways and for tweaks.
pub(in crate::xts) struct RoundKeys {
    bytes: SecretBox<[u8; 3 * PART_BYTES]>,
    key_count: usize,
}

/// The round keys of one direction, for kernels that read them from memory. The number of middle rounds is known at run
/// time only, so that the compiler keeps the rounds a loop over all blocks in flight instead of a chain for each block.
#[derive(Clone, Copy)]
pub(super) struct Rounds<'a> {
    pub(super) first: &'a [u8; BLOCK_BYTES],
    pub(super) middle: &'a [[u8; BLOCK_BYTES]],
    pub(super) last: &'a [u8; BLOCK_BYTES],
}

impl RoundKeys {
    /// Expands two halves of 16 or of 32 bytes.
    #[target_feature(enable = "aes,avx")]
    pub(in crate::xts) fn expand(data: &[u8], tweak: &[u8]) -> Self {
        let key_count = data.len() / 4 + 7;
        let mut bytes = SecretBox::<[u8; 3 * PART_BYTES]>::zeroed();
        let (encrypt, rest) = bytes.split_at_mut(PART_BYTES);
        let (decrypt, tweaks) = rest.split_at_mut(PART_BYTES);
        expand_half(data, encrypt);
        expand_half(tweak, tweaks);
        for (i, slot) in decrypt.as_chunks_mut().0.iter_mut().take(key_count).enumerate() {
            let from = key_count - 1 - i;
            let key = load(encrypt.as_chunks().0[from]);
            *slot = store(if i == 0 || from == 0 { key } else { _mm_aesimc_si128(key) });
        }
        Self { bytes, key_count }
    }

    /// Round keys per half: 11 or 15.
    pub(super) const fn key_count(&self) -> usize {
        self.key_count
    }

    pub(super) fn encrypt<const KEYS: usize>(&self) -> &[[u8; BLOCK_BYTES]; KEYS] {
        self.part(0)
    }

    pub(super) fn decrypt<const KEYS: usize>(&self) -> &[[u8; BLOCK_BYTES]; KEYS] {
        self.part(1)
    }

    pub(super) fn tweak<const KEYS: usize>(&self) -> &[[u8; BLOCK_BYTES]; KEYS] {
        self.part(2)
    }

    /// The round keys of data in `direction`.
    pub(super) fn rounds(&self, direction: Direction) -> Rounds<'_> {
        let part = match direction {
            Direction::Encrypt => self.encrypt::<KEYS_MAX>(),
            Direction::Decrypt => self.decrypt::<KEYS_MAX>(),
        };
        let last = self.key_count - 1;
        Rounds { first: &part[0], middle: &part[1..last], last: &part[last] }
    }

    fn part<const KEYS: usize>(&self, part: usize) -> &[[u8; BLOCK_BYTES]; KEYS] {
        let keys = self.bytes[part * PART_BYTES..].as_chunks().0;
        keys.first_chunk().expect("a part holds the most keys there can be")
    }
}

/// KeyExpansion of FIPS 197: as many words as fit the key's round count.
#[target_feature(enable = "aes,avx")]
fn expand_half(key: &[u8], out: &mut [u8]) {
    let key_words = key.len() / 4;
    out[..key.len()].copy_from_slice(key);
    let words = out.as_chunks_mut::<4>().0;
    let mut round_constant = 1_u8;
    for i in key_words..4 * (key_words + 7) {
        let mut word = u32::from_le_bytes(words[i - 1]);
        if i.is_multiple_of(key_words) {
            word = sub_word(word).rotate_right(8) ^ u32::from(round_constant);
            round_constant = (round_constant << 1) ^ (0x1b * (round_constant >> 7));
        } else if key_words == 8 && i % 8 == 4 {
            word = sub_word(word);
        }
        words[i] = (word ^ u32::from_le_bytes(words[i - key_words])).to_le_bytes();
        word.zeroize();
    }
}

/// The S-box on every byte of a word.
#[target_feature(enable = "aes,avx")]
fn sub_word(word: u32) -> u32 {
    let repeated = _mm_set1_epi32(word.cast_signed());
    _mm_cvtsi128_si32(_mm_aesenclast_si128(repeated, _mm_setzero_si128())).cast_unsigned()
}

/// A block in a register.
#[target_feature(enable = "sse2")]
#[inline]
pub(super) fn load(block: [u8; BLOCK_BYTES]) -> __m128i {
    let (low, high) = (u64::from_le_bytes(block.as_chunks().0[0]), u64::from_le_bytes(block.as_chunks().0[1]));
    _mm_set_epi64x(high.cast_signed(), low.cast_signed())
}

/// A register as a block.
#[target_feature(enable = "aes,avx")]
#[inline]
pub(super) fn store(block: __m128i) -> [u8; BLOCK_BYTES] {
    let (low, high) = (_mm_cvtsi128_si64(block), _mm_extract_epi64::<1>(block));
    let value = u128::from(low.cast_unsigned()) | (u128::from(high.cast_unsigned()) << 64);
    value.to_le_bytes()
}

//! First tweaks: E(tweak value) for several units at once, and from there to any block of a unit.
//!
//! The way to block `j` is one multiplication by alpha^j from a table that depends on no key. A position is public, so
//! it may be an index.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, DataUnit, tweak};
use super::schedule::{self, RoundKeys};

/// Units whose first tweaks are encrypted together.
const BATCH_UNITS: usize = 32;
/// Blocks in flight in AES-NI code.
const GROUP: usize = 8;
/// Blocks of the largest unit.
const UNIT_BLOCKS_MAX: usize = DataUnit::Bytes4096.len_bytes() / BLOCK_BYTES;

/// alpha^j for every block j of a unit.
static POWERS: [[u8; BLOCK_BYTES]; UNIT_BLOCKS_MAX] = powers();

const fn powers() -> [[u8; BLOCK_BYTES]; UNIT_BLOCKS_MAX] {
    let mut powers = [[0; BLOCK_BYTES]; UNIT_BLOCKS_MAX];
    let mut power = 1;
    let mut block = 0;
    while block < UNIT_BLOCKS_MAX {
        powers[block] = u128::to_le_bytes(power);
        power = tweak::double(power);
        block += 1;
    }
    powers
}

/// The first tweaks of a batch of units, wiped on drop.
pub(super) struct Firsts {
    tweaks: [__m128i; BATCH_UNITS],
    count: usize,
    /// How many slots have been used.
    used: usize,
}

impl Firsts {
    pub(super) fn new() -> Self {
        // SAFETY: every x86-64 CPU has SSE2.
        let zero = unsafe { _mm_setzero_si128() };
        Self { tweaks: [zero; BATCH_UNITS], count: 0, used: 0 }
    }

    /// Takes the tweak values `tweak`, `tweak + step`, ... of up to `count_max` units and returns of how many.
    pub(super) fn fill(&mut self, mut tweak: u64, step: u64, count_max: usize) -> usize {
        self.count = count_max.min(BATCH_UNITS);
        // A kernel that encrypts all slots writes all slots.
        self.used = if self.count == 1 { self.used.max(1) } else { BATCH_UNITS };
        for slot in &mut self.tweaks[..self.count] {
            // SAFETY: every x86-64 CPU has SSE2.
            *slot = unsafe { _mm_set_epi64x(0, tweak.cast_signed()) };
            tweak = tweak.wrapping_add(step);
        }
        self.count
    }

    /// One tweak for every unit of the batch.
    pub(super) fn tweaks(&self) -> &[__m128i] {
        &self.tweaks[..self.count]
    }

    /// Every slot, used or not, for a kernel that encrypts them all.
    pub(super) const fn slots_mut(&mut self) -> &mut [__m128i; BATCH_UNITS] {
        &mut self.tweaks
    }

    /// Encrypts the tweaks, eight at a time.
    #[target_feature(enable = "aes,avx")]
    pub(super) fn encrypt(&mut self, keys: &RoundKeys) {
        match keys.key_count() {
            11 => self.encrypt_with(keys.tweak::<11>()),
            _ => self.encrypt_with(keys.tweak::<15>()),
        }
    }

    #[target_feature(enable = "aes,avx")]
    fn encrypt_with<const KEYS: usize>(&mut self, keys: &[[u8; BLOCK_BYTES]; KEYS]) {
        if let [tweak] = &mut self.tweaks[..self.count] {
            *tweak = encrypt_block(keys, *tweak);
            return;
        }
        let groups = self.count.div_ceil(GROUP);
        for group in &mut self.tweaks.as_chunks_mut::<GROUP>().0[..groups] {
            encrypt_group(keys, group);
        }
    }
}

impl Drop for Firsts {
    fn drop(&mut self) {
        for tweak in &mut self.tweaks[..self.used] {
            tweak.zeroize();
        }
    }
}

/// The tweak of block `block` of the unit whose 128-bit tweak is `tweak`.
#[target_feature(enable = "aes,avx,pclmulqdq")]
#[inline]
pub(super) fn at_block(keys: &RoundKeys, tweak: u128, block: usize) -> __m128i {
    let tweak = schedule::load(tweak.to_le_bytes());
    let first = match keys.key_count() {
        11 => encrypt_block(keys.tweak::<11>(), tweak),
        _ => encrypt_block(keys.tweak::<15>(), tweak),
    };
    if block == 0 { first } else { multiply(first, schedule::load(POWERS[block])) }
}

#[target_feature(enable = "aes,avx")]
#[inline]
fn encrypt_block<const KEYS: usize>(keys: &[[u8; BLOCK_BYTES]; KEYS], block: __m128i) -> __m128i {
    let mut block = _mm_xor_si128(block, schedule::load(keys[0]));
    for key in &keys[1..KEYS - 1] {
        block = _mm_aesenc_si128(block, schedule::load(*key));
    }
    _mm_aesenclast_si128(block, schedule::load(keys[KEYS - 1]))
}

#[target_feature(enable = "aes,avx")]
#[inline]
fn encrypt_group<const KEYS: usize>(keys: &[[u8; BLOCK_BYTES]; KEYS], group: &mut [__m128i; GROUP]) {
    let mut blocks = group.map(|block| _mm_xor_si128(block, schedule::load(keys[0])));
    for key in &keys[1..KEYS - 1] {
        let key = schedule::load(*key);
        for block in &mut blocks {
            *block = _mm_aesenc_si128(*block, key);
        }
    }
    let last = schedule::load(keys[KEYS - 1]);
    *group = blocks.map(|block| _mm_aesenclast_si128(block, last));
}

/// The product in GF(2^128): 256 bits without carries, of which the upper half folds down by x^128 = 0x87, twice.
#[target_feature(enable = "avx,pclmulqdq")]
#[inline]
fn multiply(a: __m128i, b: __m128i) -> __m128i {
    let reduction = _mm_set_epi64x(0, 0x87);
    let middle = _mm_xor_si128(_mm_clmulepi64_si128::<0x01>(a, b), _mm_clmulepi64_si128::<0x10>(a, b));
    let low = _mm_xor_si128(_mm_clmulepi64_si128::<0x00>(a, b), _mm_bslli_si128::<8>(middle));
    let high = _mm_xor_si128(_mm_clmulepi64_si128::<0x11>(a, b), _mm_bsrli_si128::<8>(middle));
    // Bits 192 and up land at 64 and up; what exceeds 128 there joins the bits from 128 on.
    let upper = _mm_clmulepi64_si128::<0x01>(high, reduction);
    let lower = _mm_xor_si128(high, _mm_bsrli_si128::<8>(upper));
    let folded = _mm_xor_si128(_mm_bslli_si128::<8>(upper), _mm_clmulepi64_si128::<0x00>(lower, reduction));
    _mm_xor_si128(low, folded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[target_feature(enable = "aes,avx,pclmulqdq")]
    fn product(a: u128, b: u128) -> u128 {
        let product = multiply(schedule::load(a.to_le_bytes()), schedule::load(b.to_le_bytes()));
        u128::from_le_bytes(schedule::store(product))
    }

    fn has_the_instructions() -> bool {
        is_x86_feature_detected!("aes") && is_x86_feature_detected!("avx") && is_x86_feature_detected!("pclmulqdq")
    }

    proptest! {
        #[test]
        fn multiplying_by_a_power_of_alpha_is_advancing(tweak: u128) {
            prop_assume!(has_the_instructions());
            for (block, power) in POWERS.iter().enumerate() {
                // SAFETY: the features are there.
                let jumped = unsafe { product(tweak, u128::from_le_bytes(*power)) };
                prop_assert_eq!(jumped, tweak::advance(tweak, block));
            }
        }

        #[test]
        fn multiplication_is_a_sum_of_shifts(a: u128, b: u128) {
            prop_assume!(has_the_instructions());
            let sum = (0..128).filter(|bit| b >> bit & 1 == 1).fold(0, |sum, bit| sum ^ tweak::advance(a, bit));
            // SAFETY: the features are there.
            prop_assert_eq!(unsafe { product(a, b) }, sum);
        }
    }
}

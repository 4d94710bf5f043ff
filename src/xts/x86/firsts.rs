//! First tweaks: E(tweak value) for several units at once, and from there to any block of a unit.
//!
//! The way to block `j` is one carry-less multiplication by alpha^j, from a table that depends on no key. A position is public, so
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

/// Powers of alpha from that of a unit's first block to that of its last, 64 more for the upper half of a factor, and
/// three more for the lanes of a register.
const POWER_COUNT: usize = UNIT_BLOCKS_MAX + 64 + 3;
static POWERS: [[u8; BLOCK_BYTES]; POWER_COUNT] = powers();

const fn powers() -> [[u8; BLOCK_BYTES]; POWER_COUNT] {
    let mut powers = [[0; BLOCK_BYTES]; POWER_COUNT];
    let mut power = 1;
    let mut exponent = 0;
    while exponent < POWER_COUNT {
        powers[exponent] = u128::to_le_bytes(power);
        power = tweak::double(power);
        exponent += 1;
    }
    powers
}

/// `N` powers of alpha from that of `block` on, and those 64 higher.
#[inline]
pub(super) fn powers_at<const N: usize>(block: usize) -> [&'static [[u8; BLOCK_BYTES]; N]; 2] {
    assert!(block < UNIT_BLOCKS_MAX, "no unit has a block {block}");
    [block, block + 64].map(|at| POWERS[at..].first_chunk().expect("the table has lanes to spare"))
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
    if block == 0 { first } else { jump(first, block) }
}

/// A block through the cipher.
#[target_feature(enable = "aes,avx")]
#[inline]
pub(super) fn encrypt_block<const KEYS: usize>(keys: &[[u8; BLOCK_BYTES]; KEYS], block: __m128i) -> __m128i {
    // SAFETY: a key is 16 readable bytes.
    let load = |key: &[u8; BLOCK_BYTES]| unsafe { _mm_loadu_si128(key.as_ptr().cast()) };
    let mut block = _mm_xor_si128(block, load(&keys[0]));
    for key in &keys[1..KEYS - 1] {
        block = _mm_aesenc_si128(block, load(key));
    }
    _mm_aesenclast_si128(block, load(&keys[KEYS - 1]))
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

/// `tweak * alpha^block`: the lower half of the tweak times alpha^block and the upper half, which is x^64 higher, times
/// alpha^(block + 64). Both products have 192 bits, of which the upper 64 fold down by x^128 = 0x87.
#[target_feature(enable = "avx,pclmulqdq")]
#[inline]
fn jump(tweak: __m128i, block: usize) -> __m128i {
    let [low, high] = powers_at::<1>(block).map(|[power]| schedule::load(*power));
    let lower = _mm_xor_si128(_mm_clmulepi64_si128::<0x00>(tweak, low), _mm_clmulepi64_si128::<0x01>(tweak, high));
    let upper = _mm_xor_si128(_mm_clmulepi64_si128::<0x10>(tweak, low), _mm_clmulepi64_si128::<0x11>(tweak, high));
    let folded = _mm_clmulepi64_si128::<0x01>(upper, _mm_set_epi64x(0, 0x87));
    _mm_xor_si128(_mm_xor_si128(lower, _mm_bslli_si128::<8>(upper)), folded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[target_feature(enable = "aes,avx,pclmulqdq")]
    fn jumped(tweak: u128, block: usize) -> u128 {
        u128::from_le_bytes(schedule::store(jump(schedule::load(tweak.to_le_bytes()), block)))
    }

    proptest! {
        #[test]
        fn a_jump_is_as_many_doublings(tweak: u128) {
            prop_assume!(is_x86_feature_detected!("aes"));
            prop_assume!(is_x86_feature_detected!("avx"));
            prop_assume!(is_x86_feature_detected!("pclmulqdq"));
            let mut doubled = tweak;
            for block in 0..UNIT_BLOCKS_MAX {
                // SAFETY: the features are there.
                prop_assert_eq!(unsafe { jumped(tweak, block) }, doubled);
                doubled = tweak::double(doubled);
            }
        }
    }
}

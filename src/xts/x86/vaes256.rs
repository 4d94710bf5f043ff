//! The VAES kernel for CPUs without AVX-512: two blocks to a register, eight registers in flight.
//!
//! Every register's tweaks advance by alpha^16 at once, by a byte shift and a carry-less multiplication of the overflow.
//! Round keys stay in memory: sixteen registers hold eight pairs of blocks and little else. Loads and stores are the only
//! unsafe operations; each is within the `Source` or `Target` whose length the loop counts.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, DataUnit, Direction, Pass};
use super::schedule::{RoundKeys, Rounds};
use super::{Batch, Batches, firsts};

/// Bytes in a register.
const VECTOR_BYTES: usize = 32;
/// Registers in flight.
const GROUP: usize = 8;
const GROUP_BYTES: usize = GROUP * VECTOR_BYTES;

/// Blocks `first_block..` of the unit whose 128-bit tweak is `tweak`.
#[target_feature(enable = "avx2,vaes,vpclmulqdq,aes,pclmulqdq")]
pub(in crate::xts) fn blocks(keys: &RoundKeys, tweak: u128, first_block: usize, pass: Pass<'_>) {
    let direction = pass.direction;
    let mut first = [firsts::at_block(keys, tweak, first_block)];
    dispatch(keys, direction, &first, Batch::whole(pass));
    first.zeroize();
}

/// Whole units, the first of which has tweak value `tweak`.
#[target_feature(enable = "avx2,vaes,vpclmulqdq,aes,pclmulqdq")]
pub(in crate::xts) fn units(keys: &RoundKeys, unit: DataUnit, tweak: u64, pass: Pass<'_>) {
    let direction = pass.direction;
    let mut batches = Batches::new(unit, tweak, pass);
    while let Some((firsts, batch)) = batches.cut() {
        firsts.encrypt(keys);
        dispatch(keys, direction, firsts.tweaks(), batch);
    }
}

#[target_feature(enable = "avx2,vaes,vpclmulqdq,aes")]
fn dispatch(keys: &RoundKeys, direction: Direction, firsts: &[__m128i], batch: Batch<'_>) {
    let rounds = keys.rounds(direction);
    match (direction, batch.streams) {
        (Direction::Encrypt, false) => run_batch::<true, false>(rounds, firsts, batch),
        (Direction::Encrypt, true) => run_batch::<true, true>(rounds, firsts, batch),
        (Direction::Decrypt, _) => run_batch::<false, false>(rounds, firsts, batch),
    }
}

#[target_feature(enable = "avx2,vaes,vpclmulqdq,aes")]
fn run_batch<const ENCRYPT: bool, const STREAM: bool>(rounds: Rounds<'_>, firsts: &[__m128i], mut batch: Batch<'_>) {
    let (src, dst) = (batch.src.as_ptr(), batch.dst.as_mut_ptr());
    for (unit, first) in firsts.iter().enumerate() {
        let mut tweaks = spread(*first);
        let mut at = unit * batch.unit_bytes;
        let end = at + batch.unit_bytes;
        while end - at >= GROUP_BYTES {
            batch.prefetch(at, GROUP_BYTES);
            let mut data = [_mm256_setzero_si256(); GROUP];
            for (i, pair) in data.iter_mut().enumerate() {
                // SAFETY: the group ends at or before the end of the source.
                *pair = unsafe { _mm256_loadu_si256(src.wrapping_add(at + i * VECTOR_BYTES).cast()) };
            }
            let last = whiten(rounds, &tweaks, &mut data);
            tweaks = tweaks.map(|tweak| step(tweak));
            run_rounds::<ENCRYPT>(rounds, last, &mut data);
            for (i, pair) in data.iter().enumerate() {
                let to = dst.wrapping_add(at + i * VECTOR_BYTES);
                if STREAM {
                    // SAFETY: within the target, as the loads were in the source; a batch that streams begins at a line.
                    unsafe { _mm256_stream_si256(to.cast(), *pair) };
                } else {
                    // SAFETY: within the target, as the loads were in the source.
                    unsafe { _mm256_storeu_si256(to.cast(), *pair) };
                }
            }
            at += GROUP_BYTES;
        }
        // The last blocks of a part of a unit go through the same lanes, of which some stay empty.
        if at < end {
            let mut data = [_mm256_setzero_si256(); GROUP];
            for (pair, at) in data.iter_mut().zip((at..end).step_by(VECTOR_BYTES)) {
                // SAFETY: a block or a pair before the end of the source.
                *pair = unsafe { load_up_to_pair(src.wrapping_add(at), end - at) };
            }
            let last = whiten(rounds, &tweaks, &mut data);
            run_rounds::<ENCRYPT>(rounds, last, &mut data);
            for (pair, at) in data.iter().zip((at..end).step_by(VECTOR_BYTES)) {
                let to = dst.wrapping_add(at);
                if end - at >= VECTOR_BYTES {
                    // SAFETY: a pair before the end of the target.
                    unsafe { _mm256_storeu_si256(to.cast(), *pair) };
                } else {
                    let block = _mm256_castsi256_si128(*pair);
                    // SAFETY: a block before the end of the target.
                    unsafe { _mm_storeu_si128(to.cast(), block) };
                }
            }
        }
    }
}

/// A pair of blocks, or the only one that is left.
///
/// # Safety
///
/// `rest_bytes`, which is 16 or more, are readable at `from`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load_up_to_pair(from: *const u8, rest_bytes: usize) -> __m256i {
    if rest_bytes >= VECTOR_BYTES {
        // SAFETY: by the contract.
        unsafe { _mm256_loadu_si256(from.cast()) }
    } else {
        // SAFETY: by the contract.
        _mm256_zextsi128_si256(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

/// The first whitening and the first round key; returns last round keys that carry the second whitening, so that the
/// tweaks are free to advance before the rounds.
#[target_feature(enable = "avx2")]
#[inline]
fn whiten(rounds: Rounds<'_>, tweaks: &[__m256i; GROUP], data: &mut [__m256i; GROUP]) -> [__m256i; GROUP] {
    let (first, last) = (broadcast(*rounds.first), broadcast(*rounds.last));
    for (pair, tweak) in data.iter_mut().zip(tweaks) {
        *pair = _mm256_xor_si256(_mm256_xor_si256(*pair, *tweak), first);
    }
    tweaks.map(|tweak| _mm256_xor_si256(tweak, last))
}

/// Every round after the first key, the last one with keys of its own.
#[target_feature(enable = "avx2,vaes")]
#[inline]
fn run_rounds<const ENCRYPT: bool>(rounds: Rounds<'_>, last: [__m256i; GROUP], data: &mut [__m256i; GROUP]) {
    for key in rounds.middle {
        let key = broadcast(*key);
        for pair in data.iter_mut() {
            *pair = if ENCRYPT { _mm256_aesenc_epi128(*pair, key) } else { _mm256_aesdec_epi128(*pair, key) };
        }
    }
    for (pair, key) in data.iter_mut().zip(last) {
        *pair = if ENCRYPT { _mm256_aesenclast_epi128(*pair, key) } else { _mm256_aesdeclast_epi128(*pair, key) };
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn broadcast(key: [u8; BLOCK_BYTES]) -> __m256i {
    let (low, high) = (u64::from_le_bytes(key.as_chunks().0[0]), u64::from_le_bytes(key.as_chunks().0[1]));
    let (low, high) = (low.cast_signed(), high.cast_signed());
    _mm256_set_epi64x(high, low, high, low)
}

/// The tweaks of 16 blocks, the first of which has `first`.
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn spread(first: __m128i) -> [__m256i; GROUP] {
    let both = _mm256_broadcastsi128_si256(first);
    let t0 = _mm256_blend_epi32::<0b1111_0000>(both, shifted::<1>(both));
    let t1 = shifted::<2>(t0);
    let [t2, t3] = [t0, t1].map(|tweak| shifted::<4>(tweak));
    let [t4, t5, t6, t7] = [t0, t1, t2, t3].map(|tweak| shifted::<8>(tweak));
    [t0, t1, t2, t3, t4, t5, t6, t7]
}

/// Every lane times alpha^8: a shift by one byte and the overflow folded in, and so on for fewer bits.
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn shifted<const POWER: i32>(tweak: __m256i) -> __m256i {
    let overflow = _mm256_srl_epi64(tweak, _mm_cvtsi32_si128(64 - POWER));
    let folded = _mm256_clmulepi64_epi128::<0x01>(overflow, _mm256_set1_epi64x(0x87));
    let carried = _mm256_xor_si256(_mm256_bslli_epi128::<8>(overflow), folded);
    _mm256_xor_si256(_mm256_slli_epi64::<POWER>(tweak), carried)
}

/// Every lane times alpha^16: a shift by two bytes, and the overflow folded in.
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn step(tweak: __m256i) -> __m256i {
    let overflow = _mm256_bsrli_epi128::<14>(tweak);
    let folded = _mm256_clmulepi64_epi128::<0x00>(overflow, _mm256_set1_epi64x(0x87));
    _mm256_xor_si256(_mm256_bslli_epi128::<2>(tweak), folded)
}

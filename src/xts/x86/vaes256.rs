//! The VAES kernel for CPUs without AVX-512: two blocks to a register, eight registers in flight.
//!
//! Every register's tweaks advance by alpha^16 at once, by a byte shift and a carry-less multiplication of the overflow.
//! Round keys stay in memory: sixteen registers hold eight pairs of blocks and little else. Loads and stores are the only
//! unsafe operations; each is within the `Source` or `Target` whose length the loop counts.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, DataUnit, Direction, Pass};
use super::schedule::{RoundKeys, Rounds};
use super::{Batch, Batches, Place, firsts, place, store_block};

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
    match direction {
        Direction::Encrypt => run_batch::<true>(keys.rounds(direction), firsts, batch),
        Direction::Decrypt => run_batch::<false>(keys.rounds(direction), firsts, batch),
    }
}

#[target_feature(enable = "avx2,vaes,vpclmulqdq,aes")]
fn run_batch<const ENCRYPT: bool>(rounds: Rounds<'_>, firsts: &[__m128i], mut batch: Batch<'_>) {
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
            let whitening = tweaks;
            tweaks = tweaks.map(|tweak| step(tweak));
            cipher::<ENCRYPT>(rounds, &whitening, &mut data);
            // SAFETY: within the target, as the loads were in the source; lines are given for aligned targets only.
            unsafe { store_group(dst.wrapping_add(at), &data, &batch.lines) };
            at += GROUP_BYTES;
        }
        // The last blocks of a part of a unit go through the same lanes, of which some stay empty.
        if at < end {
            let mut data = [_mm256_setzero_si256(); GROUP];
            for (pair, at) in data.iter_mut().zip((at..end).step_by(VECTOR_BYTES)) {
                // SAFETY: a block or a pair before the end of the source.
                *pair = unsafe { load_up_to_pair(src.wrapping_add(at), end - at) };
            }
            cipher::<ENCRYPT>(rounds, &tweaks, &mut data);
            for (pair, at) in data.iter().zip((at..end).step_by(VECTOR_BYTES)) {
                let to = dst.wrapping_add(at);
                if end - at >= VECTOR_BYTES {
                    // SAFETY: a pair before the end of the target; lines as above.
                    unsafe { store_pair(to, *pair, &batch.lines) };
                } else {
                    let block = _mm256_castsi256_si128(*pair);
                    // SAFETY: a block before the end of the target; lines as above.
                    unsafe { store_block(to, block, &batch.lines) };
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

/// Stores a group: around the cache where it lies in `lines`.
///
/// # Safety
///
/// - The 256 bytes at `to` are writable.
/// - `to` is a multiple of 16 unless `lines` is empty.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store_group(to: *mut u8, data: &[__m256i; GROUP], lines: &Range<usize>) {
    let place = place(to, GROUP_BYTES, lines);
    for (i, pair) in data.iter().enumerate() {
        let to = to.wrapping_add(i * VECTOR_BYTES);
        match place {
            // SAFETY: by the contract.
            Place::Cached => unsafe { _mm256_storeu_si256(to.cast(), *pair) },
            // SAFETY: by the contract; the group begins at a line.
            Place::Lines => unsafe { _mm256_stream_si256(to.cast(), *pair) },
            // SAFETY: by the contract.
            Place::Ragged => unsafe { store_pair(to, *pair, lines) },
        }
    }
}

/// Stores a pair of blocks, each as it lies.
///
/// # Safety
///
/// - The 32 bytes at `to` are writable.
/// - `to` is a multiple of 16 unless `lines` is empty.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store_pair(to: *mut u8, pair: __m256i, lines: &Range<usize>) {
    let (lower, upper) = (_mm256_castsi256_si128(pair), _mm256_extracti128_si256::<1>(pair));
    // SAFETY: by the contract.
    unsafe { store_block(to, lower, lines) };
    // SAFETY: by the contract.
    unsafe { store_block(to.wrapping_add(BLOCK_BYTES), upper, lines) };
}

#[target_feature(enable = "avx2,vaes")]
#[inline]
fn cipher<const ENCRYPT: bool>(rounds: Rounds<'_>, tweaks: &[__m256i; GROUP], data: &mut [__m256i; GROUP]) {
    let first = broadcast(*rounds.first);
    for (pair, tweak) in data.iter_mut().zip(tweaks) {
        *pair = _mm256_xor_si256(_mm256_xor_si256(*pair, *tweak), first);
    }
    for key in rounds.middle {
        let key = broadcast(*key);
        for pair in data.iter_mut() {
            *pair = if ENCRYPT { _mm256_aesenc_epi128(*pair, key) } else { _mm256_aesdec_epi128(*pair, key) };
        }
    }
    let last = broadcast(*rounds.last);
    for (pair, tweak) in data.iter_mut().zip(tweaks) {
        let key = _mm256_xor_si256(last, *tweak);
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
    let pair = shifted(_mm256_broadcastsi128_si256(first), _mm256_set_epi64x(1, 1, 0, 0));
    let mut tweaks = [pair; GROUP];
    for (i, tweak) in (0..).zip(&mut tweaks).skip(1) {
        *tweak = shifted(pair, _mm256_set1_epi64x(2 * i));
    }
    tweaks
}

/// Every lane times alpha^power, for powers up to 57 (the folded overflow must stay below 2^64).
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn shifted(tweak: __m256i, power: __m256i) -> __m256i {
    let overflow = _mm256_srlv_epi64(tweak, _mm256_sub_epi64(_mm256_set1_epi64x(64), power));
    let folded = _mm256_clmulepi64_epi128::<0x01>(overflow, _mm256_set1_epi64x(0x87));
    let carried = _mm256_xor_si256(_mm256_bslli_epi128::<8>(overflow), folded);
    _mm256_xor_si256(_mm256_sllv_epi64(tweak, power), carried)
}

/// Every lane times alpha^16: a shift by two bytes, and the overflow folded in.
#[target_feature(enable = "avx2,vpclmulqdq")]
#[inline]
fn step(tweak: __m256i) -> __m256i {
    let overflow = _mm256_bsrli_epi128::<14>(tweak);
    let folded = _mm256_clmulepi64_epi128::<0x00>(overflow, _mm256_set1_epi64x(0x87));
    _mm256_xor_si256(_mm256_bslli_epi128::<2>(tweak), folded)
}

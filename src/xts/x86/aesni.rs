//! The AES-NI kernel: one block to a register, eight in flight, VEX-encoded.
//!
//! Every block's tweak advances by alpha^8 at once, by a byte shift and a carry-less multiplication of the overflow.
//! Round keys stay in memory: sixteen registers hold eight blocks and little else. Loads and stores are the only unsafe
//! operations; each is within the `Source` or `Target` whose length the loop counts.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, DataUnit, Direction, Pass};
use super::schedule::{self, RoundKeys, Rounds};
use super::{Batch, Batches, firsts};

/// Blocks in flight.
const GROUP: usize = 8;
const GROUP_BYTES: usize = GROUP * BLOCK_BYTES;

/// Blocks `first_block..` of the unit whose 128-bit tweak is `tweak`.
#[target_feature(enable = "aes,avx,pclmulqdq")]
pub(in crate::xts) fn blocks(keys: &RoundKeys, tweak: u128, first_block: usize, pass: Pass<'_>) {
    let direction = pass.direction;
    let mut first = [firsts::at_block(keys, tweak, first_block)];
    dispatch(keys, direction, &first, Batch::whole(pass));
    first.zeroize();
}

/// Whole units, the first of which has tweak value `tweak`.
#[target_feature(enable = "aes,avx,pclmulqdq")]
pub(in crate::xts) fn units(keys: &RoundKeys, unit: DataUnit, tweak: u64, pass: Pass<'_>) {
    let direction = pass.direction;
    let mut batches = Batches::new(unit, tweak, pass);
    while let Some((firsts, batch)) = batches.cut() {
        firsts.encrypt(keys);
        dispatch(keys, direction, firsts.tweaks(), batch);
    }
}

#[target_feature(enable = "aes,avx,pclmulqdq")]
fn dispatch(keys: &RoundKeys, direction: Direction, firsts: &[__m128i], batch: Batch<'_>) {
    let rounds = keys.rounds(direction);
    match (direction, batch.streams) {
        (Direction::Encrypt, false) => run_batch::<true, false>(rounds, firsts, batch),
        (Direction::Encrypt, true) => run_batch::<true, true>(rounds, firsts, batch),
        (Direction::Decrypt, _) => run_batch::<false, false>(rounds, firsts, batch),
    }
}

#[target_feature(enable = "aes,avx,pclmulqdq")]
fn run_batch<const ENCRYPT: bool, const STREAM: bool>(rounds: Rounds<'_>, firsts: &[__m128i], mut batch: Batch<'_>) {
    let (src, dst) = (batch.src.as_ptr(), batch.dst.as_mut_ptr());
    for (unit, first) in firsts.iter().enumerate() {
        let mut tweaks = spread(*first);
        let mut at = unit * batch.unit_bytes;
        let end = at + batch.unit_bytes;
        while end - at >= GROUP_BYTES {
            batch.prefetch(at, GROUP_BYTES);
            let mut data = [_mm_setzero_si128(); GROUP];
            for (i, block) in data.iter_mut().enumerate() {
                // SAFETY: the group ends at or before the end of the source.
                *block = unsafe { _mm_loadu_si128(src.wrapping_add(at + i * BLOCK_BYTES).cast()) };
            }
            let last = whiten(rounds, &tweaks, &mut data);
            tweaks = tweaks.map(|tweak| step(tweak));
            run_rounds::<ENCRYPT>(rounds, last, &mut data);
            for (i, block) in data.iter().enumerate() {
                let to = dst.wrapping_add(at + i * BLOCK_BYTES);
                if STREAM {
                    // SAFETY: within the target, as the loads were in the source; a batch that streams begins at a line.
                    unsafe { _mm_stream_si128(to.cast(), *block) };
                } else {
                    // SAFETY: within the target, as the loads were in the source.
                    unsafe { _mm_storeu_si128(to.cast(), *block) };
                }
            }
            at += GROUP_BYTES;
        }
        // The last blocks of a part of a unit go through the same eight lanes, of which some stay empty.
        if at < end {
            let mut data = [_mm_setzero_si128(); GROUP];
            for (block, at) in data.iter_mut().zip((at..end).step_by(BLOCK_BYTES)) {
                // SAFETY: a block before the end of the source.
                *block = unsafe { _mm_loadu_si128(src.wrapping_add(at).cast()) };
            }
            let last = whiten(rounds, &tweaks, &mut data);
            run_rounds::<ENCRYPT>(rounds, last, &mut data);
            for (block, at) in data.iter().zip((at..end).step_by(BLOCK_BYTES)) {
                // SAFETY: a block before the end of the target.
                unsafe { _mm_storeu_si128(dst.wrapping_add(at).cast(), *block) };
            }
        }
    }
}

/// The tweaks of a group whose first block has `first`.
#[target_feature(enable = "avx")]
#[inline]
fn spread(first: __m128i) -> [__m128i; GROUP] {
    let mut tweaks = [first; GROUP];
    for i in 1..GROUP {
        tweaks[i] = double(tweaks[i - 1]);
    }
    tweaks
}

/// `tweak * alpha`: both halves shift, and their sign bits carry into each other.
#[target_feature(enable = "avx")]
#[inline]
fn double(tweak: __m128i) -> __m128i {
    let signs = _mm_srai_epi32::<31>(_mm_shuffle_epi32::<0b00_01_00_11>(tweak));
    let carries = _mm_and_si128(signs, _mm_set_epi32(0, 1, 0, 0x87));
    _mm_xor_si128(_mm_add_epi64(tweak, tweak), carries)
}

/// `tweak * alpha^8`: a shift by one byte, and the overflow folded in.
#[target_feature(enable = "avx,pclmulqdq")]
#[inline]
fn step(tweak: __m128i) -> __m128i {
    let folded = _mm_clmulepi64_si128::<0x00>(_mm_srli_si128::<15>(tweak), _mm_set1_epi64x(0x87));
    _mm_xor_si128(_mm_slli_si128::<1>(tweak), folded)
}

/// The first whitening and the first round key; returns last round keys that carry the second whitening, so that the
/// tweaks are free to advance before the rounds.
#[target_feature(enable = "avx")]
#[inline]
fn whiten(rounds: Rounds<'_>, tweaks: &[__m128i; GROUP], data: &mut [__m128i; GROUP]) -> [__m128i; GROUP] {
    let (first, last) = (schedule::load(*rounds.first), schedule::load(*rounds.last));
    for (block, tweak) in data.iter_mut().zip(tweaks) {
        *block = _mm_xor_si128(_mm_xor_si128(*block, *tweak), first);
    }
    tweaks.map(|tweak| _mm_xor_si128(tweak, last))
}

/// Every round after the first key, the last one with keys of its own.
#[target_feature(enable = "aes,avx")]
#[inline]
fn run_rounds<const ENCRYPT: bool>(rounds: Rounds<'_>, last: [__m128i; GROUP], data: &mut [__m128i; GROUP]) {
    for key in rounds.middle {
        let key = schedule::load(*key);
        for block in data.iter_mut() {
            *block = if ENCRYPT { _mm_aesenc_si128(*block, key) } else { _mm_aesdec_si128(*block, key) };
        }
    }
    for (block, key) in data.iter_mut().zip(last) {
        *block = if ENCRYPT { _mm_aesenclast_si128(*block, key) } else { _mm_aesdeclast_si128(*block, key) };
    }
}

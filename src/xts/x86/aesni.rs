//! The AES-NI kernel: one block to a register, eight in flight, VEX-encoded.
//!
//! Tweaks are doubled one after the other, which the CPU does beside the rounds of the blocks before. Round keys stay in
//! memory: sixteen registers hold eight blocks and little else. Loads and stores are the only unsafe operations; each is
//! within the `Source` or `Target` whose length the loop counts.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, DataUnit, Direction, Pass};
use super::schedule::{self, RoundKeys, Rounds};
use super::{Batch, Batches, Place, firsts, place, store_block};

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
    match direction {
        Direction::Encrypt => run_batch::<true>(keys.rounds(direction), firsts, batch),
        Direction::Decrypt => run_batch::<false>(keys.rounds(direction), firsts, batch),
    }
}

#[target_feature(enable = "aes,avx")]
fn run_batch<const ENCRYPT: bool>(rounds: Rounds<'_>, firsts: &[__m128i], mut batch: Batch<'_>) {
    let (src, dst) = (batch.src.as_ptr(), batch.dst.as_mut_ptr());
    for (unit, first) in firsts.iter().enumerate() {
        let mut next = *first;
        let mut at = unit * batch.unit_bytes;
        let end = at + batch.unit_bytes;
        while end - at >= GROUP_BYTES {
            batch.prefetch(at, GROUP_BYTES);
            let tweaks = take_tweaks(&mut next);
            let mut data = [_mm_setzero_si128(); GROUP];
            for (i, block) in data.iter_mut().enumerate() {
                // SAFETY: the group ends at or before the end of the source.
                *block = unsafe { _mm_loadu_si128(src.wrapping_add(at + i * BLOCK_BYTES).cast()) };
            }
            cipher::<ENCRYPT>(rounds, &tweaks, &mut data);
            // SAFETY: within the target, as the loads were in the source; lines are given for aligned targets only.
            unsafe { store_group(dst.wrapping_add(at), &data, &batch.lines) };
            at += GROUP_BYTES;
        }
        // The last blocks of a part of a unit go through the same eight lanes, of which some stay empty.
        if at < end {
            let tweaks = take_tweaks(&mut next);
            let mut data = [_mm_setzero_si128(); GROUP];
            for (block, at) in data.iter_mut().zip((at..end).step_by(BLOCK_BYTES)) {
                // SAFETY: a block before the end of the source.
                *block = unsafe { _mm_loadu_si128(src.wrapping_add(at).cast()) };
            }
            cipher::<ENCRYPT>(rounds, &tweaks, &mut data);
            for (block, at) in data.iter().zip((at..end).step_by(BLOCK_BYTES)) {
                // SAFETY: as above.
                unsafe { store_block(dst.wrapping_add(at), *block, &batch.lines) };
            }
        }
    }
}

/// Stores a group: around the cache where it lies in `lines`.
///
/// # Safety
///
/// - The 128 bytes at `to` are writable.
/// - `to` is a multiple of 16 unless `lines` is empty.
#[target_feature(enable = "avx")]
#[inline]
unsafe fn store_group(to: *mut u8, data: &[__m128i; GROUP], lines: &Range<usize>) {
    let place = place(to, GROUP_BYTES, lines);
    for (i, block) in data.iter().enumerate() {
        let to = to.wrapping_add(i * BLOCK_BYTES);
        match place {
            // SAFETY: by the contract.
            Place::Cached => unsafe { _mm_storeu_si128(to.cast(), *block) },
            // SAFETY: by the contract; lines are not empty.
            Place::Lines => unsafe { _mm_stream_si128(to.cast(), *block) },
            // SAFETY: by the contract.
            Place::Ragged => unsafe { store_block(to, *block, lines) },
        }
    }
}

/// The tweaks of a group; `next` becomes that of the block after it.
#[target_feature(enable = "avx")]
#[inline]
fn take_tweaks(next: &mut __m128i) -> [__m128i; GROUP] {
    let mut tweaks = [_mm_setzero_si128(); GROUP];
    for tweak in &mut tweaks {
        *tweak = *next;
        *next = double(*next);
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

#[target_feature(enable = "aes,avx")]
#[inline]
fn cipher<const ENCRYPT: bool>(rounds: Rounds<'_>, tweaks: &[__m128i; GROUP], data: &mut [__m128i; GROUP]) {
    let first = schedule::load(*rounds.first);
    for (block, tweak) in data.iter_mut().zip(tweaks) {
        *block = _mm_xor_si128(_mm_xor_si128(*block, *tweak), first);
    }
    for key in rounds.middle {
        let key = schedule::load(*key);
        for block in data.iter_mut() {
            *block = if ENCRYPT { _mm_aesenc_si128(*block, key) } else { _mm_aesdec_si128(*block, key) };
        }
    }
    let last = schedule::load(*rounds.last);
    for (block, tweak) in data.iter_mut().zip(tweaks) {
        let key = _mm_xor_si128(last, *tweak);
        *block = if ENCRYPT { _mm_aesenclast_si128(*block, key) } else { _mm_aesdeclast_si128(*block, key) };
    }
}

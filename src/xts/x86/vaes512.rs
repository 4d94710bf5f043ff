//! The VAES-512 kernel: four blocks to a register, four registers in flight, tweaks by carry-less multiplication.
//!
//! A unit's tweaks advance together by alpha^16 in one burst between data rounds, which suits CPUs whose AES units
//! share ports with shuffles. First tweaks of up to 32 units are encrypted together. Loads and stores are the only
//! unsafe operations; each is within the `Source` or `Target` whose length the loop counts.
//!
//! Ends of fewer than four blocks are loaded and stored by mask or by block, so nothing outside of the run is touched.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, DataUnit, Direction, Pass};
use super::firsts::{self, Firsts};
use super::schedule::{self, RoundKeys};
use super::{Batch, Batches, store_block};

/// Bytes in a register.
const VECTOR_BYTES: usize = 64;
/// Registers in flight.
const QUAD: usize = 4;
const QUAD_BYTES: usize = QUAD * VECTOR_BYTES;

/// Blocks `first_block..` of the unit whose 128-bit tweak is `tweak`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx,pclmulqdq")]
pub(in crate::xts) fn blocks(keys: &RoundKeys, tweak: u128, first_block: usize, pass: Pass<'_>) {
    let direction = pass.direction;
    let mut first = [firsts::at_block(keys, tweak, first_block)];
    dispatch(keys, direction, &first, Batch::whole(pass));
    first.zeroize();
}

/// Whole units, the first of which has tweak value `tweak`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx,pclmulqdq")]
pub(in crate::xts) fn units(keys: &RoundKeys, unit: DataUnit, tweak: u64, pass: Pass<'_>) {
    let direction = pass.direction;
    let mut batches = Batches::new(unit, tweak, pass);
    while let Some((firsts, batch)) = batches.cut() {
        match (firsts.tweaks().len(), keys.key_count()) {
            (1, _) => firsts.encrypt(keys),
            (_, 11) => encrypt_firsts(keys.tweak::<11>(), firsts),
            _ => encrypt_firsts(keys.tweak::<15>(), firsts),
        }
        dispatch(keys, direction, firsts.tweaks(), batch);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx")]
fn dispatch(keys: &RoundKeys, direction: Direction, firsts: &[__m128i], batch: Batch<'_>) {
    match (keys.key_count(), direction, batch.lines.is_empty()) {
        (11, Direction::Encrypt, true) => run_batch::<11, true, false>(keys.encrypt(), firsts, batch),
        (11, Direction::Encrypt, false) => run_batch::<11, true, true>(keys.encrypt(), firsts, batch),
        (11, Direction::Decrypt, true) => run_batch::<11, false, false>(keys.decrypt(), firsts, batch),
        (11, Direction::Decrypt, false) => run_batch::<11, false, true>(keys.decrypt(), firsts, batch),
        (_, Direction::Encrypt, true) => run_batch::<15, true, false>(keys.encrypt(), firsts, batch),
        (_, Direction::Encrypt, false) => run_batch::<15, true, true>(keys.encrypt(), firsts, batch),
        (_, Direction::Decrypt, true) => run_batch::<15, false, false>(keys.decrypt(), firsts, batch),
        (_, Direction::Decrypt, false) => run_batch::<15, false, true>(keys.decrypt(), firsts, batch),
    }
}

/// Encrypts every slot, eight registers at a time: that takes no longer than one register would.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx")]
fn encrypt_firsts<const KEYS: usize>(keys: &[[u8; BLOCK_BYTES]; KEYS], firsts: &mut Firsts) {
    let keys = broadcast(keys);
    let slots = firsts.slots_mut().as_chunks_mut::<4>().0;
    let mut vectors = [_mm512_setzero_si512(); 8];
    for (vector, four) in vectors.iter_mut().zip(slots.iter()) {
        // SAFETY: four tweaks are 64 readable bytes.
        *vector = unsafe { _mm512_loadu_si512(four.as_ptr().cast()) };
        *vector = _mm512_xor_si512(*vector, keys[0]);
    }
    for key in &keys[1..KEYS - 1] {
        for vector in &mut vectors {
            *vector = _mm512_aesenc_epi128(*vector, *key);
        }
    }
    for (vector, four) in vectors.iter().zip(slots) {
        let vector = _mm512_aesenclast_epi128(*vector, keys[KEYS - 1]);
        // SAFETY: four tweaks are 64 writable bytes.
        unsafe { _mm512_storeu_si512(four.as_mut_ptr().cast(), vector) };
    }
}

#[target_feature(enable = "avx512f,aes,avx")]
#[inline]
fn broadcast<const KEYS: usize>(keys: &[[u8; BLOCK_BYTES]; KEYS]) -> [__m512i; KEYS] {
    let mut wide = [_mm512_setzero_si512(); KEYS];
    for (wide, key) in wide.iter_mut().zip(keys) {
        *wide = _mm512_broadcast_i32x4(schedule::load(*key));
    }
    wide
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx")]
fn run_batch<const KEYS: usize, const ENCRYPT: bool, const STREAM: bool>(
    keys: &[[u8; BLOCK_BYTES]; KEYS],
    firsts: &[__m128i],
    mut batch: Batch<'_>,
) {
    let keys = broadcast(keys);
    let (src, dst) = (batch.src.as_ptr(), batch.dst.as_mut_ptr());
    for (unit, first) in firsts.iter().enumerate() {
        let mut tweaks = spread(*first);
        let mut at = unit * batch.unit_bytes;
        let end = at + batch.unit_bytes;
        while end - at >= QUAD_BYTES {
            batch.prefetch(at, QUAD_BYTES);
            let mut data = [_mm512_setzero_si512(); QUAD];
            for (i, vector) in data.iter_mut().enumerate() {
                // SAFETY: the quad ends at or before the end of the source.
                *vector = unsafe { _mm512_loadu_si512(src.wrapping_add(at + i * VECTOR_BYTES).cast()) };
            }
            let whitening = tweaks;
            tweaks = tweaks.map(|tweak| step(tweak));
            cipher::<KEYS, QUAD, ENCRYPT>(&keys, &whitening, &mut data);
            for (i, vector) in data.iter().enumerate() {
                let to = dst.wrapping_add(at + i * VECTOR_BYTES);
                if STREAM {
                    // SAFETY: within the target, as the load was in the source; lines are given for aligned targets.
                    unsafe { stream(to, *vector, &batch.lines) };
                } else {
                    // SAFETY: within the target, as the load was in the source.
                    unsafe { _mm512_storeu_si512(to.cast(), *vector) };
                }
            }
            at += QUAD_BYTES;
        }
        for tweak in tweaks {
            if at >= end {
                break;
            }
            let vector_bytes = VECTOR_BYTES.min(end - at);
            let mask = (u16::MAX >> (16 - vector_bytes / 8)).to_le_bytes()[0];
            // SAFETY: the mask covers exactly the bytes left of the unit, which are within the source.
            let mut data = [unsafe { _mm512_maskz_loadu_epi64(mask, src.wrapping_add(at).cast()) }];
            cipher::<KEYS, 1, ENCRYPT>(&keys, &[tweak], &mut data);
            let to = dst.wrapping_add(at);
            if STREAM {
                for (block, at) in lanes(data[0]).into_iter().zip((0..vector_bytes).step_by(BLOCK_BYTES)) {
                    // SAFETY: a block before the end of the target; lines as above.
                    unsafe { store_block(to.wrapping_add(at), block, &batch.lines) };
                }
            } else {
                // SAFETY: the same bytes of the target as the mask covered of the source.
                unsafe { _mm512_mask_storeu_epi64(to.cast(), mask, data[0]) };
            }
            at += vector_bytes;
        }
    }
}

/// Stores four blocks: around the cache where they lie in `lines`, which hold every whole line of the target.
///
/// # Safety
///
/// - The 64 bytes at `to` are writable.
/// - `to` is a multiple of 16.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn stream(to: *mut u8, vector: __m512i, lines: &Range<usize>) {
    if to.addr().is_multiple_of(VECTOR_BYTES) {
        // SAFETY: writable, by the contract, and aligned.
        unsafe { _mm512_stream_si512(to.cast(), vector) };
        return;
    }
    for (i, block) in lanes(vector).into_iter().enumerate() {
        // SAFETY: by the contract.
        unsafe { store_block(to.wrapping_add(i * BLOCK_BYTES), block, lines) };
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn lanes(vector: __m512i) -> [__m128i; 4] {
    [
        _mm512_extracti32x4_epi32::<0>(vector),
        _mm512_extracti32x4_epi32::<1>(vector),
        _mm512_extracti32x4_epi32::<2>(vector),
        _mm512_extracti32x4_epi32::<3>(vector),
    ]
}

/// Whitening, all rounds, whitening: the last round key carries the second whitening.
#[target_feature(enable = "avx512f,vaes")]
#[inline]
fn cipher<const KEYS: usize, const N: usize, const ENCRYPT: bool>(
    keys: &[__m512i; KEYS],
    tweaks: &[__m512i; N],
    data: &mut [__m512i; N],
) {
    let mut last = *tweaks;
    for i in 0..N {
        data[i] = _mm512_ternarylogic_epi64::<0x96>(data[i], tweaks[i], keys[0]);
        last[i] = _mm512_xor_si512(keys[KEYS - 1], tweaks[i]);
    }
    for key in &keys[1..KEYS - 1] {
        for vector in data.iter_mut() {
            *vector = if ENCRYPT { _mm512_aesenc_epi128(*vector, *key) } else { _mm512_aesdec_epi128(*vector, *key) };
        }
    }
    for (vector, key) in data.iter_mut().zip(last) {
        *vector = if ENCRYPT { _mm512_aesenclast_epi128(*vector, key) } else { _mm512_aesdeclast_epi128(*vector, key) };
    }
}

/// The tweaks of 16 blocks, the first of which has `first`: lane by lane, then register by register.
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq,aes,avx")]
#[inline]
fn spread(first: __m128i) -> [__m512i; QUAD] {
    let same = _mm512_broadcast_i32x4(first);
    let lanes = shifted(same, _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0));
    [
        lanes,
        shifted(lanes, _mm512_set1_epi64(4)),
        shifted(lanes, _mm512_set1_epi64(8)),
        shifted(lanes, _mm512_set1_epi64(12)),
    ]
}

/// Every lane times alpha^power, for powers up to 57 (the folded overflow must stay below 2^64).
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
#[inline]
fn shifted(tweak: __m512i, power: __m512i) -> __m512i {
    let overflow = _mm512_srlv_epi64(tweak, _mm512_sub_epi64(_mm512_set1_epi64(64), power));
    let folded = _mm512_clmulepi64_epi128::<0x01>(overflow, _mm512_set1_epi64(0x87));
    let carried = _mm512_bslli_epi128::<8>(overflow);
    _mm512_ternarylogic_epi64::<0x96>(_mm512_sllv_epi64(tweak, power), folded, carried)
}

/// Every lane times alpha^16: a shift by two bytes, and the overflow folded in.
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
#[inline]
fn step(tweak: __m512i) -> __m512i {
    let overflow = _mm512_bsrli_epi128::<14>(tweak);
    let folded = _mm512_clmulepi64_epi128::<0x00>(overflow, _mm512_set1_epi64(0x87));
    _mm512_xor_si512(_mm512_bslli_epi128::<2>(tweak), folded)
}

//! The VAES-512 kernel: four blocks to a register, four registers in flight, tweaks by carry-less multiplication.
//!
//! A unit's tweaks advance together by alpha^16 in one burst between data rounds, which suits CPUs whose AES units
//! share ports with shuffles. First tweaks of up to 32 units are encrypted together. Loads and stores are the only
//! unsafe operations; each is within the `Source` or `Target` whose length the loop counts.
//!
//! Ends of fewer than four blocks are loaded and stored block by block, so nothing outside of the run is touched.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use zeroize::Zeroize;

use super::super::{BLOCK_BYTES, DataUnit, Direction, Pass};
use super::firsts::{self, Firsts};
use super::schedule::{self, RoundKeys};
use super::{Batch, Batches};
use crate::memory::{Source, Target};

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
    match (keys.key_count(), direction, batch.streams) {
        (11, Direction::Encrypt, false) => run_batch::<11, true, false>(keys.encrypt(), firsts, batch),
        (11, Direction::Encrypt, true) => run_batch::<11, true, true>(keys.encrypt(), firsts, batch),
        (11, Direction::Decrypt, _) => run_batch::<11, false, false>(keys.decrypt(), firsts, batch),
        (_, Direction::Encrypt, false) => run_batch::<15, true, false>(keys.encrypt(), firsts, batch),
        (_, Direction::Encrypt, true) => run_batch::<15, true, true>(keys.encrypt(), firsts, batch),
        (_, Direction::Decrypt, _) => run_batch::<15, false, false>(keys.decrypt(), firsts, batch),
    }
}

/// At most four blocks from `block` on of the unit with tweak value `tweak`, stored through the cache.
///
/// Everything is passed in registers: structures in memory would make a call wait for the one before it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx,pclmulqdq")]
pub(in crate::xts) fn line(
    keys: &RoundKeys,
    direction: Direction,
    tweak: u64,
    block: usize,
    src: Source<'_>,
    dst: Target<'_>,
) {
    match (keys.key_count(), direction) {
        (11, Direction::Encrypt) => line_with::<11, true>(keys.tweak(), keys.encrypt(), tweak, block, src, dst),
        (11, Direction::Decrypt) => line_with::<11, false>(keys.tweak(), keys.decrypt(), tweak, block, src, dst),
        (_, Direction::Encrypt) => line_with::<15, true>(keys.tweak(), keys.encrypt(), tweak, block, src, dst),
        (_, Direction::Decrypt) => line_with::<15, false>(keys.tweak(), keys.decrypt(), tweak, block, src, dst),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx,pclmulqdq")]
fn line_with<const KEYS: usize, const ENCRYPT: bool>(
    tweak_keys: &[[u8; BLOCK_BYTES]; KEYS],
    data_keys: &[[u8; BLOCK_BYTES]; KEYS],
    tweak: u64,
    block: usize,
    src: Source<'_>,
    mut dst: Target<'_>,
) {
    let powers = firsts::powers_at::<4>(block);
    let first = firsts::encrypt_block(tweak_keys, _mm_set_epi64x(0, tweak.cast_signed()));
    let tweaks = jump(first, powers);
    let len_bytes = src.len().min(dst.len()).min(VECTOR_BYTES);
    if len_bytes == VECTOR_BYTES {
        // SAFETY: the source has 64 bytes.
        let mut data = [unsafe { _mm512_loadu_si512(src.as_ptr().cast()) }];
        cipher::<KEYS, 1, ENCRYPT>(&broadcast(data_keys), &[tweaks], &mut data);
        // SAFETY: the target has 64 bytes.
        unsafe { _mm512_storeu_si512(dst.as_mut_ptr().cast(), data[0]) };
    } else {
        // SAFETY: both have so many bytes.
        unsafe { part_of_line::<KEYS, ENCRYPT>(data_keys, tweaks, src.as_ptr(), dst.as_mut_ptr(), len_bytes) };
    }
}

/// Fewer than four blocks, in a function of its own so that the way of a whole line stays short.
///
/// # Safety
///
/// `len_bytes` are readable at `from` and writable at `to`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx,pclmulqdq")]
#[inline(never)]
unsafe fn part_of_line<const KEYS: usize, const ENCRYPT: bool>(
    data_keys: &[[u8; BLOCK_BYTES]; KEYS],
    tweaks: __m512i,
    from: *const u8,
    to: *mut u8,
    len_bytes: usize,
) {
    // SAFETY: by the contract.
    let mut data = [unsafe { load_blocks(from, len_bytes) }];
    cipher::<KEYS, 1, ENCRYPT>(&broadcast(data_keys), &[tweaks], &mut data);
    // SAFETY: by the contract.
    unsafe { store_blocks(to, len_bytes, data[0]) };
}

/// Fewer than four blocks, each by one load of 16 bytes: that is atomic when it is aligned, and a masked load of more is
/// not promised to be (Intel SDM volume 3, 9.1.1). Spelt out, because the compiler makes a call of `memcpy` by way of the
/// stack of a loop.
///
/// # Safety
///
/// `len_bytes`, 16, 32 or 48, are readable at `from`.
#[target_feature(enable = "avx512f,avx")]
#[inline]
unsafe fn load_blocks(from: *const u8, len_bytes: usize) -> __m512i {
    let block = |index: usize| from.wrapping_add(index * BLOCK_BYTES).cast();
    // SAFETY: by the contract.
    let mut vector = _mm512_zextsi128_si512(unsafe { _mm_loadu_si128(block(0)) });
    if len_bytes > BLOCK_BYTES {
        // SAFETY: by the contract.
        vector = _mm512_inserti32x4::<1>(vector, unsafe { _mm_loadu_si128(block(1)) });
    }
    if len_bytes > 2 * BLOCK_BYTES {
        // SAFETY: by the contract.
        vector = _mm512_inserti32x4::<2>(vector, unsafe { _mm_loadu_si128(block(2)) });
    }
    vector
}

/// Fewer than four blocks, each by one store of 16 bytes: see [`load_blocks`].
///
/// # Safety
///
/// `len_bytes`, 16, 32 or 48, are writable at `to`.
#[target_feature(enable = "avx512f,avx")]
#[inline]
unsafe fn store_blocks(to: *mut u8, len_bytes: usize, vector: __m512i) {
    let block = |index: usize| to.wrapping_add(index * BLOCK_BYTES).cast();
    let (first, second) = (_mm512_castsi512_si128(vector), _mm512_extracti32x4_epi32::<1>(vector));
    let third = _mm512_extracti32x4_epi32::<2>(vector);
    // SAFETY: by the contract.
    unsafe { _mm_storeu_si128(block(0), first) };
    if len_bytes > BLOCK_BYTES {
        // SAFETY: by the contract.
        unsafe { _mm_storeu_si128(block(1), second) };
    }
    if len_bytes > 2 * BLOCK_BYTES {
        // SAFETY: by the contract.
        unsafe { _mm_storeu_si128(block(2), third) };
    }
}

/// The tweaks of four blocks of the unit that begins with `first`, by their powers of alpha: [`firsts::at_block`] in every
/// lane.
#[target_feature(enable = "avx512f,vpclmulqdq")]
#[inline]
fn jump(first: __m128i, powers: [&[[u8; BLOCK_BYTES]; 4]; 2]) -> __m512i {
    let tweak = _mm512_broadcast_i32x4(first);
    let [low, high] = powers.map(|four| {
        // SAFETY: four powers are 64 readable bytes.
        unsafe { _mm512_loadu_si512(four.as_ptr().cast()) }
    });
    let lower =
        _mm512_xor_si512(_mm512_clmulepi64_epi128::<0x00>(tweak, low), _mm512_clmulepi64_epi128::<0x01>(tweak, high));
    let upper =
        _mm512_xor_si512(_mm512_clmulepi64_epi128::<0x10>(tweak, low), _mm512_clmulepi64_epi128::<0x11>(tweak, high));
    let folded = _mm512_clmulepi64_epi128::<0x01>(upper, _mm512_set1_epi64(0x87));
    _mm512_ternarylogic_epi64::<0x96>(lower, _mm512_unpacklo_epi64(_mm512_setzero_si512(), upper), folded)
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

#[target_feature(enable = "avx512f")]
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
    data_keys: &[[u8; BLOCK_BYTES]; KEYS],
    firsts: &[__m128i],
    mut batch: Batch<'_>,
) {
    let keys = broadcast(data_keys);
    let (src, dst) = (batch.src.as_ptr(), batch.dst.as_mut_ptr());
    for (unit, first) in firsts.iter().enumerate() {
        let mut tweaks = spread(*first);
        let mut at = unit * batch.unit_bytes;
        let end = at + batch.unit_bytes;
        while end - at > QUAD_BYTES {
            batch.prefetch(at, QUAD_BYTES);
            // SAFETY: the quad ends before the end of the source.
            let mut data = unsafe { load_quad(src.wrapping_add(at)) };
            let last = whiten(&keys, &tweaks, &mut data);
            tweaks = tweaks.map(|tweak| step(tweak));
            run_rounds::<KEYS, QUAD, ENCRYPT>(&keys, last, &mut data);
            // SAFETY: within the target, as the load was in the source; a batch that streams begins at a line.
            unsafe { store_quad::<STREAM>(dst.wrapping_add(at), &data) };
            at += QUAD_BYTES;
        }
        if end - at == QUAD_BYTES {
            batch.prefetch(at, QUAD_BYTES);
            // SAFETY: the quad ends at the end of the unit in the source.
            let mut data = unsafe { load_quad(src.wrapping_add(at)) };
            cipher::<KEYS, QUAD, ENCRYPT>(&keys, &tweaks, &mut data);
            // SAFETY: as in the loop.
            unsafe { store_quad::<STREAM>(dst.wrapping_add(at), &data) };
            continue;
        }
        for tweak in tweaks {
            if at >= end {
                break;
            }
            let vector_bytes = VECTOR_BYTES.min(end - at);
            let (from, to) = (src.wrapping_add(at), dst.wrapping_add(at));
            if vector_bytes == VECTOR_BYTES {
                // SAFETY: the vector ends before the end of the source.
                let mut data = [unsafe { _mm512_loadu_si512(from.cast()) }];
                cipher::<KEYS, 1, ENCRYPT>(&keys, &[tweak], &mut data);
                // SAFETY: within the target, as the load was in the source.
                unsafe { _mm512_storeu_si512(to.cast(), data[0]) };
            } else {
                // SAFETY: so many bytes are left of the unit in the source and in the target.
                unsafe { part_of_line::<KEYS, ENCRYPT>(data_keys, tweak, from, to, vector_bytes) };
            }
            at += vector_bytes;
        }
    }
}

/// 16 blocks.
///
/// # Safety
///
/// The 256 bytes at `from` are readable.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_quad(from: *const u8) -> [__m512i; QUAD] {
    let mut data = [_mm512_setzero_si512(); QUAD];
    for (i, vector) in data.iter_mut().enumerate() {
        // SAFETY: by the contract.
        *vector = unsafe { _mm512_loadu_si512(from.wrapping_add(i * VECTOR_BYTES).cast()) };
    }
    data
}

/// Stores 16 blocks, around the cache if `STREAM`.
///
/// # Safety
///
/// The 256 bytes at `to` are writable, and begin at a line if `STREAM`.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store_quad<const STREAM: bool>(to: *mut u8, data: &[__m512i; QUAD]) {
    for (i, vector) in data.iter().enumerate() {
        let to = to.wrapping_add(i * VECTOR_BYTES).cast();
        if STREAM {
            // SAFETY: by the contract.
            unsafe { _mm512_stream_si512(to, *vector) };
        } else {
            // SAFETY: by the contract.
            unsafe { _mm512_storeu_si512(to.cast(), *vector) };
        }
    }
}

/// Whitening, all rounds, whitening.
#[target_feature(enable = "avx512f,vaes")]
#[inline]
fn cipher<const KEYS: usize, const N: usize, const ENCRYPT: bool>(
    keys: &[__m512i; KEYS],
    tweaks: &[__m512i; N],
    data: &mut [__m512i; N],
) {
    let last = whiten(keys, tweaks, data);
    run_rounds::<KEYS, N, ENCRYPT>(keys, last, data);
}

/// The first whitening and the first round key; returns last round keys that carry the second whitening.
///
/// A loop that computes its next tweaks between this and [`run_rounds`] is 5 % faster than one that does so elsewhere:
/// the AES units of Zen 5 take other work best in bursts.
#[target_feature(enable = "avx512f")]
#[inline]
fn whiten<const KEYS: usize, const N: usize>(
    keys: &[__m512i; KEYS],
    tweaks: &[__m512i; N],
    data: &mut [__m512i; N],
) -> [__m512i; N] {
    for (vector, tweak) in data.iter_mut().zip(tweaks) {
        *vector = _mm512_ternarylogic_epi64::<0x96>(*vector, *tweak, keys[0]);
    }
    tweaks.map(|tweak| _mm512_xor_si512(tweak, keys[KEYS - 1]))
}

/// Every round after the first key, the last one with keys of its own.
#[target_feature(enable = "avx512f,vaes")]
#[inline]
fn run_rounds<const KEYS: usize, const N: usize, const ENCRYPT: bool>(
    keys: &[__m512i; KEYS],
    last: [__m512i; N],
    data: &mut [__m512i; N],
) {
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
    let lanes = lane_tweaks(first);
    [
        lanes,
        shifted(lanes, _mm512_set1_epi64(4)),
        shifted(lanes, _mm512_set1_epi64(8)),
        shifted(lanes, _mm512_set1_epi64(12)),
    ]
}

/// The tweaks of four blocks, the first of which has `first`.
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
#[inline]
fn lane_tweaks(first: __m128i) -> __m512i {
    shifted(_mm512_broadcast_i32x4(first), _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0))
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

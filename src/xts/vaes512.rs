//! The VAES-512 kernel: four blocks to a register, four registers in flight, tweaks by carry-less multiplication.
//!
//! A unit's tweaks advance together by alpha^16 in one burst between data rounds, which suits CPUs whose AES units
//! share ports with shuffles. First tweaks of up to 32 units are encrypted together. Loads and stores are the only
//! unsafe operations; each is within the `Source` or `Target` whose length the loop counts.
//!
//! Ends of fewer than four blocks are loaded and stored by mask, so nothing outside of the run is touched.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::schedule::{self, RoundKeys};
use super::{BLOCK_BYTES, DataUnit, Direction, tweak};
use crate::memory::{Source, Store, Target};

/// Bytes in a register.
const VECTOR_BYTES: usize = 64;
/// Registers in flight.
const QUAD: usize = 4;
/// Units whose first tweaks are encrypted together.
const BATCH_UNITS: usize = 32;
/// How far ahead the source is prefetched while whole quads are read.
const PREFETCH_BYTES: usize = 12 * 1024;

/// Blocks `first_block..` of the unit whose 128-bit tweak is `tweak`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx")]
pub(super) fn blocks(
    keys: &RoundKeys,
    direction: Direction,
    tweak: u128,
    first_block: usize,
    src: Source<'_>,
    dst: Target<'_>,
    store: Store,
) {
    let first = match keys.key_count() {
        11 => first_tweak::<11>(keys, tweak),
        _ => first_tweak::<15>(keys, tweak),
    };
    let firsts = [tweak::advance(first, first_block)];
    let run = Run { src, dst, unit_bytes: src.len(), ahead_bytes: 0 };
    dispatch(keys, direction, &firsts, run, store);
    fence(store);
}

/// Whole units, the first of which has tweak value `tweak`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx")]
pub(super) fn units(
    keys: &RoundKeys,
    direction: Direction,
    unit: DataUnit,
    tweak: u64,
    src: Source<'_>,
    mut dst: Target<'_>,
    store: Store,
) {
    let unit_bytes = unit.len_bytes();
    let mut firsts = [0; BATCH_UNITS];
    let mut tweak = tweak;
    let mut at = 0;
    while at < src.len() {
        let unit_count = BATCH_UNITS.min((src.len() - at) / unit_bytes);
        let firsts = &mut firsts[..unit_count];
        for first in firsts.iter_mut() {
            *first = u128::from(tweak);
            tweak = tweak.wrapping_add(unit.tweak_step());
        }
        match keys.key_count() {
            11 => first_tweaks::<11>(keys, firsts),
            _ => first_tweaks::<15>(keys, firsts),
        }
        let range = at..at + unit_count * unit_bytes;
        at = range.end;
        let ahead_bytes = src.len() - range.end;
        let part = dst.reborrow().slice(range.clone());
        dispatch(keys, direction, firsts, Run { src: src.slice(range), dst: part, unit_bytes, ahead_bytes }, store);
    }
    fence(store);
}

/// Units of equal size, and how many bytes of source follow them.
struct Run<'a> {
    src: Source<'a>,
    dst: Target<'a>,
    unit_bytes: usize,
    ahead_bytes: usize,
}

/// Makes non-temporal stores visible before anything that follows.
#[target_feature(enable = "avx512f")]
fn fence(store: Store) {
    if store == Store::NonTemporal {
        _mm_sfence();
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx")]
fn dispatch(keys: &RoundKeys, direction: Direction, firsts: &[u128], mut run: Run<'_>, store: Store) {
    let aligned = run.dst.as_mut_ptr().addr().is_multiple_of(VECTOR_BYTES);
    let stream = store == Store::NonTemporal && aligned;
    match (keys.key_count(), direction, stream) {
        (11, Direction::Encrypt, false) => run_units::<11, true, false>(keys.encrypt(), firsts, run),
        (11, Direction::Encrypt, true) => run_units::<11, true, true>(keys.encrypt(), firsts, run),
        (11, Direction::Decrypt, _) => run_units::<11, false, false>(keys.decrypt(), firsts, run),
        (_, Direction::Encrypt, false) => run_units::<15, true, false>(keys.encrypt(), firsts, run),
        (_, Direction::Encrypt, true) => run_units::<15, true, true>(keys.encrypt(), firsts, run),
        (_, Direction::Decrypt, _) => run_units::<15, false, false>(keys.decrypt(), firsts, run),
    }
}

/// E(tweak) of one unit.
#[target_feature(enable = "avx512f,aes,avx")]
fn first_tweak<const KEYS: usize>(keys: &RoundKeys, tweak: u128) -> u128 {
    let keys = keys.tweak::<KEYS>();
    let mut block = _mm_xor_si128(schedule::load(tweak.to_le_bytes()), schedule::load(keys[0]));
    for key in &keys[1..KEYS - 1] {
        block = _mm_aesenc_si128(block, schedule::load(*key));
    }
    u128::from_le_bytes(schedule::store(_mm_aesenclast_si128(block, schedule::load(keys[KEYS - 1]))))
}

/// E(tweak) in place, for up to 32 units.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,vaes,vpclmulqdq,aes,avx")]
fn first_tweaks<const KEYS: usize>(keys: &RoundKeys, tweaks: &mut [u128]) {
    if let [tweak] = tweaks {
        *tweak = first_tweak::<KEYS>(keys, *tweak);
        return;
    }
    let keys = broadcast(keys.tweak::<KEYS>());
    let mut padded = [0_u128; BATCH_UNITS];
    padded[..tweaks.len()].copy_from_slice(tweaks);
    let mut vectors = [_mm512_setzero_si512(); BATCH_UNITS / 4];
    for (vector, four) in vectors.iter_mut().zip(padded.as_chunks::<4>().0) {
        // SAFETY: four tweaks are 64 readable bytes.
        *vector = unsafe { _mm512_loadu_si512(four.as_ptr().cast()) };
        *vector = _mm512_xor_si512(*vector, keys[0]);
    }
    for key in &keys[1..KEYS - 1] {
        for vector in &mut vectors {
            *vector = _mm512_aesenc_epi128(*vector, *key);
        }
    }
    for (vector, four) in vectors.iter().zip(padded.as_chunks_mut::<4>().0) {
        let vector = _mm512_aesenclast_epi128(*vector, keys[KEYS - 1]);
        // SAFETY: four tweaks are 64 writable bytes.
        unsafe { _mm512_storeu_si512(four.as_mut_ptr().cast(), vector) };
    }
    tweaks.copy_from_slice(&padded[..tweaks.len()]);
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
fn run_units<const KEYS: usize, const ENCRYPT: bool, const STREAM: bool>(
    keys: &[[u8; BLOCK_BYTES]; KEYS],
    firsts: &[u128],
    mut run: Run<'_>,
) {
    let keys = broadcast(keys);
    let (src, dst) = (run.src.as_ptr(), run.dst.as_mut_ptr());
    let readable_bytes = run.src.len() + run.ahead_bytes;
    for (unit, first) in firsts.iter().enumerate() {
        let start = unit * run.unit_bytes;
        let mut tweaks = spread(*first);
        let mut at = start;
        let end = start + run.unit_bytes;
        while end - at >= QUAD * VECTOR_BYTES {
            if at + PREFETCH_BYTES + QUAD * VECTOR_BYTES <= readable_bytes {
                for line in 0..QUAD {
                    let ahead = src.wrapping_add(at + PREFETCH_BYTES + line * VECTOR_BYTES);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
            }
            let mut data = [_mm512_setzero_si512(); QUAD];
            for (i, vector) in data.iter_mut().enumerate() {
                let from = src.wrapping_add(at + i * VECTOR_BYTES);
                // SAFETY: the quad ends at or before the end of the source.
                *vector = unsafe { _mm512_loadu_si512(from.cast()) };
            }
            let whitening = tweaks;
            at += QUAD * VECTOR_BYTES;
            if at < end {
                tweaks = tweaks.map(|tweak| step(tweak));
            }
            cipher::<KEYS, QUAD, ENCRYPT>(&keys, &whitening, &mut data);
            for (i, vector) in data.iter().enumerate() {
                let to = dst.wrapping_add(at - (QUAD - i) * VECTOR_BYTES);
                if STREAM {
                    // SAFETY: within the target, as the load was in the source; the target is aligned to 64 bytes.
                    unsafe { _mm512_stream_si512(to.cast(), *vector) };
                } else {
                    // SAFETY: within the target, as the load was in the source.
                    unsafe { _mm512_storeu_si512(to.cast(), *vector) };
                }
            }
        }
        let mut rest = tweaks.iter();
        while at < end {
            let vector_bytes = VECTOR_BYTES.min(end - at);
            let mask = (u16::MAX >> (16 - vector_bytes / 8)).to_le_bytes()[0];
            let tweak = *rest.next().expect("less than a quad is left");
            // SAFETY: the mask covers exactly the bytes left of the unit, which are within the source.
            let mut data = [unsafe { _mm512_maskz_loadu_epi64(mask, src.wrapping_add(at).cast()) }];
            cipher::<KEYS, 1, ENCRYPT>(&keys, &[tweak], &mut data);
            // SAFETY: the same bytes of the target.
            unsafe { _mm512_mask_storeu_epi64(dst.wrapping_add(at).cast(), mask, data[0]) };
            at += vector_bytes;
        }
    }
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
fn spread(first: u128) -> [__m512i; QUAD] {
    let same = _mm512_broadcast_i32x4(schedule::load(first.to_le_bytes()));
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

//! The x86-64 kernels, and what they share: cutting runs into batches of units, prefetch, and stores around the cache.
//!
//! A kernel is a file with two entry points, `blocks` and `units`, which need the CPU features of its backend. All of
//! them take the same [`RoundKeys`], first tweaks from [`firsts`], and a [`Batch`] of memory in which every unit has the
//! same length. They differ in the width of a register only.
//!
//! What is wiped: arrays of encrypted tweaks. What is not: registers, and what the compiler spills of them to the
//! kernel's stack frame (round keys, tweaks, up to 512 bytes of data in flight), which the next call overwrites.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::{DataUnit, Pass};
use crate::memory::{Source, Target};

pub(super) mod aesni;
mod firsts;
mod schedule;
pub(super) mod vaes256;
pub(super) mod vaes512;

use firsts::Firsts;
pub(super) use schedule::RoundKeys;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// How far ahead of the loads the source is prefetched: what hides the latency of memory at more than 30 GB/s.
const PREFETCH_BYTES: usize = 12 * 1024;
/// Runs of this length and more are taken for a part of a sequence: prefetch goes on behind their end, where the next
/// call will read. That wastes at most a fifth of what a run reads.
const SEQUENTIAL_BYTES_MIN: usize = 64 * 1024;

/// Ends a run with non-temporal stores: nothing that follows is visible before them.
pub(super) fn fence() {
    // SAFETY: every x86-64 CPU has SSE.
    unsafe { _mm_sfence() };
}

/// Units of equal length, in memory that follows on.
struct Batch<'a> {
    src: Source<'a>,
    dst: Target<'a>,
    unit_bytes: usize,
    /// How many bytes from the start of `src` are worth a prefetch.
    ahead_bytes: usize,
    /// The addresses that are stored around the cache.
    lines: Range<usize>,
}

impl<'a> Batch<'a> {
    /// All of `pass` as one unit, or the part of a unit.
    fn whole(pass: Pass<'a>) -> Self {
        let len_bytes = pass.src.len();
        Self { src: pass.src, dst: pass.dst, unit_bytes: len_bytes, ahead_bytes: len_bytes, lines: pass.lines }
    }

    /// Prefetches the lines that are loaded some time after those at `at..at + len_bytes`, in this batch or later.
    #[inline]
    fn prefetch(&self, at: usize, len_bytes: usize) {
        if at + PREFETCH_BYTES + len_bytes <= self.ahead_bytes {
            for ahead in (0..len_bytes).step_by(LINE_BYTES) {
                let line = self.src.as_ptr().wrapping_add(at + PREFETCH_BYTES + ahead);
                // SAFETY: a prefetch faults at no address and changes nothing that a program sees.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
            }
        }
    }
}

/// Whole units in batches, with their first tweaks.
struct Batches<'a> {
    pass: Pass<'a>,
    unit: DataUnit,
    tweak: u64,
    at: usize,
    firsts: Firsts,
    /// Whether the run is so long that the bytes behind it are probably next.
    sequential: bool,
}

impl<'a> Batches<'a> {
    fn new(unit: DataUnit, tweak: u64, pass: Pass<'a>) -> Self {
        let sequential = pass.src.len() >= SEQUENTIAL_BYTES_MIN;
        Self { pass, unit, tweak, at: 0, firsts: Firsts::new(), sequential }
    }

    /// The next batch, whose first tweaks are yet to be encrypted.
    fn cut(&mut self) -> Option<(&mut Firsts, Batch<'_>)> {
        let rest_bytes = self.pass.src.len() - self.at;
        if rest_bytes == 0 {
            return None;
        }
        let unit_bytes = self.unit.len_bytes();
        let step = self.unit.tweak_step();
        let unit_count = self.firsts.fill(self.tweak, step, rest_bytes / unit_bytes);
        self.tweak = self.tweak.wrapping_add(step.wrapping_mul(unit_count as u64));
        let range = self.at..self.at + unit_count * unit_bytes;
        self.at = range.end;
        let batch = Batch {
            src: self.pass.src.slice(range.clone()),
            dst: self.pass.dst.reborrow().slice(range),
            unit_bytes,
            ahead_bytes: if self.sequential { rest_bytes + PREFETCH_BYTES } else { rest_bytes },
            lines: self.pass.lines.clone(),
        };
        Some((&mut self.firsts, batch))
    }
}

/// How a group of blocks is stored.
#[derive(Clone, Copy)]
enum Place {
    /// Through the cache.
    Cached,
    /// All of it around the cache, by whole registers: it begins at a line and lies within the lines.
    Lines,
    /// Block by block, as each one lies.
    Ragged,
}

/// Where `len_bytes` bytes at `to` lie, so that a kernel decides once for a whole group.
#[inline]
fn place(to: *const u8, len_bytes: usize, lines: &Range<usize>) -> Place {
    let start = to.addr();
    if lines.is_empty() {
        Place::Cached
    } else if start.is_multiple_of(LINE_BYTES) && lines.start <= start && start + len_bytes <= lines.end {
        Place::Lines
    } else {
        Place::Ragged
    }
}

/// Stores a block: around the cache if it lies in `lines`, which then are the addresses of 16-byte aligned blocks.
///
/// # Safety
///
/// - The 16 bytes at `to` are writable.
/// - `to` is a multiple of 16 unless `lines` is empty.
#[inline]
unsafe fn store_block(to: *mut u8, block: __m128i, lines: &Range<usize>) {
    if lines.contains(&to.addr()) {
        // SAFETY: writable and aligned, by the contract.
        unsafe { _mm_stream_si128(to.cast(), block) };
    } else {
        // SAFETY: writable, by the contract.
        unsafe { _mm_storeu_si128(to.cast(), block) };
    }
}

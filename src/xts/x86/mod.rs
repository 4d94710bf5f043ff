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

use super::{DataUnit, Direction, Pass};
use crate::memory::{Source, Store, Target};

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
    /// Whether groups of blocks are stored around the cache: they all begin at a line.
    streams: bool,
}

impl<'a> Batch<'a> {
    /// All of `pass` as one unit, or the part of a unit.
    fn whole(pass: Pass<'a>) -> Self {
        let len_bytes = pass.src.len();
        let streams = streams(&pass);
        Self { src: pass.src, dst: pass.dst, unit_bytes: len_bytes, ahead_bytes: len_bytes, streams }
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

/// Whether what `pass` stores goes around the cache, which takes a destination of whole lines.
fn streams(pass: &Pass<'_>) -> bool {
    pass.store == Store::NonTemporal && pass.dst.as_source().as_ptr().addr().is_multiple_of(LINE_BYTES)
}

/// Whole units in batches, with their first tweaks.
struct Batches<'a> {
    pass: Pass<'a>,
    unit: DataUnit,
    tweak: u64,
    at: usize,
    firsts: Firsts,
    /// How many bytes from the start of the run are worth a prefetch.
    ahead_bytes: usize,
    streams: bool,
}

impl<'a> Batches<'a> {
    fn new(unit: DataUnit, tweak: u64, pass: Pass<'a>) -> Self {
        let streams = streams(&pass);
        // Plaintext on its way to the cache was most likely just put there by its owner.
        let is_cold = pass.direction == Direction::Decrypt || streams;
        let ahead_bytes = match pass.src.len() {
            _ if !is_cold => 0,
            len_bytes if len_bytes >= SEQUENTIAL_BYTES_MIN => len_bytes + PREFETCH_BYTES,
            len_bytes => len_bytes,
        };
        Self { pass, unit, tweak, at: 0, firsts: Firsts::new(), ahead_bytes, streams }
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
        let ahead_bytes = self.ahead_bytes.saturating_sub(self.at);
        self.at = range.end;
        let batch = Batch {
            src: self.pass.src.slice(range.clone()),
            dst: self.pass.dst.reborrow().slice(range),
            unit_bytes,
            ahead_bytes,
            streams: self.streams,
        };
        Some((&mut self.firsts, batch))
    }
}

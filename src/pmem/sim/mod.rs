//! A simulated medium for crash tests: it records every store, flush and fence, and produces the media after a power cut.
//!
//! A [`Backing`](super::Backing) made by [`Backing::simulated`](super::Backing::simulated) behaves like any other. Its
//! [`SimHandle`] gives the [`Trace`] of what was done so far, and [`Trace::explore`] runs a check over the media that a
//! power cut at any point could leave behind.
//!
//! The model is that of x86 persistent memory as Vinter, Jaaru and Chipmunk use it:
//!
//! - Media are divided into *cells*: the 64-byte cache line at cache-line granularity, the 512-byte sector at page
//!   granularity. A power cut leaves in every cell, independently of all others, some *prefix* of the stores that were
//!   made to it since its last commit, in the order in which they were made.
//! - A store is what one `write` call changed in one *torn unit*, the largest piece that is never torn. At cache-line
//!   granularity that is 16 bytes (what aligned 16-byte stores give), or 64, or 8 to see what goes wrong with less. Stores
//!   of one call are ordered by address. Blocks of 16 bytes that a call did not change were not stored.
//! - Cache line: a flush marks the earlier stores of its lines; a drain commits what the same thread has marked (SFENCE
//!   orders the processor that executes it); a sync is a drain. Page: a
//!   flush (`msync`) commits its pages, a sync commits everything, a drain does nothing.
//! - A longer length is committed by a sync; before it, the power cut leaves the old or the new one.
//! - A punched hole is a store of zero bytes that a flush at cache-line granularity does not commit: it is metadata, which
//!   a sync does. A later store to the same cell that is committed takes the hole with it.
//!
//! Stores of several threads are recorded in one order. What is loaded is not recorded.
//!
//! For tests and tools. Nothing else in the crate makes a simulated backing.

mod explore;
mod mutants;
mod random;
mod replay;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::granularity::Granularity;
use super::mapping::Mapping;
use crate::memory::Target;

pub use explore::{Bounds, CrashImage, Explored, Failure};
pub use mutants::Mutants;
pub use replay::{Barrier, BarrierKind};

/// Bytes whose change is recorded as one store, before torn units are applied: the AES block.
const BLOCK_BYTES: usize = 16;

/// What medium to simulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimOptions {
    granularity: Granularity,
    torn_bytes: u64,
}

impl SimOptions {
    /// A medium whose torn unit is 16 bytes at cache-line granularity and 512 bytes at page granularity.
    #[must_use]
    pub const fn new(granularity: Granularity) -> Self {
        let torn_bytes = match granularity {
            Granularity::CacheLine => BLOCK_BYTES as u64,
            Granularity::Page => 512,
        };
        Self { granularity, torn_bytes }
    }

    /// Changes the torn unit: the largest aligned piece of one `write` call that a power cut never splits.
    ///
    /// # Panics
    ///
    /// Panics unless it is a power of two between 8 bytes and a cell (64 bytes, or 512 at page granularity).
    #[must_use]
    pub fn torn_bytes(mut self, torn_bytes: u64) -> Self {
        let allowed = 8..=self.cell_bytes();
        assert!(torn_bytes.is_power_of_two() && allowed.contains(&torn_bytes), "a torn unit of {torn_bytes} bytes");
        self.torn_bytes = torn_bytes;
        self
    }

    /// The granularity of the medium.
    #[must_use]
    pub const fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes of the pieces of media that lose their stores independently.
    const fn cell_bytes(&self) -> u64 {
        match self.granularity {
            Granularity::CacheLine => super::persist::LINE_BYTES as u64,
            Granularity::Page => 512,
        }
    }
}

/// A thread of this process, by the order in which they first touched a simulated medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Thread(u64);

impl Thread {
    pub(super) fn current() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        thread_local! {
            static OWN: Thread = Thread(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        OWN.with(|own| *own)
    }
}

/// Something that happened to the medium.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// A `write` call changed an aligned block.
    Store {
        call: u64,
        offset: u64,
        bytes: [u8; BLOCK_BYTES],
        punched: bool,
    },
    Flush(Range<u64>, Thread),
    Drain(Thread),
    Sync(Thread),
    /// Whole lines were stored past the cache: a drain commits them.
    Streamed(Range<u64>, Thread),
    /// The backing was made this long.
    Length(u64),
}

/// The recording side of a simulated medium.
#[derive(Debug)]
pub(super) struct Recorder {
    options: SimOptions,
    initial: Arc<Vec<u8>>,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    events: Vec<Event>,
    calls: u64,
}

impl Recorder {
    pub(super) fn record(&self, event: Event) {
        self.log().events.push(event);
    }

    /// Runs `f` on the bytes at `span` and records the blocks that it changed, in ascending order. Stores of other
    /// threads wait meanwhile, so that the order of the log is the order of the stores.
    pub(super) fn record_store<R>(
        &self,
        mapping: &Mapping,
        span: &Range<usize>,
        punched: bool,
        f: impl FnOnce(Target<'_>) -> R,
    ) -> R {
        let mut log = self.log();
        log.calls += 1;
        let call = log.calls;
        let blocks = span.start - span.start % BLOCK_BYTES..span.end.next_multiple_of(BLOCK_BYTES);
        let mut before = vec![0; blocks.len()];
        mapping.source(&blocks).copy_to(&mut before);
        let result = f(mapping.target(span));
        let mut after = vec![0; blocks.len()];
        mapping.source(&blocks).copy_to(&mut after);
        let (before, _) = before.as_chunks::<BLOCK_BYTES>();
        let (after, _) = after.as_chunks::<BLOCK_BYTES>();
        for (index, (old, new)) in before.iter().zip(after).enumerate() {
            if old != new {
                let offset = (blocks.start + index * BLOCK_BYTES) as u64;
                log.events.push(Event::Store { call, offset, bytes: *new, punched });
            }
        }
        result
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The observer of a simulated backing. It stays valid when the backing is gone.
#[derive(Clone, Debug)]
pub struct SimHandle(Arc<Recorder>);

impl SimHandle {
    pub(super) fn new(initial: Vec<u8>, options: SimOptions) -> Self {
        Self(Arc::new(Recorder { options, initial: Arc::new(initial), log: Mutex::default() }))
    }

    pub(super) fn recorder(&self) -> Arc<Recorder> {
        Arc::clone(&self.0)
    }

    /// How many events were recorded so far. What was acknowledged at this position must be on the media after every
    /// power cut at this or a later one ([`CrashImage::position`]).
    #[must_use]
    pub fn position(&self) -> usize {
        self.0.log().events.len()
    }

    /// Everything that was recorded so far.
    #[must_use]
    pub fn trace(&self) -> Trace {
        Trace {
            options: self.0.options,
            initial: Arc::clone(&self.0.initial),
            events: self.0.log().events.clone().into(),
        }
    }
}

/// A recording: the media at the beginning, and what happened since.
#[derive(Clone, Debug)]
pub struct Trace {
    options: SimOptions,
    initial: Arc<Vec<u8>>,
    events: Arc<[Event]>,
}

#[cfg(test)]
mod tests;

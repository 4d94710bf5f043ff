//! A simulated medium for crash tests: it records every store, flush and fence, and produces the media after a power cut.
//!
//! A [`Backing`](super::Backing) made by [`Backing::simulated`](super::Backing::simulated) behaves like any other. Its
//! [`SimHandle`] gives the [`Trace`] of what was done so far, and [`Trace::explore`] runs a check over the media that a
//! power cut at any point could leave behind. [`SimHandle::beside`] adds a second backing to the same recording (a detached
//! header, the file that a namespace is copied to): the power fails for both at once.
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
//!   a sync does, if it makes the system call: a backing does so only for changes that it owes. A later store to the same
//!   cell that is committed takes the hole with it. Whole pages of zero bytes count as holes until somebody has stored there.
//!
//! A process may die while the power stays ([`Trace::restart`]): the next one sees every store, and those that were not
//! committed are still not durable. What the dead process had marked is not marked any more, because nobody fences it. A
//! sync that makes its system call commits what dead processes have stored: the kernel knows the pages that they made dirty
//! on a DAX file. Device-DAX has no such call, and a store that is in a cache when its process dies has nobody who cares.
//!
//! One call may fail ([`SimHandle::fail_call`]). Before a store or a change of blocks nothing has happened then, or (EIO
//! in a store) half of it. After a failed flush or sync the pages are *clean*: their stores stay visible, a power cut keeps
//! or loses them, and no later flush commits them unless something is stored to the page again, be it the same bytes. The
//! backing is poisoned as a real one is.
//!
//! CLWB, SFENCE and non-temporal stores are *events of the interface* here (`flush`, `drain`, `write_streaming`), recorded
//! when the call is made: no such instruction runs, and whether the right ones are issued for a call on a real mapping is
//! not what this shows. Stores themselves are real, made by the code under test through the same kernels, and found by
//! comparing the bytes before and after the call.
//!
//! Stores of several threads are recorded in one order. What is loaded is not recorded.
//!
//! For tests and tools. Nothing else in the crate makes a simulated backing.

mod explore;
mod medium;
mod mutants;
mod proof;
mod random;
mod recorder;
mod replay;
mod sparse;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::granularity::Granularity;
use recorder::Recorder;
use sparse::SparseMedia;

pub(super) use medium::SimMedium;

pub use explore::{Bounds, CrashImage, Explored, Failure};
pub use medium::visible_bytes;
pub use mutants::Mutants;
#[cfg(test)]
pub(crate) use proof::assert_proof;
pub use proof::{Effort, Proof, Story, Told, prove};
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

/// Something that happened to the media. Ranges and offsets count in the address space of the simulation, in which backing
/// number `n` begins at `n << BACKING_SHIFT`.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// A `write` call changed an aligned block.
    Store { call: u64, offset: u64, bytes: [u8; BLOCK_BYTES], punched: bool },
    /// A `write` call may have changed nothing here, but its pages are dirty now. Recorded once a flush has failed.
    Touched(Range<u64>),
    /// A `write` call gave these bytes blocks, or (`true`) a punched hole took them away.
    Blocks(Range<u64>, bool),
    /// A flush of these bytes.
    Flush(Range<u64>, Thread),
    /// A fence.
    Drain(Thread),
    /// A system call that makes everything of one backing durable.
    Sync(usize, Thread),
    /// A flush or sync of these bytes failed.
    Failed(Range<u64>),
    /// Whole lines were stored past the cache: a drain commits them.
    Streamed(Range<u64>, Thread),
    /// A backing was made this long.
    Length(usize, u64),
    /// The process died; with `true`, and the kernel has dropped clean pages since.
    Killed(bool),
}

/// The bits of an address below the number of its backing.
const BACKING_SHIFT: u32 = 48;

/// Where backing number `index` begins in the address space of the simulation.
const fn first_address(index: usize) -> u64 {
    (index as u64) << BACKING_SHIFT
}

/// The number of the backing that an address is in, and the offset there.
fn place_of(address: u64) -> (usize, usize) {
    let index = usize::try_from(address >> BACKING_SHIFT).expect("few backings");
    (index, usize::try_from(address & (first_address(1) - 1)).expect("checked when it was recorded"))
}

/// What a call fails with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The medium cannot take it (EIO).
    Io,
    /// The file system is full (ENOSPC).
    NoSpace,
}

/// What happens to pages that a failed flush left clean when the process has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageCache {
    /// They stay, and the next process sees what was stored.
    Kept,
    /// The kernel drops them, and the next process sees what is on the media: nothing of them.
    Evicted,
}

/// One backing of a recording as it began.
#[derive(Clone, Debug)]
struct Beginning {
    options: SimOptions,
    media: Arc<SparseMedia>,
}

/// The observer of simulated backings. It stays valid when they are gone.
#[derive(Clone, Debug)]
pub struct SimHandle(Arc<Recorder>);

impl SimHandle {
    /// How many events were recorded so far. What was acknowledged at this position must be on the media after every
    /// power cut at this or a later one ([`CrashImage::position`]).
    #[must_use]
    pub fn position(&self) -> usize {
        self.0.log().events.len()
    }

    /// How many calls so far could have failed: stores, flushes and syncs that are system calls, changes of blocks and
    /// length.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.0.log().calls
    }

    /// Lets the call fail before which [`calls`](Self::calls) says `number`.
    pub fn fail_call(&self, number: usize, fault: Fault) {
        self.0.log().fault = Some((number, fault));
    }

    /// Everything that was recorded so far.
    #[must_use]
    pub fn trace(&self) -> Trace {
        let log = self.0.log();
        Trace { beginnings: log.beginnings.clone().into(), events: log.events.clone().into() }
    }
}

/// A recording: the media at the beginning, and what happened since.
#[derive(Clone, Debug)]
pub struct Trace {
    beginnings: Arc<[Beginning]>,
    events: Arc<[Event]>,
}

#[cfg(test)]
mod tests;

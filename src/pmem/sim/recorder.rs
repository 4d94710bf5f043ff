//! The recording side of simulated media: every store in its order, and the one call that is to fail.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::replay::PAGE_BYTES;
use super::sparse::SparseMedia;
use super::{BLOCK_BYTES, Beginning, Event, Fault, SimOptions, Trace, first_address};
use crate::memory::Target;
use crate::pmem::mapping::Mapping;

#[derive(Debug)]
pub(super) struct Recorder(Mutex<Log>);

#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) beginnings: Vec<Beginning>,
    pub(super) events: Vec<Event>,
    /// Calls that could have failed.
    pub(super) calls: usize,
    /// Which of them is to fail, and how.
    pub(super) fault: Option<(usize, Fault)>,
    stores: u64,
    /// Pages that have blocks although they may hold nothing but zeros: somebody has stored there since the beginning.
    stored_pages: HashSet<u64>,
    /// A flush has failed, so that pages may be clean without being durable.
    has_failed: bool,
}

impl Log {
    pub(super) fn push(&mut self, event: Event) {
        self.has_failed |= matches!(event, Event::Failed(_));
        self.events.push(event);
    }

    /// Whether there is a block at this address, whatever it holds.
    pub(super) fn has_block(&self, address: u64) -> bool {
        self.stored_pages.contains(&(address / PAGE_BYTES))
    }

    /// The pages of these addresses have blocks now, or none any more.
    fn count_blocks(&mut self, addresses: Range<u64>, punched: bool) {
        if punched {
            let whole = addresses.start.div_ceil(PAGE_BYTES)..addresses.end / PAGE_BYTES;
            self.stored_pages.retain(|page| !whole.contains(page));
        } else {
            self.stored_pages.extend(addresses.start / PAGE_BYTES..addresses.end.div_ceil(PAGE_BYTES));
        }
    }

    /// Counts a call that can fail; how it does, if it is its turn.
    pub(super) fn next_call(&mut self) -> Option<Fault> {
        let number = self.calls;
        self.calls += 1;
        self.fault.filter(|(wanted, _)| *wanted == number).map(|(_, fault)| fault)
    }
}

impl Recorder {
    pub(super) fn new() -> Self {
        Self(Mutex::default())
    }

    /// A recording that goes on after `events`.
    pub(super) fn after(trace: &Trace, events: &[Event]) -> Self {
        let has_failed = events.iter().any(|event| matches!(event, Event::Failed(_)));
        let stores = events.len() as u64; // more than there were calls
        let (beginnings, events) = (trace.beginnings.to_vec(), events.to_vec());
        let mut log = Log { beginnings, stores, has_failed, ..Log::default() };
        for event in &events {
            if let Event::Blocks(addresses, punched) = event {
                log.count_blocks(addresses.clone(), *punched);
            }
        }
        Self(Mutex::new(Log { events, ..log }))
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn record(&self, event: Event) {
        self.log().push(event);
    }

    /// Adds a backing to the recording; its number.
    pub(super) fn add(&self, options: SimOptions, media: Arc<SparseMedia>) -> usize {
        let mut log = self.log();
        log.beginnings.push(Beginning { options, media });
        log.beginnings.len() - 1
    }

    /// Runs `f` on the bytes at `span` and records the blocks that it changed, in ascending order. Stores of other
    /// threads wait meanwhile, so that the order of the log is the order of the stores. The fault that the call is to fail
    /// with, if it is: EIO has stored the first half, ENOSPC has stored nothing and `f` did not run.
    pub(super) fn record_store<R>(
        &self,
        index: usize,
        mapping: &Mapping,
        span: &Range<usize>,
        punched: bool,
        f: impl FnOnce(Target<'_>) -> R,
    ) -> Result<R, Fault> {
        let mut log = self.log();
        let fault = log.next_call();
        if let Some(fault) = fault.filter(|fault| punched || *fault == Fault::NoSpace) {
            return Err(fault);
        }
        log.stores += 1;
        let call = log.stores;
        let blocks = span.start - span.start % BLOCK_BYTES..span.end.next_multiple_of(BLOCK_BYTES);
        let mut before = vec![0; blocks.len()];
        mapping.source(&blocks).copy_to(&mut before);
        let result = f(mapping.target(span));
        let mut after = vec![0; blocks.len()];
        mapping.source(&blocks).copy_to(&mut after);
        let first = first_address(index);
        let stored = first + span.start as u64..first + span.end as u64;
        log.count_blocks(stored.clone(), punched);
        log.push(Event::Blocks(stored, punched));
        if log.has_failed {
            log.push(Event::Touched(first + span.start as u64..first + span.end as u64));
        }
        let (old, _) = before.as_chunks::<BLOCK_BYTES>();
        let (new, _) = after.as_chunks::<BLOCK_BYTES>();
        let mut changed: Vec<_> = (0..new.len()).filter(|&block| old[block] != new[block]).collect();
        if fault.is_some() {
            changed.truncate(changed.len() / 2);
            let kept = changed.last().map_or(0, |last| (last + 1) * BLOCK_BYTES);
            mapping.target(&(blocks.start + kept..blocks.end)).copy_from(&before[kept..]);
        }
        for block in changed {
            let offset = first + (blocks.start + block * BLOCK_BYTES) as u64;
            log.push(Event::Store { call, offset, bytes: new[block], punched });
        }
        fault.map_or(Ok(result), Err)
    }
}

//! Who uses which bytes of a backing that is open once and shared in one process.
//!
//! The lock on a file keeps other openings out, of this process too. It cannot keep two users of one opening apart: two
//! decrypted views of the same bytes would each keep plaintext, holds and keys of their own, and write over each other.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backing::Backing;

/// The ranges that are in use.
#[derive(Debug, Default)]
pub(super) struct Users {
    ranges: Mutex<Vec<Range<u64>>>,
}

impl Users {
    fn ranges(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range that is in use, until this is dropped.
#[derive(Debug)]
pub(crate) struct RangeUse {
    backing: Arc<Backing>,
    range: Range<u64>,
}

impl RangeUse {
    /// Takes `range`; `None` when a part of it is in use.
    pub(crate) fn take(backing: &Arc<Backing>, range: Range<u64>) -> Option<Self> {
        let mut ranges = backing.users().ranges();
        if ranges.iter().any(|other| other.start.max(range.start) < other.end.min(range.end)) {
            return None;
        }
        ranges.push(range.clone());
        drop(ranges);
        Some(Self { backing: Arc::clone(backing), range })
    }
}

impl Drop for RangeUse {
    fn drop(&mut self) {
        if !self.backing.owner().is_here() {
            return; // a child, whose copy of the list may be held by nobody that lets go of it
        }
        let mut ranges = self.backing.users().ranges();
        if let Some(index) = ranges.iter().position(|range| *range == self.range) {
            ranges.swap_remove(index);
        }
    }
}

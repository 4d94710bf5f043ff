//! Which buffers lie in direct maps: nobody may touch such a buffer while it holds a range.
//!
//! Touching a page of a map may fault, and the fault waits for a range of that map's volume. Two threads that each held a range
//! of one volume and touched a map of the other would wait for each other for ever. So the maps of the whole process are
//! listed here, and bytes from or to a buffer that lies in one go through a piece of memory of their own.
//!
//! Most buffers lie on a heap or a stack, and two loads tell that they are in no map.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::owner::{Owner, PerProcess};

/// Ends of maps by their starts. A child has none, and perhaps a copy of the lock that nobody lets go of.
static MAPS: PerProcess<RwLock<BTreeMap<usize, usize>>> = PerProcess::new();

/// No map lies below. A child that has not listed a map has the bounds of its parent, between which it finds nothing.
static LOWEST: AtomicUsize = AtomicUsize::new(usize::MAX);

/// No map lies at or above.
static HIGHEST: AtomicUsize = AtomicUsize::new(0);

/// A map that is listed, until this is dropped.
#[derive(Debug)]
pub(super) struct ListedMap {
    start: usize,
    owner: Owner,
}

impl ListedMap {
    /// Lists `len_bytes` bytes at `start`. Whoever has a buffer there has it after this.
    pub(super) fn new(start: *const u8, len_bytes: usize) -> Self {
        let start = start.addr();
        change(|maps| {
            maps.insert(start, start + len_bytes);
        });
        Self { start, owner: Owner::here() }
    }
}

impl Drop for ListedMap {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            return; // a child, whose copy of the list may be held by nobody that lets go of it
        }
        change(|maps| {
            maps.remove(&self.start);
        });
    }
}

fn change(change: impl FnOnce(&mut BTreeMap<usize, usize>)) {
    let mut maps = MAPS.here().write().unwrap_or_else(PoisonError::into_inner);
    change(&mut maps);
    // They never overlap, so the last one ends last.
    LOWEST.store(maps.first_key_value().map_or(usize::MAX, |(&start, _)| start), Ordering::Release);
    HIGHEST.store(maps.last_key_value().map_or(0, |(_, &end)| end), Ordering::Release);
}

/// Whether a byte of `buffer` lies in a map.
#[inline]
pub(super) fn in_a_map(buffer: &[u8]) -> bool {
    let start = buffer.as_ptr().addr();
    let end = start + buffer.len();
    end > LOWEST.load(Ordering::Acquire) && start < HIGHEST.load(Ordering::Acquire) && look_up(start, end)
}

#[cold]
fn look_up(start: usize, end: usize) -> bool {
    let maps = MAPS.here().read().unwrap_or_else(PoisonError::into_inner);
    maps.range(..end).next_back().is_some_and(|(_, &map_end)| map_end > start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_overlap_with_a_listed_map_counts() {
        let bytes = vec![0; 100];
        assert!(!in_a_map(&bytes));
        let listed = ListedMap::new(bytes[30..].as_ptr(), 20);
        let other = ListedMap::new(bytes[60..].as_ptr(), 10);
        for (range, expected) in [
            (0..30, false),
            (0..31, true),
            (40..45, true),
            (49..60, true),
            (50..60, false),
            (69..100, true),
            (70..100, false),
        ] {
            assert_eq!(in_a_map(&bytes[range.clone()]), expected, "{range:?}");
        }
        drop(listed);
        assert!(!in_a_map(&bytes[..60]) && in_a_map(&bytes));
        drop(other);
        assert!(!in_a_map(&bytes));
    }
}

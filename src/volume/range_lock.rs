//! A fair lock over byte ranges: any number of disjoint or shared ranges at once, exclusive where they overlap.
//!
//! Invariant: requests that conflict (overlap, and at least one is exclusive) are granted in the order in which they
//! were made, so nobody starves. The lock orders threads of this process; other processes are kept out by the lock on
//! the backing (`pmem`). It guards no data of its own: what a range stands for is the caller's business.
//!
//! The table is a short list under one mutex: it holds an entry per thread that is inside or waiting, and a lock and
//! unlock without conflict cost two uncontended mutex operations.

use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Shared,
    Exclusive,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    range: Range<u64>,
    mode: Mode,
}

impl Entry {
    fn conflicts_with(&self, other: &Self) -> bool {
        let start = self.range.start.max(other.range.start);
        let overlap = start < self.range.end.min(other.range.end);
        overlap && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
    }
}

#[derive(Debug, Default)]
struct Table {
    /// Holders and waiters in the order of their tickets.
    entries: Vec<Entry>,
    next_ticket: u64,
    waiters: usize,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct RangeLock {
    table: Mutex<Table>,
    released: Condvar,
}

/// A granted range; given back when dropped.
#[derive(Debug)]
#[must_use = "the range is free again as soon as the guard is dropped"]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl RangeLock {
    /// Waits until no exclusive holder overlaps `range`. An empty range conflicts with nothing.
    pub(crate) fn shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, Mode::Shared)
    }

    /// Waits until no holder overlaps `range`.
    pub(crate) fn exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, Mode::Exclusive)
    }

    fn acquire(&self, range: Range<u64>, mode: Mode) -> RangeGuard<'_> {
        let mut table = self.table();
        let ticket = table.next_ticket;
        table.next_ticket += 1;
        table.entries.push(Entry { ticket, range, mode });
        while table.must_wait(ticket) {
            table.waiters += 1;
            table = self.released.wait(table).unwrap_or_else(PoisonError::into_inner);
            table.waiters -= 1;
        }
        RangeGuard { lock: self, ticket }
    }

    /// The table is consistent between any two statements that can panic, so a poisoned mutex is still good.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn must_wait(&self, ticket: u64) -> bool {
        let own = self.entries.iter().position(|entry| entry.ticket == ticket).expect("a waiter keeps its entry");
        self.entries[..own].iter().any(|earlier| earlier.conflicts_with(&self.entries[own]))
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut table = self.lock.table();
        let own = table.entries.iter().position(|entry| entry.ticket == self.ticket);
        table.entries.remove(own.expect("a holder keeps its entry"));
        if table.waiters > 0 {
            self.lock.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Whether `acquire` is granted while `held` is kept.
    fn granted(held: Mode, held_range: Range<u64>, mode: Mode, range: Range<u64>) -> bool {
        let lock = Arc::new(RangeLock::default());
        let guard = lock.acquire(held_range, held);
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = {
            let lock = Arc::clone(&lock);
            thread::spawn(move || {
                let _guard = lock.acquire(range, mode);
                sender.send(()).unwrap();
            })
        };
        let granted = receiver.recv_timeout(Duration::from_millis(50)).is_ok();
        drop(guard);
        other.join().unwrap();
        granted
    }

    #[test]
    fn only_overlap_with_an_exclusive_side_conflicts() {
        use Mode::{Exclusive, Shared};
        assert!(granted(Shared, 0..10, Shared, 5..15));
        assert!(!granted(Exclusive, 0..10, Shared, 5..15));
        assert!(!granted(Shared, 0..10, Exclusive, 5..15));
        assert!(!granted(Exclusive, 0..10, Exclusive, 9..10));
        assert!(granted(Exclusive, 0..10, Exclusive, 10..20));
        assert!(granted(Exclusive, 10..20, Exclusive, 0..10));
        assert!(granted(Exclusive, 0..10, Exclusive, 5..5));
    }

    #[test]
    fn a_waiting_writer_is_not_overtaken_by_later_readers() {
        let lock = Arc::new(RangeLock::default());
        let first_reader = lock.shared(0..10);
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut threads = Vec::new();
        for (name, mode) in [("writer", Mode::Exclusive), ("reader", Mode::Shared)] {
            let before = lock.table().entries.len();
            let (lock, order) = (Arc::clone(&lock), Arc::clone(&order));
            let for_thread = Arc::clone(&lock);
            threads.push(thread::spawn(move || {
                let _guard = for_thread.acquire(0..10, mode);
                order.lock().unwrap().push(name);
            }));
            while lock.table().entries.len() == before {
                thread::yield_now();
            }
        }
        drop(first_reader);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["writer", "reader"]);
    }

    #[test]
    fn exclusive_sections_never_overlap() {
        let lock = RangeLock::default();
        let counter = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (lock, counter) = (&lock, &counter);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let start = (thread + round) % 3;
                        let _guard = lock.exclusive(start..start + 4);
                        let seen = counter.load(Ordering::Relaxed);
                        counter.store(seen + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(counter.into_inner(), 8000);
        assert!(lock.table().entries.is_empty());
    }
}

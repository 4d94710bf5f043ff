//! A fair lock over byte ranges: any number of disjoint or shared ranges at once, exclusive where they overlap.
//!
//! Invariant: requests that conflict (overlap, and at least one is exclusive) are granted in the order in which they
//! were made, so nobody starves. The lock orders threads of this process; other processes are kept out by the lock on
//! the backing (`pmem`). It guards no data of its own: what a range stands for is the caller's business.
//!
//! The table is small and under one mutex. A range is given back without the mutex, by one store to a flag that the next
//! request finds: after `persist` has waited for its cache line, everything that waits for stores once more costs a tenth of
//! it. So whoever must wait says so first and then looks at the flags again, with the heavy half of a barrier between, while
//! everybody who gives a range back looks for waiters with the light half: either the flag is seen or the waiter is.

use std::collections::VecDeque;
use std::ops::Range;

use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError, barrier};

/// How many ranges are held at once; more wait. One for each bit of a word.
const SLOTS: usize = u64::BITS as usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Shared,
    Exclusive,
    /// Exclusive over everything, empty ranges too.
    Alone,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    start: u64,
    end: u64,
    mode: Mode,
}

impl Request {
    fn conflicts_with(&self, other: &Self) -> bool {
        let overlap = self.start.max(other.start) < self.end.min(other.end);
        let either = |mode| self.mode == mode || other.mode == mode;
        either(Mode::Alone) || (overlap && either(Mode::Exclusive))
    }
}

#[derive(Debug)]
struct Table {
    /// By slot.
    granted: [Request; SLOTS],
    /// The slots that are in use, as bits; the holders of some may have ended.
    slots: u64,
    /// In the order in which they came, with their tickets.
    waiting: VecDeque<(u64, Request)>,
    next_ticket: u64,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct RangeLock {
    table: Mutex<Table>,
    released: Condvar,
    /// How many wait. Changes under the mutex, so that a waiter who was seen can be woken.
    waiters: AtomicUsize,
    /// By slot: whether its holder has ended.
    ended: [AtomicBool; SLOTS],
}

/// A granted range; given back when dropped.
#[derive(Debug)]
#[must_use = "the range is free again as soon as the guard is dropped"]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    slot: usize,
}

impl Default for RangeLock {
    fn default() -> Self {
        barrier::prepare();
        let nothing = Request { start: 0, end: 0, mode: Mode::Shared };
        let table = Table { granted: [nothing; SLOTS], slots: 0, waiting: VecDeque::new(), next_ticket: 0 };
        Self {
            table: Mutex::new(table),
            released: Condvar::default(),
            waiters: AtomicUsize::new(0),
            ended: std::array::from_fn(|_| AtomicBool::new(false)),
        }
    }
}

impl RangeLock {
    /// Waits until no exclusive holder overlaps `range`. An empty range conflicts with [`Self::alone`] only.
    pub(crate) fn shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range.start, range.end, Mode::Shared)
    }

    /// Waits until no holder overlaps `range`.
    pub(crate) fn exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range.start, range.end, Mode::Exclusive)
    }

    /// Waits until there is no holder at all.
    pub(crate) fn alone(&self) -> RangeGuard<'_> {
        self.acquire(0, u64::MAX, Mode::Alone)
    }

    /// The arguments come in registers: a structure in memory would have to get there before the request could be noted.
    fn acquire(&self, start: u64, end: u64, mode: Mode) -> RangeGuard<'_> {
        let request = Request { start, end, mode };
        let mut table = self.table();
        let in_line = table.waiting.len();
        match self.grant(&mut table, &request, in_line) {
            Some(slot) => RangeGuard { lock: self, slot },
            None => self.wait(table, request),
        }
    }

    #[cold]
    fn wait(&self, mut table: MutexGuard<'_, Table>, request: Request) -> RangeGuard<'_> {
        let ticket = table.next_ticket;
        table.next_ticket += 1;
        table.waiting.push_back((ticket, request));
        self.waiters.store(table.waiting.len(), Ordering::SeqCst);
        barrier::heavy();
        loop {
            let own = table.waiting.iter().position(|(each, _)| *each == ticket).expect("a waiter keeps its place");
            if let Some(slot) = self.grant(&mut table, &request, own) {
                table.waiting.remove(own);
                self.waiters.store(table.waiting.len(), Ordering::SeqCst);
                return RangeGuard { lock: self, slot };
            }
            table = self.released.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives `request` a slot, if no holder and none of the first `in_line` waiters is in its way.
    #[inline(always)]
    fn grant(&self, table: &mut Table, request: &Request, in_line: usize) -> Option<usize> {
        let mut rest = table.slots;
        while rest != 0 {
            let slot = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if self.ended[slot].load(Ordering::Acquire) {
                table.slots &= !(1 << slot);
            } else if table.granted[slot].conflicts_with(request) {
                return None;
            }
        }
        let slot = table.slots.trailing_ones() as usize;
        let in_its_way = |(_, earlier): &(u64, Request)| earlier.conflicts_with(request);
        if slot == SLOTS || (in_line > 0 && table.waiting.iter().take(in_line).any(in_its_way)) {
            return None;
        }
        table.slots |= 1 << slot;
        table.granted[slot] = *request;
        self.ended[slot].store(false, Ordering::Relaxed); // the mutex orders it, and nobody else has the slot
        Some(slot)
    }

    /// A waiter that does not sleep yet has looked at the flags before, so its mutex is waited for.
    #[cold]
    fn wake(&self) {
        drop(self.table());
        self.released.notify_all();
    }

    /// The table is consistent between any two statements that can panic, so a poisoned mutex is still good.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.lock.ended[self.slot].store(true, Ordering::Release);
        barrier::light();
        if self.lock.waiters.load(Ordering::Relaxed) > 0 {
            self.lock.wake();
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
        let guard = lock.acquire(held_range.start, held_range.end, held);
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = {
            let lock = Arc::clone(&lock);
            thread::spawn(move || {
                let _guard = lock.acquire(range.start, range.end, mode);
                sender.send(()).unwrap();
            })
        };
        let granted = loop {
            match receiver.recv_timeout(Duration::from_millis(1)) {
                Ok(()) => break true,
                Err(_) if !lock.table().waiting.is_empty() => break false,
                Err(_) => {}
            }
        };
        drop(guard);
        other.join().unwrap();
        granted
    }

    #[test]
    fn only_overlap_with_an_exclusive_side_conflicts() {
        use Mode::{Alone, Exclusive, Shared};
        assert!(granted(Shared, 0..10, Shared, 5..15));
        assert!(!granted(Exclusive, 0..10, Shared, 5..15));
        assert!(!granted(Shared, 0..10, Exclusive, 5..15));
        assert!(!granted(Exclusive, 0..10, Exclusive, 9..10));
        assert!(granted(Exclusive, 0..10, Exclusive, 10..20));
        assert!(granted(Exclusive, 10..20, Exclusive, 0..10));
        assert!(granted(Exclusive, 0..10, Exclusive, 5..5));
        assert!(!granted(Shared, 5..5, Alone, 0..0));
        assert!(!granted(Alone, 0..0, Shared, 5..5));
    }

    #[test]
    fn a_waiting_writer_is_not_overtaken_by_later_readers() {
        let lock = Arc::new(RangeLock::default());
        let first_reader = lock.shared(0..10);
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut threads = Vec::new();
        for (name, mode) in [("writer", Mode::Exclusive), ("reader", Mode::Shared)] {
            let before = lock.table().waiting.len();
            let (lock, order) = (Arc::clone(&lock), Arc::clone(&order));
            let for_thread = Arc::clone(&lock);
            threads.push(thread::spawn(move || {
                let _guard = for_thread.acquire(0, 10, mode);
                order.lock().unwrap().push(name);
            }));
            while lock.table().waiting.len() == before {
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
        drop(lock.shared(0..1));
        let table = lock.table();
        assert_eq!((table.slots, table.waiting.len()), (1, 0), "every request forgets those that have ended");
    }
}

//! A value that whoever holds a range of it may read, and whoever holds all of it may change.
//!
//! The ranges have no meaning here: they order those who hold them among each other ([`RangeLock`]). Holding one costs what
//! the range lock costs, and no second lock for the value.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};

use super::range_lock::{ForAll, RangeGuard, RangeLock};

/// See the module's head.
pub(super) struct RangeLocked<T> {
    lock: RangeLock,
    value: UnsafeCell<T>,
}

// SAFETY: holders of ranges share the value, so it must be `Sync`; who holds everything may take it out, so `Send`.
unsafe impl<T: Send + Sync> Sync for RangeLocked<T> {}

/// A range that is held, shared or exclusively: the value does not change meanwhile.
#[derive(Debug)]
pub(super) struct Held<'a, T> {
    locked: &'a RangeLocked<T>,
    _range: RangeGuard<'a>,
}

/// Everything is held.
#[derive(Debug)]
pub(super) struct HeldAlone<'a, T> {
    locked: &'a RangeLocked<T>,
    _everything: RangeGuard<'a>,
}

impl<T> RangeLocked<T> {
    pub(super) fn new(value: T) -> Self {
        Self { lock: RangeLock::default(), value: UnsafeCell::new(value) }
    }

    /// Waits until nobody holds any of `range` exclusively.
    pub(super) fn shared(&self, range: Range<u64>) -> Held<'_, T> {
        Held { locked: self, _range: self.lock.shared(range) }
    }

    /// Waits until nobody else holds any of `range`.
    pub(super) fn exclusive(&self, range: Range<u64>) -> Held<'_, T> {
        Held { locked: self, _range: self.lock.exclusive(range) }
    }

    /// [`Self::exclusive`], if it can be had at once; in a handler of signals too.
    pub(super) fn try_exclusive(&self, range: Range<u64>) -> Option<Held<'_, T>> {
        Some(Held { locked: self, _range: self.lock.try_exclusive(range)? })
    }

    /// See [`RangeLock::is_entered_here`].
    pub(super) fn is_entered_here(&self) -> bool {
        self.lock.is_entered_here()
    }

    /// [`Self::exclusive`] for work that somebody else may do meanwhile: see [`RangeLock::exclusive_unless_served`].
    #[inline]
    pub(super) fn exclusive_unless_served(&self, range: Range<u64>) -> Option<(Held<'_, T>, ForAll<'_>)> {
        let (guard, for_all) = self.lock.exclusive_unless_served(range)?;
        Some((Held { locked: self, _range: guard }, for_all))
    }

    /// Waits until nobody holds anything.
    pub(super) fn alone(&self) -> HeldAlone<'_, T> {
        HeldAlone { locked: self, _everything: self.lock.alone() }
    }
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the value is changed only through `HeldAlone`, which does not exist while any range is held.
        unsafe { &*self.locked.value.get() }
    }
}

impl<T> Deref for HeldAlone<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: nobody else holds anything.
        unsafe { &*self.locked.value.get() }
    }
}

impl<T> DerefMut for HeldAlone<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: nobody else holds anything, and `self` is borrowed alone.
        unsafe { &mut *self.locked.value.get() }
    }
}

impl<T> fmt::Debug for RangeLocked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeLocked").field("lock", &self.lock).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn the_value_changes_under_nobody() {
        let locked = RangeLocked::new((0_u64, 0_u64));
        thread::scope(|scope| {
            for thread in 0..3_u64 {
                let locked = &locked;
                scope.spawn(move || {
                    for round in 0..1000 {
                        let start = (thread + round) % 3;
                        let held = locked.shared(start..start + round % 2); // every other one is empty
                        assert_eq!(held.0, held.1);
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..1000 {
                    let mut held = locked.alone();
                    held.0 += 1;
                    held.1 += 1;
                }
            });
        });
        assert_eq!(*locked.exclusive(0..1), (1000, 1000));
    }
}

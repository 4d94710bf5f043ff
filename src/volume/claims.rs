//! Which parts of a volume are mapped, and how: shared maps may overlap each other, an exclusive one overlaps nothing.
//!
//! A claim is entered before the map exists and goes after it. Writers that are no map ask [`Claims::refuses`] while they
//! hold their range in the volume's range lock; whoever enters an exclusive claim waits for the holders of its range
//! once, and so knows that every later writer sees the claim. This file only keeps the list.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::window::Window;
use super::{Volume, VolumeError};

#[derive(Debug)]
struct Claim {
    ticket: u64,
    range: Range<u64>,
    /// The plaintext of an exclusive map.
    exclusive: Option<Arc<Window>>,
}

#[derive(Debug, Default)]
struct List {
    claims: Vec<Claim>,
    next_ticket: u64,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Claims {
    list: Mutex<List>,
    exclusive_count: AtomicUsize,
}

impl Claims {
    /// Enters a claim and gives its ticket; `None` when it would overlap one that it must not.
    pub(super) fn enter(&self, range: &Range<u64>, exclusive: Option<Arc<Window>>) -> Option<u64> {
        let mut list = self.list();
        let conflicts =
            |claim: &Claim| (exclusive.is_some() || claim.exclusive.is_some()) && overlap(&claim.range, range);
        if list.claims.iter().any(conflicts) {
            return None;
        }
        if exclusive.is_some() {
            self.exclusive_count.fetch_add(1, Ordering::SeqCst);
        }
        let ticket = list.next_ticket;
        list.next_ticket += 1;
        list.claims.push(Claim { ticket, range: range.clone(), exclusive });
        Some(ticket)
    }

    pub(super) fn leave(&self, ticket: u64) {
        let mut list = self.list();
        let Some(index) = list.claims.iter().position(|claim| claim.ticket == ticket) else { return };
        if list.claims.swap_remove(index).exclusive.is_some() {
            self.exclusive_count.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Whether `range` has a byte that only the holder of an exclusive map may write.
    pub(super) fn refuses(&self, range: &Range<u64>) -> bool {
        self.exclusive_count.load(Ordering::SeqCst) > 0
            && self.list().claims.iter().any(|claim| claim.exclusive.is_some() && overlap(&claim.range, range))
    }

    /// The windows of the exclusive maps.
    pub(super) fn windows(&self) -> Vec<Arc<Window>> {
        self.list().claims.iter().filter_map(|claim| claim.exclusive.clone()).collect()
    }

    /// How many maps there are.
    pub(super) fn count(&self) -> usize {
        self.list().claims.len()
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An entered claim, which ends when this is dropped.
#[derive(Debug)]
pub(crate) struct ClaimGuard {
    volume: Arc<Volume>,
    ticket: u64,
}

impl ClaimGuard {
    /// Claims whole pages for a shared map or, with a window of its own, for an exclusive one.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Claimed`] when other maps are in the way.
    pub(crate) fn enter(
        volume: &Arc<Volume>,
        range: &Range<u64>,
        exclusive: Option<Arc<Window>>,
    ) -> Result<Self, VolumeError> {
        let is_exclusive = exclusive.is_some();
        let claimed = VolumeError::Claimed { start: range.start, end: range.end };
        let ticket = volume.claims.enter(range, exclusive).ok_or(claimed)?;
        if is_exclusive {
            // Writers that did not see the claim are done after this.
            drop(volume.area.exclusive(range.clone()));
        }
        Ok(Self { volume: Arc::clone(volume), ticket })
    }
}

impl Drop for ClaimGuard {
    fn drop(&mut self) {
        if !self.volume.is_here() {
            return; // a child has no maps, and perhaps a lock of the list that nobody lets go of
        }
        self.volume.claims.leave(self.ticket);
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

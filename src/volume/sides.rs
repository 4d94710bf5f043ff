//! The sides of a data area: one, and two while it is being re-keyed, with a boundary between them that moves window by
//! window.
//!
//! Whoever asks holds the range that it asks about, so that the boundary does not pass through it meanwhile.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::VolumeError;
use super::side::{Side, zero_holes};
use crate::memory::{Source, Target};
use crate::pmem::MediaError;

#[derive(Debug)]
pub(super) struct Sides {
    pub(super) current: Side,
    pub(super) former: Option<Former>,
}

/// The side that data is leaving.
#[derive(Debug)]
pub(super) struct Former {
    pub(super) side: Side,
    /// Whether the last byte moved first.
    backward: bool,
    moved: Mutex<Moved>,
}

#[derive(Debug)]
struct Moved {
    done_bytes: u64,
    blocked: Option<Blocked>,
}

/// A window of which nobody knows what is old and what is new on media.
#[derive(Debug)]
struct Blocked {
    window: Range<u64>,
    /// Its ciphertext on the former side, where that is known and nobody can move the window: it can be read then.
    saved: Option<Arc<[u8]>>,
}

/// A part of a range that is in a blocked window.
pub(super) struct Saved<'a> {
    former: &'a Side,
    pub(super) part: Range<u64>,
    ciphertext: Arc<[u8]>,
    /// Where the part begins in the ciphertext.
    skip: usize,
}

/// A part of a range, and the side that it is on.
pub(super) type Part<'a> = (&'a Side, Range<u64>);

impl Former {
    pub(super) const fn new(side: Side, backward: bool, done_bytes: u64) -> Self {
        Self { side, backward, moved: Mutex::new(Moved { done_bytes, blocked: None }) }
    }

    /// Fails every access to `window` from now on, until the boundary has passed it; reads only where its ciphertext was
    /// not `saved`.
    pub(super) fn block(&self, window: Range<u64>, saved: Option<Vec<u8>>) {
        self.moved().blocked = Some(Blocked { window, saved: saved.map(Arc::from) });
    }

    /// Moves the boundary. Whoever calls it holds what is between the old and the new one.
    pub(super) fn advance(&self, done_bytes: u64) {
        *self.moved() = Moved { done_bytes, blocked: None };
    }

    fn moved(&self) -> MutexGuard<'_, Moved> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sides {
    /// Cuts `range` at the boundary.
    ///
    /// # Errors
    ///
    /// [`MediaError::Poisoned`] when a part of it is in a blocked window.
    #[inline]
    pub(super) fn parts(&self, range: Range<u64>, size_bytes: u64) -> Result<[Option<Part<'_>>; 2], VolumeError> {
        match &self.former {
            None => Ok([Some((&self.current, range)), None]),
            Some(former) => self.cut(former, range, size_bytes),
        }
    }

    fn cut<'a>(
        &'a self,
        former: &'a Former,
        range: Range<u64>,
        size_bytes: u64,
    ) -> Result<[Option<Part<'a>>; 2], VolumeError> {
        if range.is_empty() {
            return Ok([None, None]); // not even where nothing can be accessed
        }
        let moved = former.moved();
        let blocked = moved.blocked.as_ref().map(|blocked| &blocked.window);
        if blocked.is_some_and(|blocked| range.start < blocked.end && blocked.start < range.end) {
            return Err(MediaError::Poisoned.into());
        }
        let boundary = if former.backward { size_bytes - moved.done_bytes } else { moved.done_bytes };
        let boundary = boundary.clamp(range.start, range.end);
        let (low, high) = if former.backward { (&former.side, &self.current) } else { (&self.current, &former.side) };
        let part = |side, range: Range<u64>| (!range.is_empty()).then_some((side, range));
        Ok([part(low, range.start..boundary), part(high, boundary..range.end)])
    }

    /// What of `range` can be read from the saved ciphertext of a blocked window only.
    pub(super) fn saved(&self, range: &Range<u64>) -> Option<Saved<'_>> {
        let former = self.former.as_ref()?;
        let moved = former.moved();
        let Blocked { window, saved: Some(ciphertext) } = moved.blocked.as_ref()? else { return None };
        let part = range.start.max(window.start)..range.end.min(window.end);
        let skip = usize::try_from(part.start.saturating_sub(window.start)).expect("a window is in memory");
        let ciphertext = Arc::clone(ciphertext);
        (part.start < part.end).then_some(Saved { former: &former.side, part, ciphertext, skip })
    }
}

impl Saved<'_> {
    /// Decrypts the part to `out`, which is as long.
    pub(super) fn read(&self, holes: bool, out: Target<'_>) {
        let mut out = out;
        let ciphertext = &self.ciphertext[self.skip..self.skip + out.len()];
        self.former.decrypt(self.part.start, Source::from_slice(ciphertext), out.reborrow());
        if holes {
            zero_holes(ciphertext, out);
        }
    }
}

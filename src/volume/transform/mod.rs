//! Re-keying while the volume is in use: the engine that moves data from the former side to the new one.
//!
//! One window at a time, each step durable before the next:
//!
//! 1. the window's ciphertext is saved in the journal;
//! 2. a record says that the window is being moved, with a checksum of what was saved;
//! 3. the window is decrypted and encrypted again, from the saved copy, over its new place;
//! 4. two records, one after the other, say that it has arrived. Only now may anybody touch it again, and the loss of one
//!    sector of the journal cannot move it once more.
//!
//! A crash before 2 leaves the old window, since nothing of the data area was touched; a crash after 2 leaves the saved
//! copy, from which 3 is done again from the beginning. Nothing is assumed about how stores tear. Blocks that the new place
//! needs are allocated before 2. A window whose step 2 or later failed can be read, from what was saved, and not be written
//! until the namespace is reopened, because nobody knows which of both a crash would leave.
//!
//! A hole that stays where it is has nothing to move: step 4 alone passes over it.

mod moving;

use std::fmt;
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use super::area::DataArea;
use super::side::Side;
use super::{Volume, VolumeError};
use crate::namespace::{
    Credential, Namespace, Pending, RekeyOptions, SlotInfo, TransformError, UpdateError, WINDOW_BYTES_MAX,
};
use crate::pmem::{Access, MediaError};

/// What windows are a multiple of, except the last one: both data units.
const WINDOW_STEP_BYTES: u64 = 4096;

/// The window of [`Volume::transform_step`] when the caller has no other wish: large enough that four rounds of making
/// things durable do not show, small enough that nobody waits long for it.
pub const WINDOW_BYTES: u64 = 512 << 10;

/// The longest hole that is passed over at once: whoever accesses a part of it waits for so long.
const SKIP_BYTES_MAX: u64 = 1 << 30;

/// How far a re-key has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TransformProgress {
    /// Bytes that are under the new key.
    pub done_bytes: u64,
    /// Size of the volume in bytes.
    pub total_bytes: u64,
}

/// Owns the header while the volume is open, and moves windows.
pub(super) struct Engine {
    namespace: Namespace,
    /// Whether no header copy from before the transform is left.
    settled: bool,
    /// Ciphertext of the window, kept for the next one.
    saved: Vec<u8>,
}

impl Engine {
    /// Takes the namespace of a volume whose area was just made. A transform that was interrupted goes on from where it
    /// stands, and the window that was being moved is moved first, if the backing can be written.
    pub(super) fn new(namespace: Namespace, area: &DataArea) -> Self {
        let mut engine = Self { namespace, settled: false, saved: Vec::new() };
        let Some(pending) = engine.namespace.pending_transform() else { return engine };
        let former = Side::new(*pending.source(), pending.source_key(), area.backend());
        let done_bytes = pending.record().done_bytes;
        area.resume_transform(former, is_backward(area, pending), done_bytes);
        if pending.record().window_bytes > 0 {
            // Who only reads cannot move it, and reads it from where it was saved.
            let saved = pending.journal().saved(&pending.record());
            let saved = saved.inspect_err(|error| tracing::error!(%error, "the window being re-keyed is lost")).ok();
            area.block(window(area, pending, pending.record().window_bytes), saved);
        }
        if area.backing().access() == Access::ReadWrite
            && let Err(error) = engine.recover(area)
        {
            tracing::error!(%error, "the window that was being re-keyed cannot be completed: it cannot be written");
        }
        engine
    }

    pub(super) fn into_namespace(self) -> Namespace {
        self.namespace
    }

    /// Records whether the namespace is in use, unless the header says so already.
    pub(super) fn mark(&mut self, in_use: bool) -> Result<(), UpdateError> {
        if self.namespace.header().unclean == in_use { Ok(()) } else { self.namespace.set_unclean(in_use) }
    }

    pub(super) const fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub(super) const fn namespace_mut(&mut self) -> &mut Namespace {
        &mut self.namespace
    }

    /// Changes the size, first in the header and then in use.
    pub(super) fn resize(&mut self, area: &DataArea, size_bytes: u64, even_smaller: bool) -> Result<(), UpdateError> {
        let resized = self.namespace.resize_header(size_bytes, even_smaller);
        let layout = self.namespace.geometry().layout();
        // Also when only one header copy could be written: nothing may be written behind the end that it tells.
        if layout.size_bytes() != area.size_bytes() {
            area.resize(Side::new(layout, self.namespace.volume_key(), area.backend()), layout.size_bytes());
        }
        resized?;
        // Not before: nobody writes any more to where the tag of smaller data belongs.
        self.namespace.settle_tag()
    }

    fn progress(&self) -> Option<TransformProgress> {
        let pending = self.namespace.pending_transform()?;
        let total_bytes = pending.source().size_bytes();
        Some(TransformProgress { done_bytes: pending.record().done_bytes, total_bytes })
    }

    /// Moves one window, or ends the transform when there is none left.
    fn step(&mut self, area: &DataArea, window_bytes: u64) -> Result<Option<TransformProgress>, TransformError> {
        if self.namespace.pending_transform().is_none() {
            return Ok(None);
        }
        if !self.settled {
            self.namespace.settle_header()?;
            self.settled = true;
        }
        self.recover(area)?;
        let Some(progress) = self.progress() else { return Ok(None) };
        if progress.done_bytes < progress.total_bytes {
            if !self.skip_hole(area)? {
                self.move_window(area, window_bytes)?;
            }
            return Ok(self.progress());
        }
        let finished = self.namespace.finish_transform();
        if self.namespace.pending_transform().is_none() {
            area.end_transform();
            self.saved = Vec::new();
        }
        finished.map(|()| None)
    }

    /// Moves the window that a crash or a failure has left half moved.
    fn recover(&mut self, area: &DataArea) -> Result<(), TransformError> {
        let Some(pending) = self.namespace.pending_transform_mut() else { return Ok(()) };
        let record = pending.record();
        if record.window_bytes == 0 {
            return Ok(());
        }
        let window = window(area, pending, record.window_bytes);
        let saved = pending.journal().saved(&record)?;
        let moving = area.hold(window);
        moving.allocate(&saved)?;
        moving.store(&saved)?;
        pending.arrive()?;
        moving.arrive(pending.record().done_bytes);
        Ok(())
    }

    /// Passes over a hole that begins where the next window does and stays where it is; whether there is one.
    fn skip_hole(&mut self, area: &DataArea) -> Result<bool, TransformError> {
        let Some(pending) = self.namespace.pending_transform_mut() else { return Ok(false) };
        if is_backward(area, pending) {
            return Ok(false); // it does not stay where it is
        }
        let moving = area.hold(window(area, pending, SKIP_BYTES_MAX));
        let hole_bytes = moving.hole_bytes()?;
        if hole_bytes == 0 {
            return Ok(false);
        }
        // Or a power cut would bring back what was there.
        moving.make_hole_again(hole_bytes)?;
        area.backing().sync_blocks()?;
        pending.skip(hole_bytes)?;
        moving.arrive(pending.record().done_bytes);
        Ok(true)
    }

    fn move_window(&mut self, area: &DataArea, window_bytes: u64) -> Result<(), TransformError> {
        let Self { namespace, saved, .. } = self;
        let Some(pending) = namespace.pending_transform_mut() else { return Ok(()) };
        let window = window(area, pending, window_bytes.clamp(WINDOW_STEP_BYTES, WINDOW_BYTES_MAX));
        saved.resize(usize::try_from(window.end - window.start).expect("at most the journal's room"), 0);

        let moving = area.hold(window);
        moving.read_former(saved)?;
        moving.allocate(saved)?;
        pending.journal().save(saved)?;
        moving.block(None);
        let moved = pending.advance(saved).and_then(|()| Ok(moving.store(saved)?)).and_then(|()| pending.arrive());
        match moved {
            Ok(()) => moving.arrive(pending.record().done_bytes),
            Err(_) => moving.block(Some(saved.clone())),
        }
        moved
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("progress", &self.progress()).finish_non_exhaustive()
    }
}

/// Data that moves towards the end begins with its last byte: what it overwrites has then moved before.
fn is_backward(area: &DataArea, pending: &Pending) -> bool {
    area.geometry().data_start() > pending.source().data_start()
}

/// The logical range of the next window, `window_bytes` long or what is left.
fn window(area: &DataArea, pending: &Pending, window_bytes: u64) -> Range<u64> {
    let size_bytes = pending.source().size_bytes();
    let done_bytes = pending.record().done_bytes;
    let left_bytes = size_bytes - done_bytes;
    if is_backward(area, pending) {
        let start = left_bytes.saturating_sub(window_bytes);
        // The first window takes what is no whole step; it has fewer bytes than asked for.
        return start.next_multiple_of(WINDOW_STEP_BYTES)..left_bytes;
    }
    done_bytes..done_bytes + left_bytes.min(window_bytes)
}

impl Volume {
    /// Gives the volume a new key while it is in use: the header has it when this returns, with a fresh slot for
    /// `credential` in the place of the slot that unlocked, and [`Self::transform_step`] moves the data.
    ///
    /// # Errors
    ///
    /// [`TransformError`]; nothing has changed, unless the header could not be written.
    pub fn begin_rekey(&self, credential: &Credential, options: &RekeyOptions) -> Result<(), TransformError> {
        self.check_here()?;
        let mut engine = self.engine();
        let engine = engine.as_mut().ok_or(TransformError::Locked)?;
        let began = engine.namespace.begin_rekey(credential, options);
        if let (false, Some(pending)) = (self.area.is_transforming(), engine.namespace.pending_transform()) {
            let backward = is_backward(&self.area, pending);
            let layout = engine.namespace.geometry().layout();
            self.area.begin_transform(Side::new(layout, engine.namespace.volume_key(), self.area.backend()), backward);
        }
        engine.settled = false; // the old key's tag of detached data is still there
        began
    }

    /// Makes the slot that `credential` opens the one that [`Self::begin_rekey`] gives a successor.
    ///
    /// # Errors
    ///
    /// [`TransformError::Credential`] when it opens none.
    pub fn use_slot_of(&self, credential: &Credential) -> Result<(), TransformError> {
        self.check_here()?;
        self.engine().as_mut().ok_or(TransformError::Locked)?.namespace.use_slot_of(credential)
    }

    /// The key slots besides the one that unlocked; none when the volume is locked.
    #[must_use]
    pub fn other_slots(&self) -> Vec<SlotInfo> {
        self.engine().as_ref().map_or_else(Vec::new, |engine| engine.namespace.other_slots())
    }

    /// Records whether the re-key that is under way is to rest.
    ///
    /// # Errors
    ///
    /// [`TransformError::NotUnderWay`], and when the header cannot be written.
    pub fn set_transform_paused(&self, paused: bool) -> Result<(), TransformError> {
        self.check_here()?;
        self.engine().as_mut().ok_or(TransformError::Locked)?.namespace.set_transform_paused(paused)
    }

    /// How far the re-key has come that is under way.
    #[must_use]
    pub fn transform(&self) -> Option<TransformProgress> {
        self.engine().as_ref().and_then(Engine::progress)
    }

    /// Whether the re-key that is under way is to rest until somebody asks for more.
    #[must_use]
    pub fn transform_paused(&self) -> bool {
        self.engine().as_ref().is_some_and(|engine| engine.namespace.transform_paused())
    }

    /// Moves the next `window_bytes` bytes at most (a multiple of 4096; see [`WINDOW_BYTES`]) to the new key, or ends the
    /// re-key when all have moved: both header copies then forget the old volume key. `None` when there is none under way
    /// any more. Reads and writes go on meanwhile and wait only where they touch those bytes.
    ///
    /// # Errors
    ///
    /// [`TransformError`]; when the window was already being moved, writes to it fail until the namespace is reopened.
    pub fn transform_step(&self, window_bytes: u64) -> Result<Option<TransformProgress>, TransformError> {
        self.check_here()?;
        if self.read_only() {
            return Err(MediaError::ReadOnly.into());
        }
        let window_bytes = window_bytes - window_bytes % WINDOW_STEP_BYTES;
        self.engine().as_mut().ok_or(TransformError::Locked)?.step(&self.area, window_bytes)
    }

    /// [`Volume::check_owner`], before the engine is asked.
    fn check_here(&self) -> Result<(), TransformError> {
        if self.is_here() { Ok(()) } else { Err(MediaError::Forked.into()) }
    }

    pub(super) fn engine(&self) -> MutexGuard<'_, Option<Engine>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<TransformError> for VolumeError {
    fn from(error: TransformError) -> Self {
        Self::Transform(Box::new(error))
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod cut_tests;
#[cfg(test)]
mod slide_crash_tests;
#[cfg(test)]
mod tests;

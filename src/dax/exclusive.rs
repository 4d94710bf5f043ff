//! An exclusive map: plain slices of plaintext that nobody else can change.
//!
//! Its pages lie in a window of their own. While it lives, other writers of its range are refused (requests of the volume
//! and of NBD clients) and no other map can overlap it, so its memory is that of the program alone and may be a `&mut`.
//! Other readers see what is on media: the bytes that were last persisted, written back or evicted.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use super::core::Core;
use super::error::DaxError;
use super::mapping::DaxMapping;
use super::options::MapOptions;
use crate::volume::Volume;

/// A part of a volume as a byte slice. Dropping it syncs it and unmaps it.
///
/// A page that cannot be read (a media error, or [`Volume::lock`] from another thread) raises SIGBUS when it is touched:
/// a slice has no other way to say so.
#[derive(Debug)]
pub struct ExclusiveMap {
    map: DaxMapping,
}

impl ExclusiveMap {
    pub(super) fn new(volume: &Arc<Volume>, range: Range<u64>, options: &MapOptions) -> Result<Self, DaxError> {
        let pages = super::mapping::whole_pages(&range);
        let core = Core::new(volume, pages, options, true)?;
        Ok(Self { map: DaxMapping::new(core, range, options)? })
    }

    /// Makes what was stored to `range` (bytes from the start of the map) durable, and visible to other readers.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::persist`].
    pub fn persist(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.persist(range)
    }

    /// Makes everything durable that was stored.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::sync`].
    pub fn sync(&self) -> Result<(), DaxError> {
        self.map.sync()
    }

    /// Brings the pages of `range` in.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::prefetch`]: this is also the way to find media errors without a SIGBUS.
    pub fn prefetch(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.prefetch(range)
    }

    /// Syncs, wipes and unmaps.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::close`].
    pub fn close(self) -> Result<(), DaxError> {
        self.map.close()
    }
}

impl Deref for ExclusiveMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is mapped as long as `self` lives; nobody else has an address of this memory, no other map or
        // request writes to it, and `&mut self` is needed for our own stores.
        unsafe { self.map.as_slice(0..self.map.len()) }
    }
}

impl DerefMut for ExclusiveMap {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, the map was made writable, and `&mut self` makes the borrow the only one.
        unsafe { self.map.as_mut_slice(0..self.map.len()) }
    }
}

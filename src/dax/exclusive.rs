//! Exclusive maps: plain slices of plaintext that nobody else can change.
//!
//! Their pages lie in a window of their own. While one lives, other writers of its range are refused (requests of the volume
//! and of NBD clients) and no other map can overlap it, so its memory is that of the program alone and may be a `&mut`.
//! Other readers see what is on media: the bytes that were last persisted, written back or evicted.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use super::core::Core;
use super::error::DaxError;
use super::mapping::{DaxMapping, whole_pages};
use super::options::{MapMode, MapOptions, Tracking};
use crate::volume::Volume;

/// A part of a volume as a byte slice to change. Dropping it syncs it and unmaps it.
///
/// A page that cannot be read (a media error, or [`Volume::lock`] from another thread) raises SIGBUS when it is touched:
/// a slice has no other way to say so.
#[derive(Debug)]
pub struct ExclusiveMap {
    map: DaxMapping,
}

/// A part of a volume as a byte slice for reading, which nobody changes while it lives. Dropping it unmaps it.
///
/// A page that cannot be read raises SIGBUS, as with [`ExclusiveMap`].
#[derive(Debug)]
pub struct FrozenMap {
    map: DaxMapping,
}

/// Makes parts of an [`ExclusiveMap`] durable while its slice is lent out; see [`ExclusiveMap::split`].
#[derive(Clone, Copy, Debug)]
pub struct Persister<'a> {
    map: &'a DaxMapping,
}

fn map(volume: &Arc<Volume>, range: Range<u64>, options: &MapOptions) -> Result<DaxMapping, DaxError> {
    let core = Core::new(volume, whole_pages(&range), options, true)?;
    DaxMapping::new(core, range, options)
}

/// What both kinds have of the map that they are.
macro_rules! as_the_map {
    ($kind:ty) => {
        impl $kind {
            /// The bytes of the volume that it shows.
            #[must_use]
            pub const fn range(&self) -> &Range<u64> {
                self.map.range()
            }

            /// How plaintext comes in.
            #[must_use]
            pub fn mode(&self) -> MapMode {
                self.map.mode()
            }

            /// How dirty pages are found.
            #[must_use]
            pub fn tracking(&self) -> Tracking {
                self.map.tracking()
            }

            /// Whether the kernel keeps the plaintext out of swap.
            #[must_use]
            pub const fn memory_locked(&self) -> bool {
                self.map.memory_locked()
            }

            /// Brings the pages of `range` (bytes from the start of the map) in.
            ///
            /// # Errors
            ///
            /// As [`DaxMapping::prefetch`]: this is also the way to find media errors without a SIGBUS.
            pub fn prefetch(&self, range: Range<u64>) -> Result<(), DaxError> {
                self.map.prefetch(range)
            }

            /// As [`DaxMapping::evict`]: the bytes stay as they are, in media rather than in memory.
            ///
            /// # Errors
            ///
            /// As [`DaxMapping::evict`].
            pub fn evict(&self, range: Range<u64>) -> Result<u64, DaxError> {
                self.map.evict(range)
            }
        }

        impl Deref for $kind {
            type Target = [u8];

            fn deref(&self) -> &[u8] {
                // SAFETY: the range is mapped as long as `self` lives; nobody else has an address of this memory, no other map
                // or request writes to it, and `&mut self` is needed for our own stores, if they are allowed at all.
                unsafe { self.map.as_slice(0..self.map.len()) }
            }
        }
    };
}

as_the_map!(ExclusiveMap);
as_the_map!(FrozenMap);

impl ExclusiveMap {
    pub(super) fn new(volume: &Arc<Volume>, range: Range<u64>, options: &MapOptions) -> Result<Self, DaxError> {
        Ok(Self { map: map(volume, range, &options.clone().writable())? })
    }

    /// Makes what was stored to `range` (bytes from the start of the map) durable, and visible to other readers.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::persist`].
    pub fn persist(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.persist(range)
    }

    /// As [`DaxMapping::flush`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::flush`].
    pub fn flush(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.flush(range)
    }

    /// As [`DaxMapping::drain`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::drain`].
    pub fn drain(&self) -> Result<(), DaxError> {
        self.map.drain()
    }

    /// Makes everything durable that was stored.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::sync`].
    pub fn sync(&self) -> Result<(), DaxError> {
        self.map.sync()
    }

    /// Stores `data` at `offset` and makes it durable, as [`DaxMapping::write_persist`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::write_persist`].
    pub fn write_persist(&mut self, offset: u64, data: &[u8]) -> Result<(), DaxError> {
        self.map.write_persist(offset, data)
    }

    /// The slice, and who makes parts of it durable: for threads that each have a part (`split_at_mut`).
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use daxcrypt::volume::Volume;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let volume = Arc::new(Volume::ephemeral(1 << 20)?);
    /// let mut map = volume.map_exclusive(0..8192)?;
    /// let (bytes, persister) = map.split();
    /// let (left, right) = bytes.split_at_mut(4096);
    /// std::thread::scope(|scope| {
    ///     for part in [left, right] {
    ///         scope.spawn(move || {
    ///             part[..5].copy_from_slice(b"hello");
    ///             persister.persist(&part[..5])
    ///         });
    ///     }
    /// });
    /// # Ok(())
    /// # }
    /// ```
    pub fn split(&mut self) -> (&mut [u8], Persister<'_>) {
        // SAFETY: as in `deref_mut`. The persister reads this memory, by another mapping, where it is shown a borrow of it.
        let bytes = unsafe { self.map.as_mut_slice(0..self.map.len()) };
        (bytes, Persister { map: &self.map })
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

impl DerefMut for ExclusiveMap {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, the map was made writable, and `&mut self` makes the borrow the only one.
        unsafe { self.map.as_mut_slice(0..self.map.len()) }
    }
}

impl Persister<'_> {
    /// Makes `part` durable, which lies in the map.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::persist_at`].
    pub fn persist(&self, part: &[u8]) -> Result<(), DaxError> {
        self.map.persist_at(part.as_ptr(), part.len())
    }
}

impl FrozenMap {
    pub(super) fn new(volume: &Arc<Volume>, range: Range<u64>, options: &MapOptions) -> Result<Self, DaxError> {
        Ok(Self { map: map(volume, range, &options.clone().read_only())? })
    }
}

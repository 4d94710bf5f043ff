//! What a program does with places in a map that it knows by their address: words as atomics, persists by pointer, parts.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::error::DaxError;
use super::mapping::DaxMapping;

impl DaxMapping {
    /// Stores `data` at `offset` and makes it durable: [`Self::write`] and [`Self::persist`] in one (`pmem_memcpy_persist`),
    /// without bringing anything in. As with these, aligned words are old or new after a crash, and the whole is not atomic.
    ///
    /// # Errors
    ///
    /// As [`Self::write`] and [`Self::persist`]. Nothing to store is nothing to do.
    pub fn write_persist(&self, offset: u64, data: &[u8]) -> Result<(), DaxError> {
        let range = self.logical_writable(offset, data.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let core = self.core();
        Ok(core.volume.write_through(&core.window, range, data)?)
    }

    /// The 8 bytes at `offset` as an atomic, for lengths, tails and locks that several threads use. What was stored is
    /// durable after [`Self::persist`], and may be so earlier. Whoever stores to the same bytes in another way
    /// ([`Self::write`], a request of the volume) may tear the word.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use std::sync::atomic::Ordering;
    /// # use daxcrypt::dax::MapOptions;
    /// # use daxcrypt::volume::Volume;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let volume = Arc::new(Volume::ephemeral(1 << 20)?);
    /// # let map = volume.map(0..4096, &MapOptions::new().writable())?;
    /// let tail = map.atomic_u64(64)?;
    /// tail.store(128, Ordering::Release);
    /// map.persist(64..72)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`DaxError::ReadOnly`], since an atomic can be stored to; [`DaxError::OutOfRange`]; [`DaxError::Misaligned`] when `offset`
    /// is not a multiple of 8; [`DaxError::Volume`] in a forked child and after a lock. Touching it raises SIGBUS where media
    /// cannot be read, as all touches do.
    pub fn atomic_u64(&self, offset: u64) -> Result<&AtomicU64, DaxError> {
        let word = self.word(offset, 8)?;
        // SAFETY: the word is aligned and mapped writable while `self` is borrowed. Slices of it exist only by a promise that
        // nobody stores there; other stores of this library go through other addresses, as those of other processes would.
        Ok(unsafe { AtomicU64::from_ptr(word.cast()) })
    }

    /// As [`Self::atomic_u64`], of 4 bytes at a multiple of 4.
    ///
    /// # Errors
    ///
    /// As [`Self::atomic_u64`].
    pub fn atomic_u32(&self, offset: u64) -> Result<&AtomicU32, DaxError> {
        let word = self.word(offset, 4)?;
        // SAFETY: as in `atomic_u64`.
        Ok(unsafe { AtomicU32::from_ptr(word.cast()) })
    }

    /// Where the word at `offset` is mapped; the map begins at a page.
    fn word(&self, offset: u64, len_bytes: u64) -> Result<*mut u8, DaxError> {
        self.logical_writable(offset, len_bytes)?;
        self.check_unlocked()?;
        if !offset.is_multiple_of(len_bytes) {
            return Err(DaxError::Misaligned { offset, alignment: len_bytes });
        }
        Ok(self.as_ptr().wrapping_add(usize::try_from(offset).expect("64-bit targets only")))
    }

    /// Where in the map `pointer` points to, which may also be its end.
    #[must_use]
    pub fn offset_of(&self, pointer: *const u8) -> Option<u64> {
        let offset = (pointer.addr() as u64).checked_sub(self.as_ptr().addr() as u64)?;
        (offset <= self.len()).then_some(offset)
    }

    /// [`Self::persist`] of `len_bytes` bytes at `pointer`, for who has pointers into the map rather than offsets.
    ///
    /// # Errors
    ///
    /// As [`Self::persist`]; [`DaxError::OutOfRange`], with addresses, for bytes that are not all in the map.
    pub fn persist_at(&self, pointer: *const u8, len_bytes: usize) -> Result<(), DaxError> {
        let len_bytes = len_bytes as u64;
        let end = |offset: u64| offset.checked_add(len_bytes).filter(|&end| end <= self.len());
        match self.offset_of(pointer).and_then(|offset| Some(offset..end(offset)?)) {
            Some(range) => self.persist(range),
            None => {
                let start = pointer.addr() as u64;
                Err(DaxError::OutOfRange { start, end: start.saturating_add(len_bytes), len_bytes: self.len() })
            }
        }
    }

    /// A part of the map with offsets of its own, for those who are to have that part and no other.
    ///
    /// # Errors
    ///
    /// [`DaxError::OutOfRange`] when `range` is empty, reversed or outside of the map.
    pub fn part(&self, range: Range<u64>) -> Result<DaxPart<'_>, DaxError> {
        if range.start >= range.end || range.end > self.len() {
            return Err(DaxError::OutOfRange { start: range.start, end: range.end, len_bytes: self.len() });
        }
        Ok(DaxPart { map: self, range })
    }
}

/// A part of a [`DaxMapping`]: every call is that of the map, with offsets from the start of the part, and refuses what is
/// outside of the part. Parts may overlap, as maps may.
#[derive(Clone, Debug)]
pub struct DaxPart<'a> {
    map: &'a DaxMapping,
    /// Offsets of the map.
    range: Range<u64>,
}

impl<'a> DaxPart<'a> {
    /// The bytes of the map that it is.
    #[must_use]
    pub const fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// Its length in bytes, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a part is never empty")]
    pub const fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// As [`DaxMapping::as_ptr`].
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_ptr().wrapping_add(usize::try_from(self.range.start).expect("64-bit targets only"))
    }

    /// A part of this part.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::part`].
    pub fn part(&self, range: Range<u64>) -> Result<Self, DaxError> {
        self.map.part(self.nonempty_within(&range)?)
    }

    /// As [`DaxMapping::read`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::read`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DaxError> {
        self.map.read(self.at(offset, out.len() as u64)?, out)
    }

    /// As [`DaxMapping::write`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::write`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), DaxError> {
        self.map.write(self.at(offset, data.len() as u64)?, data)
    }

    /// As [`DaxMapping::write_persist`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::write_persist`].
    pub fn write_persist(&self, offset: u64, data: &[u8]) -> Result<(), DaxError> {
        self.map.write_persist(self.at(offset, data.len() as u64)?, data)
    }

    /// As [`DaxMapping::zero`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::zero`].
    pub fn zero(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.zero(self.within(&range)?)
    }

    /// As [`DaxMapping::persist`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::persist`].
    pub fn persist(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.persist(self.within(&range)?)
    }

    /// As [`DaxMapping::flush`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::flush`].
    pub fn flush(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.flush(self.within(&range)?)
    }

    /// As [`DaxMapping::prefetch`].
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::prefetch`].
    pub fn prefetch(&self, range: Range<u64>) -> Result<(), DaxError> {
        self.map.prefetch(self.within(&range)?)
    }

    /// As [`DaxMapping::atomic_u64`]; aligned is what is so in the map.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::atomic_u64`].
    pub fn atomic_u64(&self, offset: u64) -> Result<&'a AtomicU64, DaxError> {
        self.map.atomic_u64(self.at(offset, 8)?)
    }

    /// As [`DaxMapping::atomic_u32`]; aligned is what is so in the map.
    ///
    /// # Errors
    ///
    /// As [`DaxMapping::atomic_u64`].
    pub fn atomic_u32(&self, offset: u64) -> Result<&'a AtomicU32, DaxError> {
        self.map.atomic_u32(self.at(offset, 4)?)
    }

    /// The offset in the map.
    fn at(&self, offset: u64, len_bytes: u64) -> Result<u64, DaxError> {
        let end = offset.saturating_add(len_bytes);
        Ok(self.within(&(offset..end))?.start)
    }

    /// The range of the map. An empty range within the part is one; one that ends before it begins is an error.
    fn within(&self, range: &Range<u64>) -> Result<Range<u64>, DaxError> {
        if range.start > range.end || range.end > self.len() {
            return Err(DaxError::OutOfRange { start: range.start, end: range.end, len_bytes: self.len() });
        }
        Ok(self.range.start + range.start..self.range.start + range.end)
    }

    fn nonempty_within(&self, range: &Range<u64>) -> Result<Range<u64>, DaxError> {
        let within = self.within(range)?;
        if within.is_empty() {
            return Err(DaxError::OutOfRange { start: range.start, end: range.end, len_bytes: self.len() });
        }
        Ok(within)
    }
}

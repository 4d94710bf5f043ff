//! The decrypted view of an unlocked namespace.
//!
//! A [`Volume`] reads and writes plaintext at logical offsets, from many threads at once. Plaintext exists in the
//! caller's buffers and, for a moment, in a 16-byte scratch block; ciphertext goes to and comes from media directly.
//!
//! Who may write what, together (the other half stands in `range_lock`): blocks are independent under XTS, so a write
//! of whole blocks stores them under a *shared* lock, and only a partial first or last block is read, changed and
//! written back, under an *exclusive* lock of that block. Two writers of the same bytes leave either one's block, as on
//! a disk; writers of different bytes never disturb each other.

mod area;
mod error;
mod range_lock;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use zeroize::Zeroizing;

use self::area::{BLOCK_BYTES, DataArea};
pub use self::error::VolumeError;
use self::range_lock::RangeLock;
use crate::luks2;
use crate::memory::{Source, Target};
use crate::namespace::{Credential, Geometry, Header, LockedNamespace, Namespace, UnlockError};
use crate::pmem::{Access, Backing, Granularity, MediaError};
use crate::secret::VolumeKey;
use crate::xts::{BLOCK_BYTES as BLOCK_LEN, Backend, DataUnit, XtsKey};

/// An unlocked namespace: plaintext by logical offset.
pub struct Volume {
    area: DataArea,
    header: Header,
    /// Kept open, and with it locked, while the volume is in use; the data's backing unless the header is detached.
    _header_backing: Arc<Backing>,
    /// Over logical offsets.
    blocks: RangeLock,
}

/// A run of bytes that the backing holds, or does not hold, blocks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeExtent {
    /// Length in bytes, at least 1.
    pub len_bytes: u64,
    /// Whether this is a hole, which reads as zeroes.
    pub hole: bool,
}

impl LockedNamespace {
    /// Unlocks with `credential` and gives the decrypted view, on the backend that `DAXCRYPT_XTS_BACKEND` names or the
    /// fastest one that the CPU has.
    ///
    /// # Errors
    ///
    /// [`UnlockError`] for a wrong credential or a forged header; [`VolumeError::Backend`] inside
    /// [`OpenError::Volume`] for an environment that names a backend that cannot run.
    pub fn unlock(self, credential: &Credential) -> Result<Volume, OpenError> {
        Ok(Volume::new(self.unlock_key(credential)?, Backend::from_env().map_err(VolumeError::from)?))
    }
}

/// Why a namespace did not become a volume.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The credential or the header was refused.
    #[error(transparent)]
    Unlock(#[from] UnlockError),
    /// The volume could not be set up.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

impl Volume {
    /// The decrypted view of `namespace`, with kernels of `backend`.
    #[must_use]
    pub fn new(namespace: Namespace, backend: Backend) -> Self {
        let header_backing = Arc::clone(namespace.header_backing());
        let (backing, geometry, header, key) = namespace.into_parts();
        Self { _header_backing: header_backing, ..Self::from_parts(backing, geometry, header, &key, backend) }
    }

    /// The decrypted view of a LUKS2 volume.
    #[must_use]
    pub fn from_luks2(unlocked: luks2::Unlocked, backend: Backend) -> Self {
        let (backing, header_backing, geometry, header, key) = unlocked.into_parts();
        Self { _header_backing: header_backing, ..Self::from_parts(backing, geometry, header, &key, backend) }
    }

    /// The decrypted view of `geometry` in `backing` under `key`, whatever says so: a format of somebody else, or a key
    /// that is no namespace's. `header` is what [`Self::header`] gives.
    #[must_use]
    pub fn from_parts(
        backing: Arc<Backing>,
        geometry: Geometry,
        header: Header,
        key: &VolumeKey,
        backend: Backend,
    ) -> Self {
        let unit = DataUnit::from_len_bytes(u64::from(geometry.unit_bytes())).expect("the geometry has a known unit");
        let (header_backing, holes) = (Arc::clone(&backing), header.discards);
        let area = DataArea::new(backing, geometry, unit, XtsKey::new(key, backend), holes);
        Self { area, header, _header_backing: header_backing, blocks: RangeLock::default() }
    }

    /// Size of the decrypted view in bytes: a multiple of the data unit.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.area.geometry().size_bytes()
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.backing().access() == Access::ReadOnly
    }

    /// What is on media about this namespace, as it was when it was unlocked.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Where the data lies.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        self.area.geometry()
    }

    /// The file or device that holds the ciphertext.
    #[must_use]
    pub fn backing(&self) -> &Arc<Backing> {
        self.area.backing()
    }

    /// What makes a store durable here.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.backing().granularity()
    }

    /// The AES-XTS backend in use.
    #[must_use]
    pub const fn xts_backend(&self) -> Backend {
        self.area.key().backend()
    }

    /// Whether discards punch holes, which then read as zeroes.
    #[must_use]
    pub const fn discards(&self) -> bool {
        self.area.holes()
    }

    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`], or [`VolumeError::Media`] with `buf` zeroed.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let pieces = Pieces::of(self.check(offset, buf.len() as u64)?);
        let result = self.read_pieces(&pieces, buf);
        if result.is_err() {
            buf.fill(0);
        }
        result
    }

    fn read_pieces(&self, pieces: &Pieces, buf: &mut [u8]) -> Result<(), VolumeError> {
        let (head, rest) = buf.split_at_mut(len(&pieces.head));
        let (whole, tail) = rest.split_at_mut(len(&pieces.whole));
        self.read_part(&pieces.head, head)?;
        if !whole.is_empty() {
            self.area.read(pieces.whole.start, Target::from_slice(whole))?;
        }
        self.read_part(&pieces.tail, tail)
    }

    /// Reads a part of one block.
    fn read_part(&self, part: &Range<u64>, out: &mut [u8]) -> Result<(), VolumeError> {
        if part.is_empty() {
            return Ok(());
        }
        let mut block = Zeroizing::new([0; BLOCK_LEN]);
        self.area.read(block_start(part.start), Target::from_slice(&mut *block))?;
        out.copy_from_slice(&block[within_block(part)]);
        Ok(())
    }

    /// Writes `data` at `offset`. Under cache-line granularity it is durable on return; under page granularity
    /// [`Self::persist`] or [`Self::flush`] makes it so.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::ReadOnly`], with nothing written; [`VolumeError::Media`], after
    /// which each block holds its old or its new content.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), VolumeError> {
        let pieces = Pieces::of(self.check_write(offset, data.len() as u64)?);
        let (head, rest) = data.split_at(len(&pieces.head));
        let (whole, tail) = rest.split_at(len(&pieces.whole));
        self.write_part(&pieces.head, head)?;
        if !whole.is_empty() {
            let _blocks = self.blocks.shared(pieces.whole.clone());
            self.area.write(pieces.whole.start, Source::from_slice(whole))?;
        }
        self.write_part(&pieces.tail, tail)
    }

    /// Changes a part of one block: the only read-modify-write there is.
    fn write_part(&self, part: &Range<u64>, data: &[u8]) -> Result<(), VolumeError> {
        if part.is_empty() {
            return Ok(());
        }
        let start = block_start(part.start);
        let mut block = Zeroizing::new([0; BLOCK_LEN]);
        let _blocks = self.blocks.exclusive(start..start + BLOCK_BYTES);
        self.area.read(start, Target::from_slice(&mut *block))?;
        block[within_block(part)].copy_from_slice(data);
        self.area.write(start, Source::from_slice(&*block))?;
        Ok(())
    }

    /// Writes zeroes over `len_bytes` bytes at `offset`, encrypted like any data.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let pieces = Pieces::of(self.check_write(offset, len_bytes)?);
        let zeroes = [0; BLOCK_LEN];
        self.write_part(&pieces.head, &zeroes[..len(&pieces.head)])?;
        if !pieces.whole.is_empty() {
            let _blocks = self.blocks.shared(pieces.whole.clone());
            self.area.write_zeroes(pieces.whole.clone())?;
        }
        self.write_part(&pieces.tail, &zeroes[..len(&pieces.tail)])
    }

    /// Makes `len_bytes` bytes at `offset` read as zeroes by giving the blocks of whole units back to the filesystem
    /// under the backing; the ragged ends, and everything where that is not possible, are written as by
    /// [`Self::write_zeroes`].
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn punch_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let range = self.check_write(offset, len_bytes)?;
        let units = self.whole_units(&range);
        if !self.discards() || units.is_empty() || !self.punch(&units)? {
            return self.write_zeroes(offset, len_bytes);
        }
        self.write_zeroes(range.start, units.start - range.start)?;
        self.write_zeroes(units.end, range.end - units.end)
    }

    /// Says that the content of `len_bytes` bytes at `offset` is needed no more. Without [`Self::discards`] nothing
    /// happens, because holes would show on media which units are unused.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let units = self.whole_units(&self.check_write(offset, len_bytes)?);
        if self.discards() && !units.is_empty() {
            self.punch(&units)?;
        }
        Ok(())
    }

    /// Whether the medium could punch holes.
    fn punch(&self, units: &Range<u64>) -> Result<bool, VolumeError> {
        let _blocks = self.blocks.shared(units.clone());
        match self.area.punch(units.clone()) {
            Ok(()) => Ok(true),
            Err(MediaError::Unsupported) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The runs of holes and of data from `offset` on, which add up to `len_bytes` or, when there would be more than
    /// `count_max` runs, to less. Without [`Self::discards`] everything is data.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::Media`].
    pub fn extents(&self, offset: u64, len_bytes: u64, count_max: usize) -> Result<Vec<VolumeExtent>, VolumeError> {
        let range = self.check(offset, len_bytes)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        if !self.discards() {
            return Ok(vec![VolumeExtent { len_bytes, hole: false }]);
        }
        let extents = self.area.extents(range)?;
        let runs = extents.iter().take(count_max);
        Ok(runs.map(|run| VolumeExtent { len_bytes: run.range.end - run.range.start, hole: !run.allocated }).collect())
    }

    /// Makes what was written to `range` durable: flush and drain of that range.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::Media`]; after a failed flush every later one fails too, until the
    /// namespace is reopened, because nobody knows what reached the medium.
    pub fn persist(&self, range: Range<u64>) -> Result<(), VolumeError> {
        let len_bytes = range.end.saturating_sub(range.start);
        Ok(self.area.persist(self.check(range.start, len_bytes)?)?)
    }

    /// Makes everything durable whose write returned before this call.
    ///
    /// # Errors
    ///
    /// As [`Self::persist`].
    pub fn flush(&self) -> Result<(), VolumeError> {
        Ok(self.area.sync()?)
    }

    fn check_write(&self, offset: u64, len_bytes: u64) -> Result<Range<u64>, VolumeError> {
        if self.read_only() {
            return Err(VolumeError::ReadOnly);
        }
        self.check(offset, len_bytes)
    }

    fn check(&self, offset: u64, len_bytes: u64) -> Result<Range<u64>, VolumeError> {
        let size_bytes = self.size();
        match offset.checked_add(len_bytes) {
            Some(end) if end <= size_bytes => Ok(offset..end),
            _ => Err(VolumeError::OutOfRange { offset, len_bytes, size_bytes }),
        }
    }

    /// The units that lie wholly in `range`.
    fn whole_units(&self, range: &Range<u64>) -> Range<u64> {
        let unit = u64::from(self.geometry().unit_bytes());
        let end = range.end - range.end % unit;
        let start = range.start.next_multiple_of(unit).min(end);
        start..end
    }
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume")
            .field("backing", &self.backing().path())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

/// A range cut at block boundaries: at most one partial block, whole blocks, at most one partial block.
struct Pieces {
    head: Range<u64>,
    whole: Range<u64>,
    tail: Range<u64>,
}

impl Pieces {
    /// Every piece is in order and empty where there is nothing; together they are `range`.
    fn of(range: Range<u64>) -> Self {
        let whole_end = block_start(range.end);
        let whole_start = range.start.next_multiple_of(BLOCK_BYTES);
        if whole_start > whole_end {
            // Inside of one block.
            return Self { whole: range.end..range.end, tail: range.end..range.end, head: range };
        }
        Self { head: range.start..whole_start, whole: whole_start..whole_end, tail: whole_end..range.end }
    }
}

const fn block_start(offset: u64) -> u64 {
    offset - offset % BLOCK_BYTES
}

/// Where the bytes of `part`, which lies in one block, are inside of the block.
fn within_block(part: &Range<u64>) -> Range<usize> {
    let start = usize::try_from(part.start % BLOCK_BYTES).expect("less than a block");
    start..start + len(part)
}

/// The length of a range that is no longer than a buffer.
fn len(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("64-bit targets only")
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

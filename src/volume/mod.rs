//! The decrypted view of an unlocked namespace.
//!
//! A [`Volume`] reads and writes plaintext at logical offsets, from many threads at once. Plaintext exists in the
//! caller's buffers and, for a moment, in a 16-byte scratch block; ciphertext goes to and comes from media directly.
//!
//! Who may write what, together (the other half stands in `range_lock`): blocks are independent under XTS, so a write
//! of whole blocks stores them under a *shared* lock. A write with a partial first or last block, which is read, changed
//! and written back, holds its blocks under an *exclusive* lock, and so does every write once there is a `window` of
//! plaintext for direct maps. Two writers of the same bytes leave either one's block, as on a disk; writers of different
//! bytes never disturb each other.

mod area;
mod claims;
mod error;
mod life;
mod range_lock;
mod range_locked;
mod side;
mod sides;
mod transform;
pub(crate) mod window;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use zeroize::Zeroizing;

use self::area::{BLOCK_BYTES, DataArea, HeldBlocks, HeldRange};
pub(crate) use self::claims::ClaimGuard;
use self::claims::Claims;
pub use self::error::{EphemeralError, VolumeError};
use self::side::Side;
use self::transform::Engine;
pub use self::transform::{TransformProgress, WINDOW_BYTES};
use self::window::{Window, blocks_of};
use crate::luks2;
use crate::memory::{Source, Target};
use crate::namespace::{
    self, Credential, FormatOptions, Geometry, HEADER_AREA_BYTES, Header, LockedNamespace, Namespace, UnlockError,
};
use crate::pmem::{Access, Backing, Granularity, MediaError};
use crate::secret::VolumeKey;
use crate::xts::{BLOCK_BYTES as BLOCK_LEN, Backend};

/// An unlocked namespace: plaintext by logical offset.
pub struct Volume {
    area: DataArea,
    header: Header,
    /// Kept open, and with it locked, while the volume is in use; the data's backing unless the header is detached.
    _header_backing: Arc<Backing>,
    /// Made by the first direct map.
    window: OnceLock<Arc<Window>>,
    claims: Claims,
    /// Held for reading while a map is made, and for writing while the size changes: a map has the size that it was checked
    /// against. Asked after `engine` and before everything else.
    mapping: RwLock<()>,
    locked: AtomicBool,
    /// Owns the header and its keys; `None` when the volume is locked, or not a namespace of ours. Asked before anything of
    /// `area`, never while something of it is held.
    engine: Mutex<Option<Engine>>,
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
    /// The decrypted view of `namespace`, with kernels of `backend`. When it was being re-keyed, both halves are read and
    /// written, and [`Self::transform_step`] goes on.
    #[must_use]
    pub fn new(namespace: Namespace, backend: Backend) -> Self {
        let (geometry, header) = (*namespace.geometry(), namespace.header());
        let side = Side::new(geometry.layout(), namespace.volume_key(), backend);
        let area = DataArea::new(Arc::clone(namespace.backing()), geometry, side, header.discards);
        let header_backing = Arc::clone(namespace.header_backing());
        let engine = Engine::new(namespace, &area);
        Self::assemble(area, header, header_backing, Some(engine))
    }

    /// The decrypted view of a LUKS2 volume.
    #[must_use]
    pub fn from_luks2(unlocked: luks2::Unlocked, backend: Backend) -> Self {
        let (backing, header_backing, geometry, header, key) = unlocked.into_parts();
        let side = Side::new(geometry.layout(), &key, backend);
        let area = DataArea::new(backing, geometry, side, header.discards);
        Self::assemble(area, header, header_backing, None)
    }

    /// The same data area under another key: what its blocks read as, and what is written there, is nobody's but the
    /// holder's of that key. For filling a data area with noise.
    #[must_use]
    pub fn under_another_key(namespace: &Namespace, key: &VolumeKey, backend: Backend) -> Self {
        let (geometry, header) = (*namespace.geometry(), namespace.header());
        let side = Side::new(geometry.layout(), key, backend);
        let area = DataArea::new(Arc::clone(namespace.backing()), geometry, side, header.discards);
        Self::assemble(area, header, Arc::clone(namespace.header_backing()), None)
    }

    fn assemble(area: DataArea, header: Header, header_backing: Arc<Backing>, engine: Option<Engine>) -> Self {
        Self {
            area,
            header,
            _header_backing: header_backing,
            window: OnceLock::new(),
            claims: Claims::default(),
            mapping: RwLock::new(()),
            locked: AtomicBool::new(false),
            engine: Mutex::new(engine),
        }
    }

    /// Gives the namespace back, which may then change the header; nothing if the volume is locked or was not
    /// made from a namespace.
    #[must_use]
    pub fn into_namespace(self) -> Option<Namespace> {
        let engine = self.engine.into_inner().unwrap_or_else(PoisonError::into_inner);
        engine.map(Engine::into_namespace)
    }

    /// A volume of `size` bytes (a multiple of 4096) in anonymous memory, encrypted under a random key that nobody has and
    /// that ends with it: for secrets that are to be plaintext only in the pages of a [direct map](crate::dax) that are in
    /// use. It reads as noise until it is written.
    ///
    /// # Errors
    ///
    /// [`EphemeralError`] without memory or random bytes, or for a size that no volume can have.
    pub fn ephemeral(size: u64) -> Result<Self, EphemeralError> {
        let backing = Backing::anonymous(HEADER_AREA_BYTES.saturating_add(size))?;
        let options = FormatOptions { size_bytes: Some(size), ..FormatOptions::default() };
        let namespace = namespace::format_ephemeral(Arc::new(backing), options)?;
        Ok(Self::new(namespace, Backend::from_env()?))
    }

    /// Size of the decrypted view in bytes: a multiple of the data unit. [`Self::resize`] changes it.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.area.size_bytes()
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
    pub fn geometry(&self) -> Geometry {
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
        self.area.backend()
    }

    /// Whether discards punch holes, which then read as zeroes.
    #[must_use]
    pub const fn discards(&self) -> bool {
        self.area.holes()
    }

    /// Reads `buf.len()` bytes at `offset`. `buf` must not lie in a direct map of this volume: its pages could not be
    /// brought in while the read holds them.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`], or [`VolumeError::Media`] with `buf` zeroed.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let range = self.check(offset, buf.len() as u64)?;
        let held = self.area.shared(blocks_of(&range));
        let result = match self.window.get() {
            Some(window) => Self::read_coherent(held.blocks(), window, range, buf),
            None => read_media(held.blocks(), range, buf),
        };
        if result.is_err() {
            buf.fill(0);
        }
        result
    }

    /// As [`Self::read_at`], for much that is read once: the pages of a file are then not mapped, which is a good part of
    /// what reading them costs. `scratch` ends as ciphertext.
    ///
    /// # Errors
    ///
    /// As [`Self::read_at`].
    pub fn read_once(&self, buf: &mut [u8], offset: u64, scratch: &mut Vec<u8>) -> Result<(), VolumeError> {
        let range = self.check(offset, buf.len() as u64)?;
        let blocks = blocks_of(&range);
        if self.granularity() == Granularity::CacheLine || blocks != range || self.window.get().is_some() {
            return self.read_at(buf, offset);
        }
        let held = self.area.shared(blocks);
        if self.window.get().is_some() {
            drop(held);
            return self.read_at(buf, offset);
        }
        scratch.resize(scratch.len().max(buf.len()), 0);
        held.blocks().read_unmapped(offset, Target::from_slice(buf), scratch).inspect_err(|_| buf.fill(0))
    }

    /// Writes `data` at `offset`. Under cache-line granularity it is durable on return; under page granularity
    /// [`Self::persist`] or [`Self::flush`] makes it so. `data` must not lie in a direct map of this volume, as for
    /// [`Self::read_at`]: the call could wait for ever.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::ReadOnly`], with nothing written; [`VolumeError::Media`], after
    /// which each block holds its old or its new content.
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), VolumeError> {
        let range = self.check_write(offset, data.len() as u64)?;
        let (held, window) = self.hold_for_write(&range)?;
        match window {
            Some(window) => self.write_coherent(held.blocks(), window, range, data),
            None => write_media(held.blocks(), range, data),
        }
    }

    /// As [`Self::write_at`], for much that is written once and by nobody else: the pages of a file are then not mapped,
    /// which is a good part of what writing them costs. `scratch` ends as ciphertext.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn write_once(&self, data: &[u8], offset: u64, scratch: &mut Vec<u8>) -> Result<(), VolumeError> {
        let range = self.check_write(offset, data.len() as u64)?;
        let by_mapping = self.granularity() == Granularity::CacheLine || blocks_of(&range) != range;
        let (held, window) = self.hold_for_write(&range)?;
        if by_mapping || window.is_some() {
            drop(held);
            return self.write_at(data, offset);
        }
        scratch.resize(scratch.len().max(data.len()), 0);
        held.blocks().write_unmapped(offset, Source::from_slice(data), scratch)
    }

    /// Holds the blocks of `range` as a write needs them, and tells of the window to keep coherent. A window that comes
    /// later stays empty there until the hold ends.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Claimed`] when a part of the range is mapped exclusively.
    fn hold_for_write(&self, range: &Range<u64>) -> Result<(HeldRange<'_>, Option<&Window>), VolumeError> {
        let blocks = blocks_of(range);
        let shared = self.window.get().is_none() && blocks == *range;
        let mut held = if shared { self.area.shared(blocks.clone()) } else { self.area.exclusive(blocks.clone()) };
        if shared && self.window.get().is_some() {
            drop(held);
            held = self.area.exclusive(blocks);
        }
        if self.claims.refuses(range) {
            return Err(VolumeError::Claimed { start: range.start, end: range.end });
        }
        Ok((held, self.window.get().map(Arc::as_ref)))
    }

    /// Writes zeroes over `len_bytes` bytes at `offset`, encrypted like any data.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let range = self.check_write(offset, len_bytes)?;
        let (held, window) = self.hold_for_write(&range)?;
        let held = held.blocks();
        let pieces = Pieces::of(range.clone());
        let zeroes = [0; BLOCK_LEN];
        self.zero_part(held, window, &pieces.head, &zeroes)?;
        if !pieces.whole.is_empty() {
            held.write_zeroes(pieces.whole.clone())?;
            if let Some(window) = window {
                Self::zero_resident(window, &pieces.whole);
            }
        }
        self.zero_part(held, window, &pieces.tail, &zeroes)
    }

    fn zero_part(
        &self,
        held: HeldBlocks<'_>,
        window: Option<&Window>,
        part: &Range<u64>,
        zeroes: &[u8],
    ) -> Result<(), VolumeError> {
        let zeroes = &zeroes[..len(part)];
        match window {
            Some(window) => self.write_coherent(held, window, part.clone(), zeroes),
            None => write_part(held, part, zeroes),
        }
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

    /// Makes `len_bytes` bytes at `offset` read as zeroes by giving their blocks back, if they are whole units and the
    /// filesystem can: otherwise gives `false`, with nothing changed and nothing read.
    ///
    /// # Errors
    ///
    /// As [`Self::write_at`].
    pub fn punch_only(&self, offset: u64, len_bytes: u64) -> Result<bool, VolumeError> {
        let range = self.check_write(offset, len_bytes)?;
        Ok(self.discards() && self.whole_units(&range) == range && self.punch(&range)?)
    }

    /// Asks for `len_bytes` bytes of ciphertext at `offset` to be read into the kernel's cache soon. `false` where there is no
    /// such cache.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::Media`].
    pub fn prefetch(&self, offset: u64, len_bytes: u64) -> Result<bool, VolumeError> {
        let range = self.check(offset, len_bytes)?;
        self.area.shared(range.clone()).blocks().prefetch(range)
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
        let (held, window) = self.hold_for_write(units)?;
        match held.blocks().punch(units.clone()) {
            Ok(()) => {
                if let Some(window) = window {
                    Self::zero_resident(window, units);
                }
                Ok(true)
            }
            Err(VolumeError::Media(MediaError::Unsupported)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The runs of holes and of data from `offset` on, which add up to `len_bytes` or, when there would be more than
    /// `count_max` runs, to less. Without [`Self::discards`], and where a direct map may have stored into a hole,
    /// everything is data.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::Media`].
    pub fn extents(&self, offset: u64, len_bytes: u64, count_max: usize) -> Result<Vec<VolumeExtent>, VolumeError> {
        let range = self.check(offset, len_bytes)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let resident = self.window.get().and_then(|window| window.next_resident(&range)).is_some();
        if !self.discards() || resident {
            return Ok(vec![VolumeExtent { len_bytes, hole: false }]);
        }
        let extents = self.area.shared(range.clone()).blocks().extents(range, count_max)?;
        Ok(extents
            .iter()
            .map(|run| VolumeExtent { len_bytes: run.range.end - run.range.start, hole: !run.allocated })
            .collect())
    }

    /// Makes what was written to `range` durable: flush and drain of that range.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`] or [`VolumeError::Media`]; after a failed flush every later one fails too, until the
    /// namespace is reopened, because nobody knows what reached the medium.
    pub fn persist(&self, range: Range<u64>) -> Result<(), VolumeError> {
        let len_bytes = range.end.saturating_sub(range.start);
        self.persist_media(self.check(range.start, len_bytes)?)
    }

    /// [`Self::persist`] of a checked range.
    fn persist_media(&self, range: Range<u64>) -> Result<(), VolumeError> {
        self.check_unlocked()?;
        self.area.shared(range.clone()).blocks().persist(range)
    }

    /// Bytes of plaintext that direct maps of this volume keep in memory now.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let shared = self.window.get().map_or(0, |window| window.resident_bytes());
        shared + self.claims.windows().iter().map(|window| window.resident_bytes()).sum::<u64>()
    }

    /// Makes everything durable whose write returned before this call.
    ///
    /// # Errors
    ///
    /// As [`Self::persist`].
    pub fn flush(&self) -> Result<(), VolumeError> {
        self.check_unlocked()?;
        Ok(self.area.sync()?)
    }

    /// Whether [`Self::lock`] has wiped the key: every request then fails with [`VolumeError::Locked`].
    #[must_use]
    pub fn locked(&self) -> bool {
        self.locked.load(Ordering::SeqCst)
    }

    fn check_unlocked(&self) -> Result<(), VolumeError> {
        if self.locked() { Err(VolumeError::Locked) } else { Ok(()) }
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

/// Reads what the caller holds.
fn read_media(held: HeldBlocks<'_>, range: Range<u64>, buf: &mut [u8]) -> Result<(), VolumeError> {
    let pieces = Pieces::of(range);
    let (head, rest) = buf.split_at_mut(len(&pieces.head));
    let (whole, tail) = rest.split_at_mut(len(&pieces.whole));
    read_part(held, &pieces.head, head)?;
    if !whole.is_empty() {
        held.read(pieces.whole.start, Target::from_slice(whole))?;
    }
    read_part(held, &pieces.tail, tail)
}

/// Reads a part of one block.
fn read_part(held: HeldBlocks<'_>, part: &Range<u64>, out: &mut [u8]) -> Result<(), VolumeError> {
    if part.is_empty() {
        return Ok(());
    }
    let mut block = Zeroizing::new([0; BLOCK_LEN]);
    held.read(block_start(part.start), Target::from_slice(&mut *block))?;
    out.copy_from_slice(&block[within_block(part)]);
    Ok(())
}

/// Writes to media what the caller holds.
fn write_media(held: HeldBlocks<'_>, range: Range<u64>, data: &[u8]) -> Result<(), VolumeError> {
    let pieces = Pieces::of(range);
    let (head, rest) = data.split_at(len(&pieces.head));
    let (whole, tail) = rest.split_at(len(&pieces.whole));
    write_part(held, &pieces.head, head)?;
    if !whole.is_empty() {
        held.write(pieces.whole.start, Source::from_slice(whole))?;
    }
    write_part(held, &pieces.tail, tail)
}

/// Changes a part of one block, which the caller holds exclusively: the only read-modify-write there is.
fn write_part(held: HeldBlocks<'_>, part: &Range<u64>, data: &[u8]) -> Result<(), VolumeError> {
    if part.is_empty() {
        return Ok(());
    }
    let start = block_start(part.start);
    let mut block = Zeroizing::new([0; BLOCK_LEN]);
    held.read(start, Target::from_slice(&mut *block))?;
    block[within_block(part)].copy_from_slice(data);
    held.write(start, Source::from_slice(&*block))?;
    Ok(())
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

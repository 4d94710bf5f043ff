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
mod begin;
mod buffers;
mod claims;
mod error;
mod life;
mod range_lock;
mod range_locked;
mod reopen;
mod requests;
mod side;
mod sides;
mod transform;
pub(crate) mod window;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use self::area::{BLOCK_BYTES, DataArea};
pub use self::begin::BeginError;
pub(crate) use self::claims::ClaimGuard;
use self::claims::Claims;
pub use self::error::{EphemeralError, VolumeError};
pub(crate) use self::requests::write_pieces;
use self::side::Side;
use self::transform::Engine;
pub use self::transform::{TransformProgress, WINDOW_BYTES};
use self::window::Window;
#[cfg(feature = "luks2")]
use crate::luks2;
use crate::namespace::{
    self, Credential, FormatOptions, Geometry, HEADER_AREA_BYTES, Header, LockedNamespace, Namespace, UnlockError,
};
use crate::owner::Owner;
use crate::pmem::{Access, Backing, Granularity, RangeUse};
use crate::secret::VolumeKey;
use crate::xts::Backend;

/// An unlocked namespace: plaintext by logical offset.
pub struct Volume {
    area: DataArea,
    header: Header,
    /// Kept open, and with it locked, while the volume is in use; the data's backing unless the header is detached.
    header_backing: Arc<Backing>,
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
    /// The process that opened it: its keys are nowhere else.
    owner: Owner,
    /// Keeps other volumes off these bytes; `None` in one that came too late, and that nobody may use.
    in_use: Option<RangeUse>,
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
        let volume = Volume::new(self.unlock_key(credential)?, Backend::from_env().map_err(VolumeError::from)?);
        volume.check_owner()?;
        Ok(volume)
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
    /// written, and [`Self::transform_step`] goes on. While another volume uses the same bytes of the same backing, every call
    /// fails with [`VolumeError::InUse`].
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
    #[cfg(feature = "luks2")]
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
        let geometry = area.geometry();
        let range = geometry.layout().physical_range(0..geometry.size_bytes());
        let in_use = range.ok().and_then(|range| RangeUse::take(area.backing(), range));
        let owner = if in_use.is_some() { area.backing().owner() } else { Owner::nobody() };
        Self {
            owner,
            in_use,
            area,
            header,
            header_backing,
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

    /// Makes what was written to `range` durable: flush and drain of that range.
    ///
    /// # Errors
    ///
    /// [`VolumeError::OutOfRange`], [`VolumeError::Reversed`] or [`VolumeError::Media`]; after a failed flush every later one
    /// fails too, until the namespace is reopened, because nobody knows what reached the medium.
    pub fn persist(&self, range: Range<u64>) -> Result<(), VolumeError> {
        if range.start > range.end {
            return Err(VolumeError::Reversed { start: range.start, end: range.end });
        }
        self.persist_media(self.check(range.start, range.end - range.start)?)
    }

    /// [`Self::persist`] of a checked range.
    fn persist_media(&self, range: Range<u64>) -> Result<(), VolumeError> {
        self.check_unlocked()?;
        self.area.persist(range)
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

    /// Whether this process opened the volume, and is no child of the one that did.
    pub(crate) fn is_here(&self) -> bool {
        self.owner.is_here()
    }

    /// Refuses in a forked child: asked first at every entry, before a lock that nobody there could let go of.
    #[inline]
    pub(crate) fn check_owner(&self) -> Result<(), VolumeError> {
        if self.is_here() { Ok(()) } else { Err(self.refusal()) }
    }

    #[cold]
    const fn refusal(&self) -> VolumeError {
        if self.in_use.is_none() { VolumeError::InUse } else { VolumeError::Forked }
    }

    fn check_unlocked(&self) -> Result<(), VolumeError> {
        self.check_owner()?;
        if self.locked() { Err(VolumeError::Locked) } else { Ok(()) }
    }

    fn check_write(&self, offset: u64, len_bytes: u64) -> Result<Range<u64>, VolumeError> {
        self.check_owner()?;
        if self.read_only() {
            return Err(VolumeError::ReadOnly);
        }
        self.check(offset, len_bytes)
    }

    fn check(&self, offset: u64, len_bytes: u64) -> Result<Range<u64>, VolumeError> {
        self.check_owner()?;
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

//! The data area: whole 16-byte blocks between ciphertext on media and plaintext in memory.
//!
//! Everything here is aligned to blocks; byte granularity and the order of writers are the volume's part. Under cache-line
//! granularity what is written is also flushed here (write-through), so that [`DataArea::sync`] has little left to do.
//!
//! While the volume is being re-keyed the area has two sides, and a boundary between them that moves window by window.
//! Every access is cut at the boundary. It holds its range in `moving` meanwhile, and the window that moves is held there
//! exclusively: so the boundary never passes through an access, and an access waits for no more than the window that it
//! touches. Without a transform `moving` is not asked; an access then holds `sides` instead, and a transform begins when
//! all of those have ended. Both are taken last and given back before anything else is asked for. A locked volume has no
//! sides, and so no keys.
//!
//! The size can change, when no transform is under way: the side is then replaced by one of the new size, when all accesses
//! to the present one have ended. So each access is checked against the size here too, under the same guard.
//!
//! With discards, a block whose ciphertext is all zero bytes stands for a hole and reads as zeroes. Real data looks so
//! with a probability of 2^-128 a block, and no other place can forget which units are holes.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use zeroize::Zeroizing;

use super::error::VolumeError;
use super::range_lock::{RangeGuard, RangeLock};
use super::side::{Side, zero_holes};
use crate::memory::{Source, Target};
use crate::namespace::Geometry;
use crate::pmem::{Backing, BackingExtent, Granularity, MediaError};
use crate::secret;
use crate::xts::{BLOCK_BYTES as BLOCK_LEN, Backend};

/// Bytes of an AES block as an offset: the smallest piece of ciphertext that can be rewritten alone.
pub(crate) const BLOCK_BYTES: u64 = BLOCK_LEN as u64;

/// Bytes of a cache line, which have a kernel of their own.
const LINE_BYTES: usize = 64;

/// A pattern of zeroes to encrypt from; a multiple of both data units.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// How much of a window is plaintext at a time while it moves: a multiple of both data units that stays in the cache.
const MOVING_PIECE_BYTES: usize = 64 << 10;

/// Ciphertext on one backing.
#[derive(Debug)]
pub(crate) struct DataArea {
    backing: Arc<Backing>,
    /// As it was when the volume was opened; the size is the next field.
    geometry: Geometry,
    /// Changes only under `sides`, held for writing.
    size_bytes: AtomicU64,
    backend: Backend,
    /// Whether all-zero ciphertext blocks are holes.
    holes: bool,
    /// `None` when the volume is locked.
    sides: RwLock<Option<Sides>>,
    /// Over logical offsets; asked only while there is a former side.
    moving: RangeLock,
}

#[derive(Debug)]
struct Sides {
    current: Arc<Side>,
    former: Option<Former>,
}

/// The side that data is leaving.
#[derive(Debug)]
struct Former {
    side: Arc<Side>,
    /// Whether the last byte moved first.
    backward: bool,
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
struct Saved {
    former: Arc<Side>,
    part: Range<u64>,
    ciphertext: Arc<[u8]>,
    /// Where the part begins in the ciphertext.
    skip: usize,
}

impl Saved {
    fn read(&self, holes: bool, out: Target<'_>) {
        let mut out = out;
        let ciphertext = &self.ciphertext[self.skip..self.skip + out.len()];
        self.former.decrypt(self.part.start, Source::from_slice(ciphertext), out.reborrow());
        if holes {
            zero_holes(ciphertext, out);
        }
    }
}

impl Former {
    fn boundary(&self, size_bytes: u64) -> u64 {
        if self.backward { size_bytes - self.done_bytes } else { self.done_bytes }
    }
}

/// A part of a range, and the side that it is on.
type Part = (Arc<Side>, Range<u64>);

impl DataArea {
    /// The area with one side.
    pub(crate) fn new(backing: Arc<Backing>, geometry: Geometry, side: Side, holes: bool) -> Self {
        let backend = side.key().backend();
        let sides = RwLock::new(Some(Sides { current: Arc::new(side), former: None }));
        let size_bytes = AtomicU64::new(geometry.size_bytes());
        Self { backing, geometry, size_bytes, backend, holes, sides, moving: RangeLock::default() }
    }

    pub(crate) fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// Where the data lay when the volume was opened, or is moving to since then, with the size that it has now.
    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry.with_size(self.size_bytes())
    }

    /// The size now.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Gives the area the size of `side`, which is the present one but for that. Waits for all accesses; those that come
    /// later and reach past the end fail.
    pub(crate) fn resize(&self, side: Side, size_bytes: u64) {
        // Accesses that began during a transform which has ended since hold this, and not `sides`.
        let _ended = self.moving.exclusive(0..u64::MAX);
        let mut sides = self.sides_mut();
        if let Some(sides) = sides.as_mut() {
            debug_assert!(sides.former.is_none(), "a transform keeps its size");
            sides.current = Arc::new(side);
        }
        self.size_bytes.store(size_bytes, Ordering::Release);
    }

    /// Checks a range once more, under `sides`: the size may have changed since the volume did.
    fn check(&self, range: &Range<u64>) -> Result<(), VolumeError> {
        let size_bytes = self.size_bytes();
        if range.end <= size_bytes {
            return Ok(());
        }
        let (offset, len_bytes) = (range.start, range.end.saturating_sub(range.start));
        Err(VolumeError::OutOfRange { offset, len_bytes, size_bytes })
    }

    pub(crate) const fn backend(&self) -> Backend {
        self.backend
    }

    /// Wipes the keys, once every access has ended. All that come later fail.
    pub(crate) fn forget_keys(&self) {
        self.sides_mut().take();
    }

    pub(crate) const fn holes(&self) -> bool {
        self.holes
    }

    /// Decrypts the blocks at logical `offset` to `out`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`]; `out` may then hold anything that was read before, so the caller
    /// must not pass it on.
    pub(crate) fn read(&self, offset: u64, out: Target<'_>) -> Result<(), VolumeError> {
        let mut out = out;
        let len_bytes = out.len();
        let range = offset..offset + len_bytes as u64;
        let result = match self.saved(&range) {
            None => self.read_sides(range, out),
            Some(saved) => {
                let (before, after) = (range.start..saved.part.start, saved.part.end..range.end);
                saved.read(self.holes, out.reborrow().slice(relative(&saved.part, offset)));
                self.read_sides(before.clone(), out.reborrow().slice(relative(&before, offset)))
                    .and_then(|()| self.read_sides(after.clone(), out.reborrow().slice(relative(&after, offset))))
            }
        };
        scrub_after(len_bytes);
        result
    }

    fn read_sides(&self, range: Range<u64>, out: Target<'_>) -> Result<(), VolumeError> {
        let (mut out, offset) = (out, range.start);
        self.on_sides(range, |side, part| {
            let out = out.reborrow().slice(relative(&part, offset));
            side.read(&self.backing, self.holes, part.start, out)
        })
    }

    /// What of `range` can be read from the saved ciphertext of a blocked window only.
    fn saved(&self, range: &Range<u64>) -> Option<Saved> {
        let sides = self.sides();
        let former = sides.as_ref()?.former.as_ref()?;
        let Blocked { window, saved: Some(ciphertext) } = former.blocked.as_ref()? else { return None };
        let part = range.start.max(window.start)..range.end.min(window.end);
        let skip = usize::try_from(part.start - window.start).expect("a window is in memory");
        let (former, ciphertext) = (Arc::clone(&former.side), Arc::clone(ciphertext));
        (part.start < part.end).then_some(Saved { former, part, ciphertext, skip })
    }

    /// Encrypts `plaintext` over the blocks at logical `offset`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`]; the blocks then hold old or new ciphertext, each.
    pub(crate) fn write(&self, offset: u64, plaintext: Source<'_>) -> Result<(), VolumeError> {
        let len_bytes = plaintext.len();
        let result = self.on_sides(offset..offset + len_bytes as u64, |side, part| {
            let plaintext = plaintext.slice(relative(&part, offset));
            match self.backing.granularity() {
                Granularity::Page => side.store(&self.backing, part.start, plaintext),
                // Not every backend has non-temporal stores, and none uses them at ragged ends. Writing back a line that
                // is not in the cache costs little; believing that it is on media when it is not costs the data.
                Granularity::CacheLine => side.store_through(&self.backing, part.start, plaintext),
            }
        });
        scrub_after(len_bytes);
        result
    }

    /// As [`Self::read`], by way of `scratch`, which is at least as long as what is read.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub(crate) fn read_unmapped(&self, offset: u64, out: Target<'_>, scratch: &mut [u8]) -> Result<(), VolumeError> {
        let mut out = out;
        let len_bytes = out.len();
        let range = offset..offset + len_bytes as u64;
        if self.saved(&range).is_some() {
            return self.read(offset, out);
        }
        let result = self.on_sides(range, |side, part| {
            let out = out.reborrow().slice(relative(&part, offset));
            let scratch = &mut scratch[..out.len()];
            side.read_unmapped(&self.backing, self.holes, part.start, out, scratch)
        });
        scrub_after(len_bytes);
        result
    }

    /// As [`Self::write`] at page granularity, by way of `scratch`, which is at least as long as the plaintext.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(crate) fn write_unmapped(
        &self,
        offset: u64,
        plaintext: Source<'_>,
        scratch: &mut [u8],
    ) -> Result<(), VolumeError> {
        let len_bytes = plaintext.len();
        let result = self.on_sides(offset..offset + len_bytes as u64, |side, part| {
            let plaintext = plaintext.slice(relative(&part, offset));
            let scratch = &mut scratch[..plaintext.len()];
            side.store_unmapped(&self.backing, part.start, plaintext, scratch)
        });
        scrub_after(len_bytes);
        result
    }

    /// Encrypts zeroes over the blocks of logical `range`.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(crate) fn write_zeroes(&self, range: Range<u64>) -> Result<(), VolumeError> {
        let mut offset = range.start;
        while offset < range.end {
            let len_bytes = (range.end - offset).min(ZEROES.len() as u64);
            let len = usize::try_from(len_bytes).expect("at most the pattern's length");
            self.write(offset, Source::from_slice(&ZEROES[..len]))?;
            offset += len_bytes;
        }
        Ok(())
    }

    /// Punches the ciphertext of logical `range`, which is made of whole units.
    ///
    /// # Errors
    ///
    /// What the medium says, [`MediaError::Unsupported`] included, and [`VolumeError::Locked`].
    pub(crate) fn punch(&self, range: Range<u64>) -> Result<(), VolumeError> {
        debug_assert!(self.holes, "without the flag a hole would read as noise");
        self.on_sides(range, |side, part| self.backing.punch_hole(side.physical(part)))
    }

    /// Where the backing has blocks and where not, in logical `range`: runs in order.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`].
    pub(crate) fn extents(&self, range: Range<u64>) -> Result<Vec<BackingExtent>, VolumeError> {
        let Some(Saved { part, .. }) = self.saved(&range) else { return self.extents_of_sides(range) };
        let mut extents = self.extents_of_sides(range.start..part.start)?;
        let after = part.end..range.end;
        extents.push(BackingExtent { range: part, allocated: true });
        extents.extend(self.extents_of_sides(after)?);
        Ok(extents)
    }

    fn extents_of_sides(&self, range: Range<u64>) -> Result<Vec<BackingExtent>, VolumeError> {
        let mut extents = Vec::new();
        self.on_sides(range, |side, part| {
            extents.extend(self.backing.extents(side.physical(part))?);
            Ok(())
        })?;
        Ok(extents)
    }

    /// Makes what was written to logical `range` durable.
    ///
    /// # Errors
    ///
    /// What the medium says, after which the backing is poisoned until it is reopened, and [`VolumeError::Locked`].
    pub(crate) fn persist(&self, range: Range<u64>) -> Result<(), VolumeError> {
        match self.backing.granularity() {
            // Writes are durable already; holes that were punched are metadata, which only a sync makes so.
            Granularity::CacheLine => Ok(self.backing.sync_all()?),
            Granularity::Page => self.on_sides(range, |side, part| self.backing.persist(side.physical(part))),
        }
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    ///
    /// What the medium says, after which the backing is poisoned until it is reopened.
    pub(crate) fn sync(&self) -> Result<(), MediaError> {
        self.backing.sync_all()
    }

    /// Runs `access` on the parts of logical `range`, one on each side that it touches.
    fn on_sides(
        &self,
        range: Range<u64>,
        mut access: impl FnMut(&Side, Range<u64>) -> Result<(), MediaError>,
    ) -> Result<(), VolumeError> {
        {
            let sides = self.sides();
            let sides = sides.as_ref().ok_or(VolumeError::Locked)?;
            self.check(&range)?;
            if sides.former.is_none() {
                return Ok(access(&sides.current, range)?);
            }
        }
        if range.is_empty() {
            return Ok(()); // not even where nothing could be accessed
        }
        let _held = self.moving.shared(range.clone());
        for (side, part) in self.parts(range)?.into_iter().flatten() {
            access(&side, part)?;
        }
        Ok(())
    }

    /// Cuts `range`, which is held, at the boundary.
    fn parts(&self, range: Range<u64>) -> Result<[Option<Part>; 2], VolumeError> {
        let sides = self.sides();
        let sides = sides.as_ref().ok_or(VolumeError::Locked)?;
        self.check(&range)?;
        let Some(former) = &sides.former else { return Ok([Some((Arc::clone(&sides.current), range)), None]) };
        let blocked = former.blocked.as_ref().map(|blocked| &blocked.window);
        if blocked.is_some_and(|blocked| range.start < blocked.end && blocked.start < range.end) {
            return Err(MediaError::Poisoned.into());
        }
        let boundary = former.boundary(self.size_bytes()).clamp(range.start, range.end);
        let (low, high) = if former.backward { (&former.side, &sides.current) } else { (&sides.current, &former.side) };
        let part = |side: &Arc<Side>, range: Range<u64>| (!range.is_empty()).then(|| (Arc::clone(side), range));
        Ok([part(low, range.start..boundary), part(high, boundary..range.end)])
    }

    fn sides(&self) -> RwLockReadGuard<'_, Option<Sides>> {
        self.sides.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn sides_mut(&self) -> RwLockWriteGuard<'_, Option<Sides>> {
        self.sides.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the engine of a transform does to the area. A locked volume has no engine, so there are sides.
impl DataArea {
    /// The present side becomes the former one, nothing of which has moved to `side` yet. Waits for all accesses.
    pub(crate) fn begin_transform(&self, side: Side, backward: bool) {
        if let Some(sides) = self.sides_mut().as_mut() {
            let former = std::mem::replace(&mut sides.current, Arc::new(side));
            sides.former = Some(Former { side: former, backward, done_bytes: 0, blocked: None });
        }
    }

    /// Goes on with a transform: the area was made with its new side. Before anybody else has the area.
    pub(crate) fn resume_transform(&self, former: Side, backward: bool, done_bytes: u64) {
        if let Some(sides) = self.sides_mut().as_mut() {
            sides.former = Some(Former { side: Arc::new(former), backward, done_bytes, blocked: None });
        }
    }

    pub(crate) fn is_transforming(&self) -> bool {
        self.sides().as_ref().is_some_and(|sides| sides.former.is_some())
    }

    /// Holds a window that moves: nobody reads or writes it until the guard is dropped.
    pub(crate) fn hold(&self, window: Range<u64>) -> RangeGuard<'_> {
        self.moving.exclusive(window)
    }

    /// Fails every access to `window` from now on, until the boundary has passed it; reads only where its ciphertext was
    /// not `saved`.
    pub(crate) fn block(&self, window: Range<u64>, saved: Option<Vec<u8>>) {
        let saved = saved.map(Arc::from);
        self.change_former(|former| former.blocked = Some(Blocked { window, saved }));
    }

    /// Moves the boundary over the window that is held.
    pub(crate) fn advance(&self, done_bytes: u64) {
        self.change_former(|former| {
            former.done_bytes = done_bytes;
            former.blocked = None;
        });
    }

    fn change_former(&self, change: impl FnOnce(&mut Former)) {
        if let Some(former) = self.sides_mut().as_mut().and_then(|sides| sides.former.as_mut()) {
            change(former);
        }
    }

    /// Everything has arrived: the former side and its key are wiped as soon as the last access has dropped them.
    pub(crate) fn end_transform(&self) {
        if let Some(sides) = self.sides_mut().as_mut() {
            sides.former = None;
        }
    }

    /// The ciphertext of `window`, which is held, on the former side.
    pub(crate) fn read_former(&self, window: Range<u64>, ciphertext: &mut [u8]) -> Result<(), MediaError> {
        let (former, _) = self.both_sides();
        self.backing.read(former.physical(window), |source| source.copy_to(ciphertext))
    }

    /// Encrypts `window`, which is held, for the new side from its ciphertext on the former one, and makes it durable.
    /// The same again gives the same.
    pub(crate) fn store_moved(&self, window: Range<u64>, ciphertext: &[u8]) -> Result<(), MediaError> {
        let (former, current) = self.both_sides();
        let result = self.store_pieces(&former, &current, window.start, ciphertext);
        secret::scrub_stack();
        result?;
        self.backing.persist(current.physical(window))
    }

    fn store_pieces(&self, former: &Side, current: &Side, start: u64, ciphertext: &[u8]) -> Result<(), MediaError> {
        let in_place = former.data_start() == current.data_start();
        let mut plaintext = Zeroizing::new(vec![0; MOVING_PIECE_BYTES.min(ciphertext.len())]);
        for (index, piece) in ciphertext.chunks(MOVING_PIECE_BYTES).enumerate() {
            if self.holes && in_place && piece.iter().all(|&byte| byte == 0) {
                continue; // a hole stays as it is, without blocks
            }
            let offset = start + (index * MOVING_PIECE_BYTES) as u64;
            let plaintext = &mut plaintext[..piece.len()];
            former.decrypt(offset, Source::from_slice(piece), Target::from_slice(plaintext));
            if self.holes {
                current.encrypt_in_place(offset, Target::from_slice(plaintext));
                zero_holes(piece, Target::from_slice(plaintext));
                let range = current.physical(offset..offset + piece.len() as u64);
                self.backing.write(range, |mut target| target.copy_from(plaintext))?;
            } else {
                current.store(&self.backing, offset, Source::from_slice(plaintext))?;
            }
        }
        Ok(())
    }

    fn both_sides(&self) -> (Arc<Side>, Arc<Side>) {
        let sides = self.sides();
        let both = sides.as_ref().and_then(|sides| Some((sides.former.as_ref()?, &sides.current)));
        let (former, current) = both.expect("the engine moves windows only while there is a former side");
        (Arc::clone(&former.side), Arc::clone(current))
    }
}

/// Overwrites what a kernel for so many bytes may have left in its stack frame: a cache line stays in registers.
fn scrub_after(len_bytes: usize) {
    if len_bytes > LINE_BYTES {
        secret::scrub_stack();
    }
}

/// Where `part` lies in a buffer that begins at `offset`.
fn relative(part: &Range<u64>, offset: u64) -> Range<usize> {
    let at = |position: u64| usize::try_from(position - offset).expect("within a buffer");
    at(part.start)..at(part.end)
}

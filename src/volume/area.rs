//! The data area: whole 16-byte blocks between ciphertext on media and plaintext in memory.
//!
//! Everything here is aligned to blocks; byte granularity and the order of writers are the volume's part. Who reads or writes
//! holds the range, and may do so through [`HeldBlocks`]. Under cache-line granularity what is written is also flushed here
//! (write-through), so that [`DataArea::sync`] has little left to do.
//!
//! While the volume is being re-keyed the area has two sides, and a boundary between them that moves window by window.
//! Every access is cut at the boundary. The window that moves is held exclusively: so the boundary never passes through an
//! access, and an access waits for no more than the window that it touches. Sides come and go when nobody holds anything. A
//! locked volume has no sides, and so no keys.
//!
//! The size can change, when no transform is under way: the side is then replaced by one of the new size. So each access is
//! checked against the size here too.
//!
//! With discards, a block whose ciphertext is all zero bytes stands for a hole and reads as zeroes. Real data looks so
//! with a probability of 2^-128 a block, and no other place can forget which units are holes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::VolumeError;
use super::range_lock::ForAll;
use super::range_locked::{Held, HeldAlone, RangeLocked};
use super::side::Side;
use super::sides::{Former, Saved, Sides};
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

/// Ciphertext on one backing.
#[derive(Debug)]
pub(crate) struct DataArea {
    backing: Arc<Backing>,
    /// As it was when the volume was opened; the size is the next field.
    geometry: Geometry,
    /// Changes only while all of `sides` is held.
    size_bytes: AtomicU64,
    backend: Backend,
    /// Whether all-zero ciphertext blocks are holes.
    holes: bool,
    /// By ranges of logical offsets; `None` when the volume is locked.
    sides: RangeLocked<Option<Sides>>,
}

/// A range that is held, shared or exclusively.
#[must_use = "the range is free again as soon as this is dropped"]
pub(super) struct HeldRange<'a> {
    area: &'a DataArea,
    sides: Held<'a, Option<Sides>>,
}

/// Everything is held.
#[must_use = "everything is free again as soon as this is dropped"]
pub(super) struct HeldArea<'a> {
    area: &'a DataArea,
    sides: HeldAlone<'a, Option<Sides>>,
}

/// What may be done to what is held.
#[derive(Clone, Copy)]
pub(super) struct HeldBlocks<'a> {
    area: &'a DataArea,
    sides: Option<&'a Sides>,
}

/// Where a part of a range is.
enum Place {
    /// Bytes of the backing.
    OnMedia(Range<u64>),
    /// Logical bytes of a window that was being moved, whose ciphertext is in memory.
    Saved(Range<u64>),
}

/// A window that moves, and that nobody else reads or writes meanwhile.
pub(super) struct MovingWindow<'a> {
    area: &'a DataArea,
    held: Held<'a, Option<Sides>>,
    window: Range<u64>,
}

impl DataArea {
    /// The area with one side.
    pub(crate) fn new(backing: Arc<Backing>, geometry: Geometry, side: Side, holes: bool) -> Self {
        let backend = side.key().backend();
        let sides = RangeLocked::new(Some(Sides { current: side, former: None }));
        let size_bytes = AtomicU64::new(geometry.size_bytes());
        Self { backing, geometry, size_bytes, backend, holes, sides }
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
        let mut sides = self.sides.alone();
        if let Some(sides) = sides.as_mut() {
            debug_assert!(sides.former.is_none(), "a transform keeps its size");
            sides.current = side;
        }
        self.size_bytes.store(size_bytes, Ordering::Release);
    }

    /// Takes the sides, and with them the keys, of an area of the same geometry.
    pub(super) fn take_keys_of(&self, other: &Self) {
        let keys = other.sides.alone().take();
        *self.sides.alone() = keys;
    }

    pub(crate) const fn backend(&self) -> Backend {
        self.backend
    }

    pub(crate) const fn holes(&self) -> bool {
        self.holes
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    ///
    /// What the medium says, after which the backing is poisoned until it is reopened.
    pub(crate) fn sync(&self) -> Result<(), MediaError> {
        self.backing.sync_all()
    }

    /// Overwrites what a kernel for so many bytes may have left in its stack frame.
    fn scrub_after(&self, len_bytes: usize) {
        if len_bytes > LINE_BYTES || !self.backend.keeps_lines_in_registers() {
            secret::scrub_stack();
        }
    }

    /// Holds logical `range` together with others who share it.
    pub(super) fn shared(&self, range: Range<u64>) -> HeldRange<'_> {
        HeldRange { area: self, sides: self.sides.shared(range) }
    }

    /// Holds logical `range` alone.
    pub(super) fn exclusive(&self, range: Range<u64>) -> HeldRange<'_> {
        HeldRange { area: self, sides: self.sides.exclusive(range) }
    }

    /// As [`Self::exclusive`], if it can be had at once and nothing moves: what [`HeldBlocks::read`] does then is
    /// async-signal-safe too.
    pub(super) fn try_exclusive(&self, range: Range<u64>) -> Option<HeldRange<'_>> {
        let sides = self.sides.try_exclusive(range)?;
        // Where the boundary is stands behind a lock that waits.
        let moves = sides.as_ref().is_some_and(|sides| sides.former.is_some());
        (!moves).then_some(HeldRange { area: self, sides })
    }

    /// Whether a handler of signals has come upon this thread while it holds a range or waits for one.
    pub(super) fn is_entered_here(&self) -> bool {
        self.sides.is_entered_here()
    }

    /// As [`Self::exclusive`]; `None` when somebody else has begun since, and done, what the range was to be held for.
    #[inline]
    pub(super) fn exclusive_unless_served(&self, range: Range<u64>) -> Option<(HeldRange<'_>, ForAll<'_>)> {
        let (sides, for_all) = self.sides.exclusive_unless_served(range)?;
        Some((HeldRange { area: self, sides }, for_all))
    }

    /// Holds everything alone.
    pub(super) fn alone(&self) -> HeldArea<'_> {
        HeldArea { area: self, sides: self.sides.alone() }
    }
}

impl HeldRange<'_> {
    pub(super) fn blocks(&self) -> HeldBlocks<'_> {
        HeldBlocks { area: self.area, sides: self.sides.as_ref() }
    }
}

impl HeldArea<'_> {
    pub(super) fn blocks(&self) -> HeldBlocks<'_> {
        HeldBlocks { area: self.area, sides: self.sides.as_ref() }
    }

    /// Wipes the keys. Every access from now on fails.
    pub(super) fn forget_keys(&mut self) {
        self.sides.take();
    }
}

/// Ranges are logical, and held.
impl HeldBlocks<'_> {
    /// Decrypts the blocks at logical `offset` to `out`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`]; `out` may then hold anything that was read before, so the caller
    /// must not pass it on.
    pub(super) fn read(self, offset: u64, out: Target<'_>) -> Result<(), VolumeError> {
        let len_bytes = out.len();
        let range = offset..offset + len_bytes as u64;
        let result = self.sides(&range).and_then(|sides| self.read_held(sides, range, out));
        self.area.scrub_after(len_bytes);
        result
    }

    fn read_held(self, sides: &Sides, range: Range<u64>, out: Target<'_>) -> Result<(), VolumeError> {
        let (mut out, offset) = (out, range.start);
        let Some(saved) = sides.saved(&range) else { return self.read_parts(sides, range, out) };
        saved.read(self.area.holes, out.reborrow().slice(relative(&saved.part, offset)));
        for rest in [range.start..saved.part.start, saved.part.end..range.end] {
            self.read_parts(sides, rest.clone(), out.reborrow().slice(relative(&rest, offset)))?;
        }
        Ok(())
    }

    fn read_parts(self, sides: &Sides, range: Range<u64>, out: Target<'_>) -> Result<(), VolumeError> {
        let (mut out, offset) = (out, range.start);
        for (side, part) in sides.parts(range, self.area.size_bytes())?.into_iter().flatten() {
            let out = out.reborrow().slice(relative(&part, offset));
            side.read(&self.area.backing, self.area.holes, part.start, out)?;
        }
        Ok(())
    }

    /// Encrypts `plaintext` over the blocks at logical `offset`; both are multiples of 16 bytes, checked to be in range.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`]; the blocks then hold old or new ciphertext, each.
    pub(super) fn write(self, offset: u64, plaintext: Source<'_>) -> Result<(), VolumeError> {
        let len_bytes = plaintext.len();
        let result = self.on_sides(offset..offset + len_bytes as u64, |side, part| {
            let plaintext = plaintext.slice(relative(&part, offset));
            match self.area.backing.granularity() {
                Granularity::Page => side.store(&self.area.backing, part.start, plaintext),
                // Not every backend has non-temporal stores, and none uses them at ragged ends. Writing back a line that
                // is not in the cache costs little; believing that it is on media when it is not costs the data.
                Granularity::CacheLine => side.store_through(&self.area.backing, part.start, plaintext),
            }
        });
        self.area.scrub_after(len_bytes);
        result
    }

    /// As [`Self::read`], by way of `scratch`, which is at least as long as what is read.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub(super) fn read_unmapped(self, offset: u64, out: Target<'_>, scratch: &mut [u8]) -> Result<(), VolumeError> {
        let mut out = out;
        let len_bytes = out.len();
        let range = offset..offset + len_bytes as u64;
        let result = self.sides(&range).and_then(|sides| {
            if sides.saved(&range).is_some() {
                return self.read_held(sides, range, out);
            }
            for (side, part) in sides.parts(range, self.area.size_bytes())?.into_iter().flatten() {
                let out = out.reborrow().slice(relative(&part, offset));
                let scratch = &mut scratch[..out.len()];
                side.read_unmapped(&self.area.backing, self.area.holes, part.start, out, scratch)?;
            }
            Ok(())
        });
        self.area.scrub_after(len_bytes);
        result
    }

    /// As [`Self::write`] at page granularity, by way of `scratch`, which is at least as long as the plaintext.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(super) fn write_unmapped(
        self,
        offset: u64,
        plaintext: Source<'_>,
        scratch: &mut [u8],
    ) -> Result<(), VolumeError> {
        let len_bytes = plaintext.len();
        let result = self.on_sides(offset..offset + len_bytes as u64, |side, part| {
            let plaintext = plaintext.slice(relative(&part, offset));
            let scratch = &mut scratch[..plaintext.len()];
            side.store_unmapped(&self.area.backing, part.start, plaintext, scratch)
        });
        self.area.scrub_after(len_bytes);
        result
    }

    /// Encrypts zeroes over the blocks of `range`.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub(super) fn write_zeroes(self, range: Range<u64>) -> Result<(), VolumeError> {
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
    pub(super) fn punch(self, range: Range<u64>) -> Result<(), VolumeError> {
        debug_assert!(self.area.holes, "without the flag a hole would read as noise");
        self.on_sides(range, |side, part| self.area.backing.punch_hole(side.physical(part)))
    }

    /// Asks for the ciphertext of logical `range` to be in the kernel's cache soon. `false` where there is none.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`].
    pub(super) fn prefetch(self, range: Range<u64>) -> Result<bool, VolumeError> {
        let mut asked = false;
        let sides = self.sides(&range)?;
        for (side, part) in sides.parts(range, self.area.size_bytes())?.into_iter().flatten() {
            asked |= self.area.backing.prefetch(&side.physical(part))?;
        }
        Ok(asked)
    }

    /// Where logical `range` lies now, in order: at most one place on each side, and one between them that is saved.
    fn places(self, range: Range<u64>) -> Result<Vec<Place>, VolumeError> {
        let sides = self.sides(&range)?;
        let mut places = Vec::with_capacity(2);
        let add = |places: &mut Vec<_>, range: Range<u64>| -> Result<(), VolumeError> {
            let parts = sides.parts(range, self.area.size_bytes())?;
            places.extend(parts.into_iter().flatten().map(|(side, part)| Place::OnMedia(side.physical(part))));
            Ok(())
        };
        match sides.saved(&range) {
            None => add(&mut places, range)?,
            Some(Saved { part, .. }) => {
                let after = part.end..range.end;
                add(&mut places, range.start..part.start)?;
                places.push(Place::Saved(part));
                add(&mut places, after)?;
            }
        }
        Ok(places)
    }

    /// Runs `access` on the parts of `range`, one on each side that it touches.
    #[inline]
    fn on_sides(
        self,
        range: Range<u64>,
        mut access: impl FnMut(&Side, Range<u64>) -> Result<(), MediaError>,
    ) -> Result<(), VolumeError> {
        let sides = self.sides(&range)?;
        for (side, part) in sides.parts(range, self.area.size_bytes())?.into_iter().flatten() {
            access(side, part)?;
        }
        Ok(())
    }

    /// The sides, for an access to `range`, which is checked once more: the size may have changed since the volume did.
    #[inline]
    fn sides(&self, range: &Range<u64>) -> Result<&Sides, VolumeError> {
        let Some(sides) = self.sides else { return Err(VolumeError::Locked) };
        let size_bytes = self.area.size_bytes();
        if range.end <= size_bytes {
            return Ok(sides);
        }
        let (offset, len_bytes) = (range.start, range.end.saturating_sub(range.start));
        Err(VolumeError::OutOfRange { offset, len_bytes, size_bytes })
    }
}

/// What asks the medium and may wait for it, so nothing is held meanwhile. A window that moves makes its bytes durable in
/// their new place before they are read there, so what was written is durable in the one place or in the other.
impl DataArea {
    /// Where the backing has blocks and where not, in logical `range`: runs in order, at most `count_max`, and no more are
    /// looked for. They cover the beginning of `range`, or all of it.
    ///
    /// # Errors
    ///
    /// What the medium says, and [`VolumeError::Locked`].
    pub(super) fn extents(&self, range: Range<u64>, count_max: usize) -> Result<Vec<BackingExtent>, VolumeError> {
        let places = self.shared(range.clone()).blocks().places(range)?;
        let mut extents = Vec::new();
        for place in places {
            let physical = match place {
                Place::OnMedia(physical) => physical,
                Place::Saved(part) => {
                    extents.push(BackingExtent { range: part, allocated: true });
                    continue;
                }
            };
            let found = self.backing.extents(physical.clone(), count_max.saturating_sub(extents.len()))?;
            let covered = found.last().is_some_and(|last| last.range.end == physical.end) || physical.is_empty();
            extents.extend(found);
            if !covered {
                return Ok(extents); // what follows would stand behind a gap
            }
        }
        extents.truncate(count_max);
        Ok(extents)
    }

    /// Makes what was written to logical `range` durable.
    ///
    /// # Errors
    ///
    /// What the medium says, after which the backing is poisoned until it is reopened, and [`VolumeError::Locked`].
    pub(super) fn persist(&self, range: Range<u64>) -> Result<(), VolumeError> {
        if self.backing.granularity() == Granularity::CacheLine {
            // Writes are durable already; holes that were punched are metadata, which only a sync makes so.
            return Ok(self.backing.sync_all()?);
        }
        let mut places = [None, None];
        self.shared(range.clone()).blocks().on_sides(range, |side, part| {
            let free = places.iter_mut().find(|place| place.is_none());
            *free.expect("a range has at most two sides") = Some(side.physical(part));
            Ok(())
        })?;
        Ok(places.into_iter().flatten().try_for_each(|place| self.backing.persist(place))?)
    }
}

/// What the engine of a transform does to the area. A locked volume has no engine, so there are sides.
impl DataArea {
    /// The present side becomes the former one, nothing of which has moved to `side` yet. Waits for all accesses.
    pub(crate) fn begin_transform(&self, side: Side, backward: bool) {
        if let Some(sides) = self.sides.alone().as_mut() {
            let former = std::mem::replace(&mut sides.current, side);
            sides.former = Some(Former::new(former, backward, 0));
        }
    }

    /// Goes on with a transform: the area was made with its new side. Before anybody else has the area.
    pub(crate) fn resume_transform(&self, former: Side, backward: bool, done_bytes: u64) {
        if let Some(sides) = self.sides.alone().as_mut() {
            sides.former = Some(Former::new(former, backward, done_bytes));
        }
    }

    pub(crate) fn is_transforming(&self) -> bool {
        self.sides.shared(0..0).as_ref().is_some_and(|sides| sides.former.is_some())
    }

    /// Fails every access to `window`, the first one of a transform that was resumed, until it has moved; reads only where
    /// its ciphertext was not `saved`.
    pub(crate) fn block(&self, window: Range<u64>, saved: Option<Vec<u8>>) {
        if let Some(former) = self.sides.shared(window.clone()).as_ref().and_then(|sides| sides.former.as_ref()) {
            former.block(window, saved);
        }
    }

    /// Everything has arrived: the former side and its key are wiped. Waits for all accesses.
    pub(crate) fn end_transform(&self) {
        if let Some(sides) = self.sides.alone().as_mut() {
            sides.former = None;
        }
    }

    /// Holds a window that is to move.
    pub(super) fn hold(&self, window: Range<u64>) -> MovingWindow<'_> {
        MovingWindow { area: self, held: self.sides.exclusive(window.clone()), window }
    }
}

/// What is done to it stands in `transform::moving`.
impl MovingWindow<'_> {
    pub(super) const fn area(&self) -> &DataArea {
        self.area
    }

    /// Its logical range.
    pub(super) fn range(&self) -> Range<u64> {
        self.window.clone()
    }

    /// The side that it leaves, and the one that it goes to. Called during a transform.
    pub(super) fn sides(&self) -> (&Former, &Side) {
        let sides = self.held.as_ref().and_then(|sides| Some((sides.former.as_ref()?, &sides.current)));
        sides.expect("the engine moves windows only while there is a former side")
    }
}

/// Where `part` lies in a buffer that begins at `offset`.
fn relative(part: &Range<u64>, offset: u64) -> Range<usize> {
    let at = |position: u64| usize::try_from(position - offset).expect("within a buffer");
    at(part.start)..at(part.end)
}

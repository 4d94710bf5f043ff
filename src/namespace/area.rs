//! The header area on media: two copies of the header, and which of them is the header.
//!
//! A copy is overwritten only while the other one is good and durable, so a crash at any store of an update leaves the
//! old header or the new one. Every write is persisted and read back before the next.
//!
//! Nobody writes over what he has not read: both copies are compared with what was last read or written here before one of
//! them is written. Locks keep others out; where one has failed (a device under two names), this ends the older user.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::error::{Chain, OpenError};
use super::geometry::HEADER_AREA_BYTES;
use super::header::{COPY_BYTES, CopyFault, HeaderCopy, MAGIC};
use super::metadata::MetadataError;
use super::wipe::confirm_zeros;
use crate::pmem::{Backing, MediaError};

/// Distance of copy B from copy A; the room between them lets a later version grow the copies.
const COPY_DISTANCE_BYTES: u64 = 256 << 10;

const CHUNK_BYTES: usize = 64 << 10;

const PAGE_BYTES: u64 = 4096;

/// One of the two header copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyName {
    /// The copy at the base.
    A,
    /// The copy 256 KiB behind the base.
    B,
}

impl fmt::Display for CopyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
        })
    }
}

impl CopyName {
    /// Both, in the order on media.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    const fn offset(self) -> u64 {
        match self {
            Self::A => 0,
            Self::B => COPY_DISTANCE_BYTES,
        }
    }
}

/// What tells one content of a copy from any other: its prefix, in which sequence number and MAC are, and a checksum over
/// all of it. `None` for a copy that was not read, or cannot be.
type Seen = Option<([u8; SEEN_BYTES], u32)>;

const SEEN_BYTES: usize = 64;

/// A header area somewhere in a backing, which it is known to fit into, and what is known of its copies.
#[derive(Clone, Debug)]
pub(super) struct HeaderArea {
    backing: Arc<Backing>,
    base: u64,
    seen: [Seen; 2],
}

impl HeaderArea {
    /// The header area at `base`, unless it would reach past the backing.
    pub(super) fn new(backing: Arc<Backing>, base: u64) -> Option<Self> {
        let end = base.checked_add(HEADER_AREA_BYTES)?;
        (end <= backing.len_bytes()).then_some(Self { backing, base, seen: [None; 2] })
    }

    pub(super) const fn base(&self) -> u64 {
        self.base
    }

    pub(super) const fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// Reads and parses one copy, to look at it.
    pub(super) fn read_copy(&self, name: CopyName) -> Result<HeaderCopy, CopyFault> {
        let image = self.read_image(name).map_err(CopyFault::Unreadable)?;
        HeaderCopy::decode(&image)
    }

    /// Reads and parses both copies. What they are now is what may be written over.
    pub(super) fn read_copies(&mut self) -> [Result<HeaderCopy, CopyFault>; 2] {
        CopyName::BOTH.map(|name| {
            let image = self.read_image(name);
            self.seen[name as usize] = image.as_ref().ok().map(|image| seen(image));
            image.map_err(CopyFault::Unreadable).and_then(|image| HeaderCopy::decode(&image))
        })
    }

    /// Whether one of the copies may be a header: to look at many places without reading them all.
    pub(super) fn has_magic(&self) -> Result<bool, MediaError> {
        for name in CopyName::BOTH {
            let (mut magic, start) = ([0; MAGIC.len()], self.base + name.offset());
            self.backing.read(start..start + magic.len() as u64, |source| source.copy_to(&mut magic))?;
            if magic == MAGIC {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The bytes of one copy.
    pub(super) fn read_image(&self, name: CopyName) -> Result<Box<[u8; COPY_BYTES]>, MediaError> {
        let start = self.base + name.offset();
        let mut image = vec![0; COPY_BYTES];
        self.backing.read(start..start + COPY_BYTES as u64, |source| source.copy_to(&mut image))?;
        Ok(image.into_boxed_slice().try_into().expect("the length is COPY_BYTES"))
    }

    /// Whether both copies are what was read or written here last.
    pub(super) fn is_unchanged(&self) -> bool {
        CopyName::BOTH.into_iter().all(|name| {
            let present = self.read_image(name).ok().map(|image| seen(&image));
            present == self.seen[name as usize]
        })
    }

    /// Overwrites one copy: durable and compared with what the media gives back when this returns.
    ///
    /// Nothing is stored when somebody else has changed a copy, and when nothing can be made durable any more: a store would
    /// be seen, and perhaps be on media, all the same.
    pub(super) fn write_copy(&mut self, name: CopyName, image: &[u8; COPY_BYTES]) -> Result<(), WriteError> {
        self.backing.check_flushes()?;
        if !self.is_unchanged() {
            return Err(WriteError::Changed);
        }
        let start = self.base + name.offset();
        let range = start..start + COPY_BYTES as u64;
        let stored = self.backing.write(range.clone(), |mut target| target.copy_from(image));
        // What a failed write leaves is ours as well.
        self.seen[name as usize] = self.read_image(name).ok().map(|image| seen(&image));
        stored?;
        self.backing.persist(range)?;
        let stored = self.read_image(name)?;
        match stored.iter().zip(image).position(|(stored, written)| stored != written) {
            Some(index) => Err(WriteError::ReadBack { offset: start + index as u64 }),
            None => Ok(()),
        }
    }

    /// Writes a copy again as it is. Where an earlier write of it failed it is seen, but not on media, and no flush would
    /// bring it there: what is not stored again counts as clean. A copy that cannot be read is nothing to rely on.
    pub(super) fn rewrite_copy(&mut self, name: CopyName) -> Result<(), WriteError> {
        match self.read_image(name) {
            Ok(image) => self.write_copy(name, &image),
            Err(_) => Ok(()),
        }
    }

    /// Overwrites the whole area with zeros, durably, and reads it back. Whatever it was, it is lost.
    pub(super) fn clear(&mut self) -> Result<(), WriteError> {
        let range = self.base..self.base + HEADER_AREA_BYTES;
        self.backing.write(range.clone(), |mut target| target.fill(0))?;
        self.backing.persist(range.clone())?;
        self.seen = CopyName::BOTH.map(|name| self.read_image(name).ok().map(|image| seen(&image)));
        match first_nonzero(&self.backing, range)? {
            Some(offset) => Err(WriteError::ReadBack { offset }),
            None => Ok(()),
        }
    }
}

impl HeaderArea {
    /// The page of each copy that begins with the magic.
    fn first_pages(&self) -> [Range<u64>; 2] {
        CopyName::BOTH.map(|name| self.base + name.offset()..self.base + name.offset() + PAGE_BYTES)
    }

    /// [`Self::clear`] of an area that only its magic leads to: that goes last, so that who is cut is not the last to find it.
    pub(super) fn clear_stray(&mut self) -> Result<(), WriteError> {
        let magic = MAGIC.len() as u64;
        let [a, b] = self.first_pages().map(|page| page.start..page.start + magic);
        let end = self.base + HEADER_AREA_BYTES;
        for range in [a.end..b.start, b.end..end] {
            self.backing.write(range, |mut target| target.fill(0))?;
        }
        self.backing.persist(self.base..end)?;
        self.clear()
    }

    /// Whether it was a header, or was to become one, and no program will read it any more.
    pub(super) fn is_ruined(&mut self) -> Result<bool, MediaError> {
        let is_ruined = |copy: &Result<_, CopyFault>| match copy {
            Ok(_) | Err(CopyFault::Unreadable(_)) => false,
            // What was overwritten up to its magic has version 0.
            Err(CopyFault::Version { found, .. }) => *found == 0,
            Err(fault) => !fault.is_from_the_future(),
        };
        Ok(self.has_magic()? && self.read_copies().iter().all(is_ruined))
    }

    /// Where no copy announces itself any more, because somebody has [cleared](Self::clear) it: makes that durable.
    pub(super) fn confirm_clear(&self) -> Result<(), MediaError> {
        self.first_pages().into_iter().try_for_each(|page| confirm_zeros(&self.backing, page))
    }
}

fn seen(image: &[u8; COPY_BYTES]) -> ([u8; SEEN_BYTES], u32) {
    let prefix = image.first_chunk().expect("a copy is longer");
    (*prefix, crc32fast::hash(image))
}

/// Offset of the first byte in `range` of the backing that is not zero.
pub(super) fn first_nonzero(backing: &Backing, range: Range<u64>) -> Result<Option<u64>, MediaError> {
    let mut chunk = vec![0; CHUNK_BYTES];
    for start in range.clone().step_by(CHUNK_BYTES) {
        let end = range.end.min(start + CHUNK_BYTES as u64);
        chunk.truncate(usize::try_from(end - start).unwrap_or(CHUNK_BYTES));
        backing.read(start..end, |source| source.copy_to(&mut chunk))?;
        if let Some(index) = chunk.iter().position(|&byte| byte != 0) {
            return Ok(Some(start + index as u64));
        }
    }
    Ok(None)
}

/// Why a header could not be made durable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// The media gives back something else than was written.
    #[error("byte {offset} of the backing does not read back as it was written")]
    ReadBack {
        /// Offset in the backing.
        offset: u64,
    },
    /// The header is not the one that was read: nothing was written.
    #[error("somebody else changed the header after it was read here: open the namespace again")]
    Changed,
}

/// The header that counts.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    pub(super) copy: HeaderCopy,
    pub(super) name: CopyName,
    /// The other one, if it is well-formed.
    pub(super) other: Option<HeaderCopy>,
    /// Of copies A and B: the sequence number, or why it cannot be used, as text for people.
    pub(super) states: [CopyState; 2],
}

/// What became of one header copy.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyState {
    /// Well-formed, with this sequence number.
    Good {
        /// The sequence number.
        sequence: u64,
    },
    /// Unusable, for this reason.
    Bad {
        /// The reason, for people.
        reason: String,
    },
}

impl CopyState {
    pub(super) fn of(copy: &Result<HeaderCopy, CopyFault>) -> Self {
        match copy {
            Ok(copy) => Self::Good { sequence: copy.sequence },
            Err(fault) => Self::Bad { reason: Chain(fault).to_string() },
        }
    }
}

/// The valid copy with the greater sequence number, A when they are equal.
///
/// A copy that is intact but from a newer program stops everything: the other copy is older than it.
pub(super) fn choose(a: Result<HeaderCopy, CopyFault>, b: Result<HeaderCopy, CopyFault>) -> Result<Chosen, OpenError> {
    let mut states = [CopyState::of(&a), CopyState::of(&b)];
    match (a, b) {
        (Err(fault), _) | (_, Err(fault)) if fault.is_from_the_future() => Err(future(fault)),
        (Ok(a), Ok(b)) if b.sequence > a.sequence => Ok(Chosen { copy: b, name: CopyName::B, other: Some(a), states }),
        (Ok(a), b) => {
            if b.as_ref().is_ok_and(|b| b.sequence == a.sequence && !b.is_same(&a)) {
                states[1] = CopyState::Bad { reason: "it has the sequence of copy A, but another content".into() };
            }
            Ok(Chosen { copy: a, name: CopyName::A, other: b.ok(), states })
        }
        (Err(_), Ok(b)) => Ok(Chosen { copy: b, name: CopyName::B, other: None, states }),
        (Err(CopyFault::Magic), Err(CopyFault::Magic)) => Err(OpenError::NotANamespace { found: None }),
        (Err(a), Err(b)) => Err(OpenError::BothCopiesDamaged { a, b }),
    }
}

fn future(fault: CopyFault) -> OpenError {
    match fault {
        CopyFault::Version { found, supported } => OpenError::FutureVersion { found, supported },
        CopyFault::Metadata(MetadataError::Requirement { name }) => OpenError::Requirement { name },
        other => unreachable!("not from the future: {other}"),
    }
}

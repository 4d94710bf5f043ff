//! The header area on media: two copies of the header, and which of them is the header.
//!
//! A copy is overwritten only while the other one is good and durable, so a crash at any store of an update leaves the
//! old header or the new one. Every write is persisted and read back before the next.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::error::{Chain, OpenError};
use super::geometry::HEADER_AREA_BYTES;
use super::header::{COPY_BYTES, CopyFault, HeaderCopy};
use super::metadata::MetadataError;
use crate::pmem::{Backing, MediaError};

/// Distance of copy B from copy A; the room between them lets a later version grow the copies.
const COPY_DISTANCE_BYTES: u64 = 256 << 10;

const CHUNK_BYTES: usize = 64 << 10;

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

/// A header area somewhere in a backing, which it is known to fit into.
#[derive(Clone, Debug)]
pub(super) struct HeaderArea {
    backing: Arc<Backing>,
    base: u64,
}

impl HeaderArea {
    /// The header area at `base`, unless it would reach past the backing.
    pub(super) fn new(backing: Arc<Backing>, base: u64) -> Option<Self> {
        let end = base.checked_add(HEADER_AREA_BYTES)?;
        (end <= backing.len_bytes()).then_some(Self { backing, base })
    }

    pub(super) const fn base(&self) -> u64 {
        self.base
    }

    pub(super) const fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// Reads and parses one copy.
    pub(super) fn read_copy(&self, name: CopyName) -> Result<HeaderCopy, CopyFault> {
        let image = self.read_image(name).map_err(CopyFault::Unreadable)?;
        HeaderCopy::decode(&image)
    }

    /// The bytes of one copy.
    pub(super) fn read_image(&self, name: CopyName) -> Result<Box<[u8; COPY_BYTES]>, MediaError> {
        let start = self.base + name.offset();
        let mut image = vec![0; COPY_BYTES];
        self.backing.read(start..start + COPY_BYTES as u64, |source| source.copy_to(&mut image))?;
        Ok(image.into_boxed_slice().try_into().expect("the length is COPY_BYTES"))
    }

    /// Overwrites one copy: durable and compared with what the media gives back when this returns.
    pub(super) fn write_copy(&self, name: CopyName, image: &[u8; COPY_BYTES]) -> Result<(), WriteError> {
        let start = self.base + name.offset();
        let range = start..start + COPY_BYTES as u64;
        self.backing.write(range.clone(), |mut target| target.copy_from(image))?;
        self.backing.persist(range)?;
        let stored = self.read_image(name)?;
        match stored.iter().zip(image).position(|(stored, written)| stored != written) {
            Some(index) => Err(WriteError::ReadBack { offset: start + index as u64 }),
            None => Ok(()),
        }
    }

    /// Overwrites the whole area with zeros, durably, and reads it back.
    pub(super) fn clear(&self) -> Result<(), WriteError> {
        let range = self.base..self.base + HEADER_AREA_BYTES;
        self.backing.write(range.clone(), |mut target| target.fill(0))?;
        self.backing.persist(range.clone())?;
        match first_nonzero(&self.backing, range)? {
            Some(offset) => Err(WriteError::ReadBack { offset }),
            None => Ok(()),
        }
    }
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
}

/// The header that counts.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    pub(super) copy: HeaderCopy,
    pub(super) name: CopyName,
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
    let states = [CopyState::of(&a), CopyState::of(&b)];
    match (a, b) {
        (Err(fault), _) | (_, Err(fault)) if fault.is_from_the_future() => Err(future(fault)),
        (Ok(a), Ok(b)) if b.sequence > a.sequence => Ok(Chosen { copy: b, name: CopyName::B, states }),
        (Ok(a), _) => Ok(Chosen { copy: a, name: CopyName::A, states }),
        (Err(_), Ok(b)) => Ok(Chosen { copy: b, name: CopyName::B, states }),
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

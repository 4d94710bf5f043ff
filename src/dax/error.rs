//! What can go wrong with a direct map.

use std::io;

use crate::volume::VolumeError;
use crate::volume::window::AttachError;

/// Why a direct map could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaxError {
    /// A map begins at a page of the volume.
    #[error("a map must begin at a multiple of 4096 bytes, and {start} is none")]
    Unaligned {
        /// Where it was to begin, in bytes.
        start: u64,
    },
    /// A word begins at a multiple of its length.
    #[error("a word of {alignment} bytes must begin at a multiple of its length, and {offset} is none")]
    Misaligned {
        /// Where it was to begin, in bytes from the start of the map.
        offset: u64,
        /// What that must be a multiple of.
        alignment: u64,
    },
    /// The range is empty (where a map is to be made), ends before it begins, or does not lie in the volume or the map.
    #[error("bytes {start}..{end} are empty, reversed or outside of {len_bytes} bytes")]
    OutOfRange {
        /// First byte.
        start: u64,
        /// End, exclusive.
        end: u64,
        /// Bytes there are.
        len_bytes: u64,
    },
    /// The map, or the volume, is for reading only.
    #[error("the map is for reading only")]
    ReadOnly,
    /// All plaintext of an eager map stays resident. The bound does not allow for so much, or, with lazy maps beside it, not
    /// for 256 KiB more.
    #[error("eager maps keep {len_bytes} bytes resident, and at most {resident_max} may be, lazy maps included")]
    Eager {
        /// Bytes that all eager maps of the volume show, with the new one.
        len_bytes: u64,
        /// The bound in bytes.
        resident_max: u64,
    },
    /// Nobody answers the page faults of the map any more. What was stored was written back, unless another error
    /// was told.
    #[error(
        "nobody answers the page faults of this map any more (the log says why): its memory raises SIGBUS, and what was stored \
         has been written back; close it and make a new map"
    )]
    FaultThread,
    /// The volume failed.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The operating system refused memory, a thread or a page-table operation.
    #[error("the direct map failed")]
    Os(#[source] io::Error),
}

impl From<AttachError> for DaxError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Os(error) => Self::Os(error),
            AttachError::Pinned { pinned_bytes, resident_max } => Self::Eager { len_bytes: pinned_bytes, resident_max },
        }
    }
}

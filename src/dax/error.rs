//! What can go wrong with a direct map.

use std::io;

use crate::volume::VolumeError;

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
    /// The range is empty, or does not lie in the volume or the map.
    #[error("bytes {start}..{end} are empty or outside of {len_bytes} bytes")]
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
    /// All plaintext of an eager map is resident, and the bound does not allow for so much.
    #[error(
        "without userfaultfd all {len_bytes} bytes of the map would be resident, and at most {resident_max} may be"
    )]
    Eager {
        /// Bytes to map.
        len_bytes: u64,
        /// The bound in bytes.
        resident_max: u64,
    },
    /// The volume failed.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The operating system refused memory, a thread or a page-table operation.
    #[error("the direct map failed")]
    Os(#[source] io::Error),
}

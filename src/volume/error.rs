//! What can go wrong with a volume.

use crate::namespace::{FormatError, TransformError, UpdateError};
use crate::pmem::{MediaError, OpenError};
use crate::xts::BackendError;

/// Why an operation on a volume failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// The range does not lie in the volume.
    #[error("{len_bytes} bytes at offset {offset} reach past the end of the volume, which has {size_bytes} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len_bytes: u64,
        /// Bytes in the volume.
        size_bytes: u64,
    },
    /// The range ends before it begins.
    #[error("the range {start}..{end} ends before it begins")]
    Reversed {
        /// Its start.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// The volume was opened read-only.
    #[error("the volume is open for reading only")]
    ReadOnly,
    /// The medium failed.
    #[error("the backing failed")]
    Media(#[from] MediaError),
    /// The memory of the plaintext window could not be had or given back.
    #[error("the plaintext window failed")]
    Window(#[source] std::io::Error),
    /// The plaintext that may be resident is all in use and nothing of it can be evicted.
    #[error("no room for more plaintext: at most {resident_max} bytes may be resident")]
    WindowFull {
        /// The bound in bytes.
        resident_max: u64,
        /// Why a page that is resident could not be evicted; nothing when all room was others' for too long.
        #[source]
        cause: Option<Box<Self>>,
    },
    /// This process is a fork of the one that opened the volume.
    #[error(
        "the volume was opened by another process, of which this one is a fork, and its keys stayed there: open it again in \
         this process (a daemon opens after its last fork)"
    )]
    Forked,
    /// There is another volume over the same bytes.
    #[error(
        "another volume of this process uses the same bytes of the same open backing: share that one (an Arc), or drop it first"
    )]
    InUse,
    /// The volume was locked: its key is gone.
    #[error("the volume is locked")]
    Locked,
    /// It was to be unlocked, and is not locked.
    #[error("the volume is not locked")]
    NotLocked,
    /// It was to be unlocked with another namespace, or its header has changed since it was locked.
    #[error("the header is not the one that was locked: it was changed meanwhile; open the namespace again")]
    Changed,
    /// A part of the range belongs to an exclusive map, or a range that was to be mapped exclusively is mapped already.
    #[error("bytes {start}..{end} are mapped exclusively, or mapped and so cannot be")]
    Claimed {
        /// First byte that was asked for.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// There is a direct map.
    #[error("the volume is mapped: its maps must be closed first")]
    Mapped,
    /// There is, or was, a direct map, whose window has the size of the volume.
    #[error("the volume is mapped, or was: it keeps its size until it is opened again")]
    WasMapped,
    /// There is no header of a namespace that could be changed, as with a LUKS2 volume.
    #[error("the volume has no header of a namespace, and so no size that could be changed")]
    NoHeader,
    /// The header could not be changed.
    #[error("the header could not be changed")]
    Update(#[source] Box<UpdateError>),
    /// A re-key failed.
    #[error("the re-key failed")]
    Transform(#[source] Box<TransformError>),
    /// The chosen AES-XTS backend is not to be had.
    #[error("no AES-XTS backend")]
    Backend(#[from] BackendError),
}

/// Why there is no ephemeral volume.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EphemeralError {
    /// No memory for the ciphertext.
    #[error("no memory for the ciphertext")]
    Memory(#[from] OpenError),
    /// The size or the random number generator failed.
    #[error("cannot make the namespace")]
    Format(#[from] FormatError),
    /// The chosen AES-XTS backend is not to be had.
    #[error("no AES-XTS backend")]
    Backend(#[from] BackendError),
}

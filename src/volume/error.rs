//! What can go wrong with a volume.

use crate::namespace::TransformError;
use crate::pmem::MediaError;
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
    /// The volume was opened read-only.
    #[error("the volume is open for reading only")]
    ReadOnly,
    /// The medium failed.
    #[error("the backing failed")]
    Media(#[from] MediaError),
    /// A re-key failed.
    #[error("the re-key failed")]
    Transform(#[source] Box<TransformError>),
    /// The chosen AES-XTS backend is not to be had.
    #[error("no AES-XTS backend")]
    Backend(#[from] BackendError),
}

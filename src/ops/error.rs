//! Why an operation did not end: one shape for all of them.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::gate::{Operation, Refusal};
#[cfg(feature = "luks2")]
use crate::luks2;
use crate::namespace::{
    self, AdoptError, Chain, FormatError, RegionError, RestoreError, Signature, SlideError, SlotInfo, TransformError,
    UnlockError, UpdateError, WriteError,
};
use crate::pmem::{MediaError, OpenError};
use crate::volume::VolumeError;
use crate::xts::BackendError;

/// What kind of failure it is, for who decides what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The state of the namespace, or the way in, does not permit it.
    Refused,
    /// Something must be said that was not: what is to happen to other slots, how large it is to be.
    Asks,
    /// Somebody else has it open.
    Busy,
    /// The key is not one of it.
    WrongKey,
    /// What is on media cannot be used.
    Damaged,
    /// The media failed.
    Io,
    /// It was asked to stop, and can go on.
    Stopped,
}

/// Why an operation did not end.
#[derive(Debug)]
pub struct Error {
    /// What was to be done.
    pub operation: Operation,
    /// The file or device that it is about.
    pub path: PathBuf,
    /// Where in the plaintext it happened, of an operation that goes through it.
    pub offset: Option<u64>,
    /// What happened.
    pub cause: Box<Cause>,
    /// What was made and could not be taken back.
    pub left: Vec<Leftover>,
}

/// Something that was made for nothing and is still there.
#[derive(Debug)]
pub enum Leftover {
    /// A header that may open.
    Header {
        /// Where it is.
        path: PathBuf,
        /// Why it is still there.
        reason: String,
    },
    /// An empty partition.
    Partition {
        /// The region.
        region: PathBuf,
        /// Its name.
        name: String,
        /// Why it is still there.
        reason: String,
    },
}

/// What happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The gate refuses.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There are other key slots, and nobody has said what is to become of them.
    #[error("the namespace has {} other key slots", .0.len())]
    OtherSlots(Vec<SlotInfo>),
    /// A new file or partition needs a size.
    #[error("it does not exist, and its size is not given")]
    SizeNeeded,
    /// The size is more than there can be.
    #[error("the size is too large")]
    SizeTooLarge,
    /// Source and destination are the same.
    #[error("source and destination are the same: {0}")]
    SamePlace(String),
    /// There is data that would be lost.
    #[error("it already holds data ({0})")]
    WouldOverwrite(Signature),
    /// The image is longer than the namespace.
    #[error("the image has more than {size_bytes} bytes")]
    ImageTooLong {
        /// Bytes of the image, when they are known.
        len_bytes: Option<u64>,
        /// Bytes of the namespace.
        size_bytes: u64,
    },
    /// It is not in a region.
    #[error("it is no namespace in a region")]
    NotInRegion,
    /// No key is given for it.
    #[error("its key is not given")]
    NoKeyGiven,
    /// Data is accepted by giving it a tag, and this only reads.
    #[error("--accept-data writes a tag behind the data, and this only reads")]
    AcceptsAndReads,
    /// Removing the slot that unlocked may lock its user out.
    #[error("key slot {slot} is the one that unlocked: removing it may lock you out")]
    OwnSlot {
        /// The slot.
        slot: u32,
    },
    /// It was not said which slot.
    #[error("it was unlocked by its volume key: say which slot")]
    SlotNeeded,
    /// It was stopped between two pieces.
    #[error("stopped with {done_bytes} of {total_bytes} bytes done")]
    Stopped {
        /// Bytes that are done.
        done_bytes: u64,
        /// All bytes.
        total_bytes: u64,
    },
    /// The medium gives back something else than was written.
    #[error("it reads back other bytes than were written: CRC-32 {found:#010x}, not {written:#010x}")]
    NotVerified {
        /// CRC-32 of what was written.
        written: u32,
        /// CRC-32 of what was found.
        found: u32,
    },
    /// A file or device could not be opened.
    #[error("it cannot be opened")]
    Open(#[from] OpenError),
    /// There is no namespace that opens.
    #[error(transparent)]
    Namespace(#[from] namespace::OpenError),
    /// A partition table.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The key or the header was refused.
    #[error(transparent)]
    Unlock(#[from] UnlockError),
    /// The header could not be changed.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// A transform.
    #[error(transparent)]
    Transform(Box<TransformError>),
    /// A moved namespace was not adopted.
    #[error(transparent)]
    Adopt(Box<AdoptError>),
    /// A namespace did not begin to slide.
    #[error(transparent)]
    Slide(Box<SlideError>),
    /// A namespace was not made.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A header was not destroyed: key material may be left.
    #[error("key material may be left")]
    Erase(#[source] WriteError),
    /// A header was not restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A LUKS2 header was not made.
    #[cfg(feature = "luks2")]
    #[error(transparent)]
    ExportLuks2(#[from] luks2::ExportError),
    /// The plaintext could not be read or written.
    #[error(transparent)]
    Volume(VolumeError),
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// The plain image could not be read or written.
    #[error("the plain image cannot be read or written")]
    Plain(#[source] io::Error),
    /// No AES-XTS backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl Error {
    /// `cause` at `path`.
    pub fn new(operation: Operation, path: &Path, cause: impl Into<Cause>) -> Self {
        Self { operation, path: path.into(), offset: None, cause: Box::new(cause.into()), left: Vec::new() }
    }

    /// The same, at byte `offset` of the plaintext.
    #[must_use]
    pub fn at(self, offset: u64) -> Self {
        Self { offset: Some(offset), ..self }
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.cause.kind()
    }
}

impl Cause {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Refused(_) | Self::SamePlace(_) | Self::NotInRegion | Self::ImageTooLong { .. } => Kind::Refused,
            #[cfg(feature = "luks2")]
            Self::ExportLuks2(_) => Kind::Refused,
            Self::Slide(_) | Self::Format(_) => Kind::Refused,
            Self::OtherSlots(_) | Self::SizeNeeded | Self::SizeTooLarge | Self::WouldOverwrite(_) => Kind::Asks,
            Self::NoKeyGiven | Self::OwnSlot { .. } | Self::SlotNeeded => Kind::Asks,
            Self::AcceptsAndReads => Kind::Refused,
            Self::Stopped { .. } => Kind::Stopped,
            Self::Open(OpenError::Busy) => Kind::Busy,
            Self::Open(_) | Self::Erase(_) | Self::Media(_) | Self::Plain(_) | Self::NotVerified { .. } => Kind::Io,
            Self::Update(UpdateError::Write(_)) | Self::Region(RegionError::Media(_) | RegionError::Write(_)) => {
                Kind::Io
            }
            Self::Namespace(_) | Self::Restore(_) => Kind::Damaged,
            Self::Unlock(UnlockError::WrongCredential { .. } | UnlockError::NoSlotOfKind { .. }) => Kind::WrongKey,
            Self::Transform(error) if matches!(**error, TransformError::Credential) => Kind::WrongKey,
            Self::Transform(error) if matches!(**error, TransformError::Media(_)) => Kind::Io,
            Self::Unlock(_) | Self::Transform(_) | Self::Adopt(_) => Kind::Damaged,
            Self::Update(_) | Self::Region(_) | Self::Backend(_) => Kind::Refused,
            Self::Volume(_) => Kind::Io,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}", self.operation, self.path.display())?;
        match self.offset {
            Some(offset) => write!(f, " at byte {offset}"),
            None => Ok(()),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.cause)
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { path, reason } => {
                write!(f, "{}: its header could not be taken back: {reason}", path.display())
            }
            Self::Partition { region, name, reason } => {
                let region = region.display();
                write!(f, "{reason}; the empty partition is left: `daxcrypt remove {region}#{name}` removes it")
            }
        }
    }
}

impl From<TransformError> for Cause {
    fn from(error: TransformError) -> Self {
        Self::Transform(Box::new(error))
    }
}

impl From<AdoptError> for Cause {
    fn from(error: AdoptError) -> Self {
        Self::Adopt(Box::new(error))
    }
}

impl From<SlideError> for Cause {
    fn from(error: SlideError) -> Self {
        match error {
            SlideError::Region(error) => Self::Region(error),
            SlideError::Transform(error) => Self::from(error),
            error => Self::Slide(Box::new(error)),
        }
    }
}

/// A failure of the header is one, whoever holds it.
impl From<VolumeError> for Cause {
    fn from(error: VolumeError) -> Self {
        match error {
            VolumeError::Update(error) => Self::Update(*error),
            VolumeError::Transform(error) => Self::Transform(error),
            error => Self::Volume(error),
        }
    }
}

/// An error and its causes in one line.
pub(super) fn line(error: &(dyn StdError + 'static)) -> String {
    Chain(error).to_string()
}

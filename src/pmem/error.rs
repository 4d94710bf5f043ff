//! What can go wrong with a backing: at opening it ([`OpenError`]) and at using it ([`MediaError`]).
//!
//! The texts do not name the path: whoever gave it puts it in front.

use std::io;

/// Why a backing could not be opened or created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Nothing is there.
    #[error("there is no such file or device")]
    NotFound,
    /// Something is already there, and creating does not overwrite.
    #[error("the file exists already")]
    AlreadyExists,
    /// The permissions of the file or of a directory above it refuse.
    #[error("permission denied")]
    PermissionDenied(#[source] io::Error),
    /// The file system or the device accepts no writes.
    #[error("the file system or device is read-only")]
    ReadOnlyMedium,
    /// Another process (or another backing of this one) holds the lock, or a block device is mounted or claimed.
    #[error("it is busy: another process serves or uses it")]
    Busy,
    /// It has no bytes.
    #[error("it is empty (0 bytes)")]
    Empty,
    /// It is neither a regular file, nor a block device, nor a device-DAX character device.
    #[error("only a regular file, a block device or a device-DAX device can be mapped")]
    NotMappable,
    /// It does not fit in the address space.
    #[error("{len_bytes} bytes do not fit in the address space of this process")]
    TooLarge {
        /// Length of the backing in bytes.
        len_bytes: u64,
    },
    /// The file system is full.
    #[error("no space for {len_bytes} bytes on the file system")]
    NoSpace {
        /// Length asked for, in bytes.
        len_bytes: u64,
    },
    /// `DAXCRYPT_FORCE_GRANULARITY` holds neither `page` nor `cacheline`.
    #[error("the environment variable DAXCRYPT_FORCE_GRANULARITY must be `page` or `cacheline`")]
    BadOverride,
    /// A device-DAX device whose size or alignment the kernel does not tell.
    #[error("sysfs does not tell the size of the device")]
    UnknownSize,
    /// A block device of which the kernel does not tell where on its disk it begins.
    #[error("sysfs does not tell where on its disk the device begins: /sys has to be mounted")]
    UnknownStart,
    /// The handler that turns a media error into an error of one access could not be installed.
    #[error("cannot install the handler for media errors (SIGBUS)")]
    Handler(#[source] io::Error),
    /// Mapping failed.
    #[error("cannot map {len_bytes} bytes")]
    Map {
        /// Length of the mapping in bytes.
        len_bytes: u64,
        /// What the kernel says.
        source: io::Error,
    },
    /// Any other failure of the operating system.
    #[error("cannot open the backing")]
    Io(#[source] io::Error),
}

impl OpenError {
    /// Names the failures that a caller may want to tell apart.
    pub(super) fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::AlreadyExists => Self::AlreadyExists,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied(error),
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnlyMedium,
            io::ErrorKind::ResourceBusy => Self::Busy,
            _ => Self::Io(error),
        }
    }
}

/// Why an access to a backing failed. Offsets are bytes from the start of the backing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MediaError {
    /// The range does not lie within the backing.
    #[error("bytes {start}..{end} are outside of the backing's {len_bytes} bytes")]
    OutOfRange {
        /// First byte of the range.
        start: u64,
        /// End of the range, exclusive.
        end: u64,
        /// Length of the backing.
        len_bytes: u64,
    },
    /// The medium could not supply or take the bytes (SIGBUS): a bad memory line, or a file that was truncated. The page
    /// stays bad until the backing is reopened.
    #[error("media error in the page at byte {offset}: the backing was truncated, or its memory is damaged")]
    Fault {
        /// First byte of the first bad page.
        offset: u64,
    },
    /// The backing became shorter while it was in use, so that stores may be lost.
    #[error("the backing was truncated while in use: it has {now_bytes} bytes and had {len_bytes}")]
    Shrunk {
        /// Length now.
        now_bytes: u64,
        /// Length when it was opened or last grown.
        len_bytes: u64,
    },
    /// The file system has no block for the range; nothing was stored.
    #[error("no space left on the backing's file system")]
    NoSpace,
    /// Stores could not be made durable. The backing is poisoned from here on.
    #[error("a flush to the media failed")]
    Flush(#[source] io::Error),
    /// An earlier flush failed: what it should have made durable may be lost, and no later flush can tell.
    #[error("an earlier flush to the media failed: reopen the backing")]
    Poisoned,
    /// This process is a fork of the one that opened the backing.
    #[error(
        "the backing was opened by another process, of which this one is a fork: open it again in this process (a daemon opens \
         after its last fork)"
    )]
    Forked,
    /// The backing was opened for reading.
    #[error("the backing is open for reading only")]
    ReadOnly,
    /// The file system or the kind of backing cannot do this.
    #[error("the backing does not support this operation")]
    Unsupported,
    /// Any other failure of the operating system.
    #[error("I/O error on the backing")]
    Io(#[source] io::Error),
}

impl MediaError {
    /// Names the failures that a caller may want to tell apart.
    pub(super) fn from_errno(errno: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        match errno {
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace,
            Errno::OPNOTSUPP | Errno::NOSYS => Self::Unsupported,
            other => Self::Io(other.into()),
        }
    }
}

//! What can go wrong with LUKS2: at opening, unlocking and exporting.

use crate::namespace::{CostError, GeometryError, WorkError};
use crate::pmem::MediaError;
use crate::secret::KeyError;

/// Why one of the two header copies cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderFault {
    /// The media does not give the bytes, or there are too few.
    #[error("it cannot be read")]
    Unreadable(#[from] MediaError),
    /// The first bytes are not the magic.
    #[error("it does not begin with the LUKS magic")]
    Magic,
    /// Another version of LUKS.
    #[error("it has LUKS version {found}, but only version 2 is supported")]
    Version {
        /// The version found.
        found: u16,
    },
    /// The length is none that the specification has.
    #[error("it claims to be {header_bytes} bytes long, which no LUKS2 header is")]
    Length {
        /// The length found.
        header_bytes: u64,
    },
    /// The copy says that it belongs elsewhere.
    #[error("it belongs at byte {stored}, but is at byte {actual}")]
    Offset {
        /// The offset in the header.
        stored: u64,
        /// Where it was found.
        actual: u64,
    },
    /// Another checksum than SHA-256.
    #[error("its checksum is not SHA-256")]
    ChecksumAlgorithm,
    /// The checksum is wrong.
    #[error("its checksum is wrong")]
    Checksum,
    /// There is something behind the metadata.
    #[error("its metadata does not end in zeros")]
    Garbage,
}

/// Why bytes are not a LUKS2 volume that can be unlocked here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither copy begins with the magic.
    #[error("this is not a LUKS2 volume")]
    NotLuks,
    /// LUKS version 1.
    #[error("this is a LUKS1 volume, and only LUKS2 is supported (`cryptsetup convert --type luks2` makes one of it)")]
    Luks1,
    /// Neither copy can be used.
    #[error(
        "both copies of the LUKS2 header are damaged; primary: {}; secondary: {}",
        crate::namespace::Chain(primary),
        crate::namespace::Chain(secondary)
    )]
    BothCopiesDamaged {
        /// What is wrong with the primary one.
        primary: HeaderFault,
        /// What is wrong with the secondary one.
        secondary: HeaderFault,
    },
    /// The metadata is not what the specification describes.
    #[error("the metadata of the LUKS2 header is not what the specification describes")]
    Json(#[from] serde_json::Error),
    /// A number in the metadata is impossible.
    #[error("`{field}` in the LUKS2 metadata is impossible")]
    Field {
        /// The field.
        field: &'static str,
    },
    /// Key slot areas or headers overlap, or lie outside of their place.
    #[error("the area of LUKS2 key slot {id} is not within the key slots' place, or overlaps another one")]
    Area {
        /// The slot.
        id: u32,
    },
    /// A feature that must not be ignored.
    #[error("the LUKS2 header requires {name:?}, which this program does not know")]
    Requirement {
        /// The feature.
        name: String,
    },
    /// A reencryption was begun and not finished.
    #[error("a reencryption of the LUKS2 volume is in progress: let `cryptsetup reencrypt` finish it")]
    Reencryption,
    /// Something else that this program does not do.
    #[error("{what} {found:?} is not supported for LUKS2, only {supported}")]
    Unsupported {
        /// What it is.
        what: &'static str,
        /// What was found.
        found: String,
        /// What would do.
        supported: &'static str,
    },
    /// `cryptsetup` ignores the field for one segment, so two programs would disagree on the data.
    #[error("the LUKS2 segment has an iv_tweak of {iv_tweak}, and only 0 is supported")]
    IvTweak {
        /// The tweak found.
        iv_tweak: u64,
    },
    /// The data would begin within the header and its key slots, although they are in one file or device.
    #[error(
        "the data of the LUKS2 volume begins at byte {data_offset}, within the header and its key slots, which end at byte \
         {header_end}: the header is a detached one, and the data is in another file or device"
    )]
    DataInHeader {
        /// Where the data begins.
        data_offset: u64,
        /// Where both copies of the header and the place of the key slots end.
        header_end: u64,
    },
    /// The data area is impossible here.
    #[error("the data segment of the LUKS2 header is impossible here")]
    Geometry(#[from] GeometryError),
}

/// Why a LUKS2 volume could not be unlocked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnlockError {
    /// No key slot opens.
    #[error("wrong passphrase or key file: none of {slots_tried} LUKS2 key slots opens with it")]
    WrongPassphrase {
        /// Slots that were tried.
        slots_tried: usize,
    },
    /// There is no slot that this program can open.
    #[error("the LUKS2 volume has no key slot that can be used{}", reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}")))]
    NoSlot {
        /// Why the first one that there is cannot be used.
        reason: Option<String>,
    },
    /// The key derivation could not get its memory.
    #[error("deriving the key from the passphrase needs {memory_kib} KiB of memory, which could not be had")]
    Memory {
        /// Memory that the slot names.
        memory_kib: u32,
    },
    /// Trying the slots would take too long.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The key slot's area cannot be read.
    #[error("the area of a LUKS2 key slot cannot be read")]
    Media(#[from] MediaError),
    /// What the slot holds is no volume key.
    #[error("the volume key is not acceptable")]
    Key(#[from] KeyError),
}

/// Why no LUKS2 header can be written for a namespace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The header is not detached, so that there is no room for a LUKS2 header and its offsets.
    #[error("only a namespace with a detached header has its data where a LUKS2 header can describe it")]
    NotDetached,
    /// The tweaks do not begin at 0.
    #[error(
        "the first tweak is {first_tweak}, because the data does not begin at byte 0 of its backing: LUKS2 begins at 0"
    )]
    FirstTweak {
        /// The first tweak.
        first_tweak: u64,
    },
    /// The key is not kept.
    #[error("the namespace is ephemeral: there is no key to export")]
    Ephemeral,
    /// The cost is out of its bounds.
    #[error(transparent)]
    Cost(#[from] CostError),
    /// An unlocking of it would take too long.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The number of iterations is out of its bounds.
    #[error("{iterations} iterations of PBKDF2 are outside of {min}..={max}")]
    Iterations {
        /// The number given.
        iterations: u32,
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// Argon2id could not get its memory.
    #[error("deriving the key from the passphrase needs {memory_kib} KiB of memory, which could not be had")]
    Memory {
        /// Memory that was asked for.
        memory_kib: u32,
    },
    /// No random bytes.
    #[error(transparent)]
    Key(#[from] KeyError),
}

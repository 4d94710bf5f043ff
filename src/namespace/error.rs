//! What can go wrong with a namespace: at making it, at opening it, at unlocking it and at changing its header.

use std::error::Error;
use std::fmt;

use super::area::{CopyName, WriteError};
use super::geometry::GeometryError;
use super::header::{CopyFault, TooLong};
use super::kdf::{CredentialError, WorkError};
use super::metadata::SLOT_COUNT_MAX;
use super::signature::Signature;
use super::slot::SlotError;
use super::transform::TransformError;
use crate::pmem::MediaError;
use crate::secret::KeyError;

/// Why a namespace could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The place or the size is not possible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The key slot could not be made, or its label or that of the namespace is not acceptable.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The volume key could not be made, or is not acceptable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The volume key given is of another size than the cipher's.
    #[error("the volume key has {key_bytes} bytes, but the cipher needs {expected_bytes}")]
    KeyLength {
        /// Bytes given.
        key_bytes: usize,
        /// Bytes that the cipher needs.
        expected_bytes: usize,
    },
    /// Binding to the physical address needs a device that has one.
    #[error("the backing has no physical address to bind to: it is not a persistent-memory device, or sysfs hides it")]
    NoPhysicalAddress,
    /// The header could not be made durable.
    #[error("the header could not be written")]
    Write(#[from] WriteError),
    /// The header does not fit into its copy.
    #[error(transparent)]
    TooLong(#[from] TooLong),
}

/// Why bytes are not a namespace that can be unlocked here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither copy begins with the magic.
    #[error("this is not a daxcrypt namespace{}", found.map_or_else(String::new, |found| format!(" ({found} was found)")))]
    NotANamespace {
        /// What is there instead, when that is known.
        found: Option<Signature>,
    },
    /// The backing or partition is too small to hold a header area.
    #[error(
        "this is not a daxcrypt namespace: it has {available_bytes} bytes, fewer than the {header_bytes} of a header"
    )]
    TooSmall {
        /// Bytes from the base to the end.
        available_bytes: u64,
        /// Bytes of the header area.
        header_bytes: u64,
    },
    /// Neither copy of the header can be used.
    #[error("both copies of the header are damaged; copy A: {}; copy B: {}", Chain(a), Chain(b))]
    BothCopiesDamaged {
        /// What is wrong with copy A.
        a: CopyFault,
        /// What is wrong with copy B.
        b: CopyFault,
    },
    /// A newer program wrote the header.
    #[error("the header has format version {found}, but this program knows version {supported} only")]
    FutureVersion {
        /// Version of the header.
        found: u32,
        /// Version of this program.
        supported: u32,
    },
    /// A newer program used a feature that must not be ignored.
    #[error("the header requires the feature {name:?}, which this program does not know")]
    Requirement {
        /// The feature.
        name: String,
    },
    /// The header's numbers are impossible, or do not fit here.
    #[error("the geometry in the header is impossible here")]
    Geometry(#[from] GeometryError),
    /// The namespace was copied or moved from another base.
    #[error(
        "the namespace was relocated: its header was written for base {header_base}, but it begins at byte {actual_base}"
    )]
    Relocated {
        /// Base in the header.
        header_base: u64,
        /// Where the namespace begins.
        actual_base: u64,
    },
    /// The namespace is bound to a physical address that is not the backing's.
    #[error(
        "the namespace was relocated: it is bound to physical address {bound:#x}, but the backing {}",
        actual.map_or_else(|| "has none".to_owned(), |actual| format!("is at {actual:#x}"))
    )]
    AddressChanged {
        /// Address in the header.
        bound: u64,
        /// Address of the backing, when it has one.
        actual: Option<u64>,
    },
    /// The header belongs to data in another file.
    #[error("this is a detached header: give the backing that holds the data too")]
    Detached,
    /// The header given as a detached one holds its data itself.
    #[error("this header is not a detached one: its data follows it in the same backing")]
    NotDetached,
    /// The data of a detached header begins as something else does.
    #[error("the data begins with {found}: the detached header belongs to other data")]
    DataIsOther {
        /// What it begins with.
        found: &'static str,
    },
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
}

/// Why a namespace could not be unlocked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnlockError {
    /// No key slot opens with it.
    #[error("wrong passphrase or key file: none of {slots_tried} key slots opens with it")]
    WrongCredential {
        /// Slots that were tried.
        slots_tried: u32,
    },
    /// There is no slot of the credential's kind.
    #[error(
        "no key slot is of that kind: the namespace has {passphrase_slots} passphrase and {key_file_slots} key-file slots"
    )]
    NoSlotOfKind {
        /// Slots that a passphrase opens.
        passphrase_slots: u32,
        /// Slots that a key file opens.
        key_file_slots: u32,
    },
    /// The slot asked for is empty.
    #[error("key slot {id} is empty")]
    EmptySlot {
        /// The slot.
        id: u32,
    },
    /// All key slots are gone.
    #[error("the namespace has no key slot: it was erased")]
    Erased,
    /// There is no key to be had.
    #[error("the namespace is ephemeral: it is opened without a key")]
    Ephemeral,
    /// An ephemeral opening of a namespace that keeps its key.
    #[error("the namespace is not ephemeral: it needs its key")]
    NotEphemeral,
    /// A volume key that was given as such is not the one that wrote the header.
    #[error("that is not the volume key of this namespace, or its header is forged or damaged")]
    OtherVolumeKey,
    /// The credential cannot be used.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// Trying the slots would take too long.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The key opened, but it did not write this header.
    #[error("the header is forged or damaged: it opens, but its MAC is not that of the key")]
    Forged,
    /// The newer copy of the header is not genuine, but the other one is. Which of them counts is not for a program to decide:
    /// an older header may have key slots that were removed since.
    #[error(
        "header copy {newer} is the newer one, and it is forged or damaged, or of a re-key that was cut short: copy {genuine} \
         opens and is genuine"
    )]
    OtherCopy {
        /// The copy with the greater sequence number.
        newer: CopyName,
        /// The copy that the key opens and has written.
        genuine: CopyName,
    },
    /// The data has not the tag of its detached header.
    #[error(
        "the tag of this header is not at byte {at} of the data: this is other data, or data of before a resize or re-key, or it \
         was cut off, or something has overwritten the tag"
    )]
    OtherData {
        /// Where in the backing of the data the tag should be.
        at: u64,
        /// What kept it from being read.
        source: Option<MediaError>,
    },
    /// Somebody who has it in use has changed it meanwhile.
    #[error("somebody else changed the header while it was being unlocked: try again")]
    Changed,
    /// What an earlier user left in the header area could not be made durable, so nothing may be changed on top of it.
    #[error(
        "what the header area shows could not be made durable: until the media take writes, open it for reading only"
    )]
    Settle(#[source] TransformError),
    /// The namespace was being re-keyed, and where that stands cannot be read.
    #[error("the namespace was being re-keyed, and cannot be read")]
    Transform(#[from] TransformError),
    /// What the slot holds is not a volume key, or no random key could be had.
    #[error("the volume key is not acceptable")]
    Key(#[from] KeyError),
}

/// Why the header of an unlocked namespace could not be changed. The namespace is as it was, unless the error is
/// [`UpdateError::Write`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// The header could not be made durable. The old header or the new one is on media.
    #[error("the header could not be written")]
    Write(#[source] WriteError),
    /// The header on media is not the one that was read, so it was not written over.
    #[error("somebody else changed the header after it was read here: nothing was written, open the namespace again")]
    Changed,
    /// The header outgrows its copy.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The sequence number cannot grow.
    #[error("the header has been updated 2^64 - 1 times")]
    SequenceExhausted,
    /// The namespace keeps no key, hence no header that could be authenticated.
    #[error("an ephemeral namespace has a fixed header and no key slots")]
    Ephemeral,
    /// Other key slots than now would open the namespace.
    #[error("the backup has other key slots than the header here: {} removed since would open it again, {} made since would not",
        slot_list(.revived), slot_list(.lost))]
    OtherSlots {
        /// Slots of the backup that are not there any more.
        revived: Vec<u32>,
        /// Slots that were not there yet.
        lost: Vec<u32>,
    },
    /// The header on media is that of another volume key.
    #[error("the header here is under another volume key, and so is the data: it was re-keyed since the backup")]
    OtherVolumeKey,
    /// There is no such slot number.
    #[error("key slot {id} does not exist: slots are numbered 0 to {}", SLOT_COUNT_MAX - 1)]
    SlotNumber {
        /// The number given.
        id: u32,
    },
    /// The slot is taken.
    #[error("key slot {id} is in use")]
    SlotInUse {
        /// The slot.
        id: u32,
    },
    /// The slot is empty.
    #[error("key slot {id} is empty")]
    SlotEmpty {
        /// The slot.
        id: u32,
    },
    /// Every slot is taken.
    #[error("all {SLOT_COUNT_MAX} key slots are in use")]
    SlotsFull,
    /// Without this slot nobody could ever unlock the namespace again.
    #[error("key slot {id} is the last one: without it the data is lost")]
    LastSlot {
        /// The slot.
        id: u32,
    },
    /// The key slot could not be made, or its label or that of the namespace is not acceptable.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// No random bytes.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A slot's sealed wrapping key does not open, so the slot cannot follow a change of size.
    #[error("key slot {id} cannot be wrapped again: its sealed wrapping key is damaged")]
    RewrapFailed {
        /// The slot.
        id: u32,
    },
    /// The new size is not possible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A re-key is under way.
    #[error("a re-key is under way: the size can change when it has ended")]
    Transforming,
    /// Shrinking loses data.
    #[error("{new_bytes} bytes are fewer than the present {old_bytes}: shrinking loses data")]
    Shrinks {
        /// Size now.
        old_bytes: u64,
        /// Size asked for.
        new_bytes: u64,
    },
}

impl From<WriteError> for UpdateError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Changed => Self::Changed,
            other => Self::Write(other),
        }
    }
}

/// Shows an error and its sources in one line.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

fn slot_list(slots: &[u32]) -> String {
    let numbers: Vec<_> = slots.iter().map(u32::to_string).collect();
    match numbers.len() {
        0 => "none".into(),
        1 => format!("slot {}", numbers[0]),
        _ => format!("slots {}", numbers.join(", ")),
    }
}

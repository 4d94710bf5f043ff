//! What is on media: geometry, the header with its key slots, and how a namespace is made, opened and unlocked.
//!
//! `format` makes a [`Namespace`]; [`LockedNamespace::open`] finds one and checks what can be checked without a key, and
//! [`LockedNamespace::unlock_key`] turns it into a [`Namespace`], which holds the volume key and may change the header.
//! The bytes are specified in [`format`](mod@specification). This layer encrypts no data.
#![deny(clippy::big_endian_bytes)]

mod area;
mod backup;
mod carry;
mod create;
mod data_tag;
mod destroy;
mod error;
mod geometry;
mod header;
mod hex;
mod info;
mod journal;
mod kdf;
mod key_spec;
mod metadata;
mod moved;
mod open;
mod recovery;
mod region;
mod settle;
mod signature;
mod site;
mod slide;
mod slot;
mod transform;
#[doc = include_str!("format.md")]
pub mod specification {}
mod state;
mod unlocked;
mod wipe;

pub use area::{CopyName, CopyState, WriteError};
pub use backup::{
    BACKUP_BYTES, Proof, RepairKey, RestoreError, check_place, inspect, inspect_backup, open_backup, open_copy,
    present_header, prove, restore_unchecked,
};
pub use create::{FormatOptions, format, format_ephemeral, format_withheld};
pub use data_tag::detached_bytes;
pub use destroy::destroy;
pub use error::{Chain, FormatError, OpenError, UnlockError, UpdateError};
pub use geometry::{
    DATA_ALIGNMENT_BYTES, DataUnit, Geometry, GeometryError, HEADER_AREA_BYTES, Layout, OutOfRange, Placement,
    SIZE_BYTES_MAX, SIZE_BYTES_WARN, TweakValue, data_offset_for, detached_data_offset_for, size_that_fits,
};
pub use header::{CopyFault, FORMAT_VERSION, TooLong};
pub use info::{Header, SlotInfo};
pub use journal::{Journal, Record, WINDOW_BYTES_MAX};
pub use kdf::{
    CostError, Credential, CredentialError, KEY_FILE_BYTES_MAX, KEY_FILE_BYTES_MIN, Kdf, KdfCost, KdfWork,
    PASSPHRASE_BYTES_MAX, WorkError,
};
pub use key_spec::{KEY_SPEC_BYTES_MAX, KeySpecError, volume_key_from_spec};
pub use metadata::{Cipher, LABEL_BYTES_MAX, MetadataError, SLOT_COUNT_MAX};
pub use moved::{AdoptError, MovedNamespace};
pub use open::LockedNamespace;
pub use recovery::recovery_phrase;
pub use region::{REGION_ALIGNMENT_BYTES, REGION_PARTITION_TYPE, Region, RegionError, RegionPartition, TableFault};
pub use signature::{Signature, signature_found};
pub use site::Site;
pub use slide::{SlideError, begin_slide};
pub use slot::SlotError;
pub use state::TransformKind;
pub use transform::{OtherSlots, Pending, RekeyOptions, TransformError};
pub use unlocked::Namespace;
pub use wipe::overwrite_with_zeros;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

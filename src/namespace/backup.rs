//! Putting a backup of a header back.
//!
//! Nothing is written before the backup has proved itself: well-formed, for this place, opened by a credential, and
//! genuine. It becomes the newest header with a sequence number above all that are there, so neither copy that it
//! replaces can win over it.

use std::sync::Arc;

use uuid::Uuid;

use super::area::{Chosen, CopyName, CopyState, HeaderArea, choose};
use super::error::{OpenError, UnlockError, UpdateError};
use super::geometry::HEADER_AREA_BYTES;
use super::header::{COPY_BYTES, CopyFault, HeaderCopy};
use super::kdf::Credential;
use super::open::LockedNamespace;
use super::unlocked::Namespace;
use crate::pmem::Backing;

/// Why a backup was not put back. Nothing has changed on media, unless the error is [`RestoreError::Update`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The backup has another length.
    #[error("a header backup has {expected_bytes} bytes, but this one has {len_bytes}")]
    Length {
        /// Bytes given.
        len_bytes: usize,
        /// Bytes expected.
        expected_bytes: usize,
    },
    /// The backup is damaged, or of another version.
    #[error("the header backup cannot be used")]
    Backup(#[source] CopyFault),
    /// A header that is there belongs to another namespace.
    #[error("the backup is of namespace {backup}, but the header here is that of {present}")]
    OtherNamespace {
        /// Identity in the backup.
        backup: Uuid,
        /// Identity in the present header.
        present: Uuid,
    },
    /// The backup does not belong at this place.
    #[error("the header backup does not belong here")]
    Place(#[from] OpenError),
    /// The backup does not unlock.
    #[error("the header backup does not unlock")]
    Unlock(#[from] UnlockError),
    /// The header could not be written.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// Makes `backup` the header of the namespace in the `available_bytes` from `base` on.
///
/// A readable header of another namespace is overwritten only with `even_other`.
///
/// # Errors
///
/// [`RestoreError`].
pub fn restore(
    backing: Arc<Backing>,
    base: u64,
    available_bytes: u64,
    backup: &[u8],
    credential: &Credential,
    even_other: bool,
) -> Result<Namespace, RestoreError> {
    let length = RestoreError::Length { len_bytes: backup.len(), expected_bytes: COPY_BYTES };
    let image: &[u8; COPY_BYTES] = backup.try_into().map_err(|_| length)?;
    let copy = HeaderCopy::decode(image).map_err(RestoreError::Backup)?;
    let available_bytes = available_bytes.min(backing.len_bytes().saturating_sub(base));
    let too_small = OpenError::TooSmall { available_bytes, header_bytes: HEADER_AREA_BYTES };
    let area = HeaderArea::new(backing, base).ok_or(too_small)?;

    let [a, b] = CopyName::BOTH.map(|name| area.read_copy(name));
    let sequences = [&a, &b].map(|copy| copy.as_ref().map_or(0, |copy| copy.sequence));
    let newest = match choose(a, b) {
        Ok(present) if present.copy.metadata.uuid != copy.metadata.uuid && !even_other => {
            let (backup, present) = (copy.metadata.uuid, present.copy.metadata.uuid);
            return Err(RestoreError::OtherNamespace { backup, present });
        }
        Ok(present) => present.name,
        Err(_) => CopyName::A,
    };
    let sequence = copy.sequence.max(sequences[0]).max(sequences[1]);
    let states = [const { CopyState::Good { sequence: 0 } }; 2];
    let mut namespace =
        LockedNamespace::check(area, Chosen { copy, name: newest, states }, available_bytes)?.unlock_key(credential)?;
    namespace.sequence = sequence;
    let metadata = namespace.metadata.clone();
    namespace.update(metadata)?;
    Ok(namespace)
}

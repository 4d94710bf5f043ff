//! Putting a backup of a header back, and looking at one.
//!
//! Nothing is written before the backup has proved itself: well-formed, for this place, opened by a credential, and
//! genuine. It becomes the newest header with a sequence number above all that are there, so neither copy that it
//! replaces can win over it.

use uuid::Uuid;

use super::area::{Chosen, CopyName, CopyState, WriteError, choose};
use super::error::OpenError;
use super::header::{COPY_BYTES, CopyFault, HeaderCopy};
use super::info::Header;
use super::open::{LockedNamespace, too_small};
use super::site::Site;

/// Why a backup was not put back. Nothing has changed on media, unless the error is [`RestoreError::Write`].
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
    /// The header could not be written.
    #[error("the header could not be written")]
    Write(#[from] WriteError),
}

/// Bytes of a header backup.
pub const BACKUP_BYTES: usize = COPY_BYTES;

/// The namespace at `site` as `backup` describes it. Unlocking it proves the backup, and [`Namespace::write_header`](super::Namespace::write_header) then
/// makes it the header. Until then nothing changes on media.
///
/// A readable header of another namespace is in the way, unless `even_other`.
///
/// # Errors
///
/// [`RestoreError`].
pub fn open_backup(site: Site, backup: &[u8], even_other: bool) -> Result<LockedNamespace, RestoreError> {
    let mut copy = HeaderCopy::decode(image(backup)?).map_err(RestoreError::Backup)?;
    let area = site.area().ok_or_else(|| too_small(&site))?;
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
    // The next update writes a number above this one.
    copy.sequence = copy.sequence.max(sequences[0]).max(sequences[1]);
    let states = [const { CopyState::Good { sequence: 0 } }; 2];
    Ok(LockedNamespace::check(site, area, Chosen { copy, name: newest, states })?)
}

/// Makes `backup` the header at `site` as it is, without a key: it may be that of another namespace, and whether anything
/// opens it is not known. It must be well-formed and its geometry possible here.
///
/// The copy that is the header now is overwritten last, so a crash leaves the present header or the backup.
///
/// # Errors
///
/// [`RestoreError`].
pub fn restore_unchecked(site: Site, backup: &[u8]) -> Result<(), RestoreError> {
    let image = image(backup)?;
    let copy = HeaderCopy::decode(image).map_err(RestoreError::Backup)?;
    let area = site.area().ok_or_else(|| too_small(&site))?;
    let [a, b] = CopyName::BOTH.map(|name| area.read_copy(name));
    let newest = choose(a, b).map_or(CopyName::A, |present| present.name);
    let states = [const { CopyState::Good { sequence: 0 } }; 2];
    LockedNamespace::check(site, area.clone(), Chosen { copy, name: newest, states })?;
    for name in [newest.other(), newest] {
        area.write_copy(name, image)?;
    }
    Ok(())
}

/// What a header backup says, without key material. Only its form is checked.
///
/// # Errors
///
/// [`RestoreError::Length`] or [`RestoreError::Backup`].
pub fn inspect_backup(backup: &[u8]) -> Result<Header, RestoreError> {
    let copy = HeaderCopy::decode(image(backup)?).map_err(RestoreError::Backup)?;
    let states = [0, 1].map(|_| CopyState::Good { sequence: copy.sequence });
    Ok(Header::of(&copy.metadata, copy.sequence, &states))
}

/// What each header copy at `site` says, or why it says nothing. Only their form is checked: the namespace may have been
/// moved, and its geometry may be impossible.
///
/// # Errors
///
/// [`OpenError::TooSmall`].
pub fn inspect(site: &Site) -> Result<[Result<Header, CopyFault>; 2], OpenError> {
    let area = site.area().ok_or_else(|| too_small(site))?;
    Ok(CopyName::BOTH.map(|name| {
        let copy = area.read_copy(name)?;
        let states = [0, 1].map(|_| CopyState::Good { sequence: copy.sequence });
        Ok(Header::of(&copy.metadata, copy.sequence, &states))
    }))
}

fn image(backup: &[u8]) -> Result<&[u8; COPY_BYTES], RestoreError> {
    backup.try_into().map_err(|_| RestoreError::Length { len_bytes: backup.len(), expected_bytes: COPY_BYTES })
}

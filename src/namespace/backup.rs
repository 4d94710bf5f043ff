//! Putting a backup of a header back, and looking at one.
//!
//! Nothing is written before the backup has proved itself: well-formed, for this place, opened by a credential, and
//! genuine. It becomes the newest header with a sequence number above all that are there, so neither copy that it
//! replaces can win over it.

use uuid::Uuid;

use super::area::{Chosen, CopyName, CopyState, WriteError, choose};
use super::error::OpenError;
use super::geometry::HEADER_AREA_BYTES;
use super::header::{COPY_BYTES, CopyFault, HeaderCopy};
use super::info::Header;
use super::kdf::Credential;
use super::metadata::Metadata;
use super::open::{LockedNamespace, too_small, volume_key_of, was_written_by};
use super::site::Site;
use crate::secret::{self, VolumeKey};

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
    /// The header copy is damaged, or of another version.
    #[error("that header copy cannot be used")]
    Copy(#[source] CopyFault),
    /// A header that is there belongs to another namespace.
    #[error("the backup is of namespace {backup}, but the header here is that of {present}")]
    OtherNamespace {
        /// Identity in the backup.
        backup: Uuid,
        /// Identity in the present header.
        present: Uuid,
    },
    /// The namespace has grown since the backup.
    #[error(
        "the data area has {present_bytes} bytes, and had {backup_bytes} when the backup was made: what lies behind would be lost"
    )]
    Smaller {
        /// Bytes in the backup.
        backup_bytes: u64,
        /// Bytes now.
        present_bytes: u64,
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
/// A readable header is in the way when it is that of another namespace, or says that its data area has grown since,
/// unless `even_other`.
///
/// # Errors
///
/// [`RestoreError`].
pub fn open_backup(site: Site, backup: &[u8], even_other: bool) -> Result<LockedNamespace, RestoreError> {
    let mut copy = HeaderCopy::decode(image(backup)?).map_err(RestoreError::Backup)?;
    let mut area = site.area().ok_or_else(|| too_small(&site))?;
    let [a, b] = area.read_copies();
    let sequences = [&a, &b].map(|copy| copy.as_ref().map_or(0, |copy| copy.sequence));
    let newest = match choose(a, b) {
        Ok(present) => {
            if !even_other {
                compare(&copy.metadata, &present.copy.metadata)?;
            }
            present.name
        }
        Err(_) => CopyName::A,
    };
    // The next update writes a number above this one.
    copy.sequence = copy.sequence.max(sequences[0]).max(sequences[1]);
    let states = [const { CopyState::Good { sequence: 0 } }; 2];
    Ok(LockedNamespace::check(site, area, Chosen { copy, name: newest, other: None, states })?.not_on_media())
}

/// What a backup would lose although nobody has asked for it.
fn compare(backup: &Metadata, present: &Metadata) -> Result<(), RestoreError> {
    if present.uuid != backup.uuid {
        return Err(RestoreError::OtherNamespace { backup: backup.uuid, present: present.uuid });
    }
    let (backup_bytes, present_bytes) = (backup.size_bytes, present.size_bytes);
    if backup_bytes < present_bytes { Err(RestoreError::Smaller { backup_bytes, present_bytes }) } else { Ok(()) }
}

/// What is in the header area at `site`, to be kept before it is replaced: the copy in use, as a backup of it; of a header
/// that cannot be used, the whole area. `None` when there are only zeros.
///
/// # Errors
///
/// [`OpenError::TooSmall`], [`OpenError::Media`].
pub fn present_header(site: &Site) -> Result<Option<Vec<u8>>, OpenError> {
    let area = site.area().ok_or_else(|| too_small(site))?;
    let [a, b] = CopyName::BOTH.map(|name| area.read_copy(name));
    if let Ok(present) = choose(a, b) {
        return Ok(Some(area.read_image(present.name)?.to_vec()));
    }
    let mut bytes = vec![0; usize::try_from(HEADER_AREA_BYTES).unwrap_or(usize::MAX)];
    area.backing().read(area.base()..area.base() + HEADER_AREA_BYTES, |source| source.copy_to(&mut bytes))?;
    Ok(bytes.iter().any(|&byte| byte != 0).then_some(bytes))
}

/// Whether `backup` is well-formed and its geometry possible at `site`.
///
/// # Errors
///
/// [`RestoreError`].
pub fn check_place(site: &Site, backup: &[u8]) -> Result<(), RestoreError> {
    let copy = HeaderCopy::decode(image(backup)?).map_err(RestoreError::Backup)?;
    let area = site.area().ok_or_else(|| too_small(site))?;
    let states = [const { CopyState::Good { sequence: 0 } }; 2];
    LockedNamespace::check(site.clone(), area, Chosen { copy, name: CopyName::A, other: None, states })?;
    Ok(())
}

/// Makes `backup` the header at `site` as it is, without a key: it may be that of another namespace, and whether anything
/// opens it is not known. It must be well-formed and its geometry possible here.
///
/// The copy that is the header now is overwritten last, so a crash leaves the present header or the backup.
///
/// # Errors
///
/// [`RestoreError`].
pub fn restore_unchecked(site: &Site, backup: &[u8]) -> Result<(), RestoreError> {
    let image = image(backup)?;
    check_place(site, backup)?;
    let mut area = site.area().ok_or_else(|| too_small(site))?;
    let [a, b] = area.read_copies();
    let newest = choose(a, b).map_or(CopyName::A, |present| present.name);
    // What is there is what a power cut is to leave until the backup is durable.
    area.rewrite_copy(newest)?;
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
    let copies = site.area().ok_or_else(|| too_small(site))?.read_copies();
    let states = [CopyState::of(&copies[0]), CopyState::of(&copies[1])];
    Ok(copies.map(|copy| copy.map(|copy| Header::of(&copy.metadata, copy.sequence, &states))))
}

/// What a key says of a header copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Proof {
    /// This slot opens with it, and the volume key in it has written the copy.
    Genuine {
        /// The slot; `None` when the volume key itself was given.
        slot: Option<u32>,
    },
    /// A slot opens, but something else in the copy is not as the volume key wrote it.
    Forged,
    /// No slot opens: a wrong key, or a forged copy.
    NotOpened,
    /// It is no header.
    Unusable,
}

/// What `key` says of both copies at `site`.
///
/// # Errors
///
/// [`OpenError::TooSmall`].
pub fn prove(site: &Site, key: &RepairKey<'_>) -> Result<[Proof; 2], OpenError> {
    let area = site.area().ok_or_else(|| too_small(site))?;
    Ok(CopyName::BOTH.map(|name| match (area.read_copy(name), key) {
        (Err(_), _) => Proof::Unusable,
        (Ok(copy), RepairKey::Credential(credential)) => {
            match secret::with_wiped_stack(|| volume_key_of(&copy, credential)) {
                Some((slot, key)) if was_written_by(&copy, &key) => Proof::Genuine { slot: Some(slot) },
                Some(_) => Proof::Forged,
                None => Proof::NotOpened,
            }
        }
        (Ok(copy), RepairKey::VolumeKey(key)) if was_written_by(&copy, key) => Proof::Genuine { slot: None },
        (Ok(_), RepairKey::VolumeKey(_)) => Proof::NotOpened,
    }))
}

/// What proves a copy.
#[derive(Debug)]
pub enum RepairKey<'a> {
    /// The credential of a slot.
    Credential(&'a Credential),
    /// The volume key itself.
    VolumeKey(&'a VolumeKey),
}

/// The namespace at `site` as header copy `name` describes it, whatever the other one says; unlocking it and
/// [`Namespace::write_header`](super::Namespace::write_header) make it the header.
///
/// # Errors
///
/// [`RestoreError::Copy`] and [`RestoreError::Place`].
pub fn open_copy(site: Site, name: CopyName) -> Result<LockedNamespace, RestoreError> {
    let mut area = site.area().ok_or_else(|| too_small(&site))?;
    let [a, b] = area.read_copies();
    let (copy, other) = if name == CopyName::A { (a, b) } else { (b, a) };
    let mut copy = copy.map_err(RestoreError::Copy)?;
    copy.sequence = copy.sequence.max(other.map_or(0, |other| other.sequence));
    let states = [const { CopyState::Good { sequence: 0 } }; 2];
    Ok(LockedNamespace::check(site, area, Chosen { copy, name, other: None, states })?.not_on_media())
}

fn image(backup: &[u8]) -> Result<&[u8; COPY_BYTES], RestoreError> {
    backup.try_into().map_err(|_| RestoreError::Length { len_bytes: backup.len(), expected_bytes: COPY_BYTES })
}

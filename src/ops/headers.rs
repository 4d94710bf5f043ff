//! Headers as files: backups, backups that are put back, and LUKS2 headers for the same data.
//!
//! A backup is the header copy in use, as it is: whoever has it and the key of one of its slots has the volume key, also
//! after that slot was removed.

use uuid::Uuid;

use super::error::{Cause, Error};
use super::gate::Operation;
use super::location::Location;
use super::open::Key;
use crate::luks2::{self, ExportOptions};
use crate::namespace::{self, Credential, Header, LockedNamespace, Namespace};

/// A backup that was made.
#[derive(Debug)]
pub struct Backup {
    /// The namespace.
    pub uuid: Uuid,
    /// To be kept like a key.
    pub bytes: Vec<u8>,
}

/// The header of the namespace at `location`; needs no key.
///
/// # Errors
///
/// [`Error`].
pub fn backup(location: &Location) -> Result<Backup, Error> {
    let found = location.find(Operation::HeaderBackup)?;
    let failed = |source| Error::new(Operation::HeaderBackup, location.header_path(), Cause::Media(source));
    let bytes = found.locked().backup().map_err(failed)?;
    Ok(Backup { uuid: found.header().uuid, bytes })
}

/// A backup that belongs where it is to be put back, and has not proved itself yet.
#[derive(Debug)]
pub struct Restoration {
    location: Location,
    locked: LockedNamespace,
}

impl Restoration {
    /// Compares `backup` with the place where it is to be put back.
    ///
    /// # Errors
    ///
    /// [`Cause::Restore`]; nothing on media has changed.
    pub fn open(location: &Location, backup: &[u8]) -> Result<Self, Error> {
        let site = location.open(Operation::HeaderRestore)?;
        let locked = namespace::open_backup(site, backup, false);
        let locked = locked.map_err(|source| Error::new(Operation::HeaderRestore, location.path(), source))?;
        Ok(Self { location: location.clone(), locked })
    }

    /// What the backup says.
    #[must_use]
    pub const fn header(&self) -> &Header {
        self.locked.header()
    }

    /// Unlocks the backup, which proves it, and makes it the header.
    ///
    /// # Errors
    ///
    /// [`Cause::Unlock`], with nothing changed; [`Cause::Update`].
    pub fn restore(self, key: Key<'_>) -> Result<Header, Error> {
        let Self { location, locked } = self;
        let failed = |cause: Cause| Error::new(Operation::HeaderRestore, location.path(), cause);
        let unlocked = match key {
            Key::Credential(credential) => locked.unlock_key(credential),
            Key::Slot(credential, id) => locked.unlock_slot(credential, id),
            Key::VolumeKey(volume_key) => locked.unlock_volume_key(volume_key),
            Key::Ephemeral => locked.unlock_ephemeral(),
        };
        let mut namespace = unlocked.map_err(|error| failed(error.into()))?;
        namespace.write_header().map_err(|error| failed(error.into()))?;
        Ok(namespace.header())
    }
}

/// Makes `backup` the header at `location` without trying whether anything unlocks it, even over that of another namespace.
///
/// # Errors
///
/// [`Cause::Restore`].
pub fn restore_unchecked(location: &Location, backup: &[u8]) -> Result<(), Error> {
    let site = location.open(Operation::HeaderRestore)?;
    namespace::restore_unchecked(site, backup)
        .map_err(|source| Error::new(Operation::HeaderRestore, location.path(), source))
}

/// A LUKS2 header with one slot for `credential`, with which cryptsetup opens the data of `namespace`.
///
/// # Errors
///
/// [`Cause::ExportLuks2`].
pub fn export_luks2(
    location: &Location,
    namespace: &Namespace,
    credential: &Credential,
    options: ExportOptions,
) -> Result<Vec<u8>, Error> {
    luks2::export(namespace, credential, options)
        .map_err(|source| Error::new(Operation::ExportLuks2, location.path(), source))
}

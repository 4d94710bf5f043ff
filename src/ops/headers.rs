//! Headers as files: backups, backups that are put back, and LUKS2 headers for the same data.
//!
//! A backup is the header copy in use, as it is: whoever has it and the key of one of its slots has the volume key, also
//! after that slot was removed.

use std::path::PathBuf;
use std::{fs, io};

use uuid::Uuid;

use super::error::{Cause, Error};
use super::gate::{self, Operation, Way};
use super::location::Location;
use super::open::Key;
#[cfg(feature = "luks2")]
use crate::luks2::{self, ExportOptions};
#[cfg(feature = "luks2")]
use crate::namespace::Credential;
use crate::namespace::{
    self, CopyFault, CopyName, HEADER_AREA_BYTES, Header, LockedNamespace, Namespace, Proof, RepairKey, Site,
    UnlockError,
};
use crate::pmem::{Allocation, Backing, OpenError};

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

/// A file for a detached header that was lost or cut off: made as long as a header area, and taken back unless it was needed.
#[derive(Debug)]
struct HeaderFile {
    made: Option<PathBuf>,
}

impl HeaderFile {
    /// Makes the file of the header that `location` names, when the header in `backup` is a detached one.
    fn prepare(location: &Location, backup: &[u8]) -> Result<Self, Error> {
        let failed = |cause: Cause| Error::new(Operation::HeaderRestore, location.header_path(), cause);
        let is_detached = namespace::inspect_backup(backup).map_err(|source| failed(source.into()))?.detached;
        let Some(path) = location.detached_header().filter(|_| is_detached) else { return Ok(Self { made: None }) };
        match fs::metadata(path) {
            Ok(found) if found.is_file() && found.len() < HEADER_AREA_BYTES => {
                // Too short for a header: what there is of one stays in front.
                let file = fs::File::options().write(true).open(path);
                let longer = file.and_then(|file| file.set_len(HEADER_AREA_BYTES).and_then(|()| file.sync_all()));
                longer.map_err(|source| failed(OpenError::Io(source).into()))?;
                Ok(Self { made: None })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = Backing::create(path, HEADER_AREA_BYTES, Allocation::Full);
                made.map_err(|source| failed(source.into()))?;
                Ok(Self { made: Some(path.into()) })
            }
            _ => Ok(Self { made: None }),
        }
    }

    /// It holds a header now.
    fn keep(mut self) {
        self.made = None;
    }
}

impl Drop for HeaderFile {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = fs::remove_file(path); // the first error is the one to report
        }
    }
}

/// Opens `location` if the gate lets `operation` at what is there, readable or not; `force` says that it may be lost.
fn open_for(operation: Operation, location: &Location, force: bool) -> Result<Site, Error> {
    let site = location.open(operation)?;
    let states = gate::states_of_place(&LockedNamespace::open_in(site.clone()));
    let way = Way { detached: site.is_detached(), force, ..Way::before_the_key(operation) };
    gate::check(operation, &states, way).map_err(|refusal| Error::new(operation, location.path(), refusal))?;
    Ok(site)
}

/// A backup that belongs where it is to be put back, and has not proved itself yet.
#[derive(Debug)]
pub struct Restoration {
    location: Location,
    locked: LockedNamespace,
    file: HeaderFile,
}

impl Restoration {
    /// Compares `backup` with the place where it is to be put back, and with the header there. The file of a detached header is made when it is missing.
    ///
    /// # Errors
    ///
    /// [`Cause::Restore`], [`Cause::Refused`]; nothing on media has changed.
    pub fn open(location: &Location, backup: &[u8]) -> Result<Self, Error> {
        let file = HeaderFile::prepare(location, backup)?;
        let site = open_for(Operation::HeaderRestore, location, false)?;
        let locked = namespace::open_backup(site, backup, false);
        let locked = locked.map_err(|source| Error::new(Operation::HeaderRestore, location.path(), source))?;
        Ok(Self { location: location.clone(), locked, file })
    }

    /// What the backup says.
    #[must_use]
    pub const fn header(&self) -> &Header {
        self.locked.header()
    }

    /// Unlocks the backup, which proves it, and makes it the header: with other key slots than those that are there with
    /// `replace_slots` only.
    ///
    /// # Errors
    ///
    /// [`Cause::Unlock`], with nothing changed; [`Cause::Update`].
    pub fn restore(self, key: Key<'_>, replace_slots: bool) -> Result<Header, Error> {
        let Self { location, locked, file } = self;
        let failed = |cause: Cause| Error::new(Operation::HeaderRestore, location.path(), cause);
        let namespace = unlock(locked, key).map_err(|error| failed(error.into()))?;
        let header = put(namespace, replace_slots).map_err(failed)?;
        file.keep();
        Ok(header)
    }
}

/// A place that a backup is to be put back to without a key, whatever is there.
#[derive(Debug)]
pub struct Forced {
    location: Location,
    site: Site,
    file: HeaderFile,
}

impl Forced {
    /// Opens and locks the place. The file of a detached header is made when it is missing.
    ///
    /// # Errors
    ///
    /// [`Cause::Open`], [`Cause::Region`], [`Cause::Refused`]; [`Cause::Restore`] when `backup` does not belong there.
    pub fn open(location: &Location, backup: &[u8]) -> Result<Self, Error> {
        let file = HeaderFile::prepare(location, backup)?;
        let site = open_for(Operation::HeaderRestore, location, true)?;
        namespace::check_place(&site, backup)
            .map_err(|source| Error::new(Operation::HeaderRestore, location.path(), source))?;
        Ok(Self { location: location.clone(), site, file })
    }

    /// What is there now and would be lost; `None` when nothing is.
    ///
    /// # Errors
    ///
    /// [`Cause::Namespace`].
    pub fn present(&self) -> Result<Option<Vec<u8>>, Error> {
        namespace::present_header(&self.site)
            .map_err(|source| Error::new(Operation::HeaderRestore, self.location.header_path(), source))
    }

    /// Makes `backup` the header without trying whether anything unlocks it, even over that of another namespace.
    ///
    /// # Errors
    ///
    /// [`Cause::Restore`].
    pub fn restore(self, backup: &[u8]) -> Result<(), Error> {
        let Self { location, site, file } = self;
        namespace::restore_unchecked(&site, backup)
            .map_err(|source| Error::new(Operation::HeaderRestore, location.path(), source))?;
        file.keep();
        Ok(())
    }
}

/// A header copy, and what a key says of it.
#[derive(Debug)]
pub struct CopyProof {
    /// Which copy.
    pub name: CopyName,
    /// What it says, or why it says nothing.
    pub header: Result<Header, CopyFault>,
    /// What the key says of it.
    pub proof: Proof,
}

/// The two header copies of a namespace, of which one is to be chosen.
#[derive(Debug)]
pub struct Repair {
    location: Location,
    site: Site,
}

impl Repair {
    /// Opens and locks the namespace at `location`, whatever its header copies say.
    ///
    /// # Errors
    ///
    /// [`Cause::Open`], [`Cause::Region`], [`Cause::Refused`].
    pub fn open(location: &Location) -> Result<Self, Error> {
        Ok(Self { location: location.clone(), site: open_for(Operation::HeaderRepair, location, false)? })
    }

    /// Both copies, and what `key` says of each.
    ///
    /// # Errors
    ///
    /// [`Cause::Namespace`] when there is no room for a header.
    pub fn prove(&self, key: &RepairKey<'_>) -> Result<[CopyProof; 2], Error> {
        let failed =
            |source: namespace::OpenError| Error::new(Operation::HeaderRepair, self.location.header_path(), source);
        let [a, b] = namespace::inspect(&self.site).map_err(failed)?;
        let [of_a, of_b] = namespace::prove(&self.site, key).map_err(failed)?;
        Ok([
            CopyProof { name: CopyName::A, header: a, proof: of_a },
            CopyProof { name: CopyName::B, header: b, proof: of_b },
        ])
    }

    /// Makes copy `name` the header, in both places; only one that `key` unlocks and has written.
    ///
    /// # Errors
    ///
    /// [`Cause::Restore`], [`Cause::Unlock`], with nothing changed; [`Cause::Update`].
    pub fn choose(self, name: CopyName, key: Key<'_>) -> Result<Header, Error> {
        let Self { location, site } = self;
        let failed = |cause: Cause| Error::new(Operation::HeaderRepair, location.header_path(), cause);
        let way = Way { detached: site.is_detached(), ..Way::before_the_key(Operation::HeaderRepair) };
        let locked = namespace::open_copy(site, name).map_err(|source| failed(source.into()))?;
        let states = gate::states_of_locked(&locked);
        gate::check(Operation::HeaderRepair, &states, way).map_err(|refusal| failed(refusal.into()))?;
        let namespace = unlock(locked, key).map_err(|error| failed(error.into()))?;
        put(namespace, true).map_err(failed)
    }
}

/// Makes what was unlocked the header, if the data beside it is its own.
fn put(mut namespace: Namespace, replace_slots: bool) -> Result<Header, Cause> {
    let is_to_be_bound = namespace.check_data()?;
    namespace.write_header(replace_slots)?;
    if is_to_be_bound {
        namespace.bind_data()?;
    }
    Ok(namespace.header())
}

fn unlock(locked: LockedNamespace, key: Key<'_>) -> Result<Namespace, UnlockError> {
    match key {
        Key::Credential(credential) => locked.unlock_key(credential),
        Key::Slot(credential, id) => locked.unlock_slot(credential, id),
        Key::VolumeKey(volume_key) => locked.unlock_volume_key(volume_key),
        Key::Ephemeral => locked.unlock_ephemeral(),
    }
}

/// A LUKS2 header with one slot for `credential`, with which cryptsetup opens the data of `namespace`.
///
/// # Errors
///
/// [`Cause::ExportLuks2`].
#[cfg(feature = "luks2")]
pub fn export_luks2(
    location: &Location,
    namespace: &Namespace,
    credential: &Credential,
    options: ExportOptions,
) -> Result<Vec<u8>, Error> {
    luks2::export(namespace, credential, options)
        .map_err(|source| Error::new(Operation::ExportLuks2, location.path(), source))
}

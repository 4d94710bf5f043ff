//! Locking a volume that a server has in use, and unlocking it there: its backing stays open and locked against others, so
//! that nothing can change under clients that wait.

use super::error::{Cause, Error};
use super::gate::{self, Caller, KeyWay, Operation, State, Way};
use super::location::Location;
use super::open::{Key, also_in_use};
#[cfg(feature = "luks2")]
use crate::luks2;
#[cfg(feature = "luks2")]
use crate::namespace::Credential;
use crate::namespace::Site;
use crate::volume::{Volume, VolumeError};

/// Whether a volume may be locked, and where it is to be found again.
///
/// # Errors
///
/// [`Cause::Refused`] for an ephemeral one, [`Cause::Volume`] for one that is locked.
pub fn check(volume: &Volume) -> Result<Site, Cause> {
    match also_in_use(Operation::Lock, volume) {
        // A LUKS2 volume.
        Err(Cause::Volume(VolumeError::NoHeader)) => {
            let way =
                Way { key: KeyWay::Slot, read_only: false, detached: false, caller: Caller::Control, force: false };
            gate::check(Operation::Lock, &[State::Luks2], way)?;
        }
        checked => checked?,
    }
    volume.site().ok_or(Cause::Volume(VolumeError::Locked))
}

/// Makes everything durable, says in the header that the namespace was closed in order, and wipes key and plaintext.
///
/// # Errors
///
/// [`Cause::Volume`] when something could not be made durable; the volume is locked all the same.
pub fn lock_in_use(volume: &Volume) -> Result<(), Cause> {
    Ok(volume.lock_as(true)?)
}

/// Unlocks with `key` what was locked at `location` and lies at `site`, and says in the header that it is in use, unless it is
/// only read.
///
/// # Errors
///
/// [`Error`]; the volume is then locked as before.
pub fn unlock_in_use(location: &Location, site: Site, key: Key<'_>, volume: &Volume) -> Result<(), Error> {
    let operation = if volume.read_only() { Operation::ServeReadOnly } else { Operation::Serve };
    let namespace = location.find_at(operation, site)?.unlock(key)?;
    let unlocked = volume.unlock_as(namespace, !volume.read_only());
    unlocked.map_err(|error| Error::new(operation, location.path(), error))
}

/// [`unlock_in_use`] of a LUKS2 volume.
///
/// # Errors
///
/// What is wrong with its header or the credential, as [`unlock_in_use`].
#[cfg(feature = "luks2")]
pub fn unlock_luks2_in_use(site: &Site, credential: &Credential, volume: &Volume) -> Result<(), Luks2Error> {
    let unlocked = luks2::Locked::open(site)?.unlock(credential)?;
    Ok(volume.unlock_luks2(unlocked)?)
}

/// Why a LUKS2 volume was not unlocked again.
#[cfg(feature = "luks2")]
#[derive(Debug, thiserror::Error)]
pub enum Luks2Error {
    /// Its header.
    #[error(transparent)]
    Open(#[from] luks2::OpenError),
    /// The key.
    #[error(transparent)]
    Unlock(#[from] luks2::UnlockError),
    /// The volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

//! From a place to an unlocked namespace, as every command that needs the key does it.

use std::path::Path;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::output::warning;
use super::place::PlaceArgs;
use super::secrets;
use super::size::ByteSize;
use crate::namespace::{CopyState, Credential, Header, LockedNamespace, Namespace, SIZE_BYTES_WARN};
use crate::pmem::Access;

/// Opens and unlocks the namespace at `place`. The header is checked before the user is asked for a passphrase.
pub(crate) fn namespace(place: &PlaceArgs, access: Access, key: &KeyArgs) -> Result<Namespace, Error> {
    unlock(checked(place, access)?, key, &place.path)
}

/// Opens and unlocks the namespace at `place`, for who needs the credential again.
pub(crate) fn namespace_and_credential(
    place: &PlaceArgs,
    access: Access,
    key: &KeyArgs,
) -> Result<(Namespace, Credential), Error> {
    let locked = checked(place, access)?;
    let credential = key.read(Prompt::Once, &place.path.display().to_string())?;
    let unlocked = locked.unlock_key(&credential);
    let namespace = unlocked.map_err(|source| Error::Unlock { path: place.path.clone(), source })?;
    Ok((namespace, credential))
}

/// Opens the namespace at `place` and says what is worth knowing about its header.
fn checked(place: &PlaceArgs, access: Access) -> Result<LockedNamespace, Error> {
    let locked = place.locked(place.open(access)?)?;
    for warning in warnings(locked.header()) {
        warning!("{}: {warning}", place.path.display());
    }
    Ok(locked)
}

/// Unlocks with what the options name; an ephemeral namespace without anything.
pub(crate) fn unlock(locked: LockedNamespace, key: &KeyArgs, path: &Path) -> Result<Namespace, Error> {
    let unlocked = if locked.header().ephemeral && !key.is_given() {
        locked.unlock_ephemeral()
    } else if let Some(file) = &key.escrow_file {
        locked.unlock_volume_key(secrets::escrow_file(file)?)
    } else {
        locked.unlock_key(&key.read(Prompt::Once, &path.display().to_string())?)
    };
    unlocked.map_err(|source| Error::Unlock { path: path.into(), source })
}

/// What is worth knowing before using a namespace, in sentences.
pub(crate) fn warnings(header: &Header) -> Vec<String> {
    let mut warnings = Vec::new();
    if header.size_bytes > SIZE_BYTES_WARN {
        warnings.push(format!(
            "one key encrypts {}, more than {}: smaller namespaces, each with its own key, are safer",
            ByteSize(header.size_bytes),
            ByteSize(SIZE_BYTES_WARN)
        ));
    }
    for (name, copy) in ["A", "B"].into_iter().zip(&header.copies) {
        if let CopyState::Bad { reason } = copy {
            warnings.push(format!("header copy {name} is not usable: {reason}"));
        }
    }
    warnings
}

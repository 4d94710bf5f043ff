//! From a place to an unlocked namespace, as every command that needs the key does it.

use std::path::Path;
use std::sync::Arc;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::output::warning;
use super::place::PlaceArgs;
use super::secrets;
use super::size::ByteSize;
use crate::luks2::Locked;
use crate::namespace::{CopyState, Credential, Header, LockedNamespace, Namespace, SIZE_BYTES_WARN, Site};
use crate::pmem::{Access, Backing};
use crate::volume::Volume;
use crate::xts::Backend;

/// Opens and unlocks the namespace at `place`. The header is checked before the user is asked for a passphrase.
pub(crate) fn namespace(place: &PlaceArgs, access: Access, key: &KeyArgs) -> Result<Namespace, Error> {
    let locked = place.locked(place.open(access)?)?;
    for warning in warnings(locked.header()) {
        warning!("{}: {warning}", place.path.display());
    }
    unlock(locked, key, &place.path)
}

/// Opens and unlocks the volume at `place`: a namespace, or with `is_luks2` a LUKS2 volume.
pub(crate) fn volume(place: &PlaceArgs, access: Access, key: &KeyArgs, is_luks2: bool) -> Result<Volume, Error> {
    let backend = Backend::from_env()?;
    if !is_luks2 {
        return Ok(Volume::new(namespace(place, access, key)?, backend));
    }
    let path = place.path.display().to_string();
    let locked = luks2(place, &place.open(access)?)?;
    for warning in copy_warnings(["primary LUKS2 header", "secondary LUKS2 header"], &locked.info().copies) {
        warning!("{path}: {warning}");
    }
    if key.escrow_file.is_some() {
        return Err(Error::Usage("--escrow-file is for namespaces, and not for LUKS2 volumes".into()));
    }
    // LUKS2 makes no difference between passphrases and key files, and sets no lower bound.
    let credential = key.read_with(Prompt::Once, &path, 1)?;
    let unlocked = locked.unlock(&credential);
    let unlocked = unlocked.map_err(|source| Error::Luks2Unlock { path: place.path.clone(), source })?;
    Ok(Volume::from_luks2(unlocked, backend))
}

/// The LUKS2 volume at `site`, which `place` was opened as.
pub(crate) fn luks2(place: &PlaceArgs, site: &Site) -> Result<Locked, Error> {
    Locked::open(site).map_err(|source| Error::Luks2 { path: place.header_path().clone(), source })
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

/// Opens and locks a file or device that is used whole.
pub(crate) fn backing(path: &Path, access: Access) -> Result<Arc<Backing>, Error> {
    Ok(Arc::clone(PlaceArgs::of(path).open(access)?.data()))
}

/// The namespace at `path`, without a lock, so that it can be looked at while it is served.
pub(crate) fn locked_without_lock(path: &Path) -> Result<LockedNamespace, Error> {
    let place = PlaceArgs::of(path);
    place.locked(place.peek()?)
}

/// As [`namespace()`], for who needs the credential again.
pub(crate) fn namespace_and_credential(
    path: &Path,
    access: Access,
    key: &KeyArgs,
) -> Result<(Namespace, Credential), Error> {
    let place = PlaceArgs::of(path);
    let locked = place.locked(place.open(access)?)?;
    for warning in warnings(locked.header()) {
        warning!("{}: {warning}", path.display());
    }
    let credential = key.read(Prompt::Once, &path.display().to_string())?;
    let namespace = locked.unlock_key(&credential).map_err(|source| Error::Unlock { path: path.into(), source })?;
    Ok((namespace, credential))
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
    warnings.extend(copy_warnings(["header copy A", "header copy B"], &header.copies));
    warnings
}

/// A sentence for each copy of a header that cannot be used.
pub(crate) fn copy_warnings(names: [&str; 2], copies: &[CopyState; 2]) -> Vec<String> {
    let sentence = |(name, copy): (&str, &CopyState)| match copy {
        CopyState::Good { .. } => None,
        CopyState::Bad { reason } => Some(format!("{name} is not usable: {reason}")),
    };
    names.into_iter().zip(copies).filter_map(sentence).collect()
}

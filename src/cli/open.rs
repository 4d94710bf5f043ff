//! From a path to a volume, as every command that needs the key does it.

use std::path::Path;
use std::sync::Arc;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use crate::namespace::{LockedNamespace, Namespace};
use crate::pmem::{Access, Backing};

/// Opens and locks the backing, and says so when its granularity was forced.
pub(crate) fn backing(path: &Path, access: Access) -> Result<Arc<Backing>, Error> {
    let backing = Backing::open(path, access).map_err(|source| Error::Open { path: path.into(), source })?;
    if backing.granularity_forced().is_some() {
        eprintln!("daxcrypt: warning: {}: {}", path.display(), backing.granularity_reason());
    }
    Ok(Arc::new(backing))
}

/// Opens and unlocks the namespace at `path`.
pub(crate) fn namespace(path: &Path, access: Access, key: &KeyArgs) -> Result<Namespace, Error> {
    let backing = backing(path, access)?;
    // The header is checked before the user is asked for a passphrase.
    let locked = LockedNamespace::open(backing).map_err(|source| Error::Namespace { path: path.into(), source })?;
    for warning in locked.header().warnings() {
        eprintln!("daxcrypt: warning: {}: {warning}", path.display());
    }
    let credential = key.read(Prompt::Once, &path.display().to_string())?;
    locked.unlock_key(&credential).map_err(|source| Error::Unlock { path: path.into(), source })
}

//! From a path to a volume, as every command that needs the key does it.

use std::path::Path;
use std::sync::Arc;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::size::ByteSize;
use crate::namespace::{CopyState, Credential, Header, LockedNamespace, Namespace, SIZE_BYTES_WARN};
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
    Ok(namespace_and_credential(path, access, key)?.0)
}

/// As [`namespace`], for who needs the credential again.
pub(crate) fn namespace_and_credential(
    path: &Path,
    access: Access,
    key: &KeyArgs,
) -> Result<(Namespace, Credential), Error> {
    let backing = backing(path, access)?;
    // The header is checked before the user is asked for a passphrase.
    let locked = LockedNamespace::open(backing).map_err(|source| Error::Namespace { path: path.into(), source })?;
    for warning in warnings(locked.header()) {
        eprintln!("daxcrypt: warning: {}: {warning}", path.display());
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
    for (name, copy) in ["A", "B"].into_iter().zip(&header.copies) {
        if let CopyState::Bad { reason } = copy {
            warnings.push(format!("header copy {name} is not usable: {reason}"));
        }
    }
    warnings
}

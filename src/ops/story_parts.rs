//! What the crash stories of several operations need: one key, one content, and the volume that both belong to.

use std::sync::Arc;

use crate::namespace::{Credential, LockedNamespace};
use crate::pmem::Backing;
use crate::secret::SecretBytes;
use crate::volume::Volume;
use crate::xts::Backend;

/// The key of the stories' namespaces.
pub(super) fn credential() -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[7; 32]))
}

/// What a story says when something fails.
pub(super) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Bytes of which none is zero, so that holes are told from them.
pub(super) fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (seed..seed + len).map(|index| u8::try_from(1 + index * 31 % 251).unwrap()).collect()
}

/// The volume on `backing`, unlocked.
pub(super) fn volume(backing: &Arc<Backing>) -> Result<Volume, String> {
    let locked = LockedNamespace::open(Arc::clone(backing)).map_err(text)?;
    Ok(Volume::new(locked.unlock_key(&credential()).map_err(text)?, Backend::detect()))
}

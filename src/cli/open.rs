//! From a place to an unlocked namespace, as every command that needs the key does it.

use std::path::Path;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::output::warning;
use super::place::{self, PlaceArgs};
use super::secrets;
use super::size::ByteSize;
use crate::luks2::Locked;
use crate::namespace::{CopyState, Credential, Header, Kdf, KdfCost, Namespace, SIZE_BYTES_WARN, Site};
use crate::ops::{self, Found, Key, Operation};
use crate::volume::Volume;
use crate::xts::Backend;

/// Opens and unlocks the namespace at `place` for `operation`. The header is checked before the user is asked for a
/// passphrase.
pub(crate) fn namespace(place: &PlaceArgs, operation: Operation, key: &KeyArgs) -> Result<Namespace, Error> {
    unlock(found(place, operation)?, key)
}

/// Opens and unlocks the namespace at `place`, for who needs the credential again.
pub(crate) fn namespace_and_credential(
    place: &PlaceArgs,
    operation: Operation,
    key: &KeyArgs,
) -> Result<(Namespace, Credential), Error> {
    let found = found(place, operation)?;
    let credential = key.read(Prompt::Once, &place.path.display().to_string())?;
    let namespace = found.unlock(Key::Credential(&credential))?;
    // A slot that is made with it again is to open with the phrase as it was printed.
    let phrase = credential.as_recovery_phrase().filter(|_| opened_as_phrase(&namespace));
    Ok((namespace, phrase.unwrap_or(credential)))
}

fn opened_as_phrase(namespace: &Namespace) -> bool {
    let slots = namespace.header().slots;
    slots.iter().any(|slot| Some(slot.id) == namespace.slot_id() && slot.kdf == Kdf::Argon2id(KdfCost::LEAST))
}

/// Opens the namespace at `place` and says what is worth knowing about its header.
pub(crate) fn found(place: &PlaceArgs, operation: Operation) -> Result<Found, Error> {
    let location = place.location();
    let found = location.find(operation)?;
    place::warn(&location, found.site());
    for warning in warnings(found.header()) {
        warning!("{}: {warning}", place.path.display());
    }
    Ok(found)
}

/// Opens and unlocks the volume at `place`: a namespace, or with `is_luks2` a LUKS2 volume.
pub(crate) fn volume(place: &PlaceArgs, operation: Operation, key: &KeyArgs, is_luks2: bool) -> Result<Volume, Error> {
    let backend = Backend::from_env()?;
    if !is_luks2 {
        return Ok(Volume::new(namespace(place, operation, key)?, backend));
    }
    let path = place.path.display().to_string();
    let locked = luks2(place, &place.open(operation)?)?;
    for warning in luks2_warnings(&locked.info().copies) {
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
    let path = place.location().header_path().to_path_buf();
    Locked::open(site).map_err(|source| Error::Luks2 { path, source })
}

/// Unlocks with what the options name; an ephemeral namespace without anything.
pub(crate) fn unlock(found: Found, key: &KeyArgs) -> Result<Namespace, Error> {
    let (path, ephemeral) = (found.location().path().to_path_buf(), found.header().ephemeral);
    with_key(key, ephemeral, &path, |key| found.unlock(key))
}

/// Reads what the options name, and unlocks with it.
pub(crate) fn with_key<T>(
    key: &KeyArgs,
    ephemeral: bool,
    path: &Path,
    unlock: impl FnOnce(Key<'_>) -> Result<T, ops::Error>,
) -> Result<T, Error> {
    if ephemeral && !key.is_given() {
        return Ok(unlock(Key::Ephemeral)?);
    }
    if let Some(file) = &key.escrow_file {
        return Ok(unlock(Key::VolumeKey(secrets::escrow_file(file)?))?);
    }
    let credential = key.read(Prompt::Once, &path.display().to_string())?;
    Ok(unlock(Key::Credential(&credential))?)
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
    if header.detached && !header.ephemeral && header.tag_offset.is_none() {
        warnings.push(
            "nothing tells whether the data is that of this detached header: it has no tag, so mind which files belong together; \
             --accept-data writes a tag behind the data, where there is room for a page"
                .into(),
        );
    }
    warnings.extend(copy_warnings(["header copy A", "header copy B"], &header.copies));
    warnings.extend(difference(&header.copies, "the next command that changes it finishes the update"));
    warnings
}

/// A sentence about two good copies of a header that are not the same one.
fn difference(copies: &[CopyState; 2], remedy: &str) -> Option<String> {
    let [CopyState::Good { sequence: first }, CopyState::Good { sequence: second }] = copies else { return None };
    (first != second).then(|| {
        format!(
            "the two copies of the header differ (sequence {first} and {second}): an update was cut short, and what it was to \
             remove may be in the older copy; {remedy}"
        )
    })
}

/// What is worth a warning about the header copies of a LUKS2 volume, which nothing here writes to.
pub(crate) fn luks2_warnings(copies: &[CopyState; 2]) -> Vec<String> {
    let mut warnings = copy_warnings(["primary LUKS2 header", "secondary LUKS2 header"], copies);
    warnings.extend(difference(copies, "the next change by cryptsetup writes both"));
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

//! A data area full of noise, so that media does not show what of it is in use.
//!
//! The header says that it is not full yet until it is: a wipe that was stopped or cut is told by `info`.

use super::error::{Cause, Error};
use super::gate::Operation;
use super::location::Location;
use super::pace::{Ended, Run};
use crate::namespace::Namespace;
use crate::secret::VolumeKey;
use crate::volume::Volume;
use crate::xts::Backend;

/// Bytes that are made durable at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// Writes what looks like the ciphertext of random data, which is the ciphertext of anything under a key that is thrown
/// away: XTS gives every block of every unit a permutation of its own.
///
/// # Errors
///
/// [`Cause::Volume`], [`Cause::Update`], [`Cause::Stopped`]: the header then says that the wipe is unfinished.
pub fn fill_with_noise(
    namespace: &mut Namespace,
    location: &Location,
    backend: Backend,
    run: &mut Run<'_>,
) -> Result<(), Error> {
    let filled = fill(namespace, backend, run);
    filled.map_err(|cause| Error::new(Operation::FormatOver, location.path(), cause))
}

fn fill(namespace: &mut Namespace, backend: Backend, run: &mut Run<'_>) -> Result<(), Cause> {
    let thrown_away = VolumeKey::generate(namespace.cipher().key_bytes()).expect("the length is a cipher's");
    let volume = Volume::under_another_key(namespace, &thrown_away, backend);
    run.chunks(Ended::Done, volume.size(), CHUNK_BYTES, |offset, len| {
        volume.write_zeroes(offset, len as u64)?;
        volume.persist(offset..offset + len as u64)?;
        Ok::<_, Cause>(len)
    })?;
    volume.flush()?;
    Ok(namespace.set_wiping(false)?)
}

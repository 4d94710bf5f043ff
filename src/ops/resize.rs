//! A larger or smaller data area, with the file or partition around it.
//!
//! What holds grows before what is held, and shrinks after it, so a power cut in between leaves unused space and nothing
//! that reaches past its place. A server does the same with a volume that it serves, when it is asked to.

use super::error::{Cause, Error};
use super::gate::Operation;
use super::location::{self, Location};
use crate::pmem::{Allocation, BackingKind};
use crate::volume::{Volume, VolumeError};

/// What a namespace is to become.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Decrypted bytes; without it, all that there is.
    pub size_bytes: Option<u64>,
    /// Whether it may become smaller, so that data is lost.
    pub even_smaller: bool,
    /// Whether what a file grows by is left a hole.
    pub sparse: bool,
}

/// What it was and is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resized {
    /// Bytes before.
    pub old_bytes: u64,
    /// Bytes now.
    pub new_bytes: u64,
}

const OPERATION: Operation = Operation::Resize;

fn failed(location: &Location, cause: impl Into<Cause>) -> Error {
    Error::new(OPERATION, location.path(), cause)
}

/// Gives the volume at `location` the size that is wanted.
///
/// # Errors
///
/// [`Error`]; the size is as before, unless the header could not be written.
pub fn apply(location: &Location, volume: &Volume, wanted: Wanted) -> Result<Resized, Error> {
    if volume.read_only() {
        return Err(failed(location, VolumeError::ReadOnly));
    }
    let available_bytes = volume.available_bytes().ok_or_else(|| failed(location, VolumeError::NoHeader))?;
    let old_bytes = volume.size();
    let new_bytes = match wanted.size_bytes {
        Some(bytes) => bytes,
        None => {
            let all = all_there_is(location, volume, available_bytes)?;
            volume.size_that_fits(all).map_err(|source| failed(location, source))?
        }
    };
    // Before room is made: what is refused leaves no longer file behind.
    volume.check_resize(new_bytes, wanted.even_smaller).map_err(|source| failed(location, source))?;
    let needed_bytes = volume.needed_bytes(new_bytes).map_err(|source| failed(location, source))?;
    if needed_bytes > available_bytes {
        make_room(location, volume, needed_bytes, wanted.sparse)?;
    }
    if new_bytes > old_bytes {
        // The room that is there may be one that a process made which died before it was durable.
        volume.backing().sync_all().map_err(|source| failed(location, source))?;
    }
    volume.resize(new_bytes, wanted.even_smaller).map_err(|source| failed(location, source))?;
    if location.region().is_some() && new_bytes < old_bytes {
        resize_partition(location, volume, needed_bytes)?;
    }
    Ok(Resized { old_bytes, new_bytes })
}

/// What the namespace may use of its partition, or of a file or device that has perhaps become longer since it was opened.
fn all_there_is(location: &Location, volume: &Volume, available_bytes: u64) -> Result<u64, Error> {
    if location.region().is_some() {
        return Ok(available_bytes);
    }
    let present_bytes = volume.backing().present_len_bytes().map_err(|source| failed(location, source))?;
    Ok(available_bytes.max(present_bytes))
}

/// Enlarges the partition or the file, or looks how long a block device has become. The namespace then says what is missing.
fn make_room(location: &Location, volume: &Volume, needed_bytes: u64, sparse: bool) -> Result<(), Error> {
    if location.region().is_some() {
        return resize_partition(location, volume, needed_bytes);
    }
    let (backing, base) = (volume.backing(), volume.geometry().base());
    let allocation = if sparse { Allocation::Sparse } else { Allocation::Full };
    match backing.kind() {
        BackingKind::File => {
            let grown = backing.grow(base.saturating_add(needed_bytes), allocation);
            grown.map_err(|source| failed(location, source))?;
        }
        BackingKind::BlockDevice => drop(backing.grow(needed_bytes, allocation)),
        BackingKind::DevDax => {}
    }
    volume.set_available_bytes(u64::MAX);
    Ok(())
}

/// Gives the partition another length, and locks what it is then.
fn resize_partition(location: &Location, volume: &Volume, needed_bytes: u64) -> Result<(), Error> {
    let Some((path, name)) = location.region() else { return Ok(()) };
    let in_region = |source| Error::new(OPERATION, path, Cause::Region(source));
    let mut table = location::open_table(OPERATION, path)?; // nobody else changes it before the new range is locked
    let old = table.find(name).map_err(in_region)?.range;
    let range = table.resize(name, needed_bytes).map_err(in_region)?;
    let len_bytes = range.end - range.start;
    if let Err(source) = volume.backing().lock_range(range) {
        table.resize(name, old.end - old.start).map_err(in_region)?;
        return Err(Error::new(OPERATION, path, source));
    }
    volume.set_available_bytes(len_bytes);
    Ok(())
}

#[cfg(test)]
mod crash_tests;

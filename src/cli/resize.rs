//! `daxcrypt resize`: a larger or smaller data area, with the file or partition around it.
//!
//! What holds grows before what is held, and shrinks after it, so a power cut in between leaves unused space and nothing
//! that reaches past its place. A server does the same with a volume that it serves, when it is asked to.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::control::{Answer, ResizeRequest};
use super::credentials::KeyArgs;
use super::error::Error;
use super::open;
use super::output::outln;
use super::place::{self, PlaceArgs};
use super::size::ByteSize;
use crate::namespace::{Geometry, Placement, UpdateError, size_that_fits};
use crate::pmem::{Access, Allocation, BackingKind};
use crate::volume::{Volume, VolumeError};
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// New decrypted size, such as 8G; without it, all that the file, device or partition has
    #[arg(long)]
    size: Option<ByteSize>,
    #[command(flatten)]
    key: KeyArgs,
    /// Leave holes in what a file grows by, instead of allocating it now
    #[arg(long)]
    sparse: bool,
    /// Shrink, too: what lies behind the new end is lost
    #[arg(long)]
    force: bool,
    /// Ask the server that has the namespace, at its --control socket, to do it while it serves: clients that connect from
    /// then on see the new size, those that are connected keep theirs. No key is needed
    #[arg(long, value_name = "SOCKET", conflicts_with = "KeyArgs")]
    control: Option<PathBuf>,
}

/// What a namespace is to become.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    /// Without it, all that there is.
    size_bytes: Option<u64>,
    even_smaller: bool,
    sparse: bool,
}

pub(crate) fn run(args: &ResizeArgs) -> Result<(), Error> {
    let wanted = Wanted { size_bytes: args.size.map(|size| size.0), even_smaller: args.force, sparse: args.sparse };
    let path = &args.place.path;
    let (old_bytes, new_bytes) = match &args.control {
        Some(socket) => online(&args.place, socket, wanted)?,
        None => {
            let namespace = open::namespace(&args.place, Access::ReadWrite, &args.key)?;
            if namespace.pending_transform().is_some() {
                return Err(Error::Update { path: path.clone(), source: UpdateError::Transforming });
            }
            apply(&args.place, &Volume::new(namespace, Backend::from_env()?), wanted)?
        }
    };
    outln!("{}: {} (was {})", path.display(), ByteSize(new_bytes), ByteSize(old_bytes))
}

/// Asks the server to do it.
fn online(place: &PlaceArgs, socket: &Path, wanted: Wanted) -> Result<(u64, u64), Error> {
    let locked = place.locked(place.peek()?)?;
    let request = ResizeRequest { resize: wanted, uuid: locked.header().uuid };
    let old_bytes = locked.header().size_bytes;
    drop(locked);
    if let Some(new_bytes) = wanted.size_bytes.filter(|&new_bytes| new_bytes < old_bytes && !wanted.even_smaller) {
        let source = UpdateError::Shrinks { old_bytes, new_bytes };
        return Err(Error::Update { path: place.path.clone(), source });
    }
    match request.ask(socket).map_err(|source| Error::Control { path: socket.into(), source })? {
        Answer::Resized { old_bytes, new_bytes } => Ok((old_bytes, new_bytes)),
        Answer::Refused(reason) => Err(Error::Refused { reason }),
        _ => Err(Error::unexpected_answer()),
    }
}

/// Gives the volume at `place` the size that is wanted: the old and the new one.
pub(crate) fn apply(place: &PlaceArgs, volume: &Volume, wanted: Wanted) -> Result<(u64, u64), Error> {
    let failed = |source| Error::of_volume(&place.path, source);
    let update = |source| Error::Update { path: place.path.clone(), source };
    if volume.read_only() {
        return Err(failed(VolumeError::ReadOnly));
    }
    let available_bytes = volume.available_bytes().ok_or_else(|| failed(VolumeError::NoHeader))?;
    let (old_bytes, data_offset) = (volume.size(), volume.geometry().data_offset());
    let new_bytes = match wanted.size_bytes {
        Some(bytes) => bytes,
        None => size_that_fits(data_offset, all_there_is(place, volume, available_bytes)?, volume.geometry().unit())
            .map_err(|source| update(UpdateError::Geometry(source)))?,
    };
    if volume.transform().is_some() {
        return Err(update(UpdateError::Transforming));
    }
    if new_bytes < old_bytes && !wanted.even_smaller {
        return Err(update(UpdateError::Shrinks { old_bytes, new_bytes }));
    }
    let placement = Placement { size_bytes: new_bytes, ..volume.geometry().placement() };
    Geometry::new(&placement, u64::MAX).map_err(|source| update(UpdateError::Geometry(source)))?;
    let needed_bytes = data_offset.saturating_add(new_bytes);
    if needed_bytes > available_bytes {
        make_room(place, volume, needed_bytes, wanted.sparse)?;
    }
    volume.resize(new_bytes, wanted.even_smaller).map_err(failed)?;
    if place.in_region().is_some() && new_bytes < old_bytes {
        resize_partition(place, volume, needed_bytes)?;
    }
    Ok((old_bytes, new_bytes))
}

/// What the namespace may use of its partition, or of a file or device that has perhaps become longer since it was opened.
fn all_there_is(place: &PlaceArgs, volume: &Volume, available_bytes: u64) -> Result<u64, Error> {
    if place.in_region().is_some() {
        return Ok(available_bytes);
    }
    let present_bytes = volume.backing().present_len_bytes();
    let present_bytes = present_bytes.map_err(|source| Error::Media { path: place.path.clone(), source })?;
    Ok(available_bytes.max(present_bytes))
}

/// Enlarges the partition or the file, or looks how long a block device has become. The namespace then says what is missing.
fn make_room(place: &PlaceArgs, volume: &Volume, needed_bytes: u64, sparse: bool) -> Result<(), Error> {
    if place.in_region().is_some() {
        return resize_partition(place, volume, needed_bytes);
    }
    let (backing, base) = (volume.backing(), volume.geometry().base());
    let allocation = if sparse { Allocation::Sparse } else { Allocation::Full };
    let failed = |source| Error::Media { path: place.path.clone(), source };
    match backing.kind() {
        BackingKind::File => {
            backing.grow(base.saturating_add(needed_bytes), allocation).map_err(failed)?;
            backing.sync_all().map_err(failed)?;
        }
        BackingKind::BlockDevice => drop(backing.grow(needed_bytes, allocation)),
        BackingKind::DevDax => {}
    }
    volume.set_available_bytes(u64::MAX);
    Ok(())
}

/// Gives the partition another length, and locks what it is then.
fn resize_partition(place: &PlaceArgs, volume: &Volume, needed_bytes: u64) -> Result<(), Error> {
    let Some((path, name)) = place.in_region() else { return Ok(()) };
    let failed = |source| Error::Region { path: path.into(), source };
    let mut table = place::open_table(path)?; // nobody else changes it before the new range is locked
    let old = table.find(name).map_err(failed)?.range;
    let range = table.resize(name, needed_bytes).map_err(failed)?;
    let len_bytes = range.end - range.start;
    if let Err(source) = volume.backing().lock_range(range) {
        table.resize(name, old.end - old.start).map_err(failed)?;
        return Err(Error::Open { path: path.into(), source });
    }
    volume.set_available_bytes(len_bytes);
    Ok(())
}

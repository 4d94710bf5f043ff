//! `daxcrypt resize`: a larger or smaller data area, with the file or partition around it.
//!
//! What holds grows before what is held, and shrinks after it, so a power cut in between leaves unused space and nothing
//! that reaches past its place.

use clap::Args;

use super::credentials::KeyArgs;
use super::error::Error;
use super::open;
use super::output::outln;
use super::place::{self, PlaceArgs};
use super::size::ByteSize;
use crate::namespace::{Namespace, UpdateError};
use crate::pmem::{Access, Allocation, BackingKind};

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
}

pub(crate) fn run(args: &ResizeArgs) -> Result<(), Error> {
    let failed = |source| Error::Update { path: args.place.path.clone(), source };
    let mut namespace = open::namespace(&args.place, Access::ReadWrite, &args.key)?;
    let old_bytes = namespace.geometry().size_bytes();
    let data_offset = namespace.geometry().data_offset();
    let new_bytes = match args.size {
        Some(ByteSize(bytes)) => bytes,
        None => {
            let available_bytes = namespace.site().available_bytes();
            crate::namespace::size_that_fits(data_offset, available_bytes, namespace.geometry().unit())
                .map_err(|source| failed(UpdateError::Geometry(source)))?
        }
    };
    if new_bytes < old_bytes && !args.force {
        return Err(failed(UpdateError::Shrinks { old_bytes, new_bytes }));
    }
    let needed_bytes = data_offset.saturating_add(new_bytes);
    if needed_bytes > namespace.site().available_bytes() {
        make_room(args, &mut namespace, needed_bytes)?;
    }
    namespace.resize(new_bytes, args.force).map_err(failed)?;
    if let Some((path, name)) = args.place.in_region()
        && new_bytes < old_bytes
    {
        let failed = |source| Error::Region { path: path.into(), source };
        place::open_table(path)?.resize(name, needed_bytes).map_err(failed)?;
    }
    let path = args.place.path.display();
    outln!("{path}: {} (was {})", ByteSize(new_bytes), ByteSize(old_bytes))
}

/// Enlarges the partition or the file. A device has the size that it has, and the namespace then says what is missing.
fn make_room(args: &ResizeArgs, namespace: &mut Namespace, needed_bytes: u64) -> Result<(), Error> {
    if let Some((path, name)) = args.place.in_region() {
        let failed = |source| Error::Region { path: path.into(), source };
        let range = place::open_table(path)?.resize(name, needed_bytes).map_err(failed)?;
        namespace.set_available_bytes(range.end - range.start);
    } else if namespace.backing().kind() == BackingKind::File {
        let allocation = if args.sparse { Allocation::Sparse } else { Allocation::Full };
        let failed = |source| Error::Media { path: args.place.path.clone(), source };
        namespace.backing().grow(needed_bytes, allocation).map_err(failed)?;
        namespace.backing().sync_all().map_err(failed)?;
        namespace.set_available_bytes(u64::MAX);
    }
    Ok(())
}

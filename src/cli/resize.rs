//! `daxcrypt resize`: a larger or smaller data area, with the file or partition around it; here, or in the server that has
//! the namespace.

use std::path::{Path, PathBuf};

use clap::Args;

use super::control::{Answer, Asked, Command};
use super::credentials::KeyArgs;
use super::error::Error;
use super::open;
use super::output::outln;
use super::place::PlaceArgs;
use super::size::ByteSize;
use crate::ops::Operation;
use crate::ops::resize::{self, Resized, Wanted};
use crate::volume::Volume;
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

pub(crate) fn run(args: &ResizeArgs) -> Result<(), Error> {
    let wanted = Wanted { size_bytes: args.size.map(|size| size.0), even_smaller: args.force, sparse: args.sparse };
    let path = &args.place.path;
    let Resized { old_bytes, new_bytes } = match &args.control {
        Some(socket) => online(&args.place, socket, wanted)?,
        None => {
            let namespace = open::namespace(&args.place, Operation::Resize, &args.key)?;
            resize::apply(&args.place.location(), &Volume::new(namespace, Backend::from_env()?), wanted)?
        }
    };
    outln!("{}: {} (was {})", path.display(), ByteSize(new_bytes), ByteSize(old_bytes))
}

/// Asks the server to do it.
fn online(place: &PlaceArgs, socket: &Path, wanted: Wanted) -> Result<Resized, Error> {
    match Asked::new(socket, Operation::Resize, &place.location())?.about(Command::Resize(wanted), &[])? {
        Answer::Resized(resized) => Ok(resized),
        _ => Err(Error::unexpected_answer()),
    }
}

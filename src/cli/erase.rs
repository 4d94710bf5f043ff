//! `daxcrypt erase`: destroy the key slots and both header copies, so that the data area is noise for everybody.
//!
//! No key is needed: whoever may write the file may destroy it anyway. The data area itself is not touched.

use std::io;
use std::path::PathBuf;

use clap::Args;

use super::error::Error;
use super::open;
use crate::namespace::{Header, LockedNamespace};
use crate::pmem::Access;

#[derive(Args, Debug)]
pub(crate) struct EraseArgs {
    /// File or device with a namespace
    path: PathBuf,
    /// Do not ask for the label
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(args: &EraseArgs) -> Result<(), Error> {
    let backing = open::backing(&args.path, Access::ReadWrite)?;
    let locked =
        LockedNamespace::open(backing).map_err(|source| Error::Namespace { path: args.path.clone(), source })?;
    if !args.yes {
        confirm(args, locked.header())?;
    }
    let slots = locked.header().slots.len();
    locked.erase().map_err(|source| Error::Erase { path: args.path.clone(), source })?;
    println!("{}: erased {slots} key slots and both header copies", args.path.display());
    println!(
        "Backups of the header, and snapshots or copies of the file, still open with their keys: destroy them too."
    );
    Ok(())
}

/// Asks for the label, or for the uuid of a namespace without one.
fn confirm(args: &EraseArgs, header: &Header) -> Result<(), Error> {
    let (what, expected) = match header.label.as_str() {
        "" => ("uuid", header.uuid.to_string()),
        label => ("label", label.to_owned()),
    };
    eprint!("All data in {} will be lost. To go on, type its {what} ({expected}): ", args.path.display());
    let mut typed = String::new();
    io::stdin().read_line(&mut typed).map_err(|source| Error::Io { doing: "cannot read the confirmation", source })?;
    if typed.trim_end_matches('\n') == expected { Ok(()) } else { Err(Error::NotConfirmed { what }) }
}

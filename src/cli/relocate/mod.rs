//! `daxcrypt relocate`: a namespace to another place, always under a new volume key, since its tweaks are its place.
//!
//! To another file, device or partition of a region it is decrypted and encrypted piece by piece, read back and compared;
//! the destination has no header before all of it is durable, and the source keeps its own until then. In place, a
//! namespace that was already moved as ciphertext is adopted where it lies.
//!
//! A new partition is in the table from the beginning, so that nobody else takes its place however long it takes; without
//! a header nothing in it opens. What was made is taken back when it comes to nothing; a process that is killed leaves it.

mod copy;
mod target;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use self::copy::Copy;
use self::target::Target;
use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::open;
use super::output::outln;
use super::place::{self, PlaceArgs};
use super::rekey::{PaceArgs, catch_signals, finish, other_slots};
use super::size::ByteSize;
use crate::namespace::{AdoptError, MovedNamespace, Namespace, RekeyOptions};
use crate::pmem::Access;
use crate::volume::Volume;
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct RelocateArgs {
    /// File or device with a namespace; REGION#NAME is the namespace NAME in a region
    source: PathBuf,
    /// Where it is to be: a file that does not exist, a file or device that is large enough, or REGION#NAME
    #[arg(required_unless_present = "in_place", conflicts_with = "in_place")]
    destination: Option<PathBuf>,
    /// Adopt a namespace that was moved as ciphertext (by dd, a partition editor, to another device) where it lies
    #[arg(long)]
    in_place: bool,
    /// File that holds the header of the source, when that is detached
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// File for the header of the destination, which is then detached
    #[arg(long, value_name = "FILE", conflicts_with = "in_place")]
    destination_header: Option<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
    /// Copy: do not erase the key slots and the header of the source at the end
    #[arg(long, conflicts_with = "in_place")]
    keep_source: bool,
    /// Do without the other key slots: only the key given here opens the namespace at its new place
    #[arg(long)]
    drop_slots: bool,
    /// Leave holes where the source has them, instead of allocating all blocks
    #[arg(long, conflicts_with = "in_place")]
    sparse: bool,
    /// Overwrite whatever is at the destination
    #[arg(long, conflicts_with = "in_place")]
    force: bool,
    #[command(flatten)]
    pace: PaceArgs,
}

pub(crate) fn run(args: &RelocateArgs) -> Result<(), Error> {
    let source = PlaceArgs { path: args.source.clone(), header: args.header.clone() };
    match &args.destination {
        Some(path) => {
            relocate(args, &source, &PlaceArgs { path: path.clone(), header: args.destination_header.clone() })
        }
        None => adopt(args, &source),
    }
}

/// To another place.
fn relocate(args: &RelocateArgs, from: &PlaceArgs, to: &PlaceArgs) -> Result<(), Error> {
    if from.path == to.path {
        let path = from.path.display();
        return Err(Error::Usage(format!("{path} is there already: `daxcrypt rekey` gives it a new volume key")));
    }
    let access = if args.keep_source { Access::ReadOnly } else { Access::ReadWrite };
    let (source, credential) = open::namespace_and_credential(from, access, &args.key)?;
    let others = other_slots(&source);
    if !others.is_empty() && !args.drop_slots && !args.keep_source {
        return Err(Error::OtherSlots { slots: others.join("; ") });
    }
    let Target { namespace, made } = Target::make(to, &source, &credential, args.force)?;
    drop(credential);
    let copy = Copy { from: &from.path, to: &to.path, pace: &args.pace, sparse: args.sparse };
    let (source, moved) = copy.run(source, namespace, Backend::from_env()?).inspect_err(|_| made.take_back())?;
    let fate = match args.keep_source {
        true => "the source stays as it is",
        false => forget(from, source)?,
    };
    if !args.pace.json {
        let (from, rate) = (from.path.display(), ByteSize(moved.bytes_per_second));
        let bytes = ByteSize(moved.bytes);
        outln!("{}: {bytes} moved from {from} ({rate}/s) and verified; {fate}", to.path.display())?;
    }
    Ok(())
}

/// Erases the source, which is somewhere else now, and gives its partition back; what became of it.
fn forget(place: &PlaceArgs, source: Namespace) -> Result<&'static str, Error> {
    let held = Arc::clone(source.backing()); // locked as long as it is in the table
    source.erase().map_err(|source| Error::Erase { path: place.header_path().clone(), source })?;
    let Some((path, name)) = place.in_region() else { return Ok("the source is erased") };
    let removed = place::open_table(path)?.remove(name);
    removed.map_err(|source| Error::Region { path: path.into(), source })?;
    drop(held);
    Ok("the source is erased and its partition removed")
}

/// Where it lies.
fn adopt(args: &RelocateArgs, place: &PlaceArgs) -> Result<(), Error> {
    let failed = |source: AdoptError| Error::Adopt { path: place.path.clone(), source: source.into() };
    let moved = MovedNamespace::open_in(place.open(Access::ReadWrite)?).map_err(failed)?;
    if moved.header().slots.len() > 1 && !args.drop_slots {
        let slots = moved.header().slots.iter();
        let slots: Vec<_> = slots.map(|slot| format!("{}, {}", slot.id, super::info::slot_line(slot))).collect();
        return Err(Error::OtherSlots { slots: slots.join("; ") });
    }
    let old_base = moved.header().base;
    let credential = args.key.read(Prompt::Once, &place.path.display().to_string())?;
    let stop = catch_signals()?;
    let namespace = moved.adopt(&credential, &RekeyOptions::default()).map_err(failed)?;
    drop(credential);
    let base = namespace.geometry().base();
    let volume = Volume::new(namespace, Backend::from_env()?);
    let rate = finish(&volume, &args.pace, &stop).map_err(|error| error.at(&place.path))?;
    if !args.pace.json {
        outln!(
            "{}: written for byte {old_base}, now at home at byte {base} under a new volume key ({}/s)",
            place.path.display(),
            ByteSize(rate)
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod crash_tests;

//! `daxcrypt relocate`: a namespace to another place, always under a new volume key, since its tweaks are its place.
//!
//! To another file or device it is decrypted and encrypted piece by piece, read back and compared; the destination has no
//! header before all of it is durable, and the source keeps its own until then. In place, a namespace that was already moved
//! as ciphertext is adopted where it lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::open;
use super::output::outln;
use super::place::PlaceArgs;
use super::rekey::{PaceArgs, catch_signals, finish, other_slots};
use super::size::ByteSize;
use super::transfer::{Holes, Moved, Transfer};
use crate::namespace::{
    self, AdoptError, Credential, FormatOptions, HEADER_AREA_BYTES, Kdf, KdfCost, MovedNamespace, Namespace,
    RekeyOptions,
};
use crate::pmem::{Access, Allocation, Backing};
use crate::volume::Volume;
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct RelocateArgs {
    /// File or device with a namespace
    source: PathBuf,
    /// Where it is to be: a file that does not exist, or a file or device that is large enough
    #[arg(required_unless_present = "in_place", conflicts_with = "in_place")]
    destination: Option<PathBuf>,
    /// Adopt a namespace that was moved as ciphertext (by dd, a partition editor, to another device) where it lies
    #[arg(long)]
    in_place: bool,
    #[command(flatten)]
    key: KeyArgs,
    /// Copy: do not erase the key slots and the header of the source at the end
    #[arg(long, conflicts_with = "in_place")]
    keep_source: bool,
    /// Do without the other key slots: only the key given here opens the namespace at its new place
    #[arg(long)]
    drop_slots: bool,
    /// Leave holes in a new file instead of allocating all blocks now
    #[arg(long, conflicts_with = "in_place")]
    sparse: bool,
    /// Overwrite whatever is at the destination
    #[arg(long, conflicts_with = "in_place")]
    force: bool,
    #[command(flatten)]
    pace: PaceArgs,
}

pub(crate) fn run(args: &RelocateArgs) -> Result<(), Error> {
    match &args.destination {
        Some(destination) => relocate(args, destination),
        None => adopt(args),
    }
}

/// To another file or device.
fn relocate(args: &RelocateArgs, destination: &Path) -> Result<(), Error> {
    let access = if args.keep_source { Access::ReadOnly } else { Access::ReadWrite };
    let (source, credential) = open::namespace_and_credential(&PlaceArgs::of(&args.source), access, &args.key)?;
    let others = other_slots(&source);
    if !others.is_empty() && !args.drop_slots && !args.keep_source {
        return Err(Error::OtherSlots { slots: others.join("; ") });
    }
    let (mut target, is_new) = make_target(args, destination, &source, &credential)?;
    drop(credential);
    let result = target
        .withhold()
        .map_err(|error| Error::Update { path: destination.into(), source: error })
        .and_then(|()| copy(args, destination, source, target));
    if result.is_err() && is_new {
        // Without a header it is of no use to anybody.
        let _ = std::fs::remove_file(destination);
    }
    let (source, moved) = result?;
    if !args.keep_source {
        source.erase().map_err(|error| Error::Erase { path: args.source.clone(), source: error })?;
    }
    if !args.pace.json {
        let (from, to, rate) = (args.source.display(), destination.display(), ByteSize(moved.bytes_per_second));
        let fate = if args.keep_source { "the source stays as it is" } else { "the source is erased" };
        outln!("{to}: {} moved from {from} ({rate}/s) and verified; {fate}", ByteSize(moved.bytes))?;
    }
    Ok(())
}

/// An empty namespace like `source` at the destination; whether its file is new.
fn make_target(
    args: &RelocateArgs,
    destination: &Path,
    source: &Namespace,
    credential: &Credential,
) -> Result<(Namespace, bool), Error> {
    let header = source.header();
    let slot = header.slots.iter().find(|slot| Some(slot.id) == source.slot_id());
    let kdf_cost = match slot.map(|slot| slot.kdf) {
        Some(Kdf::Argon2id(cost)) => cost,
        _ => KdfCost::default(),
    };
    let size_bytes = source.geometry().size_bytes();
    let options = FormatOptions {
        cipher: source.cipher(),
        unit: source.geometry().unit(),
        label: header.label.clone(),
        kdf_cost,
        size_bytes: Some(size_bytes),
        bind_address: header.bound_address.is_some(),
        allow_discards: header.discards,
        ..FormatOptions::default()
    };
    let allocation = if args.sparse { Allocation::Sparse } else { Allocation::Full };
    let is_new = !destination.exists();
    let backing = if is_new {
        let created = Backing::create(destination, HEADER_AREA_BYTES + size_bytes, allocation);
        Arc::new(created.map_err(|source| Error::Open { path: destination.into(), source })?)
    } else {
        let backing = Arc::clone(PlaceArgs::of(destination).open(Access::ReadWrite)?.data());
        let found = namespace::signature_found(&backing, 0);
        let found = found.map_err(|source| Error::Media { path: destination.into(), source })?;
        if let (false, Some(signature)) = (args.force, found) {
            return Err(Error::WouldOverwrite { path: destination.into(), signature });
        }
        backing
    };
    let target = namespace::format(backing, options, credential);
    if target.is_err() && is_new {
        let _ = std::fs::remove_file(destination);
    }
    let target = target.map_err(|source| Error::Format { path: destination.into(), source })?;
    Ok((target, is_new))
}

/// Copies, makes durable, compares, and only then writes the header of the target.
fn copy(
    args: &RelocateArgs,
    destination: &Path,
    source: Namespace,
    target: Namespace,
) -> Result<(Namespace, Moved), Error> {
    let backend = Backend::from_env()?;
    let (source, target) = (Volume::new(source, backend), Volume::new(target, backend));
    let from = Transfer::new(&args.source, &args.pace)?;
    let to = Transfer::new(destination, &args.pace)?;
    let mut holes = Holes::default();
    let moved = from.run("copied", source.size(), |offset, piece| {
        let (len, hole) = holes.at(&source, offset, piece.len()).map_err(|error| from.failed(error))?;
        let piece = &mut piece[..len];
        if hole {
            piece.fill(0);
            target.punch_zeroes(offset, len as u64).map_err(|error| to.failed(error))?;
        } else {
            source.read_at(piece, offset).map_err(|error| from.failed(error))?;
            target.write_at(piece, offset).map_err(|error| to.failed(error))?;
        }
        Ok(len)
    })?;
    target.flush().map_err(|error| to.failed(error))?;
    to.verify(&target, &moved)?;
    let mut target = target.into_namespace().expect("nobody has locked it");
    target.publish().map_err(|error| Error::Update { path: destination.into(), source: error })?;
    Ok((source.into_namespace().expect("nobody has locked it"), moved))
}

/// Where it lies.
fn adopt(args: &RelocateArgs) -> Result<(), Error> {
    let failed = |source: AdoptError| Error::Adopt { path: args.source.clone(), source: source.into() };
    let backing = Arc::clone(PlaceArgs::of(&args.source).open(Access::ReadWrite)?.data());
    let available_bytes = backing.len_bytes();
    let moved = MovedNamespace::open_at(&backing, 0, available_bytes).map_err(failed)?;
    if moved.header().slots.len() > 1 && !args.drop_slots {
        let slots = moved.header().slots.iter();
        let slots: Vec<_> = slots.map(|slot| format!("{}, {}", slot.id, super::info::slot_line(slot))).collect();
        return Err(Error::OtherSlots { slots: slots.join("; ") });
    }
    let old_base = moved.header().base;
    let credential = args.key.read(Prompt::Once, &args.source.display().to_string())?;
    let stop = catch_signals()?;
    let namespace = moved.adopt(&credential, &RekeyOptions::default()).map_err(failed)?;
    drop(credential);
    let base = namespace.geometry().base();
    let volume = Volume::new(namespace, Backend::from_env()?);
    let rate = finish(&volume, &args.pace, &stop).map_err(|error| error.at(&args.source))?;
    if !args.pace.json {
        outln!(
            "{}: written for byte {old_base}, now at home at byte {base} under a new volume key ({}/s)",
            args.source.display(),
            ByteSize(rate)
        )?;
    }
    Ok(())
}

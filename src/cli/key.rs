//! `daxcrypt key`: the ways to unlock a namespace, which are up to 32 key slots.
//!
//! The volume key itself never changes here: a slot that was removed opens again from an old copy of the header.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};

use super::credentials::{KdfArgs, KeyArgs, NewKeyArgs, Prompt};
use super::error::Error;
use super::info::slot_line;
use super::open;
use crate::namespace::{LockedNamespace, Namespace, UpdateError};
use crate::pmem::{Access, OpenOptions};

#[derive(Args, Debug)]
pub(crate) struct KeyCommandArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Show the key slots; needs no key
    List(ListArgs),
    /// Add a key slot, with a new passphrase or key file
    Add(AddArgs),
    /// Remove a key slot: its bytes are overwritten in both header copies
    Remove(RemoveArgs),
    /// Give a key slot another passphrase or key file
    Change(ChangeArgs),
    /// Tell whether a passphrase or key file unlocks, and which slot
    Test(TestArgs),
}

#[derive(Args, Debug)]
struct ListArgs {
    /// File or device with a namespace
    path: PathBuf,
    /// One JSON array, for scripts
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct AddArgs {
    /// File or device with a namespace
    path: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    new: NewKeyArgs,
    #[command(flatten)]
    kdf: KdfArgs,
    /// Number of the new slot, 0 to 31 (the lowest free one when not given)
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u32>,
    /// Name of the slot, such as whose it is
    #[arg(long, default_value = "")]
    label: String,
}

#[derive(Args, Debug)]
struct RemoveArgs {
    /// File or device with a namespace
    path: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    /// Number of the slot to remove
    #[arg(long, value_name = "NUMBER")]
    slot: u32,
    /// Remove it even if it is the last one, or the one that the key given here opens
    #[arg(long)]
    force: bool,
}

#[derive(Args, Debug)]
struct ChangeArgs {
    /// File or device with a namespace
    path: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    new: NewKeyArgs,
    #[command(flatten)]
    kdf: KdfArgs,
    /// Number of the slot to change (the one that the present key opens when not given)
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u32>,
}

#[derive(Args, Debug)]
struct TestArgs {
    /// File or device with a namespace
    path: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    /// Try this slot only
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u32>,
}

pub(crate) fn run(args: &KeyCommandArgs) -> Result<(), Error> {
    match &args.command {
        KeyCommand::List(args) => list(args),
        KeyCommand::Add(args) => add(args),
        KeyCommand::Remove(args) => remove(args),
        KeyCommand::Change(args) => change(args),
        KeyCommand::Test(args) => test(args),
    }
}

fn list(args: &ListArgs) -> Result<(), Error> {
    let locked = locked_without_lock(&args.path)?;
    let slots = &locked.header().slots;
    if args.json {
        let json = serde_json::to_string_pretty(slots)
            .map_err(|error| Error::Io { doing: "cannot print JSON", source: error.into() })?;
        println!("{json}");
    } else {
        for slot in slots {
            println!("{:>2}  {}", slot.id, slot_line(slot));
        }
    }
    Ok(())
}

fn add(args: &AddArgs) -> Result<(), Error> {
    args.new.check_stdin(&args.key)?;
    let cost = args.kdf.cost()?;
    let mut namespace = open::namespace(&args.path, Access::ReadWrite, &args.key)?;
    let credential = args.new.read(&args.path)?;
    let added = namespace.add_slot(args.slot, &args.label, &credential, cost);
    let id = added.map_err(|source| update_failed(&args.path, source))?;
    println!("added key slot {id}");
    Ok(())
}

fn remove(args: &RemoveArgs) -> Result<(), Error> {
    let mut namespace = open::namespace(&args.path, Access::ReadWrite, &args.key)?;
    let is_last = namespace.header().slots.len() == 1;
    if args.slot == namespace.slot_id() && !is_last && !args.force {
        return Err(Error::OwnSlot { slot: args.slot });
    }
    namespace.remove_slot(args.slot, args.force).map_err(|source| update_failed(&args.path, source))?;
    println!("removed key slot {}; a backup of the header that was made before still holds it", args.slot);
    Ok(())
}

fn change(args: &ChangeArgs) -> Result<(), Error> {
    args.new.check_stdin(&args.key)?;
    let cost = args.kdf.cost()?;
    let mut namespace = open::namespace(&args.path, Access::ReadWrite, &args.key)?;
    let slot = args.slot.unwrap_or_else(|| namespace.slot_id());
    let credential = args.new.read(&args.path)?;
    namespace.change_slot(slot, &credential, cost).map_err(|source| update_failed(&args.path, source))?;
    println!("changed key slot {slot}; a backup of the header that was made before still opens with the old key");
    Ok(())
}

fn test(args: &TestArgs) -> Result<(), Error> {
    let locked = locked_without_lock(&args.path)?;
    let credential = args.key.read(Prompt::Once, &args.path.display().to_string())?;
    let unlocked = match args.slot {
        Some(slot) => locked.unlock_slot(&credential, slot),
        None => locked.unlock_key(&credential),
    };
    let namespace: Namespace = unlocked.map_err(|source| Error::Unlock { path: args.path.clone(), source })?;
    println!("key slot {} opens with it", namespace.slot_id());
    Ok(())
}

fn update_failed(path: &Path, source: UpdateError) -> Error {
    Error::Update { path: path.into(), source }
}

/// Without a lock, so that slots can be looked at while the namespace is served. Nothing is written through it.
pub(crate) fn locked_without_lock(path: &Path) -> Result<LockedNamespace, Error> {
    let backing = OpenOptions::new(Access::ReadOnly)
        .lock_range(0..0)
        .open(path)
        .map_err(|source| Error::Open { path: path.into(), source })?;
    LockedNamespace::open(Arc::new(backing)).map_err(|source| Error::Namespace { path: path.into(), source })
}

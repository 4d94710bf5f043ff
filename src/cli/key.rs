//! `daxcrypt key`: the ways to unlock a namespace, which are up to 32 key slots.
//!
//! The volume key itself never changes here: a slot that was removed opens again from an old copy of the header.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::control::{Answer, Asked, Command};
use super::credentials::{KdfArgs, KeyArgs, NewKeyArgs, Prompt};
use super::dump;
use super::error::Error;
use super::info::slot_line;
use super::open;
use super::output::{self, outln, warning};
use super::place::PlaceArgs;
use super::recovery;
use crate::namespace::{Credential, Namespace, UpdateError};
use crate::ops::{self, Key, Operation, keys};

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
    /// Write the volume key itself to a file, for escrow
    Dump(DumpArgs),
}

#[derive(Args, Debug)]
struct ListArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// One JSON array, for scripts
    #[arg(long)]
    json: bool,
}

/// What every command that changes slots needs.
#[derive(Args, Debug)]
struct SlotArgs {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    key: KeyArgs,
}

/// Who does it.
#[derive(Args, Debug)]
struct ServerArgs {
    /// Ask the server that has the namespace, at its --control socket, to do it while it serves
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
}

/// What a slot is to open with.
#[derive(Args, Debug)]
struct WithArgs {
    #[command(flatten)]
    new: NewKeyArgs,
    #[command(flatten)]
    kdf: KdfArgs,
}

#[derive(Args, Debug)]
struct AddArgs {
    #[command(flatten)]
    common: SlotArgs,
    #[command(flatten)]
    with: WithArgs,
    /// Make up a recovery phrase instead of asking for a key, and print it once
    #[arg(long, conflicts_with_all = ["NewKeyArgs", "kdf_memory", "kdf_time", "control"])]
    recovery_key: bool,
    /// Number of the new slot, 0 to 31 (the lowest free one when not given)
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u32>,
    /// Name of the slot, such as whose it is
    #[arg(long, default_value = "")]
    label: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Args, Debug)]
struct RemoveArgs {
    #[command(flatten)]
    common: SlotArgs,
    /// Number of the slot to remove
    #[arg(long, value_name = "NUMBER")]
    slot: u32,
    /// Remove it even if it is the last one, or the one that the key given here opens
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Args, Debug)]
struct ChangeArgs {
    #[command(flatten)]
    common: SlotArgs,
    #[command(flatten)]
    with: WithArgs,
    /// Number of the slot to change (the one that the present key opens when not given)
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u32>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Args, Debug)]
struct TestArgs {
    #[command(flatten)]
    common: SlotArgs,
    /// Try this slot only
    #[arg(long, value_name = "NUMBER", conflicts_with = "escrow_file")]
    slot: Option<u32>,
}

#[derive(Args, Debug)]
struct DumpArgs {
    #[command(flatten)]
    common: SlotArgs,
    /// New file for the volume key, made with mode 0600: 32 bytes (AES-128-XTS) or 64 bytes (AES-256-XTS)
    #[arg(long, value_name = "FILE")]
    volume_key_file: PathBuf,
}

pub(crate) fn run(args: &KeyCommandArgs) -> Result<(), Error> {
    match &args.command {
        KeyCommand::List(args) => list(args),
        KeyCommand::Add(args) => add(args),
        KeyCommand::Remove(args) => remove(args),
        KeyCommand::Change(args) => change(args),
        KeyCommand::Test(args) => test(args),
        KeyCommand::Dump(args) => dump_volume_key(args),
    }
}

fn list(args: &ListArgs) -> Result<(), Error> {
    let found = args.place.look(Operation::KeyList)?;
    let slots = &found.header().slots;
    if args.json {
        return output::json(slots);
    }
    slots.iter().try_for_each(|slot| outln!("{:>2}  {}", slot.id, slot_line(slot)))
}

fn add(args: &AddArgs) -> Result<(), Error> {
    let id = if let Some(socket) = &args.server.control {
        let cost = args.with.kdf.cost()?;
        let (present, new) = args.with.for_server(&args.common)?;
        let (slot, label) = (args.slot, args.label.clone());
        args.common.ask(socket, Command::KeyAdd { slot, label, cost }, &[&present, &new])?
    } else if args.recovery_key {
        let mut namespace = args.common.unlocked(Operation::KeyAdd)?;
        return recovery::add_slot(&mut namespace, args.slot, &args.label, |source| args.common.update_failed(source));
    } else {
        let cost = args.with.kdf.cost()?;
        let (mut namespace, credential) = args.with.unlocked(Operation::KeyAdd, &args.common)?;
        let added = keys::add(&mut namespace, args.slot, &args.label, &credential, cost);
        added.map_err(|cause| args.common.failed(Operation::KeyAdd, cause))?
    };
    outln!("added key slot {id}")
}

fn remove(args: &RemoveArgs) -> Result<(), Error> {
    let &RemoveArgs { slot, force, .. } = args;
    if let Some(socket) = &args.server.control {
        let present = args.common.present()?;
        args.common.ask(socket, Command::KeyRemove { slot, force }, &[&present])?;
    } else {
        let mut namespace = args.common.unlocked(Operation::KeyRemove)?;
        let removed = keys::remove(&mut namespace, slot, force);
        removed.map_err(|cause| args.common.failed(Operation::KeyRemove, cause))?;
    }
    outln!("removed key slot {slot}; a backup of the header that was made before still holds it")
}

fn change(args: &ChangeArgs) -> Result<(), Error> {
    let slot = if let Some(socket) = &args.server.control {
        let (present, new) = args.with.for_server(&args.common)?;
        let (memory_kib, time) = args.with.kdf.named()?;
        args.common.ask(socket, Command::KeyChange { slot: args.slot, memory_kib, time }, &[&present, &new])?
    } else {
        let (mut namespace, credential) = args.with.unlocked(Operation::KeyChange, &args.common)?;
        let cost = args.with.kdf.cost_from(keys::present_cost(&namespace, args.slot))?;
        let changed = keys::change(&mut namespace, args.slot, &credential, cost);
        changed.map_err(|cause| args.common.failed(Operation::KeyChange, cause))?
    };
    outln!("changed key slot {slot}; a backup of the header that was made before still opens with the old key")
}

fn test(args: &TestArgs) -> Result<(), Error> {
    let SlotArgs { place, key } = &args.common;
    let found = place.look(Operation::KeyTest)?;
    let namespace = match args.slot {
        Some(slot) if !found.header().ephemeral => {
            let credential = key.read(Prompt::Once, &place.path.display().to_string())?;
            found.unlock(Key::Slot(&credential, slot))?
        }
        _ => open::unlock(found, key)?,
    };
    match namespace.slot_id() {
        Some(slot) => outln!("key slot {slot} opens with it"),
        None if namespace.header().ephemeral => outln!("it is ephemeral and opens without a key"),
        None => outln!("the volume key is that of the namespace"),
    }
}

fn dump_volume_key(args: &DumpArgs) -> Result<(), Error> {
    let namespace = args.common.unlocked(Operation::KeyDump)?;
    dump::write_new("volume key file", &args.volume_key_file, keys::dump(&namespace).bytes())?;
    warning!(
        "{} decrypts everything, now and later, whatever becomes of the key slots: keep it where no thief comes, and \
         give it back with --escrow-file",
        args.volume_key_file.display()
    );
    outln!("{}: volume key of namespace {}", args.volume_key_file.display(), namespace.header().uuid)
}

impl SlotArgs {
    fn unlocked(&self, operation: Operation) -> Result<Namespace, Error> {
        open::namespace(&self.place, operation, &self.key)
    }

    /// The key of a present slot, for a server that proves it.
    fn present(&self) -> Result<Credential, Error> {
        self.key.read(Prompt::Once, &self.place.path.display().to_string())
    }

    /// Has the server do it; the number of the slot.
    fn ask(&self, socket: &Path, command: Command, credentials: &[&Credential]) -> Result<u32, Error> {
        let asked = Asked::new(socket, command.operation(), &self.place.location())?;
        match asked.about(command, credentials)? {
            Answer::Slot(slot) => Ok(slot),
            _ => Err(Error::unexpected_answer()),
        }
    }

    fn failed(&self, operation: Operation, cause: ops::Cause) -> Error {
        ops::Error::new(operation, &self.place.path, cause).into()
    }

    fn update_failed(&self, source: UpdateError) -> Error {
        Error::Update { path: self.place.path.clone(), source }
    }
}

impl WithArgs {
    /// The present key, and what a slot is to open with, for a server that has the namespace.
    fn for_server(&self, common: &SlotArgs) -> Result<(Credential, Credential), Error> {
        self.new.check_stdin(&common.key)?;
        Ok((common.present()?, self.new.read(&common.place.path)?))
    }

    /// The namespace, and what a slot of it is to open with: the present key is asked for first.
    fn unlocked(&self, operation: Operation, common: &SlotArgs) -> Result<(Namespace, Credential), Error> {
        self.new.check_stdin(&common.key)?;
        let namespace = common.unlocked(operation)?;
        let credential = self.new.read(&common.place.path)?;
        Ok((namespace, credential))
    }
}

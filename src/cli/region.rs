//! `daxcrypt region` and `daxcrypt remove`: many namespaces in one file or device, each in a partition of its own.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde::Serialize;
use uuid::Uuid;

use super::compact::{self, CompactArgs};
use super::erase;
use super::error::Error;
use super::output::{self, outln};
use super::place::{self, PlaceArgs};
use super::size::ByteSize;
use crate::namespace::{self, CopyState, LockedNamespace, Region, RegionPartition};
use crate::ops::erase::Doomed;
use crate::ops::{self, Location, Operation};
use crate::pmem::{Access, Allocation, Backing};

#[derive(Args, Debug)]
pub(crate) struct RegionCommandArgs {
    #[command(subcommand)]
    command: RegionCommand,
}

#[derive(Debug, Subcommand)]
enum RegionCommand {
    /// Make a region: a file or device with an empty partition table
    Create(CreateArgs),
    /// Show the namespaces of a region, and what is free
    List(ListArgs),
    /// Move the namespaces of a region together, towards its start, each under a new volume key
    #[command(after_help = "\
Examples:
  daxcrypt region compact region.img --key a=a.key --key b=b.key  # others stay
  daxcrypt region compact region.img#b --key-file b.key")]
    Compact(CompactArgs),
}

#[derive(Args, Debug)]
struct CreateArgs {
    /// File or device; a file is made when it does not exist
    path: PathBuf,
    /// Size of a new file, such as 64G
    #[arg(long)]
    size: Option<ByteSize>,
    /// Leave holes instead of allocating all blocks now
    #[arg(long)]
    sparse: bool,
    /// Bytes of a sector of the table, for a file that becomes a device with such sectors (those of the device, or 512)
    #[arg(long, value_parser = ["512", "4096"])]
    sector_size: Option<String>,
    /// Overwrite whatever is there
    #[arg(long)]
    force: bool,
}

#[derive(Args, Debug)]
struct ListArgs {
    /// File or device with a region
    path: PathBuf,
    /// One JSON object, for scripts
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct RemoveArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(args: &RegionCommandArgs) -> Result<(), Error> {
    match &args.command {
        RegionCommand::Create(args) => create(args),
        RegionCommand::List(args) => list(args),
        RegionCommand::Compact(args) => compact::run(args),
    }
}

fn create(args: &CreateArgs) -> Result<(), Error> {
    let path = &args.path;
    let is_new = !path.exists();
    let allocation = if args.sparse { Allocation::Sparse } else { Allocation::Full };
    let opened = match (is_new, args.size) {
        (true, Some(ByteSize(len_bytes))) => Backing::create(path, len_bytes, allocation),
        (true, None) => {
            let path = path.display();
            return Err(Error::Usage(format!("{path} does not exist: say how large it is to be, such as --size 64G")));
        }
        (false, Some(_)) => return Err(Error::Usage(format!("{} exists: it is used whole", path.display()))),
        (false, None) => Backing::open(path, Access::ReadWrite),
    };
    let backing = opened.map(Arc::new).map_err(|source| Error::Open { path: path.clone(), source })?;
    let failed = |source| Error::Media { path: path.clone(), source };
    if !args.force
        && let Some(signature) = namespace::signature_found(&backing, 0).map_err(failed)?
    {
        return Err(Error::WouldOverwrite { path: path.clone(), signature });
    }
    let sector_bytes = sector_bytes(args, &backing)?;
    let region = Region::create(backing, sector_bytes).map_err(|source| {
        if is_new {
            let _ = std::fs::remove_file(path); // the first error is the one to report
        }
        Error::Region { path: path.clone(), source }
    })?;
    outln!("{}: region {}, {} free", path.display(), region.disk_guid(), ByteSize(free_bytes(&region)))
}

/// The kernel looks for a table in sectors of the device's size only.
fn sector_bytes(args: &CreateArgs, backing: &Backing) -> Result<u64, Error> {
    let wanted = args.sector_size.as_deref().map(|text| if text == "4096" { 4096 } else { 512 });
    match (wanted, backing.sector_bytes()) {
        (Some(wanted), Some(actual)) if wanted != actual => {
            let path = args.path.display();
            Err(Error::Usage(format!(
                "{path} has sectors of {actual} bytes: a table in sectors of {wanted} would not be found"
            )))
        }
        (wanted, actual) => Ok(wanted.or(actual).unwrap_or(512)),
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Listing {
    disk_guid: Uuid,
    namespaces: Vec<Entry>,
    others: Vec<Entry>,
    free: Vec<Free>,
    tables: [CopyState; 2],
}

/// A partition; of a namespace with what its header says.
#[derive(Serialize)]
struct Entry {
    number: u32,
    name: String,
    start: u64,
    len_bytes: u64,
    uuid: Option<Uuid>,
    label: Option<String>,
    size_bytes: Option<u64>,
    /// Why the header says nothing.
    fault: Option<String>,
}

#[derive(Serialize)]
struct Free {
    start: u64,
    len_bytes: u64,
}

fn list(args: &ListArgs) -> Result<(), Error> {
    let region = ops::peek_table(Operation::Info, &args.path)?;
    place::warn_of_table(&args.path, &region);
    let (ours, others): (Vec<_>, Vec<_>) = region.partitions().into_iter().partition(|partition| partition.is_ours);
    let namespaces = ours.into_iter().map(|partition| namespace_entry(args, partition)).collect::<Result<_, _>>()?;
    let free = region.free().into_iter().map(|free| Free { start: free.start, len_bytes: free.end - free.start });
    let listing = Listing {
        disk_guid: region.disk_guid(),
        namespaces,
        others: others.into_iter().map(Entry::of).collect(),
        free: free.collect(),
        tables: region.copies(),
    };
    if args.json {
        return output::json(&listing);
    }
    outln!("{:<24} {:>14} {:>12} {:>12}  WHAT", "NAME", "START", "LENGTH", "SIZE")?;
    for entry in &listing.namespaces {
        let size = entry.size_bytes.map_or_else(|| "-".into(), |bytes| ByteSize(bytes).to_string());
        let what = match (&entry.fault, entry.uuid) {
            (Some(fault), _) => fault.clone(),
            (None, uuid) => format!("namespace {}", uuid.unwrap_or_default()),
        };
        row(&entry.name, entry.start, entry.len_bytes, &size, &what)?;
    }
    for entry in &listing.others {
        row(&entry.name, entry.start, entry.len_bytes, "-", "not a namespace of ours")?;
    }
    listing.free.iter().try_for_each(|free| row("", free.start, free.len_bytes, "-", "free"))
}

fn row(name: &str, start: u64, len_bytes: u64, size: &str, what: &str) -> Result<(), Error> {
    // A name must not steer the terminal.
    let (name, length) = (name.escape_debug().to_string(), ByteSize(len_bytes).to_string());
    outln!("{name:<24} {start:>14} {length:>12} {size:>12}  {what}")
}

fn namespace_entry(args: &ListArgs, partition: RegionPartition) -> Result<Entry, Error> {
    let location = Location::of_region(&args.path, &partition.name);
    let mut entry = Entry::of(partition);
    match LockedNamespace::open_in(location.peek(Operation::Info)?) {
        Ok(locked) => {
            let header = locked.header();
            entry.uuid = Some(header.uuid);
            entry.label = Some(header.label.clone());
            entry.size_bytes = Some(header.size_bytes);
        }
        Err(error) => entry.fault = Some(super::error::chain(&error)),
    }
    Ok(entry)
}

impl Entry {
    fn of(partition: RegionPartition) -> Self {
        let RegionPartition { number, name, range, .. } = partition;
        let (start, len_bytes) = (range.start, range.end - range.start);
        Self { number, name, start, len_bytes, uuid: None, label: None, size_bytes: None, fault: None }
    }
}

fn free_bytes(region: &Region) -> u64 {
    region.free().iter().map(|free| free.end - free.start).sum()
}

/// Destroys the keys of a namespace in a region, and gives its place back.
pub(crate) fn remove(args: &RemoveArgs) -> Result<(), Error> {
    let location = args.place.location();
    let doomed = Doomed::find_in_region(&location)?;
    place::warn(&location, doomed.site());
    if !args.yes {
        erase::confirm(&args.place, doomed.header().ok())?;
    }
    let region = doomed.remove()?;
    let Some((path, name)) = location.region() else { return Ok(()) };
    outln!("{}: removed namespace {name}, {} are free now", path.display(), ByteSize(free_bytes(&region)))
}

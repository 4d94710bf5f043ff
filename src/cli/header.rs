//! `daxcrypt header`: backups of the header, and what a header says.
//!
//! A backup is the header copy in use, as it is: whoever has it and the key of one of its slots has the volume key, also
//! after that slot was removed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::credentials::KeyArgs;
use super::dump;
use super::error::Error;
use super::info;
use super::open;
use super::output::{self, out, outln, warning};
use super::place::PlaceArgs;
use crate::namespace::{self, BACKUP_BYTES, Header, RestoreError};
use crate::pmem::Access;

#[derive(Args, Debug)]
pub(crate) struct HeaderCommandArgs {
    #[command(subcommand)]
    command: HeaderCommand,
}

#[derive(Debug, Subcommand)]
enum HeaderCommand {
    /// Copy the header to a new file; needs no key
    Backup(BackupArgs),
    /// Put a backup back
    Restore(RestoreArgs),
    /// Show what a backup, or each header copy of a namespace, says; needs no key
    Inspect(InspectArgs),
}

#[derive(Args, Debug)]
struct BackupArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The new file, made with mode 0600
    #[arg(value_name = "BACKUP")]
    backup: PathBuf,
}

#[derive(Args, Debug)]
struct RestoreArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The backup
    #[arg(value_name = "BACKUP")]
    backup: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    /// Restore even over the header of another namespace, and without trying whether the backup unlocks
    #[arg(long)]
    force: bool,
}

#[derive(Args, Debug)]
struct InspectArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// One JSON object, for scripts
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &HeaderCommandArgs) -> Result<(), Error> {
    match &args.command {
        HeaderCommand::Backup(args) => backup(args),
        HeaderCommand::Restore(args) => restore(args),
        HeaderCommand::Inspect(args) => inspect(args),
    }
}

fn backup(args: &BackupArgs) -> Result<(), Error> {
    let locked = args.place.locked(args.place.peek()?)?;
    let path = args.place.header_path();
    let bytes = locked.backup().map_err(|source| Error::Media { path: path.clone(), source })?;
    dump::write_new("header backup", &args.backup, &bytes)?;
    outln!("{}: backup of the header of namespace {}", args.backup.display(), locked.header().uuid)?;
    outln!("It opens with the keys of today, also when they are removed or the namespace is erased: keep it as a key.")
}

fn restore(args: &RestoreArgs) -> Result<(), Error> {
    let backup = read_backup(&args.backup)?;
    let failed = |source| Error::Restore { path: args.place.path.clone(), source };
    let site = args.place.open(Access::ReadWrite)?;
    if args.force {
        namespace::restore_unchecked(site, &backup).map_err(failed)?;
        warning!("{}: restored without trying whether anything unlocks it", args.place.path.display());
        return outln!("{}: restored the header", args.place.path.display());
    }
    let locked = namespace::open_backup(site, &backup, false).map_err(failed)?;
    let mut namespace = open::unlock(locked, &args.key, &args.place.path)?;
    namespace.write_header().map_err(|source| Error::Update { path: args.place.path.clone(), source })?;
    outln!("{}: restored the header, with {} key slots", args.place.path.display(), namespace.header().slots.len())
}

/// One copy of a header, or the reason why it says nothing.
#[derive(Serialize)]
struct Copy {
    copy: &'static str,
    #[serde(flatten)]
    content: Content,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Content {
    Header(Box<Header>),
    Fault(String),
}

fn inspect(args: &InspectArgs) -> Result<(), Error> {
    let copies = copies(args)?;
    if args.json {
        return output::json(&copies);
    }
    for copy in &copies {
        outln!("copy {}", copy.copy)?;
        match &copy.content {
            Content::Fault(reason) => outln!("  not usable: {reason}")?,
            Content::Header(header) => {
                for (name, value) in info::header_lines(header) {
                    out!("  {name:<14} {value}\n")?;
                }
            }
        }
    }
    Ok(())
}

fn copies(args: &InspectArgs) -> Result<Vec<Copy>, Error> {
    let path = args.place.header_path();
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() == BACKUP_BYTES as u64) {
        let header = namespace::inspect_backup(&read_backup(path)?)
            .map_err(|source| Error::Restore { path: path.clone(), source })?;
        return Ok(vec![Copy { copy: "backup", content: Content::Header(Box::new(header)) }]);
    }
    let copies = namespace::inspect(&args.place.peek()?)
        .map_err(|source| Error::Namespace { path: path.clone(), source })?
        .map(|copy| match copy {
            Ok(header) => Content::Header(Box::new(header)),
            Err(fault) => Content::Fault(super::error::chain(&fault)),
        });
    Ok(["A", "B"].into_iter().zip(copies).map(|(copy, content)| Copy { copy, content }).collect())
}

/// The bytes of a backup, at most one more than it may have.
fn read_backup(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::ReadFile { what: "header backup", path: path.into(), source };
    let mut bytes = Vec::with_capacity(BACKUP_BYTES + 1);
    File::open(path).map_err(failed)?.take(BACKUP_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() != BACKUP_BYTES {
        let (len_bytes, expected_bytes) = (bytes.len(), BACKUP_BYTES);
        return Err(Error::Restore { path: path.into(), source: RestoreError::Length { len_bytes, expected_bytes } });
    }
    Ok(bytes)
}

//! `daxcrypt header`: backups of the header, and what a header says.
//!
//! A backup is the header copy in use, as it is: whoever has it and the key of one of its slots has the volume key, also
//! after that slot was removed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::credentials::{KdfArgs, KeyArgs, NewKeyArgs, Prompt};
use super::dump;
use super::error::Error;
use super::info;
use super::open;
use super::output::{self, outln, warning};
use super::place::PlaceArgs;
use crate::luks2::{ExportOptions, SlotKdf};
use crate::namespace::{self, BACKUP_BYTES, Header, RestoreError};
use crate::ops::headers::{self, Restoration};
use crate::ops::{Key, Operation};

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
    /// Write a LUKS2 header for a namespace with a detached header, with which cryptsetup opens the same data
    Export(ExportArgs),
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

#[derive(Args, Debug)]
struct ExportArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// The new file, made with mode 0600
    #[arg(long, value_name = "FILE")]
    luks2: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    new: NewKeyArgs,
    /// Key derivation of the LUKS2 key slot
    #[arg(long, value_enum, default_value_t = PbkdfArg::Argon2id)]
    pbkdf: PbkdfArg,
    /// Iterations of PBKDF2
    #[arg(long, value_name = "NUMBER", default_value_t = 2_000_000)]
    pbkdf2_iterations: u32,
    #[command(flatten)]
    kdf: KdfArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PbkdfArg {
    Argon2id,
    Pbkdf2,
}

pub(crate) fn run(args: &HeaderCommandArgs) -> Result<(), Error> {
    match &args.command {
        HeaderCommand::Backup(args) => backup(args),
        HeaderCommand::Restore(args) => restore(args),
        HeaderCommand::Inspect(args) => inspect(args),
        HeaderCommand::Export(args) => export(args),
    }
}

fn backup(args: &BackupArgs) -> Result<(), Error> {
    let headers::Backup { uuid, bytes } = headers::backup(&args.place.location())?;
    dump::write_new("header backup", &args.backup, &bytes)?;
    outln!("{}: backup of the header of namespace {uuid}", args.backup.display())?;
    outln!("It opens with the keys of today, also when they are removed or the namespace is erased: keep it as a key.")
}

fn restore(args: &RestoreArgs) -> Result<(), Error> {
    let backup = read_backup(&args.backup)?;
    let location = args.place.location();
    if args.force {
        headers::restore_unchecked(&location, &backup)?;
        warning!("{}: restored without trying whether anything unlocks it", args.place.path.display());
        return outln!("{}: restored the header", args.place.path.display());
    }
    let restoration = Restoration::open(&location, &backup)?;
    let ephemeral = restoration.header().ephemeral;
    let header = open::with_key(&args.key, ephemeral, &args.place.path, |key| restoration.restore(key))?;
    outln!("{}: restored the header, with {} key slots", args.place.path.display(), header.slots.len())
}

fn export(args: &ExportArgs) -> Result<(), Error> {
    args.new.check_stdin(&args.key)?;
    let kdf = match args.pbkdf {
        PbkdfArg::Argon2id => SlotKdf::Argon2id(args.kdf.cost()?),
        PbkdfArg::Pbkdf2 => SlotKdf::Pbkdf2 { iterations: args.pbkdf2_iterations },
    };
    let path = &args.place.path;
    let location = args.place.location();
    let found = location.find(Operation::ExportLuks2)?;
    let discards = found.header().discards;
    // One key for both, unless another one is named or only the volume key is known.
    let (namespace, credential) = if args.new.is_given() || args.key.escrow_file.is_some() {
        (open::unlock(found, &args.key)?, args.new.read(path)?)
    } else {
        let credential = args.key.read(Prompt::Once, &path.display().to_string())?;
        (found.unlock(Key::Credential(&credential))?, credential)
    };
    let bytes = headers::export_luks2(&location, &namespace, &credential, ExportOptions { kdf })?;
    dump::write_new("LUKS2 header", &args.luks2, &bytes)?;
    if discards {
        warning!("discards are allowed here: holes read as zeroes through daxcrypt, but as noise through dm-crypt");
    }
    let (header, path) = (args.luks2.display(), path.display());
    outln!("{header}: LUKS2 header; cryptsetup open --header {header} {path} NAME")
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
                    outln!("  {name:<14} {value}")?;
                }
            }
        }
    }
    Ok(())
}

fn copies(args: &InspectArgs) -> Result<Vec<Copy>, Error> {
    let location = args.place.location();
    let path = location.header_path();
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() == BACKUP_BYTES as u64) {
        let header = namespace::inspect_backup(&read_backup(path)?)
            .map_err(|source| Error::Restore { path: path.into(), source })?;
        return Ok(vec![Copy { copy: "backup", content: Content::Header(Box::new(header)) }]);
    }
    let copies = namespace::inspect(&location.peek(Operation::Info)?)
        .map_err(|source| Error::Namespace { path: path.into(), source })?
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

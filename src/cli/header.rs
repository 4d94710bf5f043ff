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
use super::secrets;
use crate::luks2::{ExportOptions, SlotKdf};
use crate::namespace::{self, BACKUP_BYTES, CopyName, Credential, Header, Proof, RepairKey, RestoreError};
use crate::ops::headers::{self, CopyProof, Forced, Repair, Restoration};
use crate::ops::{Key, Location, Operation};
use crate::secret::VolumeKey;

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
    /// Choose between two header copies of which one is forged or damaged, with a key that proves it
    Repair(RepairArgs),
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
    /// Restore even though key slots were removed or made since the backup: its own open it then
    #[arg(long)]
    replace_slots: bool,
    /// Restore even over the header of another namespace or another volume key, and without trying whether the backup
    /// unlocks; what is there is saved to a file first
    #[arg(long)]
    force: bool,
    /// With --force, the new file for the header that is replaced [default: BACKUP.replaced]
    #[arg(long, value_name = "FILE", requires = "force")]
    save: Option<PathBuf>,
    /// With --force, do not ask
    #[arg(long, requires = "force")]
    yes: bool,
}

#[derive(Args, Debug)]
struct RepairArgs {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// Make this copy the header, if the key proves it; without this option the terminal is asked
    #[arg(long, value_enum, value_name = "A|B")]
    copy: Option<CopyArg>,
    /// Print what each copy says as JSON, and ask nothing
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CopyArg {
    #[value(name = "A", alias = "a")]
    A,
    #[value(name = "B", alias = "b")]
    B,
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
        HeaderCommand::Repair(args) => repair(args),
        HeaderCommand::Inspect(args) => inspect(args),
        HeaderCommand::Export(args) => export(args),
    }
}

fn backup(args: &BackupArgs) -> Result<(), Error> {
    let headers::Backup { uuid, bytes } = headers::backup(&args.place.location())?;
    dump::write_new("header backup", &args.backup, &bytes)?;
    outln!("{}: backup of the header of namespace {uuid}", args.backup.display())?;
    outln!(
        "It opens with the keys of today, also when they are removed or the namespace is erased: keep it as a key. It is good \
         until the next re-key, relocation or resize: make a new one then, and destroy this one."
    )
}

fn restore(args: &RestoreArgs) -> Result<(), Error> {
    let backup = read_backup(&args.backup)?;
    let location = args.place.location();
    if args.force {
        return restore_by_force(args, &location, &backup);
    }
    let restoration = Restoration::open(&location, &backup)?;
    let ephemeral = restoration.header().ephemeral;
    let header =
        open::with_key(&args.key, ephemeral, &args.place.path, |key| restoration.restore(key, args.replace_slots))?;
    outln!("{}: restored the header, with {} key slots", args.place.path.display(), header.slots.len())
}

/// Nobody has proved that the backup is the right one, so what it replaces is kept.
fn restore_by_force(args: &RestoreArgs, location: &Location, backup: &[u8]) -> Result<(), Error> {
    let path = location.header_path().display();
    let forced = Forced::open(location, backup)?;
    if let Some(present) = forced.present()? {
        let kept = args.save.clone().unwrap_or_else(|| {
            let mut name = args.backup.as_os_str().to_owned();
            name.push(".replaced");
            name.into()
        });
        if !args.yes {
            let question = format!(
                "The header in {path} will be replaced by one that nobody has tried to unlock, and kept in {}. To go on, \
                 type yes: ",
                kept.display()
            );
            if secrets::ask_line(&question)? != "yes" {
                return Err(Error::NotReplaced { path: location.header_path().into() });
            }
        }
        dump::write_new("replaced header", &kept, &present)?;
        outln!("{}: the header that was here, to be kept as a key", kept.display())?;
    }
    forced.restore(backup)?;
    warning!("{path}: restored without trying whether anything unlocks it");
    outln!("{path}: restored the header")
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

fn repair(args: &RepairArgs) -> Result<(), Error> {
    let path = args.place.path.display().to_string();
    let repair = Repair::open(&args.place.location())?;
    let key = match &args.key.escrow_file {
        Some(file) => Proving::VolumeKey(secrets::escrow_file(file)?),
        None => Proving::Credential(args.key.read(Prompt::Once, &path)?),
    };
    let proofs = repair.prove(&key.as_repair_key())?;
    let differ = !matches!(&proofs, [CopyProof { header: Ok(a), .. }, CopyProof { header: Ok(b), .. }] if a == b);
    tell_proofs(&proofs, args.json)?;
    let name = match args.copy {
        Some(CopyArg::A) => CopyName::A,
        Some(CopyArg::B) => CopyName::B,
        None if args.json || !differ => return Ok(()),
        None => match secrets::ask_line("Which copy is to be the header, A or B (anything else: none)? ")?.as_str() {
            "A" | "a" => CopyName::A,
            "B" | "b" => CopyName::B,
            _ => return Err(Error::NotReplaced { path: args.place.location().header_path().into() }),
        },
    };
    let header = match key {
        Proving::Credential(credential) => repair.choose(name, Key::Credential(&credential)),
        Proving::VolumeKey(volume_key) => repair.choose(name, Key::VolumeKey(volume_key)),
    }?;
    if args.json {
        return Ok(());
    }
    outln!("{path}: copy {name} is the header now, in both places, with {} key slots", header.slots.len())
}

/// A key that is needed twice: to prove, and to choose.
enum Proving {
    Credential(Credential),
    VolumeKey(VolumeKey),
}

impl Proving {
    const fn as_repair_key(&self) -> RepairKey<'_> {
        match self {
            Self::Credential(credential) => RepairKey::Credential(credential),
            Self::VolumeKey(key) => RepairKey::VolumeKey(key),
        }
    }
}

/// Says what each copy is, and what the key says of it.
fn tell_proofs(proofs: &[CopyProof; 2], json: bool) -> Result<(), Error> {
    let content = |proof: &CopyProof| match &proof.header {
        Ok(header) => Content::Header(Box::new(header.clone())),
        Err(fault) => Content::Fault(super::error::chain(fault)),
    };
    let copies = proofs.iter().zip(["A", "B"]).map(|(proof, copy)| {
        let (verdict, slot) = match proof.proof {
            Proof::Genuine { slot } => ("genuine", slot),
            Proof::Forged => ("forged", None),
            Proof::NotOpened => ("not_opened", None),
            _ => ("unusable", None),
        };
        Proven { proof: verdict, slot, copy: Copy { copy, content: content(proof) } }
    });
    let copies: Vec<_> = copies.collect();
    if json {
        return output::json(&copies);
    }
    for Proven { proof, slot, copy } in &copies {
        outln!("copy {}", copy.copy)?;
        let verdict = match (*proof, slot) {
            ("genuine", Some(slot)) => {
                format!("genuine: key slot {slot} opens with the key, and all of it is under its MAC")
            }
            ("genuine", None) => "genuine: it was written by the holder of this volume key".into(),
            ("forged", _) => "forged or damaged: a key slot opens, but the rest is not under its MAC".into(),
            ("not_opened", _) => "not opened by this key: another key is needed, or it is forged".into(),
            _ => "not usable".into(),
        };
        outln!("  {:<14} {verdict}", "the key says")?;
        print_content(&copy.content)?;
    }
    Ok(())
}

/// A copy and what a key says of it.
#[derive(Serialize)]
struct Proven {
    proof: &'static str,
    slot: Option<u32>,
    #[serde(flatten)]
    copy: Copy,
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
        print_content(&copy.content)?;
    }
    Ok(())
}

fn print_content(content: &Content) -> Result<(), Error> {
    match content {
        Content::Fault(reason) => outln!("  not usable: {reason}"),
        Content::Header(header) => {
            info::header_lines(header).iter().try_for_each(|(name, value)| outln!("  {name:<14} {value}"))
        }
    }
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

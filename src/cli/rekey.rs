//! `daxcrypt rekey`: a new volume key for a namespace, in place.
//!
//! What is interrupted is done by `--resume`, or by `serve` while it serves.

mod online;

use std::path::PathBuf;

use clap::Args;

use super::credentials::KeyArgs;
use super::error::Error;
use super::format::CipherArg;
use super::from_ops::numbered_line;
use super::open;
use super::output::outln;
use super::pace::{PaceArgs, catch_signals, policy};
use super::place::PlaceArgs;
use super::progress::Progress;
use super::size::ByteSize;
use crate::namespace::{Cipher, Credential, DataUnit, Namespace};
use crate::ops::rekey::{self, Estimate, Wish};
use crate::ops::{self, Cause, Operation, Run};
use crate::volume::Volume;
use crate::xts::Backend;

/// What is said after a volume key has been replaced.
pub(crate) const VOID: &str =
    "header backups, escrow files and LUKS2 headers that were made before are void now: make new ones";

#[derive(Args, Debug)]
pub(crate) struct RekeyArgs {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// Cipher from now on (the present one when not given)
    #[arg(long, value_enum)]
    cipher: Option<CipherArg>,
    /// Bytes under one XTS tweak from now on (the present number when not given)
    #[arg(long, value_parser = ["512", "4096"])]
    unit: Option<String>,
    /// Keep the other key slots: they open the new volume key as they opened the old one. Whoever knew the old volume key
    /// and has an old header is then not shut out
    #[arg(long, conflicts_with = "drop_slots")]
    keep_slots: bool,
    /// Drop the other key slots: only the key given here opens the namespace from now on
    #[arg(long)]
    drop_slots: bool,
    #[command(flatten)]
    pace: PaceArgs,
    /// Ask the server that has the namespace, at its --control socket, to do it while it serves
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Only say how many bytes there are, which key slots would go, and how long it takes at least
    #[arg(long)]
    dry_run: bool,
    /// Say whether a re-key is under way, and with a key how far it has come
    #[arg(long, conflicts_with_all = ["cipher", "unit", "keep_slots", "drop_slots", "dry_run", "resume", "pause"])]
    status: bool,
    /// Go on with a re-key that was interrupted or paused
    #[arg(long, conflicts_with_all = ["cipher", "unit", "keep_slots", "drop_slots", "dry_run", "pause"])]
    resume: bool,
    /// Let an interrupted re-key rest: `serve` does not go on with it until --resume
    #[arg(long, conflicts_with_all = ["cipher", "unit", "keep_slots", "drop_slots", "dry_run"])]
    pause: bool,
    /// Let the server's re-key rest; it, or a later server, goes on with it when asked or started again
    #[arg(long, requires = "control", conflicts_with_all = ["cipher", "unit", "keep_slots", "drop_slots", "dry_run",
        "status", "resume", "pause"])]
    stop: bool,
}

pub(crate) fn run(args: &RekeyArgs) -> Result<(), Error> {
    if let Some(socket) = &args.control {
        return online::run(args, socket);
    }
    if args.status {
        return status(args);
    }
    let operation = args.operation();
    let (mut namespace, credential) = open::namespace_and_credential(&args.place, operation, &args.key)?;
    let stop = catch_signals()?; // not before the prompt, which a signal may end
    if args.pause {
        namespace.set_transform_paused(true).map_err(|source| args.failed(source))?;
        outln!("{}: paused; `daxcrypt rekey --resume` goes on", args.place.path.display())?;
        return Ok(());
    }
    if args.resume {
        namespace.set_transform_paused(false).map_err(|source| args.failed(source))?;
    } else if args.dry_run {
        return dry_run(args, namespace);
    } else {
        begin(args, &mut namespace, &credential)?;
    }
    drop(credential);
    let volume = Volume::new(namespace, Backend::from_env()?);
    let mut progress = Progress::new(args.pace.json);
    let mut run = Run::new(&mut progress, &stop, args.pace.bytes_per_second());
    let moved = run.end_transform(&volume).map_err(|cause| args.failed(cause))?;
    if args.pace.json { Ok(()) } else { say_done(args, Some(moved.bytes_per_second)) }
}

fn begin(args: &RekeyArgs, namespace: &mut Namespace, credential: &Credential) -> Result<(), Error> {
    let began = rekey::begin(namespace, credential, args.wish()).map_err(|cause| args.failed(cause))?;
    if !args.pace.json {
        if let Some(slot) = began.slot {
            outln!("key slot {slot} is new and opens with the key given here")?;
        }
        let what = if args.keep_slots { "kept" } else { "dropped" };
        for slot in &began.others {
            outln!("{what}: key slot {}", numbered_line(slot))?;
        }
    }
    Ok(())
}

fn dry_run(args: &RekeyArgs, namespace: Namespace) -> Result<(), Error> {
    let volume = Volume::new(namespace, Backend::from_env()?);
    let estimate = rekey::estimate(&volume, args.wish()).map_err(|cause| args.failed(cause))?;
    say_estimate(args, &estimate)
}

fn say_estimate(args: &RekeyArgs, estimate: &Estimate) -> Result<(), Error> {
    let (path, size_bytes) = (args.place.path.display(), estimate.size_bytes);
    outln!("{path}: {} ({size_bytes} bytes) to re-key", ByteSize(size_bytes))?;
    for slot in &estimate.others {
        outln!("besides the key given here, these slots open it: {}", numbered_line(slot))?;
    }
    say_blocks(estimate.blocks_bytes, estimate.free_bytes)?;
    let (rate, limit) = (estimate.decrypted_bytes_per_second, args.pace.bytes_per_second().unwrap_or(u64::MAX).max(1));
    let seconds = size_bytes.div_ceil(rate.min(limit).max(1));
    outln!(
        "at least {seconds} s: it reads and decrypts {}/s here; encryption, and writing everything twice, come on top",
        ByteSize(rate)
    )
}

/// Says what a sparse file needs, if it needs something.
pub(crate) fn say_blocks(blocks_bytes: u64, free_bytes: Option<u64>) -> Result<(), Error> {
    if blocks_bytes == 0 {
        return Ok(());
    }
    let free = match free_bytes {
        Some(bytes) if bytes < blocks_bytes => format!("; only {} are free", ByteSize(bytes)),
        Some(bytes) => format!("; {} are free", ByteSize(bytes)),
        None => String::new(),
    };
    outln!("it is sparse: up to {} of blocks will be needed besides{free}", ByteSize(blocks_bytes))
}

/// What is said when every byte has arrived.
fn say_done(args: &RekeyArgs, rate: Option<u64>) -> Result<(), Error> {
    let rate = rate.map_or_else(String::new, |rate| format!(" ({}/s)", ByteSize(rate)));
    outln!("{}: every byte is under the new volume key{rate}", args.place.path.display())?;
    outln!("{VOID}")
}

fn status(args: &RekeyArgs) -> Result<(), Error> {
    let path = args.place.path.display();
    let found = args.place.look(Operation::RekeyStatus)?;
    if found.locked().transform_kind().is_none() {
        outln!("{path}: no re-key is under way")?;
        return Ok(());
    }
    if !args.key.is_given() {
        outln!("{path}: a re-key is under way; with its key --status says how far it has come")?;
        return Ok(());
    }
    let namespace = open::unlock(found, &args.key)?;
    if let Some(pending) = namespace.pending_transform() {
        let (done_bytes, total_bytes) = (pending.record().done_bytes, pending.source().size_bytes());
        if args.pace.json {
            let paused = namespace.transform_paused();
            outln!(
                "{}",
                serde_json::json!({ "done_bytes": done_bytes, "total_bytes": total_bytes, "paused": paused })
            )?;
        } else {
            let state = if namespace.transform_paused() { "paused" } else { "under way" };
            outln!("{path}: a re-key is {state}: {} of {} done", ByteSize(done_bytes), ByteSize(total_bytes))?;
        }
    }
    Ok(())
}

impl RekeyArgs {
    const fn operation(&self) -> Operation {
        match (self.pause, self.resume, self.dry_run) {
            (true, ..) => Operation::RekeyPause,
            (_, true, _) => Operation::RekeyResume,
            (.., true) => Operation::RekeyPreview,
            _ => Operation::RekeyBegin,
        }
    }

    fn failed(&self, cause: impl Into<Cause>) -> Error {
        ops::Error::new(self.operation(), &self.place.path, cause).into()
    }

    fn unit(&self) -> Option<DataUnit> {
        self.unit.as_deref().map(|unit| if unit == "512" { DataUnit::Bytes512 } else { DataUnit::Bytes4096 })
    }

    fn wish(&self) -> Wish {
        Wish {
            cipher: self.cipher.map(Cipher::from),
            unit: self.unit(),
            slots: policy(self.keep_slots, self.drop_slots),
        }
    }
}

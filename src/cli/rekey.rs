//! `daxcrypt rekey`: a new volume key for a namespace, in place.
//!
//! The namespace is usable at every instant: it opens with its key whether this command ended, was interrupted or was
//! killed, and both halves decrypt. What is left is done by `--resume`, or by `serve` while it serves.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::control::{Action, Answer, RekeyRequest};
use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::format::CipherArg;
use super::info::slot_line;
use super::open;
use super::output::outln;
use super::place::PlaceArgs;
use super::progress::Progress;
use super::size::ByteSize;
use crate::namespace::{
    Cipher, Credential, DataUnit, Geometry, Namespace, OtherSlots, Placement, RekeyOptions, TransformError,
};
use crate::pmem::Access;
use crate::volume::{Volume, WINDOW_BYTES};
use crate::xts::Backend;

/// How much `--dry-run` decrypts to see how fast that is.
const TRIAL_BYTES: u64 = 64 << 20;

/// How often a server is asked how far it is.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

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
    #[arg(long, value_name = "SOCKET", conflicts_with = "dry_run")]
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
}

/// How fast a long command goes, and how it tells.
#[derive(Args, Debug)]
pub(crate) struct PaceArgs {
    /// Bytes a second at most, such as 100M
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_rate: Option<ByteSize>,
    /// Progress as JSON, one object a line
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &RekeyArgs) -> Result<(), Error> {
    if let Some(socket) = &args.control {
        return online(args, socket);
    }
    if args.status {
        return status(args);
    }
    let access = if args.dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let (mut namespace, credential) = open::namespace_and_credential(&args.place, access, &args.key)?;
    let stop = catch_signals()?; // not before the prompt, which a signal may end
    if args.pause {
        namespace.set_transform_paused(true).map_err(|source| args.failed(source))?;
        outln!("{}: paused; `daxcrypt rekey --resume` goes on", args.place.path.display())?;
        return Ok(());
    }
    match (args.resume, namespace.pending_transform().is_some()) {
        (true, false) => return Err(args.failed(TransformError::NotUnderWay)),
        (false, true) => return Err(args.failed(TransformError::UnderWay)),
        (true, true) => namespace.set_transform_paused(false).map_err(|source| args.failed(source))?,
        (false, false) => {
            let options = args.options(&namespace)?;
            if args.dry_run {
                return dry_run(args, namespace, &options);
            }
            begin(args, &mut namespace, &credential, &options)?;
        }
    }
    drop(credential);
    let volume = Volume::new(namespace, Backend::from_env()?);
    let progress = finish(&volume, &args.pace, &stop).map_err(|error| error.at(&args.place.path))?;
    if !args.pace.json {
        outln!("{}: every byte is under the new volume key ({}/s)", args.place.path.display(), ByteSize(progress))?;
    }
    Ok(())
}

/// Why the data did not all move.
pub(crate) enum Stopped {
    Failed(TransformError),
    Interrupted { done_bytes: u64, total_bytes: u64 },
}

impl Stopped {
    pub(crate) fn at(self, path: &Path) -> Error {
        match self {
            Self::Failed(source) => Error::Rekey { path: path.into(), source: source.into() },
            Self::Interrupted { done_bytes, total_bytes } => {
                Error::RekeyStopped { path: path.into(), done: ByteSize(done_bytes), total: ByteSize(total_bytes) }
            }
        }
    }
}

/// Moves the data until the end, or until `stop`; the rate in bytes a second.
pub(crate) fn finish(volume: &Volume, pace: &PaceArgs, stop: &AtomicBool) -> Result<u64, Stopped> {
    let Some(first) = volume.transform() else { return Ok(0) };
    let mut progress = Progress::new(first.done_bytes, first.total_bytes, pace.json, pace.max_rate);
    let mut done_bytes = first.done_bytes;
    loop {
        if stop.load(Ordering::Relaxed) {
            progress.end("stopped", done_bytes);
            return Err(Stopped::Interrupted { done_bytes, total_bytes: first.total_bytes });
        }
        if progress.must_wait(done_bytes) {
            progress.reach(done_bytes);
            continue;
        }
        match volume.transform_step(WINDOW_BYTES).map_err(Stopped::Failed)? {
            Some(reached) => {
                done_bytes = reached.done_bytes;
                progress.reach(done_bytes);
            }
            None => {
                progress.end("done", first.total_bytes);
                return Ok(progress.rate(first.total_bytes));
            }
        }
    }
}

/// Asks the server to do it, and follows the progress of what it began.
fn online(args: &RekeyArgs, socket: &Path) -> Result<(), Error> {
    let failed = |source| Error::Control { path: socket.into(), source };
    let locked = args.place.locked(args.place.peek()?)?;
    let rekey = match (args.status, args.pause, args.resume) {
        (true, ..) => Action::Status,
        (_, true, _) => Action::Pause,
        (.., true) => Action::Resume,
        _ => Action::Begin,
    };
    let credential = match rekey {
        Action::Begin => Some(args.key.read(Prompt::Once, &args.place.path.display().to_string())?),
        _ => None,
    };
    let mut request = RekeyRequest {
        rekey,
        uuid: locked.header().uuid,
        key_bits: args.cipher.map(Cipher::from),
        unit_bytes: args.unit(),
        keep_slots: (args.keep_slots || args.drop_slots).then_some(args.keep_slots),
        max_rate: args.pace.max_rate.map(|rate| rate.0),
        passphrase: matches!(credential, Some(Credential::Passphrase(_))),
    };
    drop(locked);
    let state = request.ask(socket, credential.as_ref()).map_err(failed)?.state(args)?;
    drop(credential);
    match (rekey, state) {
        (Action::Begin | Action::Resume, Some((done_bytes, total_bytes))) => {
            request.rekey = Action::Status;
            follow(args, socket, &request, done_bytes, total_bytes)
        }
        (_, None) => {
            outln!("{}: no re-key is under way", args.place.path.display())?;
            Ok(())
        }
        (_, Some((done_bytes, total_bytes))) => {
            outln!("{}: {} of {} done", args.place.path.display(), ByteSize(done_bytes), ByteSize(total_bytes))?;
            Ok(())
        }
    }
}

/// Shows what the server does until it has done it, or until a signal: then the server goes on alone.
fn follow(
    args: &RekeyArgs,
    socket: &Path,
    request: &RekeyRequest,
    mut done_bytes: u64,
    total_bytes: u64,
) -> Result<(), Error> {
    let stop = catch_signals()?;
    let mut progress = Progress::new(done_bytes, total_bytes, args.pace.json, None);
    while !stop.load(Ordering::Relaxed) {
        let answer = request.ask(socket, None);
        match answer.map_err(|source| Error::Control { path: socket.into(), source })?.state(args)? {
            Some((reached, _)) => done_bytes = reached,
            None => {
                progress.end("done", total_bytes);
                if !args.pace.json {
                    outln!("{}: every byte is under the new volume key", args.place.path.display())?;
                }
                return Ok(());
            }
        }
        progress.reach(done_bytes);
        std::thread::sleep(FOLLOW_INTERVAL);
    }
    progress.end("left", done_bytes);
    eprintln!("daxcrypt: {}: the server goes on with it", args.place.path.display());
    Ok(())
}

impl Answer {
    fn state(self, args: &RekeyArgs) -> Result<Option<(u64, u64)>, Error> {
        match self {
            Self::State { progress, .. } => Ok(progress),
            Self::OtherSlots(slots) => Err(Error::OtherSlots { slots }),
            Self::WrongCredential => Err(args.failed(TransformError::Credential)),
            Self::Refused(reason) => Err(Error::Refused { reason }),
            Self::Resized { .. } => Err(Error::unexpected_answer()),
        }
    }
}

/// What SIGINT and SIGTERM set from now on.
pub(crate) fn catch_signals() -> Result<Arc<AtomicBool>, Error> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(|source| Error::Io { doing: "cannot catch SIGINT and SIGTERM", source })?;
    }
    Ok(stop)
}

fn begin(
    args: &RekeyArgs,
    namespace: &mut Namespace,
    credential: &Credential,
    options: &RekeyOptions,
) -> Result<(), Error> {
    let others = other_slots(namespace);
    if !others.is_empty() && !args.keep_slots && !args.drop_slots {
        return Err(Error::OtherSlots { slots: others.join("; ") });
    }
    namespace.begin_rekey(credential, options).map_err(|source| args.failed(source))?;
    if !args.pace.json {
        if let Some(slot) = namespace.slot_id() {
            outln!("key slot {slot} is new and opens with the key given here")?;
        }
        let what = if args.keep_slots { "kept" } else { "dropped" };
        for slot in others.iter() {
            outln!("{what}: key slot {slot}")?;
        }
    }
    Ok(())
}

/// The slots that the key given here does not open, each as a line.
pub(crate) fn other_slots(namespace: &Namespace) -> Vec<String> {
    namespace.other_slots().iter().map(|slot| format!("{}, {}", slot.id, slot_line(slot))).collect()
}

fn dry_run(args: &RekeyArgs, namespace: Namespace, options: &RekeyOptions) -> Result<(), Error> {
    let unit = options.unit.unwrap_or_else(|| namespace.geometry().unit());
    let placement = Placement { unit, ..namespace.geometry().placement() };
    Geometry::new(&placement, u64::MAX).map_err(|source| args.failed(source.into()))?;
    let others = other_slots(&namespace);
    let volume = Volume::new(namespace, Backend::from_env()?);
    let rate = decryption_rate(&volume).map_err(|source| Error::Volume { path: args.place.path.clone(), source })?;
    outln!("{}: {} ({} bytes) to re-key", args.place.path.display(), ByteSize(volume.size()), volume.size())?;
    for slot in others.iter() {
        outln!("besides the key given here, these slots open it: {slot}")?;
    }
    let limit = args.pace.max_rate.map_or(u64::MAX, |rate| rate.0.max(1));
    let seconds = volume.size().div_ceil(rate.min(limit).max(1));
    outln!(
        "at least {seconds} s: it reads and decrypts {}/s here; encryption, and writing everything twice, come on top",
        ByteSize(rate)
    )?;
    Ok(())
}

/// Bytes a second, from the beginning of the volume.
fn decryption_rate(volume: &Volume) -> Result<u64, crate::volume::VolumeError> {
    let mut buffer = zeroize::Zeroizing::new(vec![0; 1 << 20]);
    let (started, mut offset) = (Instant::now(), 0);
    while offset < volume.size().min(TRIAL_BYTES) && started.elapsed() < Duration::from_secs(2) {
        let len = usize::try_from(volume.size() - offset).unwrap_or(usize::MAX).min(buffer.len());
        volume.read_at(&mut buffer[..len], offset)?;
        offset += len as u64;
    }
    let nanoseconds = started.elapsed().as_nanos().max(1);
    Ok(u64::try_from(u128::from(offset) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX))
}

fn status(args: &RekeyArgs) -> Result<(), Error> {
    let path = args.place.path.display();
    let locked = args.place.locked(args.place.peek()?)?;
    if !locked.header().rekeying {
        outln!("{path}: no re-key is under way")?;
        return Ok(());
    }
    if args.key.key_file.is_none() && args.key.passphrase_file.is_none() {
        outln!("{path}: a re-key is under way; with its key --status says how far it has come")?;
        return Ok(());
    }
    let credential = args.key.read(Prompt::Once, &path.to_string())?;
    let namespace =
        locked.unlock_key(&credential).map_err(|source| Error::Unlock { path: args.place.path.clone(), source })?;
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
    fn failed(&self, source: TransformError) -> Error {
        Error::Rekey { path: self.place.path.clone(), source: source.into() }
    }

    fn unit(&self) -> Option<DataUnit> {
        self.unit.as_deref().map(|unit| if unit == "512" { DataUnit::Bytes512 } else { DataUnit::Bytes4096 })
    }

    fn options(&self, namespace: &Namespace) -> Result<RekeyOptions, Error> {
        if namespace.header().ephemeral {
            return Err(self.failed(TransformError::Ephemeral));
        }
        let unit =
            self.unit.as_deref().map(|unit| if unit == "512" { DataUnit::Bytes512 } else { DataUnit::Bytes4096 });
        let other_slots = if self.keep_slots { OtherSlots::Keep } else { OtherSlots::Drop };
        Ok(RekeyOptions { cipher: self.cipher.map(Cipher::from), unit, other_slots })
    }
}

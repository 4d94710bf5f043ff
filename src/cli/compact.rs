//! `daxcrypt region compact`: the namespaces of a region move together towards its start, one after the other.
//!
//! A namespace whose key is not at hand stays where it is, and is named.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::Args;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::output::outln;
use super::pace::{PaceArgs, catch_signals, policy};
use super::place;
use super::progress::Progress;
use super::rekey::{self, VOID};
use super::secrets;
use super::size::ByteSize;
use crate::namespace::Credential;
use crate::ops::compact::{Compaction, Outcome, Planned};
use crate::ops::{self, Location, Operation, Run};
use crate::pmem::OpenError;
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct CompactArgs {
    /// File or device with a region; REGION#NAME moves that namespace only
    path: PathBuf,
    /// Key file of the namespace NAME; for several, say it again. The other key options are for all the rest
    #[arg(long = "key", value_name = "NAME=FILE", help_heading = "Key", value_parser = named_key)]
    keys: Vec<(String, PathBuf)>,
    #[command(flatten)]
    key: KeyArgs,
    /// Keep the other key slots: they open the new volume key as they opened the old one
    #[arg(long, conflicts_with = "drop_slots")]
    keep_slots: bool,
    /// Drop the other key slots: only the key given here opens a namespace at its new place
    #[arg(long)]
    drop_slots: bool,
    /// Only say what would move where, and how many blocks a sparse file will need; needs no key
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    pace: PaceArgs,
}

fn named_key(text: &str) -> Result<(String, PathBuf), &'static str> {
    // A name may contain the sign, a path rarely does.
    let (name, file) = text.rsplit_once('=').ok_or("say NAME=FILE")?;
    Ok((name.to_owned(), file.into()))
}

pub(crate) fn run(args: &CompactArgs) -> Result<(), Error> {
    let location = Location::new(&args.path, None);
    let (path, only) = location.region().map_or((&*args.path, None), |(path, name)| (path, Some(name)));
    place::warn_of_table(path, &ops::peek_table(Operation::Compact, path)?);
    let compaction = Compaction::new(path, policy(args.keep_slots, args.drop_slots), Backend::from_env()?);
    let names = compaction.names(only)?;
    if args.dry_run {
        return dry_run(args, path, &compaction, &names);
    }
    let keys = Keys::read(args, path, &names)?;
    let (report, stop) = (Report { args, path }, catch_signals()?);
    let (mut opened, mut moved, mut no_key, mut first_refusal) = (0, 0, None, None);
    for name in &names {
        let mut progress = Progress::new(args.pace.json);
        let mut run = Run::new(&mut progress, &stop, args.pace.bytes_per_second());
        match compaction.one(name, keys.of(name), &mut run).map_err(Error::from) {
            Ok(outcome) => {
                opened += 1;
                moved += u32::from(matches!(outcome, Outcome::Moved { .. }));
                report.done(name, &outcome)?;
            }
            Err(error) if only.is_none() && stays(&error) => {
                report.left(name, &error.chain())?;
                // A key for all that is not that of this one is like none.
                let no_key_of_its_own = matches!(error, Error::Unlock { .. }) && !keys.named.contains_key(name);
                if no_key_of_its_own || matches!(error, Error::NoKeyGiven { .. }) {
                    no_key = no_key.or(Some(error));
                } else {
                    first_refusal = first_refusal.or(Some(error));
                }
            }
            Err(error) => return Err(error),
        }
    }
    report.void(moved)?;
    report.free(&compaction.free()?)?;
    match first_refusal.or_else(|| no_key.filter(|_| opened == 0)) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn dry_run(args: &CompactArgs, path: &Path, compaction: &Compaction, names: &[String]) -> Result<(), Error> {
    let (planned, free_bytes) = (compaction.plan(names)?, compaction.free_bytes()?);
    for Planned { name, range, to, len_bytes, blocks_bytes } in &planned {
        let (from, shown) = (range.start, ByteSize(*len_bytes));
        if args.pace.json {
            let fields = serde_json::json!({ "event": "planned", "name": name, "from": from, "to": to,
                "len_bytes": len_bytes, "blocks_bytes": blocks_bytes, "free_bytes": free_bytes });
            outln!("{fields}")?;
        } else if from == *to {
            outln!("{}#{name}: stays at byte {from} with {shown}", path.display())?;
        } else {
            outln!("{}#{name}: would move from byte {from} to byte {to} with {shown}", path.display())?;
        }
    }
    let blocks_bytes = planned.iter().map(|planned| planned.blocks_bytes).sum();
    if args.pace.json { Ok(()) } else { rekey::say_blocks(blocks_bytes, free_bytes) }
}

/// Whether an error is about one namespace, which then stays, and not about the others.
const fn stays(error: &Error) -> bool {
    matches!(
        error,
        Error::Unlock { .. }
            | Error::Namespace { .. }
            | Error::OtherSlots { .. }
            | Error::NoKeyGiven { .. }
            | Error::Gate { .. }
            | Error::Open { source: OpenError::Busy, .. }
    )
}

/// The keys, all read before anything moves.
struct Keys {
    named: HashMap<String, Credential>,
    /// For those that have none of their own.
    shared: Option<Credential>,
}

impl Keys {
    fn read(args: &CompactArgs, path: &Path, names: &[String]) -> Result<Self, Error> {
        let mut named = HashMap::new();
        for (name, file) in &args.keys {
            if !names.contains(name) {
                let path = path.display();
                return Err(Error::Usage(format!("--key {name}=...: {path} has no such namespace to move")));
            }
            let key = secrets::key_file(secrets::KEY_FILE, file, secrets::key_file_bytes_min())?;
            named.insert(name.clone(), Credential::KeyFile(key));
        }
        let what = path.display().to_string();
        let shared = args.key.is_given().then(|| args.key.read(Prompt::Once, &what)).transpose()?;
        if shared.is_none() && named.is_empty() {
            for name in names {
                let key = args.key.read(Prompt::Once, &format!("{what}#{name}"))?;
                named.insert(name.clone(), key);
            }
        }
        Ok(Self { named, shared })
    }

    fn of(&self, name: &str) -> Option<&Credential> {
        self.named.get(name).or(self.shared.as_ref())
    }
}

/// What is said about a run over a region.
struct Report<'a> {
    args: &'a CompactArgs,
    path: &'a Path,
}

impl Report<'_> {
    fn done(&self, name: &str, outcome: &Outcome) -> Result<(), Error> {
        let path = self.path.display();
        match outcome {
            Outcome::InPlace if self.args.pace.json => {
                outln!("{}", serde_json::json!({ "event": "in_place", "name": name }))
            }
            Outcome::Moved { from, to, .. } if self.args.pace.json => {
                outln!("{}", serde_json::json!({ "event": "moved", "name": name, "from": from, "to": to }))
            }
            Outcome::InPlace => outln!("{path}#{name}: is where it should be"),
            Outcome::Moved { from, to, bytes_per_second } => {
                let rate = ByteSize(*bytes_per_second);
                outln!("{path}#{name}: moved from byte {from} to byte {to} under a new volume key ({rate}/s)")
            }
        }
    }

    fn left(&self, name: &str, reason: &str) -> Result<(), Error> {
        if self.args.pace.json {
            return outln!("{}", serde_json::json!({ "event": "left", "name": name, "reason": reason }));
        }
        outln!("{}#{name}: left where it is: {reason}", self.path.display())
    }

    fn void(&self, moved: u32) -> Result<(), Error> {
        if moved == 0 || self.args.pace.json { Ok(()) } else { outln!("of what was moved, {VOID}") }
    }

    fn free(&self, free: &[Range<u64>]) -> Result<(), Error> {
        if self.args.pace.json {
            return Ok(());
        }
        let sum = free.iter().map(|free| free.end - free.start).sum();
        let largest = free.iter().map(|free| free.end - free.start).max().unwrap_or(0);
        outln!("{}: {} are free, {} of them in one piece", self.path.display(), ByteSize(sum), ByteSize(largest))
    }
}

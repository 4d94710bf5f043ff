//! `daxcrypt region compact`: the namespaces of a region move together towards its start, one after the other.
//!
//! Each moves into the free space right before it, over its own old place if need be, under a new volume key; and its
//! partition becomes as long as it is. How that survives everything is written in `namespace::slide`. What is interrupted is
//! usable, and goes on when this is run again. A namespace whose key is not at hand stays where it is, and is named.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::output::outln;
use super::place::{self, PlaceArgs};
use super::rekey::{PaceArgs, catch_signals, finish, other_slots};
use super::secrets;
use super::size::ByteSize;
use crate::namespace::{
    Credential, HEADER_AREA_BYTES, LockedNamespace, Namespace, OtherSlots, REGION_ALIGNMENT_BYTES, RekeyOptions, Site,
    SlideError, begin_slide,
};
use crate::pmem::{Access, OpenError};
use crate::volume::Volume;
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
    #[command(flatten)]
    pace: PaceArgs,
}

fn named_key(text: &str) -> Result<(String, PathBuf), &'static str> {
    // A name may contain the sign, a path rarely does.
    let (name, file) = text.rsplit_once('=').ok_or("say NAME=FILE")?;
    Ok((name.to_owned(), file.into()))
}

/// What became of one namespace.
enum Outcome {
    /// There is nothing before it, and nothing unused behind it.
    InPlace,
    Moved {
        from: u64,
        to: u64,
        rate: u64,
    },
}

pub(crate) fn run(args: &CompactArgs) -> Result<(), Error> {
    let place = PlaceArgs { path: args.path.clone(), header: None };
    let (path, only) = place.in_region().map_or((&*args.path, None), |(path, name)| (path, Some(name)));
    let table = place::peek_table(path)?;
    if let Some(only) = only {
        table.find(only).map_err(|source| failed(path, source))?;
    }
    let mut partitions = table.partitions();
    partitions.retain(|partition| partition.is_ours && only.is_none_or(|only| only == partition.name));
    partitions.sort_by_key(|partition| partition.range.start);
    let names: Vec<String> = partitions.into_iter().map(|partition| partition.name).collect();
    let keys = Keys::read(args, path, &names)?;
    let compaction = Compaction { args, path, stop: &*catch_signals()? };
    let (mut opened, mut no_key, mut first_refusal) = (0, None, None);
    for name in &names {
        match compaction.one(name, keys.of(name)) {
            Ok(outcome) => {
                opened += 1;
                compaction.report(name, &outcome)?;
            }
            Err(error) if only.is_none() && stays(&error) => {
                compaction.report_left(name, &error.chain())?;
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
    compaction.report_free()?;
    match first_refusal.or_else(|| no_key.filter(|_| opened == 0)) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn failed(path: &Path, source: crate::namespace::RegionError) -> Error {
    Error::Region { path: path.into(), source }
}

/// Whether an error is about one namespace, which then stays, and not about the others.
const fn stays(error: &Error) -> bool {
    matches!(
        error,
        Error::Unlock { .. }
            | Error::Namespace { .. }
            | Error::OtherSlots { .. }
            | Error::NoKeyGiven { .. }
            | Error::RekeyPaused { .. }
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
            let key = secrets::key_file(file, secrets::key_file_bytes_min())?;
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

/// One run over a region.
struct Compaction<'a> {
    args: &'a CompactArgs,
    path: &'a Path,
    stop: &'a AtomicBool,
}

impl Compaction<'_> {
    fn one(&self, name: &str, credential: Option<&Credential>) -> Result<Outcome, Error> {
        let place = PlaceArgs::of_region(self.path, name);
        let table = place::peek_table(self.path)?;
        let range = table.find(name).map_err(|source| failed(self.path, source))?.range;
        let earliest = table.earliest_start(&range);
        // A partition that another program made may leave less than a header needs.
        let start = if range.start - earliest < HEADER_AREA_BYTES { range.start } else { earliest };
        if start == range.start && is_tight(&place, &range)? {
            return Ok(Outcome::InPlace);
        }
        let credential = credential.ok_or_else(|| Error::NoKeyGiven { path: place.path.clone() })?;
        let mut namespace = self.unlock(&place, start, &range, credential)?;
        if namespace.transform_paused() {
            return Err(Error::RekeyPaused { path: place.path });
        }
        let mut rate = 0;
        if namespace.pending_transform().is_some() {
            (namespace, rate) = self.finish(&place, namespace)?;
        }
        if start < range.start {
            namespace = self.begin(&place, name, namespace, start, credential)?;
            (namespace, rate) = self.finish(&place, namespace)?;
        }
        self.shrink(name, &namespace)?;
        if start == range.start {
            return Ok(Outcome::InPlace);
        }
        Ok(Outcome::Moved { from: range.start, to: start, rate })
    }

    /// Opens it with its new place locked too.
    fn unlock(
        &self,
        place: &PlaceArgs,
        start: u64,
        range: &Range<u64>,
        credential: &Credential,
    ) -> Result<Namespace, Error> {
        let backing = place::open_range(self.path, Access::ReadWrite, &(start..range.end))?;
        let locked = place.locked(Site::part(backing, range.start, range.end - range.start))?;
        let unlocked = locked.unlock_key(credential);
        unlocked.map_err(|source| Error::Unlock { path: place.path.clone(), source })
    }

    /// Nobody changes the table while the header is written into free space.
    fn begin(
        &self,
        place: &PlaceArgs,
        name: &str,
        namespace: Namespace,
        start: u64,
        credential: &Credential,
    ) -> Result<Namespace, Error> {
        let others = other_slots(&namespace);
        if !others.is_empty() && !self.args.keep_slots && !self.args.drop_slots {
            return Err(Error::OtherSlots { slots: others.join("; ") });
        }
        let other_slots = if self.args.keep_slots { OtherSlots::Keep } else { OtherSlots::Drop };
        let options = RekeyOptions { other_slots, ..RekeyOptions::default() };
        let mut table = place::open_table(self.path)?;
        begin_slide(&mut table, name, namespace, start, credential, &options).map_err(|error| match error {
            SlideError::Region(source) => failed(self.path, source),
            SlideError::Transform(source) => Error::Rekey { path: place.path.clone(), source: source.into() },
            source => Error::Slide { path: place.path.clone(), source: source.into() },
        })
    }

    /// Moves the data to the end; the rate in bytes a second.
    fn finish(&self, place: &PlaceArgs, namespace: Namespace) -> Result<(Namespace, u64), Error> {
        let volume = Volume::new(namespace, Backend::from_env()?);
        let rate = finish(&volume, &self.args.pace, self.stop).map_err(|error| error.at(&place.path))?;
        Ok((volume.into_namespace().expect("nobody has locked it"), rate))
    }

    /// Makes the partition, which is locked by the namespace, as long as that is.
    fn shrink(&self, name: &str, namespace: &Namespace) -> Result<(), Error> {
        let needed_bytes = needed_bytes(namespace.geometry());
        let mut table = place::open_table(self.path)?;
        let range = table.find(name).map_err(|source| failed(self.path, source))?.range;
        let site = namespace.site();
        if range.start != site.start() {
            let opened = site.start()..site.start() + site.available_bytes();
            let changed = SlideError::Changed { actual: range, opened };
            return Err(Error::Slide { path: self.path.into(), source: changed.into() });
        }
        if range.end - range.start > needed_bytes {
            table.resize(name, needed_bytes).map_err(|source| failed(self.path, source))?;
        }
        Ok(())
    }

    fn report(&self, name: &str, outcome: &Outcome) -> Result<(), Error> {
        let path = self.path.display();
        match outcome {
            Outcome::InPlace if self.args.pace.json => {
                outln!("{}", serde_json::json!({ "event": "in_place", "name": name }))
            }
            Outcome::Moved { from, to, .. } if self.args.pace.json => {
                outln!("{}", serde_json::json!({ "event": "moved", "name": name, "from": from, "to": to }))
            }
            Outcome::InPlace => outln!("{path}#{name}: is where it should be"),
            Outcome::Moved { from, to, rate } => {
                let rate = ByteSize(*rate);
                outln!("{path}#{name}: moved from byte {from} to byte {to} under a new volume key ({rate}/s)")
            }
        }
    }

    fn report_left(&self, name: &str, reason: &str) -> Result<(), Error> {
        if self.args.pace.json {
            return outln!("{}", serde_json::json!({ "event": "left", "name": name, "reason": reason }));
        }
        outln!("{}#{name}: left where it is: {reason}", self.path.display())
    }

    fn report_free(&self) -> Result<(), Error> {
        if self.args.pace.json {
            return Ok(());
        }
        let free = place::peek_table(self.path)?.free();
        let sum = free.iter().map(|free| free.end - free.start).sum();
        let largest = free.iter().map(|free| free.end - free.start).max().unwrap_or(0);
        outln!("{}: {} are free, {} of them in one piece", self.path.display(), ByteSize(sum), ByteSize(largest))
    }
}

/// Bytes of a partition that holds just this.
const fn needed_bytes(geometry: &crate::namespace::Geometry) -> u64 {
    (geometry.data_offset() + geometry.size_bytes()).next_multiple_of(REGION_ALIGNMENT_BYTES)
}

/// Whether the namespace fills its partition and nothing is under way, as its header says without a key.
fn is_tight(place: &PlaceArgs, range: &Range<u64>) -> Result<bool, Error> {
    let site = place.peek()?;
    let locked = LockedNamespace::open_in(Site::part(Arc::clone(site.data()), range.start, range.end - range.start));
    let locked = locked.map_err(|source| Error::Namespace { path: place.path.clone(), source })?;
    Ok(!locked.header().rekeying && range.end - range.start <= needed_bytes(locked.geometry()))
}

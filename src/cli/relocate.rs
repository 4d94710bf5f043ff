//! `daxcrypt relocate`: a namespace to another place, always under a new volume key, since its tweaks are its place.

use std::path::PathBuf;

use clap::Args;

use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::open;
use super::output::outln;
use super::pace::{PaceArgs, catch_signals, policy};
use super::place::{self, PlaceArgs};
use super::progress::Progress;
use super::rekey::VOID;
use super::size::ByteSize;
use crate::ops::relocate::{self, Adoption, Fate, Options};
use crate::ops::{Location, Run};
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct RelocateArgs {
    /// File or device with a namespace; REGION#NAME is the namespace NAME in a region
    source: PathBuf,
    /// Where it is to be: a file that does not exist, a file or device that is large enough, or REGION#NAME
    #[arg(required_unless_present = "in_place", conflicts_with = "in_place")]
    destination: Option<PathBuf>,
    /// Adopt a namespace that was moved as ciphertext (by dd, a partition editor, to another device) where it lies
    #[arg(long)]
    in_place: bool,
    /// File that holds the header of the source, when that is detached
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// With --header, take the data for that of the header although its tag is not there, or it never had one
    #[arg(long, requires = "header")]
    accept_data: bool,
    /// File for the header of the destination, which is then detached
    #[arg(long, value_name = "FILE", conflicts_with = "in_place")]
    destination_header: Option<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
    /// Copy: do not erase the key slots and the header of the source at the end
    #[arg(long, conflicts_with = "in_place")]
    keep_source: bool,
    /// Keep the other key slots: they open the namespace at its new place as they opened it at the old one
    #[arg(long, conflicts_with = "drop_slots")]
    keep_slots: bool,
    /// Do without the other key slots: only the key given here opens the namespace at its new place
    #[arg(long)]
    drop_slots: bool,
    /// Leave holes where the source has them, instead of allocating all blocks
    #[arg(long, conflicts_with = "in_place")]
    sparse: bool,
    /// Overwrite whatever is at the destination
    #[arg(long, conflicts_with = "in_place")]
    force: bool,
    #[command(flatten)]
    pace: PaceArgs,
}

pub(crate) fn run(args: &RelocateArgs) -> Result<(), Error> {
    let (path, accept_data) = (args.source.clone(), args.accept_data);
    let source = PlaceArgs { path, header: args.header.clone(), accept_data };
    match &args.destination {
        Some(path) => {
            let (path, header) = (path.clone(), args.destination_header.clone());
            relocate(args, &source, &PlaceArgs { path, header, accept_data: false })
        }
        None => adopt(args, &source.location()),
    }
}

/// To another place.
fn relocate(args: &RelocateArgs, from: &PlaceArgs, to: &PlaceArgs) -> Result<(), Error> {
    if from.path == to.path {
        let path = from.path.display();
        return Err(Error::Usage(format!("{path} is there already: `daxcrypt rekey` gives it a new volume key")));
    }
    let slots = policy(args.keep_slots, args.drop_slots);
    let options = Options { keep_source: args.keep_source, slots, sparse: args.sparse, force: args.force };
    let backend = Backend::from_env()?;
    let (source, credential) = open::namespace_and_credential(from, options.operation(), &args.key)?;
    let (mut progress, stop) = (Progress::new(args.pace.json), catch_signals()?);
    let mut run = Run::new(&mut progress, &stop, args.pace.bytes_per_second());
    let (from, to) = (from.location(), to.location());
    let done = relocate::relocate(source, &from, &to, &credential, options, backend, &mut run)?;
    if !args.pace.json {
        let (from, rate) = (from.path().display(), ByteSize(done.moved.bytes_per_second));
        let (bytes, fate) = (ByteSize(done.moved.bytes), fate(done.fate));
        outln!("{}: {bytes} moved from {from} ({rate}/s) and verified; {fate}", to.path().display())?;
        match done.fate {
            Fate::Erased => outln!("Nothing is left in {from} that a key opens: a file may be deleted. {VOID}")?,
            Fate::Removed => outln!("{VOID}")?,
            Fate::Kept => {}
        }
    }
    Ok(())
}

const fn fate(fate: Fate) -> &'static str {
    match fate {
        Fate::Kept => "the source stays as it is",
        Fate::Erased => "the source is erased",
        Fate::Removed => "the source is erased and its partition removed",
    }
}

/// Where it lies.
fn adopt(args: &RelocateArgs, location: &Location) -> Result<(), Error> {
    let adoption = Adoption::find(location)?;
    place::warn(location, adoption.site());
    let slots = policy(args.keep_slots, args.drop_slots);
    adoption.check(slots)?;
    let path = location.path().display();
    let credential = args.key.read(Prompt::Once, &path.to_string())?;
    let (mut progress, stop) = (Progress::new(args.pace.json), catch_signals()?);
    let mut run = Run::new(&mut progress, &stop, args.pace.bytes_per_second());
    let adopted = adoption.adopt(&credential, slots, Backend::from_env()?, &mut run)?;
    if !args.pace.json {
        let (old_base, base, rate) = (adopted.old_base, adopted.base, ByteSize(adopted.moved.bytes_per_second));
        outln!("{path}: written for byte {old_base}, now at home at byte {base} under a new volume key ({rate}/s)")?;
        outln!("{VOID}")?;
    }
    Ok(())
}

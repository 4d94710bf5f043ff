//! `daxcrypt erase`: destroy the key slots and both header copies, so that the data area is noise for everybody.

use clap::Args;

use super::error::Error;
use super::output::{outln, warning};
use super::place::{self, PlaceArgs};
use super::progress::{Progress, ProgressArgs};
use super::secrets;
use crate::namespace::{Chain, Header};
use crate::ops::erase::Doomed;
use crate::ops::{Ended, Watch};

#[derive(Args, Debug)]
pub(crate) struct EraseArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Also overwrite the data area with zeros
    #[arg(long)]
    wipe_data: bool,
    /// Erase even if nothing there looks like a header
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    progress: ProgressArgs,
}

pub(crate) fn run(args: &EraseArgs) -> Result<(), Error> {
    let location = args.place.location();
    let doomed = Doomed::find(&location, args.force)?;
    place::warn(&location, doomed.site());
    if let Err(fault) = doomed.header() {
        warning!("{}: {}", location.header_path().display(), Chain(fault));
    }
    if args.wipe_data && doomed.data_is_elsewhere() {
        let header = location.header_path().display();
        let what = format!(
            "{header} is a detached header, and its data is not there: `daxcrypt erase DATA --header {header} --wipe-data` overwrites it"
        );
        return Err(Error::Usage(what));
    }
    if !args.yes {
        confirm(&args.place, doomed.header().ok())?;
    }
    let slots = doomed.header().ok().map(|header| header.slots.len());
    let data = doomed.erase()?;
    let path = location.header_path().display();
    match slots {
        Some(slots) => outln!("{path}: erased {slots} key slots and both header copies")?,
        None => outln!("{path}: erased the header area")?,
    }
    if args.wipe_data {
        let data_bytes = data.end - data.start;
        let mut progress = Progress::new(args.progress.json);
        progress.begin(0, data_bytes);
        doomed.overwrite(data, |done_bytes| progress.reach(done_bytes))?;
        progress.end(Ended::Done, data_bytes);
        outln!("{}: overwrote the data area", args.place.path.display())?;
    }
    outln!("Backups of the header, and snapshots or copies of the file, still open with their keys: destroy them too.")
}

/// Asks for the label, or for the uuid of a namespace without one, or for the path where no header can be read.
pub(crate) fn confirm(place: &PlaceArgs, header: Option<&Header>) -> Result<(), Error> {
    let path = place.path.display().to_string();
    let (what, expected) = match header {
        None => ("path", path.clone()),
        Some(header) if header.label.is_empty() => ("uuid", header.uuid.to_string()),
        Some(header) => ("label", header.label.clone()),
    };
    let typed =
        secrets::ask_line(&format!("All data in {path} will be lost. To go on, type its {what} ({expected}): "))?;
    if typed == expected { Ok(()) } else { Err(Error::NotConfirmed { what }) }
}

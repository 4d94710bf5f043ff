//! `daxcrypt erase`: destroy the key slots and both header copies, so that the data area is noise for everybody.
//!
//! No key is needed: whoever may write the file may destroy it anyway. A header that cannot be read is destroyed as well:
//! what is damaged for us may be enough for somebody else. The header goes first, because it is small and all depends on
//! it; overwriting the data area is for those who do not trust that.

use std::ops::Range;

use clap::Args;

use super::error::Error;
use super::output::{outln, warning};
use super::place::PlaceArgs;
use super::progress::{Progress, ProgressArgs};
use super::secrets;
use crate::namespace::{self, HEADER_AREA_BYTES, Header, LockedNamespace, OpenError, Site};
use crate::pmem::Access;

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
    let site = args.place.open(Access::ReadWrite)?;
    let locked = match LockedNamespace::open_in(site.clone()) {
        Ok(locked) => Some(locked),
        Err(source @ (OpenError::NotANamespace { .. } | OpenError::TooSmall { .. })) if !args.force => {
            return Err(Error::Namespace { path: args.place.header_path().clone(), source });
        }
        Err(source) => {
            let error = Error::Namespace { path: args.place.header_path().clone(), source };
            warning!("{}", error.chain());
            None
        }
    };
    if !args.yes {
        confirm(&args.place, locked.as_ref().map(LockedNamespace::header))?;
    }
    let slots = locked.as_ref().map(|locked| locked.header().slots.len());
    let data = data_range(&site, locked.as_ref());
    namespace::erase(&site).map_err(|source| Error::Erase { path: args.place.header_path().clone(), source })?;
    let path = args.place.header_path().display();
    match slots {
        Some(slots) => outln!("{path}: erased {slots} key slots and both header copies")?,
        None => outln!("{path}: erased the header area")?,
    }
    if args.wipe_data {
        let data_bytes = data.end - data.start;
        let mut progress = Progress::new(0, data_bytes, args.progress.json, None);
        namespace::overwrite_with_zeros(site.data(), data, |done_bytes| progress.reach(done_bytes))
            .map_err(|source| Error::Media { path: args.place.path.clone(), source })?;
        progress.end("done", data_bytes);
        outln!("{}: overwrote the data area", args.place.path.display())?;
    }
    outln!("Backups of the header, and snapshots or copies of the file, still open with their keys: destroy them too.")
}

/// Where the data is; of a header that cannot be read, everything that may be data.
fn data_range(site: &Site, locked: Option<&LockedNamespace>) -> Range<u64> {
    if let Some(locked) = locked {
        let start = locked.geometry().data_start();
        return start..start + locked.geometry().size_bytes();
    }
    let end = site.start() + site.available_bytes();
    let start = if site.is_detached() { site.start() } else { site.start().saturating_add(HEADER_AREA_BYTES) };
    start.min(end)..end
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

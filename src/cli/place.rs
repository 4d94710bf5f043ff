//! Where a namespace is: the path of every command, and the file of a detached header.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::error::Error;
use super::open::copy_warnings;
use super::output::warning;
use crate::namespace::{Region, Site};
use crate::ops::{Found, Location, Operation};

/// The options that say where a namespace is.
#[derive(Args, Clone, Debug)]
pub(crate) struct PlaceArgs {
    /// File or device with a namespace; REGION#NAME is the namespace NAME in a region
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,
    /// File that holds the header, for a namespace whose header is detached
    #[arg(long, value_name = "FILE")]
    pub(crate) header: Option<PathBuf>,
    /// With --header, take the data for that of the header although its tag is not there, or it never had one, and write the
    /// tag behind the data; what is in that page is lost
    #[arg(long, requires = "header")]
    pub(crate) accept_data: bool,
}

impl PlaceArgs {
    /// What they name.
    pub(crate) fn location(&self) -> Location {
        Location::new(&self.path, self.header.clone()).accepting_data(self.accept_data)
    }

    /// Finds the namespace there for who only looks at it.
    pub(crate) fn look(&self, operation: Operation) -> Result<Found, Error> {
        let location = self.location();
        let found = location.find(operation)?;
        warn_of_region(&location, found.site());
        Ok(found)
    }

    /// Opens it without a look at what is there, and says what is worth knowing about the place.
    pub(crate) fn open(&self, operation: Operation) -> Result<Site, Error> {
        let location = self.location();
        let site = location.open(operation)?;
        warn(&location, &site);
        Ok(site)
    }
}

/// Says when a granularity was forced, and when a copy of the region's table is damaged.
pub(crate) fn warn(location: &Location, site: &Site) {
    let data = site.data();
    if data.granularity_forced().is_some() {
        warning!("{}: {}", location.path().display(), data.granularity_reason());
    }
    warn_of_region(location, site);
}

/// Says when a copy of the table of the region is damaged that the namespace lies in.
fn warn_of_region(location: &Location, site: &Site) {
    if let Some((path, _)) = location.region()
        && let Ok(region) = Region::open(Arc::clone(site.data()))
    {
        warn_of_table(path, &region);
    }
}

/// Says when a copy of the table of the region at `path` is damaged.
pub(crate) fn warn_of_table(path: &Path, region: &Region) {
    for warning in copy_warnings(["the primary partition table", "the backup partition table"], &region.copies()) {
        warning!("{}: {warning}", path.display());
    }
}

//! Where a namespace is: the path of every command, and the file of a detached header.
//!
//! `REGION#NAME` is the namespace NAME of a region, unless a file has just that path. Only its partition is locked, so that
//! the namespaces of a region are served apart; the table is read again when the lock is there, because it may have been
//! changed in between.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::error::Error;
use super::open::copy_warnings;
use super::output::warning;
use crate::namespace::{LockedNamespace, REGION_ALIGNMENT_BYTES, Region, Site};
use crate::pmem::{Access, Backing, OpenError, OpenOptions};

/// The options that say where a namespace is.
#[derive(Args, Clone, Debug)]
pub(crate) struct PlaceArgs {
    /// File or device with a namespace; REGION#NAME is the namespace NAME in a region
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,
    /// File that holds the header, for a namespace whose header is detached
    #[arg(long, value_name = "FILE")]
    pub(crate) header: Option<PathBuf>,
}

impl PlaceArgs {
    /// The namespace `name` of the region at `path`.
    pub(crate) fn of_region(path: &Path, name: &str) -> Self {
        let mut path = path.as_os_str().to_owned();
        path.push("#");
        path.push(name);
        Self { path: path.into(), header: None }
    }

    /// Opens and locks it, and says so when its granularity was forced.
    pub(crate) fn open(&self, access: Access) -> Result<Site, Error> {
        let site = match self.in_region() {
            None => Site::whole(open(&self.path, &OpenOptions::new(access))?),
            Some((path, name)) => open_in_region(path, name, access)?,
        };
        let header = self.header.as_ref().map(|path| open(path, &OpenOptions::new(access))).transpose()?;
        let data = site.data();
        if data.granularity_forced().is_some() {
            warning!("{}: {}", self.path.display(), data.granularity_reason());
        }
        Ok(site.with_header(header))
    }

    /// Opens it for reading without a lock, so that it can be looked at while it is served.
    pub(crate) fn peek(&self) -> Result<Site, Error> {
        let site = match self.in_region() {
            None => Site::whole(open(&self.path, &without_lock())?),
            Some((path, name)) => {
                let backing = open(path, &without_lock())?;
                let range = find(path, &backing, name)?;
                Site::part(backing, range.start, range.end - range.start)
            }
        };
        let header = self.header.as_ref().map(|path| open(path, &without_lock())).transpose()?;
        Ok(site.with_header(header))
    }

    /// The region and the name in it, when the path is of that form.
    pub(crate) fn in_region(&self) -> Option<(&Path, &str)> {
        if self.path.exists() {
            return None;
        }
        self.region_and_name().filter(|(region, name)| !name.is_empty() && region.exists())
    }

    /// The two parts of a path of that form, whatever exists.
    pub(crate) fn region_and_name(&self) -> Option<(&Path, &str)> {
        let (region, name) = self.path.to_str()?.rsplit_once('#')?;
        Some((Path::new(region), name))
    }

    /// The file or device where the header is.
    pub(crate) fn header_path(&self) -> &PathBuf {
        self.header.as_ref().unwrap_or(&self.path)
    }

    /// The namespace at `site`, which this place was opened as; its header is checked.
    pub(crate) fn locked(&self, site: Site) -> Result<LockedNamespace, Error> {
        LockedNamespace::open_in(site).map_err(|source| Error::Namespace { path: self.header_path().clone(), source })
    }
}

/// Opens the region at `path` for a change of its table, which nobody else can change meanwhile.
pub(crate) fn open_table(path: &Path) -> Result<Region, Error> {
    let options = OpenOptions::new(Access::ReadWrite).lock_range(0..REGION_ALIGNMENT_BYTES);
    region(path, open(path, &options)?)
}

/// The table of the region at `path`, without a lock.
pub(crate) fn peek_table(path: &Path) -> Result<Region, Error> {
    region(path, open(path, &without_lock())?)
}

/// Opens the region at `path` with a lock on `range` only.
pub(crate) fn open_range(path: &Path, access: Access, range: &Range<u64>) -> Result<Arc<Backing>, Error> {
    open(path, &OpenOptions::new(access).lock_range(range.clone()))
}

fn open_in_region(path: &Path, name: &str, access: Access) -> Result<Site, Error> {
    let range = find(path, &open(path, &without_lock())?, name)?;
    let backing = open_range(path, access, &range)?;
    let region = Region::open(Arc::clone(&backing)).map_err(|source| Error::Region { path: path.into(), source })?;
    let found = region.find(name).map_err(|source| Error::Region { path: path.into(), source })?;
    if found.range != range {
        return Err(Error::Open { path: path.into(), source: OpenError::Busy });
    }
    Ok(Site::part(backing, range.start, range.end - range.start))
}

fn find(path: &Path, backing: &Arc<Backing>, name: &str) -> Result<Range<u64>, Error> {
    let region = region(path, Arc::clone(backing))?;
    Ok(region.find(name).map_err(|source| Error::Region { path: path.into(), source })?.range)
}

fn region(path: &Path, backing: Arc<Backing>) -> Result<Region, Error> {
    let region = Region::open(backing).map_err(|source| Error::Region { path: path.into(), source })?;
    for warning in copy_warnings(["the primary partition table", "the backup partition table"], &region.copies()) {
        warning!("{}: {warning}", path.display());
    }
    Ok(region)
}

fn without_lock() -> OpenOptions {
    OpenOptions::new(Access::ReadOnly).lock_range(0..0)
}

fn open(path: &Path, options: &OpenOptions) -> Result<Arc<Backing>, Error> {
    options.open(path).map(Arc::new).map_err(|source| Error::Open { path: path.into(), source })
}

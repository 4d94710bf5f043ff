//! Where a namespace is: a file or device, or a partition of a region, and the file of a detached header.
//!
//! `REGION#NAME` is the namespace NAME of a region, unless a file has just that path; which of both is found out once. Only
//! the partition is locked, so that the namespaces of a region are used apart; the table is read again when the lock is
//! there, because it may have been changed in between.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Cause, Error};
use super::gate::{Operation, Reach};
use crate::namespace::{LockedNamespace, REGION_ALIGNMENT_BYTES, Region, Site};
use crate::pmem::{Access, Backing, OpenError, OpenOptions};

/// Where a namespace is, or is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    path: PathBuf,
    /// The region and the name in it.
    region: Option<(PathBuf, String)>,
    header: Option<PathBuf>,
    accepts_data: bool,
}

impl Location {
    /// What `path` names, with the header in the file `header` if that is detached.
    #[must_use]
    pub fn new(path: &Path, header: Option<PathBuf>) -> Self {
        let region = if path.exists() { None } else { region_and_name(path) };
        Self { path: path.into(), region, header, accepts_data: false }
    }

    /// The namespace `name` of the region at `region`.
    #[must_use]
    pub fn of_region(region: &Path, name: &str) -> Self {
        let mut path = region.as_os_str().to_owned();
        path.push("#");
        path.push(name);
        Self { path: path.into(), region: Some((region.into(), name.into())), header: None, accepts_data: false }
    }

    /// The same where the user vouches for the data of a detached header: see [`Site::accepting_data`].
    #[must_use]
    pub fn accepting_data(self, accepts_data: bool) -> Self {
        Self { accepts_data, ..self }
    }

    /// As it was named.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The region and the name in it, of a namespace in a region.
    #[must_use]
    pub fn region(&self) -> Option<(&Path, &str)> {
        self.region.as_ref().map(|(path, name)| (path.as_path(), name.as_str()))
    }

    /// The file of a detached header.
    #[must_use]
    pub fn detached_header(&self) -> Option<&Path> {
        self.header.as_deref()
    }

    /// The file or device where the header is.
    #[must_use]
    pub fn header_path(&self) -> &Path {
        self.header.as_deref().unwrap_or(&self.path)
    }

    /// Opens it with the lock that `operation` needs.
    ///
    /// # Errors
    ///
    /// [`Cause::Open`] and [`Cause::Region`].
    pub fn open(&self, operation: Operation) -> Result<Site, Error> {
        let access = match operation.reach() {
            // What accepts data gives it a tag.
            Reach::Peek | Reach::Read if self.accepts_data => {
                return Err(Error::new(operation, &self.path, Cause::AcceptsAndReads));
            }
            Reach::Peek => return self.peek(operation),
            Reach::Read => Access::ReadOnly,
            Reach::Write => Access::ReadWrite,
        };
        let site = match self.region() {
            None => Site::whole(open(operation, &self.path, &OpenOptions::new(access))?),
            Some((path, name)) => open_in_region(operation, path, name, access)?,
        };
        let header = self.header.as_ref().map(|path| open(operation, path, &OpenOptions::new(access))).transpose()?;
        Ok(site.with_header(header).accepting_data(self.accepts_data))
    }

    /// Opens it for reading without a lock, so that it can be looked at while somebody uses it.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn peek(&self, operation: Operation) -> Result<Site, Error> {
        let site = match self.region() {
            None => Site::whole(open(operation, &self.path, &without_lock())?),
            Some((path, name)) => {
                let backing = open(operation, path, &without_lock())?;
                let range = find(operation, path, &backing, name)?;
                Site::part(backing, range.start, range.end - range.start)
            }
        };
        let header = self.header.as_ref().map(|path| open(operation, path, &without_lock())).transpose()?;
        Ok(site.with_header(header))
    }

    /// The namespace at `site`, which this location was opened as.
    ///
    /// # Errors
    ///
    /// [`Cause::Namespace`].
    pub fn locked(&self, operation: Operation, site: Site) -> Result<LockedNamespace, Error> {
        LockedNamespace::open_in(site).map_err(|source| Error::new(operation, self.header_path(), source))
    }
}

fn region_and_name(path: &Path) -> Option<(PathBuf, String)> {
    let (region, name) = path.to_str()?.rsplit_once('#')?;
    let region = Path::new(region);
    (!name.is_empty() && region.exists()).then(|| (region.into(), name.into()))
}

/// Opens the region at `path` for a change of its table, which nobody else can change meanwhile. The table is durable then, and
/// slides that were cut before it knew of them are ended.
///
/// # Errors
///
/// As [`Location::open`].
pub fn open_table(operation: Operation, path: &Path) -> Result<Region, Error> {
    let options = OpenOptions::new(Access::ReadWrite).lock_range(0..REGION_ALIGNMENT_BYTES);
    let mut region = region(operation, path, open(operation, path, &options)?)?;
    region.confirm().map_err(|source| Error::new(operation, path, source))?;
    region.end_cut_slides().map_err(|source| Error::new(operation, path, Cause::Erase(source)))?;
    Ok(region)
}

/// The table of the region at `path`, without a lock.
///
/// # Errors
///
/// As [`Location::open`].
pub fn peek_table(operation: Operation, path: &Path) -> Result<Region, Error> {
    region(operation, path, open(operation, path, &without_lock())?)
}

/// Opens the region at `path` for writing, with a lock on `range` only.
pub(super) fn open_range(operation: Operation, path: &Path, range: &Range<u64>) -> Result<Arc<Backing>, Error> {
    open(operation, path, &OpenOptions::new(Access::ReadWrite).lock_range(range.clone()))
}

fn open_in_region(operation: Operation, path: &Path, name: &str, access: Access) -> Result<Site, Error> {
    let range = find(operation, path, &open(operation, path, &without_lock())?, name)?;
    let backing = open(operation, path, &OpenOptions::new(access).lock_range(range.clone()))?;
    if find(operation, path, &backing, name)? != range {
        return Err(Error::new(operation, path, OpenError::Busy));
    }
    let site = Site::part(backing, range.start, range.end - range.start);
    if access == Access::ReadWrite {
        confirm_table(operation, path)?;
    }
    Ok(site)
}

/// Makes the table of the region at `path` durable, and ends slides that were cut before it knew of them. Comes before anything
/// is written on the strength of a place that was found in it, whatever way it was found. Somebody who is changing the table at
/// the moment does the same.
pub(super) fn confirm_table(operation: Operation, path: &Path) -> Result<(), Error> {
    match open_table(operation, path) {
        Err(error) if !matches!(*error.cause, Cause::Open(OpenError::Busy)) => Err(error),
        _ => Ok(()),
    }
}

fn find(operation: Operation, path: &Path, backing: &Arc<Backing>, name: &str) -> Result<Range<u64>, Error> {
    let region = region(operation, path, Arc::clone(backing))?;
    Ok(region.find(name).map_err(|source| Error::new(operation, path, source))?.range)
}

fn region(operation: Operation, path: &Path, backing: Arc<Backing>) -> Result<Region, Error> {
    Region::open(backing).map_err(|source| Error::new(operation, path, source))
}

fn without_lock() -> OpenOptions {
    OpenOptions::new(Access::ReadOnly).lock_range(0..0)
}

pub(super) fn open(operation: Operation, path: &Path, options: &OpenOptions) -> Result<Arc<Backing>, Error> {
    options.open(path).map(Arc::new).map_err(|source| Error::new(operation, path, source))
}

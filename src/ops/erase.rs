//! The end of a namespace: its key slots and both header copies are destroyed, so that the data area is noise for everybody.
//!
//! No key is needed: whoever may write the file may destroy it anyway. A header that cannot be read is destroyed as well:
//! what is damaged for us may be enough for somebody else. The header goes first, because it is small and all depends on
//! it; overwriting the data area is for those who do not trust that.

use std::ops::Range;

use super::error::{Cause, Error};
use super::gate::{self, Operation, Way};
use super::location::{self, Location};
use crate::namespace::{self, HEADER_AREA_BYTES, Header, LockedNamespace, OpenError, Region, Site};

/// What is to be destroyed, locked.
#[derive(Debug)]
pub struct Doomed {
    location: Location,
    operation: Operation,
    site: Site,
    locked: Result<LockedNamespace, OpenError>,
}

impl Doomed {
    /// Opens what is at `location`. Where nothing looks like a header, only `force` goes on.
    ///
    /// # Errors
    ///
    /// [`Cause::Namespace`], [`Cause::Open`], [`Cause::Region`].
    pub fn find(location: &Location, force: bool) -> Result<Self, Error> {
        Self::find_for(Operation::Erase, location, force)
    }

    /// As [`Self::find`], to remove a namespace from its region, whatever its header is.
    ///
    /// # Errors
    ///
    /// [`Cause::NotInRegion`], and as [`Self::find`].
    pub fn find_in_region(location: &Location) -> Result<Self, Error> {
        if location.region().is_none() {
            return Err(Error::new(Operation::Remove, location.path(), Cause::NotInRegion));
        }
        Self::find_for(Operation::Remove, location, true)
    }

    fn find_for(operation: Operation, location: &Location, force: bool) -> Result<Self, Error> {
        let site = location.open(operation)?;
        let locked = LockedNamespace::open_in(site.clone());
        if !force && matches!(locked, Err(OpenError::NotANamespace { .. } | OpenError::TooSmall { .. })) {
            return Err(locked
                .map_err(|source| Error::new(operation, location.header_path(), source))
                .expect_err("just seen"));
        }
        let states = gate::states_of_place(&locked);
        let way = Way { detached: site.is_detached(), force, ..Way::before_the_key(operation) };
        gate::check(operation, &states, way).map_err(|refusal| Error::new(operation, location.path(), refusal))?;
        Ok(Self { location: location.clone(), operation, site, locked })
    }

    /// Its backings.
    #[must_use]
    pub const fn site(&self) -> &Site {
        &self.site
    }

    /// What its header says, or why that says nothing.
    ///
    /// # Errors
    ///
    /// What is wrong with the header.
    pub fn header(&self) -> Result<&Header, &OpenError> {
        self.locked.as_ref().map(LockedNamespace::header)
    }

    /// Whether it is a detached header without its data, which is then not to be overwritten.
    #[must_use]
    pub const fn data_is_elsewhere(&self) -> bool {
        matches!(self.locked, Err(OpenError::Detached))
    }

    /// Destroys the headers; where the data is, which nobody can decrypt any more.
    ///
    /// # Errors
    ///
    /// [`Cause::Erase`]: key material may be left.
    pub fn erase(&self) -> Result<Range<u64>, Error> {
        let data = self.data_range();
        let failed = |source| Error::new(self.operation, self.location.header_path(), Cause::Erase(source));
        // First: without its header nobody knows any more what is to be swept.
        if let (Some((path, _)), Ok(header)) = (self.location.region(), self.header()) {
            location::open_table(self.operation, path)?.sweep(header.uuid).map_err(failed)?;
        }
        namespace::destroy(&self.site).map_err(failed)?;
        Ok(data)
    }

    /// Destroys the headers and gives the partition back; the region without it.
    ///
    /// # Errors
    ///
    /// As [`Self::erase`], and [`Cause::Region`].
    pub fn remove(&self) -> Result<Region, Error> {
        let Some((path, name)) = self.location.region() else {
            return Err(Error::new(self.operation, self.location.path(), Cause::NotInRegion));
        };
        self.erase()?;
        let mut table = location::open_table(self.operation, path)?;
        table.remove(name).map_err(|source| Error::new(self.operation, path, source))?;
        Ok(table)
    }

    /// Overwrites `data` with zeros; `reach` is told how far that is.
    ///
    /// # Errors
    ///
    /// [`Cause::Media`].
    pub fn overwrite(&self, data: Range<u64>, reach: impl FnMut(u64)) -> Result<(), Error> {
        namespace::overwrite_with_zeros(self.site.data(), data, reach)
            .map_err(|source| Error::new(self.operation, self.location.path(), source))
    }

    /// Where the data is; of a header that cannot be read, everything that may be data.
    fn data_range(&self) -> Range<u64> {
        if self.data_is_elsewhere() {
            return self.site.start()..self.site.start();
        }
        if let Ok(locked) = &self.locked {
            let start = locked.geometry().data_start();
            // With the tag behind it.
            let end = start + locked.geometry().size_bytes();
            let needed = locked.header().tag_offset.and_then(|_| namespace::detached_bytes(start, end - start));
            return start..needed.unwrap_or(end).min(self.site.start() + self.site.available_bytes());
        }
        let end = self.site.start() + self.site.available_bytes();
        let start = self.site.start();
        let start = if self.site.is_detached() { start } else { start.saturating_add(HEADER_AREA_BYTES) };
        start.min(end)..end
    }
}

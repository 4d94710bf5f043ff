//! Where a namespace is to be made: what is there is opened, what is not is made, and nothing new is left after an error.
//!
//! What holds something is refused, unless it is to be overwritten. In a region the place is a partition of that name, or
//! the first free place that is large enough: its table stays locked until the caller has entered it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Cause, Error};
use super::gate::Operation;
use super::location::{self, Location};
use crate::namespace::{self, HEADER_AREA_BYTES, Region, RegionError};
use crate::pmem::{Access, Allocation, Backing, OpenOptions};

/// The wish.
#[derive(Clone, Copy, Debug)]
pub struct NewPlace<'a> {
    /// What it is for.
    pub operation: Operation,
    /// Where.
    pub location: &'a Location,
    /// Decrypted bytes; needed for a file or a partition that does not exist.
    pub size_bytes: Option<u64>,
    /// Whether blocks are allocated now.
    pub allocation: Allocation,
    /// Whether what is there may be lost.
    pub force: bool,
}

/// What is written to.
#[derive(Debug)]
pub struct Prepared {
    /// The backing of the data.
    pub data: Arc<Backing>,
    /// Where in it.
    pub range: Range<u64>,
    /// The backing of a detached header.
    pub header: Option<Arc<Backing>>,
    /// The files that did not exist before.
    pub made: Vec<PathBuf>,
    /// The region that the place is to be entered into; until then it is free.
    pub region: Option<Region>,
}

/// Files that were made for a namespace that could not be made are of no use to anybody.
pub fn remove_made(made: &[PathBuf]) {
    for path in made {
        let _ = std::fs::remove_file(path); // the first error is the one to report
    }
}

/// A backing, the bytes of it to use, and the region that they are to be entered into.
type DataPlace = (Arc<Backing>, Range<u64>, Option<Region>);

fn whole(backing: Arc<Backing>) -> DataPlace {
    let len_bytes = backing.len_bytes();
    (backing, 0..len_bytes, None)
}

impl NewPlace<'_> {
    /// Opens what is there and makes what is not; on an error nothing new is left.
    ///
    /// # Errors
    ///
    /// [`Cause::WouldOverwrite`] without `force`, [`Cause::SizeNeeded`], [`Cause::SizeTooLarge`], [`Cause::Open`],
    /// [`Cause::Region`], [`Cause::Media`].
    pub fn prepare(&self) -> Result<Prepared, Error> {
        let path = self.location.path();
        let mut made = Vec::new();
        let mut prepare = || -> Result<Prepared, Error> {
            let (data, range, region) = match self.location.region() {
                Some((path, name)) => self.place_in_region(path, name)?,
                None if path.exists() => whole(self.open(path)?),
                None => {
                    let created = self.create(path, self.total_bytes()?, self.allocation)?;
                    made.push(path.to_path_buf());
                    whole(created)
                }
            };
            let header = match self.location.detached_header() {
                None => None,
                Some(path) if path.exists() => Some(self.open(path)?),
                Some(path) => {
                    let created = self.create(path, HEADER_AREA_BYTES, Allocation::Full)?;
                    made.push(path.to_path_buf());
                    Some(created)
                }
            };
            Ok(Prepared { data, header, range, region, made: made.clone() })
        };
        prepare().inspect_err(|_| remove_made(&made))
    }

    /// The place of a namespace in a region: its partition if it has one, and otherwise the first that is large enough.
    fn place_in_region(&self, path: &Path, name: &str) -> Result<DataPlace, Error> {
        let failed = |source: RegionError| self.failed(path, source);
        let region = location::open_table(self.operation, path)?;
        match region.check_name(name) {
            Ok(()) => {
                let range = region.place(self.total_bytes()?).map_err(failed)?;
                let backing = location::open_range(self.operation, path, &range)?;
                self.allocate(path, &backing, &range)?;
                Ok((backing, range, Some(region)))
            }
            Err(RegionError::NameInUse { .. }) => {
                let range = region.find(name).map_err(failed)?.range;
                let backing = location::open_range(self.operation, path, &range)?;
                self.refuse_data(self.location.path(), &backing, range.start)?;
                self.allocate(path, &backing, &range)?;
                Ok((backing, range, None))
            }
            Err(source) => Err(failed(source)),
        }
    }

    /// Bytes of a new file or partition.
    fn total_bytes(&self) -> Result<u64, Error> {
        let size_bytes = self.size_bytes.ok_or_else(|| self.failed(self.location.path(), Cause::SizeNeeded))?;
        // In front of the data its header, or behind it its tag.
        let total_bytes = match self.location.detached_header() {
            Some(_) => namespace::detached_bytes(0, size_bytes),
            None => size_bytes.checked_add(HEADER_AREA_BYTES),
        };
        total_bytes.ok_or_else(|| self.failed(self.location.path(), Cause::SizeTooLarge))
    }

    /// Opens what is there, and refuses it when it holds something.
    fn open(&self, path: &Path) -> Result<Arc<Backing>, Error> {
        let backing = location::open(self.operation, path, &OpenOptions::new(Access::ReadWrite))?;
        self.refuse_data(path, &backing, 0)?;
        self.allocate(path, &backing, &(0..backing.len_bytes()))?;
        Ok(backing)
    }

    fn refuse_data(&self, path: &Path, backing: &Backing, base: u64) -> Result<(), Error> {
        match namespace::signature_found(backing, base).map_err(|source| self.failed(path, source))? {
            Some(signature) if !self.force => Err(self.failed(path, Cause::WouldOverwrite(signature))),
            _ => Ok(()),
        }
    }

    fn allocate(&self, path: &Path, backing: &Backing, range: &Range<u64>) -> Result<(), Error> {
        if self.allocation == Allocation::Sparse {
            return Ok(());
        }
        backing.allocate(range.clone()).map_err(|source| self.failed(path, source))
    }

    fn create(&self, path: &Path, len_bytes: u64, allocation: Allocation) -> Result<Arc<Backing>, Error> {
        Backing::create(path, len_bytes, allocation).map(Arc::new).map_err(|source| self.failed(path, source))
    }

    fn failed(&self, path: &Path, cause: impl Into<Cause>) -> Error {
        Error::new(self.operation, path, cause)
    }
}

//! Where a namespace is to be made: what is there is opened, what is not is made, and nothing new is left after an error.
//!
//! What holds something is refused, unless it is to be overwritten. In a region the place is a partition of that name, or
//! the first free place that is large enough: its table stays locked until the caller has entered it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::Error;
use super::place::{self, PlaceArgs};
use crate::namespace::{self, HEADER_AREA_BYTES, Region, RegionError};
use crate::pmem::{Access, Allocation, Backing, OpenOptions};

/// The wish.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewPlace<'a> {
    pub(crate) place: &'a PlaceArgs,
    /// Decrypted bytes; needed for a file or a partition that does not exist.
    pub(crate) size_bytes: Option<u64>,
    pub(crate) allocation: Allocation,
    /// Whether what is there may be lost.
    pub(crate) force: bool,
}

/// What is written to: the backings, where in the first one, and the files that did not exist before.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) data: Arc<Backing>,
    pub(crate) range: Range<u64>,
    pub(crate) header: Option<Arc<Backing>>,
    pub(crate) made: Vec<PathBuf>,
    /// The region that the place is to be entered into; until then it is free.
    pub(crate) region: Option<Region>,
}

/// Files that were made for a namespace that could not be made are of no use to anybody.
pub(crate) fn remove_made(made: &[PathBuf]) {
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
    pub(crate) fn prepare(&self) -> Result<Prepared, Error> {
        let path = &self.place.path;
        let mut made = Vec::new();
        let mut prepare = || -> Result<Prepared, Error> {
            let (data, range, region) = match self.place.in_region() {
                Some((path, name)) => self.place_in_region(path, name)?,
                None if path.exists() => whole(self.open(path)?),
                None => {
                    let created = create(path, self.total_bytes()?, self.allocation)?;
                    made.push(path.clone());
                    whole(created)
                }
            };
            let header = match &self.place.header {
                None => None,
                Some(path) if path.exists() => Some(self.open(path)?),
                Some(path) => {
                    let created = create(path, HEADER_AREA_BYTES, Allocation::Full)?;
                    made.push(path.clone());
                    Some(created)
                }
            };
            Ok(Prepared { data, header, range, region, made: made.clone() })
        };
        prepare().inspect_err(|_| remove_made(&made))
    }

    /// The place of a namespace in a region: its partition if it has one, and otherwise the first that is large enough.
    fn place_in_region(&self, path: &Path, name: &str) -> Result<DataPlace, Error> {
        let failed = |source| Error::Region { path: path.into(), source };
        let region = place::open_table(path)?;
        match region.check_name(name) {
            Ok(()) => {
                let range = region.place(self.total_bytes()?).map_err(failed)?;
                let backing = place::open_range(path, Access::ReadWrite, &range)?;
                self.allocate(path, &backing, &range)?;
                Ok((backing, range, Some(region)))
            }
            Err(RegionError::NameInUse { .. }) => {
                let range = region.find(name).map_err(failed)?.range;
                let backing = place::open_range(path, Access::ReadWrite, &range)?;
                self.refuse_data(&self.place.path, &backing, range.start)?;
                self.allocate(path, &backing, &range)?;
                Ok((backing, range, None))
            }
            Err(source) => Err(failed(source)),
        }
    }

    /// Bytes of a new file or partition.
    fn total_bytes(&self) -> Result<u64, Error> {
        let Some(size_bytes) = self.size_bytes else {
            let path = self.place.path.display();
            return Err(Error::Usage(format!("{path} does not exist: say how large it is to be, such as --size 4G")));
        };
        let header_bytes = if self.place.header.is_some() { 0 } else { HEADER_AREA_BYTES };
        size_bytes.checked_add(header_bytes).ok_or_else(|| Error::Usage("--size is too large".into()))
    }

    /// Opens what is there, and refuses it when it holds something.
    fn open(&self, path: &Path) -> Result<Arc<Backing>, Error> {
        let opened = OpenOptions::new(Access::ReadWrite).open(path);
        let backing = opened.map(Arc::new).map_err(|source| Error::Open { path: path.into(), source })?;
        self.refuse_data(path, &backing, 0)?;
        self.allocate(path, &backing, &(0..backing.len_bytes()))?;
        Ok(backing)
    }

    fn refuse_data(&self, path: &Path, backing: &Backing, base: u64) -> Result<(), Error> {
        let failed = |source| Error::Media { path: path.into(), source };
        match namespace::signature_found(backing, base).map_err(failed)? {
            Some(signature) if !self.force => Err(Error::WouldOverwrite { path: path.into(), signature }),
            _ => Ok(()),
        }
    }

    fn allocate(&self, path: &Path, backing: &Backing, range: &Range<u64>) -> Result<(), Error> {
        if self.allocation == Allocation::Sparse {
            return Ok(());
        }
        backing.allocate(range.clone()).map_err(|source| Error::Media { path: path.into(), source })
    }
}

fn create(path: &Path, len_bytes: u64, allocation: Allocation) -> Result<Arc<Backing>, Error> {
    let created = Backing::create(path, len_bytes, allocation);
    created.map(Arc::new).map_err(|source| Error::Open { path: path.into(), source })
}

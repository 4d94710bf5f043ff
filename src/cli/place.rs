//! Where a namespace is: the path of every command, and the file of a detached header.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::error::Error;
use super::output::warning;
use crate::namespace::{LockedNamespace, Site};
use crate::pmem::{Access, Backing, OpenOptions};

/// The options that say where a namespace is.
#[derive(Args, Clone, Debug)]
pub(crate) struct PlaceArgs {
    /// File or device with a namespace
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,
    /// File that holds the header, for a namespace whose header is detached
    #[arg(long, value_name = "FILE")]
    pub(crate) header: Option<PathBuf>,
}

impl PlaceArgs {
    /// Opens and locks it, and says so when its granularity was forced.
    pub(crate) fn open(&self, access: Access) -> Result<Site, Error> {
        let site = self.site(&OpenOptions::new(access))?;
        let data = site.data();
        if data.granularity_forced().is_some() {
            warning!("{}: {}", self.path.display(), data.granularity_reason());
        }
        Ok(site)
    }

    /// Opens it for reading without a lock, so that it can be looked at while it is served.
    pub(crate) fn peek(&self) -> Result<Site, Error> {
        self.site(&OpenOptions::new(Access::ReadOnly).lock_range(0..0))
    }

    fn site(&self, options: &OpenOptions) -> Result<Site, Error> {
        let open = |path: &PathBuf| -> Result<Arc<Backing>, Error> {
            options.open(path).map(Arc::new).map_err(|source| Error::Open { path: path.clone(), source })
        };
        let data = open(&self.path)?;
        let header = self.header.as_ref().map(open).transpose()?;
        Ok(Site::whole(data).with_header(header))
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

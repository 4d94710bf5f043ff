//! The short way to a volume: a path and a key. Whoever needs more (a place in a region, a detached header, a certain
//! granularity or cipher) goes the long way, over `pmem` and `namespace`.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::{Volume, VolumeError};
use crate::namespace::{self, Credential, FormatError, FormatOptions, HEADER_AREA_BYTES, LockedNamespace, UnlockError};
use crate::pmem::{Access, Allocation, Backing, OpenError};
use crate::xts::Backend;

/// Why a path and a key did not become a volume.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BeginError {
    /// The file or device cannot be opened or made; who has it open already is among the causes.
    #[error("the file or device cannot be opened or made")]
    Backing(#[from] OpenError),
    /// There is no namespace to open.
    #[error(transparent)]
    Namespace(#[from] namespace::OpenError),
    /// The key or the header was refused.
    #[error(transparent)]
    Unlock(#[from] UnlockError),
    /// The namespace could not be written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The volume could not be set up.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

impl Volume {
    /// Makes a file with a namespace of `size` bytes (a multiple of 4096), which `key` opens, and gives its volume, shared as
    /// [maps](crate::dax) and servers need it. It reads as noise until it is written. Blocks are allocated now, so that no store
    /// finds the disk full later. The header takes [`HEADER_AREA_BYTES`] beside.
    ///
    /// ```
    /// use daxcrypt::dax::MapOptions;
    /// use daxcrypt::namespace::Credential;
    /// use daxcrypt::secret::SecretBytes;
    /// use daxcrypt::volume::Volume;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let folder = tempfile::tempdir()?;
    /// let key = Credential::KeyFile(SecretBytes::random(64)?); // keep it: nothing opens the volume without it
    /// let volume = Volume::create(folder.path().join("vault.img"), 1 << 20, &key)?;
    /// let map = volume.map(0..4096, &MapOptions::new().writable())?;
    /// map.write_persist(0, b"hello")?;
    /// map.close()?;
    /// drop(volume);
    ///
    /// let volume = Volume::open(folder.path().join("vault.img"), &key)?;
    /// let mut text = [0; 5];
    /// volume.read_at(&mut text, 0)?;
    /// assert_eq!(&text, b"hello");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`BeginError::Backing`] when there is something at `path` already, or no room for it; [`BeginError::Format`] for a size or
    /// key that no namespace can have. No file is left then.
    pub fn create(path: impl AsRef<Path>, size: u64, key: &Credential) -> Result<Arc<Self>, BeginError> {
        let path = path.as_ref();
        let backend = Backend::from_env().map_err(VolumeError::from)?;
        let backing = Arc::new(Backing::create(path, HEADER_AREA_BYTES.saturating_add(size), Allocation::Full)?);
        let options = FormatOptions { size_bytes: Some(size), ..FormatOptions::default() };
        match namespace::format(backing, options, key) {
            Ok(namespace) => Ok(Arc::new(Self::new(namespace, backend))),
            Err(error) => {
                let _ = fs::remove_file(path); // our own new file; the first error is the one to report
                Err(error.into())
            }
        }
    }

    /// Opens the namespace in the file or device at `path` with `key`, for reading and writing, and gives its volume. Nobody
    /// else has it open until the volume is dropped; whoever comes second gets [`BeginError::Backing`], also in this process:
    /// share the volume (an [`Arc`]) there.
    ///
    /// # Errors
    ///
    /// [`BeginError`].
    pub fn open(path: impl AsRef<Path>, key: &Credential) -> Result<Arc<Self>, BeginError> {
        Self::open_with(path.as_ref(), Access::ReadWrite, key)
    }

    /// [`Self::open`] for reading only, beside others who only read.
    ///
    /// # Errors
    ///
    /// [`BeginError`].
    pub fn open_read_only(path: impl AsRef<Path>, key: &Credential) -> Result<Arc<Self>, BeginError> {
        Self::open_with(path.as_ref(), Access::ReadOnly, key)
    }

    fn open_with(path: &Path, access: Access, key: &Credential) -> Result<Arc<Self>, BeginError> {
        let backend = Backend::from_env().map_err(VolumeError::from)?;
        let locked = LockedNamespace::open(Arc::new(Backing::open(path, access)?))?;
        let volume = Self::new(locked.unlock_key(key)?, backend);
        volume.check_owner()?;
        Ok(Arc::new(volume))
    }
}

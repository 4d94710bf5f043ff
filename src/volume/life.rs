//! The header of a volume that is in use: the mark that it is, and its size.
//!
//! The mark is for people. Nothing is recovered by it, because a namespace is whole after a crash at any instant.
//!
//! The size in the header changes before the size in use, either way, so that nothing is written where the header on media
//! says that there is none. Whoever makes room outside of the namespace does it before it grows, and takes it away after
//! it has shrunk.

use std::sync::{PoisonError, RwLockReadGuard};

use super::{Volume, VolumeError};
use crate::namespace::{Namespace, UpdateError};

impl Volume {
    /// Records in the header that the namespace is in use: until [`Self::mark_closed`], `daxcrypt info` says "not in order,
    /// or in use now". It costs two short writes to the header. Opening does not do it, so that looking at a volume writes
    /// nothing; a server, or a program that keeps its data in a direct map, does it before its first write.
    ///
    /// A LUKS2 volume and an ephemeral one have no such mark, and nothing happens.
    ///
    /// # Errors
    ///
    /// [`VolumeError::ReadOnly`], [`VolumeError::Locked`]; [`VolumeError::Update`] when the header cannot be written.
    pub fn mark_in_use(&self) -> Result<(), VolumeError> {
        self.mark(true)
    }

    /// Makes everything durable that was written, and then records that the namespace was closed in order. Close the direct
    /// maps before, and call it before [`Self::lock`], which wipes the key that the header is authenticated with.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Mapped`] while there is a direct map, and as [`Self::mark_in_use`] and [`Self::flush`]; the mark then
    /// stays.
    pub fn mark_closed(&self) -> Result<(), VolumeError> {
        self.check_owner()?;
        if self.claims.count() > 0 {
            return Err(VolumeError::Mapped);
        }
        self.flush()?;
        self.mark(false)
    }

    /// How many bytes from its base on the namespace may use; `None` when the volume is locked or has no header of ours.
    #[must_use]
    pub fn available_bytes(&self) -> Option<u64> {
        self.engine().as_ref().map(|engine| engine.namespace().site().available_bytes())
    }

    /// Takes note that the namespace may use `available_bytes` from its base on, because its partition has another size now,
    /// or its backing was [grown](crate::pmem::Backing::grow). What the backing does not have does not count.
    pub fn set_available_bytes(&self, available_bytes: u64) {
        if let Some(engine) = self.engine().as_mut() {
            engine.namespace_mut().set_available_bytes(available_bytes);
        }
    }

    /// Gives the volume another size while it is in use, at most what its place has room for; smaller only with
    /// `even_smaller`. Accesses that are under way end before; those that come later and reach past the new end fail with
    /// [`VolumeError::OutOfRange`]. What the volume did not have before reads as noise until it is written (as zeroes where
    /// [`Self::discards`] and the backing has a hole).
    ///
    /// # Errors
    ///
    /// [`VolumeError::WasMapped`] when there is, or was, a direct map; [`VolumeError::ReadOnly`], [`VolumeError::Locked`],
    /// [`VolumeError::NoHeader`]; [`VolumeError::Update`] with the size as before, unless the header could not be written.
    pub fn resize(&self, size_bytes: u64, even_smaller: bool) -> Result<(), VolumeError> {
        self.check_owner()?;
        if self.read_only() {
            return Err(VolumeError::ReadOnly);
        }
        let mut engine = self.engine();
        let Some(engine) = engine.as_mut() else {
            return Err(self.check_unlocked().err().unwrap_or(VolumeError::NoHeader));
        };
        let _no_new_map = self.mapping.write().unwrap_or_else(PoisonError::into_inner);
        if self.claims.count() > 0 || self.window.get().is_some() {
            return Err(VolumeError::WasMapped);
        }
        Ok(engine.resize(&self.area, size_bytes, even_smaller)?)
    }

    /// Runs `change` on the namespace, whose header it may look at and give other key slots. What moves the data or gives it
    /// another size has a method of its own, since the data area must follow.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Locked`], [`VolumeError::NoHeader`]; what `change` says.
    pub(crate) fn with_namespace<T, E: From<VolumeError>>(
        &self,
        change: impl FnOnce(&mut Namespace) -> Result<T, E>,
    ) -> Result<T, E> {
        match self.engine().as_mut() {
            Some(engine) => change(engine.namespace_mut()),
            None => Err(self.check_unlocked().err().unwrap_or(VolumeError::NoHeader).into()),
        }
    }

    /// Whether [`Self::resize`] could give it that size, if its place has room.
    ///
    /// # Errors
    ///
    /// As [`Self::resize`], but for [`VolumeError::WasMapped`].
    pub fn check_resize(&self, size_bytes: u64, even_smaller: bool) -> Result<(), VolumeError> {
        match self.engine().as_ref() {
            _ if self.read_only() => Err(VolumeError::ReadOnly),
            Some(engine) => Ok(engine.namespace().check_resize(size_bytes, even_smaller)?),
            None => Err(self.check_unlocked().err().unwrap_or(VolumeError::NoHeader)),
        }
    }

    /// Keeps the size as it is until the guard is dropped.
    pub(crate) fn keep_size(&self) -> RwLockReadGuard<'_, ()> {
        self.mapping.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes from its base that the namespace would need with `size_bytes` of data.
    pub(crate) fn needed_bytes(&self, size_bytes: u64) -> Result<u64, VolumeError> {
        self.with_namespace(|namespace| Ok(namespace.needed_bytes(size_bytes)))
    }

    /// The largest size of the namespace that `available_bytes` from its base have room for.
    pub(crate) fn size_that_fits(&self, available_bytes: u64) -> Result<u64, VolumeError> {
        self.with_namespace(|namespace| {
            namespace.size_that_fits(available_bytes).map_err(|error| UpdateError::Geometry(error).into())
        })
    }

    fn mark(&self, in_use: bool) -> Result<(), VolumeError> {
        self.check_owner()?;
        if self.read_only() {
            return Err(VolumeError::ReadOnly);
        }
        match self.engine().as_mut() {
            Some(engine) => Ok(engine.mark(in_use)?),
            None => self.check_unlocked(),
        }
    }
}

impl From<UpdateError> for VolumeError {
    fn from(error: UpdateError) -> Self {
        Self::Update(Box::new(error))
    }
}

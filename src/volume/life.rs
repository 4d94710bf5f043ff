//! The header of a volume that is in use: the mark that it is.
//!
//! The mark is for people. Nothing is recovered by it, because a namespace is whole after a crash at any instant.

use super::{Volume, VolumeError};
use crate::namespace::UpdateError;

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
        if self.claims.count() > 0 {
            return Err(VolumeError::Mapped);
        }
        self.flush()?;
        self.mark(false)
    }

    fn mark(&self, in_use: bool) -> Result<(), VolumeError> {
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

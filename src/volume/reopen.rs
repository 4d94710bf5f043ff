//! Unlocking a volume that was locked: the same one goes on, with whoever holds it, from the header as it is now.
//!
//! Guards: a volume is unlocked by the namespace that was locked and by no other, with the same bytes at the same place; nobody
//! reads or writes before its keys, and a re-key that was under way, are all there.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::area::DataArea;
use super::side::Side;
use super::transform::Engine;
use super::{Volume, VolumeError};
#[cfg(feature = "luks2")]
use crate::luks2;
use crate::namespace::{Geometry, Namespace, Site};
use crate::pmem::Backing;

impl Volume {
    /// Goes on with a volume that [`Self::lock`] has locked: `namespace` was opened at [`Self::site`], which whoever locks
    /// keeps, and unlocked again. A re-key that was under way goes on with the next [`Self::transform_step`].
    ///
    /// # Errors
    ///
    /// [`VolumeError::NotLocked`]; [`VolumeError::Changed`] for another namespace, or one of another size or place than was
    /// locked; [`VolumeError::WasMapped`] when there was a direct map, whose plaintext is gone.
    pub fn unlock(&self, namespace: Namespace) -> Result<(), VolumeError> {
        self.unlock_as(namespace, false)
    }

    /// [`Self::unlock`]; with `in_use` the header tells so, before anybody writes.
    pub(crate) fn unlock_as(&self, namespace: Namespace, in_use: bool) -> Result<(), VolumeError> {
        self.check_owner()?;
        let mut engine = self.engine();
        let header = namespace.header();
        self.check_same(namespace.backing(), namespace.geometry(), header.discards)?;
        if header.uuid != self.header.uuid {
            return Err(VolumeError::Changed);
        }
        // Made apart, so that nobody meets keys of one half of a re-key and not of the other.
        let area =
            self.area_with(Side::new(namespace.geometry().layout(), namespace.volume_key(), self.area.backend()));
        let mut new = Engine::new(namespace, &area);
        if in_use {
            new.mark(true)?;
        }
        self.area.take_keys_of(&area);
        *engine = Some(new);
        self.locked.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// [`Self::unlock`] of a LUKS2 volume.
    ///
    /// # Errors
    ///
    /// As [`Self::unlock`].
    #[cfg(feature = "luks2")]
    pub fn unlock_luks2(&self, unlocked: luks2::Unlocked) -> Result<(), VolumeError> {
        self.check_owner()?;
        let _engine = self.engine();
        let (backing, _, geometry, header, key) = unlocked.into_parts();
        self.check_same(&backing, &geometry, header.discards)?;
        if header.uuid != self.header.uuid || geometry.unit_bytes() != self.geometry().unit_bytes() {
            return Err(VolumeError::Changed);
        }
        self.area.take_keys_of(&self.area_with(Side::new(geometry.layout(), &key, self.area.backend())));
        self.locked.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Where the header and the data lie, for opening them again with the locks that are held; `None` when the volume is
    /// locked.
    #[must_use]
    pub fn site(&self) -> Option<Site> {
        let engine = self.engine();
        match engine.as_ref() {
            Some(engine) => Some(engine.namespace().site().clone()),
            None if !self.locked() => {
                let detached = !Arc::ptr_eq(&self.header_backing, self.backing());
                Some(
                    Site::whole(Arc::clone(self.backing()))
                        .with_header(detached.then(|| Arc::clone(&self.header_backing))),
                )
            }
            None => None,
        }
    }

    fn area_with(&self, side: Side) -> DataArea {
        DataArea::new(Arc::clone(self.backing()), self.geometry(), side, self.discards())
    }

    fn check_same(&self, backing: &Arc<Backing>, geometry: &Geometry, discards: bool) -> Result<(), VolumeError> {
        if !self.locked() {
            return Err(VolumeError::NotLocked);
        }
        if self.claims.count() > 0 || self.window.get().is_some() {
            return Err(VolumeError::WasMapped);
        }
        let (now, before) = (geometry, self.geometry());
        let same_place = now.data_start() == before.data_start() && now.size_bytes() == before.size_bytes();
        let same = same_place && Arc::ptr_eq(backing, self.backing()) && discards == self.discards();
        if same { Ok(()) } else { Err(VolumeError::Changed) }
    }
}

//! Which bytes of which file or disk a namespace lies in: what two paths have in common, and two copies with the same uuid
//! have not.

use super::error::Cause;
use crate::namespace::{HEADER_AREA_BYTES, Site};
use crate::pmem::{Backing, BackingId, Extent, MediaError};
use crate::volume::Volume;

/// Where a namespace begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Whereabouts {
    /// The file or disk of its data.
    pub backing: BackingId,
    /// The byte of it where the namespace begins.
    pub start: u64,
}

impl Whereabouts {
    /// Of what lies at `site`; `None` for memory.
    ///
    /// # Errors
    ///
    /// [`Cause::Media`].
    pub fn of_site(site: &Site) -> Result<Option<Self>, Cause> {
        Self::of(site.data(), site.start())
    }

    /// Of a volume that is in use.
    ///
    /// # Errors
    ///
    /// [`Cause::Media`].
    pub fn of_volume(volume: &Volume) -> Result<Option<Self>, Cause> {
        let base = volume.geometry().base();
        Self::of(volume.backing(), base.saturating_sub(volume.backing().disk_offset()))
    }

    fn of(backing: &Backing, start: u64) -> Result<Option<Self>, Cause> {
        let extent = extent(backing)?;
        Ok(extent.map(|extent| Self { backing: extent.id, start: extent.range.start.saturating_add(start) }))
    }
}

/// All bytes that a namespace at `site` may use: its data, and its header where that is detached.
pub(super) fn extents_of(site: &Site) -> Result<Vec<Extent>, Cause> {
    let data = site.start()..site.start().saturating_add(site.available_bytes());
    let mut extents = Vec::from_iter(extent(site.data())?.map(|extent| extent.part(&data)));
    if site.is_detached() {
        let (header, start) = site.header_place();
        extents.extend(extent(header)?.map(|extent| extent.part(&(start..start.saturating_add(HEADER_AREA_BYTES)))));
    }
    Ok(extents)
}

fn extent(backing: &Backing) -> Result<Option<Extent>, Cause> {
    backing.extent().map_err(|error| Cause::Media(MediaError::Io(error)))
}

//! Destroying a namespace: nothing that opens it is left, wherever its header says that there may be something.

use super::area::{HeaderArea, WriteError};
use super::geometry::HEADER_AREA_BYTES;
use super::settle::former_area;
use super::site::Site;
use crate::pmem::MediaError;

/// Overwrites with zeros the header area at `site`, and the one that a header there has left behind when it moved and that was
/// not wiped yet: durable and read back, slots, old volume keys and journal. Nothing needs to be readable there; whatever
/// it was, it is lost.
///
/// # Errors
///
/// [`WriteError`], [`MediaError::OutOfRange`] in it when the site is smaller than a header area; key material may then
/// be left.
pub fn destroy(site: &Site) -> Result<(), WriteError> {
    emptied(site).map(drop)
}

/// [`destroy`], for who goes on with the empty header area.
pub(super) fn emptied(site: &Site) -> Result<HeaderArea, WriteError> {
    let (backing, start) = site.header_place();
    let (end, len_bytes) = (start.saturating_add(HEADER_AREA_BYTES), backing.len_bytes());
    let mut area = site.area().ok_or(MediaError::OutOfRange { start, end, len_bytes })?;
    // First what only this header knows of.
    for copy in area.read_copies().into_iter().flatten() {
        let former_base = copy.metadata.transform.and_then(|transform| transform.former_base);
        if let Some(mut former) = former_base.and_then(|base| former_area(site, base)) {
            former.clear()?;
        }
    }
    area.clear()?;
    Ok(area)
}

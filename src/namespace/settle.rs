//! Durable before it is trusted: what whoever opens a namespace for writing does before he acts on what he read.
//!
//! What is visible may not be on media. A process that was killed leaves stores that no flush followed, and one whose flush
//! failed leaves stores that count as clean, so that no later flush finds them. Who relied on them would overwrite what a
//! power cut then makes the truth again. So everything that decides is *stored again* and made durable, in the order in
//! which it was written: the header, which also ends an update of which only one copy was written; then the journal of a
//! transform, or its end. All who open for writing pass here, whatever they open it for.

use std::sync::Arc;

use super::area::{CopyState, HeaderArea};
use super::error::UpdateError;
use super::geometry::{GeometryError, HEADER_AREA_BYTES};
use super::journal;
use super::site::Site;
use super::transform::TransformError;
use super::unlocked::Namespace;
use crate::pmem::Access;

impl Namespace {
    /// Makes durable what was read, and finishes what was cut: both copies are the header, the journal's record is on media,
    /// and without a transform nothing is left of one. Nothing happens when the header can only be read.
    pub(super) fn settle(&mut self) -> Result<(), TransformError> {
        if self.area.backing().access() == Access::ReadOnly || self.metadata.ephemeral {
            return Ok(());
        }
        if self.site.data().access() == Access::ReadWrite {
            self.confirm_tag()?;
        }
        let image = self.area.read_image(self.newest)?;
        for name in [self.newest, self.newest.other()] {
            // The newest first: the other one may be all that is on media.
            self.write_copy(name, self.sequence, &image).map_err(UpdateError::from)?;
        }
        match &mut self.pending {
            Some(pending) => pending.confirm(),
            None => {
                journal::clear_unused(&self.area)?;
                Ok(self.settle_tag()?)
            }
        }
    }

    /// Writes both header copies again unless they agree.
    pub(super) fn even_out(&mut self) -> Result<(), UpdateError> {
        let sequence = self.sequence;
        if self.copies.iter().all(|copy| *copy == CopyState::Good { sequence }) {
            return Ok(());
        }
        let metadata = self.metadata.clone();
        self.update(metadata)
    }

    /// Sees to it that both header copies agree, and wipes the header that was left behind elsewhere and the tag of the old
    /// volume key, so that none is left from before the transform. Comes before the first window of every run.
    ///
    /// # Errors
    ///
    /// [`TransformError::Update`].
    pub fn settle_header(&mut self) -> Result<(), TransformError> {
        self.even_out()?;
        self.forget_former_tag()?;
        let former_base = self.metadata.transform.as_ref().and_then(|transform| transform.former_base);
        // When a window has moved it is wiped, and there may be data in its place.
        let is_untouched = self.pending.as_ref().is_some_and(|pending| pending.record().is_untouched());
        let Some(base) = former_base.filter(|_| is_untouched) else { return Ok(()) };
        let (available_bytes, header_bytes) = (self.site.available_bytes(), HEADER_AREA_BYTES);
        let mut former =
            former_area(&self.site, base).ok_or(GeometryError::NoRoom { available_bytes, header_bytes })?;
        Ok(former.clear().map_err(UpdateError::from)?)
    }
}

/// The header area that a namespace at `site` has left behind at `base`: it lies behind the new header and within what
/// belongs to the namespace. Anything else is not ours to wipe.
pub(super) fn former_area(site: &Site, base: u64) -> Option<HeaderArea> {
    let own = site.start().saturating_add(HEADER_AREA_BYTES)..site.start().saturating_add(site.available_bytes());
    let start = base.checked_sub(site.origin())?;
    let is_own = own.start <= start && start.saturating_add(HEADER_AREA_BYTES) <= own.end;
    HeaderArea::new(Arc::clone(site.data()), start).filter(|_| is_own)
}

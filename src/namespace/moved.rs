//! A namespace that is not where its header says: moved by dd or a partition editor, or bound to another address.
//!
//! It does not open. It can be adopted where it lies: a transform leads from the tweaks of the old place to those of the
//! new one, under a new volume key. Until that has begun nothing is written.

use std::sync::Arc;

use super::area::choose;
use super::error::{OpenError, UnlockError};
use super::geometry::{
    DATA_ALIGNMENT_BYTES, Geometry, GeometryError, HEADER_AREA_BYTES, Layout, Placement, data_offset_for,
    detached_data_offset_for,
};
use super::info::Header;
use super::kdf::Credential;
use super::open::{LockedNamespace, too_small};
use super::signature::foreign_beginning;
use super::site::Site;
use super::transform::{RekeyOptions, TransformError};
use super::unlocked::Namespace;
use crate::pmem::Backing;

/// A well-formed namespace at a place that it was not written for.
#[derive(Debug)]
pub struct MovedNamespace {
    locked: LockedNamespace,
    /// Where its data lies now, under the tweaks of the old place.
    source: Layout,
    placement: Placement,
    rekeying: bool,
}

/// Why a namespace was not adopted. Nothing has changed, unless the error is one of writing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// It is where it belongs.
    #[error("the namespace is where its header says, at byte {base}: it opens as it is")]
    NotMoved {
        /// Base of the namespace.
        base: u64,
    },
    /// A re-key was under way when it was moved.
    #[error(
        "it was being re-keyed when it was moved: put it back to byte {header_base}, end the re-key there, move it again"
    )]
    Rekeying {
        /// Base in the header.
        header_base: u64,
    },
    /// There is no namespace that could be adopted.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The place is not possible.
    #[error("the namespace cannot stay here")]
    Geometry(#[from] GeometryError),
    /// The credential or the header was refused.
    #[error(transparent)]
    Unlock(#[from] UnlockError),
    /// The transform could not begin.
    #[error(transparent)]
    Transform(#[from] TransformError),
}

impl MovedNamespace {
    /// Finds a moved namespace in the `available_bytes` of the backing from byte `start` on.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; nothing on media changes.
    pub fn open_at(backing: &Arc<Backing>, start: u64, available_bytes: u64) -> Result<Self, AdoptError> {
        Self::open_in(Site::part(Arc::clone(backing), start, available_bytes))
    }

    /// Finds a moved namespace at a site, whose header may be detached.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; nothing on media changes.
    pub fn open_in(site: Site) -> Result<Self, AdoptError> {
        let mut area = site.area().ok_or_else(|| too_small(&site))?;
        let [a, b] = area.read_copies();
        let chosen = choose(a, b)?;
        let metadata = &chosen.copy.metadata;
        match (metadata.detached, site.is_detached()) {
            (true, false) => return Err(OpenError::Detached.into()),
            (false, true) => return Err(OpenError::NotDetached.into()),
            _ => {}
        }
        let (base, available_bytes) = (site.base(), site.available_bytes());
        let old = metadata.placement(0);
        let bound_address = old.bound_address.and_then(|_| site.physical_address());
        if old.base == base && old.bound_address == bound_address {
            return Err(AdoptError::NotMoved { base });
        }
        let source = source_layout(&old, site.start(), available_bytes)?;
        if old.detached
            && let Some(found) = foreign_beginning(site.data(), source.data_start()).map_err(OpenError::from)?
        {
            return Err(OpenError::DataIsOther { found }.into());
        }
        // Data that is not at a 2 MiB boundary here moves to the first one (behind the header).
        let is_behind = old.detached || old.data_offset >= HEADER_AREA_BYTES;
        let on_disk = source.data_start().saturating_add(site.origin());
        let data_offset = match (is_behind && on_disk.is_multiple_of(DATA_ALIGNMENT_BYTES), old.detached) {
            (true, _) => old.data_offset,
            (false, true) => detached_data_offset_for(base)?,
            (false, false) => data_offset_for(base)?,
        };
        let placement = Placement { origin: site.origin(), base, data_offset, bound_address, ..old };
        let geometry = Geometry::new(&placement, available_bytes)?;
        let rekeying = metadata.transform.is_some();
        let locked = LockedNamespace::unchecked(site, area, geometry, chosen);
        Ok(Self { locked, source, placement, rekeying })
    }

    /// What the header says: about the old place.
    #[must_use]
    pub const fn header(&self) -> &Header {
        self.locked.header()
    }

    /// Makes it a namespace of this place: the header, which has a new volume key, is durable when this returns, and the
    /// data is ready to be moved by the volume's transform.
    ///
    /// # Errors
    ///
    /// [`AdoptError`].
    pub fn adopt(self, credential: &Credential, options: &RekeyOptions) -> Result<Namespace, AdoptError> {
        let header_base = self.header().base;
        if self.rekeying {
            return Err(AdoptError::Rekeying { header_base });
        }
        let mut namespace = self.locked.unlock_key(credential)?;
        namespace.check_data()?;
        let unit = options.unit.unwrap_or(self.placement.unit);
        let placement = Placement { unit, ..self.placement };
        // Not at the opening: until now nothing is written to what may be moved back.
        namespace.settle().map_err(UnlockError::Settle)?;
        namespace.begin_transform(self.source, &placement, credential, options)?;
        Ok(namespace)
    }
}

/// Where the data of a namespace that was written for `old` lies when it begins at byte `start` of the backing, with the
/// tweaks of the old place.
fn source_layout(old: &Placement, start: u64, available_bytes: u64) -> Result<Layout, AdoptError> {
    let overflow =
        GeometryError::Overflow { base: start, data_offset: old.data_offset, size_bytes: old.size_bytes, address: 0 };
    let data_start = start.checked_add(old.data_offset).ok_or(overflow)?;
    let needed_bytes = old.data_offset.checked_add(old.size_bytes).ok_or(overflow)?;
    if needed_bytes > available_bytes {
        return Err(GeometryError::DoesNotFit { needed_bytes, available_bytes }.into());
    }
    let old_start = old.base.checked_add(old.data_offset).ok_or(overflow)?;
    let first_address = old_start.checked_add(old.bound_address.unwrap_or(0)).ok_or(overflow)?;
    Ok(Layout::new(data_start, first_address, old.size_bytes, old.unit)?)
}

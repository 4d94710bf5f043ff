//! What kind of transform a header tells of, for who decides what may be done meanwhile.

use super::geometry::Geometry;
use super::metadata::Metadata;
use super::open::LockedNamespace;
use super::unlocked::Namespace;

/// Why the data of a namespace is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransformKind {
    /// It gets a new volume key, cipher or unit where it lies.
    Rekey,
    /// It moves towards the start of its region.
    Slide,
    /// It was moved as ciphertext, and gets the tweaks of its present place.
    Adoption,
}

fn kind(metadata: &Metadata, geometry: &Geometry) -> Option<TransformKind> {
    let transform = metadata.transform.as_ref()?;
    if transform.former_base().is_some() {
        return Some(TransformKind::Slide);
    }
    let stays = transform.first_address() == geometry.layout().first_address();
    Some(if stays { TransformKind::Rekey } else { TransformKind::Adoption })
}

impl LockedNamespace {
    /// The transform that the header tells of. Nothing is authenticated yet.
    #[must_use]
    pub fn transform_kind(&self) -> Option<TransformKind> {
        kind(self.metadata(), self.geometry())
    }

    /// Whether the header says that the transform rests until somebody asks for more. Nothing is authenticated yet.
    #[must_use]
    pub fn transform_paused(&self) -> bool {
        self.metadata().transform.as_ref().is_some_and(super::transform::Transform::paused)
    }
}

impl Namespace {
    /// The transform that is under way.
    #[must_use]
    pub fn transform_kind(&self) -> Option<TransformKind> {
        kind(&self.metadata, &self.geometry)
    }
}

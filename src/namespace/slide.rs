//! Sliding: a namespace of a region moves towards the region's start, into the free space right before it and over its own
//! old place if it is longer than that.
//!
//! Header and table are in different places, and no power cut may leave one that does not fit the other. So nothing that is
//! in force is changed but once, by the table, which is old or new at every instant:
//!
//! 1. The new header, with a transform of which nothing is done, goes to the new start, which is free space: nobody looks
//!    there. The old header is in force, and a crash leaves it and, in free space, a header that opens the volume key in force
//!    with the credential of the slide: the same slide again overwrites it. An error leaves none.
//! 2. The table lets the partition begin at the new start and end at the old end. Before that instant the old header opens,
//!    after it the new one does, and both find all data where it was: the new one by its transform.
//! 3. The transform begins like every other: before the first window moves, the old header is wiped (`former_base` in the new
//!    one says where), so that its key slots do not stay behind in what becomes data or free space.
//! 4. When all windows have moved and the transform has ended, the partition is made as short as the namespace is. A crash
//!    before that leaves space unused.
//!
//! The new header needs room of its own before the old one: at least a header area. Partitions of a region lie at multiples
//! of that, so any free space before one is enough. A detached header has no place that the table could switch: what it
//! belongs to cannot slide.

use std::ops::Range;
use std::sync::Arc;

use super::geometry::HEADER_AREA_BYTES;
use super::kdf::Credential;
use super::region::{Region, RegionError};
use super::site::Site;
use super::transform::{RekeyOptions, TransformError};
use super::unlocked::Namespace;

/// Why a namespace did not begin to slide.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlideError {
    /// The partition is another one than that of the namespace: the table was changed in between.
    #[error("its partition is bytes {} to {}, but it was opened at {} to {}", actual.start, actual.end, opened.start, opened.end)]
    Changed {
        /// The partition in the table.
        actual: Range<u64>,
        /// Where the namespace was opened.
        opened: Range<u64>,
    },
    /// There is no free space before it, or less than a header needs.
    #[error("there is no room for a header between byte {start} and byte {present}")]
    NoRoom {
        /// Where it was to begin.
        start: u64,
        /// Where it begins.
        present: u64,
    },
    /// Its header is not in front of its data.
    #[error("its header is detached")]
    Detached,
    /// The table cannot be changed.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The transform could not begin.
    #[error(transparent)]
    Transform(#[from] TransformError),
}

/// Begins to move the namespace `name` of `region` to `start`, where the free space right before it begins, under a new
/// volume key. When this returns it is there, with its partition, and a volume's transform brings the data; the partition
/// is to be made shorter after that. The caller has the table and all bytes from `start` on locked.
///
/// # Errors
///
/// [`SlideError`]. The namespace is as it was, unless the table could not be written.
pub fn begin_slide(
    region: &mut Region,
    name: &str,
    namespace: Namespace,
    start: u64,
    credential: &Credential,
    options: &RekeyOptions,
) -> Result<Namespace, SlideError> {
    let site = namespace.site();
    let opened = site.start()..site.start() + site.available_bytes();
    let actual = region.find(name)?.range;
    if actual != opened {
        return Err(SlideError::Changed { actual, opened });
    }
    if site.is_detached() {
        return Err(SlideError::Detached);
    }
    let present = opened.start;
    let has_room = start.checked_add(HEADER_AREA_BYTES).is_some_and(|end| end <= present);
    if !has_room || start != region.earliest_start(&opened) {
        return Err(SlideError::NoRoom { start, present });
    }
    let new_site = Site::part(Arc::clone(site.data()), start, opened.end - start);
    let area = new_site.area();
    let result = namespace.begin_at(new_site, credential, options).map_err(SlideError::from).and_then(|moving| {
        region.begin_earlier(name, start)?;
        Ok(moving)
    });
    if let (Err(_), Some(mut area)) = (&result, area)
        && is_still_at(region, name, present)
    {
        // The header there opens the volume key that stays in force.
        let _ = area.clear(); // the first error is the one to report
    }
    result
}

/// Whether the table on media has the namespace where it was.
fn is_still_at(region: &Region, name: &str, start: u64) -> bool {
    let on_media = Region::open(Arc::clone(region.backing()));
    on_media.and_then(|region| region.find(name)).is_ok_and(|partition| partition.range.start == start)
}

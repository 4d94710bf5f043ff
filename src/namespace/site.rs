//! Where a namespace is, or is to be: a part of a backing, and another backing for the header when that is detached.
//!
//! A site is bounded by its backing. When that is a partition of the kernel's, the base still counts from the start of the
//! disk, so that the partition and the disk show the same namespace. What lies there is not looked at.

use std::sync::Arc;

use super::area::HeaderArea;
use super::geometry::HEADER_AREA_BYTES;
use crate::pmem::Backing;

/// A part of a backing, and the backing of the header.
#[derive(Clone, Debug)]
pub struct Site {
    data: Arc<Backing>,
    /// Where in `data` it begins.
    start: u64,
    available_bytes: u64,
    header: Option<Arc<Backing>>,
    /// Whether the data is taken for that of the header, whatever it says itself.
    accepts_data: bool,
}

impl Site {
    /// All of a backing.
    #[must_use]
    pub fn whole(data: Arc<Backing>) -> Self {
        Self::part(data, 0, u64::MAX)
    }

    /// The `available_bytes` from byte `start` of the backing on, or what the backing has of them: a partition.
    #[must_use]
    pub fn part(data: Arc<Backing>, start: u64, available_bytes: u64) -> Self {
        let available_bytes = available_bytes.min(data.len_bytes().saturating_sub(start));
        Self { data, start, available_bytes, header: None, accepts_data: false }
    }

    /// The same with the header at the start of `header`, if there is one: a detached header.
    #[must_use]
    pub fn with_header(self, header: Option<Arc<Backing>>) -> Self {
        Self { header, ..self }
    }

    /// The same where the user vouches for the data: it is taken for that of the detached header even if it has not the tag
    /// of it. Who then opens it for writing gives it its tag.
    #[must_use]
    pub fn accepting_data(self, accepts_data: bool) -> Self {
        Self { accepts_data, ..self }
    }

    pub(super) const fn accepts_data(&self) -> bool {
        self.accepts_data
    }

    /// The backing of the data.
    #[must_use]
    pub const fn data(&self) -> &Arc<Backing> {
        &self.data
    }

    /// Where in that backing the namespace begins.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Where the backing begins on its disk; see [`Backing::disk_offset`].
    #[must_use]
    pub fn origin(&self) -> u64 {
        self.data.disk_offset()
    }

    /// The base: where the namespace begins, counted from the start of the disk when the backing is a partition of one.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.origin().saturating_add(self.start)
    }

    /// The physical address of the first byte of the backing, or of the disk that it is a partition of.
    #[must_use]
    pub fn physical_address(&self) -> Option<u64> {
        self.data.physical_address().and_then(|address| address.checked_sub(self.origin()))
    }

    /// How many bytes from there on it may use.
    #[must_use]
    pub const fn available_bytes(&self) -> u64 {
        self.available_bytes
    }

    /// Whether the header is in another backing.
    #[must_use]
    pub const fn is_detached(&self) -> bool {
        self.header.is_some()
    }

    /// The backing that holds the header, and where in it the header area begins.
    #[must_use]
    pub fn header_place(&self) -> (&Arc<Backing>, u64) {
        self.header.as_ref().map_or((&self.data, self.start), |header| (header, 0))
    }

    /// How many bytes there are where the header is.
    #[must_use]
    pub fn header_available_bytes(&self) -> u64 {
        self.header.as_ref().map_or(self.available_bytes, |header| header.len_bytes())
    }

    /// The header area, when there is room for one.
    pub(super) fn area(&self) -> Option<HeaderArea> {
        let (backing, start) = self.header_place();
        let has_room = self.header_available_bytes() >= HEADER_AREA_BYTES;
        HeaderArea::new(Arc::clone(backing), start).filter(|_| has_room)
    }

    /// Takes note that more (or less) of the backing may be used.
    pub(super) fn set_available_bytes(&mut self, available_bytes: u64) {
        self.available_bytes = available_bytes.min(self.data.len_bytes().saturating_sub(self.start));
    }
}

//! In the place of `sim` where the feature is off: a simulated medium without values, so that no backing can have one.

use std::ops::Range;

use super::backing::BackingExtent;
use super::error::MediaError;
use super::mapping::Mapping;
use crate::memory::Target;

/// A medium in memory that loses what was not flushed. Without the feature `sim` there is none.
#[derive(Debug)]
pub(super) enum SimMedium {}

impl SimMedium {
    pub(super) const fn owes_blocks(&self) -> bool {
        match *self {}
    }

    pub(super) const fn check(&self) -> Result<(), MediaError> {
        match *self {}
    }

    pub(super) fn write<R>(
        &self,
        _mapping: &Mapping,
        _span: &Range<usize>,
        _f: impl FnOnce(Target<'_>) -> R,
    ) -> Result<R, MediaError> {
        match *self {}
    }

    pub(super) const fn streamed(&self, _range: &Range<u64>) {
        match *self {}
    }

    pub(super) const fn flush(&self, _range: &Range<u64>) -> Result<(), MediaError> {
        match *self {}
    }

    pub(super) const fn drain(&self) -> Result<(), MediaError> {
        match *self {}
    }

    pub(super) const fn sync_all(&self, _len_bytes: u64) -> Result<(), MediaError> {
        match *self {}
    }

    pub(super) const fn allocate(&self) -> Result<(), MediaError> {
        match *self {}
    }

    pub(super) const fn punch_hole(&self, _mapping: &Mapping, _span: &Range<usize>) -> Result<(), MediaError> {
        match *self {}
    }

    pub(super) const fn grow(&self, _len_bytes: u64) -> Result<(), MediaError> {
        match *self {}
    }

    pub(super) const fn extents(&self, _mapping: &Mapping, _span: &Range<usize>) -> Vec<BackingExtent> {
        match *self {}
    }
}

//! Where the data of a volume lies and which tweaks cover it, without the namespace around it.
//!
//! A transform leads from one layout to another. For data at its proper place both numbers of a layout agree with the
//! [`Geometry`]; for data that was moved as ciphertext the tweaks are still those of the old place.

use std::ops::Range;

use super::{DataUnit, Geometry, GeometryError, OutOfRange, TWEAK_STEP_BYTES, TweakValue, check_size};

/// A checked layout: all arithmetic on it is in range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    data_start: u64,
    /// The physical offset, with the bound address, that the tweaks of the first unit stand for.
    first_address: u64,
    size_bytes: u64,
    unit: DataUnit,
}

impl Layout {
    /// Checks the numbers of a layout; whether it fits its backing is the caller's question.
    ///
    /// # Errors
    ///
    /// A [`GeometryError`] for the size, for a place that is not a multiple of 512 bytes, for tweaks that do not begin at
    /// a data unit, and for sums of 2^64 or more.
    pub fn new(data_start: u64, first_address: u64, size_bytes: u64, unit: DataUnit) -> Result<Self, GeometryError> {
        let unit_bytes = unit.bytes();
        check_size(size_bytes, unit)?;
        if !data_start.is_multiple_of(TWEAK_STEP_BYTES) {
            return Err(GeometryError::DataNotAligned { data_start, alignment_bytes: TWEAK_STEP_BYTES });
        }
        if !first_address.is_multiple_of(u64::from(unit_bytes)) {
            return Err(GeometryError::AddressNotAligned { address: first_address, unit_bytes });
        }
        let overflow = GeometryError::Overflow { base: data_start, data_offset: 0, size_bytes, address: first_address };
        data_start.checked_add(size_bytes).ok_or(overflow)?;
        first_address.checked_add(size_bytes).ok_or(overflow)?;
        Ok(Self { data_start, first_address, size_bytes, unit })
    }

    /// Byte offset in the backing where the data begins.
    #[must_use]
    pub const fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The physical offset, with the bound address, that the tweaks of the first unit stand for.
    #[must_use]
    pub const fn first_address(&self) -> u64 {
        self.first_address
    }

    /// Size of the data in bytes: a multiple of the data unit.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The data unit.
    #[must_use]
    pub const fn unit(&self) -> DataUnit {
        self.unit
    }

    /// The bytes of the backing that hold the `logical` range of the volume.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`] when the range is reversed or reaches past the end.
    #[inline]
    pub fn physical_range(&self, logical: Range<u64>) -> Result<Range<u64>, OutOfRange> {
        if logical.start > logical.end || logical.end > self.size_bytes {
            return Err(OutOfRange { start: logical.start, end: logical.end, size_bytes: self.size_bytes });
        }
        Ok(self.data_start + logical.start..self.data_start + logical.end)
    }

    /// The tweak value of the data unit that holds the byte at `logical_offset`.
    ///
    /// # Panics
    ///
    /// Panics when the offset is not within the data: ask [`Self::physical_range`] first.
    #[inline]
    #[must_use]
    pub fn tweak_at(&self, logical_offset: u64) -> TweakValue {
        assert!(logical_offset < self.size_bytes, "byte {logical_offset} of {} has no tweak", self.size_bytes);
        let unit_bytes = u64::from(self.unit.bytes());
        let unit_address = self.first_address + (logical_offset - logical_offset % unit_bytes);
        TweakValue(unit_address / TWEAK_STEP_BYTES)
    }
}

impl Geometry {
    /// Where the data lies and which tweaks cover it.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout {
            data_start: self.data_start(),
            // Not from the place: the tweaks of other formats begin elsewhere.
            first_address: self.first_tweak * TWEAK_STEP_BYTES,
            size_bytes: self.size_bytes,
            unit: self.unit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Placement, SIZE_BYTES_MAX};
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_geometry_and_its_layout_agree() {
        for (unit, bound_address) in [(DataUnit::Bytes4096, None), (DataUnit::Bytes512, Some(5 * MIB))] {
            let (base, data_offset, size_bytes) = (MIB, 3 * MIB, MIB);
            let placement =
                Placement { origin: 0, base, data_offset, size_bytes, unit, bound_address, detached: false };
            let geometry = Geometry::new(&placement, 8 * MIB).unwrap();
            let layout = geometry.layout();
            assert_eq!(layout, Layout::new(4 * MIB, 4 * MIB + bound_address.unwrap_or(0), size_bytes, unit).unwrap());
            for offset in [0, 511, 512, 4095, 4096, 5000, MIB - 1] {
                assert_eq!(layout.tweak_at(offset), geometry.tweak_at(offset));
                assert_eq!(layout.physical_range(offset..MIB), geometry.physical_range(offset..MIB));
            }
        }
    }

    #[test]
    fn data_that_was_moved_keeps_the_tweaks_of_its_old_place() {
        let moved = Layout::new(6 * MIB, 2 * MIB, MIB, DataUnit::Bytes4096).unwrap();
        assert_eq!(moved.physical_range(0..4096).unwrap(), 6 * MIB..6 * MIB + 4096);
        assert_eq!(moved.tweak_at(4096).value(), (2 * MIB + 4096) / 512);
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let unit = DataUnit::Bytes4096;
        assert_eq!(Layout::new(0, 0, 0, unit), Err(GeometryError::Empty));
        assert!(matches!(Layout::new(0, 0, 512, unit), Err(GeometryError::SizeNotInUnits { .. })));
        assert!(matches!(Layout::new(0, 0, SIZE_BYTES_MAX + 4096, unit), Err(GeometryError::SizeAboveKeyLimit { .. })));
        assert!(matches!(Layout::new(100, 0, 4096, unit), Err(GeometryError::DataNotAligned { .. })));
        assert!(matches!(Layout::new(0, 512, 4096, unit), Err(GeometryError::AddressNotAligned { .. })));
        for (start, address) in [(u64::MAX - 511, 0), (0, u64::MAX - 4095)] {
            assert!(matches!(Layout::new(start, address, 4096, unit), Err(GeometryError::Overflow { .. })));
        }
    }
}

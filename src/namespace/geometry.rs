//! Where the bytes of a namespace lie, and which tweak value covers them.
//!
//! This is the only place that turns a logical offset into a physical one and a physical offset into a tweak value. A
//! [`Geometry`] exists only after every check, so nothing that uses one can overflow or leave the backing.
//!
//! It knows nothing about headers, keys or files.

mod error;
mod layout;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use error::{GeometryError, OutOfRange};
pub use layout::Layout;

/// Size of the header area at the start of a namespace, in bytes.
pub const HEADER_AREA_BYTES: u64 = 2 << 20;

/// Alignment of the start of the data in the backing, in bytes: a huge page, so that a DAX fault can map one.
pub const DATA_ALIGNMENT_BYTES: u64 = 2 << 20;

/// The largest data area under one key, in bytes: 2^44 AES blocks (IEEE 1619-2018, section 5.1).
pub const SIZE_BYTES_MAX: u64 = 1 << 48;

/// The data area size in bytes above which a warning is due: 2^36 AES blocks.
pub const SIZE_BYTES_WARN: u64 = 1 << 40;

/// Alignment of the data of other formats in the backing, in bytes: a page.
const FOREIGN_ALIGNMENT_BYTES: u64 = 4096;

/// What a tweak value counts: units of 512 bytes, whatever the data unit is (dm-crypt's plain64 without
/// `iv_large_sectors`).
const TWEAK_STEP_BYTES: u64 = 512;

/// The bytes that one XTS tweak covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum DataUnit {
    /// 512 bytes.
    Bytes512,
    /// 4096 bytes, the default.
    Bytes4096,
}

impl DataUnit {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Bytes512 => 512,
            Self::Bytes4096 => 4096,
        }
    }
}

impl From<DataUnit> for u32 {
    fn from(unit: DataUnit) -> Self {
        unit.bytes()
    }
}

impl TryFrom<u32> for DataUnit {
    type Error = GeometryError;

    fn try_from(bytes: u32) -> Result<Self, GeometryError> {
        match bytes {
            512 => Ok(Self::Bytes512),
            4096 => Ok(Self::Bytes4096),
            unit_bytes => Err(GeometryError::Unit { unit_bytes }),
        }
    }
}

/// The number that the XTS tweak of a data unit encodes (little-endian, in 16 bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TweakValue(u64);

impl TweakValue {
    /// The number.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }
}

/// The numbers that a [`Geometry`] is made of, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where on its disk the first byte of the backing is: 0, unless the backing is a partition of the kernel's. It is not
    /// in the header, because the same namespace is reached through the partition and through the disk.
    pub origin: u64,
    /// Byte offset where the namespace begins: in the backing, or when that is a partition, on its disk.
    pub base: u64,
    /// Bytes from the base to the data: at least the header area, unless the header is detached.
    pub data_offset: u64,
    /// Size of the data area in bytes.
    pub size_bytes: u64,
    /// The data unit.
    pub unit: DataUnit,
    /// Physical address of the backing's first byte when tweaks are bound to it.
    pub bound_address: Option<u64>,
    /// Whether the header is in another file.
    pub detached: bool,
}

/// A checked placement: all arithmetic on it is in range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    origin: u64,
    base: u64,
    data_offset: u64,
    size_bytes: u64,
    unit: DataUnit,
    bound_address: Option<u64>,
    detached: bool,
    /// Tweak value of the unit at logical offset 0.
    first_tweak: u64,
}

impl Geometry {
    /// Checks a placement against the `available_bytes` from its base to the end of its backing or partition.
    ///
    /// # Errors
    ///
    /// Every rule of `format.md`, "Geometry", has its own [`GeometryError`].
    pub fn new(placement: &Placement, available_bytes: u64) -> Result<Self, GeometryError> {
        let Placement { origin, base, data_offset, size_bytes, unit, bound_address, detached } = *placement;
        let unit_bytes = unit.bytes();
        check_size(size_bytes, unit)?;
        if !detached && data_offset < HEADER_AREA_BYTES {
            return Err(GeometryError::DataInHeader { data_offset, header_bytes: HEADER_AREA_BYTES });
        }
        if base < origin {
            return Err(GeometryError::BeforePartition { base, origin });
        }
        let address = bound_address.unwrap_or(0);
        if !address.is_multiple_of(u64::from(unit_bytes)) {
            return Err(GeometryError::AddressNotAligned { address, unit_bytes });
        }
        let overflow = GeometryError::Overflow { base, data_offset, size_bytes, address };
        let data_start = base.checked_add(data_offset).ok_or(overflow)?;
        let first_address = data_start.checked_add(address).ok_or(overflow)?;
        first_address.checked_add(size_bytes).ok_or(overflow)?;
        if !data_start.is_multiple_of(DATA_ALIGNMENT_BYTES) {
            return Err(GeometryError::DataNotAligned { data_start, alignment_bytes: DATA_ALIGNMENT_BYTES });
        }
        let needed_bytes = data_offset.checked_add(size_bytes).ok_or(overflow)?;
        if needed_bytes > available_bytes {
            return Err(GeometryError::DoesNotFit { needed_bytes, available_bytes });
        }
        let first_tweak = first_address / TWEAK_STEP_BYTES;
        Ok(Self { origin, base, data_offset, size_bytes, unit, bound_address, detached, first_tweak })
    }

    /// The geometry of a volume whose format is not ours: its data begins at `data_start` of the backing, and the tweak of
    /// its first unit is `first_tweak`, wherever that is. `available_bytes` are those from `data_start` on.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; the data must begin at a multiple of 4096 bytes, so that it can be mapped.
    pub fn foreign(
        data_start: u64,
        size_bytes: u64,
        unit: DataUnit,
        first_tweak: u64,
        available_bytes: u64,
    ) -> Result<Self, GeometryError> {
        if !data_start.is_multiple_of(FOREIGN_ALIGNMENT_BYTES) {
            return Err(GeometryError::DataNotAligned { data_start, alignment_bytes: FOREIGN_ALIGNMENT_BYTES });
        }
        let address = first_tweak.saturating_mul(TWEAK_STEP_BYTES);
        let overflow = GeometryError::Overflow { base: 0, data_offset: data_start, size_bytes, address };
        data_start.checked_add(size_bytes).ok_or(overflow)?;
        let first_address = first_tweak.checked_mul(TWEAK_STEP_BYTES).ok_or(overflow)?;
        first_address.checked_add(size_bytes).ok_or(overflow)?;
        // Every other rule is that of a namespace that begins where the data does.
        let placement =
            Placement { origin: 0, base: 0, data_offset: 0, size_bytes, unit, bound_address: None, detached: true };
        let checked = Self::new(&placement, available_bytes)?;
        Ok(Self { data_offset: data_start, first_tweak, ..checked })
    }

    /// Size of the data area in bytes: a multiple of the data unit.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The same with another size, which has been checked against the place.
    pub(crate) const fn with_size(self, size_bytes: u64) -> Self {
        Self { size_bytes, ..self }
    }

    /// The data unit in bytes: 512 or 4096.
    #[must_use]
    pub const fn unit_bytes(&self) -> u32 {
        self.unit.bytes()
    }

    /// The data unit.
    #[must_use]
    pub const fn unit(&self) -> DataUnit {
        self.unit
    }

    /// Byte offset where the namespace begins: in the backing, or when that is a partition, on its disk.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Bytes from the base to the data: at least the header area, unless the header is detached.
    #[must_use]
    pub const fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Byte offset in the backing where the data begins.
    #[must_use]
    pub const fn data_start(&self) -> u64 {
        self.base - self.origin + self.data_offset
    }

    /// Physical address of the backing's first byte, when tweaks are bound to it.
    #[must_use]
    pub const fn bound_address(&self) -> Option<u64> {
        self.bound_address
    }

    /// The numbers that this geometry was made of.
    #[must_use]
    pub const fn placement(&self) -> Placement {
        Placement {
            origin: self.origin,
            base: self.base,
            data_offset: self.data_offset,
            size_bytes: self.size_bytes,
            unit: self.unit,
            bound_address: self.bound_address,
            detached: self.detached,
        }
    }

    /// Whether one key encrypts so much that a warning is due (above 2^36 blocks).
    #[must_use]
    pub const fn is_above_warning_limit(&self) -> bool {
        self.size_bytes > SIZE_BYTES_WARN
    }

    /// The bytes of the backing that hold the `logical` range of the volume.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`] when the range is reversed or reaches past the end.
    pub fn physical_range(&self, logical: Range<u64>) -> Result<Range<u64>, OutOfRange> {
        self.layout().physical_range(logical)
    }

    /// The tweak value of the data unit that holds the byte at `logical_offset`.
    ///
    /// The next unit's value is larger by `unit_bytes / 512`.
    ///
    /// # Panics
    ///
    /// Panics when the offset is not within the data area: ask [`Self::physical_range`] first.
    #[must_use]
    pub fn tweak_at(&self, logical_offset: u64) -> TweakValue {
        self.layout().tweak_at(logical_offset)
    }
}

/// Whether data can have this size: whole units, at least one, and not more than one key may encrypt.
fn check_size(size_bytes: u64, unit: DataUnit) -> Result<(), GeometryError> {
    let unit_bytes = unit.bytes();
    if size_bytes == 0 {
        return Err(GeometryError::Empty);
    }
    if !size_bytes.is_multiple_of(u64::from(unit_bytes)) {
        return Err(GeometryError::SizeNotInUnits { size_bytes, unit_bytes });
    }
    if size_bytes > SIZE_BYTES_MAX {
        return Err(GeometryError::SizeAboveKeyLimit { size_bytes, max_bytes: SIZE_BYTES_MAX });
    }
    Ok(())
}

/// The offset of the data from `base` for a namespace with its header in front: past the header area, at the next
/// 2 MiB boundary of the backing.
///
/// # Errors
///
/// [`GeometryError::Overflow`] when there is no such boundary below 2^64.
pub fn data_offset_for(base: u64) -> Result<u64, GeometryError> {
    let overflow = GeometryError::Overflow { base, data_offset: HEADER_AREA_BYTES, size_bytes: 0, address: 0 };
    let header_end = base.checked_add(HEADER_AREA_BYTES).ok_or(overflow)?;
    let data_start = header_end.checked_next_multiple_of(DATA_ALIGNMENT_BYTES).ok_or(overflow)?;
    Ok(data_start - base)
}

/// The offset of the data from `base` for a namespace whose header is detached: at the next 2 MiB boundary of the backing,
/// which is the base itself in most cases.
///
/// # Errors
///
/// [`GeometryError::Overflow`] when there is no such boundary below 2^64.
pub fn detached_data_offset_for(base: u64) -> Result<u64, GeometryError> {
    let data_start = base.checked_next_multiple_of(DATA_ALIGNMENT_BYTES);
    let data_start = data_start.ok_or(GeometryError::Overflow { base, data_offset: 0, size_bytes: 0, address: 0 })?;
    Ok(data_start - base)
}

/// The largest data area that fits behind `data_offset` into `available_bytes`.
///
/// # Errors
///
/// [`GeometryError::NoRoom`] when not even one unit fits.
pub fn size_that_fits(data_offset: u64, available_bytes: u64, unit: DataUnit) -> Result<u64, GeometryError> {
    let unit_bytes = u64::from(unit.bytes());
    let room = available_bytes.saturating_sub(data_offset);
    let size_bytes = room - room % unit_bytes;
    if size_bytes == 0 {
        return Err(GeometryError::NoRoom { available_bytes, header_bytes: data_offset });
    }
    Ok(size_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn placement() -> Placement {
        Placement {
            origin: 0,
            base: 0,
            data_offset: 2 * MIB,
            size_bytes: 8 * MIB,
            unit: DataUnit::Bytes4096,
            bound_address: None,
            detached: false,
        }
    }

    #[test]
    fn data_follows_the_header_and_the_tweak_is_the_physical_offset() {
        let geometry = Geometry::new(&placement(), 10 * MIB).unwrap();
        assert_eq!(geometry.physical_range(0..10), Ok(2 * MIB..2 * MIB + 10));
        assert_eq!(geometry.tweak_at(0).value(), 2 * MIB / 512);
        assert_eq!(geometry.tweak_at(4095).value(), 2 * MIB / 512);
        assert_eq!(geometry.tweak_at(4096).value(), 2 * MIB / 512 + 8);
    }

    #[test]
    fn base_and_bound_address_shift_the_tweak() {
        let moved = Placement { base: 64 * MIB, bound_address: Some(16 << 30), ..placement() };
        let geometry = Geometry::new(&moved, 10 * MIB).unwrap();
        assert_eq!(geometry.physical_range(0..0), Ok(66 * MIB..66 * MIB));
        assert_eq!(geometry.tweak_at(0).value(), ((16 << 30) + 66 * MIB) / 512);
    }

    #[test]
    fn a_foreign_volume_begins_with_its_own_tweak() {
        let geometry = Geometry::foreign(16 * MIB + 4096, 8 * MIB, DataUnit::Bytes512, 0, 8 * MIB).unwrap();
        assert_eq!(geometry.physical_range(512..1024), Ok(16 * MIB + 4608..16 * MIB + 5120));
        assert_eq!((geometry.tweak_at(0).value(), geometry.tweak_at(512).value()), (0, 1));
        assert_eq!((geometry.layout().tweak_at(0).value(), geometry.layout().tweak_at(512).value()), (0, 1));
        let foreign = |start, size, tweak, available| {
            Geometry::foreign(start, size, DataUnit::Bytes4096, tweak, available).unwrap_err()
        };
        assert!(matches!(foreign(512, 4096, 0, 1 << 20), GeometryError::DataNotAligned { alignment_bytes: 4096, .. }));
        assert!(matches!(foreign(4096, 8192, 0, 4096), GeometryError::DoesNotFit { .. }));
        assert_eq!(foreign(4096, 0, 0, 4096), GeometryError::Empty);
        assert!(matches!(foreign(u64::MAX - 4095, 4096, 0, 4096), GeometryError::Overflow { .. }));
        assert!(matches!(foreign(0, 4096, u64::MAX, 4096), GeometryError::Overflow { .. }));
    }

    #[test]
    fn a_range_past_the_end_or_reversed_is_refused() {
        let geometry = Geometry::new(&placement(), 10 * MIB).unwrap();
        assert!(geometry.physical_range(0..8 * MIB).is_ok());
        let past = OutOfRange { start: 0, end: 8 * MIB + 1, size_bytes: 8 * MIB };
        assert_eq!(geometry.physical_range(0..8 * MIB + 1), Err(past));
        let reversed = Range { start: 5, end: 4 };
        assert_eq!(geometry.physical_range(reversed), Err(OutOfRange { start: 5, end: 4, size_bytes: 8 * MIB }));
        assert!(geometry.physical_range(u64::MAX..u64::MAX).is_err());
    }

    #[test]
    #[should_panic(expected = "has no tweak")]
    fn a_byte_past_the_end_has_no_tweak() {
        let _ = Geometry::new(&placement(), 10 * MIB).unwrap().tweak_at(8 * MIB);
    }

    #[test]
    fn every_rule_has_its_error() {
        let refused = |change: &dyn Fn(&mut Placement)| {
            let mut changed = placement();
            change(&mut changed);
            Geometry::new(&changed, 10 * MIB).unwrap_err()
        };
        assert_eq!(refused(&|p| p.size_bytes = 0), GeometryError::Empty);
        let unit_bytes = 4096;
        let size_bytes = 4096 + 512;
        assert_eq!(refused(&|p| p.size_bytes = size_bytes), GeometryError::SizeNotInUnits { size_bytes, unit_bytes });
        let size_bytes = SIZE_BYTES_MAX + 4096;
        let max_bytes = SIZE_BYTES_MAX;
        assert_eq!(refused(&|p| p.size_bytes = size_bytes), GeometryError::SizeAboveKeyLimit { size_bytes, max_bytes });
        let header_bytes = HEADER_AREA_BYTES;
        for data_offset in [0, 4096, 2 * MIB - 1] {
            assert_eq!(
                refused(&|p| p.data_offset = data_offset),
                GeometryError::DataInHeader { data_offset, header_bytes }
            );
        }
        let alignment_bytes = DATA_ALIGNMENT_BYTES;
        let data_start = 3 * MIB;
        assert_eq!(refused(&|p| p.base = MIB), GeometryError::DataNotAligned { data_start, alignment_bytes });
        assert_eq!(
            refused(&|p| p.data_offset = data_start),
            GeometryError::DataNotAligned { data_start, alignment_bytes }
        );
        assert_eq!(
            refused(&|p| p.bound_address = Some(512)),
            GeometryError::AddressNotAligned { address: 512, unit_bytes }
        );
        assert_eq!(
            refused(&|p| p.size_bytes = 8 * MIB + 4096),
            GeometryError::DoesNotFit { needed_bytes: 10 * MIB + 4096, available_bytes: 10 * MIB }
        );
        assert_eq!(DataUnit::try_from(1024), Err(GeometryError::Unit { unit_bytes: 1024 }));
    }

    #[test]
    fn sums_past_64_bits_are_refused() {
        for overflowing in [
            Placement { base: u64::MAX - MIB, ..placement() },
            Placement { data_offset: u64::MAX - 1, base: 2, ..placement() },
            Placement { data_offset: u64::MAX - MIB + 1, ..placement() },
            Placement { bound_address: Some(u64::MAX - 4095), ..placement() },
        ] {
            let refused = Geometry::new(&overflowing, u64::MAX).unwrap_err();
            assert!(matches!(refused, GeometryError::Overflow { .. }), "{overflowing:?}: {refused}");
        }
        assert!(data_offset_for(u64::MAX - MIB).is_err());
        assert!(data_offset_for(u64::MAX - 4 * MIB).is_ok());
    }

    #[test]
    fn data_starts_at_a_huge_page_whatever_the_base() {
        assert_eq!(data_offset_for(0), Ok(2 * MIB));
        assert_eq!(data_offset_for(MIB), Ok(3 * MIB));
        assert_eq!(data_offset_for(2 * MIB), Ok(2 * MIB));
        assert_eq!(data_offset_for(2 * MIB + 512), Ok(4 * MIB - 512));
    }

    #[test]
    fn a_whole_backing_is_used_down_to_a_unit() {
        assert_eq!(size_that_fits(2 * MIB, 2 * MIB + 8191, DataUnit::Bytes4096), Ok(4096));
        assert_eq!(size_that_fits(2 * MIB, 2 * MIB + 8191, DataUnit::Bytes512), Ok(7680));
        for available_bytes in [0, 2 * MIB, 2 * MIB + 4095] {
            assert_eq!(
                size_that_fits(2 * MIB, available_bytes, DataUnit::Bytes4096),
                Err(GeometryError::NoRoom { available_bytes, header_bytes: 2 * MIB })
            );
        }
    }

    proptest! {
        #[test]
        fn no_numbers_make_it_overflow(
            base: u64, data_offset: u64, size_bytes: u64, address: Option<u64>, detached: bool, available: u64,
            large: bool,
        ) {
            let unit = if large { DataUnit::Bytes4096 } else { DataUnit::Bytes512 };
            for mask in [u64::MAX, !(2 * MIB - 1), (1 << 40) - 4096] {
                let placement = Placement {
                    origin: 0,
                    base: base & mask,
                    data_offset: data_offset & mask,
                    size_bytes: size_bytes & mask,
                    unit,
                    bound_address: address.map(|a| a & mask),
                    detached,
                };
                if let Ok(geometry) = Geometry::new(&placement, available) {
                    let last = geometry.size_bytes() - 1;
                    let physical = geometry.physical_range(last..last + 1).unwrap();
                    prop_assert!(physical.end - geometry.base() <= available);
                    let unit_start = physical.start - physical.start % u64::from(geometry.unit_bytes());
                    let address = placement.bound_address.unwrap_or(0);
                    prop_assert_eq!(geometry.tweak_at(last).value(), (unit_start + address) / 512);
                }
            }
        }
    }
}

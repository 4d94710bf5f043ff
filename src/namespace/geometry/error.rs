//! Why numbers are no geometry, or a range is not within one.

/// A logical range that is not within the data area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {start}..{end} are not within the {size_bytes} bytes of the volume")]
pub struct OutOfRange {
    /// First byte asked for.
    pub start: u64,
    /// One past the last byte asked for.
    pub end: u64,
    /// Size of the data area.
    pub size_bytes: u64,
}

/// Why numbers are not the geometry of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// The data unit is neither 512 nor 4096 bytes.
    #[error("a data unit of {unit_bytes} bytes is not supported, only 512 and 4096")]
    Unit {
        /// The unit given.
        unit_bytes: u32,
    },
    /// There is no data area.
    #[error("the size is 0 bytes")]
    Empty,
    /// The size is not a whole number of data units.
    #[error(
        "the size of {size_bytes} bytes is not a multiple of the data unit of {unit_bytes} bytes: {below} and {above} are",
        below = size_bytes - size_bytes % u64::from(*unit_bytes),
        above = size_bytes.saturating_add(u64::from(*unit_bytes) - size_bytes % u64::from(*unit_bytes))
    )]
    SizeNotInUnits {
        /// The size given.
        size_bytes: u64,
        /// The data unit.
        unit_bytes: u32,
    },
    /// One key must not encrypt as many blocks.
    #[error("the size of {size_bytes} bytes is above {max_bytes} bytes (2^44 blocks), the limit for one key")]
    SizeAboveKeyLimit {
        /// The size given.
        size_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// The data would begin inside the header area.
    #[error("the data begins {data_offset} bytes into the namespace, inside the header area of {header_bytes} bytes")]
    DataInHeader {
        /// Offset of the data from the base.
        data_offset: u64,
        /// Size of the header area.
        header_bytes: u64,
    },
    /// The data does not start at a 2 MiB boundary of the backing.
    #[error("the data starts at byte {data_start} of the backing, which is not a multiple of {alignment_bytes}")]
    DataNotAligned {
        /// Start of the data in the backing.
        data_start: u64,
        /// The alignment wanted.
        alignment_bytes: u64,
    },
    /// The physical address that the data is bound to is not a multiple of the data unit.
    #[error("the bound physical address {address:#x} is not a multiple of the data unit of {unit_bytes} bytes")]
    AddressNotAligned {
        /// The address given.
        address: u64,
        /// The data unit.
        unit_bytes: u32,
    },
    /// An offset does not fit into 64 bits.
    #[error(
        "base {base}, data offset {data_offset}, size {size_bytes} and bound address {address} add up to 2^64 or more"
    )]
    Overflow {
        /// Base of the namespace.
        base: u64,
        /// Offset of the data from the base.
        data_offset: u64,
        /// Size of the data area.
        size_bytes: u64,
        /// Bound physical address, 0 when not bound.
        address: u64,
    },
    /// The namespace is larger than its place.
    #[error("the namespace needs {needed_bytes} bytes, but there are {available_bytes} bytes")]
    DoesNotFit {
        /// Bytes from the base to the end of the data.
        needed_bytes: u64,
        /// Bytes from the base to the end of the backing or partition.
        available_bytes: u64,
    },
    /// The namespace would begin in front of its partition.
    #[error("base {base} lies in front of the partition, which begins at byte {origin} of its disk")]
    BeforePartition {
        /// Base of the namespace.
        base: u64,
        /// Where the partition begins.
        origin: u64,
    },
    /// There is no room for even one data unit behind the header area.
    #[error(
        "{available_bytes} bytes are too few: the header area takes {header_bytes} bytes and the data needs one unit"
    )]
    NoRoom {
        /// Bytes from the base to the end of the backing or partition.
        available_bytes: u64,
        /// Bytes before the data.
        header_bytes: u64,
    },
}

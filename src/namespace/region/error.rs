//! What can go wrong with a region.

use std::fmt;
use std::ops::Range;

use crate::pmem::MediaError;

/// Why one copy of a partition table cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableFault {
    /// It cannot be read.
    #[error("it cannot be read")]
    Unreadable(#[from] MediaError),
    /// It does not begin with the signature.
    #[error("it does not begin with the GPT signature")]
    Signature,
    /// The header's checksum is wrong.
    #[error("its header is damaged")]
    Header,
    /// It says that it belongs elsewhere.
    #[error("it belongs at sector {stored}, but is at sector {actual}")]
    Place {
        /// Sector in the header.
        stored: u64,
        /// Where it was found.
        actual: u64,
    },
    /// Entries of another length, or too many of them.
    #[error(
        "it has {entries} entries of {entry_bytes} bytes, and at most {max_entries} of {supported_bytes} are supported"
    )]
    Entries {
        /// Number of entries.
        entries: u32,
        /// Bytes of an entry.
        entry_bytes: u32,
        /// Most entries.
        max_entries: u32,
        /// Bytes of an entry that are supported.
        supported_bytes: u32,
    },
    /// The space for partitions is impossible.
    #[error("its space for partitions, sectors {first} to {last}, is not within the backing")]
    Usable {
        /// The first sector.
        first: u64,
        /// The last sector.
        last: u64,
    },
    /// The entries are outside of the backing, or their checksum is wrong.
    #[error("its entries are damaged")]
    Table,
}

/// Why a backing is not a region, or why a region cannot be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Tables have other sectors.
    #[error("a partition table in sectors of {sector_bytes} bytes is not supported, only 512 and 4096")]
    SectorSize {
        /// Bytes of a sector.
        sector_bytes: u64,
    },
    /// The table on media is not the one that was read, so it was not written over.
    #[error("somebody else changed the partition table after it was read here: nothing was written, try again")]
    Changed,
    /// There is no partition table.
    #[error("this is not a region: there is no GPT partition table")]
    NoTable,
    /// Neither copy of the table can be used.
    #[error(
        "both partition tables are damaged; primary: {}; backup: {}",
        crate::namespace::Chain(primary),
        crate::namespace::Chain(backup)
    )]
    BothTablesDamaged {
        /// What is wrong with the primary one.
        primary: TableFault,
        /// What is wrong with the backup.
        backup: TableFault,
    },
    /// A partition is not where partitions may be.
    #[error("partition {number} takes sectors {first} to {last}, outside of {} to {}", usable.start, usable.end)]
    OutOfBounds {
        /// Its number.
        number: u32,
        /// Its first sector.
        first: u64,
        /// Its last sector.
        last: u64,
        /// Sectors that may be used.
        usable: Range<u64>,
    },
    /// Two partitions share bytes.
    #[error("partitions {first} and {second} overlap: nothing is safe in either")]
    Overlap {
        /// The number of one.
        first: u32,
        /// The number of the other.
        second: u32,
    },
    /// There is no such namespace.
    #[error("there is no namespace {name:?} in the region")]
    NoSuchName {
        /// The name asked for.
        name: String,
    },
    /// Two namespaces have the name.
    #[error("partitions {first} and {second} both have that name")]
    NameTwice {
        /// The number of one.
        first: u32,
        /// The number of the other.
        second: u32,
    },
    /// A namespace has the name already.
    #[error("partition {number} has that name already")]
    NameInUse {
        /// Its number.
        number: u32,
    },
    /// The name is no name.
    #[error(
        "the name has {units} UTF-16 units or a control character; 1 to {max_units} are allowed, and no such characters"
    )]
    Name {
        /// UTF-16 units of the name.
        units: usize,
        /// Most units.
        max_units: usize,
    },
    /// There is no room.
    #[error("{wanted_bytes} bytes do not fit: {}", FreePlaces(free))]
    Full {
        /// Bytes that were wanted.
        wanted_bytes: u64,
        /// What is free.
        free: Vec<Range<u64>>,
    },
    /// All entries of the table are used.
    #[error("all entries of the partition table are used")]
    TableFull,
    /// The backing is too small for a region.
    #[error("a region of {len_bytes} bytes is too small: {min_bytes} are needed for one namespace")]
    TooSmall {
        /// Bytes of the backing.
        len_bytes: u64,
        /// Bytes needed.
        min_bytes: u64,
    },
    /// The media failed.
    #[error("the partition table could not be written")]
    Media(#[from] MediaError),
    /// A table could not be made or written.
    #[error("the partition table could not be written")]
    Write(#[from] gpt::GptError),
    /// The table that was written does not read back.
    #[error("the partition table does not read back as it was written")]
    ReadBack(#[source] TableFault),
}

/// How much is free, and where.
struct FreePlaces<'a>(&'a [Range<u64>]);

impl fmt::Display for FreePlaces<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum: u64 = self.0.iter().map(|place| place.end - place.start).sum();
        write!(f, "{sum} bytes are free")?;
        for (index, place) in self.0.iter().enumerate() {
            let before = if index == 0 { ": " } else { ", " };
            write!(f, "{before}{} bytes at byte {}", place.end - place.start, place.start)?;
        }
        Ok(())
    }
}

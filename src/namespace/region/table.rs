//! The partition table on media: a GPT (UEFI specification 2.10, chapter 5) in two copies, by the `gpt` crate's types.
//!
//! The crate parses and writes headers and entries. What it does not bound is bounded here before it looks, and in which
//! order the copies are written is decided here: one is always whole.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use gpt::GptError;
use gpt::disk::LogicalBlockSize;
use gpt::header::{Header, HeaderBuilder, HeaderError, read_header_from_arbitrary_device};
use gpt::mbr::ProtectiveMBR;
use gpt::partition::{Partition, file_read_partitions};
use uuid::Uuid;

use super::REGION_ALIGNMENT_BYTES;
use super::error::{RegionError, TableFault};
use crate::pmem::Backing;

/// Bytes of an entry; the specification allows others, but nobody writes them.
const ENTRY_BYTES: u32 = 128;

/// Most entries of a table; everybody writes 128.
const ENTRY_COUNT_MAX: u32 = 1024;

const PRIMARY_SECTOR: u64 = 1;

/// What every table of 128 entries lies within, at either end of a backing, whatever its sectors.
const STALE_BYTES: u64 = 64 << 10;

/// A checked table.
#[derive(Debug)]
pub(super) struct Table {
    sector: LogicalBlockSize,
    /// The primary header.
    header: Header,
    /// Where the copies are that can be used: of the primary and of the backup the bytes of the header and of the entries.
    places: [Option<[Range<u64>; 2]>; 2],
    /// The backup is whole and says something else: a change was cut.
    backup_is_older: bool,
    /// By number, from 1; unused entries are left out.
    pub(super) partitions: BTreeMap<u32, Partition>,
    /// What is wrong with the primary and with the backup table.
    faults: [Option<TableFault>; 2],
}

impl Table {
    /// Writes an empty table.
    pub(super) fn create(backing: &Backing, sector_bytes: u64) -> Result<Self, RegionError> {
        let sector = match sector_bytes {
            512 => LogicalBlockSize::Lb512,
            4096 => LogicalBlockSize::Lb4096,
            _ => return Err(RegionError::SectorSize { sector_bytes }),
        };
        let last = backing.len_bytes() / sector.as_u64() - 1;
        let first_usable = REGION_ALIGNMENT_BYTES / sector.as_u64();
        let header = HeaderBuilder::new().backup_lba(last).first_usable(first_usable).build(sector);
        let header = header.map_err(GptError::from)?;
        // A table in sectors of the other size would lie between what is written.
        let len_bytes = backing.len_bytes();
        for range in [0..STALE_BYTES, len_bytes - STALE_BYTES..len_bytes] {
            backing.write(range.clone(), |mut target| target.fill(0))?;
            backing.persist(range)?;
        }
        let mbr = ProtectiveMBR::with_lb_size(u32::try_from(last).unwrap_or(u32::MAX)).to_bytes();
        let first = 0..mbr.len() as u64;
        backing.write(first.clone(), |mut target| target.copy_from(&mbr))?;
        backing.persist(first)?;
        // Nothing of an older table may be left to be relied on.
        let faults = [Some(TableFault::Signature), Some(TableFault::Signature)];
        let (places, partitions) = ([None, None], BTreeMap::new());
        let mut table = Self { sector, header, places, backup_is_older: false, partitions, faults };
        table.write(backing)?;
        Ok(table)
    }

    /// Reads the primary table, or the backup when that is damaged.
    pub(super) fn read(backing: &Backing) -> Result<Self, RegionError> {
        let mut first_faults = None;
        for sector in [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096] {
            let last = (backing.len_bytes() / sector.as_u64()).saturating_sub(1);
            let primary = read_copy(backing, sector, PRIMARY_SECTOR);
            let backup = read_copy(backing, sector, last);
            let places = [&primary, &backup].map(|copy| copy.as_ref().ok().map(|(header, _)| places(header, sector)));
            match (primary, backup) {
                (Ok((header, partitions)), backup) => {
                    let backup_is_older = backup.as_ref().is_ok_and(|(_, older)| *older != partitions);
                    let faults = [None, backup.err()];
                    return Ok(Self { sector, header, places, backup_is_older, partitions, faults });
                }
                (Err(fault), Ok((header, partitions))) => {
                    let header = HeaderBuilder::from_header(&header).primary(true).build(sector);
                    let header = header.map_err(GptError::from)?;
                    let faults = [Some(fault), None];
                    return Ok(Self { sector, header, places, backup_is_older: false, partitions, faults });
                }
                (Err(TableFault::Signature), Err(TableFault::Signature)) => {}
                (Err(primary), Err(backup)) => first_faults = first_faults.or(Some((primary, backup))),
            }
        }
        Err(match first_faults {
            Some((primary, backup)) => RegionError::BothTablesDamaged { primary, backup },
            None => RegionError::NoTable,
        })
    }

    /// Makes durable what was read, with nothing stored: enough when a predecessor was killed, and for who has no lock on
    /// the table.
    pub(super) fn persist(&self, backing: &Backing) -> Result<(), RegionError> {
        for range in self.places.iter().flatten().flatten() {
            backing.persist(range.clone())?;
        }
        Ok(())
    }

    /// Makes durable what was read, also where an earlier write failed: everything is stored again as it is, first the copy
    /// that is relied on. A change that was cut between the copies is finished.
    pub(super) fn confirm(&mut self, backing: &Backing) -> Result<(), RegionError> {
        backing.check_flushes()?;
        for range in self.places.iter().flatten().flatten() {
            let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
            backing.read(range.clone(), |source| source.copy_to(&mut bytes))?;
            backing.write(range.clone(), |mut target| target.copy_from(&bytes))?;
            backing.persist(range.clone())?;
        }
        // A copy that looks damaged may be whole on media, and older: the stores that cut it may not be durable.
        let stale = [self.faults[0].is_some(), self.backup_is_older || self.faults[1].is_some()];
        for (is_primary, stale) in [true, false].into_iter().zip(stale) {
            if stale {
                self.write_copy(backing, is_primary)?;
            }
        }
        self.faults = [None, None];
        self.backup_is_older = false;
        self.places = Self::read(backing)?.places;
        Ok(())
    }

    /// Writes both copies: first the one that nobody relies on, then the other.
    pub(super) fn write(&mut self, backing: &Backing) -> Result<(), RegionError> {
        backing.check_flushes()?;
        let primary_is_relied_on = self.faults[0].is_none();
        for is_primary in [!primary_is_relied_on, primary_is_relied_on] {
            self.write_copy(backing, is_primary)?;
        }
        self.faults = [None, None];
        self.backup_is_older = false;
        self.places = Self::read(backing)?.places;
        Ok(())
    }

    fn write_copy(&self, backing: &Backing, is_primary: bool) -> Result<(), RegionError> {
        let sector = self.sector;
        let built = HeaderBuilder::from_header(&self.header).primary(is_primary).build(sector);
        let mut header = built.map_err(GptError::from)?;
        let entries = entries_range(&header, sector);
        let count = usize::try_from(entries.end - entries.start).unwrap_or(0);
        let mut bytes = Cursor::new(vec![0; count]);
        for (&number, partition) in &self.partitions {
            let index = u64::from(number - 1);
            partition.write_to_device(&mut bytes, index, 0, sector, ENTRY_BYTES).map_err(GptError::from)?;
        }
        backing.write(entries.clone(), |mut target| target.copy_from(bytes.get_ref()))?;
        let device = &mut Stream::new(backing);
        let written =
            if is_primary { header.write_primary(device, sector) } else { header.write_backup(device, sector) };
        written.map_err(GptError::from)?;
        let start = header.current_lba * sector.as_u64();
        // Header and entries are neighbours, and nobody relies on this copy before both are durable.
        backing.persist(entries.start.min(start)..entries.end.max(start + sector.as_u64()))?;
        let (_, stored) = read_copy(backing, sector, header.current_lba).map_err(RegionError::ReadBack)?;
        if stored == self.partitions { Ok(()) } else { Err(RegionError::ReadBack(TableFault::Table)) }
    }

    pub(super) const fn faults(&self) -> [Option<&TableFault>; 2] {
        [self.faults[0].as_ref(), self.faults[1].as_ref()]
    }

    pub(super) const fn disk_guid(&self) -> Uuid {
        self.header.disk_guid
    }

    /// The lowest number that no partition has.
    pub(super) fn free_number(&self) -> Option<u32> {
        (1..=self.header.num_parts).find(|number| !self.partitions.contains_key(number))
    }

    pub(super) const fn usable_sectors(&self) -> Range<u64> {
        self.header.first_usable..self.header.last_usable + 1
    }

    pub(super) const fn usable_bytes(&self) -> Range<u64> {
        let sectors = self.usable_sectors();
        sectors.start * self.sector.as_u64()..sectors.end * self.sector.as_u64()
    }

    /// The bytes of a partition; those of one that is out of bounds are cut, for messages about it.
    pub(super) const fn bytes(&self, partition: &Partition) -> Range<u64> {
        let sector = self.sector.as_u64();
        partition.first_lba.saturating_mul(sector)..partition.last_lba.saturating_add(1).saturating_mul(sector)
    }

    pub(super) const fn sectors(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / self.sector.as_u64()..bytes.end / self.sector.as_u64()
    }
}

/// Reads the copy whose header is in sector `at`.
fn read_copy(
    backing: &Backing,
    sector: LogicalBlockSize,
    at: u64,
) -> Result<(Header, BTreeMap<u32, Partition>), TableFault> {
    let sector_bytes = sector.as_usize();
    // The crate reads a header from sector 1, so it is shown a device where this one is there.
    let mut device = vec![0; 2 * sector_bytes];
    let start = at.saturating_mul(sector.as_u64());
    if start.saturating_add(sector.as_u64()) > backing.len_bytes() {
        return Err(TableFault::Signature); // too small for a table
    }
    backing.read(start..start.saturating_add(sector.as_u64()), |source| source.copy_to(&mut device[sector_bytes..]))?;
    let header = read_header_from_arbitrary_device(&mut Cursor::new(device), sector).map_err(|error| match error {
        HeaderError::InvalidGptSignature => TableFault::Signature,
        _ => TableFault::Header,
    })?;
    check_header(&header, at, backing.len_bytes() / sector.as_u64())?;
    let mut stream = Stream::new(backing);
    let mut partitions = file_read_partitions(&mut stream, &header, sector).map_err(|_| TableFault::Table)?;
    partitions.retain(|_, partition| partition.is_used());
    Ok((header, partitions))
}

/// Bounds what the header says, before anything is read or allocated because of it.
fn check_header(header: &Header, at: u64, sector_count: u64) -> Result<(), TableFault> {
    let (stored, actual) = (header.current_lba, at);
    if stored != actual {
        return Err(TableFault::Place { stored, actual });
    }
    let (entries, entry_bytes) = (header.num_parts, header.part_size);
    if entry_bytes != ENTRY_BYTES || entries == 0 || entries > ENTRY_COUNT_MAX {
        let (max_entries, supported_bytes) = (ENTRY_COUNT_MAX, ENTRY_BYTES);
        return Err(TableFault::Entries { entries, entry_bytes, max_entries, supported_bytes });
    }
    let (first, last) = (header.first_usable, header.last_usable);
    if first <= PRIMARY_SECTOR || first > last || last >= sector_count || header.backup_lba >= sector_count {
        return Err(TableFault::Usable { first, last });
    }
    Ok(())
}

/// Where the entries of a header that was checked or made here are.
const fn entries_range(header: &Header, sector: LogicalBlockSize) -> Range<u64> {
    let start = header.part_start * sector.as_u64();
    start..start + header.num_parts as u64 * header.part_size as u64
}

/// The bytes of a header and of its entries.
const fn places(header: &Header, sector: LogicalBlockSize) -> [Range<u64>; 2] {
    let start = header.current_lba * sector.as_u64();
    [start..start + sector.as_u64(), entries_range(header, sector)]
}

/// A backing as a stream, for the crate. Media errors become I/O errors.
#[derive(Debug)]
struct Stream<'a> {
    backing: &'a Backing,
    position: u64,
}

impl<'a> Stream<'a> {
    const fn new(backing: &'a Backing) -> Self {
        Self { backing, position: 0 }
    }

    /// The part of a buffer's length that the backing has from here on.
    fn span(&self, len: usize) -> (Range<u64>, usize) {
        let rest = self.backing.len_bytes().saturating_sub(self.position);
        let len = usize::try_from(rest).map_or(len, |rest| rest.min(len));
        (self.position..self.position + len as u64, len)
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (range, len) = self.span(buffer.len());
        self.backing.read(range, |source| source.copy_to(&mut buffer[..len])).map_err(io::Error::other)?;
        self.position += len as u64;
        Ok(len)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let (range, len) = self.span(buffer.len());
        self.backing.write(range, |mut target| target.copy_from(&buffer[..len])).map_err(io::Error::other)?;
        self.position += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Stream<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(distance) => self.backing.len_bytes().checked_add_signed(distance),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

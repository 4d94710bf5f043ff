//! Regions: backings whose GPT gives each namespace a partition of its own.
//!
//! A namespace's base is the start of its partition, its name the partition's name. Partitions of ours have a type GUID of
//! their own, and begin and end at multiples of 2 MiB; partitions of others are left alone. Every change of the table is
//! old-or-new across a crash: the copy that readers rely on is written when the other one is durable.
//!
//! It makes and removes places, not namespaces: whoever removes a partition erases its header first.

mod error;
mod table;

use std::ops::Range;
use std::sync::Arc;

use gpt::partition::Partition;
use uuid::{Uuid, uuid};

pub use self::error::{RegionError, TableFault};
use self::table::Table;
use super::area::{CopyState, HeaderArea, WriteError};
use super::error::Chain;
use super::geometry::{DATA_ALIGNMENT_BYTES, HEADER_AREA_BYTES};
use crate::pmem::{Access, Backing};

/// The partition type of a namespace.
pub const REGION_PARTITION_TYPE: Uuid = uuid!("9d1f6b0e-5c4a-4f1b-8e57-3a2c64f7d0b1");

/// What partitions of ours are aligned to, in bytes; the table is in front of the first multiple.
pub const REGION_ALIGNMENT_BYTES: u64 = DATA_ALIGNMENT_BYTES;

/// Most UTF-16 units of a name (UEFI specification, table 5-6).
const NAME_UNITS_MAX: usize = 36;

/// A backing with a partition table.
#[derive(Debug)]
pub struct Region {
    backing: Arc<Backing>,
    table: Table,
}

/// A partition of a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionPartition {
    /// Its number, from 1.
    pub number: u32,
    /// Its name, may be empty.
    pub name: String,
    /// Its bytes in the backing.
    pub range: Range<u64>,
    /// Whether it is of the type of a namespace.
    pub is_ours: bool,
}

impl Region {
    /// Writes a new, empty table over whatever is there, in sectors of `sector_bytes`: 512 or 4096. A kernel finds a table
    /// only when its sectors are those of the device; for a file they are those that its user will have.
    ///
    /// # Errors
    ///
    /// [`RegionError::SectorSize`], [`RegionError::TooSmall`]; [`RegionError::Media`] when it cannot be written.
    pub fn create(backing: Arc<Backing>, sector_bytes: u64) -> Result<Self, RegionError> {
        let len_bytes = backing.len_bytes();
        // In front of the namespaces the table, one namespace with one unit, behind them the backup of the table.
        let min_bytes = 4 * REGION_ALIGNMENT_BYTES;
        if len_bytes < min_bytes {
            return Err(RegionError::TooSmall { len_bytes, min_bytes });
        }
        let table = Table::create(&backing, sector_bytes)?;
        Ok(Self { backing, table })
    }

    /// Reads and checks the table. Where the backing is open for writing it is durable when this returns, unless the write of
    /// somebody whose flush failed is in it: [`Self::confirm`].
    ///
    /// # Errors
    ///
    /// [`RegionError`]; partitions that overlap are among them.
    pub fn open(backing: Arc<Backing>) -> Result<Self, RegionError> {
        let table = Table::read(&backing)?;
        let region = Self { backing, table };
        region.check()?;
        if region.backing.access() == Access::ReadWrite {
            region.table.persist(&region.backing)?;
        }
        Ok(region)
    }

    /// Makes the table durable as it was read, and finishes a change of it that was cut. Whoever is to rely on a place in it
    /// while writing does this first, with the table locked; every change of the table begins with it.
    ///
    /// # Errors
    ///
    /// [`RegionError::Changed`] when it is another one by now; [`RegionError::Media`].
    pub fn confirm(&mut self) -> Result<(), RegionError> {
        let present = Table::read(&self.backing)?;
        if present.partitions != self.table.partitions || present.disk_guid() != self.table.disk_guid() {
            return Err(RegionError::Changed);
        }
        self.table.confirm(&self.backing)
    }

    /// Destroys what the namespace `uuid` has left in free places: the header of a slide that was cut before the table knew
    /// of it, which would open its data. For who destroys the namespace, with the table locked. How many there were.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; key material may then be left.
    pub fn sweep(&self, uuid: Uuid) -> Result<usize, WriteError> {
        let mut swept = 0;
        for free in self.free() {
            let step = usize::try_from(REGION_ALIGNMENT_BYTES).unwrap_or(usize::MAX);
            for start in (free.start..free.end).step_by(step) {
                swept += usize::from(self.sweep_at(start, uuid)?);
            }
        }
        Ok(swept)
    }

    fn sweep_at(&self, start: u64, uuid: Uuid) -> Result<bool, WriteError> {
        let Some(mut area) = HeaderArea::new(Arc::clone(&self.backing), start) else { return Ok(false) };
        let found =
            area.has_magic()? && area.read_copies().into_iter().flatten().any(|copy| copy.metadata.uuid == uuid);
        if found {
            area.clear_stray()?;
        } else {
            area.confirm_clear()?;
        }
        Ok(found)
    }

    /// Ends every slide of a namespace in the region that was cut before the table knew of it: destroys the header that it has
    /// left in the free place before the namespace, whatever key opens it is one of before. For who is to change the table or
    /// to write on the strength of it, with the table locked: then such headers are nowhere else than where a slide would begin.
    /// How many there were.
    ///
    /// # Errors
    ///
    /// As [`Self::sweep`].
    pub fn end_cut_slides(&self) -> Result<usize, WriteError> {
        let mut swept = 0;
        for partition in self.partitions().into_iter().filter(|partition| partition.is_ours) {
            let start = self.earliest_start(&partition.range);
            if partition.range.start.saturating_sub(start) < HEADER_AREA_BYTES {
                continue;
            }
            let present = HeaderArea::new(Arc::clone(&self.backing), partition.range.start);
            let mut copies = present.into_iter().flat_map(|mut area| area.read_copies()).flatten();
            let Some(copy) = copies.next() else { continue };
            let mut found = self.sweep_at(start, copy.metadata.uuid)?;
            // An earlier sweep may have been cut.
            if let Some(mut area) = HeaderArea::new(Arc::clone(&self.backing), start)
                && area.is_ruined()?
            {
                area.clear_stray()?;
                found = true;
            }
            swept += usize::from(found);
        }
        Ok(swept)
    }

    /// The backing that it is on.
    #[must_use]
    pub const fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// The state of the primary and of the backup table, with the number of partitions as sequence.
    #[must_use]
    pub fn copies(&self) -> [CopyState; 2] {
        let sequence = self.partitions().len() as u64;
        self.table.faults().map(|fault| match fault {
            None => CopyState::Good { sequence },
            Some(fault) => CopyState::Bad { reason: Chain(fault).to_string() },
        })
    }

    /// The identity of the table.
    #[must_use]
    pub const fn disk_guid(&self) -> Uuid {
        self.table.disk_guid()
    }

    /// All partitions that are used, in the order of their numbers.
    #[must_use]
    pub fn partitions(&self) -> Vec<RegionPartition> {
        let used = self.table.partitions.iter().filter(|(_, partition)| partition.is_used());
        used.map(|(&number, partition)| self.describe(number, partition)).collect()
    }

    /// The namespace of that name.
    ///
    /// # Errors
    ///
    /// [`RegionError::NoSuchName`], and [`RegionError::NameTwice`] when it is not alone.
    pub fn find(&self, name: &str) -> Result<RegionPartition, RegionError> {
        let mut found = self.partitions().into_iter().filter(|partition| partition.is_ours && partition.name == name);
        let first = found.next().ok_or_else(|| RegionError::NoSuchName { name: name.to_owned() })?;
        match found.next() {
            None => Ok(first),
            Some(second) => Err(RegionError::NameTwice { first: first.number, second: second.number }),
        }
    }

    /// Where there is room, in multiples of 2 MiB.
    #[must_use]
    pub fn free(&self) -> Vec<Range<u64>> {
        let usable = self.table.usable_bytes();
        let mut used: Vec<_> = self.partitions().into_iter().map(|partition| partition.range).collect();
        used.sort_by_key(|range| range.start);
        used.push(usable.end..usable.end);
        let mut free = Vec::new();
        let mut start = usable.start;
        for range in used {
            let aligned = start.next_multiple_of(REGION_ALIGNMENT_BYTES);
            let end = range.start - range.start % REGION_ALIGNMENT_BYTES;
            if aligned < end {
                free.push(aligned..end);
            }
            start = start.max(range.end);
        }
        free
    }

    /// The first place where `len_bytes` bytes fit, rounded up to 2 MiB.
    ///
    /// # Errors
    ///
    /// [`RegionError::Full`].
    pub fn place(&self, len_bytes: u64) -> Result<Range<u64>, RegionError> {
        let free = self.free();
        let wanted = len_bytes.checked_next_multiple_of(REGION_ALIGNMENT_BYTES);
        let found = wanted.and_then(|wanted| {
            let place = free.iter().find(|place| place.end - place.start >= wanted)?;
            Some(place.start..place.start + wanted)
        });
        found.ok_or(RegionError::Full { wanted_bytes: len_bytes, free })
    }

    /// Enters a namespace's partition, which must be a part of the free places.
    ///
    /// # Errors
    ///
    /// [`RegionError::Name`], [`RegionError::NameInUse`], [`RegionError::Full`], [`RegionError::TableFull`]; the table is
    /// as before unless the error is [`RegionError::Media`].
    pub fn add(&mut self, name: &str, range: Range<u64>) -> Result<(), RegionError> {
        self.check_name(name)?;
        let is_free = |range: &Range<u64>| {
            self.free().iter().any(|free| free.start <= range.start && range.end <= free.end && range.start < range.end)
        };
        if !is_free(&range) {
            return Err(RegionError::Full { wanted_bytes: range.end - range.start, free: self.free() });
        }
        let number = self.table.free_number().ok_or(RegionError::TableFull)?;
        let sectors = self.table.sectors(&range);
        let partition = Partition {
            part_type_guid: REGION_PARTITION_TYPE.into(),
            part_guid: Uuid::new_v4(),
            first_lba: sectors.start,
            last_lba: sectors.end - 1,
            flags: 0,
            name: name.to_owned(),
        };
        self.change(|partitions| drop(partitions.insert(number, partition)))
    }

    /// Checks a name for a new namespace.
    ///
    /// # Errors
    ///
    /// [`RegionError::Name`], [`RegionError::NameInUse`].
    pub fn check_name(&self, name: &str) -> Result<(), RegionError> {
        let units = name.encode_utf16().count();
        if units == 0 || units > NAME_UNITS_MAX || name.contains(char::is_control) {
            return Err(RegionError::Name { units, max_units: NAME_UNITS_MAX });
        }
        match self.partitions().iter().find(|partition| partition.is_ours && partition.name == name) {
            Some(partition) => Err(RegionError::NameInUse { number: partition.number }),
            None => Ok(()),
        }
    }

    /// Takes a namespace's partition out of the table. What it holds is not touched.
    ///
    /// # Errors
    ///
    /// As [`Self::find`]; [`RegionError::Media`].
    pub fn remove(&mut self, name: &str) -> Result<(), RegionError> {
        let number = self.find(name)?.number;
        self.change(|partitions| drop(partitions.remove(&number)))
    }

    /// Gives a namespace's partition another length, rounded up to 2 MiB, and gives its new range.
    ///
    /// # Errors
    ///
    /// As [`Self::find`]; [`RegionError::Full`] when what lies behind it is taken; [`RegionError::Media`].
    pub fn resize(&mut self, name: &str, len_bytes: u64) -> Result<Range<u64>, RegionError> {
        let present = self.find(name)?;
        let free = self.free();
        let full = || RegionError::Full { wanted_bytes: len_bytes, free: free.clone() };
        let wanted = len_bytes.max(1).checked_next_multiple_of(REGION_ALIGNMENT_BYTES);
        let end = wanted.and_then(|wanted| present.range.start.checked_add(wanted)).ok_or_else(full)?;
        let behind =
            free.iter().find(|free| free.start == present.range.end).map_or(present.range.end, |free| free.end);
        if end > present.range.end.max(behind) {
            return Err(full());
        }
        let range = present.range.start..end;
        let last_lba = self.table.sectors(&range).end - 1;
        self.change(|partitions| {
            if let Some(partition) = partitions.get_mut(&present.number) {
                partition.last_lba = last_lba;
            }
        })?;
        Ok(range)
    }

    /// Lets a namespace's partition begin at `start` already, in the free place before it, and gives its new range. What
    /// is to be found there must be durable by now.
    ///
    /// # Errors
    ///
    /// As [`Self::find`]; [`RegionError::Full`] when what lies before it is taken, or begins at no multiple of 2 MiB;
    /// [`RegionError::Media`].
    pub fn begin_earlier(&mut self, name: &str, start: u64) -> Result<Range<u64>, RegionError> {
        let present = self.find(name)?;
        if start != self.earliest_start(&present.range) && start != present.range.start {
            let wanted_bytes = present.range.start.saturating_sub(start);
            return Err(RegionError::Full { wanted_bytes, free: self.free() });
        }
        let range = start..present.range.end;
        let first_lba = self.table.sectors(&range).start;
        self.change(|partitions| {
            if let Some(partition) = partitions.get_mut(&present.number) {
                partition.first_lba = first_lba;
            }
        })?;
        Ok(range)
    }

    /// Where the free place right before the partition at `range` begins, a multiple of 2 MiB; the partition's own start
    /// when there is none.
    #[must_use]
    pub fn earliest_start(&self, range: &Range<u64>) -> u64 {
        // A partition that another program made may begin in the middle of an aligned piece, whose rest is not listed.
        let aligned = range.start - range.start % REGION_ALIGNMENT_BYTES;
        let before = self.free().into_iter().find(|free| free.end == aligned);
        before.map_or(range.start, |free| free.start)
    }

    fn change(
        &mut self,
        change: impl FnOnce(&mut std::collections::BTreeMap<u32, Partition>),
    ) -> Result<(), RegionError> {
        self.confirm()?;
        let before = self.table.partitions.clone();
        change(&mut self.table.partitions);
        self.table.write(&self.backing).inspect_err(|_| self.table.partitions = before)
    }

    fn describe(&self, number: u32, partition: &Partition) -> RegionPartition {
        RegionPartition {
            number,
            name: partition.name.clone(),
            range: self.table.bytes(partition),
            is_ours: partition.part_type_guid.guid == REGION_PARTITION_TYPE,
        }
    }

    /// Partitions lie apart and where partitions may lie.
    fn check(&self) -> Result<(), RegionError> {
        let usable = self.table.usable_sectors();
        for (&number, partition) in self.table.partitions.iter().filter(|(_, partition)| partition.is_used()) {
            let (first, last) = (partition.first_lba, partition.last_lba);
            if first > last || first < usable.start || last >= usable.end {
                return Err(RegionError::OutOfBounds { number, first, last, usable });
            }
        }
        let mut partitions = self.partitions();
        partitions.sort_by_key(|partition| partition.range.start);
        let mut neighbours = partitions.iter().zip(partitions.iter().skip(1));
        match neighbours.find(|(one, other)| one.range.end > other.range.start) {
            Some((one, other)) => Err(RegionError::Overlap { first: one.number, second: other.number }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

//! The namespaces of a region move together towards its start, one after the other.
//!
//! Each moves into the free space right before it, over its own old place if need be, under a new volume key; and its
//! partition becomes as long as it is. How that survives everything is written in `namespace::slide`. What is interrupted is
//! usable, and goes on when this is done again.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Cause, Error};
use super::gate::{self, Caller, KeyWay, Operation, Step, Way};
use super::location::{self, Location};
use super::open::Key;
use super::pace::{Moved, Run};
use super::slots::SlotPolicy;
use crate::namespace::{
    Credential, Geometry, HEADER_AREA_BYTES, LockedNamespace, Namespace, REGION_ALIGNMENT_BYTES, Region, RegionError,
    RekeyOptions, Site, SlideError, begin_slide,
};
use crate::volume::Volume;
use crate::xts::Backend;

const OPERATION: Operation = Operation::Compact;

/// What became of one namespace.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// There is nothing before it, and nothing unused behind it.
    InPlace,
    /// It is somewhere else.
    Moved {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// How fast it went.
        bytes_per_second: u64,
    },
}

/// What a compaction would do with one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its partition.
    pub range: Range<u64>,
    /// Where its partition would begin.
    pub to: u64,
    /// Bytes of its partition then.
    pub len_bytes: u64,
    /// Bytes of blocks that the file of the region would need besides those that it has.
    pub blocks_bytes: u64,
}

/// A region whose namespaces are to move together.
#[derive(Clone, Debug)]
pub struct Compaction {
    path: PathBuf,
    slots: SlotPolicy,
    backend: Backend,
}

impl Compaction {
    /// Of the region at `path`.
    #[must_use]
    pub fn new(path: &Path, slots: SlotPolicy, backend: Backend) -> Self {
        Self { path: path.into(), slots, backend }
    }

    /// The names of its namespaces, or `only` that one, in the order of their places.
    ///
    /// # Errors
    ///
    /// [`Cause::Region`].
    pub fn names(&self, only: Option<&str>) -> Result<Vec<String>, Error> {
        let table = self.table()?;
        if let Some(only) = only {
            table.find(only).map_err(|source| self.failed(source))?;
        }
        let mut partitions = table.partitions();
        partitions.retain(|partition| partition.is_ours && only.is_none_or(|only| only == partition.name));
        partitions.sort_by_key(|partition| partition.range.start);
        Ok(partitions.into_iter().map(|partition| partition.name).collect())
    }

    /// What [`Self::one`] would do with each of `names`, one after the other; nothing is locked or written, and no key is needed.
    /// A namespace whose header cannot be read is left out: it stays.
    ///
    /// # Errors
    ///
    /// [`Cause::Region`], [`Cause::Media`].
    pub fn plan(&self, names: &[String]) -> Result<Vec<Planned>, Error> {
        let table = self.table()?;
        let (mut planned, mut ends) = (Vec::new(), Vec::new());
        for name in names {
            let place = Location::of_region(&self.path, name);
            let range = table.find(name).map_err(|source| self.failed(source))?.range;
            let site = place.peek(OPERATION)?;
            let Ok(locked) = LockedNamespace::open_in(site.clone()) else { continue };
            // Up to where what was planned before it ends by then.
            let earliest = table.earliest_start(&range);
            let before = ends.iter().find(|(end, _)| *end == earliest).map(|(_, end)| *end);
            let to = start_of(before.unwrap_or(earliest), &range);
            let (geometry, len_bytes) = (locked.geometry(), range.end - range.start);
            let data = geometry.data_start()..geometry.data_start() + geometry.size_bytes();
            let blocks = site.data().blocks_to_move(data.clone(), to + (data.start - range.start));
            let blocks_bytes = blocks.map_err(|source| Error::new(OPERATION, place.path(), source))?;
            let len_bytes = len_bytes.min(needed_bytes(geometry));
            let [was, will_be] = [range.end, to + len_bytes].map(|end| end.next_multiple_of(REGION_ALIGNMENT_BYTES));
            ends.push((was, will_be));
            planned.push(Planned { name: name.clone(), range, to, len_bytes, blocks_bytes });
        }
        Ok(planned)
    }

    /// Bytes that the file system under the file of the region can still give; nothing for a device.
    ///
    /// # Errors
    ///
    /// [`Cause::Region`].
    pub fn free_bytes(&self) -> Result<Option<u64>, Error> {
        Ok(self.table()?.backing().free_bytes())
    }

    /// The free places.
    ///
    /// # Errors
    ///
    /// [`Cause::Region`].
    pub fn free(&self) -> Result<Vec<Range<u64>>, Error> {
        Ok(self.table()?.free())
    }

    /// Moves the namespace `name` as far as it can, with the key of one of its slots. Without one it stays, unless it has
    /// nothing to do.
    ///
    /// # Errors
    ///
    /// [`Error`]; the namespace is usable where it is.
    pub fn one(&self, name: &str, credential: Option<&Credential>, run: &mut Run<'_>) -> Result<Outcome, Error> {
        let place = Location::of_region(&self.path, name);
        let table = self.table()?;
        let range = table.find(name).map_err(|source| self.failed(source))?.range;
        let start = start_of(table.earliest_start(&range), &range);
        if start == range.start && is_tight(&place, &range)? {
            return Ok(Outcome::InPlace);
        }
        let credential = credential.ok_or_else(|| Error::new(OPERATION, place.path(), Cause::NoKeyGiven))?;
        let (mut namespace, step) = self.unlock(&place, start, &range, credential)?;
        let mut bytes_per_second = 0;
        let mut moved: Moved;
        if step == Some(Step::EndTransform) {
            (namespace, moved) = self.finish(&place, namespace, run)?;
            bytes_per_second = moved.bytes_per_second;
        }
        if start < range.start {
            namespace = self.begin(&place, name, namespace, start, credential)?;
            (namespace, moved) = self.finish(&place, namespace, run)?;
            bytes_per_second = moved.bytes_per_second;
        }
        self.shrink(name, &namespace)?;
        if start == range.start {
            return Ok(Outcome::InPlace);
        }
        Ok(Outcome::Moved { from: range.start, to: start, bytes_per_second })
    }

    /// Opens it with its new place locked too; and what must end first.
    fn unlock(
        &self,
        place: &Location,
        start: u64,
        range: &Range<u64>,
        credential: &Credential,
    ) -> Result<(Namespace, Option<Step>), Error> {
        let backing = location::open_range(OPERATION, &self.path, &(start..range.end))?;
        let site = Site::part(backing, range.start, range.end - range.start);
        // What a killed slide has told the table is seen, and not always durable: its former place is wiped next.
        location::confirm_table(OPERATION, &self.path)?;
        let found = place.find_at(OPERATION, site)?;
        let namespace = found.unlock(Key::Credential(credential))?;
        let way = Way { key: KeyWay::Slot, read_only: false, detached: false, caller: Caller::Opener, force: false };
        let step = gate::check(OPERATION, &gate::states_of_unlocked(&namespace), way);
        let step = step.map_err(|refusal| Error::new(OPERATION, place.path(), refusal))?;
        Ok((namespace, step))
    }

    /// Nobody changes the table while the header is written into free space.
    fn begin(
        &self,
        place: &Location,
        name: &str,
        namespace: Namespace,
        start: u64,
        credential: &Credential,
    ) -> Result<Namespace, Error> {
        let failed = |cause: Cause| Error::new(OPERATION, place.path(), cause);
        let other_slots = self.slots.decide(&namespace.other_slots()).map_err(failed)?;
        let options = RekeyOptions { other_slots, ..RekeyOptions::default() };
        let mut table = location::open_table(OPERATION, &self.path)?;
        begin_slide(&mut table, name, namespace, start, credential, &options).map_err(|error| match error {
            SlideError::Region(source) => self.failed(source),
            source => failed(source.into()),
        })
    }

    /// Moves the data to the end.
    fn finish(&self, place: &Location, namespace: Namespace, run: &mut Run<'_>) -> Result<(Namespace, Moved), Error> {
        let volume = Volume::new(namespace, self.backend);
        let moved = run.end_transform(&volume).map_err(|cause| Error::new(OPERATION, place.path(), cause))?;
        Ok((volume.into_namespace().expect("nobody has locked it"), moved))
    }

    /// Makes the partition, which is locked by the namespace, as long as that is.
    fn shrink(&self, name: &str, namespace: &Namespace) -> Result<(), Error> {
        let needed_bytes = needed_bytes(namespace.geometry());
        let mut table = location::open_table(OPERATION, &self.path)?;
        let range = table.find(name).map_err(|source| self.failed(source))?.range;
        let site = namespace.site();
        if range.start != site.start() {
            let opened = site.start()..site.start() + site.available_bytes();
            return Err(Error::new(OPERATION, &self.path, SlideError::Changed { actual: range, opened }));
        }
        if range.end - range.start > needed_bytes {
            table.resize(name, needed_bytes).map_err(|source| self.failed(source))?;
        }
        Ok(())
    }

    fn table(&self) -> Result<Region, Error> {
        location::peek_table(OPERATION, &self.path)
    }

    fn failed(&self, source: RegionError) -> Error {
        Error::new(OPERATION, &self.path, source)
    }
}

/// Where a partition at `range` is to begin, if everything from `earliest` on is free. A partition that another program made
/// may leave less than a header needs.
const fn start_of(earliest: u64, range: &Range<u64>) -> u64 {
    if range.start - earliest < HEADER_AREA_BYTES { range.start } else { earliest }
}

/// Bytes of a partition that holds just this.
const fn needed_bytes(geometry: &Geometry) -> u64 {
    (geometry.data_offset() + geometry.size_bytes()).next_multiple_of(REGION_ALIGNMENT_BYTES)
}

/// Whether the namespace fills its partition and nothing is under way, as its header says without a key.
fn is_tight(place: &Location, range: &Range<u64>) -> Result<bool, Error> {
    let site = place.peek(OPERATION)?;
    let site = Site::part(Arc::clone(site.data()), range.start, range.end - range.start);
    let locked: LockedNamespace = place.locked(OPERATION, site)?;
    Ok(locked.transform_kind().is_none() && range.end - range.start <= needed_bytes(locked.geometry()))
}

//! A namespace to another place, always under a new volume key, since its tweaks are its place.
//!
//! To another file, device or partition of a region it is decrypted and encrypted piece by piece, read back and compared;
//! the destination has no header before all of it is durable, and the source keeps its own until then. In place, a
//! namespace that was already moved as ciphertext is adopted where it lies.
//!
//! A new partition is in the table from the beginning, so that nobody else takes its place however long it takes; without
//! a header nothing in it opens. What was made is taken back when it comes to nothing; a process that is killed leaves it.

mod copy;
mod target;

use std::sync::Arc;

use self::copy::Copy;
use self::target::Target;
use super::error::{Cause, Error};
use super::gate::{self, Operation, State, Way};
use super::location::{self, Location};
use super::pace::{Moved, Run};
use super::slots::SlotPolicy;
use crate::namespace::{Credential, MovedNamespace, Namespace, OtherSlots, RekeyOptions, Site, SlotInfo};
use crate::volume::Volume;
use crate::xts::Backend;

/// How a namespace is relocated.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether the source stays as it is.
    pub keep_source: bool,
    /// What becomes of the key slots that the key at hand does not open.
    pub slots: SlotPolicy,
    /// Whether holes of the source get no blocks.
    pub sparse: bool,
    /// Whether what is at the destination may be lost.
    pub force: bool,
}

/// What became of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is as it was.
    Kept,
    /// Its key slots and headers are destroyed.
    Erased,
    /// The same, and its partition is free.
    Removed,
}

/// A relocation that has ended.
#[derive(Debug)]
pub struct Relocated {
    /// What was moved.
    pub moved: Moved,
    /// What became of the source.
    pub fate: Fate,
}

impl Options {
    /// What is done to the source.
    #[must_use]
    pub const fn operation(self) -> Operation {
        if self.keep_source { Operation::CopySource } else { Operation::RelocateSource }
    }
}

/// Brings `source`, which lies at `from` and which `credential` unlocked for [`Options::operation`], to `to`.
///
/// # Errors
///
/// [`Error`]: the source is as it was, unless it could not be erased at the end.
pub fn relocate(
    source: Namespace,
    from: &Location,
    to: &Location,
    credential: &Credential,
    options: Options,
    backend: Backend,
    run: &mut Run<'_>,
) -> Result<Relocated, Error> {
    let operation = options.operation();
    let others = options.slots.decide(&source.other_slots());
    let others = others.map_err(|cause| Error::new(operation, from.path(), cause))?;
    let Target { mut namespace, made } = Target::make(to, &source, credential, options.force)?;
    if others == OtherSlots::Keep {
        let carried = namespace.carry_slots(&source, credential);
        carried.map_err(|source| made.taken_back(Error::new(operation, to.path(), source)))?;
    }
    let copy = Copy { operation, from: from.path(), to: to.path(), sparse: options.sparse };
    let (source, moved) = copy.run(source, namespace, backend, run).map_err(|error| made.taken_back(error))?;
    let fate = if options.keep_source { Fate::Kept } else { forget(from, source)? };
    Ok(Relocated { moved, fate })
}

/// Erases the source, which is somewhere else now, and gives its partition back.
fn forget(place: &Location, source: Namespace) -> Result<Fate, Error> {
    let operation = Operation::RelocateSource;
    let held = Arc::clone(source.backing()); // locked as long as it is in the table
    let uuid = source.header().uuid;
    let erase_failed = |source| Error::new(operation, place.header_path(), Cause::Erase(source));
    let Some((path, name)) = place.region() else {
        source.erase().map_err(erase_failed)?;
        return Ok(Fate::Erased);
    };
    let mut table = location::open_table(operation, path)?;
    // First: without its header nobody knows any more what is to be swept.
    table.sweep(uuid).map_err(erase_failed)?;
    source.erase().map_err(erase_failed)?;
    table.remove(name).map_err(|source| Error::new(operation, path, source))?;
    drop(held);
    Ok(Fate::Removed)
}

/// A namespace that was moved as ciphertext, and may be adopted.
#[derive(Debug)]
pub struct Adoption {
    location: Location,
    site: Site,
    moved: MovedNamespace,
}

/// A namespace that was adopted.
#[derive(Debug)]
pub struct Adopted {
    /// Where it was written for.
    pub old_base: u64,
    /// Where it is.
    pub base: u64,
    /// How it went.
    pub moved: Moved,
}

impl Adoption {
    /// Finds it.
    ///
    /// # Errors
    ///
    /// [`Cause::Adopt`]; nothing on media has changed.
    pub fn find(location: &Location) -> Result<Self, Error> {
        let failed = |cause: Cause| Error::new(Operation::Adopt, location.path(), cause);
        let site = location.open(Operation::Adopt)?;
        let moved = MovedNamespace::open_in(site.clone()).map_err(|error| failed(error.into()))?;
        let way = Way { detached: location.detached_header().is_some(), ..Way::before_the_key(Operation::Adopt) };
        gate::check(Operation::Adopt, &[State::Moved], way).map_err(|refusal| failed(refusal.into()))?;
        Ok(Self { location: location.clone(), site, moved })
    }

    /// Its backings.
    #[must_use]
    pub const fn site(&self) -> &Site {
        &self.site
    }

    /// Its key slots: which of them the key opens is not known yet.
    #[must_use]
    pub fn slots(&self) -> &[SlotInfo] {
        &self.moved.header().slots
    }

    /// Whether `slots` says enough: with more than one key slot, one of them is another one than the key's.
    ///
    /// # Errors
    ///
    /// [`Cause::OtherSlots`].
    pub fn check(&self, slots: SlotPolicy) -> Result<(), Error> {
        let others = if self.slots().len() > 1 { self.slots() } else { &[] };
        let decided = slots.decide(others);
        decided.map(drop).map_err(|cause| Error::new(Operation::Adopt, self.location.path(), cause))
    }

    /// Makes it a namespace of this place, and gives its data the tweaks of it.
    ///
    /// # Errors
    ///
    /// [`Error`]; when the adoption has begun it goes on like a re-key.
    pub fn adopt(
        self,
        credential: &Credential,
        slots: SlotPolicy,
        backend: Backend,
        run: &mut Run<'_>,
    ) -> Result<Adopted, Error> {
        self.check(slots)?;
        let Self { location, moved, .. } = self;
        let failed = |cause: Cause| Error::new(Operation::Adopt, location.path(), cause);
        let old_base = moved.header().base;
        let other_slots = if slots == SlotPolicy::Keep { OtherSlots::Keep } else { OtherSlots::Drop };
        let options = RekeyOptions { other_slots, ..RekeyOptions::default() };
        let namespace = moved.adopt(credential, &options).map_err(|error| failed(error.into()))?;
        let base = namespace.geometry().base();
        let volume = Volume::new(namespace, backend);
        let moved = run.end_transform(&volume).map_err(failed)?;
        Ok(Adopted { old_base, base, moved })
    }
}

#[cfg(test)]
mod crash_tests;

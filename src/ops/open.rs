//! From a place to an unlocked namespace, through the gate: before the key is asked for, and after.

use super::error::{Cause, Error};
use super::gate::{self, Caller, KeyWay, Operation, Step, Way};
use super::location::Location;
use crate::namespace::{Credential, Header, LockedNamespace, Namespace, Site};
use crate::pmem::Access;
use crate::secret::VolumeKey;
use crate::volume::Volume;

/// What unlocks a namespace.
#[derive(Debug)]
pub enum Key<'a> {
    /// The credential of any slot.
    Credential(&'a Credential),
    /// The credential of this slot.
    Slot(&'a Credential, u32),
    /// The volume key itself, as it was put in escrow.
    VolumeKey(VolumeKey),
    /// None: it is ephemeral.
    Ephemeral,
}

/// A namespace that may be opened for an operation, and is not unlocked yet.
#[derive(Debug)]
pub struct Found {
    location: Location,
    operation: Operation,
    site: Site,
    locked: LockedNamespace,
}

impl Location {
    /// Opens the namespace here for `operation`, with the lock that it needs, if the state that its header tells permits
    /// that.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing on media has changed.
    pub fn find(&self, operation: Operation) -> Result<Found, Error> {
        self.find_at(operation, self.open(operation)?)
    }

    /// As [`Self::find`], at a site that this location was opened as.
    ///
    /// # Errors
    ///
    /// As [`Self::find`].
    pub fn find_at(&self, operation: Operation, site: Site) -> Result<Found, Error> {
        let way = Way { detached: site.is_detached(), ..Way::before_the_key(operation) };
        let locked = self.locked(operation, site.clone())?;
        gate::check(operation, &gate::states_of_locked(&locked), way)
            .map_err(|refusal| Error::new(operation, self.path(), refusal))?;
        Ok(Found { location: self.clone(), operation, site, locked })
    }
}

impl Found {
    /// What its header says; nobody has authenticated it.
    #[must_use]
    pub const fn header(&self) -> &Header {
        self.locked.header()
    }

    /// Where it is.
    #[must_use]
    pub const fn location(&self) -> &Location {
        &self.location
    }

    /// Its backings.
    #[must_use]
    pub const fn site(&self) -> &Site {
        &self.site
    }

    /// The namespace, for who only looks at it.
    #[must_use]
    pub const fn locked(&self) -> &LockedNamespace {
        &self.locked
    }

    /// Unlocks it, asks the gate again, and completes a header whose update was cut short.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn unlock(self, key: Key<'_>) -> Result<Namespace, Error> {
        let Self { location, operation, site, locked } = self;
        let failed = |cause: Cause| Error::new(operation, location.path(), cause);
        let key_way = match key {
            Key::Credential(_) | Key::Slot(..) => KeyWay::Slot,
            Key::VolumeKey(_) => KeyWay::VolumeKey,
            Key::Ephemeral => KeyWay::None,
        };
        let way = Way { key: key_way, detached: site.is_detached(), ..Way::before_the_key(operation) };
        let unlocked = match key {
            Key::Credential(credential) => locked.unlock_key(credential),
            Key::Slot(credential, id) => locked.unlock_slot(credential, id),
            Key::VolumeKey(volume_key) => locked.unlock_volume_key(volume_key),
            Key::Ephemeral => locked.unlock_ephemeral(),
        };
        let mut namespace = unlocked.map_err(|error| failed(error.into()))?;
        let step = gate::check(operation, &gate::states_of_unlocked(&namespace), way);
        match step.map_err(|refusal| failed(refusal.into()))? {
            // Who ends a transform completes the header first.
            None | Some(Step::EndTransform) => {}
            Some(Step::CompleteHeader) => namespace.settle_header().map_err(|error| failed(error.into()))?,
        }
        Ok(namespace)
    }
}

/// Whether `operation`, too, may be done with a namespace that was opened for something else.
///
/// # Errors
///
/// [`Cause::Refused`].
pub fn also(operation: Operation, location: &Location, namespace: &Namespace) -> Result<(), Error> {
    let key = if namespace.slot_id().is_some() { KeyWay::Slot } else { KeyWay::VolumeKey };
    let passed = pass(operation, namespace, key, Caller::Opener);
    passed.map_err(|cause| Error::new(operation, location.path(), cause))
}

/// Whether `operation` may be done with a volume that a server has in use, with the key of a slot. Every update of its
/// header writes both copies, so that none needs to be completed first.
///
/// # Errors
///
/// [`Cause::Refused`], [`Cause::Volume`] for one without a header of ours, [`Cause::Transform`].
pub fn also_in_use(operation: Operation, volume: &Volume) -> Result<(), Cause> {
    volume.with_namespace(|namespace| pass(operation, namespace, KeyWay::Slot, Caller::Control))
}

fn pass(operation: Operation, namespace: &Namespace, key: KeyWay, caller: Caller) -> Result<(), Cause> {
    let (read_only, detached) = (namespace.backing().access() == Access::ReadOnly, namespace.site().is_detached());
    let way = Way { key, read_only, detached, caller, force: false };
    Ok(gate::check(operation, &gate::states_of_unlocked(namespace), way).map(drop)?)
}

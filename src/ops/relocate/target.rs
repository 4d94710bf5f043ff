//! The empty namespace that a relocation fills, and what is taken back when it comes to nothing.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::error::{Cause, Error, Leftover, line};
use super::super::gate::Operation;
use super::super::identity;
use super::super::location::{self, Location};
use super::super::new_place::{self, NewPlace, Prepared};
use crate::namespace::{self, Credential, FormatOptions, Kdf, KdfCost, Namespace, Site};
use crate::pmem::{Allocation, Backing};

const OPERATION: Operation = Operation::RelocateDestination;

/// A namespace like the source, whose header is withheld.
pub(super) struct Target {
    pub(super) namespace: Namespace,
    pub(super) made: Made,
}

/// What did not exist before.
pub(super) struct Made {
    files: Vec<PathBuf>,
    /// The region and the name of a partition.
    partition: Option<(PathBuf, String)>,
    /// Nobody else gets the place before it is taken back.
    _held: Arc<Backing>,
}

impl Target {
    /// Makes it at `place`. Blocks come as they are written: a full disk is an error then, and the source is still there.
    pub(super) fn make(
        place: &Location,
        source: &Namespace,
        credential: &Credential,
        force: bool,
    ) -> Result<Self, Error> {
        let size_bytes = Some(source.geometry().size_bytes());
        let allocation = Allocation::Sparse;
        let new_place = NewPlace { operation: OPERATION, location: place, size_bytes, allocation, force };
        let prepared = new_place.prepare()?;
        refuse_own_place(place, source, &prepared).inspect_err(|_| new_place::remove_made(&prepared.made))?;
        Self::make_in(prepared, place, source, credential)
    }

    /// Empties the header area, and only then enters a new partition into its region: nothing that was there opens.
    pub(super) fn make_in(
        prepared: Prepared,
        place: &Location,
        source: &Namespace,
        credential: &Credential,
    ) -> Result<Self, Error> {
        let Prepared { data, range, header, made, region } = prepared;
        let mut made = Made { files: made, partition: None, _held: Arc::clone(&data) };
        let available_bytes = Some(range.end - range.start);
        let options = FormatOptions { header, base: range.start, available_bytes, ..options_of(source) };
        let formatted = namespace::format_withheld(data, options, credential);
        let namespace = formatted.map_err(|source| made.taken_back(Error::new(OPERATION, place.path(), source)))?;
        if let (Some(mut region), Some((path, name))) = (region, place.region()) {
            let added = region.add(name, range);
            added.map_err(|source| made.taken_back(Error::new(OPERATION, path, source)))?;
            made.partition = Some((path.into(), name.into()));
        }
        Ok(Self { namespace, made })
    }
}

/// Locks do not tell that a loop device and the file behind it are one, nor another node of the same disk.
fn refuse_own_place(place: &Location, source: &Namespace, prepared: &Prepared) -> Result<(), Error> {
    let failed = |cause: Cause| Error::new(OPERATION, place.path(), cause);
    let Prepared { data, range, header, .. } = prepared;
    let site = Site::part(Arc::clone(data), range.start, range.end - range.start).with_header(header.clone());
    let own = identity::extents_of(source.site()).map_err(failed)?;
    let wanted = identity::extents_of(&site).map_err(failed)?;
    if own.iter().any(|own| wanted.iter().any(|wanted| own.overlaps(wanted))) {
        let (place, path) = (place.path().display(), source.backing().path().display());
        return Err(failed(Cause::SamePlace(format!("{place} is what {path} lies in, by another name"))));
    }
    Ok(())
}

impl Made {
    /// `error`, after what was made is taken back: without a header it is of no use to anybody.
    pub(super) fn taken_back(&self, mut error: Error) -> Error {
        new_place::remove_made(&self.files);
        let Some((region, name)) = &self.partition else { return error };
        let failed = |source| Error::new(OPERATION, region, source);
        let table = location::open_table(OPERATION, region);
        if let Err(reason) = table.and_then(|mut table| table.remove(name).map_err(failed)) {
            let (region, name, reason) = (region.clone(), name.clone(), line(&reason));
            error.left.push(Leftover::Partition { region, name, reason });
        }
        error
    }
}

/// What the new namespace has in common with the source.
fn options_of(source: &Namespace) -> FormatOptions {
    let header = source.header();
    let slot = header.slots.iter().find(|slot| Some(slot.id) == source.slot_id());
    let kdf_cost = match slot.map(|slot| slot.kdf) {
        Some(Kdf::Argon2id(cost)) => cost,
        _ => KdfCost::default(),
    };
    FormatOptions {
        cipher: source.cipher(),
        unit: source.geometry().unit(),
        label: header.label,
        kdf_cost,
        size_bytes: Some(source.geometry().size_bytes()),
        bind_address: header.bound_address.is_some(),
        allow_discards: header.discards,
        ..FormatOptions::default()
    }
}

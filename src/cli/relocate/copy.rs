//! The data of one namespace into another one, whose header is withheld until every byte has been read back and is durable.

use std::path::Path;

use zeroize::Zeroizing;

use super::super::error::Error;
use super::super::output::warning;
use super::super::rekey::PaceArgs;
use super::super::transfer::{Holes, Moved, Transfer};
use crate::namespace::{Chain, Namespace, OutOfRange};
use crate::volume::{Volume, VolumeError};
use crate::xts::Backend;

/// One copy: where it goes from and to, for messages, and how.
#[derive(Clone, Copy)]
pub(super) struct Copy<'a> {
    pub(super) from: &'a Path,
    pub(super) to: &'a Path,
    pub(super) pace: &'a PaceArgs,
    /// Whether holes of the source get no blocks.
    pub(super) sparse: bool,
}

impl Copy<'_> {
    /// Copies and compares piece by piece, makes durable, and only then writes the header of the target. The source is
    /// given back.
    pub(super) fn run(
        &self,
        source: Namespace,
        target: Namespace,
        backend: Backend,
    ) -> Result<(Namespace, Moved), Error> {
        let (source, target) = (Volume::new(source, backend), Volume::new(target, backend));
        let from = Transfer::new(self.from, self.pace)?;
        let to = Transfer::new(self.to, self.pace)?;
        let (mut holes, mut scratch) = (Holes::default(), Vec::new());
        let mut found = Zeroizing::new(Vec::new());
        let moved = from.run("verified", source.size(), |offset, piece| {
            let (len, hole) = holes.at(&source, offset, piece.len()).map_err(|error| from.failed(error))?;
            let piece = &mut piece[..len];
            if hole {
                piece.fill(0);
                self.make_hole(&target, offset, len as u64).map_err(|error| to.failed(error))?;
            } else {
                source.read_once(piece, offset, &mut scratch).map_err(|error| from.failed(error))?;
                target.write_once(piece, offset, &mut scratch).map_err(|error| to.failed(error))?;
            }
            // While it is in the cache: what the medium makes of it later, no reading now could tell.
            found.resize(len, 0);
            target.read_once(&mut found, offset, &mut scratch).map_err(|error| to.failed(error))?;
            if *found != *piece { Err(self.differs(piece, &found)) } else { Ok(len) }
        })?;
        target.flush().map_err(|error| to.failed(error))?;
        let mut target = target.into_namespace().expect("nobody has locked it");
        if let Err(error) = target.publish() {
            // One copy may be there already, and would open.
            if let Err(error) = target.erase() {
                warning!("{}: its header could not be taken back: {}", self.to.display(), Chain(&error));
            }
            return Err(Error::Update { path: self.to.into(), source: error });
        }
        Ok((source.into_namespace().expect("nobody has locked it"), moved))
    }

    fn differs(&self, piece: &[u8], found: &[u8]) -> Error {
        let (written, found) = (crc32fast::hash(piece), crc32fast::hash(found));
        Error::NotVerified { path: self.to.into(), written, found }
    }

    /// Makes bytes of the target read as zeroes, like the hole that they come from; with blocks unless it is to be sparse.
    fn make_hole(&self, target: &Volume, offset: u64, len_bytes: u64) -> Result<(), VolumeError> {
        target.punch_zeroes(offset, len_bytes)?;
        if self.sparse {
            return Ok(());
        }
        let physical = target.geometry().physical_range(offset..offset + len_bytes);
        let physical = physical.map_err(|OutOfRange { size_bytes, .. }| VolumeError::OutOfRange {
            offset,
            len_bytes,
            size_bytes,
        })?;
        Ok(target.backing().allocate(physical)?)
    }
}

//! The data of one namespace into another one, whose header is withheld until every byte has been read back and is durable.

use std::path::Path;

use zeroize::Zeroizing;

use super::super::error::{Cause, Error, Leftover, line};
use super::super::gate::Operation;
use super::super::holes::Holes;
use super::super::pace::{Ended, Moved, Run};
use crate::namespace::{Namespace, OutOfRange};
use crate::volume::{Volume, VolumeError};
use crate::xts::Backend;

/// One copy: where it goes from and to, for messages, and how.
#[derive(Clone, Copy)]
pub(super) struct Copy<'a> {
    pub(super) operation: Operation,
    pub(super) from: &'a Path,
    pub(super) to: &'a Path,
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
        run: &mut Run<'_>,
    ) -> Result<(Namespace, Moved), Error> {
        let (source, target) = (Volume::new(source, backend), Volume::new(target, backend));
        let (mut holes, mut scratch) = (Holes::default(), Vec::new());
        let mut found = Zeroizing::new(Vec::new());
        let moved = run.pieces(Ended::Verified, source.size(), |offset, piece| {
            let from = |error: VolumeError| Failed::of(self.failed(self.from, error).at(offset));
            let to = |error: VolumeError| Failed::of(self.failed(self.to, error).at(offset));
            let (len, hole) = holes.at(&source, offset, piece.len()).map_err(from)?;
            let piece = &mut piece[..len];
            if hole {
                piece.fill(0);
                self.make_hole(&target, offset, len as u64).map_err(to)?;
            } else {
                source.read_once(piece, offset, &mut scratch).map_err(from)?;
                target.write_once(piece, offset, &mut scratch).map_err(to)?;
            }
            // While it is in the cache: what the medium makes of it later, no reading now could tell.
            found.resize(len, 0);
            target.read_once(&mut found, offset, &mut scratch).map_err(to)?;
            if *found != *piece {
                return Err(Failed::of(self.failed(self.to, differs(piece, &found)).at(offset)));
            }
            Ok(len)
        });
        let moved = moved.map_err(|failed| failed.at(self))?;
        target.flush().map_err(|error| self.failed(self.to, error))?;
        let mut target = target.into_namespace().expect("nobody has locked it");
        if let Err(error) = target.publish() {
            let mut error = self.failed(self.to, error);
            // One copy may be there already, and would open.
            if let Err(reason) = target.erase() {
                error.left.push(Leftover::Header { path: self.to.into(), reason: line(&reason) });
            }
            return Err(error);
        }
        Ok((source.into_namespace().expect("nobody has locked it"), moved))
    }

    fn failed(&self, path: &Path, cause: impl Into<Cause>) -> Error {
        Error::new(self.operation, path, cause)
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

fn differs(piece: &[u8], found: &[u8]) -> Cause {
    Cause::NotVerified { written: crc32fast::hash(piece), found: crc32fast::hash(found) }
}

/// A failure of a piece, which knows its place, or of the loop, which does not.
enum Failed {
    Piece(Box<Error>),
    Loop(Cause),
}

impl From<Cause> for Failed {
    fn from(cause: Cause) -> Self {
        Self::Loop(cause)
    }
}

impl Failed {
    fn of(error: Error) -> Self {
        Self::Piece(Box::new(error))
    }

    fn at(self, copy: &Copy<'_>) -> Error {
        match self {
            Self::Piece(error) => *error,
            Self::Loop(cause) => copy.failed(copy.from, cause),
        }
    }
}

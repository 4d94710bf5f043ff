//! Plaintext on its way from one place to another: copied in pieces, with progress, a pace and a checksum, and then read
//! back and compared.
//!
//! A signal ends it between two pieces with an error, so that what comes after a whole transfer never comes after a part.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zeroize::Zeroizing;

use super::error::Error;
use super::progress::Progress;
use super::rekey::{PaceArgs, catch_signals};
use super::size::ByteSize;
use crate::volume::{Volume, VolumeError};

/// Bytes at a time: enough that the calls do not show, and few enough that a piece stays in a core's cache in all four
/// shapes that it has on its way (plaintext, ciphertext, the page cache's copy of it, and what is read back).
const PIECE_BYTES: usize = 128 << 10;

/// The most runs of holes and data that are asked for at a time.
const RUNS_MAX: usize = 256;

/// One command's transfers.
pub(crate) struct Transfer<'a> {
    path: &'a Path,
    pace: &'a PaceArgs,
    stop: Arc<AtomicBool>,
}

impl<'a> Transfer<'a> {
    /// Errors name `path`. SIGINT and SIGTERM are caught from here on.
    pub(crate) fn new(path: &'a Path, pace: &'a PaceArgs) -> Result<Self, Error> {
        Ok(Self { path, pace, stop: catch_signals()? })
    }

    /// Runs `step` on pieces of `0..total_bytes`, each with a buffer of its length. `step` may return fewer bytes than it
    /// was offered, of which 0 ends the transfer; what it left in that part of the buffer goes into the checksum.
    pub(crate) fn run(
        &self,
        event: &'static str,
        total_bytes: u64,
        mut step: impl FnMut(u64, &mut [u8]) -> Result<usize, Error>,
    ) -> Result<Moved, Error> {
        let mut progress = Progress::new(0, total_bytes, self.pace.json, self.pace.max_rate);
        let mut buffer = Zeroizing::new(vec![0; PIECE_BYTES]);
        let mut checksum = crc32fast::Hasher::new();
        let mut done_bytes = 0;
        while done_bytes < total_bytes {
            if self.stop.load(Ordering::Relaxed) {
                progress.end("stopped", done_bytes);
                let (done, total) = (ByteSize(done_bytes), ByteSize(total_bytes));
                return Err(Error::TransferStopped { path: self.path.into(), done, total });
            }
            if progress.must_wait(done_bytes) {
                progress.reach(done_bytes);
                continue;
            }
            let len = usize::try_from(total_bytes - done_bytes).unwrap_or(usize::MAX).min(PIECE_BYTES);
            let len = step(done_bytes, &mut buffer[..len])?;
            if len == 0 {
                break;
            }
            checksum.update(&buffer[..len]);
            done_bytes += len as u64;
            progress.reach(done_bytes);
        }
        progress.end(event, done_bytes);
        Ok(Moved { bytes: done_bytes, checksum: checksum.finalize(), bytes_per_second: progress.rate(done_bytes) })
    }

    /// Reads the first `moved.bytes` bytes of `volume` again and compares their checksum.
    pub(crate) fn verify(&self, volume: &Volume, moved: &Moved) -> Result<(), Error> {
        let mut scratch = Vec::new();
        let found = self.run("verified", moved.bytes, |offset, piece| {
            volume.read_once(piece, offset, &mut scratch).map_err(|source| self.failed(source))?;
            Ok(piece.len())
        })?;
        self.compare(moved, &found)
    }

    pub(crate) fn compare(&self, moved: &Moved, found: &Moved) -> Result<(), Error> {
        if (moved.bytes, moved.checksum) == (found.bytes, found.checksum) {
            return Ok(());
        }
        Err(Error::NotVerified { path: self.path.into(), written: moved.checksum, found: found.checksum })
    }

    pub(crate) fn failed(&self, source: VolumeError) -> Error {
        Error::Volume { path: self.path.into(), source }
    }
}

/// What was transferred.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    pub(crate) bytes: u64,
    /// CRC-32 of all bytes.
    pub(crate) checksum: u32,
    pub(crate) bytes_per_second: u64,
}

/// The runs of holes and data of a volume, asked for as a transfer comes along.
#[derive(Debug, Default)]
pub(crate) struct Holes {
    /// The run that was looked at last, and whether it is a hole.
    run: Range<u64>,
    hole: bool,
}

impl Holes {
    /// How many of the `len` bytes at `offset` are of one kind, and whether that is a hole.
    pub(crate) fn at(&mut self, volume: &Volume, offset: u64, len: usize) -> Result<(usize, bool), VolumeError> {
        if !self.run.contains(&offset) {
            let left_bytes = volume.size() - offset;
            let runs = volume.extents(offset, left_bytes, RUNS_MAX)?;
            let first = runs.first().map_or((left_bytes, false), |run| (run.len_bytes, run.hole));
            (self.run, self.hole) = (offset..offset + first.0, first.1);
        }
        let left = usize::try_from(self.run.end - offset).unwrap_or(usize::MAX);
        Ok((len.min(left), self.hole))
    }
}

//! Import and export: plaintext from a disk image into a namespace, and back out.
//!
//! Holes are skipped on the way in and made on the way out. What was written is read back and compared by checksum. A stop
//! ends it between two pieces with an error, so that what comes after a whole transfer never comes after a part.

mod image;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use zeroize::Zeroizing;

pub use self::image::Image;
use super::error::{Cause, Error};
use super::gate::Operation;
use super::holes::Holes;
use super::identity;
use super::location::Location;
use super::pace::{Ended, Moved, Run};
use crate::volume::Volume;

/// Zero bytes that are left out of an exported file: the blocks of common file systems.
const HOLE_BYTES: usize = 4096;

/// How much is looked at to see whether there is data: every file system and partition table has something there.
const LOOK_BYTES: u64 = 64 << 20;
/// How far from even the bytes of a block of noise are at most, by the chi-square test over 256 values: mean 255, standard
/// deviation 22.6, so that it is exceeded once in far more blocks than there are.
const NOISE_CHI_SQUARE_MAX: u64 = 600;

/// Whether `volume` has something in its first 64 MiB that is not noise. What was never written under its key is noise, or a
/// hole; data that was compressed or encrypted by somebody else is, too, and cannot be told from that.
///
/// # Errors
///
/// [`Cause::Volume`].
pub fn holds_data(volume: &Volume) -> Result<bool, Cause> {
    let mut holes = Holes::default();
    let mut block = Zeroizing::new([0; HOLE_BYTES]);
    let (mut offset, end) = (0, volume.size().min(LOOK_BYTES));
    while offset < end {
        let len = usize::try_from(end - offset).unwrap_or(usize::MAX).min(HOLE_BYTES);
        let (len, hole) = holes.at(volume, offset, len)?;
        if !hole {
            volume.read_at(&mut block[..len], offset)?;
            // Where discards are allowed zeroes may be a hole, and are as good as one.
            let may_be_hole = volume.discards() && block[..len].iter().all(|&byte| byte == 0);
            if !may_be_hole && !is_noise(&block[..len]) {
                return Ok(true);
            }
        }
        offset += len as u64;
    }
    Ok(false)
}

/// A part of a block that is too short to tell is noise only if it is not all one byte.
fn is_noise(block: &[u8]) -> bool {
    if block.len() < HOLE_BYTES {
        return block.len() < 16 || block.iter().any(|&byte| byte != block[0]);
    }
    let mut counts = [0_u64; 256];
    block.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
    let expected = HOLE_BYTES as u64 / 256;
    let squares: u64 = counts.iter().map(|&count| count.abs_diff(expected).pow(2)).sum();
    squares / expected <= NOISE_CHI_SQUARE_MAX
}

/// Writes all of the image over `volume`, which lies at `place`: durable and compared when this returns.
///
/// # Errors
///
/// [`Cause::SamePlace`] for the backing itself; [`Cause::ImageTooLong`], [`Cause::Plain`], [`Cause::Volume`],
/// [`Cause::NotVerified`], [`Cause::Stopped`].
pub fn import(image: &mut Image, volume: &Volume, place: &Location, run: &mut Run<'_>) -> Result<Moved, Error> {
    refuse_own_backing(image, volume, place).map_err(|cause| Error::new(Operation::Import, place.path(), cause))?;
    let size_bytes = volume.size();
    if let Some(len_bytes) = image.len_bytes().filter(|&len_bytes| len_bytes > size_bytes) {
        let cause = Cause::ImageTooLong { len_bytes: Some(len_bytes), size_bytes };
        return Err(Error::new(Operation::Import, place.path(), cause));
    }
    import_all(image, volume, run).map_err(|cause| Error::new(Operation::Import, place.path(), cause))
}

/// What is read would be overwritten before it is read. A lock does not tell: reading a file takes none.
fn refuse_own_backing(image: &Image, volume: &Volume, place: &Location) -> Result<(), Cause> {
    let own = volume.with_namespace(|namespace| identity::extents_of(namespace.site()))?;
    if image.overlaps(&own) {
        let place = place.path().display();
        return Err(Cause::SamePlace(format!("the image is what {place} lies in, perhaps by another name")));
    }
    Ok(())
}

fn import_all(image: &mut Image, volume: &Volume, run: &mut Run<'_>) -> Result<Moved, Cause> {
    let size_bytes = volume.size();
    let len_bytes = image.len_bytes().unwrap_or(size_bytes);
    let mut scratch = Vec::new();
    let imported = run.pieces(Ended::Copied, len_bytes, |offset, piece| {
        let (len, hole) = image.read(offset, piece).map_err(Cause::Plain)?;
        if hole {
            volume.punch_zeroes(offset, len as u64)?;
        } else {
            volume.write_once(&piece[..len], offset, &mut scratch)?;
        }
        Ok::<_, Cause>(len)
    })?;
    if image.read(imported.bytes, &mut [0]).map_err(Cause::Plain)?.0 > 0 {
        return Err(Cause::ImageTooLong { len_bytes: None, size_bytes });
    }
    volume.flush()?;
    run.verify(volume, &imported)?;
    Ok(imported)
}

/// Writes all of `volume` to `out`, which cannot be read back.
///
/// # Errors
///
/// [`Cause::Plain`], [`Cause::Volume`], [`Cause::Stopped`].
pub fn export_to_stream(
    volume: &Volume,
    place: &Location,
    out: &mut dyn Write,
    run: &mut Run<'_>,
) -> Result<Moved, Error> {
    let exported = run.pieces(Ended::Done, volume.size(), |offset, piece| {
        volume.read_at(piece, offset)?;
        out.write_all(piece).map_err(Cause::Plain)?;
        Ok::<_, Cause>(piece.len())
    });
    let exported = exported.and_then(|moved| out.flush().map(|()| moved).map_err(Cause::Plain));
    exported.map_err(|cause| Error::new(Operation::Export, place.path(), cause))
}

/// Writes all of `volume` to a new file at `plain`, mode 0600: durable and compared when this returns. A part of an image is
/// no image: after an error there is none.
///
/// # Errors
///
/// As [`export_to_stream`], and [`Cause::NotVerified`].
pub fn export_to_file(volume: &Volume, place: &Location, plain: &Path, run: &mut Run<'_>) -> Result<Moved, Error> {
    let failed = |cause| Error::new(Operation::Export, place.path(), cause);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(plain);
    let file = file.map_err(|source| failed(Cause::Plain(source)))?;
    let exported = export_all(&file, volume, run);
    if exported.is_err() {
        let _ = std::fs::remove_file(plain); // the first error is the one to report
    }
    exported.map_err(failed)
}

fn export_all(file: &File, volume: &Volume, run: &mut Run<'_>) -> Result<Moved, Cause> {
    file.set_len(volume.size()).map_err(Cause::Plain)?;
    let exported = run.pieces(Ended::Copied, volume.size(), |offset, piece| {
        volume.read_at(piece, offset)?;
        write_around_zeroes(file, offset, piece).map_err(Cause::Plain)?;
        Ok::<_, Cause>(piece.len())
    })?;
    file.sync_all().map_err(Cause::Plain)?;
    let found = run.pieces(Ended::Verified, volume.size(), |offset, piece| {
        file.read_exact_at(piece, offset).map_err(Cause::Plain)?;
        Ok::<_, Cause>(piece.len())
    })?;
    exported.compare(&found)?;
    Ok(exported)
}

/// Writes the runs of blocks that are not all zero; the file reads as zeroes elsewhere.
fn write_around_zeroes(file: &File, offset: u64, piece: &[u8]) -> io::Result<()> {
    let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    let mut at = 0;
    for run in piece.chunks(HOLE_BYTES).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = run.iter().map(|block| block.len()).sum();
        if !is_zero(run[0]) {
            file.write_all_at(&piece[at..at + len], offset + at as u64)?;
        }
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod crash_tests;

//! `daxcrypt import` and `export`: plaintext from a disk image into a namespace, and back out.
//!
//! Holes are skipped on the way in and made on the way out. What was written is read back and compared by checksum.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::io::Errno;

use super::credentials::KeyArgs;
use super::error::Error;
use super::open;
use super::output::outln;
use super::place::PlaceArgs;
use super::rekey::PaceArgs;
use super::size::ByteSize;
use super::transfer::{Moved, Transfer};
use crate::pmem::Access;
use crate::volume::Volume;
use crate::xts::Backend;

/// Zero bytes that are left out of an exported file: the blocks of common file systems.
const HOLE_BYTES: usize = 4096;

#[derive(Args, Debug)]
pub(crate) struct ImportArgs {
    /// Disk image or device to read; "-" is standard input, for `nbdcopy URI - | daxcrypt import - ...`
    plain: PathBuf,
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    pace: PaceArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// File to make, with mode 0600; "-" is standard output
    plain: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    pace: PaceArgs,
}

pub(crate) fn import(args: &ImportArgs) -> Result<(), Error> {
    let reads_stdin = args.plain == Path::new("-");
    if reads_stdin && args.key.passphrase_file.as_deref() == Some(Path::new("-")) {
        return Err(Error::Usage("standard input cannot be both the image and the passphrase".into()));
    }
    let mut image = Image::open(&args.plain).map_err(|source| Error::Plain { path: args.plain.clone(), source })?;
    let namespace = open::namespace(&args.place, Access::ReadWrite, &args.key)?;
    let volume = Volume::new(namespace, Backend::from_env()?);
    let size = volume.size();
    let len_bytes = image.len_bytes.unwrap_or(size);
    if len_bytes > size {
        let (plain, path) = (args.plain.display(), args.place.path.display());
        return Err(Error::Usage(format!("{plain} has {len_bytes} bytes, but {path} has room for {size}")));
    }
    let transfer = Transfer::new(&args.place.path, &args.pace)?;
    let imported = import_from(&args.plain, &mut image, &volume, &transfer)?;
    if !args.pace.json {
        let rest = if imported.bytes < size { "; the rest of the namespace is as it was" } else { "" };
        let (bytes, rate) = (ByteSize(imported.bytes), ByteSize(imported.bytes_per_second));
        outln!("{}: {bytes} imported ({rate}/s) and verified{rest}", args.place.path.display())?;
    }
    Ok(())
}

/// All of the image, which has been found to fit unless it is a stream: durable and compared when this returns.
fn import_from(plain: &Path, image: &mut Image, volume: &Volume, transfer: &Transfer<'_>) -> Result<Moved, Error> {
    let failed = |source| Error::Plain { path: plain.into(), source };
    let len_bytes = image.len_bytes.unwrap_or_else(|| volume.size());
    let mut scratch = Vec::new();
    let imported = transfer.run("copied", len_bytes, |offset, piece| {
        let (len, hole) = image.read(offset, piece).map_err(failed)?;
        if hole {
            volume.punch_zeroes(offset, len as u64).map_err(|error| transfer.failed(error))?;
        } else {
            let written = volume.write_once(&piece[..len], offset, &mut scratch);
            written.map_err(|error| transfer.failed(error))?;
        }
        Ok(len)
    })?;
    if image.read(imported.bytes, &mut [0]).map_err(failed)?.0 > 0 {
        return Err(Error::Usage(format!("{} has more than {} bytes", plain.display(), volume.size())));
    }
    volume.flush().map_err(|error| transfer.failed(error))?;
    transfer.verify(volume, &imported)?;
    Ok(imported)
}

pub(crate) fn export(args: &ExportArgs) -> Result<(), Error> {
    let failed = |source| Error::Plain { path: args.plain.clone(), source };
    let namespace = open::namespace(&args.place, Access::ReadOnly, &args.key)?;
    let volume = Volume::new(namespace, Backend::from_env()?);
    let transfer = Transfer::new(&args.place.path, &args.pace)?;
    if args.plain == Path::new("-") {
        let mut out = io::stdout().lock();
        transfer.run("done", volume.size(), |offset, piece| {
            volume.read_at(piece, offset).map_err(|error| transfer.failed(error))?;
            out.write_all(piece).map_err(failed)?;
            Ok(piece.len())
        })?;
        return out.flush().map_err(failed);
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&args.plain);
    let file = file.map_err(failed)?;
    let result = export_to(&file, &volume, &transfer, failed);
    if result.is_err() {
        let _ = std::fs::remove_file(&args.plain); // a part of an image is no image
    }
    let rate = result?;
    if !args.pace.json {
        let size = ByteSize(volume.size());
        outln!("{}: {size} exported ({}/s) and verified", args.plain.display(), ByteSize(rate))?;
    }
    Ok(())
}

fn export_to(
    file: &File,
    volume: &Volume,
    transfer: &Transfer<'_>,
    failed: impl Fn(io::Error) -> Error,
) -> Result<u64, Error> {
    file.set_len(volume.size()).map_err(&failed)?;
    let exported = transfer.run("copied", volume.size(), |offset, piece| {
        volume.read_at(piece, offset).map_err(|error| transfer.failed(error))?;
        write_around_zeroes(file, offset, piece).map_err(&failed)?;
        Ok(piece.len())
    })?;
    file.sync_all().map_err(&failed)?;
    let found = transfer.run("verified", volume.size(), |offset, piece| {
        file.read_exact_at(piece, offset).map_err(&failed)?;
        Ok(piece.len())
    })?;
    transfer.compare(&exported, &found)?;
    Ok(exported.bytes_per_second)
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

/// What is imported.
struct Image {
    file: Box<dyn ReadSource>,
    /// Unknown for a stream.
    len_bytes: Option<u64>,
    /// Up to where the data or hole reaches that was found last, and whether it is a hole.
    run: (u64, bool),
}

/// A file that can be asked for its holes, or a stream that cannot.
trait ReadSource {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize>;
    /// The end of the run of data or hole at `offset`, which is also where reading goes on.
    fn run_at(&mut self, offset: u64) -> io::Result<(u64, bool)>;
}

impl ReadSource for File {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        Read::read(self, piece)
    }

    fn run_at(&mut self, offset: u64) -> io::Result<(u64, bool)> {
        let find = |position| match rustix::fs::seek(&*self, position) {
            Ok(found) => Ok(found),
            Err(Errno::NXIO) => Ok(u64::MAX),
            Err(errno) => Err(io::Error::from(errno)),
        };
        let data = find(rustix::fs::SeekFrom::Data(offset))?;
        let run = if data > offset { (data, true) } else { (find(rustix::fs::SeekFrom::Hole(offset))?, false) };
        self.seek(SeekFrom::Start(offset))?;
        Ok(run)
    }
}

impl ReadSource for io::StdinLock<'static> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        Read::read(self, piece)
    }

    fn run_at(&mut self, _offset: u64) -> io::Result<(u64, bool)> {
        Ok((u64::MAX, false))
    }
}

impl Image {
    fn open(path: &Path) -> io::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self { file: Box::new(io::stdin().lock()), len_bytes: None, run: (0, false) });
        }
        let mut file = File::open(path)?;
        // Of a block device the metadata do not tell the length.
        let len_bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self { file: Box::new(file), len_bytes: Some(len_bytes), run: (0, false) })
    }

    /// Fills `piece`, or a part of it, with the bytes at `offset`; how many, and whether they are a hole. Offsets ascend.
    fn read(&mut self, offset: u64, piece: &mut [u8]) -> io::Result<(usize, bool)> {
        let left = self.len_bytes.map_or(u64::MAX, |len_bytes| len_bytes - offset);
        if left == 0 || piece.is_empty() {
            return Ok((0, false));
        }
        if offset >= self.run.0 {
            self.run = self.file.run_at(offset)?;
        }
        let (end, hole) = self.run;
        let len = usize::try_from((end - offset).min(left)).unwrap_or(usize::MAX).min(piece.len());
        let piece = &mut piece[..len];
        if hole {
            piece.fill(0);
            return Ok((len, true));
        }
        let mut filled = 0;
        while filled < len {
            match self.file.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok((filled, false))
    }
}

#[cfg(test)]
mod crash_tests;

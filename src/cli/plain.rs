//! `daxcrypt import` and `export`: plaintext from a disk image into a namespace, and back out.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use clap::Args;

use super::credentials::KeyArgs;
use super::erase;
use super::error::Error;
use super::open;
use super::output::outln;
use super::pace::{PaceArgs, catch_signals};
use super::place::PlaceArgs;
use super::progress::Progress;
use super::size::ByteSize;
use crate::ops::transfer::{self, Image};
use crate::ops::{self, Cause, Operation, Run};
use crate::volume::Volume;
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct ImportArgs {
    /// Disk image or device to read; "-" is standard input, for `nbdcopy URI - | daxcrypt import - ...`
    plain: PathBuf,
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// Overwrite the data that is in the namespace, without asking
    #[arg(long)]
    force: bool,
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
    let image = if reads_stdin { Ok(Image::stream(io::stdin().lock())) } else { Image::open(&args.plain) };
    let mut image = image.map_err(|source| Error::Plain { path: args.plain.clone(), source })?;
    let namespace = open::namespace(&args.place, Operation::Import, &args.key)?;
    let volume = Volume::new(namespace, Backend::from_env()?);
    if !args.force {
        agree_to_loss(args, &volume)?;
    }
    let (mut progress, stop) = (Progress::new(args.pace.json), catch_signals()?);
    let mut run = Run::new(&mut progress, &stop, args.pace.bytes_per_second());
    let imported = transfer::import(&mut image, &volume, &args.place.location(), &mut run);
    let imported = imported.map_err(|error| failed(&args.plain, error))?;
    if !args.pace.json {
        let rest = if imported.bytes < volume.size() { "; the rest of the namespace is as it was" } else { "" };
        let (bytes, rate) = (ByteSize(imported.bytes), ByteSize(imported.bytes_per_second));
        outln!("{}: {bytes} imported ({rate}/s) and verified{rest}", args.place.path.display())?;
    }
    Ok(())
}

/// Asks, where there is somebody to be asked, before data is overwritten.
fn agree_to_loss(args: &ImportArgs, volume: &Volume) -> Result<(), Error> {
    let path = &args.place.path;
    let holds_data = transfer::holds_data(volume);
    if !holds_data.map_err(|cause| ops::Error::new(Operation::Import, path, cause))? {
        return Ok(());
    }
    if args.plain != Path::new("-") && io::stdin().is_terminal() {
        return erase::confirm(&args.place, Some(volume.header()));
    }
    Err(Error::HoldsData { path: path.clone() })
}

pub(crate) fn export(args: &ExportArgs) -> Result<(), Error> {
    let namespace = open::namespace(&args.place, Operation::Export, &args.key)?;
    let volume = Volume::new(namespace, Backend::from_env()?);
    let (mut progress, stop) = (Progress::new(args.pace.json), catch_signals()?);
    let mut run = Run::new(&mut progress, &stop, args.pace.bytes_per_second());
    let location = args.place.location();
    if args.plain == Path::new("-") {
        let exported = transfer::export_to_stream(&volume, &location, &mut io::stdout().lock(), &mut run);
        return exported.map(drop).map_err(|error| failed(&args.plain, error));
    }
    let exported = transfer::export_to_file(&volume, &location, &args.plain, &mut run);
    let exported = exported.map_err(|error| failed(&args.plain, error))?;
    if !args.pace.json {
        let (size, rate) = (ByteSize(volume.size()), ByteSize(exported.bytes_per_second));
        outln!("{}: {size} exported ({rate}/s) and verified", args.plain.display())?;
    }
    Ok(())
}

/// Errors of the plain image name it.
fn failed(plain: &Path, error: ops::Error) -> Error {
    let ops::Error { operation, path, cause, .. } = error;
    match *cause {
        Cause::Plain(source) => Error::Plain { path: plain.into(), source },
        Cause::ImageTooLong { len_bytes: Some(len_bytes), size_bytes } => {
            let (plain, path) = (plain.display(), path.display());
            Error::Usage(format!("{plain} has {len_bytes} bytes, but {path} has room for {size_bytes}"))
        }
        Cause::ImageTooLong { len_bytes: None, size_bytes } => {
            Error::Usage(format!("{} has more than {size_bytes} bytes", plain.display()))
        }
        cause => ops::Error::new(operation, &path, cause).into(),
    }
}

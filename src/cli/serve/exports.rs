//! From the namespaces of a plan to exports that have been read from.

use std::path::PathBuf;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::stem;
use super::volumes::Volumes;
use crate::cli::credentials::KeyArgs;
use crate::cli::error::Error;
use crate::cli::export_options::ExportOptions;
use crate::cli::open;
use crate::cli::output::warning;
use crate::cli::place::PlaceArgs;
use crate::namespace::{Credential, Namespace};
use crate::nbd_server::{ExportInfo, Exports};
use crate::ops::{self, Key, Location, Operation};
use crate::secret::{self, SecretBytes, VolumeKey};
use crate::volume::Volume;
use crate::xts::Backend;

/// A namespace to serve, and how.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    /// The file of a detached header.
    pub(super) header: Option<PathBuf>,
    /// Whether the user vouches for the data of that.
    pub(super) accept_data: bool,
    pub(super) key: KeyArgs,
    pub(super) options: ExportOptions,
}

/// Opens, unlocks and reads every namespace. With `keep_going` one that fails is left out, unless all do.
pub(super) fn open_all(sources: &[Source], keep_going: bool, volumes: &Volumes) -> Result<Exports, Error> {
    let backend = Backend::from_env()?;
    let mut exports = Exports::new();
    let mut first_error = None;
    for source in sources {
        match add(&mut exports, source, backend, volumes) {
            Ok(()) => {}
            Err(error) if keep_going => {
                warning!("not served: {}", error.chain());
                first_error.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    match first_error {
        Some(error) if exports.is_empty() => Err(error),
        _ => Ok(exports),
    }
}

/// A volume that can be served.
pub(super) struct Opened {
    pub(super) info: ExportInfo,
    pub(super) location: Location,
    pub(super) volume: Arc<Volume>,
}

fn add(exports: &mut Exports, source: &Source, backend: Backend, volumes: &Volumes) -> Result<(), Error> {
    let opened = open(source, backend)?;
    let name = opened.info.name.clone();
    let export: Arc<Volume> = Arc::clone(&opened.volume);
    exports.add(opened.info, export).map_err(|error| Error::Export { path: source.path.clone(), source: error })?;
    volumes.add(&name, opened.location, opened.volume, source.options.luks2);
    Ok(())
}

impl Source {
    fn operation(&self) -> Operation {
        if self.options.read_only { Operation::ServeReadOnly } else { Operation::Serve }
    }

    fn place(&self) -> PlaceArgs {
        PlaceArgs { path: self.path.clone(), header: self.header.clone(), accept_data: self.accept_data }
    }
}

/// Opens what `source` names, with the key that it names.
fn open(source: &Source, backend: Backend) -> Result<Opened, Error> {
    let (place, operation) = (source.place(), source.operation());
    let volume = if source.options.luks2 {
        open::volume(&place, operation, &source.key, true)?
    } else {
        let mut namespace = open::namespace(&place, operation, &source.key)?;
        allow_discards(source, &place, &mut namespace)?;
        Volume::new(namespace, backend)
    };
    made_ready(source, volume)
}

/// Has discards punch holes from now on, if that is wanted.
fn allow_discards(source: &Source, place: &PlaceArgs, namespace: &mut Namespace) -> Result<(), Error> {
    if source.options.allow_discards {
        ops::also(Operation::AllowDiscards, &place.location(), namespace)?;
        let allowed = namespace.allow_discards();
        allowed.map_err(|error| Error::AllowDiscards { path: source.path.clone(), source: error })?;
    }
    Ok(())
}

/// Opens what `source` names, with a credential that came from elsewhere; without one it must be ephemeral.
pub(super) fn open_with(source: &Source, key: Option<&Credential>, by_volume_key: bool) -> Result<Opened, Error> {
    let (place, operation, backend) = (source.place(), source.operation(), Backend::from_env()?);
    let volume = match (key, source.options.luks2) {
        (Some(_), true) if by_volume_key => {
            return Err(Error::Usage("--escrow-file is for namespaces, and not for LUKS2 volumes".into()));
        }
        (Some(credential), true) => {
            let unlocked = open::luks2(&place, &place.open(operation)?)?.unlock(credential);
            Volume::from_luks2(
                unlocked.map_err(|error| Error::Luks2Unlock { path: place.path, source: error })?,
                backend,
            )
        }
        (key, _) => {
            let key = match key {
                None => Key::Ephemeral,
                Some(Credential::Passphrase(bytes) | Credential::KeyFile(bytes)) if by_volume_key => {
                    let volume_key = VolumeKey::new(SecretBytes::copy_of(bytes));
                    Key::VolumeKey(volume_key.map_err(|_| Error::WrongKey { name: source.path.display().to_string() })?)
                }
                Some(credential) => Key::Credential(credential),
            };
            let mut namespace = open::found(&place, operation)?.unlock(key)?;
            allow_discards(source, &place, &mut namespace)?;
            Volume::new(namespace, backend)
        }
    };
    made_ready(source, volume)
}

fn made_ready(source: &Source, volume: Volume) -> Result<Opened, Error> {
    let path = &source.path;
    let label = volume.header().label.clone();
    let name = source.options.name.clone().unwrap_or_else(|| if label.is_empty() { stem(path) } else { label });
    if volume.discards() {
        warning!("{}: discards are allowed, so media shows which units are unused", path.display());
    }
    // What this thread leaves on its stack stays there as long as the server runs.
    secret::with_wiped_stack(|| read_one_unit(&volume))
        .map_err(|source| Error::Volume { path: path.clone(), source })?;
    let info = ExportInfo { name, ..source.options.info() };
    Ok(Opened { info, location: source.place().location(), volume: Arc::new(volume) })
}

/// Shows that data can be read, before anybody is told so.
fn read_one_unit(volume: &Volume) -> Result<(), crate::volume::VolumeError> {
    let mut unit = Zeroizing::new(vec![0; volume.geometry().unit_bytes() as usize]);
    volume.read_at(&mut unit[..], 0)
}

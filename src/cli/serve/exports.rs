//! From the namespaces of a plan to exports that have been read from.

use std::path::PathBuf;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::stem;
use super::volumes::Volumes;
use crate::cli::credentials::KeyArgs;
use crate::cli::error::Error;
use crate::cli::open;
use crate::cli::output::warning;
use crate::cli::place::PlaceArgs;
use crate::nbd_server::{Allowed, ExportInfo, Exports};
use crate::ops::{self, Operation};
use crate::secret;
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
    /// Whether it is a LUKS2 volume and not a namespace.
    pub(super) luks2: bool,
    pub(super) key: KeyArgs,
    /// Instead of the label or the file's stem.
    pub(super) name: Option<String>,
    pub(super) description: String,
    pub(super) read_only: bool,
    pub(super) allow_discards: bool,
    pub(super) tls_required: bool,
    pub(super) allowed: Allowed,
    /// Who may write, if not all of those.
    pub(super) writers: Allowed,
}

impl Source {
    /// How it is presented to clients; without a name where the namespace itself has to say it.
    pub(super) fn info(&self) -> ExportInfo {
        ExportInfo {
            name: self.name.clone().unwrap_or_default(),
            description: self.description.clone(),
            read_only: self.read_only,
            writers: self.writers.clone(),
            tls_required: self.tls_required,
            allowed: self.allowed.clone(),
        }
    }

    /// Whether a rule of it needs the names in certificates.
    pub(super) fn names_certificates(&self) -> bool {
        self.allowed.names_certificates() || self.writers.names_certificates()
    }
}

/// Opens, unlocks and reads every namespace, and gives the paths of those that are served too. With `keep_going` one that
/// fails is left out, unless all do.
pub(super) fn open_all(
    sources: &[Source],
    keep_going: bool,
    volumes: &Volumes,
) -> Result<(Exports, Vec<PathBuf>), Error> {
    let backend = Backend::from_env()?;
    let mut exports = Exports::new();
    let (mut first_error, mut paths) = (None, Vec::new());
    for source in sources {
        match add(&mut exports, source, backend, volumes) {
            Ok(()) => paths.push(source.path.clone()),
            Err(error) if keep_going => {
                warning!("not served: {}", error.chain());
                first_error.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    match first_error {
        Some(error) if exports.is_empty() => Err(error),
        _ => Ok((exports, paths)),
    }
}

fn add(exports: &mut Exports, source: &Source, backend: Backend, volumes: &Volumes) -> Result<(), Error> {
    let path = &source.path;
    let operation = if source.read_only { Operation::ServeReadOnly } else { Operation::Serve };
    let place = PlaceArgs { path: path.clone(), header: source.header.clone(), accept_data: source.accept_data };
    let location = place.location();
    let volume = if source.luks2 {
        open::volume(&place, operation, &source.key, true)?
    } else {
        let mut namespace = open::namespace(&place, operation, &source.key)?;
        if source.allow_discards {
            ops::also(Operation::AllowDiscards, &location, &namespace)?;
            namespace.allow_discards().map_err(|source| Error::AllowDiscards { path: path.clone(), source })?;
        }
        Volume::new(namespace, backend)
    };
    let label = volume.header().label.clone();
    let name = source.name.clone().unwrap_or_else(|| if label.is_empty() { stem(path) } else { label });
    if volume.discards() {
        warning!("{}: discards are allowed, so media shows which units are unused", path.display());
    }
    // What this thread leaves on its stack stays there as long as the server runs.
    secret::with_wiped_stack(|| read_one_unit(&volume))
        .map_err(|source| Error::Volume { path: path.clone(), source })?;
    let info = ExportInfo { name: name.clone(), ..source.info() };
    let volume = Arc::new(volume);
    let export: Arc<Volume> = Arc::clone(&volume);
    exports.add(info, export).map_err(|source| Error::Export { path: path.clone(), source })?;
    volumes.add(&name, location, volume, source.luks2);
    Ok(())
}

/// Shows that data can be read, before anybody is told so.
fn read_one_unit(volume: &Volume) -> Result<(), crate::volume::VolumeError> {
    let mut unit = Zeroizing::new(vec![0; volume.geometry().unit_bytes() as usize]);
    volume.read_at(&mut unit[..], 0)
}

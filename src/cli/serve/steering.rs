//! What the control socket asks for, done by whoever knows how.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use super::exports::{self, Opened, Source};
use super::reload::Reloader;
use super::volumes::Volumes;
use crate::cli::control::{Answer, ExportCommand, NewExport, Request, ServerCommand, What};
use crate::cli::credentials::KeyArgs;
use crate::cli::error::{Error, Exit, chain};
use crate::namespace::Credential;
use crate::nbd_server::Handle;
use crate::volume::Volume;

/// Those who know how.
#[derive(Debug)]
pub(super) struct Steering {
    pub(super) volumes: Arc<Volumes>,
    pub(super) server: Handle,
    pub(super) reloader: Reloader,
}

impl Steering {
    /// Answers what came in on the control socket.
    pub(super) fn answer(&self, received: &[u8]) -> String {
        let answer = match Request::parse(received) {
            Some((request, credentials)) => self.obey(&request.what, &credentials),
            None => Answer::refused("the request cannot be read: is the server of another version?"),
        };
        serde_json::to_string(&answer).unwrap_or_default() + "\n"
    }

    fn obey(&self, what: &What, credentials: &[Credential]) -> Answer {
        match what {
            What::Namespace { namespace, command } => self.volumes.obey(namespace, command, credentials),
            What::Export { name, command } => self.obey_export(name, command, credentials),
            What::Server(command) => self.obey_server(command, credentials),
        }
    }

    fn obey_server(&self, command: &ServerCommand, credentials: &[Credential]) -> Answer {
        match command {
            ServerCommand::LockAll { wait } => self.volumes.lock_all(&self.server, *wait),
            ServerCommand::AddExport(new) => self.add(new, credentials.first()).unwrap_or_else(|error| refused(&error)),
            ServerCommand::KickClient(client) if self.server.kick(*client) => Answer::Done,
            ServerCommand::KickClient(client) => Answer::refused(format!("there is no client {client}")),
            ServerCommand::Reload => match self.reloader.reload(&self.server) {
                Ok(()) => Answer::Done,
                Err(error) => {
                    Answer::Refused { reason: format!("nothing is changed: {}", error.chain()), help: error.hint() }
                }
            },
        }
    }

    /// Opens a namespace and serves it from now on.
    fn add(&self, new: &NewExport, key: Option<&Credential>) -> Result<Answer, Error> {
        let source = source(new, &self.server)?;
        let Opened { info, location, volume } = exports::open_with(&source, key, new.by_volume_key)?;
        let name = info.name.clone();
        let failed = |error| Error::of_volume(&source.path, error);
        if !volume.read_only() {
            volume.mark_in_use().map_err(failed)?;
        }
        let export: Arc<Volume> = Arc::clone(&volume);
        if let Err(error) = self.server.add_export(info, export) {
            if !volume.read_only() {
                volume.mark_closed().map_err(failed)?;
            }
            return Err(Error::Export { path: source.path, source: error });
        }
        tracing::info!(export = name.as_str(), path = %source.path.display(), "served from now on");
        self.volumes.add(&name, location, volume, source.options.luks2).go_on_or_rest();
        Ok(Answer::Added(name))
    }

    /// Serves an export no more.
    fn remove(&self, name: &str) -> Answer {
        let Some(served) = self.volumes.named(name) else { return super::locking::not_served(name) };
        let alone = served.obeying();
        let flushed = self.server.remove_export(name);
        let closed = self.volumes.remove(&served);
        drop(alone);
        tracing::info!(export = name, "not served any more");
        match (flushed, closed) {
            (Some(Err(error)), _) => {
                Answer::refused(format!("it is not served any more, but could not be flushed: {}", chain(&error)))
            }
            (_, Err(error)) => Answer::refused(format!("it is not served any more, but: {}", error.chain())),
            _ => Answer::Done,
        }
    }

    fn obey_export(&self, name: &str, command: &ExportCommand, credentials: &[Credential]) -> Answer {
        match (command, credentials) {
            (ExportCommand::Lock { wait }, _) => self.volumes.lock(&self.server, name, *wait),
            (ExportCommand::Unlock { by_volume_key }, [key]) => {
                self.volumes.unlock(&self.server, name, key, *by_volume_key)
            }
            (ExportCommand::Unlock { .. }, _) => Answer::refused("no key came with it"),
            (ExportCommand::Remove, _) => self.remove(name),
        }
    }
}

/// What is to be opened, if the server can keep what is asked of it.
fn source(new: &NewExport, server: &Handle) -> Result<Source, Error> {
    let refused = |reason: &str| Err(Error::Usage(format!("{}: {reason}", new.path.display())));
    let options = &new.options;
    options.check().or_else(|reason| refused(&reason))?;
    match server.asks_for_certificates() {
        None if options.needs_tls() => refused("it has rules that only TLS can fulfil, but TLS is off")?,
        Some(false) if options.names_certificates() => {
            refused(
                "it has rules on certificates, but the server asks clients for none: it needs tls.verify_client or --tls-verify-client",
            )?;
        }
        _ => {}
    }
    Ok(Source {
        path: new.path.clone(),
        header: new.header.clone(),
        accept_data: new.accept_data,
        key: KeyArgs::default(),
        options: options.clone(),
    })
}

/// Whether a cause of it is that somebody may not.
fn is_denied(error: &Error) -> bool {
    let causes = std::iter::successors(Some(error as &(dyn StdError + 'static)), |cause| (*cause).source());
    let kinds = causes.filter_map(|cause| cause.downcast_ref::<io::Error>());
    kinds.map(io::Error::kind).any(|kind| kind == io::ErrorKind::PermissionDenied)
}

fn refused(error: &Error) -> Answer {
    match error.exit() {
        Exit::WrongKey => Answer::WrongCredential,
        _ => {
            let reason = error.chain();
            // That of the sandbox looks like any other.
            let denied = is_denied(error);
            let folder =
                "`serve --export-folder DIR` lets the sandbox open the namespaces of a folder, --no-sandbox all".into();
            Answer::Refused { help: if denied { Some(folder) } else { error.hint() }, reason }
        }
    }
}

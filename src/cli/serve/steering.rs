//! What the control socket asks for, done by whoever knows how.

use std::sync::Arc;

use super::volumes::Volumes;
use crate::cli::control::{Answer, ExportCommand, Request, ServerCommand, What};
use crate::namespace::Credential;
use crate::nbd_server::Handle;

/// Those who know how.
#[derive(Debug)]
pub(super) struct Steering {
    pub(super) volumes: Arc<Volumes>,
    pub(super) server: Handle,
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
            What::Server(ServerCommand::LockAll { wait }) => self.volumes.lock_all(&self.server, *wait),
        }
    }

    fn obey_export(&self, name: &str, command: &ExportCommand, credentials: &[Credential]) -> Answer {
        match (command, credentials) {
            (ExportCommand::Lock { wait }, _) => self.volumes.lock(&self.server, name, *wait),
            (ExportCommand::Unlock { by_volume_key }, [key]) => {
                self.volumes.unlock(&self.server, name, key, *by_volume_key)
            }
            (ExportCommand::Unlock { .. }, _) => Answer::refused("no key came with it"),
        }
    }
}

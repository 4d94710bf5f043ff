//! The volumes that are served, and what is done with each as a whole meanwhile: it is marked as in use, and the control
//! socket has it re-keyed or resized.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::rekey::Running;
use crate::cli::control::{Action, Answer, Command, RekeyRequest};
use crate::cli::error::Error;
use crate::cli::output::complain;
use crate::cli::size::ByteSize;
use crate::namespace::Credential;
use crate::ops::Location;
use crate::ops::resize::{self, Resized, Wanted};
use crate::volume::{Volume, VolumeError};

/// The volumes that are served, and the threads that re-key them; those are stopped when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    served: Mutex<Vec<Served>>,
    rekey_rate: Option<ByteSize>,
}

#[derive(Debug)]
pub(super) struct Served {
    pub(super) location: Location,
    pub(super) volume: Arc<Volume>,
    pub(super) running: Option<Running>,
}

impl Volumes {
    /// None yet; `rekey_rate` bytes a second at most for each re-key.
    pub(super) fn new(rekey_rate: Option<ByteSize>) -> Self {
        Self { served: Mutex::default(), rekey_rate }
    }

    /// Takes note of a volume, says what was left undone with it, and goes on with its re-key if one may go on.
    pub(super) fn add(&self, location: Location, volume: Arc<Volume>) {
        let mut served = Served { location, volume, running: None };
        if served.volume.header().unclean {
            let path = served.location.path().display();
            complain(format_args!("{path}: it was not closed in order; nothing that a client had flushed is lost"));
        }
        served.go_on_or_rest(self.rekey_rate);
        self.served().push(served);
    }

    /// Marks every namespace that may be written as in use. When one cannot be marked, none is.
    pub(super) fn mark_in_use(&self) -> Result<(), Error> {
        let served = self.served();
        let mut writable = served.iter().filter(|served| !served.volume.read_only());
        let marked =
            writable.try_for_each(|served| served.volume.mark_in_use().map_err(|source| served.failed(source)));
        drop(served);
        marked.inspect_err(|_| {
            let _ = self.close(); // the first error is the one to report
        })
    }

    /// Ends the re-keys between two windows, and marks every namespace as closed whose data is durable. The first error is
    /// given, after all have been tried.
    pub(super) fn close(&self) -> Result<(), Error> {
        let mut closed = Ok(());
        for served in &mut *self.served() {
            served.stop();
            if !served.volume.read_only() {
                let marked = served.volume.mark_closed().map_err(|source| served.failed(source));
                closed = closed.and(marked);
            }
        }
        closed
    }

    /// Answers what came in on the control socket.
    pub(super) fn answer(&self, received: &[u8]) -> String {
        let answer = match Command::parse(received) {
            Some(command) => self.obey(&command),
            None => Answer::Refused("the request cannot be read".into()),
        };
        serde_json::to_string(&answer).unwrap_or_default() + "\n"
    }

    fn obey(&self, command: &Command) -> Answer {
        let mut served = self.served();
        let Some(served) = served.iter_mut().find(|served| served.volume.header().uuid == command.uuid()) else {
            return Answer::Refused("the server does not serve that namespace".into());
        };
        match command {
            Command::Rekey(request, credential) => served.rekey(request, credential, self.rekey_rate),
            Command::Resize(request) => served.resize(request.resize),
        }
    }

    fn served(&self) -> MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Served {
    fn rekey(&mut self, request: &RekeyRequest, credential: &Credential, rate: Option<ByteSize>) -> Answer {
        let done = match request.rekey {
            Action::Status => Ok(()),
            Action::Begin => self.begin(request, credential),
            Action::Pause => self.pause(),
            Action::Resume => self.volume.set_transform_paused(false).map_err(|error| self.refused(error)),
        };
        if let Err(answer) = done {
            return answer;
        }
        if matches!(request.rekey, Action::Begin | Action::Resume) {
            self.stop();
            self.go_on(request.max_rate.map(ByteSize).or(rate));
        }
        let progress = self.volume.transform();
        let progress = progress.map(|progress| (progress.done_bytes, progress.total_bytes));
        Answer::State { progress, paused: self.volume.transform_paused() }
    }

    /// Clients that connect from now on see the new size.
    fn resize(&self, wanted: Wanted) -> Answer {
        match resize::apply(&self.location, &self.volume, wanted) {
            Ok(resized) => {
                let Resized { old_bytes, new_bytes } = resized;
                tracing::info!(path = %self.location.path().display(), old_bytes, new_bytes, "resized");
                Answer::Resized(resized)
            }
            Err(error) => Answer::of(error),
        }
    }

    fn failed(&self, source: VolumeError) -> Error {
        Error::of_volume(self.location.path(), source)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
    }
}

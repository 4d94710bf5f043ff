//! The volumes that are served, and what is done with each as a whole meanwhile: it is marked as in use, and the control
//! socket has it re-keyed or resized, or its key slots changed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::rekey::Running;
use crate::cli::control::{Answer, Command, RekeyLine, Request, Who};
use crate::cli::error::Error;
use crate::cli::output::complain;
use crate::cli::size::ByteSize;
use crate::namespace::{Credential, KdfCost};
use crate::ops::resize::{self, Resized, Wanted};
use crate::ops::{self, Cause, Location, Whereabouts, keys, rekey};
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
    /// What the server itself was told, in bytes a second.
    pub(super) rekey_rate: Option<u64>,
}

impl Volumes {
    /// None yet; `rekey_rate` bytes a second at most for each re-key.
    pub(super) fn new(rekey_rate: Option<ByteSize>) -> Self {
        Self { served: Mutex::default(), rekey_rate }
    }

    /// Takes note of a volume, says what was left undone with it, and goes on with its re-key if one may go on.
    pub(super) fn add(&self, location: Location, volume: Arc<Volume>) {
        let rekey_rate = self.rekey_rate.map(|rate| rate.0);
        let mut served = Served { location, volume, running: None, rekey_rate };
        if served.volume.header().unclean {
            let path = served.location.path().display();
            complain(format_args!("{path}: it was not closed in order; nothing that a client had flushed is lost"));
        }
        served.go_on_or_rest();
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
        let answer = match Request::parse(received) {
            Some((request, credentials)) => self.obey(&request, &credentials),
            None => Answer::refused("the request cannot be read: is the server of another version?"),
        };
        serde_json::to_string(&answer).unwrap_or_default() + "\n"
    }

    /// The re-keys that are under way, or could not go on, as JSON.
    pub(super) fn rekeys(&self) -> serde_json::Value {
        let served = self.served();
        let states = served.iter().map(|served| RekeyLine {
            path: served.location.path().display().to_string(),
            state: served.rekey_state(),
        });
        let told: Vec<_> = states.filter(|line| line.state.progress.is_some() || line.state.failed.is_some()).collect();
        serde_json::to_value(told).unwrap_or_default()
    }

    fn obey(&self, request: &Request, credentials: &[Credential]) -> Answer {
        let mut served = self.served();
        let obeyed = match find(&mut served, &request.namespace) {
            Ok(served) => served.obey(&request.command, credentials).map_err(|cause| served.answer_of(request, cause)),
            Err(reason) => Err(Answer::refused(reason)),
        };
        obeyed.unwrap_or_else(|answer| answer)
    }

    fn served(&self) -> MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The volume that lies where the question says. One with the same uuid somewhere else is a copy, and is not guessed at.
fn find<'a>(served: &'a mut [Served], who: &Who) -> Result<&'a mut Served, String> {
    let has_uuid = |served: &Served| served.volume.header().uuid == who.uuid;
    let is_there = |served: &Served| matches!(Whereabouts::of_volume(&served.volume), Ok(Some(at)) if at == who.at);
    let indices: Vec<_> = (0..served.len()).filter(|&index| has_uuid(&served[index])).collect();
    let meant: Vec<_> = indices.iter().copied().filter(|&index| is_there(&served[index])).collect();
    match (&meant[..], &indices[..]) {
        (&[index], _) => Ok(&mut served[index]),
        (&[], &[]) => Err("the server does not serve that namespace".into()),
        (&[], &[copy, ..]) => {
            let path = served[copy].location.path().display();
            Err(format!("the server does not serve that namespace, but a copy of it: {path}"))
        }
        _ => Err("the server serves that namespace more than once".into()),
    }
}

impl Served {
    fn obey(&mut self, command: &Command, credentials: &[Credential]) -> Result<Answer, Cause> {
        ops::also_in_use(command.operation(), &self.volume)?;
        let credential = |index: usize| credentials.get(index).ok_or(Cause::NoKeyGiven);
        match command {
            Command::RekeyStatus => {}
            Command::RekeyPreview(change) => {
                return Ok(Answer::Estimate(rekey::estimate(&self.volume, change.wish())?));
            }
            Command::RekeyBegin { change, max_rate } => {
                rekey::begin_in_use(&self.volume, credential(0)?, change.wish())?;
                self.go_on(*max_rate);
            }
            Command::RekeyResume { max_rate } => {
                self.volume.set_transform_paused(false)?;
                self.go_on(*max_rate);
            }
            Command::RekeyPause => {
                self.stop();
                self.volume.set_transform_paused(true)?;
            }
            Command::RekeyStop => self.stop(),
            Command::Resize(wanted) => return self.resize(*wanted),
            Command::KeyAdd { slot, label, cost } => {
                let (present, new) = (credential(0)?, credential(1)?);
                return keys::add_in_use(&self.volume, present, *slot, label, new, *cost).map(Answer::Slot);
            }
            Command::KeyRemove { slot, force } => {
                return keys::remove_in_use(&self.volume, credential(0)?, *slot, *force).map(|()| Answer::Slot(*slot));
            }
            Command::KeyChange { slot, memory_kib, time } => {
                let (present, new) = (credential(0)?, credential(1)?);
                let cost = |cost: KdfCost| KdfCost {
                    memory_kib: memory_kib.unwrap_or(cost.memory_kib),
                    time: time.unwrap_or(cost.time),
                    ..cost
                };
                return keys::change_in_use(&self.volume, present, *slot, new, cost).map(Answer::Slot);
            }
        }
        Ok(Answer::Rekey(self.rekey_state()))
    }

    /// Clients that connect from now on see the new size.
    fn resize(&self, wanted: Wanted) -> Result<Answer, Cause> {
        let resized = resize::apply(&self.location, &self.volume, wanted).map_err(|error| *error.cause)?;
        let Resized { old_bytes, new_bytes } = resized;
        tracing::info!(path = %self.location.path().display(), old_bytes, new_bytes, "resized");
        Ok(Answer::Resized(resized))
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

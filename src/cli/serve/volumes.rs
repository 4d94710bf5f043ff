//! The volumes that are served, and what is done with each as a whole meanwhile: it is marked as in use, and the control
//! socket has it re-keyed or resized, or its key slots changed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::rekey::Running;
use crate::cli::control::{Answer, Command, Who};
use crate::cli::error::Error;
use crate::cli::output::complain;
use crate::cli::size::ByteSize;
use crate::namespace::{Credential, KdfCost, Site};
use crate::nbd_server::RekeyStatus;
use crate::ops::resize::{self, Resized, Wanted};
use crate::ops::{self, Cause, Location, Whereabouts, keys, rekey};
use crate::volume::{Volume, VolumeError};

/// The volumes that are served, and the threads that re-key them; those are stopped when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    served: RwLock<Vec<Arc<Served>>>,
    rekey_rate: Option<ByteSize>,
    /// Held while a key is derived for an unlock: the memory of one derivation at a time is enough.
    pub(super) deriving: Mutex<()>,
}

/// A volume that is served. Its commands run one after the other; whoever only asks how it stands waits for none of them.
#[derive(Debug)]
pub(super) struct Served {
    /// The name of its export.
    pub(super) name: String,
    pub(super) location: Location,
    pub(super) volume: Arc<Volume>,
    pub(super) luks2: bool,
    /// What the server itself was told, in bytes a second.
    pub(super) rekey_rate: Option<u64>,
    /// Held while a command is obeyed.
    obeying: Mutex<()>,
    state: Mutex<State>,
}

/// What changes of a volume that is served.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) running: Option<Running>,
    /// Bytes a second that the re-key was asked to keep to.
    pub(super) asked_rate: Option<u64>,
    /// While it is locked: where it is to be opened again, and whether its re-key then goes on.
    pub(super) locked: Option<(Site, bool)>,
}

impl Volumes {
    /// None yet; `rekey_rate` bytes a second at most for each re-key.
    pub(super) fn new(rekey_rate: Option<ByteSize>) -> Self {
        Self { rekey_rate, ..Self::default() }
    }

    /// Takes note of a volume, and says what was left undone with it.
    pub(super) fn add(&self, name: &str, location: Location, volume: Arc<Volume>, luks2: bool) -> Arc<Served> {
        let served = Arc::new(Served {
            name: name.to_owned(),
            location,
            volume,
            luks2,
            rekey_rate: self.rekey_rate.map(|rate| rate.0),
            obeying: Mutex::default(),
            state: Mutex::default(),
        });
        if served.volume.header().unclean {
            let path = served.location.path().display();
            complain(format_args!("{path}: it was not closed in order; nothing that a client had flushed is lost"));
        }
        self.served.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&served));
        served
    }

    /// Goes on with every re-key that may go on.
    pub(super) fn start_rekeys(&self) {
        self.served().iter().for_each(|served| served.go_on_or_rest());
    }

    /// Marks every namespace that may be written as in use. When one cannot be marked, none is.
    pub(super) fn mark_in_use(&self) -> Result<(), Error> {
        let marked = self.served().iter().try_for_each(|served| served.mark_in_use());
        marked.inspect_err(|_| {
            let _ = self.close(); // the first error is the one to report
        })
    }

    /// Ends the re-keys between two windows, and marks every namespace as closed whose data is durable. The first error is
    /// given, after all have been tried.
    pub(super) fn close(&self) -> Result<(), Error> {
        let mut closed = Ok(());
        for served in self.served() {
            let this = served.close();
            closed = closed.and(this);
        }
        closed
    }

    /// The re-keys that are under way, or could not go on.
    pub(super) fn rekeys(&self) -> Vec<RekeyStatus> {
        let told = self.served();
        let told = told.iter().map(|served| served.rekey_status());
        told.filter(|rekey| rekey.progress.is_some() || rekey.failed.is_some()).collect()
    }

    /// Does what the control socket asks of a namespace.
    pub(super) fn obey(&self, who: &Who, command: &Command, credentials: &[Credential]) -> Answer {
        match find(&self.served(), who) {
            Ok(served) => served.obey(command, credentials).unwrap_or_else(|cause| served.answer_of(command, cause)),
            Err(reason) => Answer::refused(reason),
        }
    }

    /// Those that are served now.
    pub(super) fn served(&self) -> Vec<Arc<Served>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets one that is not served any more, and closes it.
    pub(super) fn remove(&self, served: &Arc<Served>) -> Result<(), Error> {
        let mut all = self.served.write().unwrap_or_else(PoisonError::into_inner);
        all.retain(|other| !Arc::ptr_eq(other, served));
        drop(all);
        served.close()
    }

    /// The one that is the export of that name.
    pub(super) fn named(&self, name: &str) -> Option<Arc<Served>> {
        self.served().into_iter().find(|served| served.name == name)
    }
}

/// The volume that lies where the question says. One with the same uuid somewhere else is a copy, and is not guessed at.
fn find(served: &[Arc<Served>], who: &Who) -> Result<Arc<Served>, String> {
    let has_uuid = |served: &Served| served.volume.header().uuid == who.uuid;
    let is_there = |served: &Served| matches!(Whereabouts::of_volume(&served.volume), Ok(Some(at)) if at == who.at);
    let indices: Vec<_> = (0..served.len()).filter(|&index| has_uuid(&served[index])).collect();
    let meant: Vec<_> = indices.iter().copied().filter(|&index| is_there(&served[index])).collect();
    match (&meant[..], &indices[..]) {
        (&[index], _) => Ok(Arc::clone(&served[index])),
        (&[], &[]) => Err("the server does not serve that namespace".into()),
        (&[], &[copy, ..]) => {
            let path = served[copy].location.path().display();
            Err(format!("the server does not serve that namespace, but a copy of it: {path}"))
        }
        _ => Err("the server serves that namespace more than once".into()),
    }
}

impl Served {
    fn obey(&self, command: &Command, credentials: &[Credential]) -> Result<Answer, Cause> {
        let _alone = self.obeying();
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

    fn mark_in_use(&self) -> Result<(), Error> {
        if self.volume.read_only() {
            return Ok(());
        }
        self.volume.mark_in_use().map_err(|source| self.failed(source))
    }

    /// Ends its re-key, and marks it as closed, which one that is locked is already.
    fn close(&self) -> Result<(), Error> {
        self.stop();
        if self.volume.read_only() || self.volume.locked() {
            return Ok(());
        }
        self.volume.mark_closed().map_err(|source| self.failed(source))
    }

    /// Until the guard is dropped no other command is obeyed.
    pub(super) fn obeying(&self) -> MutexGuard<'_, ()> {
        self.obeying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held for moments only.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

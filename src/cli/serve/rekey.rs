//! Re-keys while their namespaces are served: those that were interrupted go on, and the control socket begins others.
//!
//! Each has a thread. It stops between two windows when it is paused or the server stops; a later serve goes on from there.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::process::nice;

use crate::cli::control::{Action, Answer, Request};
use crate::cli::info::slot_line;
use crate::cli::progress::Progress;
use crate::cli::size::ByteSize;
use crate::namespace::{Credential, TransformError};
use crate::volume::{Volume, WINDOW_BYTES};

/// How much nicer than the threads that serve a re-key's thread is, as nice(2) counts: at 5 it has a third of their weight.
/// Where all processors are busy the clients then keep most of them; an idle one it uses whole. It is not the nicest there
/// is because a request that meets the window being moved waits for this thread.
const NICER_BY: i32 = 5;

/// The volumes that are served, and the threads that re-key them; those are stopped when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Rekeys {
    served: Mutex<Vec<Served>>,
    max_rate: Option<ByteSize>,
}

#[derive(Debug)]
struct Served {
    path: PathBuf,
    volume: Arc<Volume>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Rekeys {
    pub(super) fn new(max_rate: Option<ByteSize>) -> Self {
        Self { served: Mutex::default(), max_rate }
    }

    /// Takes note of a served volume, and goes on with its re-key if one is under way that may go on.
    pub(super) fn add(&self, path: PathBuf, volume: Arc<Volume>) {
        let mut served = Served { path, volume, running: None };
        if let Some(progress) = served.volume.transform() {
            if served.volume.read_only() || served.volume.transform_paused() {
                let (done, total) = (ByteSize(progress.done_bytes), ByteSize(progress.total_bytes));
                eprintln!("daxcrypt: {}: a re-key rests at {done} of {total}", served.path.display());
            } else {
                served.go_on(self.max_rate);
            }
        }
        self.served().push(served);
    }

    /// Answers what came in on the control socket.
    pub(super) fn answer(&self, received: &[u8]) -> String {
        let answer = match Request::parse(received) {
            Some((request, credential)) => self.obey(&request, &credential),
            None => Answer::Refused("the request cannot be read".into()),
        };
        serde_json::to_string(&answer).unwrap_or_default() + "\n"
    }

    fn obey(&self, request: &Request, credential: &Credential) -> Answer {
        let mut served = self.served();
        let Some(served) = served.iter_mut().find(|served| served.volume.header().uuid == request.uuid) else {
            return Answer::Refused("the server does not serve that namespace".into());
        };
        let done = match request.rekey {
            Action::Status => Ok(()),
            Action::Begin => served.begin(request, credential),
            Action::Pause => served.pause(),
            Action::Resume => served.volume.set_transform_paused(false).map_err(|error| Answer::of(&error)),
        };
        if let Err(answer) = done {
            return answer;
        }
        if matches!(request.rekey, Action::Begin | Action::Resume) {
            served.stop();
            served.go_on(request.max_rate.map(ByteSize).or(self.max_rate));
        }
        let progress = served.volume.transform();
        let progress = progress.map(|progress| (progress.done_bytes, progress.total_bytes));
        Answer::State { progress, paused: served.volume.transform_paused() }
    }

    fn served(&self) -> MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Served {
    fn begin(&mut self, request: &Request, credential: &Credential) -> Result<(), Answer> {
        let volume = &self.volume;
        volume.use_slot_of(credential).map_err(|error| Answer::of(&error))?;
        let others = volume.other_slots();
        if !others.is_empty() && request.keep_slots.is_none() {
            let others: Vec<_> = others.iter().map(|slot| format!("{}, {}", slot.id, slot_line(slot))).collect();
            return Err(Answer::OtherSlots(others.join("; ")));
        }
        volume.begin_rekey(credential, &request.options()).map_err(|error| Answer::of(&error))
    }

    fn pause(&mut self) -> Result<(), Answer> {
        self.stop();
        self.volume.set_transform_paused(true).map_err(|error| Answer::of(&error))
    }

    /// Starts a thread that moves the data.
    fn go_on(&mut self, max_rate: Option<ByteSize>) {
        let stop = Arc::new(AtomicBool::new(false));
        let (volume, path, stopped) = (Arc::clone(&self.volume), self.path.clone(), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            // Of the calling thread alone on Linux. Where it may not be changed, it stays.
            let _ = nice(NICER_BY);
            if let Err(error) = run(&volume, max_rate, &stopped) {
                tracing::error!(path = %path.display(), %error, "the re-key failed: reopen the namespace");
            }
        });
        self.running = Some(Running { stop, thread });
    }

    /// Ends the thread between two windows.
    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop.store(true, Ordering::Relaxed);
            let _ = running.thread.join(); // a panic has been printed
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Answer {
    fn of(error: &TransformError) -> Self {
        match error {
            TransformError::Credential => Self::WrongCredential,
            other => Self::Refused(other.to_string()),
        }
    }
}

fn run(volume: &Volume, max_rate: Option<ByteSize>, stop: &AtomicBool) -> Result<(), TransformError> {
    let Some(first) = volume.transform() else { return Ok(()) };
    let mut progress = Progress::new(first.done_bytes, first.total_bytes, false, max_rate).quiet();
    let mut done_bytes = first.done_bytes;
    tracing::info!(done_bytes, first.total_bytes, "the re-key goes on");
    while !stop.load(Ordering::Relaxed) {
        if progress.must_wait(done_bytes) {
            progress.reach(done_bytes);
            continue;
        }
        match volume.transform_step(WINDOW_BYTES)? {
            Some(reached) => done_bytes = reached.done_bytes,
            None => {
                tracing::info!(first.total_bytes, "every byte is under the new volume key");
                break;
            }
        }
    }
    Ok(())
}

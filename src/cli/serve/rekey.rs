//! Re-keys while their namespaces are served: those that were interrupted go on, and the control socket begins others.
//!
//! Each has a thread. It stops between two windows when it is paused or the server stops; a later serve goes on from there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::process::nice;

use super::volumes::Served;
use crate::cli::control::{Answer, RekeyRequest};
use crate::cli::info::slot_line;
use crate::cli::output::complain;
use crate::cli::progress::Progress;
use crate::cli::size::ByteSize;
use crate::namespace::{Credential, TransformError};
use crate::volume::{Volume, WINDOW_BYTES};

/// How much nicer than the threads that serve a re-key's thread is, as nice(2) counts: at 5 it has a third of their weight.
/// Where all processors are busy the clients then keep most of them; an idle one it uses whole. It is not the nicest there
/// is because a request that meets the window being moved waits for this thread.
const NICER_BY: i32 = 5;

/// The thread of a re-key.
#[derive(Debug)]
pub(super) struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Served {
    /// Goes on with a re-key that was interrupted, or says that it rests.
    pub(super) fn go_on_or_rest(&mut self, max_rate: Option<ByteSize>) {
        let Some(progress) = self.volume.transform() else { return };
        if self.volume.read_only() || self.volume.transform_paused() {
            let (done, total) = (ByteSize(progress.done_bytes), ByteSize(progress.total_bytes));
            complain(format_args!("{}: a re-key rests at {done} of {total}", self.path.display()));
        } else {
            self.go_on(max_rate);
        }
    }

    pub(super) fn begin(&mut self, request: &RekeyRequest, credential: &Credential) -> Result<(), Answer> {
        let volume = &self.volume;
        volume.use_slot_of(credential).map_err(|error| Answer::of(&error))?;
        let others = volume.other_slots();
        if !others.is_empty() && request.keep_slots.is_none() {
            let others: Vec<_> = others.iter().map(|slot| format!("{}, {}", slot.id, slot_line(slot))).collect();
            return Err(Answer::OtherSlots(others.join("; ")));
        }
        volume.begin_rekey(credential, &request.options()).map_err(|error| Answer::of(&error))
    }

    pub(super) fn pause(&mut self) -> Result<(), Answer> {
        self.stop();
        self.volume.set_transform_paused(true).map_err(|error| Answer::of(&error))
    }

    /// Starts a thread that moves the data.
    pub(super) fn go_on(&mut self, max_rate: Option<ByteSize>) {
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
    pub(super) fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop.store(true, Ordering::Relaxed);
            let _ = running.thread.join(); // a panic has been printed
        }
    }
}

impl Answer {
    pub(super) fn of(error: &TransformError) -> Self {
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

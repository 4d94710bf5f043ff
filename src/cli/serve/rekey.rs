//! Re-keys while their namespaces are served: those that were interrupted go on, and the control socket begins others.
//!
//! Each has a thread. It stops between two windows when it is paused or the server stops; a later serve goes on from there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::process::nice;

use super::volumes::Served;
use crate::cli::control::{Answer, RekeyRequest};
use crate::cli::error::chain;
use crate::cli::output::complain;
use crate::cli::size::ByteSize;
use crate::namespace::{Credential, TransformError, UpdateError};
use crate::ops::{self, Cause, Ended, Operation, Run, Watch, rekey};

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
            complain(format_args!("{}: a re-key rests at {done} of {total}", self.location.path().display()));
        } else {
            self.go_on(max_rate);
        }
    }

    pub(super) fn begin(&mut self, request: &RekeyRequest, credential: &Credential) -> Result<(), Answer> {
        rekey::begin_in_use(&self.volume, credential, request.wish()).map_err(|cause| self.refused(cause))
    }

    pub(super) fn refused(&self, cause: impl Into<Cause>) -> Answer {
        Answer::of(ops::Error::new(Operation::RekeyBegin, self.location.path(), cause))
    }

    pub(super) fn pause(&mut self) -> Result<(), Answer> {
        self.stop();
        self.volume.set_transform_paused(true).map_err(|error| self.refused(error))
    }

    /// Starts a thread that moves the data.
    pub(super) fn go_on(&mut self, max_rate: Option<ByteSize>) {
        let stop = Arc::new(AtomicBool::new(false));
        let (volume, path, stopped) = (Arc::clone(&self.volume), self.location.path().to_path_buf(), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            // Of the calling thread alone on Linux. Where it may not be changed, it stays.
            let _ = nice(NICER_BY);
            match Run::new(&mut Log, &stopped, max_rate.map(|rate| rate.0)).end_transform(&volume) {
                Ok(_) | Err(Cause::Stopped { .. }) => {}
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "the re-key failed: reopen the namespace");
                }
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
    /// What is said about a failure.
    pub(super) fn of(error: ops::Error) -> Self {
        match *error.cause {
            Cause::OtherSlots(slots) => Self::OtherSlots(slots),
            Cause::Update(UpdateError::Shrinks { old_bytes, new_bytes }) => Self::Shrinks { old_bytes, new_bytes },
            Cause::Transform(error) if matches!(*error, TransformError::Credential) => Self::WrongCredential,
            cause => Self::Refused(chain(&cause)),
        }
    }
}

/// Says when it begins and ends.
struct Log;

impl Watch for Log {
    fn begin(&mut self, done_bytes: u64, total_bytes: u64) {
        tracing::info!(done_bytes, total_bytes, "the re-key goes on");
    }

    fn reach(&mut self, _done_bytes: u64) {}

    fn end(&mut self, ended: Ended, done_bytes: u64) {
        if ended == Ended::Done {
            tracing::info!(done_bytes, "every byte is under the new volume key");
        }
    }
}

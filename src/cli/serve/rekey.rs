//! Re-keys while their namespaces are served: those that were interrupted go on, and the control socket begins others.
//!
//! Each has a thread. It stops between two windows when it is paused or the server stops; a later serve goes on from there.
//! One that cannot go on leaves its reason, for whoever asks how it stands.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use rustix::process::nice;

use super::volumes::Served;
use crate::cli::control::{Answer, Command, RekeyState};
use crate::cli::error::chain;
use crate::cli::output::complain;
use crate::cli::size::ByteSize;
use crate::namespace::{TransformError, UpdateError};
use crate::ops::{Cause, Ended, Run, Watch};
use crate::volume::VolumeError;

/// How much nicer than the threads that serve a re-key's thread is, as nice(2) counts: at 5 it has a third of their weight.
/// Where all processors are busy the clients then keep most of them; an idle one it uses whole. It is not the nicest there
/// is because a request that meets the window being moved waits for this thread.
const NICER_BY: i32 = 5;

/// The thread of a re-key.
#[derive(Debug)]
pub(super) struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    /// Why it ended before its end.
    failed: Arc<OnceLock<String>>,
}

impl Served {
    /// Goes on with a re-key that was interrupted, or says that it rests.
    pub(super) fn go_on_or_rest(&self) {
        let Some(progress) = self.volume.transform() else { return };
        if self.volume.read_only() || self.volume.transform_paused() {
            let (done, total) = (ByteSize(progress.done_bytes), ByteSize(progress.total_bytes));
            complain(format_args!("{}: a re-key rests at {done} of {total}", self.location.path().display()));
        } else {
            self.go_on(None);
        }
    }

    /// How its re-key stands.
    pub(super) fn rekey_state(&self) -> RekeyState {
        let (progress, paused) = (self.volume.transform(), self.volume.transform_paused());
        let state = self.state();
        let running = state.running.as_ref();
        RekeyState {
            progress,
            paused,
            running: running.is_some_and(|running| !running.thread.is_finished()),
            failed: running.and_then(|running| running.failed.get().cloned()),
        }
    }

    /// What is answered to `command`, which failed for this cause.
    pub(super) fn answer_of(&self, command: &Command, cause: Cause) -> Answer {
        match cause {
            Cause::OtherSlots(slots) => Answer::OtherSlots(slots),
            Cause::OwnSlot { slot } => Answer::OwnSlot(slot),
            Cause::Update(UpdateError::Shrinks { old_bytes, new_bytes }) => Answer::Shrinks { old_bytes, new_bytes },
            Cause::Transform(error) if matches!(*error, TransformError::Credential) => Answer::WrongCredential,
            Cause::Refused(refusal) => {
                let reason = format!("cannot {} it: {refusal}", command.operation());
                Answer::Refused { reason, help: refusal.help.command(self.location.path()) }
            }
            Cause::Volume(VolumeError::Locked) => self.answer_of_locked(),
            Cause::Transform(error) if matches!(*error, TransformError::Locked) => self.answer_of_locked(),
            cause => Answer::refused(chain(&cause)),
        }
    }

    fn answer_of_locked(&self) -> Answer {
        let help = Some(format!("`daxcrypt unlock {} --control SOCKET` unlocks it", self.name));
        Answer::Refused { reason: "it is locked".into(), help }
    }

    /// Starts a thread that moves the data, in the place of one that may run. Without a rate that of the server holds.
    pub(super) fn go_on(&self, asked_rate: Option<u64>) {
        self.stop();
        let (stop, failed) = (Arc::new(AtomicBool::new(false)), Arc::new(OnceLock::new()));
        let (volume, path) = (Arc::clone(&self.volume), self.location.path().to_path_buf());
        let (stopped, reason) = (Arc::clone(&stop), Arc::clone(&failed));
        let max_rate = asked_rate.or(self.rekey_rate);
        let thread = thread::spawn(move || {
            // Of the calling thread alone on Linux. Where it may not be changed, it stays.
            let _ = nice(NICER_BY);
            match Run::new(&mut Log, &stopped, max_rate).end_transform(&volume) {
                Ok(_) | Err(Cause::Stopped { .. }) => {}
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "the re-key failed: reopen the namespace");
                    let _ = reason.set(chain(&error)); // nobody else sets it
                }
            }
        });
        let mut state = self.state();
        (state.running, state.asked_rate) = (Some(Running { stop, thread, failed }), asked_rate);
    }

    /// Ends the thread between two windows.
    pub(super) fn stop(&self) {
        let running = self.state().running.take();
        if let Some(running) = running {
            running.stop.store(true, Ordering::Relaxed);
            let _ = running.thread.join(); // a panic has been printed
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

//! Re-keys while their namespaces are served: those that were interrupted go on, and the control socket begins others.
//!
//! Each has a thread. It stops between two windows when it is paused or the server stops; a later serve goes on from there.
//! One that cannot go on leaves its reason, for whoever asks how it stands.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::process::nice;

use super::meter::Meter;
use super::volumes::Served;
use crate::cli::control::{Answer, Command, RekeyState};
use crate::cli::error::chain;
use crate::cli::output::complain;
use crate::cli::size::ByteSize;
use crate::namespace::{TransformError, UpdateError};
use crate::nbd_server::RekeyStatus;
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
    meter: Arc<Meter>,
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

    /// The same, and how fast it goes.
    pub(super) fn rekey_status(&self) -> RekeyStatus {
        let RekeyState { progress, paused, running, failed } = self.rekey_state();
        let meter = self.state().running.as_ref().map(|running| Arc::clone(&running.meter));
        let rate = meter.filter(|_| running).map_or(0, |meter| meter.bytes_per_second(Instant::now()));
        let left_bytes = progress.map_or(0, |progress| progress.total_bytes.saturating_sub(progress.done_bytes));
        RekeyStatus {
            export: self.name.clone(),
            path: self.location.path().display().to_string(),
            progress,
            bytes_per_second: rate,
            seconds_left: (rate > 0).then(|| left_bytes.div_ceil(rate.max(1))),
            paused,
            running,
            failed,
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
        let meter = Arc::new(Meter::default());
        let mut log = Log { meter: Arc::clone(&meter) };
        let max_rate = asked_rate.or(self.rekey_rate);
        let thread = thread::spawn(move || {
            // Of the calling thread alone on Linux. Where it may not be changed, it stays.
            let _ = nice(NICER_BY);
            match Run::new(&mut log, &stopped, max_rate).end_transform(&volume) {
                Ok(_) | Err(Cause::Stopped { .. }) => {}
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "the re-key failed: reopen the namespace");
                    let _ = reason.set(chain(&error)); // nobody else sets it
                }
            }
        });
        let mut state = self.state();
        (state.running, state.asked_rate) = (Some(Running { stop, thread, failed, meter }), asked_rate);
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

/// Says when it begins and ends, and notes how fast it goes.
struct Log {
    meter: Arc<Meter>,
}

impl Watch for Log {
    fn begin(&mut self, done_bytes: u64, total_bytes: u64) {
        tracing::info!(done_bytes, total_bytes, "the re-key goes on");
        self.meter.note(Instant::now(), done_bytes);
    }

    fn reach(&mut self, done_bytes: u64) {
        self.meter.note(Instant::now(), done_bytes);
    }

    fn end(&mut self, ended: Ended, done_bytes: u64) {
        if ended == Ended::Done {
            tracing::info!(done_bytes, "every byte is under the new volume key");
        }
    }
}

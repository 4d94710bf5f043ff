//! Locking and unlocking exports while they are served, when somebody asks for it or when nobody has used them for a while.
//!
//! Guards: what is locked stays open, and locked against other processes; its header says that it was closed in order; a re-key
//! under way rests between two windows and goes on with the unlock. A key is derived on the thread of whoever brings it, and
//! nothing else waits for that.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::volumes::{Served, Volumes};
use crate::cli::control::{Answer, LockedLine};
use crate::cli::error::chain;
use crate::luks2;
use crate::namespace::{Credential, Site};
use crate::nbd_server::{Handle, WhileLocked};
use crate::ops::lock::Luks2Error;
use crate::ops::{self, Cause, Key, Kind};
use crate::secret::{SecretBytes, VolumeKey};

/// How often, in the time after which an export is locked, it is looked at.
const LOOKS: u32 = 8;
/// The longest time between two looks.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(5);

impl Volumes {
    /// Locks one export.
    pub(super) fn lock(&self, server: &Handle, name: &str, wait: bool) -> Answer {
        let Some(served) = self.named(name) else { return not_served(name) };
        match served.lock(server, wait) {
            Ok(line) => Answer::Locked(vec![line]),
            Err(answer) => answer,
        }
    }

    /// Locks every export that has a key to come back with.
    pub(super) fn lock_all(&self, server: &Handle, wait: bool) -> Answer {
        let mut lines = Vec::new();
        for served in self.served().iter().filter(|served| !served.volume.header().ephemeral) {
            match served.lock(server, wait) {
                Ok(line) => lines.push(line),
                Err(answer) => return answer,
            }
        }
        Answer::Locked(lines)
    }

    /// Unlocks an export with `key`: a credential, or the bytes of the volume key.
    pub(super) fn unlock(&self, server: &Handle, name: &str, key: &Credential, by_volume_key: bool) -> Answer {
        let Some(served) = self.named(name) else { return not_served(name) };
        let _alone = served.obeying();
        let Some((site, resumes)) = served.state().locked.clone() else {
            return Answer::refused(format!("{name} is not locked"));
        };
        let _deriving = self.deriving.lock().unwrap_or_else(PoisonError::into_inner);
        match server.unlock_export(name, || served.open_again(site, key, by_volume_key)) {
            None => not_served(name),
            Some(Err(answer)) => {
                tracing::warn!(export = name, "not unlocked");
                answer
            }
            Some(Ok(())) => {
                tracing::info!(export = name, "unlocked");
                let mut state = served.state();
                let (_, asked_rate) = (state.locked.take(), state.asked_rate);
                drop(state);
                if resumes && served.volume.transform().is_some() {
                    served.go_on(asked_rate);
                }
                Answer::Unlocked
            }
        }
    }
}

pub(super) fn not_served(name: &str) -> Answer {
    let help = Some("`daxcrypt status` shows the names of exports".into());
    Answer::Refused { reason: format!("there is no export {name:?}"), help }
}

impl Served {
    fn lock(&self, server: &Handle, wait: bool) -> Result<LockedLine, Answer> {
        let _alone = self.obeying();
        let meanwhile = if wait { WhileLocked::Wait } else { WhileLocked::Fail };
        let line = |failed| LockedLine { name: self.name.clone(), waits: wait, failed };
        if self.volume.locked() {
            server.lock_export(&self.name, meanwhile, || ());
            return Ok(line(None));
        }
        let refused = |cause: Cause| match cause {
            Cause::Refused(refusal) => Answer::refused(format!("cannot lock {}: {refusal}", self.name)),
            cause => Answer::refused(chain(&cause)),
        };
        let site = ops::lock::check(&self.volume).map_err(refused)?;
        let resumes = self.rekey_state().running;
        self.stop();
        self.state().locked = Some((site, resumes));
        let locked = server.lock_export(&self.name, meanwhile, || ops::lock::lock_in_use(&self.volume));
        if !self.volume.locked() {
            self.state().locked = None;
            if resumes {
                let asked_rate = self.state().asked_rate;
                self.go_on(asked_rate);
            }
            return Err(locked.and_then(Result::err).map_or_else(|| not_served(&self.name), refused));
        }
        tracing::info!(export = self.name.as_str(), requests_wait = wait, "locked: key and plaintext are wiped");
        let failed = locked.and_then(Result::err).map(|cause| chain(&cause));
        if let Some(reason) = &failed {
            tracing::error!(export = self.name.as_str(), reason, "what was written before the lock may be lost");
        }
        Ok(line(failed))
    }

    fn open_again(&self, site: Site, key: &Credential, by_volume_key: bool) -> Result<(), Answer> {
        if self.luks2 {
            return self.open_luks2_again(&site, key, by_volume_key);
        }
        let (Credential::Passphrase(bytes) | Credential::KeyFile(bytes)) = key;
        let key = if by_volume_key {
            let volume_key = VolumeKey::new(SecretBytes::copy_of(bytes));
            Key::VolumeKey(volume_key.map_err(|error| Answer::refused(chain(&error)))?)
        } else {
            Key::Credential(key)
        };
        ops::lock::unlock_in_use(&self.location, site, key, &self.volume).map_err(|error| match error.kind() {
            Kind::WrongKey => Answer::WrongCredential,
            _ => Answer::refused(chain(&error)),
        })
    }

    fn open_luks2_again(&self, site: &Site, key: &Credential, by_volume_key: bool) -> Result<(), Answer> {
        if by_volume_key {
            return Err(Answer::refused("an escrow file is for namespaces, and not for LUKS2 volumes"));
        }
        ops::lock::unlock_luks2_in_use(site, key, &self.volume).map_err(|error| match error {
            Luks2Error::Unlock(luks2::UnlockError::WrongPassphrase { .. }) => Answer::WrongCredential,
            error => Answer::refused(chain(&error)),
        })
    }
}

/// Locks every export of `volumes` that nobody has asked anything of for `idle`; requests then wait. Ends with the server.
pub(super) fn lock_when_idle(volumes: Arc<Volumes>, server: Handle, idle: Duration) {
    let interval = (idle / LOOKS).min(LOOK_INTERVAL_MAX);
    let look = move || {
        let mut seen: HashMap<String, (u64, Instant)> = HashMap::new();
        while !server.is_stopping() {
            thread::sleep(interval);
            let now = Instant::now();
            for export in server.status().exports.iter().filter(|export| !export.locked) {
                let count = export.stats.requests.iter().sum();
                let last = seen.entry(export.name.clone()).or_insert((count, now));
                if last.0 != count {
                    *last = (count, now);
                }
                if now.duration_since(last.1) < idle {
                    continue;
                }
                seen.remove(&export.name);
                if let Some(served) = volumes.named(&export.name)
                    && !served.volume.header().ephemeral
                    && let Err(answer) = served.lock(&server, true)
                {
                    tracing::warn!(export = export.name.as_str(), ?answer, "idle, and yet not locked");
                }
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("daxcrypt-idle".into()).spawn(look) {
        tracing::error!(%error, "nothing will be locked for being idle");
    }
}

//! SIGHUP: the file and the folder of certificates are read again, without an end for those who may stay.
//!
//! Guards: nothing is changed before everything has been read and understood; what only a restart can change is said and left
//! as it is. SIGHUP never ends the server.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::exports::Source;
use super::volumes::Volumes;
use super::{Plan, ServeArgs, fitting_limits, read_plan, tell_systemd, tls};
use crate::cli::error::Error;
use crate::nbd_server::{ExportInfo, Handle};

/// What reads everything again.
#[derive(Debug)]
pub(super) struct Reloader {
    args: ServeArgs,
    volumes: Arc<Volumes>,
    had_tls: bool,
    /// Held while everything is read again.
    reading: Mutex<()>,
}

impl Reloader {
    pub(super) fn new(args: &ServeArgs, volumes: &Arc<Volumes>, had_tls: bool) -> Self {
        Self { args: args.clone(), volumes: Arc::clone(volumes), had_tls, reading: Mutex::default() }
    }

    /// Reads everything again, has `server` go by it, and says in the log what became of it.
    pub(super) fn reload(&self, server: &Handle) -> Result<(), Error> {
        let _alone = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        tell_systemd(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
        let read = self.try_reload(server);
        match &read {
            Ok(()) => tracing::info!("read again: clients, limits and certificates"),
            Err(error) => tracing::error!("not read again, and nothing is changed: {}", error.chain()),
        }
        tell_systemd("READY=1");
        read
    }

    fn try_reload(&self, server: &Handle) -> Result<(), Error> {
        let plan = read_plan(&self.args)?;
        let tls = tls::set_up(&plan.tls, &plan.namespaces)?;
        if tls.is_some() != self.had_tls {
            return Err(Error::Usage("whether there is TLS is changed by a restart only".into()));
        }
        self.warn_of_restarts(&plan);
        let present = |info: &ExportInfo| match self.source_of(&plan, &info.name) {
            // A volume that was opened for reading cannot be written, and the other way round nobody expects it.
            Some(source) => ExportInfo { read_only: info.read_only, ..source.options.info() },
            None => info.clone(),
        };
        server.reload(present, fitting_limits(&plan.limits), tls.as_ref());
        Ok(())
    }

    /// What the plan says of the export of that name.
    fn source_of<'a>(&self, plan: &'a Plan, name: &str) -> Option<&'a Source> {
        let served = self.volumes.named(name)?;
        plan.namespaces.iter().find(|source| source.path == served.location.path())
    }

    fn warn_of_restarts(&self, plan: &Plan) {
        let served = self.volumes.served();
        let is_served = |source: &Source| served.iter().any(|served| served.location.path() == source.path);
        for source in plan.namespaces.iter().filter(|source| !is_served(source)) {
            tracing::warn!(path = %source.path.display(), "not served: `daxcrypt exports add` or a restart serves it");
        }
        let is_wanted = |path: &Path| plan.namespaces.iter().any(|source| source.path == path);
        for path in served.iter().map(|served| served.location.path()).filter(|path| !is_wanted(path)) {
            tracing::warn!(path = %path.display(), "still served as it was: `daxcrypt exports remove` or a restart leaves it out");
        }
    }
}

//! The options of what takes long, and what is said about other key slots; and the signals that stop it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::error::Error;
use super::size::ByteSize;
use crate::ops::SlotPolicy;

/// How fast a long command goes, and how it tells.
#[derive(Args, Debug)]
pub(crate) struct PaceArgs {
    /// Bytes a second at most, such as 100M
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_rate: Option<ByteSize>,
    /// Progress as JSON, one object a line
    #[arg(long)]
    pub(crate) json: bool,
}

impl PaceArgs {
    pub(crate) fn bytes_per_second(&self) -> Option<u64> {
        self.max_rate.map(|rate| rate.0)
    }
}

/// What `--keep-slots` and `--drop-slots` say.
pub(crate) const fn policy(keep: bool, drop: bool) -> SlotPolicy {
    match (keep, drop) {
        (true, _) => SlotPolicy::Keep,
        (_, true) => SlotPolicy::Drop,
        _ => SlotPolicy::Ask,
    }
}

/// What SIGINT and SIGTERM set from now on.
pub(crate) fn catch_signals() -> Result<Arc<AtomicBool>, Error> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(|source| Error::Io { doing: "cannot catch SIGINT and SIGTERM", source })?;
    }
    Ok(stop)
}

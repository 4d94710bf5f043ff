//! `daxcrypt info`: everything that can be told without the key.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::error::Error;
use super::size::ByteSize;
use crate::namespace::{Header, LockedNamespace};
use crate::pmem::{Access, OpenOptions};
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct InfoArgs {
    /// File or device with a namespace
    path: PathBuf,
    /// One JSON object, for scripts
    #[arg(long)]
    json: bool,
}

/// What `--json` prints: the header's fields, then these.
#[derive(Serialize)]
struct Info<'a> {
    path: &'a Path,
    #[serde(flatten)]
    header: &'a Header,
    granularity: String,
    granularity_reason: String,
    xts_backend: &'static str,
}

pub(crate) fn run(args: &InfoArgs) -> Result<(), Error> {
    let backend = Backend::from_env()?;
    // Without a lock, so that a namespace can be looked at while it is served.
    let backing = OpenOptions::new(Access::ReadOnly)
        .lock_range(0..0)
        .open(&args.path)
        .map_err(|source| Error::Open { path: args.path.clone(), source })?;
    let backing = Arc::new(backing);
    let locked = LockedNamespace::open(Arc::clone(&backing))
        .map_err(|source| Error::Namespace { path: args.path.clone(), source })?;
    let info = Info {
        path: &args.path,
        header: locked.header(),
        granularity: backing.granularity().to_string(),
        granularity_reason: backing.granularity_reason().to_string(),
        xts_backend: backend.name(),
    };
    if args.json {
        let json = serde_json::to_string_pretty(&info)
            .map_err(|error| Error::Io { doing: "cannot print JSON", source: error.into() })?;
        println!("{json}");
    } else {
        print(&info);
    }
    Ok(())
}

fn print(info: &Info<'_>) {
    let header = info.header;
    let geometry = header.geometry();
    let line = |name: &str, value: &dyn std::fmt::Display| println!("{name:<14} {value}");
    line("namespace", &info.path.display());
    line("label", &header.label());
    line("uuid", &header.uuid());
    line("size", &format_args!("{} ({} bytes)", ByteSize(geometry.size_bytes()), geometry.size_bytes()));
    line("cipher", &header.cipher());
    line("data unit", &format_args!("{} bytes", geometry.unit_bytes()));
    line("base", &geometry.base());
    line("data start", &geometry.data_start());
    if let Some(address) = geometry.bound_address() {
        line("bound to", &format_args!("physical address {address:#x}"));
    }
    line("discards", &if header.allows_discards() { "allowed: media shows which units are unused" } else { "off" });
    for slot in header.slots() {
        line("key slot", &slot);
    }
    for (name, state) in header.copies() {
        line(&format!("header copy {name}"), &state);
    }
    line("granularity", &info.granularity_reason);
    line("AES-XTS", &info.xts_backend);
    for warning in header.warnings() {
        line("warning", &warning);
    }
}

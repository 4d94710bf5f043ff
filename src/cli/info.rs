//! `daxcrypt info`: everything that can be told without the key.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::error::Error;
use super::open;
use super::size::ByteSize;
use crate::namespace::{Cipher, CopyState, Header, Kdf, LockedNamespace, SlotInfo};
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

/// `aes-256-xts` for a key of 512 bits.
pub(crate) const fn cipher_name(header: &Header) -> &'static str {
    match header.key_bits {
        Cipher::Aes128Xts => "aes-128-xts",
        Cipher::Aes256Xts => "aes-256-xts",
    }
}

fn print(info: &Info<'_>) {
    let header = info.header;
    let line = |name: &str, value: &dyn Display| println!("{name:<14} {value}");
    line("namespace", &info.path.display());
    line("label", &header.label);
    line("uuid", &header.uuid);
    line("size", &format_args!("{} ({} bytes)", ByteSize(header.size_bytes), header.size_bytes));
    line("cipher", &cipher_name(header));
    line("data unit", &format_args!("{} bytes", header.unit_bytes));
    line("base", &header.base);
    line("data offset", &header.data_offset);
    if let Some(address) = header.bound_address {
        line("bound to", &format_args!("physical address {address:#x}"));
    }
    line("discards", &if header.discards { "allowed: media shows which units are unused" } else { "off" });
    if header.rekeying {
        line("re-key", &"under way; `daxcrypt rekey --status` with its key says how far it has come");
    }
    for slot in &header.slots {
        line(&format!("key slot {}", slot.id), &slot_line(slot));
    }
    for (name, state) in ["A", "B"].into_iter().zip(&header.copies) {
        let state = match state {
            CopyState::Good { sequence } => format!("good, sequence {sequence}"),
            CopyState::Bad { reason } => format!("not usable: {reason}"),
        };
        line(&format!("header copy {name}"), &state);
    }
    line("granularity", &info.granularity_reason);
    line("AES-XTS", &info.xts_backend);
    for warning in open::warnings(header) {
        line("warning", &warning);
    }
}

pub(crate) fn slot_line(slot: &SlotInfo) -> String {
    let kind = match slot.kdf {
        Kdf::Argon2id(cost) => format!(
            "passphrase, Argon2id with {} and {} passes in {} lanes",
            ByteSize(u64::from(cost.memory_kib) << 10),
            cost.time,
            cost.lanes
        ),
        Kdf::HkdfSha256 => "key file, HKDF-SHA256".to_owned(),
    };
    if slot.label.is_empty() { kind } else { format!("{kind} ({})", slot.label) }
}

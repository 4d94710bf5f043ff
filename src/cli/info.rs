//! `daxcrypt info`: everything that can be told without the key. `json.md` documents `--json`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::error::Error;
use super::open;
use super::output::{self, outln};
use super::place::PlaceArgs;
use super::size::ByteSize;
use crate::namespace::{Cipher, CopyState, Header, Kdf, SIZE_BYTES_MAX, SIZE_BYTES_WARN, Site, SlotInfo};
use crate::ops::Operation;
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct InfoArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// More of them
    #[arg(value_name = "MORE", conflicts_with = "header")]
    more: Vec<PathBuf>,
    /// It is a LUKS2 volume (of cryptsetup) and not a namespace
    #[arg(long)]
    luks2: bool,
    /// One JSON object for each, for scripts
    #[arg(long)]
    json: bool,
}

/// What `--json` prints: the header's fields, then these.
#[derive(Serialize)]
struct Info<'a> {
    path: &'a Path,
    header_path: Option<&'a Path>,
    #[serde(flatten)]
    header: &'a Header,
    data_start: u64,
    size_bytes_max: u64,
    size_bytes_warn: u64,
    granularity: String,
    granularity_reason: String,
    xts_backend: &'static str,
    warnings: Vec<String>,
}

/// One that cannot be looked at keeps nobody from the others; the last such one is the error of the command.
pub(crate) fn run(args: &InfoArgs) -> Result<(), Error> {
    let backend = Backend::from_env()?;
    let others = args.more.iter().map(|path| PlaceArgs { path: path.clone(), ..args.place.clone() });
    let mut failed: Option<Error> = None;
    for (index, place) in std::iter::once(args.place.clone()).chain(others).enumerate() {
        if index > 0 && !args.json {
            outln!("")?;
        }
        if let Err(error) = of_one(args, &place, backend)
            && let Some(earlier) = failed.replace(error)
        {
            output::complain(format_args!("{}", earlier.chain()));
        }
    }
    failed.map_or(Ok(()), Err)
}

fn of_one(args: &InfoArgs, place: &PlaceArgs, backend: Backend) -> Result<(), Error> {
    if args.luks2 {
        return luks2(args.json, place, &place.location().peek(Operation::Info)?, backend);
    }
    let found = place.look(Operation::Info)?;
    let (locked, header, site) = (found.locked(), found.header(), found.site());
    let info = Info {
        path: &place.path,
        header_path: place.header.as_deref(),
        header,
        data_start: locked.geometry().data_start(),
        size_bytes_max: SIZE_BYTES_MAX,
        size_bytes_warn: SIZE_BYTES_WARN,
        granularity: site.data().granularity().to_string(),
        granularity_reason: site.data().granularity_reason().to_string(),
        xts_backend: backend.name(),
        warnings: open::warnings(header),
    };
    if args.json { output::json(&info) } else { print(&info) }
}

/// What `--luks2 --json` prints: the header's fields, then these.
#[derive(Serialize)]
struct Luks2Info<'a> {
    path: &'a Path,
    header_path: Option<&'a Path>,
    #[serde(flatten)]
    header: &'a crate::luks2::Info,
    granularity: String,
    granularity_reason: String,
    xts_backend: &'static str,
    warnings: Vec<String>,
}

fn luks2(json: bool, place: &PlaceArgs, site: &Site, backend: Backend) -> Result<(), Error> {
    let locked = open::luks2(place, site)?;
    let header = locked.info();
    let (path, header_path) = (place.path.as_path(), place.header.as_deref());
    let granularity_reason = site.data().granularity_reason().to_string();
    let warnings = open::luks2_warnings(&header.copies);
    if json {
        let (granularity, xts_backend) = (site.data().granularity().to_string(), backend.name());
        let info = Luks2Info { path, header_path, header, granularity, granularity_reason, xts_backend, warnings };
        return output::json(&info);
    }
    let mut lines = vec![("LUKS2 volume".to_owned(), path.display().to_string())];
    let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
    if let Some(path) = header_path {
        line("header in", path.display().to_string());
    }
    line("label", header.label.clone());
    line("uuid", header.uuid.clone());
    line("size", format!("{} ({} bytes)", ByteSize(header.size_bytes), header.size_bytes));
    line("cipher", format!("{}, {} bits", header.cipher, header.key_bits.unwrap_or(0)));
    line("sector", format!("{} bytes", header.unit_bytes));
    line("data offset", header.data_offset.to_string());
    for slot in &header.slots {
        let how = slot.kdf.clone().or_else(|| slot.unusable.as_ref().map(|why| format!("cannot be used here: {why}")));
        line(&format!("key slot {}", slot.id), how.unwrap_or_default());
    }
    for (name, state) in ["1st header", "2nd header"].into_iter().zip(&header.copies) {
        line(name, state_text(state));
    }
    line("granularity", granularity_reason);
    line("AES-XTS", backend.name().into());
    warnings.into_iter().for_each(|warning| line("warning", warning));
    lines.iter().try_for_each(|(name, value)| outln!("{name:<14} {value}"))
}

fn state_text(state: &CopyState) -> String {
    match state {
        CopyState::Good { sequence } => format!("good, sequence {sequence}"),
        CopyState::Bad { reason } => format!("not usable: {reason}"),
    }
}

/// `aes-256-xts` for a key of 512 bits.
pub(crate) const fn cipher_name(header: &Header) -> &'static str {
    match header.key_bits {
        Cipher::Aes128Xts => "aes-128-xts",
        Cipher::Aes256Xts => "aes-256-xts",
    }
}

fn print(info: &Info<'_>) -> Result<(), Error> {
    let header = info.header;
    let mut lines = vec![("namespace".to_owned(), info.path.display().to_string())];
    lines.extend(info.header_path.map(|path| ("header in".to_owned(), path.display().to_string())));
    lines.extend(header_lines(header));
    for (name, state) in ["A", "B"].into_iter().zip(&header.copies) {
        lines.push((format!("header copy {name}"), state_text(state)));
    }
    lines.push(("granularity".into(), info.granularity_reason.clone()));
    lines.push(("AES-XTS".into(), info.xts_backend.into()));
    lines.extend(info.warnings.iter().map(|warning| ("warning".to_owned(), warning.clone())));
    lines.iter().try_for_each(|(name, value)| outln!("{name:<14} {value}"))
}

/// What a header says, as pairs of a name and a value.
pub(crate) fn header_lines(header: &Header) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
    line("label", header.label.clone());
    line("uuid", header.uuid.to_string());
    line("size", format!("{} ({} bytes)", ByteSize(header.size_bytes), header.size_bytes));
    line("cipher", cipher_name(header).into());
    line("data unit", format!("{} bytes", header.unit_bytes));
    let share = format!("at most {}, better below {}", ByteSize(SIZE_BYTES_MAX), ByteSize(SIZE_BYTES_WARN));
    line("one key for", share);
    line("base", header.base.to_string());
    line("data offset", header.data_offset.to_string());
    line(
        "bound to",
        header.bound_address.map_or_else(|| "no address".into(), |address| format!("physical address {address:#x}")),
    );
    line("header", if header.detached { "detached" } else { "in front of the data" }.into());
    if header.detached {
        let bound = |offset| format!("bound to the header by the tag at byte {offset} from the base");
        line("data", header.tag_offset.map_or_else(|| "not bound to the header: it has no tag".into(), bound));
    }
    line("discards", if header.discards { "allowed: media shows which units are unused" } else { "off" }.into());
    if header.wiping {
        let what = "unfinished: media shows what of the data area is in use; `daxcrypt format --wipe` begins again";
        line("wipe", what.into());
    }
    line("closed", if header.unclean { "not in order, or in use now" } else { "in order" }.into());
    if header.rekeying {
        line("re-key", "under way; `daxcrypt rekey --status` with its key says how far it has come".into());
    }
    if header.ephemeral {
        line("key", "ephemeral: a new one, and new content, at each opening".into());
    }
    for slot in &header.slots {
        line(&format!("key slot {}", slot.id), slot_line(slot));
    }
    lines
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

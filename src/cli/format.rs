//! `daxcrypt format`: make a namespace.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::credentials::{KdfArgs, KeyArgs, Prompt};
use super::error::Error;
use super::info::cipher_name;
use super::open;
use super::output::{outln, warning};
use super::pace::catch_signals;
use super::place::PlaceArgs;
use super::progress::{Progress, ProgressArgs};
use super::recovery;
use super::secrets;
use super::serve::stem;
use super::size::ByteSize;
use crate::namespace::{self, Cipher, DataUnit, FormatOptions, Namespace};
use crate::ops::{self, Location, NewPlace, Operation, Prepared, Run, wipe};
use crate::pmem::Allocation;
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct FormatArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Decrypted size, such as 4G (the file is 2 MiB larger, unless the header is detached); without it, an existing file or
    /// device is used whole
    #[arg(long)]
    size: Option<ByteSize>,
    #[command(flatten)]
    key: KeyArgs,
    /// Also make up a recovery phrase with a key slot of its own, and print it once
    #[arg(long)]
    recovery_key: bool,
    /// Take the volume key from a file such as "type=user algorithm=aes-xts-256 key=HEX tweak=HEX", or
    /// "type=cpu algorithm=aes-xts-128" for a random one with optional entropy
    #[arg(long, value_name = "FILE", conflicts_with = "cipher")]
    key_spec: Option<PathBuf>,
    /// Never store the volume key: each opening has a new one, and new content (for swap and scratch)
    #[arg(long, conflicts_with_all = ["KeyArgs", "recovery_key", "key_spec", "kdf_memory", "kdf_time"])]
    ephemeral: bool,
    /// Name of the namespace and of its export (the file's stem when not given)
    #[arg(long)]
    label: Option<String>,
    /// Cipher
    #[arg(long, value_enum, default_value_t = CipherArg::Aes256Xts)]
    cipher: CipherArg,
    /// Bytes under one XTS tweak
    #[arg(long, value_parser = ["512", "4096"], default_value = "4096")]
    unit: String,
    /// Leave holes instead of allocating all blocks now (a full disk is then an error at some later write)
    #[arg(long)]
    sparse: bool,
    /// Let TRIM punch holes, which read as zeroes: shows on media which units are unused
    #[arg(long)]
    allow_discards: bool,
    /// What the tweaks are bound to: the offset in the file or device, or with `address` the physical address of
    /// persistent memory too, so that the ciphertext is noise in any other module or slot
    #[arg(long, value_parser = ["offset", "address"], default_value = "offset")]
    bind: String,
    /// Fill the data area with noise, so that media does not show what is in use
    #[arg(long, conflicts_with = "sparse")]
    wipe: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    kdf: KdfArgs,
    /// Overwrite whatever is there
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CipherArg {
    #[value(name = "aes-128-xts")]
    Aes128Xts,
    #[value(name = "aes-256-xts")]
    Aes256Xts,
}

impl From<CipherArg> for Cipher {
    fn from(cipher: CipherArg) -> Self {
        match cipher {
            CipherArg::Aes128Xts => Self::Aes128Xts,
            CipherArg::Aes256Xts => Self::Aes256Xts,
        }
    }
}

pub(crate) fn run(args: &FormatArgs) -> Result<(), Error> {
    let options = args.options()?;
    let path = &args.place.path;
    let backend = Backend::from_env()?;
    // The key comes before the file: a typing error must not leave a file behind.
    let credential = match args.ephemeral {
        true => None,
        false => Some(args.key.read(Prompt::Twice, &path.display().to_string())?),
    };
    let location = args.place.location();
    let Prepared { data, range, header, made, region } = args.new_place(&location).prepare()?;
    let available_bytes = Some(range.end - range.start);
    let options = FormatOptions { header, base: range.start, available_bytes, ..options };
    let formatted = match &credential {
        Some(credential) => namespace::format(data, options, credential),
        None => namespace::format_ephemeral(data, options),
    };
    let mut namespace = formatted.map_err(|source| {
        ops::remove_made(&made);
        Error::Format { path: path.clone(), source }
    })?;
    if let (Some(mut region), Some((path, name))) = (region, location.region()) {
        region.add(name, range).map_err(|source| Error::Region { path: path.into(), source })?;
    }
    for warning in open::warnings(&namespace.header()) {
        warning!("{warning}");
    }
    if args.wipe {
        fill_with_noise(args, &location, &mut namespace, backend)?;
    }
    outln!(
        "{path}: {kind} {uuid}, {size}, {cipher}, {unit}-byte units",
        path = path.display(),
        kind = if args.ephemeral { "ephemeral namespace" } else { "namespace" },
        uuid = namespace.header().uuid,
        size = ByteSize(namespace.geometry().size_bytes()),
        cipher = cipher_name(&namespace.header()),
        unit = namespace.geometry().unit_bytes(),
    )?;
    if args.recovery_key {
        recovery::add_slot(&mut namespace, None, "", |source| Error::Update { path: path.clone(), source })?;
    }
    Ok(())
}

/// The header tells of the wipe until it has ended.
fn fill_with_noise(
    args: &FormatArgs,
    location: &Location,
    namespace: &mut Namespace,
    backend: Backend,
) -> Result<(), Error> {
    namespace.set_wiping(true).map_err(|source| Error::Update { path: args.place.path.clone(), source })?;
    let (mut progress, stop) = (Progress::new(args.progress.json), catch_signals()?);
    let mut run = Run::new(&mut progress, &stop, None);
    Ok(wipe::fill_with_noise(namespace, location, backend, &mut run)?)
}

impl FormatArgs {
    fn options(&self) -> Result<FormatOptions, Error> {
        let (cipher, volume_key) = match &self.key_spec {
            Some(path) => {
                let (cipher, key) = secrets::key_spec(path)?;
                (cipher, Some(key))
            }
            None => (self.cipher.into(), None),
        };
        Ok(FormatOptions {
            label: self.label.clone().unwrap_or_else(|| match self.place.location().region() {
                Some((_, name)) => name.to_owned(),
                None => stem(&self.place.path),
            }),
            cipher,
            volume_key,
            unit: if self.unit == "512" { DataUnit::Bytes512 } else { DataUnit::Bytes4096 },
            size_bytes: self.size.map(|ByteSize(bytes)| bytes),
            kdf_cost: self.kdf.cost()?,
            allow_discards: self.allow_discards,
            bind_address: self.bind == "address",
            ..FormatOptions::default()
        })
    }

    fn new_place<'a>(&self, location: &'a Location) -> NewPlace<'a> {
        let size_bytes = self.size.map(|ByteSize(bytes)| bytes);
        let allocation = if self.sparse { Allocation::Sparse } else { Allocation::Full };
        NewPlace { operation: Operation::FormatOver, location, size_bytes, allocation, force: self.force }
    }
}

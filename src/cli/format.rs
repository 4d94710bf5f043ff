//! `daxcrypt format`: make a namespace.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::credentials::{KdfArgs, KeyArgs, Prompt};
use super::error::Error;
use super::info::cipher_name;
use super::open;
use super::output::{outln, warning};
use super::place::{self, PlaceArgs};
use super::progress::{Progress, ProgressArgs};
use super::recovery;
use super::secrets;
use super::serve::stem;
use super::size::ByteSize;
use crate::namespace::{self, Cipher, DataUnit, FormatOptions, HEADER_AREA_BYTES, Namespace, Region, RegionError};
use crate::pmem::{Access, Allocation, Backing, OpenOptions};
use crate::secret::VolumeKey;
use crate::volume::Volume;
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
    /// Fill the data area with noise, so that media does not show what is in use
    #[arg(long, conflicts_with = "sparse")]
    wipe: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    /// What the tweaks are bound to: the offset in the file or device, or with `address` the physical address of
    /// persistent memory too, so that the ciphertext is noise in any other module or slot
    #[arg(long, value_parser = ["offset", "address"], default_value = "offset")]
    bind: String,
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

/// What is written to: the backings, where in the first one, and the files that did not exist before.
struct Prepared {
    data: Arc<Backing>,
    range: Range<u64>,
    header: Option<Arc<Backing>>,
    made: Vec<PathBuf>,
    /// The region that the namespace is entered into when it is there: before, its place is free.
    region: Option<Region>,
}

impl Prepared {
    /// Files that were made for a namespace that could not be made are of no use to anybody.
    fn remove_made(made: &[PathBuf]) {
        for path in made {
            let _ = std::fs::remove_file(path); // the first error is the one to report
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
    let Prepared { data, range, header, made, region } = args.prepare()?;
    let available_bytes = Some(range.end - range.start);
    let options = FormatOptions { header, base: range.start, available_bytes, ..options };
    let formatted = match &credential {
        Some(credential) => namespace::format(data, options, credential),
        None => namespace::format_ephemeral(data, options),
    };
    let mut namespace = formatted.map_err(|source| {
        Prepared::remove_made(&made);
        Error::Format { path: path.clone(), source }
    })?;
    if let (Some(mut region), Some((path, name))) = (region, args.place.in_region()) {
        region.add(name, range).map_err(|source| Error::Region { path: path.into(), source })?;
    }
    for warning in open::warnings(&namespace.header()) {
        warning!("{warning}");
    }
    if args.wipe {
        fill_with_noise(&namespace, backend, args.progress)
            .map_err(|source| Error::Fill { path: path.clone(), source })?;
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

/// Writes what looks like the ciphertext of random data, which is the ciphertext of anything under a key that is thrown
/// away: XTS gives every block of every unit a permutation of its own.
fn fill_with_noise(
    namespace: &Namespace,
    backend: Backend,
    progress: ProgressArgs,
) -> Result<(), crate::volume::VolumeError> {
    const CHUNK_BYTES: u64 = 4 << 20;
    let thrown_away = VolumeKey::generate(namespace.cipher().key_bytes()).expect("the length is a cipher's");
    let volume = Volume::under_another_key(namespace, &thrown_away, backend);
    let mut progress = Progress::new(0, volume.size(), progress.json, None);
    for start in (0..volume.size()).step_by(4 << 20) {
        let len_bytes = CHUNK_BYTES.min(volume.size() - start);
        volume.write_zeroes(start, len_bytes)?;
        volume.persist(start..start + len_bytes)?;
        progress.reach(start + len_bytes);
    }
    progress.end("done", volume.size());
    volume.flush()
}

/// A backing, the bytes of it to use, and the region that they are to be entered into.
type DataPlace = (Arc<Backing>, Range<u64>, Option<Region>);

fn whole(backing: Arc<Backing>) -> DataPlace {
    let len_bytes = backing.len_bytes();
    (backing, 0..len_bytes, None)
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
            label: self.label.clone().unwrap_or_else(|| match self.place.in_region() {
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

    /// Opens what is there and makes what is not; on an error nothing new is left.
    fn prepare(&self) -> Result<Prepared, Error> {
        let path = &self.place.path;
        let mut made = Vec::new();
        let mut prepare = || -> Result<Prepared, Error> {
            let (data, range, region) = match self.place.in_region() {
                Some((path, name)) => self.place_in_region(path, name)?,
                None if path.exists() => whole(self.open(path)?),
                None => {
                    let created = self.create(path, self.total_bytes()?, self.allocation())?;
                    made.push(path.clone());
                    whole(created)
                }
            };
            let header = match &self.place.header {
                None => None,
                Some(path) if path.exists() => Some(self.open(path)?),
                Some(path) => {
                    let created = self.create(path, HEADER_AREA_BYTES, Allocation::Full)?;
                    made.push(path.clone());
                    Some(created)
                }
            };
            Ok(Prepared { data, header, range, region, made: made.clone() })
        };
        prepare().inspect_err(|_| Prepared::remove_made(&made))
    }

    /// The place of a namespace in a region: its partition if it has one, and otherwise the first that is large enough.
    fn place_in_region(&self, path: &Path, name: &str) -> Result<DataPlace, Error> {
        let failed = |source| Error::Region { path: path.into(), source };
        let region = place::open_table(path)?;
        match region.check_name(name) {
            Ok(()) => {
                let range = region.place(self.total_bytes()?).map_err(failed)?;
                let backing = place::open_range(path, Access::ReadWrite, &range)?;
                self.allocate(path, &backing, &range)?;
                Ok((backing, range, Some(region)))
            }
            Err(RegionError::NameInUse { .. }) => {
                let range = region.find(name).map_err(failed)?.range;
                let backing = place::open_range(path, Access::ReadWrite, &range)?;
                self.refuse_data(&self.place.path, &backing, range.start)?;
                self.allocate(path, &backing, &range)?;
                Ok((backing, range, None))
            }
            Err(source) => Err(failed(source)),
        }
    }

    /// Bytes of a new file or partition.
    fn total_bytes(&self) -> Result<u64, Error> {
        let Some(ByteSize(size)) = self.size else {
            let path = self.place.path.display();
            return Err(Error::Usage(format!("{path} does not exist: say how large it is to be, such as --size 4G")));
        };
        let header_bytes = if self.place.header.is_some() { 0 } else { HEADER_AREA_BYTES };
        size.checked_add(header_bytes).ok_or_else(|| Error::Usage("--size is too large".into()))
    }

    fn create(&self, path: &Path, len_bytes: u64, allocation: Allocation) -> Result<Arc<Backing>, Error> {
        let created = Backing::create(path, len_bytes, allocation);
        created.map(Arc::new).map_err(|source| Error::Open { path: path.into(), source })
    }

    /// Opens what is there, and refuses it when it holds something.
    fn open(&self, path: &Path) -> Result<Arc<Backing>, Error> {
        let opened = OpenOptions::new(Access::ReadWrite).open(path);
        let backing = opened.map(Arc::new).map_err(|source| Error::Open { path: path.into(), source })?;
        self.refuse_data(path, &backing, 0)?;
        self.allocate(path, &backing, &(0..backing.len_bytes()))?;
        Ok(backing)
    }

    fn refuse_data(&self, path: &Path, backing: &Backing, base: u64) -> Result<(), Error> {
        let failed = |source| Error::Media { path: path.into(), source };
        match namespace::signature_found(backing, base).map_err(failed)? {
            Some(signature) if !self.force => Err(Error::WouldOverwrite { path: path.into(), signature }),
            _ => Ok(()),
        }
    }

    fn allocate(&self, path: &Path, backing: &Backing, range: &Range<u64>) -> Result<(), Error> {
        if self.allocation() == Allocation::Sparse {
            return Ok(());
        }
        backing.allocate(range.clone()).map_err(|source| Error::Media { path: path.into(), source })
    }

    const fn allocation(&self) -> Allocation {
        if self.sparse { Allocation::Sparse } else { Allocation::Full }
    }
}

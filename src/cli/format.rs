//! `daxcrypt format`: make a namespace.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::credentials::{KdfArgs, KeyArgs, Prompt};
use super::error::Error;
use super::info::cipher_name;
use super::open;
use super::serve::stem;
use super::size::ByteSize;
use crate::namespace::{self, Cipher, DataUnit, FormatOptions, HEADER_AREA_BYTES};
use crate::pmem::{Access, Allocation, Backing};

#[derive(Args, Debug)]
pub(crate) struct FormatArgs {
    /// File or device to format; a file is made when it does not exist
    path: PathBuf,
    /// Decrypted size, such as 4G (the file is 2 MiB larger); without it, an existing file or device is used whole
    #[arg(long)]
    size: Option<ByteSize>,
    #[command(flatten)]
    key: KeyArgs,
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
    // The key comes before the file: a typing error must not leave a file behind.
    let credential = args.key.read(Prompt::Twice, &args.path.display().to_string())?;
    let is_new = !args.path.exists();
    let backing = if is_new { Arc::new(args.create()?) } else { args.open()? };
    let formatted = namespace::format(backing, options, &credential);
    let namespace = formatted.map_err(|source| {
        if is_new {
            // A file that was made for a namespace that could not be made is of no use to anybody.
            let _ = std::fs::remove_file(&args.path);
        }
        Error::Format { path: args.path.clone(), source }
    })?;
    for warning in open::warnings(&namespace.header()) {
        eprintln!("daxcrypt: warning: {warning}");
    }
    println!(
        "{path}: namespace {uuid}, {size}, {cipher}, {unit}-byte units",
        path = args.path.display(),
        uuid = namespace.header().uuid,
        size = ByteSize(namespace.geometry().size_bytes()),
        cipher = cipher_name(&namespace.header()),
        unit = namespace.geometry().unit_bytes(),
    );
    Ok(())
}

impl FormatArgs {
    fn options(&self) -> Result<FormatOptions, Error> {
        Ok(FormatOptions {
            label: self.label.clone().unwrap_or_else(|| stem(&self.path)),
            cipher: self.cipher.into(),
            unit: if self.unit == "512" { DataUnit::Bytes512 } else { DataUnit::Bytes4096 },
            size_bytes: self.size.map(|ByteSize(bytes)| bytes),
            kdf_cost: self.kdf.cost()?,
            allow_discards: self.allow_discards,
            bind_address: self.bind == "address",
            ..FormatOptions::default()
        })
    }

    fn create(&self) -> Result<Backing, Error> {
        let Some(ByteSize(size)) = self.size else {
            let what = format!("{} does not exist: say how large it is to be, such as --size 4G", self.path.display());
            return Err(Error::Usage(what));
        };
        let total = size.checked_add(HEADER_AREA_BYTES).ok_or_else(|| Error::Usage("--size is too large".into()))?;
        Backing::create(&self.path, total, self.allocation())
            .map_err(|source| Error::Open { path: self.path.clone(), source })
    }

    /// Opens what is there, and refuses it when it holds something.
    fn open(&self) -> Result<Arc<Backing>, Error> {
        let failed = |source| Error::Media { path: self.path.clone(), source };
        let backing = open::backing(&self.path, Access::ReadWrite)?;
        if !self.force
            && let Some(signature) = namespace::signature_found(&backing, 0).map_err(failed)?
        {
            return Err(Error::WouldOverwrite { path: self.path.clone(), signature });
        }
        if self.allocation() == Allocation::Full {
            backing.allocate(0..backing.len_bytes()).map_err(failed)?;
        }
        Ok(backing)
    }

    const fn allocation(&self) -> Allocation {
        if self.sparse { Allocation::Sparse } else { Allocation::Full }
    }
}

//! `daxcrypt dmtable`: the same bytes, for the kernel's dm-crypt.

use std::fmt::Write;

use clap::Args;
use zeroize::Zeroizing;

use super::credentials::KeyArgs;
use super::error::Error;
use super::open;
use super::output::{self, warning};
use super::place::PlaceArgs;
use crate::namespace::Namespace;
use crate::ops::Operation;

/// dm counts in sectors of 512 bytes, whatever the device has.
const SECTOR_BYTES: u64 = 512;

#[derive(Args, Debug)]
pub(crate) struct DmtableArgs {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// Print the volume key: whoever sees the line can decrypt everything
    #[arg(long)]
    show_key: bool,
}

pub(crate) fn run(args: &DmtableArgs) -> Result<(), Error> {
    let namespace = open::namespace(&args.place, Operation::DmTable, &args.key)?;
    let path = &args.place.path;
    if path.is_file() {
        let path = path.display();
        output::complain(format_args!(
            "note: dm-crypt needs a device: losetup -f --show {path}, then put its name for {path}"
        ));
    }
    if namespace.header().discards {
        warning!(
            "discards are allowed here: holes read as zeroes through daxcrypt, but as noise through \
             dm-crypt, and a filesystem may rely on the zeroes"
        );
    }
    output::secret(table(&namespace, &path.display().to_string(), args.show_key).as_bytes())
}

/// `0 N crypt aes-xts-plain64 KEY IV_OFFSET DEVICE OFFSET 1 sector_size:UNIT`, see the kernel's dm-crypt document. The
/// initial vector is counted in 512-byte sectors, because `iv_large_sectors` is not given.
fn table(namespace: &Namespace, device: &str, show_key: bool) -> Zeroizing<String> {
    let geometry = namespace.geometry();
    let sectors = geometry.size_bytes() / SECTOR_BYTES;
    let iv_offset = geometry.tweak_at(0).value();
    let start = geometry.data_start() / SECTOR_BYTES;
    // Room for all of it, so that no shorter copy of the key is left behind by growing.
    let mut line = Zeroizing::new(String::with_capacity(512 + device.len()));
    let _ = write!(line, "0 {sectors} crypt aes-xts-plain64 ");
    if show_key {
        for byte in namespace.volume_key().bytes() {
            let _ = write!(line, "{byte:02x}");
        }
    } else {
        line.push_str("KEY");
    }
    let _ = writeln!(line, " {iv_offset} {device} {start} 1 sector_size:{}", geometry.unit_bytes());
    line
}

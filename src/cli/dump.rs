//! Files that a command makes for its user: header backups, escrow, exports.
//!
//! Each is new, mode 0600, and durable by name before the command says that it is there. Nothing is overwritten.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::error::Error;

/// Writes `bytes` to a new file at `path`; on an error no file is left.
pub(super) fn write_new(what: &'static str, path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |source| Error::WriteFile { what, path: path.into(), source };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| sync_folder(path));
    written.map_err(|source| {
        let _ = fs::remove_file(path); // the first error is the one to report
        failed(source)
    })
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    File::open(folder)?.sync_all()
}

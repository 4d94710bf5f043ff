//! The limit of this process on the size of files (`RLIMIT_FSIZE`), asked before the kernel enforces it by SIGXFSZ, which
//! ends a process that did not expect it.

use std::io;

use rustix::process::{Resource, getrlimit};

/// Whether files may become, or be written up to, `end_bytes`.
///
/// # Errors
///
/// `FileTooLarge`, with what to do about it.
pub(crate) fn check_file_size_limit(end_bytes: u64) -> io::Result<()> {
    match getrlimit(Resource::Fsize).current {
        Some(limit_bytes) if end_bytes > limit_bytes => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{end_bytes} bytes are more than this process may write to a file, {limit_bytes} (`ulimit -f`)"),
        )),
        _ => Ok(()),
    }
}

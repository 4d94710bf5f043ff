//! The lock that keeps two processes from using one backing at the same time.
//!
//! It is an open-file-description lock (`F_OFD_SETLK`): it belongs to the descriptor, so two backings of one process
//! exclude each other as well, and closing an unrelated descriptor of the same file does not drop it (as a POSIX lock
//! would be). It covers a byte range, so that the namespaces of one region can be locked apart. It is advisory: a program
//! that does not ask is not kept out.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::options::Access;

/// Which bytes of a backing to lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LockRange {
    /// Everything, including what the backing may grow by.
    Whole,
    /// These bytes only.
    Bytes(Range<u64>),
}

/// Takes the lock without waiting, exclusive for [`Access::ReadWrite`] and shared for [`Access::ReadOnly`]. It is held
/// until `file` is closed. `Ok(false)` means that somebody else holds a conflicting lock.
pub(super) fn try_lock(file: &File, access: Access, range: &LockRange) -> io::Result<bool> {
    let lock_type = match access {
        Access::ReadOnly => libc::F_RDLCK,
        Access::ReadWrite => libc::F_WRLCK,
    };
    let (start, len) = match range {
        LockRange::Whole => (0, 0), // a length of 0 is "to the end, wherever that will be"
        LockRange::Bytes(bytes) if bytes.is_empty() => return Ok(true),
        LockRange::Bytes(bytes) => (as_offset(bytes.start)?, as_offset(bytes.end - bytes.start)?),
    };
    set(file, lock_type, start, len)
}

/// Gives back whatever `file` has locked outside of `range`, which is not empty.
pub(super) fn unlock_outside(file: &File, range: &Range<u64>) -> io::Result<()> {
    if range.start > 0 {
        set(file, libc::F_UNLCK, 0, as_offset(range.start)?)?;
    }
    set(file, libc::F_UNLCK, as_offset(range.end)?, 0)?;
    Ok(())
}

/// `Ok(false)` when somebody else's lock is in the way.
fn set(file: &File, lock_type: libc::c_int, start: libc::off_t, len: libc::off_t) -> io::Result<bool> {
    let request = libc::flock {
        l_type: lock_type.try_into().map_err(|_| io::ErrorKind::Unsupported)?,
        l_whence: libc::SEEK_SET.try_into().map_err(|_| io::ErrorKind::Unsupported)?,
        l_start: start,
        l_len: len,
        l_pid: 0, // required by F_OFD_SETLK
    };
    // SAFETY: the descriptor is open, and the kernel only reads `request` during the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

fn as_offset(bytes: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_twice() -> (File, File) {
        let named = tempfile::NamedTempFile::new().unwrap();
        (named.reopen().unwrap(), named.reopen().unwrap())
    }

    #[test]
    fn a_writer_excludes_readers_and_writers_until_it_closes() {
        let (first, second) = open_twice();
        assert!(try_lock(&first, Access::ReadWrite, &LockRange::Whole).unwrap());
        assert!(!try_lock(&second, Access::ReadWrite, &LockRange::Whole).unwrap());
        assert!(!try_lock(&second, Access::ReadOnly, &LockRange::Whole).unwrap());
        drop(first);
        assert!(try_lock(&second, Access::ReadWrite, &LockRange::Whole).unwrap());
    }

    #[test]
    fn readers_share() {
        let (first, second) = open_twice();
        assert!(try_lock(&first, Access::ReadOnly, &LockRange::Whole).unwrap());
        assert!(try_lock(&second, Access::ReadOnly, &LockRange::Whole).unwrap());
    }

    #[test]
    fn disjoint_ranges_do_not_conflict_and_overlapping_ones_do() {
        let (first, second) = open_twice();
        assert!(try_lock(&first, Access::ReadWrite, &LockRange::Bytes(0..4096)).unwrap());
        assert!(try_lock(&second, Access::ReadWrite, &LockRange::Bytes(4096..8192)).unwrap());
        assert!(!try_lock(&second, Access::ReadWrite, &LockRange::Bytes(4095..4096)).unwrap());
        assert!(!try_lock(&second, Access::ReadWrite, &LockRange::Whole).unwrap());
    }

    #[test]
    fn a_range_grows_and_shrinks() {
        let (first, second) = open_twice();
        assert!(try_lock(&first, Access::ReadWrite, &LockRange::Bytes(4096..8192)).unwrap());
        assert!(try_lock(&first, Access::ReadWrite, &LockRange::Bytes(4096..12288)).unwrap());
        assert!(!try_lock(&second, Access::ReadWrite, &LockRange::Bytes(12287..12288)).unwrap());
        unlock_outside(&first, &(4096..6000)).unwrap();
        assert!(try_lock(&second, Access::ReadWrite, &LockRange::Bytes(6000..12288)).unwrap());
        assert!(!try_lock(&second, Access::ReadWrite, &LockRange::Bytes(5999..6000)).unwrap());
    }

    #[test]
    fn an_empty_range_locks_nothing() {
        let (first, second) = open_twice();
        assert!(try_lock(&first, Access::ReadWrite, &LockRange::Whole).unwrap());
        assert!(try_lock(&second, Access::ReadWrite, &LockRange::Bytes(7..7)).unwrap());
    }
}

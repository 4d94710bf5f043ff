//! The groups of the process at the other end of a Unix socket, as the kernel recorded them at connect (`SO_PEERGROUPS`,
//! socket(7)): what /proc says about a process number may be about another process by then.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// More groups than a process can have (`NGROUPS_MAX`).
const GROUPS_MAX: usize = 65_536;

/// Supplementary groups of the peer of `socket`.
///
/// # Errors
///
/// What the kernel says: no Unix socket, or a kernel before 4.13.
pub(crate) fn of(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; 64];
    loop {
        let len_bytes = size_of_val(&groups[..]);
        let mut len = libc::socklen_t::try_from(len_bytes).expect("at most 256 KiB");
        let fd = socket.as_fd().as_raw_fd();
        // SAFETY: the kernel writes at most `len` bytes to `groups`, which has as many, and `len` itself; both live until the
        // call returns.
        let result = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast::<libc::c_void>(),
                &raw mut len,
            )
        };
        if result == 0 {
            groups.truncate(len as usize / size_of::<libc::gid_t>());
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || groups.len() >= GROUPS_MAX {
            return Err(error);
        }
        groups.resize(GROUPS_MAX, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn our_own_groups_are_those_of_our_peer() {
        let (one, _other) = UnixStream::pair().unwrap();
        let mut ours: Vec<u32> =
            rustix::process::getgroups().unwrap().into_iter().map(rustix::process::Gid::as_raw).collect();
        let mut theirs = of(&one).unwrap();
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(theirs, ours);
    }

    #[test]
    fn what_is_no_socket_has_no_peer() {
        assert!(of(std::fs::File::open("/").unwrap()).is_err());
    }
}

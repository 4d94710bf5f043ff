//! Sockets that clients connect to.
//!
//! Guards: a Unix socket is never reachable with a mode wider than it was asked for, which is 0600 unless something else is
//! said, or with another owner; a live server's socket is never taken over, and at the end only the socket file that this
//! process made is removed; a vsock listener lets in only the machines that it was told of, if it was told. Inherited sockets
//! are left as they are.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// How long another process that prepares a socket in the same directory is waited for.
const DIRECTORY_LOCK_WAIT: Duration = Duration::from_secs(1);

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Another server accepts connections there.
    #[error("{path} is in use by a running server")]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error("{path} exists and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refuses the Unix socket.
    #[error("cannot listen on {path}")]
    Unix {
        /// The socket.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The operating system refuses the TCP address.
    #[error("cannot listen on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The operating system refuses the vsock port.
    #[error("cannot listen on vsock port {port}")]
    Vsock {
        /// The port.
        port: u32,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// An inherited descriptor is not a listening socket.
    #[error("inherited descriptor is not a listening stream socket")]
    Inherited(#[source] io::Error),
}

/// Who may connect to a Unix socket: its file's mode and owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketRights {
    /// Permission bits; who may write may connect.
    pub mode: u32,
    /// User that the file belongs to, instead of this process's.
    pub owner: Option<u32>,
    /// Group that the file belongs to, instead of this process's.
    pub group: Option<u32>,
}

impl Default for SocketRights {
    fn default() -> Self {
        Self { mode: 0o600, owner: None, group: None }
    }
}

/// A listening socket. Dropping it closes it and removes its file.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    file: Option<SocketFile>,
    /// The only machines that may connect, by context number; all if there is none.
    cids: Vec<u32>,
}

/// The file of a Unix socket that this process made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Listens on a Unix socket of mode 0600. A socket file on which nobody accepts is replaced.
    ///
    /// # Errors
    ///
    /// [`ListenError::Busy`] when somebody accepts there, [`ListenError::NotASocket`], [`ListenError::Unix`].
    pub fn unix(path: &Path) -> Result<Self, ListenError> {
        Self::unix_with(path, SocketRights::default())
    }

    /// Listens on a Unix socket with these rights. A socket file on which nobody accepts is replaced.
    ///
    /// # Errors
    ///
    /// As [`unix`](Self::unix).
    pub fn unix_with(path: &Path, rights: SocketRights) -> Result<Self, ListenError> {
        let failed = |source: io::Error| ListenError::Unix { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        let socket = stream_socket(AddressFamily::UNIX).map_err(failed)?;
        let lock = lock_directory(path).map_err(failed)?;
        remove_stale(path, &address)?;
        rustix::net::bind(&socket, &address).map_err(|errno| failed(errno.into()))?;
        let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
        let file = SocketFile { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() };
        let listener = Self { socket, file: Some(file), cids: Vec::new() };
        // Nobody can connect before listen(), so what bind() gave is never in effect.
        if rights.owner.is_some() || rights.group.is_some() {
            std::os::unix::fs::lchown(path, rights.owner, rights.group).map_err(failed)?;
        }
        std::fs::set_permissions(path, PermissionsExt::from_mode(rights.mode)).map_err(failed)?;
        rustix::net::listen(&listener.socket, BACKLOG).map_err(|errno| failed(errno.into()))?;
        drop(lock);
        Ok(listener)
    }

    /// Listens on a TCP address; port 0 chooses a free one.
    ///
    /// # Errors
    ///
    /// [`ListenError::Tcp`].
    pub fn tcp(address: SocketAddr) -> Result<Self, ListenError> {
        let failed = |errno: Errno| ListenError::Tcp { address, source: errno.into() };
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = stream_socket(family).map_err(|source| ListenError::Tcp { address, source })?;
        sockopt::set_socket_reuseaddr(&socket, true).map_err(failed)?;
        rustix::net::bind(&socket, &address).map_err(failed)?;
        rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
        Ok(Self { socket, file: None, cids: Vec::new() })
    }

    /// Listens on a vsock port for the virtual machines with these context numbers, or for all if there is none.
    ///
    /// # Errors
    ///
    /// [`ListenError::Vsock`].
    pub fn vsock(port: u32, cids: Vec<u32>) -> Result<Self, ListenError> {
        let failed = |source: io::Error| ListenError::Vsock { port, source };
        let listener = vsock::VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, port).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { socket: listener.into(), file: None, cids })
    }

    /// Uses a listening stream socket of any family that somebody else made, systemd for example.
    ///
    /// # Errors
    ///
    /// [`ListenError::Inherited`] when it is something else.
    pub fn inherited(socket: OwnedFd) -> Result<Self, ListenError> {
        let failed = |errno: Errno| ListenError::Inherited(errno.into());
        let listens = sockopt::socket_acceptconn(&socket).map_err(failed)?;
        if !listens || sockopt::socket_type(&socket).map_err(failed)? != SocketType::STREAM {
            return Err(failed(Errno::INVAL));
        }
        rustix::io::ioctl_fionbio(&socket, true).map_err(failed)?;
        Ok(Self { socket, file: None, cids: Vec::new() })
    }

    /// The TCP address that is listened on, if it is one.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        SocketAddr::try_from(rustix::net::getsockname(&self.socket).ok()?).ok()
    }

    /// The path of the Unix socket, if this process made one.
    pub fn unix_path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// Whether a client from a machine with that number, or from none, may connect here.
    pub(super) fn admits(&self, cid: Option<u32>) -> bool {
        self.cids.is_empty() || cid.is_some_and(|cid| self.cids.contains(&cid))
    }

    /// The next waiting connection, or `WouldBlock`.
    pub(super) fn accept(&self) -> io::Result<OwnedFd> {
        Ok(rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |metadata: std::fs::Metadata| metadata.dev() == self.device && metadata.ino() == self.inode;
        if std::fs::symlink_metadata(&self.path).is_ok_and(ours) {
            // A socket file that stays behind is recovered at the next start.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

/// Keeps two starting servers from judging and replacing one stale socket at the same time. The wait is bounded,
/// because in a shared directory anybody can hold such a lock.
fn lock_directory(path: &Path) -> io::Result<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let directory = File::open(parent)?;
    let start = Instant::now();
    while start.elapsed() < DIRECTORY_LOCK_WAIT {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(10)),
            _ => break,
        }
    }
    Ok(directory)
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::Unix { path: path.to_owned(), source };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    let probe = stream_socket(AddressFamily::UNIX).map_err(failed)?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(failed),
        // A full backlog (EAGAIN) or a socket that may not be connected to is not known to be stale.
        _ => Err(ListenError::Busy { path: path.to_owned() }),
    }
}

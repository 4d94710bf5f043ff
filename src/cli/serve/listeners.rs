//! Where clients come in: Unix sockets, TCP, vsock, and what systemd passes.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use super::tls::TlsMode;
use crate::cli::error::Error;
use crate::cli::output::{outln, warning};
use crate::cli::size::ByteSize;
use crate::nbd_server::{Listener, SocketRights, inherited_listeners};

/// The context number of the host, as its virtual machines see it (vsock(7), `VMADDR_CID_HOST`).
const HOST_CONTEXT: u32 = 2;

/// A place to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Unix(PathBuf, SocketRights),
    Tcp(String),
    /// A port, and the only machines that may connect there, if any are named.
    Vsock(u32, Vec<u32>),
    /// Made by systemd.
    Inherited,
}

/// Why an argument of `--listen` is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "vsock takes numbers below 2^32: a port, and perhaps the machines that may connect, such as in vsock:10809:3,4"
)]
pub(super) struct NoVsockAddress;

impl Address {
    /// The file of a Unix socket.
    pub(super) fn socket_path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path, _) => Some(path),
            Self::Tcp(_) | Self::Vsock(..) | Self::Inherited => None,
        }
    }
}

impl FromStr for Address {
    type Err = NoVsockAddress;

    fn from_str(text: &str) -> Result<Self, NoVsockAddress> {
        let Some(rest) = text.strip_prefix("vsock:") else { return Ok(Self::Tcp(text.into())) };
        let number = |digits: &str| digits.parse().map_err(|_| NoVsockAddress);
        match rest.split_once(':') {
            None => Ok(Self::Vsock(number(rest)?, Vec::new())),
            Some((port, cids)) => {
                Ok(Self::Vsock(number(port)?, cids.split(',').map(number).collect::<Result<_, _>>()?))
            }
        }
    }
}

/// A place to listen on in a file: `unix`, with or without `mode`, `owner` and `group`, or `tcp`, or `vsock`, with or without
/// `cids`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListenTable {
    unix: Option<PathBuf>,
    mode: Option<String>,
    owner: Option<Account>,
    group: Option<Account>,
    tcp: Option<String>,
    vsock: Option<u32>,
    #[serde(default)]
    cids: Vec<u32>,
}

/// A user or group, by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(super) enum Account {
    Number(u32),
    Name(String),
}

impl FromStr for Account {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text.parse().map_or_else(|_| Self::Name(text.into()), Self::Number))
    }
}

impl Account {
    /// The number, which a name has in `file`, `/etc/passwd` or `/etc/group`.
    fn number(&self, file: &Path) -> Result<u32, String> {
        let name = match self {
            Self::Number(number) => return Ok(*number),
            Self::Name(name) => name,
        };
        let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        let mut lines = text.lines().map(|line| line.split(':'));
        let found =
            lines.find_map(|mut fields| (fields.next()? == name).then(|| fields.nth(1)?.parse().ok()).flatten());
        found.ok_or_else(|| format!("{} has no {name:?}: write its number", file.display()))
    }
}

/// The rights that mode, owner and group say.
pub(super) fn socket_rights(
    mode: Option<&str>,
    owner: Option<&Account>,
    group: Option<&Account>,
) -> Result<SocketRights, String> {
    let wrong = || "a socket's mode is an octal number such as \"0660\"".to_owned();
    let parse = |text: &str| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(wrong);
    Ok(SocketRights {
        mode: mode.map_or_else(|| Ok(SocketRights::default().mode), parse)?,
        owner: owner.map(|user| user.number(Path::new("/etc/passwd"))).transpose()?,
        group: group.map(|group| group.number(Path::new("/etc/group"))).transpose()?,
    })
}

impl ListenTable {
    /// The one place that the table names; relative paths count from `folder`.
    pub(super) fn into_address(self, folder: &Path) -> Result<Address, String> {
        let has_rights = self.mode.is_some() || self.owner.is_some() || self.group.is_some();
        match (self.unix, self.tcp, self.vsock) {
            (Some(path), None, None) if self.cids.is_empty() => {
                let rights = socket_rights(self.mode.as_deref(), self.owner.as_ref(), self.group.as_ref())?;
                Ok(Address::Unix(folder.join(path), rights))
            }
            (None, Some(text), None) if !has_rights && self.cids.is_empty() => Ok(Address::Tcp(text)),
            (None, None, Some(port)) if !has_rights => Ok(Address::Vsock(port, self.cids)),
            _ => Err("[[listen]] has one of unix (with mode, owner, group), tcp, or vsock (with cids)".into()),
        }
    }
}

/// Opens the given places, and takes what systemd passed.
pub(super) fn open(addresses: &[Address]) -> Result<Vec<(Address, Listener)>, Error> {
    let inherited = inherited_listeners()?.into_iter().map(|listener| (Address::Inherited, listener));
    let mut opened: Vec<_> = inherited.collect();
    for address in addresses {
        match address {
            Address::Unix(path, rights) => opened.push((address.clone(), Listener::unix_with(path, *rights)?)),
            Address::Tcp(text) => {
                for resolved in resolve(text)? {
                    opened.push((address.clone(), Listener::tcp(resolved)?));
                }
            }
            Address::Vsock(port, cids) => opened.push((address.clone(), Listener::vsock(*port, cids.clone())?)),
            Address::Inherited => {}
        }
    }
    if opened.is_empty() {
        return Err(Error::Usage("nowhere to listen: give --socket SOCKET or --listen ADDRESS:PORT".into()));
    }
    Ok(opened)
}

/// The addresses that `text` names.
pub(super) fn resolve(text: &str) -> Result<Vec<SocketAddr>, Error> {
    let addresses = text.to_socket_addrs().map_err(|error| {
        Error::Usage(format!("cannot listen on {text}: {error} (an address and a port, such as 127.0.0.1:10809)"))
    })?;
    Ok(addresses.collect())
}

/// One line for each way in, so that it can be copied.
pub(super) fn announce(
    address: &Address,
    listener: &Listener,
    names: &[(String, u64)],
    tls: TlsMode,
) -> Result<(), Error> {
    let scheme = if tls == TlsMode::Require { "nbds" } else { "nbd" };
    let tcp = listener.tcp_address();
    for (name, size) in names {
        let size = ByteSize(*size);
        match (address, tcp) {
            (Address::Unix(path, _), _) => {
                outln!("serving {name} ({size}) at {scheme}+unix:///{name}?socket={}", path.display())?;
            }
            (Address::Vsock(port, _), _) => {
                outln!("serving {name} ({size}) at {scheme}+vsock://{HOST_CONTEXT}:{port}/{name}")?;
            }
            (_, Some(at)) => outln!("serving {name} ({size}) at {scheme}://{at}/{name}")?,
            (_, None) => outln!("serving {name} ({size}) on a socket of systemd's")?,
        }
    }
    if let Some(at) = tcp.filter(|at| tls != TlsMode::Require && !at.ip().is_loopback()) {
        warning!("{at}: without TLS, everyone on the way reads and writes along (--tls require)");
    }
    if let Address::Vsock(port, cids) = address
        && cids.is_empty()
    {
        warning!("vsock port {port}: every virtual machine may connect (name those that may: vsock:{port}:CID,CID)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_ports_are_told_from_addresses() {
        assert_eq!("vsock:10809".parse(), Ok(Address::Vsock(10809, vec![])));
        assert_eq!("vsock:10809:3,4".parse(), Ok(Address::Vsock(10809, vec![3, 4])));
        assert_eq!("[::1]:10809".parse(), Ok(Address::Tcp("[::1]:10809".into())));
        for text in ["vsock:", "vsock:-1", "vsock:4294967296", "vsock:x", "vsock:1:", "vsock:1:3,", "vsock:1:x"] {
            assert_eq!(text.parse::<Address>(), Err(NoVsockAddress), "{text}");
        }
    }

    #[test]
    fn rights_of_sockets_are_octal_and_of_accounts_that_there_are() {
        let rights = socket_rights(Some("0660"), None, Some(&"root".parse().unwrap())).unwrap();
        assert_eq!(rights, SocketRights { mode: 0o660, owner: None, group: Some(0) });
        let rights = socket_rights(None, Some(&"7".parse().unwrap()), None).unwrap();
        assert_eq!(rights, SocketRights { mode: 0o600, owner: Some(7), group: None });
        for mode in ["rw", "0888", "1777", ""] {
            assert!(socket_rights(Some(mode), None, None).unwrap_err().contains("0660"), "{mode}");
        }
        let error = socket_rights(None, Some(&"no such user".parse().unwrap()), None).unwrap_err();
        assert!(error.contains("write its number"), "{error}");
    }

    #[test]
    fn an_address_without_a_port_says_what_one_is() {
        let error = resolve("127.0.0.1").unwrap_err();
        assert!(error.to_string().contains("such as 127.0.0.1:10809"), "{error}");
    }
}

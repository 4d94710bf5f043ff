//! Where clients come in: Unix sockets, TCP, vsock, and what systemd passes.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

use super::tls::TlsMode;
use crate::cli::error::Error;
use crate::cli::output::{outln, warning};
use crate::cli::size::ByteSize;
use crate::nbd_server::{Listener, inherited_listeners};

/// The context number of the host, as its virtual machines see it (vsock(7), `VMADDR_CID_HOST`).
const HOST_CONTEXT: u32 = 2;

/// A place to listen on. In a file, `{ unix = PATH }`, `{ tcp = "ADDRESS:PORT" }` or `{ vsock = PORT }`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Address {
    Unix(PathBuf),
    Tcp(String),
    Vsock(u32),
    /// Made by systemd.
    #[serde(skip)]
    Inherited,
}

/// Why an argument of `--listen` is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a vsock port is a number below 2^32, such as in vsock:10809")]
pub(super) struct NoVsockPort;

impl FromStr for Address {
    type Err = NoVsockPort;

    fn from_str(text: &str) -> Result<Self, NoVsockPort> {
        match text.strip_prefix("vsock:") {
            Some(port) => port.parse().map(Self::Vsock).map_err(|_| NoVsockPort),
            None => Ok(Self::Tcp(text.into())),
        }
    }
}

/// Opens the given places; without any, takes what systemd passed.
pub(super) fn open(addresses: &[Address]) -> Result<Vec<(Address, Listener)>, Error> {
    let mut opened = Vec::new();
    if addresses.is_empty() {
        opened.extend(inherited_listeners()?.into_iter().map(|listener| (Address::Inherited, listener)));
    }
    for address in addresses {
        match address {
            Address::Unix(path) => opened.push((address.clone(), Listener::unix(path)?)),
            Address::Tcp(text) => {
                for resolved in resolve(text)? {
                    opened.push((address.clone(), Listener::tcp(resolved)?));
                }
            }
            Address::Vsock(port) => opened.push((address.clone(), Listener::vsock(*port)?)),
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
            (Address::Unix(path), _) => {
                outln!("serving {name} ({size}) at {scheme}+unix:///{name}?socket={}", path.display())?;
            }
            (Address::Vsock(port), _) => {
                outln!("serving {name} ({size}) at {scheme}+vsock://{HOST_CONTEXT}:{port}/{name}")?;
            }
            (_, Some(at)) => outln!("serving {name} ({size}) at {scheme}://{at}/{name}")?,
            (_, None) => outln!("serving {name} ({size}) on a socket of systemd's")?,
        }
    }
    if let Some(at) = tcp.filter(|at| tls != TlsMode::Require && !at.ip().is_loopback()) {
        warning!("{at}: without TLS, everyone on the way reads and writes along (--tls require)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_ports_are_told_from_addresses() {
        assert_eq!("vsock:10809".parse(), Ok(Address::Vsock(10809)));
        assert_eq!("[::1]:10809".parse(), Ok(Address::Tcp("[::1]:10809".into())));
        for text in ["vsock:", "vsock:-1", "vsock:4294967296", "vsock:x"] {
            assert_eq!(text.parse::<Address>(), Err(NoVsockPort), "{text}");
        }
    }

    #[test]
    fn an_address_without_a_port_says_what_one_is() {
        let error = resolve("127.0.0.1").unwrap_err();
        assert!(error.to_string().contains("such as 127.0.0.1:10809"), "{error}");
    }
}

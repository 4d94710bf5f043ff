//! The NBD server: serves [`Export`]s to NBD clients over Unix sockets and TCP.
//!
//! ```text
//!  listener --> server --> connection --> handshake     (sans-IO) --> Negotiated
//!                              |--------> transmission  (sans-IO) --> Request
//!                              +--------> execute --> Export
//! ```
//!
//! The protocol is fixed newstyle with simple, structured and extended replies; `wire` holds its numbers. One thread
//! serves one connection and runs its requests in order, but for those that may take long, which `slow` runs beside it. A
//! flush covers what was answered before it came, and `MULTI_CONN` is honest, as long as the export's flush covers every
//! write that returned before it, on all connections.
//!
//! Replies are copied into the socket. Handing pages to it instead (vmsplice) needs unsafe code, and a client that
//! splices from its end could see a page change after it was answered; no form without that was found.
//!
//! It does not know what an export is made of, and it starts no threads besides one for each connection, one for each status
//! listener, those of [`Options::threads`], and a limited number for requests that may take long.

#![forbid(unsafe_code)]
#![deny(clippy::little_endian_bytes)]

mod access;
mod buffer;
mod connection;
mod execute;
mod export;
mod failures;
mod fair;
mod gate;
mod handle;
pub mod handshake;
pub mod limits;
mod listener;
mod metrics;
pub mod negotiated;
mod server;
mod shared;
mod slow;
mod socket;
mod spin;
mod stats;
mod status;
mod systemd;
mod threads;
mod throttle;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
mod tls;
pub mod transmission;
mod volume;
pub mod wire;

pub use access::{AddressRange, Allowed, CertificateName, NoAddressRange, NoCertificateName, Peer, UnixPeer};
pub use export::{
    Durability, Export, ExportError, ExportInfo, Exports, Extent, ExtentKind, Hole, RegistryError, Served,
};
pub use gate::WhileLocked;
pub use handle::Handle;
pub use handshake::TlsMode;
pub use limits::Limits;
pub use listener::{ListenError, Listener, SocketRights};
pub use negotiated::{Negotiated, ReplyStyle};
pub use server::{Options, Server, ServerError};
pub use stats::{COMMAND_NAMES, ClientStatus, ExportStatus, FAILURE_NAMES, RekeyStatus, Stats, Status};
pub use status::Commands;
pub use systemd::{inherited_listeners, notify};
pub use throttle::{ExportLimits, Quota};
pub use tls::Tls;
#[cfg(feature = "tls")]
pub use tls::{ClientCertificates, TlsError};

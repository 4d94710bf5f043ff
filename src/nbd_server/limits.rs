//! Every limit on what a client can make the server do or hold, in one place.
//!
//! The constants are the protocol's or the implementation's and fixed; [`Limits`] is what an operator may set.

use std::time::Duration;

/// The largest read or write, in bytes: what a client may assume without negotiation (section "Block size constraints").
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// The preferred block size that is advertised, in bytes.
pub const PREFERRED_BLOCK_BYTES: u32 = 4096;
/// The smallest request that is advertised, in bytes.
pub const MINIMUM_BLOCK_BYTES: u32 = 1;
/// The largest payload of an option that is parsed, in bytes. A larger one is skipped and refused with `TOO_BIG`.
pub const OPTION_PAYLOAD_BYTES_MAX: u32 = 32 << 10;
/// The largest payload of an option that is skipped, in bytes. A larger one ends the connection.
pub const OPTION_SKIP_BYTES_MAX: u32 = 1 << 20;
/// Options that one connection may send before it chooses an export.
pub const OPTIONS_MAX: u32 = 4096;
/// The largest payload of a refused request that is received and thrown away, in bytes. A larger one ends the connection.
pub const DRAIN_BYTES_MAX: u64 = 64 << 20;
/// The largest payload of a `BLOCK_STATUS` request, in bytes: the effect's length and some context numbers.
pub const BLOCK_STATUS_PAYLOAD_BYTES_MAX: u32 = 4096;
/// Extents in one `BLOCK_STATUS` reply.
pub const EXTENTS_MAX: usize = 1024;
/// Bytes of the buffers that a connection always has, for requests and for replies each.
pub const SMALL_BUFFER_BYTES: usize = 16 << 10;
/// Bytes of a pooled receive buffer.
pub const RECEIVE_BUFFER_BYTES: usize = 512 << 10;
/// Bytes of a pooled reply buffer. The slack over 1 MiB holds headers.
pub const REPLY_BUFFER_BYTES: usize = (1 << 20) + (4 << 10);

/// Limits that an operator may set.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time. One more is closed as soon as it is accepted.
    pub connections_max: usize,
    /// Connections at a time that have not chosen an export. One more closes the oldest of them.
    pub handshaking_max: usize,
    /// Time in which a client has to choose an export.
    pub handshake_deadline: Duration,
    /// Bytes of the large request and reply buffers of all connections together. When they are all in use,
    /// connections go on with small buffers of [`SMALL_BUFFER_BYTES`].
    pub buffer_bytes_max: usize,
    /// Time that a stopping server gives its clients to receive the replies to what they sent.
    pub drain_deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 4096,
            handshaking_max: 1024,
            handshake_deadline: Duration::from_secs(10),
            buffer_bytes_max: 128 << 20,
            drain_deadline: Duration::from_secs(5),
        }
    }
}

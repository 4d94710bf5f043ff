//! Every limit on what a client can make the server do or hold, in one place.
//!
//! The constants are the protocol's or the implementation's and fixed; [`Limits`] is what an operator may set.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The largest read or write, in bytes. A client that does not ask may assume 32 MiB (section "Block size constraints");
/// nbdkit takes 64 MiB, and so its clients send them.
pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;
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
pub const DRAIN_BYTES_MAX: u64 = 128 << 20;
/// The largest payload of a `BLOCK_STATUS` request, in bytes: the effect's length and some context numbers.
pub const BLOCK_STATUS_PAYLOAD_BYTES_MAX: u32 = 4096;
/// Extents in one `BLOCK_STATUS` reply.
pub const EXTENTS_MAX: usize = 1024;
/// How much of a long range an export is asked to change at a time, in bytes. Between two slices the server looks whether
/// it stops and whether the client is still there.
pub const SLICE_BYTES: u64 = 4 << 20;
/// How much of a long range is made durable at a time, in bytes: a whole payload at once, which is one wait for the device.
pub const PERSIST_SLICE_BYTES: u64 = PAYLOAD_BYTES_MAX as u64;
/// From this length on zeroes that are written as data run beside the connection, in bytes.
pub const SLOW_ZEROES_BYTES: u64 = 256 << 10;
/// Requests of one connection that run beside it at a time. It receives no other until one of them has ended.
pub const SLOW_PER_CONNECTION_MAX: usize = 16;
/// Threads for requests that run beside their connections, of all connections together. When all of them are busy, a
/// connection runs its request itself.
pub const SLOW_THREADS_MAX: usize = 64;
/// From this length on a read looks for holes, which then need not be sent, in bytes.
pub const HOLES_READ_BYTES: u32 = 128 << 10;
/// Holes and runs of data that one read looks for.
pub const HOLES_READ_MAX: usize = 64;
/// Bytes of the buffers that a connection always has, for requests and for replies each. The slack holds headers.
pub const SMALL_BUFFER_BYTES: usize = (16 << 10) + (4 << 10);
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
    /// Bytes of the large request and reply buffers of all connections together, and of the kernel's socket buffers that
    /// were enlarged for them. When they are all in use, connections go on with small buffers of [`SMALL_BUFFER_BYTES`] and
    /// with the socket buffers that the kernel gives by itself.
    pub buffer_bytes_max: usize,
    /// Time that a stopping server gives its clients to receive the replies to what they sent.
    pub drain_deadline: Duration,
}

/// Descriptors of a connection: its socket, and the event of what runs beside it.
const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// Descriptors that are kept for everything that is not a connection, besides those that are open already.
const DESCRIPTORS_KEPT: u64 = 128;

impl Limits {
    /// Raises this process's limit on descriptors (`RLIMIT_NOFILE`) to what so many connections need, as far as that is
    /// permitted, and lowers the connections to what there is then. At most half of them may be without an export: they make
    /// room for others.
    #[must_use]
    pub fn fitted_to_descriptors(self) -> Self {
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
        let kept = DESCRIPTORS_KEPT + open;
        let wanted = kept.saturating_add(self.connections_max as u64 * DESCRIPTORS_PER_CONNECTION);
        let limit = getrlimit(Resource::Nofile);
        let mut allowed = limit.current.unwrap_or(u64::MAX);
        if allowed < wanted {
            let raised = limit.maximum.map_or(wanted, |maximum| wanted.min(maximum));
            if setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..limit }).is_ok() {
                allowed = raised;
            }
        }
        self.fitted_to(allowed, kept)
    }

    fn fitted_to(self, allowed: u64, kept: u64) -> Self {
        // Of a limit that is too small even for what is kept, half is for clients.
        let left = allowed.saturating_sub(kept).max(allowed / 2);
        let fitting = usize::try_from(left / DESCRIPTORS_PER_CONNECTION).unwrap_or(usize::MAX).max(1);
        let connections_max = self.connections_max.min(fitting);
        Self { connections_max, handshaking_max: self.handshaking_max.min(connections_max.div_ceil(2)), ..self }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_fit_the_descriptors_that_there_are() {
        for (allowed, connections, handshaking) in
            [(u64::MAX, 4096, 1024), (10_000, 4096, 1024), (1024, 442, 221), (64, 16, 8), (1, 1, 1)]
        {
            let limits = Limits::default().fitted_to(allowed, 140);
            assert_eq!((limits.connections_max, limits.handshaking_max), (connections, handshaking), "{allowed}");
        }
    }
}

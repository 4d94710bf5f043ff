//! What a handshake ends with: the export and the dialect that the transmission phase speaks.
//!
//! [`Negotiated`] alone decides which transmission flags are advertised, so that what a client was told and what
//! `validate_request` accepts cannot differ.

use std::sync::Arc;

use super::export::Served;
use super::wire::{
    NBD_FLAG_BLOCK_STATUS_PAYLOAD, NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_DF, NBD_FLAG_SEND_FAST_ZERO, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES,
};

/// The number of the metadata context `base:allocation` on every connection that selected it.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

/// The header format of requests and replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyStyle {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies to reads and status queries.
    Structured,
    /// Extended requests, extended replies to everything.
    Extended,
}

/// A finished handshake.
#[derive(Debug, Clone)]
pub struct Negotiated {
    /// The chosen export.
    pub served: Arc<Served>,
    /// Size in bytes that the client is told, and that it keeps.
    pub size_bytes: u64,
    /// The dialect.
    pub replies: ReplyStyle,
    /// Whether it is read-only for this client.
    pub read_only: bool,
    /// Whether `base:allocation` was selected for this export.
    pub allocation_context: bool,
}

impl Negotiated {
    /// The flags to advertise, `NBD_FLAG_*`.
    pub fn transmission_flags(&self) -> u16 {
        let mut flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN;
        if self.served.export.prefetches() {
            flags |= NBD_FLAG_SEND_CACHE;
        }
        if self.read_only {
            flags |= NBD_FLAG_READ_ONLY;
        } else {
            flags |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
            if self.served.export.discards() {
                flags |= NBD_FLAG_SEND_TRIM;
            }
        }
        if self.replies != ReplyStyle::Simple {
            flags |= NBD_FLAG_SEND_DF;
        }
        if self.replies == ReplyStyle::Extended && self.allocation_context {
            flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
        }
        flags
    }
}

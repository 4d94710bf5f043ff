//! The transmission phase as a machine without I/O: request headers in, permitted requests out, replies as bytes.
//!
//! ```text
//!  bytes --parse_header--> RequestHeader --validate_request--> Verdict: Run(Request) | Refuse | Disconnect
//! ```
//!
//! Guards: [`Transmission::validate_request`] is the only place that judges what a client sent. A [`Request`] is in
//! range, permitted by the export and by what was negotiated; code behind it only asserts this. Nothing here
//! touches an export or a socket.

mod reply;
mod request;

use super::negotiated::{Negotiated, ReplyStyle};
use super::wire::{COMPACT_REQUEST_BYTES, EXTENDED_REQUEST_BYTES, RequestHeader};

pub use reply::{Replies, ReplyHead};
pub use request::{Refusal, Request, StatusQuery, Verdict};

/// The magic of a request was wrong: the stream is out of sync and the connection has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("request does not begin with the negotiated magic")]
pub struct OutOfSync;

/// A connection in its transmission phase.
#[derive(Debug, Clone)]
pub struct Transmission {
    negotiated: Negotiated,
    flags: u16,
    size_bytes: u64,
}

impl Transmission {
    /// The phase that follows a handshake.
    pub fn new(negotiated: Negotiated) -> Self {
        let (flags, size_bytes) = (negotiated.transmission_flags(), negotiated.size_bytes);
        Self { negotiated, flags, size_bytes }
    }

    /// What was negotiated.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Bytes of a request's header.
    pub fn header_bytes(&self) -> usize {
        match self.negotiated.replies {
            ReplyStyle::Simple | ReplyStyle::Structured => COMPACT_REQUEST_BYTES,
            ReplyStyle::Extended => EXTENDED_REQUEST_BYTES,
        }
    }

    /// Reads the header at the front of `input`; `None` when `input` is shorter than [`header_bytes`](Self::header_bytes).
    ///
    /// # Errors
    ///
    /// [`OutOfSync`] on a wrong magic.
    pub fn parse_header(&self, input: &[u8]) -> Result<Option<RequestHeader>, OutOfSync> {
        let decoded = match self.negotiated.replies {
            ReplyStyle::Simple | ReplyStyle::Structured => input.first_chunk().map(RequestHeader::decode_compact),
            ReplyStyle::Extended => input.first_chunk().map(RequestHeader::decode_extended),
        };
        match decoded {
            None => Ok(None),
            Some(Some(header)) => Ok(Some(header)),
            Some(None) => Err(OutOfSync),
        }
    }

    /// The encoder of replies to the request with that header.
    pub fn replies(&self, header: &RequestHeader) -> Replies {
        Replies::new(self.negotiated.replies, header)
    }
}

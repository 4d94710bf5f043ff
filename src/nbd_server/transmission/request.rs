//! Requests that may be run, and the refusal of all others with the error that the protocol names.

use super::super::export::{Durability, Hole};
use super::super::limits::{BLOCK_STATUS_PAYLOAD_BYTES_MAX, DRAIN_BYTES_MAX, PAYLOAD_BYTES_MAX};
use super::super::negotiated::{ALLOCATION_CONTEXT_ID, ReplyStyle};
use super::super::wire::{
    Cursor, NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_DISC, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLUSH,
    NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_EINVAL, NBD_ENOSPC, NBD_ENOTSUP,
    NBD_EOVERFLOW, NBD_EPERM, NBD_ESHUTDOWN, NBD_FLAG_BLOCK_STATUS_PAYLOAD, NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM, RequestHeader,
};
use super::Transmission;

/// A request that is in range, permitted and not larger than the limits. Lengths and offsets are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are the request's own words.
pub enum Request {
    /// Reply with data; with `dont_fragment` in one chunk.
    Read { offset: u64, len_bytes: u32, dont_fragment: bool },
    /// `len_bytes` of payload follow the header.
    Write { offset: u64, len_bytes: u32, durability: Durability },
    /// Finish everything and close; there is no reply.
    Disconnect,
    /// Make everything durable.
    Flush,
    /// Discard.
    Trim { offset: u64, len_bytes: u64, durability: Durability },
    /// Prefetch.
    Cache { offset: u64, len_bytes: u64 },
    /// Write zeroes; [`Hole::Required`] is the protocol's "fast".
    WriteZeroes { offset: u64, len_bytes: u64, hole: Hole, durability: Durability },
    /// Describe extents.
    BlockStatus(StatusQuery),
    /// Describe extents; `payload_bytes` follow the header and go to [`Transmission::status_query`].
    BlockStatusPayload { offset: u64, payload_bytes: u32, one: bool },
}

/// A `BLOCK_STATUS` query of the context `base:allocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusQuery {
    /// First byte.
    pub offset: u64,
    /// Bytes to describe, at least 1.
    pub len_bytes: u64,
    /// Describe one extent only.
    pub one: bool,
    /// Whether `base:allocation` is wanted: a payload may name no context.
    pub allocation: bool,
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Run it.
    Run(Request),
    /// Receive and forget `drain_bytes` of payload, then reply with the error.
    Refuse {
        /// Why.
        refusal: Refusal,
        /// Payload that follows the header, in bytes.
        drain_bytes: u64,
    },
    /// The payload is so large that receiving it is no use: close.
    Disconnect {
        /// Payload that the client announced, in bytes.
        payload_bytes: u64,
    },
}

/// Why a request is refused. The text goes to the client in replies that carry texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No such command.
    #[error("command {0} is unknown")]
    UnknownCommand(u16),
    /// The command was not advertised.
    #[error("command {0} is not offered by this export")]
    NotOffered(u16),
    /// A flag is unknown, was not advertised or does not belong to the command.
    #[error("flags {flags:#06x} are not valid for command {command}")]
    Flags {
        /// The flags that are wrong.
        flags: u16,
        /// The command.
        command: u16,
    },
    /// A write to a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// The range is not inside the export.
    #[error("offset {offset} and length {len_bytes} exceed the export's size of {size_bytes} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len_bytes: u64,
        /// Size of the export in bytes.
        size_bytes: u64,
        /// Whether the protocol wants `ENOSPC`.
        writes: bool,
    },
    /// A read is longer than what was advertised.
    #[error("read of {0} bytes exceeds the limit of {PAYLOAD_BYTES_MAX}")]
    ReadTooLong(u64),
    /// A write is longer than what was advertised.
    #[error("write of {0} bytes exceeds the limit of {PAYLOAD_BYTES_MAX}")]
    WriteTooLong(u64),
    /// A flush with an offset or a length.
    #[error("flush takes neither offset nor length")]
    FlushWithRange,
    /// A status query of no bytes.
    #[error("status query of length 0")]
    EmptyStatusQuery,
    /// A status query without a negotiated context.
    #[error("no metadata context was negotiated for this export")]
    NoContext,
    /// The payload of a status query is malformed or names a context that was not negotiated.
    #[error("payload of the status query is not valid")]
    StatusPayload,
    /// The export cannot write zeroes faster than data.
    #[error("zeroes are not faster than data here")]
    NotFast,
    /// The server is shutting down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl Refusal {
    /// The error number of the protocol.
    pub fn errno(self) -> u32 {
        match self {
            Self::ReadOnly => NBD_EPERM,
            Self::OutOfRange { writes: true, .. } => NBD_ENOSPC,
            Self::ReadTooLong(_) => NBD_EOVERFLOW,
            Self::NotFast => NBD_ENOTSUP,
            Self::ShuttingDown => NBD_ESHUTDOWN,
            Self::UnknownCommand(_)
            | Self::NotOffered(_)
            | Self::Flags { .. }
            | Self::OutOfRange { writes: false, .. }
            | Self::WriteTooLong(_)
            | Self::FlushWithRange
            | Self::EmptyStatusQuery
            | Self::NoContext
            | Self::StatusPayload => NBD_EINVAL,
        }
    }
}

impl Transmission {
    /// Judges a request. With `stopping`, everything but `DISC` is refused because the server shuts down.
    pub fn validate_request(&self, header: &RequestHeader, stopping: bool) -> Verdict {
        let payload_bytes = self.payload_bytes(header);
        let largest = match self.negotiated.replies {
            ReplyStyle::Simple | ReplyStyle::Structured => DRAIN_BYTES_MAX,
            ReplyStyle::Extended => u64::from(PAYLOAD_BYTES_MAX),
        };
        if payload_bytes > largest {
            return Verdict::Disconnect { payload_bytes };
        }
        match self.permit(header, stopping) {
            Ok(request) => Verdict::Run(request),
            Err(refusal) => Verdict::Refuse { refusal, drain_bytes: payload_bytes },
        }
    }

    /// Reads the payload of a [`Request::BlockStatusPayload`].
    ///
    /// # Errors
    ///
    /// [`Refusal`] when the payload is malformed, names an unknown context or a range outside the export.
    pub fn status_query(&self, offset: u64, one: bool, payload: &[u8]) -> Result<StatusQuery, Refusal> {
        let mut cursor = Cursor::new(payload);
        let len_bytes = cursor.u64().ok_or(Refusal::StatusPayload)?;
        let mut allocation = false;
        while !cursor.rest().is_empty() {
            let id = cursor.u32().ok_or(Refusal::StatusPayload)?;
            if id != ALLOCATION_CONTEXT_ID || allocation {
                return Err(Refusal::StatusPayload);
            }
            allocation = true;
        }
        self.in_range(offset, len_bytes, false)?;
        if len_bytes == 0 {
            return Err(Refusal::EmptyStatusQuery);
        }
        Ok(StatusQuery { offset, len_bytes, one, allocation })
    }

    fn payload_bytes(&self, header: &RequestHeader) -> u64 {
        // An extended WRITE without PAYLOAD_LEN breaks the rules, but its payload follows all the same.
        let extended = self.negotiated.replies == ReplyStyle::Extended;
        let flagged = extended && header.flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0;
        if header.command == NBD_CMD_WRITE || flagged { header.len_bytes } else { 0 }
    }

    fn permit(&self, header: &RequestHeader, stopping: bool) -> Result<Request, Refusal> {
        let RequestHeader { command, offset, len_bytes, flags, .. } = *header;
        if command == NBD_CMD_DISC {
            return Ok(Request::Disconnect);
        }
        if stopping {
            return Err(Refusal::ShuttingDown);
        }
        let writes = matches!(command, NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES);
        if writes && self.negotiated.read_only {
            return Err(Refusal::ReadOnly);
        }
        let wrong_flags = flags & !self.valid_flags(command)?;
        if wrong_flags != 0 {
            return Err(Refusal::Flags { flags: wrong_flags, command });
        }
        let durability = if flags & NBD_CMD_FLAG_FUA != 0 { Durability::Fua } else { Durability::Cached };
        match command {
            NBD_CMD_FLUSH if offset != 0 || len_bytes != 0 => return Err(Refusal::FlushWithRange),
            NBD_CMD_FLUSH => return Ok(Request::Flush),
            NBD_CMD_BLOCK_STATUS => return self.permit_status(header),
            _ => self.in_range(offset, len_bytes, matches!(command, NBD_CMD_WRITE | NBD_CMD_WRITE_ZEROES))?,
        }
        match command {
            NBD_CMD_READ => {
                let len_bytes = payload_sized(len_bytes).ok_or(Refusal::ReadTooLong(len_bytes))?;
                Ok(Request::Read { offset, len_bytes, dont_fragment: flags & NBD_CMD_FLAG_DF != 0 })
            }
            NBD_CMD_WRITE => {
                let len_bytes = payload_sized(len_bytes).ok_or(Refusal::WriteTooLong(len_bytes))?;
                Ok(Request::Write { offset, len_bytes, durability })
            }
            NBD_CMD_TRIM => Ok(Request::Trim { offset, len_bytes, durability }),
            NBD_CMD_CACHE => Ok(Request::Cache { offset, len_bytes }),
            _ => {
                let fast = flags & NBD_CMD_FLAG_FAST_ZERO != 0;
                let hole = match flags & NBD_CMD_FLAG_NO_HOLE != 0 {
                    true if fast => return Err(Refusal::NotFast),
                    true => Hole::Forbidden,
                    false if fast && !self.negotiated.served.export.fast_zero() => return Err(Refusal::NotFast),
                    false if fast => Hole::Required,
                    false => Hole::Allowed,
                };
                Ok(Request::WriteZeroes { offset, len_bytes, hole, durability })
            }
        }
    }

    /// The flags that the command takes on this connection, or why it does not exist here.
    fn valid_flags(&self, command: u16) -> Result<u16, Refusal> {
        let offered = |flag: u16| self.flags & flag != 0;
        let fua = if offered(NBD_FLAG_SEND_FUA) { NBD_CMD_FLAG_FUA } else { 0 };
        let own = match command {
            NBD_CMD_READ if offered(NBD_FLAG_SEND_DF) => NBD_CMD_FLAG_DF,
            NBD_CMD_READ => 0,
            NBD_CMD_CACHE if offered(NBD_FLAG_SEND_CACHE) => 0,
            NBD_CMD_WRITE if self.negotiated.replies == ReplyStyle::Extended => NBD_CMD_FLAG_PAYLOAD_LEN,
            NBD_CMD_WRITE => 0,
            NBD_CMD_FLUSH if offered(NBD_FLAG_SEND_FLUSH) => 0,
            NBD_CMD_TRIM if offered(NBD_FLAG_SEND_TRIM) => 0,
            NBD_CMD_FLUSH | NBD_CMD_TRIM | NBD_CMD_CACHE => return Err(Refusal::NotOffered(command)),
            NBD_CMD_WRITE_ZEROES => NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
            NBD_CMD_BLOCK_STATUS if offered(NBD_FLAG_BLOCK_STATUS_PAYLOAD) => {
                NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_PAYLOAD_LEN
            }
            NBD_CMD_BLOCK_STATUS => NBD_CMD_FLAG_REQ_ONE,
            _ => return Err(Refusal::UnknownCommand(command)),
        };
        Ok(own | fua)
    }

    fn permit_status(&self, header: &RequestHeader) -> Result<Request, Refusal> {
        let RequestHeader { offset, len_bytes, flags, .. } = *header;
        if !self.negotiated.allocation_context {
            return Err(Refusal::NoContext);
        }
        let one = flags & NBD_CMD_FLAG_REQ_ONE != 0;
        if flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0 {
            let payload_bytes = u32::try_from(len_bytes).ok().filter(|len| *len <= BLOCK_STATUS_PAYLOAD_BYTES_MAX);
            let payload_bytes = payload_bytes.ok_or(Refusal::StatusPayload)?;
            return Ok(Request::BlockStatusPayload { offset, payload_bytes, one });
        }
        self.in_range(offset, len_bytes, false)?;
        if len_bytes == 0 {
            return Err(Refusal::EmptyStatusQuery);
        }
        Ok(Request::BlockStatus(StatusQuery { offset, len_bytes, one, allocation: true }))
    }

    /// The sum of a client's offset and length may not fit 64 bits, so it is never formed.
    fn in_range(&self, offset: u64, len_bytes: u64, writes: bool) -> Result<(), Refusal> {
        let size_bytes = self.size_bytes;
        if offset > size_bytes || len_bytes > size_bytes - offset {
            return Err(Refusal::OutOfRange { offset, len_bytes, size_bytes, writes });
        }
        Ok(())
    }
}

fn payload_sized(len_bytes: u64) -> Option<u32> {
    u32::try_from(len_bytes).ok().filter(|len| *len <= PAYLOAD_BYTES_MAX)
}

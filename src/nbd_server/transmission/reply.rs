//! Replies as bytes, in the negotiated dialect.
//!
//! Guards: a read is answered with structured chunks whenever they were negotiated, even when it fails early; every
//! reply ends with exactly one final chunk; nothing but the given bytes is encoded.

use super::super::export::{Extent, ExtentKind};
use super::super::negotiated::{ALLOCATION_CONTEXT_ID, ReplyStyle};
use super::super::wire::{
    EXTENDED_CHUNK_BYTES, NBD_CMD_BLOCK_STATUS, NBD_CMD_READ, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT, NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET, NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE, NBD_STATE_HOLE, NBD_STATE_ZERO, RequestHeader,
    extended_chunk, simple_reply, structured_chunk,
};

/// The longest error text in a chunk, in bytes.
const ERROR_TEXT_BYTES_MAX: usize = 512;
/// The longest head: an extended chunk, and where a hole is.
const HEAD_BYTES_MAX: usize = EXTENDED_CHUNK_BYTES + 12;

/// The bytes in front of a reply's data.
#[derive(Debug, Clone, Copy)]
pub struct ReplyHead {
    bytes: [u8; HEAD_BYTES_MAX],
    len_bytes: usize,
}

impl ReplyHead {
    fn new(first: &[u8], second: &[u8]) -> Self {
        let len_bytes = first.len() + second.len();
        let mut bytes = [0; HEAD_BYTES_MAX];
        bytes[..first.len()].copy_from_slice(first);
        bytes[first.len()..len_bytes].copy_from_slice(second);
        Self { bytes, len_bytes }
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len_bytes]
    }
}

/// Encodes the replies to one request.
#[derive(Debug, Clone, Copy)]
pub struct Replies {
    style: ReplyStyle,
    command: u16,
    cookie: u64,
    offset: u64,
}

impl Replies {
    /// An encoder for the request with that header.
    pub(super) fn new(style: ReplyStyle, header: &RequestHeader) -> Self {
        Self { style, command: header.command, cookie: header.cookie, offset: header.offset }
    }

    /// Whether data can be sent in several chunks, and an error after data.
    pub fn chunked(&self) -> bool {
        self.style != ReplyStyle::Simple
    }

    /// The reply of a request that succeeded without data, or the final chunk after data chunks.
    pub fn success(&self) -> ReplyHead {
        let simple = match self.style {
            ReplyStyle::Simple => true,
            ReplyStyle::Structured => !matches!(self.command, NBD_CMD_READ | NBD_CMD_BLOCK_STATUS),
            ReplyStyle::Extended => false,
        };
        if simple {
            return ReplyHead::new(&simple_reply(0, self.cookie), &[]);
        }
        self.chunk(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0, &[])
    }

    /// What stands before `len_bytes` bytes of data from `data_offset`. A simple reply carries all data of the
    /// request; `last` promises that nothing follows.
    pub fn data(&self, data_offset: u64, len_bytes: u32, last: bool) -> ReplyHead {
        if self.style == ReplyStyle::Simple {
            return ReplyHead::new(&simple_reply(0, self.cookie), &[]);
        }
        let flags = if last { NBD_REPLY_FLAG_DONE } else { 0 };
        self.chunk(flags, NBD_REPLY_TYPE_OFFSET_DATA, len_bytes, &data_offset.to_be_bytes())
    }

    /// A chunk that stands for `len_bytes` zeroes from `data_offset` on. Only if [`chunked`](Self::chunked).
    pub fn hole(&self, data_offset: u64, len_bytes: u32, last: bool) -> ReplyHead {
        debug_assert!(self.chunked(), "a simple reply carries its zeroes");
        let flags = if last { NBD_REPLY_FLAG_DONE } else { 0 };
        let mut payload = [0; 12];
        payload[..8].copy_from_slice(&data_offset.to_be_bytes());
        payload[8..].copy_from_slice(&len_bytes.to_be_bytes());
        self.chunk(flags, NBD_REPLY_TYPE_OFFSET_HOLE, 0, &payload)
    }

    /// An error that ends the reply. With `at` it names the byte of the export where it happened, which has to be
    /// inside the request.
    pub fn error(&self, errno: u32, text: &str, at: Option<u64>) -> Vec<u8> {
        if self.style == ReplyStyle::Simple {
            return simple_reply(errno, self.cookie).to_vec();
        }
        let text = &text.as_bytes()[..floor_char_boundary(text, ERROR_TEXT_BYTES_MAX)];
        let text_bytes = u16::try_from(text.len()).expect("texts have at most 512 bytes");
        let mut payload = errno.to_be_bytes().to_vec();
        payload.extend_from_slice(&text_bytes.to_be_bytes());
        payload.extend_from_slice(text);
        payload.extend(at.iter().flat_map(|offset| offset.to_be_bytes()));
        let kind = if at.is_some() { NBD_REPLY_TYPE_ERROR_OFFSET } else { NBD_REPLY_TYPE_ERROR };
        self.whole_chunk(kind, &payload)
    }

    /// The reply to a status query of `len_bytes`. The extents are cut at that length and never empty, so they fit the
    /// 32 bits of a compact reply.
    pub fn block_status(&self, len_bytes: u64, one: bool, extents: &[Extent]) -> Vec<u8> {
        let merged = clamp_extents(len_bytes, one, extents);
        let mut payload = ALLOCATION_CONTEXT_ID.to_be_bytes().to_vec();
        if self.style == ReplyStyle::Extended {
            let count = u32::try_from(merged.len()).expect("extents are limited");
            payload.extend_from_slice(&count.to_be_bytes());
            for extent in &merged {
                payload.extend_from_slice(&extent.len_bytes.to_be_bytes());
                payload.extend_from_slice(&u64::from(status(extent.kind)).to_be_bytes());
            }
            return self.whole_chunk(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, &payload);
        }
        for extent in &merged {
            let len_bytes = u32::try_from(extent.len_bytes).expect("a compact query has a 32-bit length");
            payload.extend_from_slice(&len_bytes.to_be_bytes());
            payload.extend_from_slice(&status(extent.kind).to_be_bytes());
        }
        self.whole_chunk(NBD_REPLY_TYPE_BLOCK_STATUS, &payload)
    }

    fn whole_chunk(&self, kind: u16, payload: &[u8]) -> Vec<u8> {
        let payload_bytes = u32::try_from(payload.len()).expect("texts and extents are limited");
        let mut bytes = self.chunk(NBD_REPLY_FLAG_DONE, kind, payload_bytes, &[]).as_bytes().to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    /// A chunk's header and `prefix`; `more_bytes` of payload follow them.
    fn chunk(&self, flags: u16, kind: u16, more_bytes: u32, prefix: &[u8]) -> ReplyHead {
        let prefix_bytes = u32::try_from(prefix.len()).expect("a prefix is two numbers at most");
        let payload_bytes = more_bytes + prefix_bytes;
        if self.style == ReplyStyle::Extended {
            let head = extended_chunk(flags, kind, self.cookie, self.offset, u64::from(payload_bytes));
            return ReplyHead::new(&head, prefix);
        }
        ReplyHead::new(&structured_chunk(flags, kind, self.cookie, payload_bytes), prefix)
    }
}

fn status(kind: ExtentKind) -> u32 {
    match kind {
        ExtentKind::Allocated => 0,
        ExtentKind::Hole => NBD_STATE_HOLE | NBD_STATE_ZERO,
    }
}

/// Joins neighbours of one kind and ends at `len_bytes`. Never empty: what the export did not describe is allocated.
fn clamp_extents(len_bytes: u64, one: bool, extents: &[Extent]) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::new();
    let mut rest = len_bytes;
    for extent in extents {
        let piece = Extent { len_bytes: extent.len_bytes.min(rest), kind: extent.kind };
        rest -= piece.len_bytes;
        match merged.last_mut() {
            _ if piece.len_bytes == 0 => {}
            Some(last) if last.kind == piece.kind => last.len_bytes += piece.len_bytes,
            _ => merged.push(piece),
        }
    }
    if merged.is_empty() {
        merged.push(Extent { len_bytes, kind: ExtentKind::Allocated });
    }
    merged.truncate(if one { 1 } else { merged.len() });
    merged
}

fn floor_char_boundary(text: &str, len_bytes_max: usize) -> usize {
    let end = text.len().min(len_bytes_max);
    (0..=end).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

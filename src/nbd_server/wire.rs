//! The NBD wire: every number and fixed layout of the protocol, named as in its document (`doc/proto.md`).
//!
//! Everything is big-endian. Nothing here does I/O, keeps state or knows what a value means to a server.
//!
//! | message | bytes | layout |
//! |---|---|---|
//! | greeting | 18 | u64 `NBDMAGIC`, u64 `IHAVEOPT`, u16 handshake flags |
//! | client flags | 4 | u32 |
//! | option | 16 + n | u64 `IHAVEOPT`, u32 option, u32 n, n bytes |
//! | option reply | 20 + n | u64 magic, u32 option, u32 reply type, u32 n, n bytes |
//! | compact request | 28 | u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u32 length |
//! | extended request | 32 | u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u64 length |
//! | simple reply | 16 | u32 magic, u32 error, u64 cookie |
//! | structured chunk | 20 + n | u32 magic, u16 flags, u16 type, u64 cookie, u32 n, n bytes |
//! | extended chunk | 32 + n | u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u64 n, n bytes |

/// First word of the greeting, "NBDMAGIC" (section "Newstyle negotiation").
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting and first word of every option, "IHAVEOPT".
pub const NBD_IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// First word of every option reply.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a compact request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of an extended request.
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First word of a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply chunk.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First word of an extended reply chunk.
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of the greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of the client's handshake flags.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes of an option before its payload.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of an option reply before its payload.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// Bytes of a compact request.
pub const COMPACT_REQUEST_BYTES: usize = 28;
/// Bytes of an extended request.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// Bytes of a simple reply before its data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a structured chunk before its payload.
pub const STRUCTURED_CHUNK_BYTES: usize = 20;
/// Bytes of an extended chunk before its payload.
pub const EXTENDED_CHUNK_BYTES: usize = 32;
/// Zero bytes at the end of an `EXPORT_NAME` reply unless both sides set `NO_ZEROES`.
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;
/// The longest string (export name, context, text) that the protocol allows, in bytes (section "Values").
pub const STRING_BYTES_MAX: usize = 4096;
/// The port that IANA assigned to NBD.
pub const NBD_PORT: u16 = 10809;

/// Handshake flag: fixed newstyle negotiation.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: no zero padding after `EXPORT_NAME`.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag that answers [`NBD_FLAG_FIXED_NEWSTYLE`].
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag that answers [`NBD_FLAG_NO_ZEROES`].
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Option: choose an export and enter transmission, without error replies.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option: end the session.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Option: start TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Option: describe an export and enter transmission.
pub const NBD_OPT_GO: u32 = 7;
/// Option: negotiate structured replies.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list metadata contexts.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option: negotiate extended headers.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: done.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply: one export of a list.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply: one fact about an export.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// The bit that makes an option reply an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
/// Option error: unknown option.
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR | 1;
/// Option error: forbidden by the server's policy.
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR | 2;
/// Option error: syntactically or semantically invalid.
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR | 3;
/// Option error: TLS has to be started first.
pub const NBD_REP_ERR_TLS_REQD: u32 = NBD_REP_FLAG_ERROR | 5;
/// Option error: no such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR | 6;
/// Option error: the server is shutting down.
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR | 7;
/// Option error: the payload is too large to be processed.
pub const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR | 9;
/// Option error: extended headers are already in use.
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = NBD_REP_FLAG_ERROR | 10;

/// Info: size and transmission flags (12 bytes with its type).
pub const NBD_INFO_EXPORT: u16 = 0;
/// Info: the canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Info: a description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Info: minimum, preferred and maximum block size (14 bytes with its type).
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flag: the flags are valid.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: the export is read-only.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `FLUSH` is supported.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: FUA is supported.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: `TRIM` is supported.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `WRITE_ZEROES` is supported.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: the DF command flag is supported.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a flush covers what every connection wrote.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `CACHE` is supported.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: the `FAST_ZERO` command flag is supported.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: `BLOCK_STATUS` takes a payload (extended headers only).
pub const NBD_FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Command: read.
pub const NBD_CMD_READ: u16 = 0;
/// Command: write.
pub const NBD_CMD_WRITE: u16 = 1;
/// Command: disconnect.
pub const NBD_CMD_DISC: u16 = 2;
/// Command: flush.
pub const NBD_CMD_FLUSH: u16 = 3;
/// Command: discard.
pub const NBD_CMD_TRIM: u16 = 4;
/// Command: prefetch.
pub const NBD_CMD_CACHE: u16 = 5;
/// Command: write zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Command: query extents.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

/// Command flag: durable before the reply.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag: zeroes must be allocated.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag: the read's data in one chunk.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag: one extent only.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag: zeroes fast or not at all.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag: the length field counts payload bytes.
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Chunk flag: the last chunk of a reply.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: nothing.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk: u64 offset, then data.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Where zeroes are.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk: u32 context, then u32 length and u32 status each.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk: u32 context, u32 count, then u64 length and u64 status each.
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: u32 error, u16 length, text.
pub const NBD_REPLY_TYPE_ERROR: u16 = 0x8001;
/// Chunk: u32 error, u16 length, text, u64 offset.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = 0x8002;

/// Status bit of `base:allocation`: a hole.
pub const NBD_STATE_HOLE: u32 = 1 << 0;
/// Status bit of `base:allocation`: reads as zeroes.
pub const NBD_STATE_ZERO: u32 = 1 << 1;

/// Error: operation not permitted.
pub const NBD_EPERM: u32 = 1;
/// Error: input/output error.
pub const NBD_EIO: u32 = 5;
/// Error: cannot allocate memory.
pub const NBD_ENOMEM: u32 = 12;
/// Error: invalid argument.
pub const NBD_EINVAL: u32 = 22;
/// Error: no space left.
pub const NBD_ENOSPC: u32 = 28;
/// Error: value too large.
pub const NBD_EOVERFLOW: u32 = 75;
/// Error: operation not supported (`FAST_ZERO` only).
pub const NBD_ENOTSUP: u32 = 95;
/// Error: the server is shutting down.
pub const NBD_ESHUTDOWN: u32 = 108;

/// Reads big-endian fields from the front of a byte slice. Short input is `None`, and then nothing is consumed.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// A cursor at the beginning of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next `len_bytes` bytes.
    pub fn bytes(&mut self, len_bytes: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(len_bytes)?;
        self.rest = rest;
        Some(head)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        let (head, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u16::from_be_bytes(*head))
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u32::from_be_bytes(*head))
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        let (head, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u64::from_be_bytes(*head))
    }
}

/// An option as its header announces it; the payload follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of `NBD_OPT_*`, or anything.
    pub option: u32,
    /// Payload bytes that follow, unchecked.
    pub payload_bytes: u32,
}

impl OptionHeader {
    /// Reads a header. `None` when the magic is wrong.
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        let magic = cursor.u64()?;
        let header = Self { option: cursor.u32()?, payload_bytes: cursor.u32()? };
        (magic == NBD_IHAVEOPT).then_some(header)
    }
}

/// Appends an option reply to `output`.
///
/// # Panics
///
/// When `payload` has 4 GiB or more, which no caller of this crate can make.
pub fn encode_option_reply(output: &mut Vec<u8>, option: u32, reply: u32, payload: &[u8]) {
    let payload_bytes = u32::try_from(payload.len()).expect("option replies are small");
    output.extend_from_slice(&NBD_REP_MAGIC.to_be_bytes());
    output.extend_from_slice(&option.to_be_bytes());
    output.extend_from_slice(&reply.to_be_bytes());
    output.extend_from_slice(&payload_bytes.to_be_bytes());
    output.extend_from_slice(payload);
}

/// A request's header, exactly as it came: nothing in it has been checked but the magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// `NBD_CMD_*`, or anything.
    pub command: u16,
    /// Chosen by the client and repeated in every reply.
    pub cookie: u64,
    /// Byte offset in the export.
    pub offset: u64,
    /// Length of the effect or of the payload, in bytes.
    pub len_bytes: u64,
}

impl RequestHeader {
    /// Reads a compact header. `None` when the magic is wrong.
    pub fn decode_compact(bytes: &[u8; COMPACT_REQUEST_BYTES]) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        let magic = cursor.u32()?;
        let header = Self {
            flags: cursor.u16()?,
            command: cursor.u16()?,
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            len_bytes: u64::from(cursor.u32()?),
        };
        (magic == NBD_REQUEST_MAGIC).then_some(header)
    }

    /// Reads an extended header. `None` when the magic is wrong.
    pub fn decode_extended(bytes: &[u8; EXTENDED_REQUEST_BYTES]) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        let magic = cursor.u32()?;
        let header = Self {
            flags: cursor.u16()?,
            command: cursor.u16()?,
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            len_bytes: cursor.u64()?,
        };
        (magic == NBD_EXTENDED_REQUEST_MAGIC).then_some(header)
    }
}

/// A simple reply without its data.
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[0..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// A structured chunk without its payload of `payload_bytes`.
pub fn structured_chunk(flags: u16, kind: u16, cookie: u64, payload_bytes: u32) -> [u8; STRUCTURED_CHUNK_BYTES] {
    let mut bytes = [0; STRUCTURED_CHUNK_BYTES];
    bytes[0..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..20].copy_from_slice(&payload_bytes.to_be_bytes());
    bytes
}

/// An extended chunk without its payload of `payload_bytes`; `offset` repeats the request's.
pub fn extended_chunk(flags: u16, kind: u16, cookie: u64, offset: u64, payload_bytes: u64) -> [u8; 32] {
    let mut bytes = [0; EXTENDED_CHUNK_BYTES];
    bytes[0..4].copy_from_slice(&NBD_EXTENDED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..32].copy_from_slice(&payload_bytes.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compact_request_decodes_field_by_field() {
        let mut bytes = [0u8; COMPACT_REQUEST_BYTES];
        bytes[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
        bytes[4..28].copy_from_slice(&[
            0x00, 0x01, // flags: FUA
            0x00, 0x06, // WRITE_ZEROES
            0xde, 0xad, 0xbe, 0xef, 0xba, 0xad, 0xf0, 0x0d, // cookie
            0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, // offset
            0xff, 0xee, 0xdd, 0xcc, // length
        ]);
        let expected = RequestHeader {
            flags: NBD_CMD_FLAG_FUA,
            command: NBD_CMD_WRITE_ZEROES,
            cookie: 0xdead_beef_baad_f00d,
            offset: 0x0102_0304_0506_0708,
            len_bytes: 0xffee_ddcc,
        };
        assert_eq!(RequestHeader::decode_compact(&bytes), Some(expected));
        bytes[3] = 0x14;
        assert_eq!(RequestHeader::decode_compact(&bytes), None);
    }

    #[test]
    fn an_extended_request_has_a_64_bit_length() {
        let mut bytes = [0u8; EXTENDED_REQUEST_BYTES];
        bytes[..4].copy_from_slice(&[0x21, 0xe4, 0x1c, 0x71]);
        bytes[24..32].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let header = RequestHeader::decode_extended(&bytes).unwrap();
        assert_eq!(header.len_bytes, 0x0102_0304_0506_0708);
        bytes[0] = 0x25;
        assert_eq!(RequestHeader::decode_extended(&bytes), None);
    }

    #[test]
    fn replies_are_laid_out_as_in_the_document() {
        assert_eq!(
            simple_reply(NBD_EINVAL, 0x0102_0304_0506_0708),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22, 1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(
            structured_chunk(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, 9, 0x0a0b_0c0d),
            [0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0x0a, 0x0b, 0x0c, 0x0d]
        );
        let chunk = extended_chunk(0, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 9, 0x11, 0x22);
        assert_eq!(chunk[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 6]);
        assert_eq!(chunk[8..], [0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0, 0, 0, 0x22]);
    }

    #[test]
    fn a_cursor_does_not_read_past_the_end() {
        let mut cursor = Cursor::new(&[0, 1, 2]);
        assert_eq!(cursor.u32(), None);
        assert_eq!(cursor.u16(), Some(1));
        assert_eq!(cursor.bytes(2), None);
        assert_eq!(cursor.rest(), [2]);
    }
}

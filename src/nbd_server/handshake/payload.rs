//! Option payloads: parsed completely or not at all, with the reason.
//!
//! Every length is compared with what was received before it is used; nothing is allocated.

use super::super::wire::{Cursor, STRING_BYTES_MAX};

/// Why a payload cannot be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(super) enum PayloadError {
    #[error("option payload ends too early")]
    Short,
    #[error("option payload has {0} bytes too many")]
    Trailing(usize),
    #[error("string of {0} bytes exceeds the limit of 4096")]
    StringTooLong(u32),
    #[error("string has a NUL byte")]
    StringHasNul,
    #[error("string is not UTF-8")]
    StringNotUtf8,
}

/// The payload of `INFO` and `GO`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoPayload<'a> {
    pub(super) name: &'a str,
    requests: &'a [u8],
}

impl<'a> InfoPayload<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, PayloadError> {
        let mut cursor = Cursor::new(bytes);
        let name = string(&mut cursor)?;
        let count = cursor.u16().ok_or(PayloadError::Short)?;
        let requests = cursor.bytes(usize::from(count) * 2).ok_or(PayloadError::Short)?;
        end(&cursor)?;
        Ok(Self { name, requests })
    }

    /// Whether the client asked for that `NBD_INFO_*`.
    pub(super) fn asks_for(&self, info: u16) -> bool {
        self.requests.chunks_exact(2).any(|request| request == info.to_be_bytes())
    }
}

/// The payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaContextPayload<'a> {
    pub(super) name: &'a str,
    pub(super) query_count: u32,
    queries: &'a [u8],
}

impl<'a> MetaContextPayload<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, PayloadError> {
        let mut cursor = Cursor::new(bytes);
        let name = string(&mut cursor)?;
        let query_count = cursor.u32().ok_or(PayloadError::Short)?;
        let queries = cursor.rest();
        for _ in 0..query_count {
            string(&mut cursor)?;
        }
        end(&cursor)?;
        Ok(Self { name, query_count, queries })
    }

    /// Whether one of the queries is `query`.
    pub(super) fn asks_for(&self, query: &str) -> bool {
        let mut cursor = Cursor::new(self.queries);
        (0..self.query_count).map_while(|_| string(&mut cursor).ok()).any(|text| text == query)
    }
}

/// The payload of `EXPORT_NAME`: all of it is the name.
pub(super) fn export_name(bytes: &[u8]) -> Result<&str, PayloadError> {
    checked_string(bytes)
}

fn string<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str, PayloadError> {
    let len_bytes = cursor.u32().ok_or(PayloadError::Short)?;
    let too_long = PayloadError::StringTooLong(len_bytes);
    let len_bytes = usize::try_from(len_bytes).ok().filter(|len| *len <= STRING_BYTES_MAX).ok_or(too_long)?;
    checked_string(cursor.bytes(len_bytes).ok_or(PayloadError::Short)?)
}

fn checked_string(bytes: &[u8]) -> Result<&str, PayloadError> {
    if bytes.len() > STRING_BYTES_MAX {
        return Err(PayloadError::StringTooLong(u32::try_from(bytes.len()).unwrap_or(u32::MAX)));
    }
    if bytes.contains(&0) {
        return Err(PayloadError::StringHasNul);
    }
    std::str::from_utf8(bytes).map_err(|_| PayloadError::StringNotUtf8)
}

fn end(cursor: &Cursor<'_>) -> Result<(), PayloadError> {
    let trailing = cursor.rest().len();
    if trailing == 0 { Ok(()) } else { Err(PayloadError::Trailing(trailing)) }
}

//! Runs requests that the transmission machine has permitted, and buffers their replies.
//!
//! Guards: a request's data is in the reply buffer before anything promises that it will come, except for reads that
//! are larger than the buffer and may not be split; what a failed read left in the buffer is never sent.

use std::time::Instant;

use super::connection::{End, Session};
use super::export::{Durability, Export, ExportError, Hole};
use super::limits::EXTENTS_MAX;
use super::transmission::{Refusal, Replies, Request, StatusQuery, Verdict};
use super::wire::{NBD_EINVAL, NBD_EIO, NBD_ENOSPC, NBD_ENOTSUP, NBD_EPERM, NBD_ESHUTDOWN, RequestHeader};

/// Room that every head of a reply fits.
const HEAD_BYTES: usize = 64;
/// Where writes that arrive in pieces are cut, in bytes of the export: no unit is written twice.
const CUT_BYTES: u64 = 4096;

impl Session<'_> {
    /// Answers one request whose header has been consumed.
    pub(super) fn answer(&mut self, header: &RequestHeader) -> Result<(), End> {
        let start = Instant::now();
        self.failed = false;
        let answered = self.answer_uncounted(header);
        self.link.client.traffic.record(
            header,
            start.elapsed(),
            self.failed || matches!(answered, Err(ref end) if !matches!(end, End::Disconnected)),
        );
        answered
    }

    fn answer_uncounted(&mut self, header: &RequestHeader) -> Result<(), End> {
        let replies = self.machine.replies(header);
        match self.machine.validate_request(header, self.link.refuses()) {
            Verdict::Run(request) => self.run(request, replies),
            Verdict::Refuse { refusal, drain_bytes } => {
                self.drain(drain_bytes)?;
                self.refuse(replies, refusal)
            }
            Verdict::Disconnect { payload_bytes } => Err(End::PayloadTooLarge(payload_bytes)),
        }
    }

    fn run(&mut self, request: Request, replies: Replies) -> Result<(), End> {
        let export = self.machine.negotiated().served.export.clone();
        let export = export.as_ref();
        let done = match request {
            Request::Disconnect => return Err(End::Disconnected),
            Request::Read { offset, len_bytes, dont_fragment } => {
                return self.read(export, replies, offset, len_bytes, dont_fragment);
            }
            Request::BlockStatus(query) => return self.block_status(export, replies, query),
            Request::BlockStatusPayload { offset, payload_bytes, one } => {
                return self.block_status_payload(export, replies, offset, payload_bytes, one);
            }
            Request::Write { offset, len_bytes, durability } => self.write(export, offset, len_bytes, durability)?,
            Request::Flush => export.flush(),
            Request::Trim { len_bytes: 0, .. }
            | Request::Cache { len_bytes: 0, .. }
            | Request::WriteZeroes { len_bytes: 0, .. } => Ok(()),
            Request::Trim { offset, len_bytes, durability } => export.discard(offset, len_bytes, durability),
            Request::Cache { offset, len_bytes } => export.prefetch(offset, len_bytes),
            Request::WriteZeroes { offset, len_bytes, hole, fast, durability } => {
                debug_assert!(!fast || hole == Hole::Allowed);
                export.write_zeroes(offset, len_bytes, hole, durability)
            }
        };
        match done {
            Ok(()) => self.push(replies.success().as_bytes()),
            Err(error) => self.fail(replies, &error, None),
        }
    }

    fn read(
        &mut self,
        export: &dyn Export,
        replies: Replies,
        offset: u64,
        len_bytes: u32,
        dont_fragment: bool,
    ) -> Result<(), End> {
        if len_bytes == 0 {
            return self.push(replies.success().as_bytes());
        }
        let capacity = self.link.buffers.reply.capacity_bytes() - HEAD_BYTES;
        let whole = usize::try_from(len_bytes).is_ok_and(|len| len <= capacity);
        if !whole && (dont_fragment || !replies.chunked()) {
            return self.read_streamed(export, replies, offset, len_bytes);
        }
        let (mut at, mut rest) = (offset, len_bytes);
        while rest > 0 {
            let piece = u32::try_from(capacity).map_or(rest, |capacity| rest.min(capacity));
            if let Err(error) = self.read_chunk(export, replies, at, piece, piece == rest)? {
                return self.fail(replies, &error, Some(at));
            }
            at += u64::from(piece);
            rest -= piece;
        }
        Ok(())
    }

    /// Buffers one head and its data, or neither when the export fails.
    fn read_chunk(
        &mut self,
        export: &dyn Export,
        replies: Replies,
        at: u64,
        len_bytes: u32,
        last: bool,
    ) -> Result<Result<(), ExportError>, End> {
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        self.make_room(len + HEAD_BYTES)?;
        let reply = &mut self.link.buffers.reply;
        let before = reply.pending().len();
        reply.push(replies.data(at, len_bytes, last).as_bytes());
        let result = export.read_at(at, reply.grab(len));
        if result.is_err() {
            reply.truncate(before);
        }
        Ok(result)
    }

    /// A read that is larger than the buffer and has to leave under one head. When the export fails after that head,
    /// a chunk is padded with zeroes and followed by the error; a simple reply can only be cut off.
    fn read_streamed(&mut self, export: &dyn Export, replies: Replies, offset: u64, len_bytes: u32) -> Result<(), End> {
        self.make_room(self.link.buffers.reply.capacity_bytes())?;
        self.push(replies.data(offset, len_bytes, false).as_bytes())?;
        let (mut at, mut rest) = (offset, u64::from(len_bytes));
        let mut failed = None;
        while rest > 0 {
            self.make_room(1)?;
            let reply = &mut self.link.buffers.reply;
            let free = reply.free_bytes();
            let piece = usize::try_from(rest).map_or(free, |rest| rest.min(free));
            let buf = reply.grab(piece);
            if failed.is_some() {
                buf.fill(0);
            } else if let Err(error) = export.read_at(at, buf) {
                buf.fill(0);
                if !replies.chunked() {
                    reply.truncate(0);
                    return Err(End::FailedMidReply);
                }
                failed = Some((error, at));
            }
            at += piece as u64;
            rest -= piece as u64;
        }
        match failed {
            Some((error, at)) => self.fail(replies, &error, Some(at)),
            None if replies.chunked() => self.push(replies.success().as_bytes()),
            None => Ok(()),
        }
    }

    /// Writes the payload piece by piece as it arrives. After an error the rest is received and forgotten.
    fn write(
        &mut self,
        export: &dyn Export,
        offset: u64,
        len_bytes: u32,
        durability: Durability,
    ) -> Result<Result<(), ExportError>, End> {
        let (mut at, mut rest) = (offset, u64::from(len_bytes));
        let mut result = Ok(());
        while rest > 0 {
            let unread = self.link.buffers.receive.unread();
            let piece = writable_bytes(at, rest, unread.len());
            if piece > 0 {
                if result.is_ok() {
                    result = export.write_at(at, &unread[..piece], durability);
                }
                self.link.buffers.receive.consume(piece);
                at += piece as u64;
                rest -= piece as u64;
            } else {
                self.link.send_replies()?;
                self.link.receive_more(0)?;
            }
        }
        Ok(result)
    }

    /// Receives and forgets a payload.
    fn drain(&mut self, len_bytes: u64) -> Result<(), End> {
        let mut rest = len_bytes;
        while rest > 0 {
            let unread = self.link.buffers.receive.unread().len();
            let piece = usize::try_from(rest).map_or(unread, |rest| rest.min(unread));
            self.link.buffers.receive.consume(piece);
            rest -= piece as u64;
            if rest > 0 {
                self.link.send_replies()?;
                self.link.receive_more(0)?;
            }
        }
        Ok(())
    }

    fn block_status(&mut self, export: &dyn Export, replies: Replies, query: StatusQuery) -> Result<(), End> {
        let StatusQuery { offset, len_bytes, one, allocation } = query;
        if !allocation {
            return self.push(replies.success().as_bytes());
        }
        let limit = if one { 1 } else { EXTENTS_MAX };
        match export.extents(offset, len_bytes, limit) {
            Ok(extents) => {
                let described = &extents[..extents.len().min(EXTENTS_MAX)];
                self.push(&replies.block_status(len_bytes, one, described))
            }
            Err(error) => self.fail(replies, &error, None),
        }
    }

    fn block_status_payload(
        &mut self,
        export: &dyn Export,
        replies: Replies,
        offset: u64,
        payload_bytes: u32,
        one: bool,
    ) -> Result<(), End> {
        let len = usize::try_from(payload_bytes).unwrap_or(usize::MAX);
        while self.link.buffers.receive.unread().len() < len {
            self.link.send_replies()?;
            self.link.receive_more(0)?;
        }
        let query = self.machine.status_query(offset, one, &self.link.buffers.receive.unread()[..len]);
        self.link.buffers.receive.consume(len);
        match query {
            Ok(query) => self.block_status(export, replies, query),
            Err(refusal) => self.refuse(replies, refusal),
        }
    }

    fn refuse(&mut self, replies: Replies, refusal: Refusal) -> Result<(), End> {
        self.failed = true;
        self.push(&replies.error(refusal.errno(), &refusal.to_string(), None))
    }

    fn fail(&mut self, replies: Replies, error: &ExportError, at: Option<u64>) -> Result<(), End> {
        self.failed = true;
        self.push(&replies.error(errno_of(error), &error.to_string(), at))
    }

    /// Buffers a small reply.
    fn push(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.make_room(bytes.len())?;
        self.link.buffers.reply.push(bytes);
        Ok(())
    }

    fn make_room(&mut self, len_bytes: usize) -> Result<(), End> {
        if self.link.buffers.reply.free_bytes() < len_bytes { self.link.send_replies() } else { Ok(()) }
    }
}

/// How much of `unread` can be written now: all that is left of the request, or whole units.
fn writable_bytes(at: u64, rest: u64, unread: usize) -> usize {
    match usize::try_from(rest) {
        Ok(rest) if unread >= rest => rest,
        _ => {
            let beyond = usize::try_from((at + unread as u64) % CUT_BYTES).unwrap_or(0);
            unread.saturating_sub(beyond)
        }
    }
}

/// The protocol's error for an export's error.
fn errno_of(error: &ExportError) -> u32 {
    match error {
        ExportError::Media => NBD_EIO,
        ExportError::NoSpace => NBD_ENOSPC,
        ExportError::ShuttingDown => NBD_ESHUTDOWN,
        ExportError::PastEnd => NBD_EINVAL,
        ExportError::ReadOnly => NBD_EPERM,
        ExportError::Unsupported => NBD_ENOTSUP,
        ExportError::Io(error) => match error.kind() {
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => NBD_EPERM,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded | std::io::ErrorKind::FileTooLarge => {
                NBD_ENOSPC
            }
            std::io::ErrorKind::InvalidInput => NBD_EINVAL,
            _ => NBD_EIO,
        },
    }
}

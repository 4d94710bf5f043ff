//! Runs requests that the transmission machine has permitted, and buffers their replies.
//!
//! Guards: a request's data is in the reply buffer before anything promises that it will come, except for reads that
//! are larger than the buffer and may not be split; what a failed read left in the buffer is never sent; what may take long
//! runs beside the connection, if somebody takes it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::connection::{End, Fate, Session};
use super::export::{Durability, Export, ExportError, Extent, ExtentKind, Hole};
use super::failures::command_name;
use super::limits::{EXTENTS_MAX, HOLES_READ_BYTES, HOLES_READ_MAX, SLOW_PER_CONNECTION_MAX, SLOW_ZEROES_BYTES};
use super::slow::{Finished, Work};
use super::stats::{INVALID, failure};
use super::throttle;
use super::transmission::{Refusal, Replies, Request, StatusQuery, Verdict};
use super::wire::{
    NBD_CMD_WRITE, NBD_EINVAL, NBD_EIO, NBD_ENOSPC, NBD_ENOTSUP, NBD_EPERM, NBD_ESHUTDOWN, RequestHeader,
};

/// Room that every head of a reply fits.
const HEAD_BYTES: usize = 64;
/// Where data that moves in pieces is cut, in bytes of the export: no unit is written or read twice.
const CUT_BYTES: u64 = 4096;

/// A request that is being answered.
#[derive(Debug, Clone, Copy)]
struct Call {
    header: RequestHeader,
    replies: Replies,
    start: Instant,
}

impl Session<'_> {
    /// Answers one request whose header has been consumed.
    pub(super) fn answer(&mut self, header: &RequestHeader) -> Result<(), End> {
        let verdict = self.machine.validate_request(header, self.link.refuses());
        let len_bytes = throttle::payload_bytes(&verdict);
        if verdict != Verdict::Run(Request::Disconnect) {
            self.throttle(len_bytes)?;
        }
        self.link.turn.work();
        self.link.turn.take_moved();
        let start = Instant::now();
        (self.header, self.fate) = (*header, Fate::Succeeded);
        let call = Call { header: *header, replies: self.machine.replies(header), start };
        let answered = self.answer_uncounted(verdict, &call);
        self.link.turn.moved(0);
        self.settle(len_bytes, answered.is_ok());
        self.counted(header, start, answered)
    }

    /// Counts a request, unless it is not answered yet.
    fn counted(&self, header: &RequestHeader, start: Instant, answered: Result<(), End>) -> Result<(), End> {
        if self.fate != Fate::Deferred {
            let broken = matches!(answered, Err(ref end) if !matches!(end, End::Disconnected));
            self.link.client.traffic.record(header, start.elapsed(), self.fate == Fate::Failed || broken);
        }
        answered
    }

    /// Does once more what a lock has interrupted.
    pub(super) fn run_again(&mut self, finished: &Finished) -> Result<(), End> {
        let Finished { work, header, replies, start, .. } = *finished;
        (self.header, self.fate) = (header, Fate::Succeeded);
        let export = Arc::clone(&self.machine.negotiated().served.export);
        let answered = self.run_work(work.again(), &export, &Call { header, replies, start });
        self.counted(&header, start, answered)
    }

    /// What was asked of the limits of the export was used, or is given back as far as it was not.
    fn settle(&mut self, len_bytes: u64, is_whole: bool) {
        let done_bytes = self.link.turn.take_moved();
        match &mut self.link.seat {
            Some(seat) if !is_whole => seat.refund(len_bytes, done_bytes.min(len_bytes)),
            Some(seat) if self.fate != Fate::Deferred => seat.answered(len_bytes),
            _ => {}
        }
    }

    fn answer_uncounted(&mut self, verdict: Verdict, call: &Call) -> Result<(), End> {
        match verdict {
            Verdict::Run(request) => self.run(request, call),
            Verdict::Refuse { refusal, drain_bytes } => {
                self.drain(drain_bytes)?;
                self.refuse(call.replies, refusal)
            }
            Verdict::Disconnect { payload_bytes } => Err(End::PayloadTooLarge(payload_bytes)),
        }
    }

    fn run(&mut self, request: Request, call: &Call) -> Result<(), End> {
        let export = Arc::clone(&self.machine.negotiated().served.export);
        let replies = call.replies;
        let work = match request {
            Request::Disconnect => return Err(End::Disconnected),
            Request::Read { offset, len_bytes, dont_fragment } => {
                return self.read(export.as_ref(), replies, offset, len_bytes, dont_fragment);
            }
            Request::BlockStatus(query) => return self.block_status(export.as_ref(), replies, query),
            Request::BlockStatusPayload { offset, payload_bytes, one } => {
                return self.block_status_payload(export.as_ref(), replies, offset, payload_bytes, one);
            }
            Request::Write { offset, len_bytes, durability } => {
                match (self.write(export.as_ref(), offset, len_bytes)?, durability) {
                    (Ok(()), Durability::Fua) if len_bytes > 0 => {
                        Work::Persist { offset, len_bytes: u64::from(len_bytes) }
                    }
                    (done, _) => return self.reply(replies, &done),
                }
            }
            Request::Trim { len_bytes: 0, .. }
            | Request::Cache { len_bytes: 0, .. }
            | Request::WriteZeroes { len_bytes: 0, .. } => return self.reply(replies, &Ok(())),
            Request::Flush => Work::Flush,
            Request::Trim { offset, len_bytes, durability } => Work::Discard { offset, len_bytes, durability },
            Request::Cache { offset, len_bytes } => Work::Prefetch { offset, len_bytes },
            Request::WriteZeroes { offset, len_bytes, hole, durability } => {
                Work::Zeroes { offset, len_bytes, hole, durability }
            }
        };
        if matches!(work, Work::Zeroes { .. } | Work::Discard { .. }) {
            self.known_data = 0..0;
        }
        self.run_work(work, &export, call)
    }

    /// Does what may take long: beside the connection if it really may, and somebody takes it.
    fn run_work(&mut self, work: Work, export: &Arc<dyn Export>, call: &Call) -> Result<(), End> {
        if may_take_long(work, export.as_ref()) {
            while self.link.slow.in_flight() >= SLOW_PER_CONNECTION_MAX {
                self.await_one()?;
            }
            let (link, call) = (&mut self.link, (call.header, call.replies, call.start));
            if link.slow.give_away(work, call, Arc::clone(export), (link.client, link.shared, &link.turn)) {
                self.fate = Fate::Deferred;
                return Ok(());
            }
        }
        let mut done = work.run(export.as_ref(), self.link.client, self.link.shared, &mut self.link.turn);
        while matches!(done, Err(ExportError::Locked)) && self.wait_at_gate()? {
            done = work.again().run(export.as_ref(), self.link.client, self.link.shared, &mut self.link.turn);
        }
        self.reply(call.replies, &done)
    }

    /// Answers a request that has ended beside the connection.
    pub(super) fn answer_finished(&mut self, finished: Finished) -> Result<(), End> {
        let Finished { header, replies, start, result, .. } = finished;
        self.known_data = 0..0;
        (self.header, self.fate) = (header, Fate::Succeeded);
        let given_up = matches!(result, Err(ExportError::ShuttingDown | ExportError::Locked)) && self.link.hangs_up();
        // A client of a server that hangs up repeats what was not answered.
        let answered = if given_up { Ok(()) } else { self.reply(replies, &result) };
        self.link.client.traffic.record(&header, start.elapsed(), result.is_err() || answered.is_err());
        if let (NBD_CMD_WRITE, Some(seat)) = (header.command, &mut self.link.seat) {
            seat.answered(header.len_bytes);
        }
        answered
    }

    fn reply(&mut self, replies: Replies, done: &Result<(), ExportError>) -> Result<(), End> {
        match done {
            Ok(()) => self.push(replies.success().as_bytes()),
            Err(error) => self.fail(replies, error, None),
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
        let may_split = replies.chunked() && !dont_fragment;
        if may_split && len_bytes >= HOLES_READ_BYTES && export.discards() {
            return self.read_with_holes(export, replies, offset, len_bytes);
        }
        if !may_split && !self.fits_reply(len_bytes) {
            return self.read_streamed(export, replies, offset, len_bytes);
        }
        self.read_run(export, replies, offset..offset + u64::from(len_bytes), true)?;
        Ok(())
    }

    /// Whether the data of a read fits the reply buffer, after it was enlarged if that is possible.
    fn fits_reply(&mut self, len_bytes: u32) -> bool {
        let wanted = usize::try_from(len_bytes).unwrap_or(usize::MAX).saturating_add(HEAD_BYTES);
        if wanted > self.link.buffers.reply.capacity_bytes() && !self.link.buffers.are_large() {
            self.link.enlarge();
        }
        wanted <= self.link.buffers.reply.capacity_bytes()
    }

    /// Reads `range` in as many chunks as the buffer needs; with `last` the last one ends the reply. `false` after an
    /// error, which has ended it.
    fn read_run(&mut self, export: &dyn Export, replies: Replies, range: Range<u64>, last: bool) -> Result<bool, End> {
        let len_bytes = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        let whole = self.fits_reply(len_bytes);
        let capacity = (self.link.buffers.reply.capacity_bytes() - HEAD_BYTES) as u64;
        let mut at = range.start;
        while at < range.end {
            let cut = if whole { range.end } else { range.end.min((at + capacity) / CUT_BYTES * CUT_BYTES) };
            let piece = u32::try_from(cut - at).unwrap_or(u32::MAX);
            if let Err(error) = self.read_chunk(export, replies, at, piece, last && cut == range.end)? {
                self.fail(replies, &error, Some(at))?;
                return Ok(false);
            }
            at = cut;
        }
        Ok(true)
    }

    /// A read that need not send the zeroes of holes.
    fn read_with_holes(
        &mut self,
        export: &dyn Export,
        replies: Replies,
        offset: u64,
        len_bytes: u32,
    ) -> Result<(), End> {
        let end = offset + u64::from(len_bytes);
        let mut at = offset;
        // Where holes cannot be found out, everything is read.
        for hole in export
            .extents(offset, u64::from(len_bytes), HOLES_READ_MAX)
            .map_or_else(|_| Vec::new(), |extents| holes_of(&extents, offset..end))
        {
            if at < hole.start && !self.read_run(export, replies, at..hole.start, false)? {
                return Ok(());
            }
            let hole_bytes = u32::try_from(hole.end - hole.start).unwrap_or(u32::MAX);
            self.push(replies.hole(hole.start, hole_bytes, hole.end == end).as_bytes())?;
            at = hole.end;
        }
        if at < end {
            self.read_run(export, replies, at..end, true)?;
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
        loop {
            self.make_room(len + HEAD_BYTES)?;
            self.link.turn.work();
            let reply = &mut self.link.buffers.reply;
            let before = reply.pending().len();
            reply.push(replies.data(at, len_bytes, last).as_bytes());
            let result = export.read_at(at, reply.grab(len));
            if result.is_err() {
                reply.truncate(before);
            }
            match result {
                Err(ExportError::Locked) if self.wait_at_gate()? => {}
                result => {
                    self.link.turn.moved(len_bytes.into());
                    return Ok(result);
                }
            }
        }
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
            self.link.turn.work();
            let reply = &mut self.link.buffers.reply;
            let free = reply.free_bytes();
            let piece = usize::try_from(rest).map_or(free, |rest| rest.min(free));
            let before = reply.pending().len();
            let buf = reply.grab(piece);
            if failed.is_some() {
                buf.fill(0);
            } else if let Err(error) = export.read_at(at, buf) {
                buf.fill(0);
                reply.truncate(before);
                if matches!(error, ExportError::Locked) && self.wait_at_gate()? {
                    continue;
                }
                if !replies.chunked() {
                    return Err(End::FailedMidReply);
                }
                self.make_room(piece)?;
                self.link.buffers.reply.grab(piece).fill(0);
                failed = Some((error, at));
            }
            self.link.turn.moved(piece as u64);
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
    fn write(&mut self, export: &dyn Export, offset: u64, len_bytes: u32) -> Result<Result<(), ExportError>, End> {
        let (mut at, mut rest) = (offset, u64::from(len_bytes));
        let mut result = Ok(());
        while rest > 0 {
            let unread = self.link.buffers.receive.unread();
            let piece = writable_bytes(at, rest, unread.len());
            if piece > 0 {
                if result.is_ok() {
                    self.link.turn.work();
                    result = export.write_at(at, &unread[..piece]);
                    if matches!(result, Err(ExportError::Locked)) && self.wait_at_gate()? {
                        result = Ok(());
                        continue;
                    }
                }
                self.link.buffers.receive.consume(piece);
                self.link.turn.moved(piece as u64);
                at += piece as u64;
                rest -= piece as u64;
            } else {
                self.receive_more()?;
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
                self.receive_more()?;
            }
        }
        Ok(())
    }

    fn block_status(&mut self, export: &dyn Export, replies: Replies, query: StatusQuery) -> Result<(), End> {
        let StatusQuery { offset, len_bytes, one, allocation } = query;
        if !allocation {
            return self.push(replies.success().as_bytes());
        }
        let mut found = self.extents(export, offset, len_bytes, one);
        while matches!(found, Err(ExportError::Locked)) && self.wait_at_gate()? {
            found = self.extents(export, offset, len_bytes, one);
        }
        match found {
            Ok(extents) => {
                let described = &extents[..extents.len().min(EXTENTS_MAX)];
                self.push(&replies.block_status(len_bytes, one, described))
            }
            Err(error) => self.fail(replies, &error, None),
        }
    }

    /// What the query asks for. A run of data is remembered whole: the end of a long one may take long to find, and a client
    /// that asks for it piece by piece must not have it found again and again. To call data what has become a hole since
    /// then is always allowed.
    fn extents(
        &mut self,
        export: &dyn Export,
        offset: u64,
        len_bytes: u64,
        one: bool,
    ) -> Result<Vec<Extent>, ExportError> {
        let end = offset + len_bytes;
        let enough = |known: &Range<u64>| known.contains(&offset) && (one || known.end >= end);
        if !enough(&self.known_data) {
            let size_bytes = export.size_bytes().min(self.machine.negotiated().size_bytes);
            let first = export.extents(offset, size_bytes.saturating_sub(offset).max(len_bytes), 1)?;
            match first.first() {
                Some(run) if run.kind == ExtentKind::Allocated => self.known_data = offset..offset + run.len_bytes,
                _ if one => return Ok(first),
                _ => {}
            }
        }
        if enough(&self.known_data) {
            return Ok(vec![Extent { len_bytes: self.known_data.end - offset, kind: ExtentKind::Allocated }]);
        }
        export.extents(offset, len_bytes, EXTENTS_MAX)
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
            self.receive_more()?;
        }
        let query = self.machine.status_query(offset, one, &self.link.buffers.receive.unread()[..len]);
        self.link.buffers.receive.consume(len);
        match query {
            Ok(query) => self.block_status(export, replies, query),
            Err(refusal) => self.refuse(replies, refusal),
        }
    }

    fn refuse(&mut self, replies: Replies, refusal: Refusal) -> Result<(), End> {
        self.fate = Fate::Failed;
        self.link.client.traffic.record_failure(INVALID);
        let (client, command) = (self.link.client.id, command_name(self.header.command));
        tracing::debug!(client, command, offset = self.header.offset, len_bytes = self.header.len_bytes, %refusal, "refused");
        self.push(&replies.error(refusal.errno(), &refusal.to_string(), None))
    }

    fn fail(&mut self, replies: Replies, error: &ExportError, at: Option<u64>) -> Result<(), End> {
        self.fate = Fate::Failed;
        self.link.client.traffic.record_failure(failure(error));
        let served = &self.machine.negotiated().served;
        if !matches!(error, ExportError::ShuttingDown | ExportError::Locked) {
            self.failures.log(self.link.client, &served.info.name, &self.header, error);
        }
        self.link.shared.note_poison(served);
        self.push(&replies.error(errno_of(error), &error.to_string(), at))
    }

    /// Buffers a small reply.
    fn push(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.make_room(bytes.len())?;
        self.link.buffers.reply.push(bytes);
        Ok(())
    }

    /// Makes room, by a larger buffer if there is one and otherwise by sending what waits.
    fn make_room(&mut self, len_bytes: usize) -> Result<(), End> {
        if self.link.buffers.reply.free_bytes() >= len_bytes {
            return Ok(());
        }
        if !self.link.buffers.are_large() {
            self.link.enlarge();
        }
        if self.link.buffers.reply.free_bytes() < len_bytes { self.link.send_replies() } else { Ok(()) }
    }
}

/// Whether the work runs beside its connection. What is always short would only be made longer by that.
fn may_take_long(work: Work, export: &dyn Export) -> bool {
    match work {
        Work::Flush | Work::Persist { .. } => export.durability_waits(),
        Work::Zeroes { len_bytes, hole, durability, .. } => {
            let punches = hole != Hole::Forbidden && export.discards();
            len_bytes >= SLOW_ZEROES_BYTES || punches || durability == Durability::Fua && export.durability_waits()
        }
        Work::Discard { .. } | Work::Prefetch { .. } => true,
    }
}

/// The holes in `range`, where they are whole units, when it begins with `extents`.
fn holes_of(extents: &[Extent], range: Range<u64>) -> Vec<Range<u64>> {
    let (mut at, mut holes) = (range.start, Vec::<Range<u64>>::new());
    for extent in extents {
        let end = range.end.min(at.saturating_add(extent.len_bytes));
        let whole = at.next_multiple_of(CUT_BYTES)..end / CUT_BYTES * CUT_BYTES;
        match holes.last_mut() {
            _ if extent.kind != ExtentKind::Hole || whole.is_empty() => {}
            Some(last) if last.end == whole.start => last.end = whole.end,
            _ => holes.push(whole),
        }
        at = end;
    }
    holes
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
        ExportError::Media | ExportError::Volume(_) => NBD_EIO,
        ExportError::NoSpace => NBD_ENOSPC,
        ExportError::ShuttingDown | ExportError::Locked => NBD_ESHUTDOWN,
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

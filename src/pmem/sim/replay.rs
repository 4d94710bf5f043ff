//! Replays a trace: which bytes are durable after an event, and which stores a power cut could still lose.

use std::collections::BTreeMap;
use std::ops::Range;

use super::random::mix;
use super::{BLOCK_BYTES, Event, SimOptions, Thread, Trace};
use crate::pmem::granularity::Granularity;

/// Bytes of a page, what an `msync` commits at least.
const PAGE_BYTES: u64 = 4096;

/// What kind of ordering step a [`Barrier`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarrierKind {
    /// `flush`, alone or as the first half of `persist`.
    Flush,
    /// `drain`, alone or as the second half of `persist`.
    Drain,
    /// `sync_all`.
    Sync,
}

/// A flush, drain or sync of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// Its number among the barriers of the trace, from 0: what a mutation drops.
    pub number: usize,
    /// How many events came before it.
    pub position: usize,
    /// What it is.
    pub kind: BarrierKind,
    /// Whether it marked or committed anything. Dropping one that did not is no mutation.
    pub effective: bool,
}

/// A piece of a store that is never torn: 8 or 16 bytes of one block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    offset: u64,
    len_bytes: usize,
    bytes: [u8; BLOCK_BYTES],
    /// Pieces of one call in one torn unit reach the media together.
    group: (u64, u64),
    /// Of a hole: metadata.
    punched: bool,
}

/// The stores to one cell since its last commit.
#[derive(Debug, Default)]
pub(super) struct Cell {
    pieces: Vec<Piece>,
    /// How many of them, from the first, each thread has marked by a flush.
    marks: Vec<(Thread, usize)>,
}

impl Cell {
    /// A flush of `thread` marks the first `count` pieces; whether that is news.
    fn mark(&mut self, thread: Thread, count: usize) -> bool {
        match self.marks.iter_mut().find(|(owner, _)| *owner == thread) {
            Some((_, marked)) if *marked >= count => false,
            Some((_, marked)) => {
                *marked = count;
                true
            }
            None => {
                self.marks.push((thread, count));
                count > 0
            }
        }
    }

    /// How many pieces a drain of `thread` commits.
    fn marked_by(&self, thread: Thread) -> usize {
        self.marks.iter().find(|(owner, _)| *owner == thread).map_or(0, |(_, marked)| *marked)
    }

    /// Takes the first `count` pieces out.
    fn take(&mut self, count: usize) -> Vec<Piece> {
        self.marks.iter_mut().for_each(|(_, marked)| *marked = marked.saturating_sub(count));
        self.pieces.drain(..count).collect()
    }

    /// Where the list can be cut: after how many pieces, from none to all.
    fn cuts(&self) -> Vec<usize> {
        let between = self.pieces.windows(2).enumerate().filter(|(_, pair)| pair[0].group != pair[1].group);
        let mut cuts = vec![0];
        cuts.extend(between.map(|(index, _)| index + 1));
        cuts.push(self.pieces.len());
        cuts
    }
}

/// The media, with a hash of all its bytes that follows every store.
#[derive(Debug)]
pub(super) struct Media {
    bytes: Vec<u8>,
    hash: u64,
}

impl Media {
    /// Stores a piece and returns the piece that takes it back.
    fn store(&mut self, piece: &Piece) -> Piece {
        let start = usize::try_from(piece.offset).expect("checked when it was recorded");
        let place = &mut self.bytes[start..start + piece.len_bytes];
        let mut undo = *piece;
        undo.bytes[..piece.len_bytes].copy_from_slice(place);
        place.copy_from_slice(&piece.bytes[..piece.len_bytes]);
        self.hash ^= hash_of(&undo) ^ hash_of(piece);
        undo
    }
}

/// Hashes a piece by 8-byte words, so that the hash of the media does not depend on how stores were cut.
fn hash_of(piece: &Piece) -> u64 {
    let (words, _) = piece.bytes[..piece.len_bytes].as_chunks::<8>();
    (piece.offset..)
        .step_by(8)
        .zip(words)
        .fold(0, |hash, (offset, word)| hash ^ mix(offset ^ mix(u64::from_le_bytes(*word))))
}

/// The state of a simulated medium after some events of its trace.
#[derive(Debug)]
pub(super) struct Replay {
    options: SimOptions,
    media: Media,
    cells: BTreeMap<u64, Cell>,
    len_bytes: u64,
    pending_len_bytes: Option<u64>,
}

impl Replay {
    pub(super) fn new(trace: &Trace) -> Self {
        let len_bytes = trace.initial.len() as u64;
        let lengths = trace.events.iter().filter_map(|event| match event {
            Event::Length(len_bytes) => Some(*len_bytes),
            _ => None,
        });
        let len_max = lengths.fold(len_bytes, u64::max).next_multiple_of(PAGE_BYTES);
        let mut bytes = trace.initial.to_vec();
        bytes.resize(usize::try_from(len_max).expect("it was mapped"), 0);
        Self {
            options: trace.options,
            media: Media { bytes, hash: 0 },
            cells: BTreeMap::new(),
            len_bytes,
            pending_len_bytes: None,
        }
    }

    /// Applies an event; whether it marked or committed anything.
    pub(super) fn apply(&mut self, event: &Event) -> bool {
        match (event, self.options.granularity) {
            (Event::Store { call, offset, bytes, punched }, _) => self.store(*call, *offset, bytes, *punched),
            (Event::Flush(range, thread) | Event::Streamed(range, thread), Granularity::CacheLine) => {
                self.mark(range, *thread)
            }
            (Event::Flush(range, thread), Granularity::Page) => self.commit_pages(range, *thread),
            (Event::Drain(thread), Granularity::CacheLine) => self.commit_marked(*thread),
            (Event::Sync(thread), Granularity::CacheLine) => {
                self.mark_holes(*thread) | self.commit_marked(*thread) | self.commit_length()
            }
            (Event::Sync(thread), Granularity::Page) => {
                self.commit_pages(&(0..u64::MAX), *thread) | self.commit_length()
            }
            (Event::Drain(_) | Event::Streamed(..), Granularity::Page) => false,
            (Event::Length(len_bytes), _) => {
                self.pending_len_bytes = Some(*len_bytes);
                true
            }
        }
    }

    /// The cells with pending stores, in the order of [`Self::choices`].
    pub(super) fn pending_cells(&self) -> Vec<u64> {
        self.cells.keys().copied().collect()
    }

    /// The cells that a barrier would mark or commit now.
    pub(super) fn cells_of(&self, event: &Event) -> Vec<u64> {
        let cache_line = self.options.granularity == Granularity::CacheLine;
        match event {
            Event::Flush(range, _) => {
                let unit_bytes = if cache_line { self.options.cell_bytes() } else { PAGE_BYTES };
                self.cells.range(self.cell_range(range, unit_bytes)).map(|(&cell, _)| cell).collect()
            }
            Event::Drain(thread) => {
                let marked = self.cells.iter().filter(|(_, cell)| cell.marked_by(*thread) > 0);
                marked.map(|(&cell, _)| cell).collect()
            }
            _ => self.pending_cells(),
        }
    }

    fn store(&mut self, call: u64, offset: u64, bytes: &[u8; BLOCK_BYTES], punched: bool) -> bool {
        let torn_bytes = self.options.torn_bytes;
        let piece_bytes = usize::try_from(torn_bytes).map_or(BLOCK_BYTES, |torn| torn.min(BLOCK_BYTES));
        let cell = self.cells.entry(offset / self.options.cell_bytes()).or_default();
        for (part, offset) in bytes.chunks_exact(piece_bytes).zip((offset..).step_by(piece_bytes)) {
            let mut bytes = [0; BLOCK_BYTES];
            bytes[..piece_bytes].copy_from_slice(part);
            let group = (call, offset / torn_bytes);
            cell.pieces.push(Piece { offset, len_bytes: piece_bytes, bytes, group, punched });
        }
        true
    }

    fn mark(&mut self, range: &Range<u64>, thread: Thread) -> bool {
        let cells = self.cell_range(range, self.options.cell_bytes());
        let mut marked = false;
        for cell in self.cells.range_mut(cells).map(|(_, cell)| cell) {
            let stored = cell.pieces.iter().rposition(|piece| !piece.punched).map_or(0, |last| last + 1);
            marked |= cell.mark(thread, stored);
        }
        marked
    }

    /// A sync makes holes durable, and what was stored to their cells before.
    fn mark_holes(&mut self, thread: Thread) -> bool {
        let mut marked = false;
        for cell in self.cells.values_mut() {
            let punched = cell.pieces.iter().rposition(|piece| piece.punched).map_or(0, |last| last + 1);
            marked |= cell.mark(thread, punched);
        }
        marked
    }

    fn commit_marked(&mut self, thread: Thread) -> bool {
        let mut committed = false;
        let media = &mut self.media;
        self.cells.retain(|_, cell| {
            for piece in cell.take(cell.marked_by(thread)) {
                media.store(&piece);
                committed = true;
            }
            !cell.pieces.is_empty()
        });
        committed
    }

    fn commit_pages(&mut self, range: &Range<u64>, thread: Thread) -> bool {
        let cells = self.cell_range(range, PAGE_BYTES);
        for cell in self.cells.range_mut(cells).map(|(_, cell)| cell) {
            cell.mark(thread, cell.pieces.len());
        }
        // Between two events no other cell is marked, so this commits the pages and nothing else.
        self.commit_marked(thread)
    }

    fn commit_length(&mut self) -> bool {
        let pending = self.pending_len_bytes.take();
        self.len_bytes = pending.unwrap_or(self.len_bytes);
        pending.is_some()
    }

    /// The cells that `range` touches when it is widened to multiples of `unit_bytes`.
    fn cell_range(&self, range: &Range<u64>, unit_bytes: u64) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        let cells_per_unit = unit_bytes / self.options.cell_bytes();
        range.start / unit_bytes * cells_per_unit..range.end.div_ceil(unit_bytes) * cells_per_unit
    }

    /// What a power cut now decides: for each cell with pending stores where its list can be cut, and as the last entry,
    /// if there is one, whether a new length is there.
    pub(super) fn choices(&self) -> Vec<Vec<usize>> {
        let mut choices: Vec<_> = self.cells.values().map(Cell::cuts).collect();
        choices.extend(self.pending_len_bytes.map(|_| vec![0, 1]));
        choices
    }

    /// Calls `look` with the hash and the bytes of the media that a power cut leaves when it cuts as `cuts` says. The
    /// media are as before afterwards.
    pub(super) fn with_cut<R>(&mut self, cuts: &[usize], look: impl FnOnce(u64, &[u8]) -> R) -> R {
        let mut undo = Vec::new();
        for (cell, &cut) in self.cells.values().zip(cuts) {
            for piece in &cell.pieces[..cut] {
                undo.push(self.media.store(piece));
            }
        }
        let new_length = cuts.len() > self.cells.len() && cuts[self.cells.len()] == 1;
        let len_bytes = if new_length { self.pending_len_bytes.unwrap_or(self.len_bytes) } else { self.len_bytes };
        let len = usize::try_from(len_bytes).expect("it was mapped");
        let result = look(self.media.hash ^ len_bytes.rotate_left(32), &self.media.bytes[..len]);
        for piece in undo.iter().rev() {
            self.media.store(piece);
        }
        result
    }
}

impl Trace {
    /// The flushes, drains and syncs of the trace, in order.
    #[must_use]
    pub fn barriers(&self) -> Vec<Barrier> {
        let mut replay = Replay::new(self);
        let mut barriers = Vec::new();
        for (position, event) in self.events.iter().enumerate() {
            let effective = replay.apply(event);
            if let Some(kind) = barrier_kind(event) {
                barriers.push(Barrier { number: barriers.len(), position, kind, effective });
            }
        }
        barriers
    }
}

pub(super) const fn barrier_kind(event: &Event) -> Option<BarrierKind> {
    match event {
        Event::Flush(..) => Some(BarrierKind::Flush),
        Event::Drain(_) => Some(BarrierKind::Drain),
        Event::Sync(_) => Some(BarrierKind::Sync),
        Event::Store { .. } | Event::Streamed(..) | Event::Length(_) => None,
    }
}

//! Replays a trace: which bytes are durable after an event, and which stores a power cut could still lose.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::random::mix;
use super::{BLOCK_BYTES, Event, SimOptions, Thread, Trace, first_address, place_of};
use crate::pmem::granularity::Granularity;

/// Bytes of a page, what an `msync` commits at least.
pub(super) const PAGE_BYTES: u64 = 4096;

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
    /// How many of them, from the first, are of a process that is dead.
    orphans: usize,
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
        self.orphans = self.orphans.saturating_sub(count);
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

/// The media of all backings, with a hash of all bytes that follows every store.
#[derive(Debug)]
pub(super) struct Media {
    bytes: Vec<Vec<u8>>,
    hash: u64,
}

impl Media {
    /// Stores a piece and returns the piece that takes it back.
    fn store(&mut self, piece: &Piece) -> Piece {
        let (index, start) = place_of(piece.offset);
        let place = &mut self.bytes[index][start..start + piece.len_bytes];
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

/// How long a backing is, and is to become.
#[derive(Debug)]
struct Length {
    bytes: u64,
    pending: Option<u64>,
}

/// The state of simulated media after some events of their trace.
#[derive(Debug)]
pub(super) struct Replay {
    options: Vec<SimOptions>,
    media: Media,
    /// By the address of their first byte.
    cells: BTreeMap<u64, Cell>,
    lengths: Vec<Length>,
    /// Pages that a failed flush left clean.
    clean_pages: BTreeSet<u64>,
}

impl Replay {
    pub(super) fn new(trace: &Trace) -> Self {
        let mut lens: Vec<_> = trace.beginnings.iter().map(|beginning| beginning.media.len()).collect();
        let lengths = lens.iter().map(|&len| Length { bytes: len as u64, pending: None }).collect();
        for event in trace.events.iter() {
            if let Event::Length(index, len_bytes) = event {
                lens[*index] = lens[*index].max(usize::try_from(*len_bytes).expect("it was mapped"));
            }
        }
        // Blocks are recorded whole, also the last one.
        let backings = trace.beginnings.iter().zip(lens);
        let bytes =
            backings.map(|(beginning, len)| beginning.media.to_vec(len.next_multiple_of(BLOCK_BYTES))).collect();
        Self {
            options: trace.beginnings.iter().map(|beginning| beginning.options).collect(),
            media: Media { bytes, hash: 0 },
            cells: BTreeMap::new(),
            lengths,
            clean_pages: BTreeSet::new(),
        }
    }

    /// Applies an event; whether it marked or committed anything.
    pub(super) fn apply(&mut self, event: &Event) -> bool {
        match event {
            Event::Store { call, offset, bytes, punched } => self.store(*call, *offset, bytes, *punched),
            Event::Touched(range) => self.make_dirty(range),
            Event::Flush(range, thread) | Event::Streamed(range, thread) if self.has_lines(range) => {
                self.mark(range, *thread)
            }
            Event::Flush(range, _) => self.commit_pages(range),
            Event::Streamed(..) | Event::Blocks(..) => false,
            Event::Drain(thread) => self.commit_marked(*thread),
            Event::Sync(index, thread) => {
                let range = first_address(*index)..first_address(index + 1);
                let committed = if self.has_lines(&range) {
                    self.mark_for_sync(&range, *thread) | self.commit_marked(*thread)
                } else {
                    self.commit_pages(&range)
                };
                self.commit_length(*index) | committed
            }
            Event::Failed(range) => self.make_clean(range),
            Event::Length(index, len_bytes) => {
                self.lengths[*index].pending = Some(*len_bytes);
                true
            }
            Event::Killed(evicted) => self.forget(*evicted),
        }
    }

    /// Whether the backing of these addresses has cache-line granularity.
    fn has_lines(&self, range: &Range<u64>) -> bool {
        self.options[place_of(range.start).0].granularity == Granularity::CacheLine
    }

    fn cell_bytes(&self, address: u64) -> u64 {
        self.options[place_of(address).0].cell_bytes()
    }

    /// After a failed flush: what is pending there stays so, whoever flushes.
    fn make_clean(&mut self, range: &Range<u64>) -> bool {
        if !self.has_lines(range) {
            let pages = self.cells.range(widened(range, PAGE_BYTES)).map(|(&cell, _)| cell - cell % PAGE_BYTES);
            self.clean_pages.extend(pages);
        }
        true
    }

    fn make_dirty(&mut self, range: &Range<u64>) -> bool {
        let pages = widened(range, PAGE_BYTES);
        self.clean_pages.retain(|page| !pages.contains(page));
        false
    }

    /// The process is dead: nobody fences what it has marked. `evicted`: clean pages are read from the media again.
    fn forget(&mut self, evicted: bool) -> bool {
        for cell in self.cells.values_mut() {
            cell.marks.clear();
            cell.orphans = cell.pieces.len();
        }
        if evicted {
            let clean = std::mem::take(&mut self.clean_pages);
            self.cells.retain(|cell, _| !clean.contains(&(cell - cell % PAGE_BYTES)));
        }
        true
    }

    /// The cells with pending stores, in the order of [`Self::choices`].
    pub(super) fn pending_cells(&self) -> Vec<u64> {
        self.cells.keys().copied().collect()
    }

    /// The cells that a barrier would mark or commit now.
    pub(super) fn cells_of(&self, event: &Event) -> Vec<u64> {
        match event {
            Event::Flush(range, _) => {
                let unit_bytes = if self.has_lines(range) { self.cell_bytes(range.start) } else { PAGE_BYTES };
                self.cells.range(widened(range, unit_bytes)).map(|(&cell, _)| cell).collect()
            }
            Event::Drain(thread) => {
                let marked = self.cells.iter().filter(|(_, cell)| cell.marked_by(*thread) > 0);
                marked.map(|(&cell, _)| cell).collect()
            }
            _ => self.pending_cells(),
        }
    }

    fn store(&mut self, call: u64, offset: u64, bytes: &[u8; BLOCK_BYTES], punched: bool) -> bool {
        let torn_bytes = self.options[place_of(offset).0].torn_bytes;
        self.clean_pages.remove(&(offset - offset % PAGE_BYTES));
        let piece_bytes = usize::try_from(torn_bytes).map_or(BLOCK_BYTES, |torn| torn.min(BLOCK_BYTES));
        let cell = self.cells.entry(offset - offset % self.cell_bytes(offset)).or_default();
        for (part, offset) in bytes.chunks_exact(piece_bytes).zip((offset..).step_by(piece_bytes)) {
            let mut bytes = [0; BLOCK_BYTES];
            bytes[..piece_bytes].copy_from_slice(part);
            let group = (call, offset / torn_bytes);
            cell.pieces.push(Piece { offset, len_bytes: piece_bytes, bytes, group, punched });
        }
        true
    }

    fn mark(&mut self, range: &Range<u64>, thread: Thread) -> bool {
        let cells = widened(range, self.cell_bytes(range.start));
        let mut marked = false;
        for cell in self.cells.range_mut(cells).map(|(_, cell)| cell) {
            let stored = cell.pieces.iter().rposition(|piece| !piece.punched).map_or(0, |last| last + 1);
            marked |= cell.mark(thread, stored);
        }
        marked
    }

    /// A sync makes holes durable, and what was stored to their cells before; and what dead processes have stored, because
    /// the kernel writes back the pages that it knows to be dirty.
    fn mark_for_sync(&mut self, range: &Range<u64>, thread: Thread) -> bool {
        let mut marked = false;
        for (_, cell) in self.cells.range_mut(range.clone()) {
            let punched = cell.pieces.iter().rposition(|piece| piece.punched).map_or(0, |last| last + 1);
            marked |= cell.mark(thread, punched.max(cell.orphans));
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

    fn commit_pages(&mut self, range: &Range<u64>) -> bool {
        let cells: Vec<_> = self.cells.range(widened(range, PAGE_BYTES)).map(|(&cell, _)| cell).collect();
        let mut committed = false;
        for address in cells {
            if self.clean_pages.contains(&(address - address % PAGE_BYTES)) {
                continue;
            }
            let mut cell = self.cells.remove(&address).expect("it was found");
            let count = cell.pieces.len();
            for piece in cell.take(count) {
                self.media.store(&piece);
                committed = true;
            }
        }
        committed
    }

    fn commit_length(&mut self, index: usize) -> bool {
        let length = &mut self.lengths[index];
        let pending = length.pending.take();
        length.bytes = pending.unwrap_or(length.bytes);
        pending.is_some()
    }

    /// What a power cut now decides: for each cell with pending stores where its list can be cut, and behind those, for
    /// each backing that has become longer, whether the new length is there.
    pub(super) fn choices(&self) -> Vec<Vec<usize>> {
        let mut choices: Vec<_> = self.cells.values().map(Cell::cuts).collect();
        choices.extend(self.lengths.iter().filter_map(|length| length.pending).map(|_| vec![0, 1]));
        choices
    }

    /// Calls `look` with the hash and the bytes of the media that a power cut leaves when it cuts as `cuts` says. The
    /// media are as before afterwards.
    pub(super) fn with_cut<R>(&mut self, cuts: &[usize], look: impl FnOnce(u64, &[&[u8]]) -> R) -> R {
        let mut undo = Vec::new();
        for (cell, &cut) in self.cells.values().zip(cuts) {
            for piece in &cell.pieces[..cut] {
                undo.push(self.media.store(piece));
            }
        }
        let mut grown = cuts.iter().skip(self.cells.len());
        let mut hash = self.media.hash;
        let mut media = Vec::new();
        for (bytes, length) in self.media.bytes.iter().zip(&self.lengths) {
            let pending = length.pending.filter(|_| grown.next() == Some(&1));
            let len_bytes = pending.unwrap_or(length.bytes);
            hash = hash.rotate_left(7) ^ mix(len_bytes);
            media.push(&bytes[..usize::try_from(len_bytes).expect("it was mapped")]);
        }
        let result = look(hash, &media);
        for piece in undo.iter().rev() {
            self.media.store(piece);
        }
        result
    }
}

/// `range` widened to multiples of `unit_bytes`.
fn widened(range: &Range<u64>, unit_bytes: u64) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start - range.start % unit_bytes..range.end.next_multiple_of(unit_bytes)
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
        Event::Sync(..) => Some(BarrierKind::Sync),
        Event::Store { .. }
        | Event::Touched(_)
        | Event::Blocks(..)
        | Event::Failed(_)
        | Event::Streamed(..)
        | Event::Length(..)
        | Event::Killed(_) => None,
    }
}

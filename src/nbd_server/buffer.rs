//! Request and reply memory of connections: small buffers that a connection always has, large ones from a pool.
//!
//! Guards: the large buffers of all connections together, with the socket buffers that the kernel was asked to enlarge for
//! them, never exceed the configured budget; when it is used up, a connection goes on with its small buffers, so nobody
//! waits for another client's memory. A connection gets large buffers when small ones were not enough, and gives them back
//! when they were for a while. Buffers hold plaintext of earlier requests: they are pages that are not dumped, and locked
//! where the limit allows it; what was used of one is wiped when it is given back; [`ReplyBuffer`] exposes only what was
//! written since it was last emptied. What the kernel's sockets hold is the kernel's, until the client has read it.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::fair::{Party, Turn};
use super::limits::{Limits, RECEIVE_BUFFER_BYTES, REPLY_BUFFER_BYTES, SMALL_BUFFER_BYTES};
use crate::secret::{self, SecretBytes};

/// Alignment that payloads get when they can, in bytes.
const PAYLOAD_ALIGNMENT: usize = 64;
/// Bytes of large buffers that stay allocated while nobody uses them.
const KEPT_BYTES_MAX: usize = 32 << 20;
/// Small buffers that stay allocated while nobody uses them.
const KEPT_SMALL_MAX: usize = 64;

/// Memory of a buffer, and how much of it has been used since it was wiped.
#[derive(Debug)]
struct Memory {
    bytes: SecretBytes,
    used: usize,
}

impl Memory {
    fn new(len_bytes: usize, locked: bool) -> Self {
        Self { bytes: SecretBytes::for_data(len_bytes, locked), used: 0 }
    }

    fn wipe(&mut self) {
        let used = &mut self.bytes[..self.used];
        // Not byte by byte as for keys: data is large. It stays allocated, so these stores are never thought useless.
        used.fill(0);
        std::hint::black_box(used);
        self.used = 0;
    }
}

impl Memory {
    /// Wipes all but the bytes of `kept`, which were used.
    fn wipe_around(&mut self, kept: Range<usize>) {
        self.bytes[..kept.start].fill(0);
        let behind = kept.end.min(self.used);
        self.bytes[behind..self.used].fill(0);
        std::hint::black_box(&mut self.bytes);
        self.used = if kept.is_empty() { 0 } else { kept.end };
    }
}

/// Storage for one connection: for what it receives and for what it replies.
#[derive(Debug)]
struct Storage {
    receive: Memory,
    reply: Memory,
}

impl Storage {
    fn large(locked: bool) -> Self {
        Self { receive: Memory::new(RECEIVE_BUFFER_BYTES, locked), reply: Memory::new(REPLY_BUFFER_BYTES, locked) }
    }

    fn small(locked: bool) -> Self {
        Self { receive: Memory::new(SMALL_BUFFER_BYTES, locked), reply: Memory::new(SMALL_BUFFER_BYTES, locked) }
    }

    const fn large_bytes() -> usize {
        RECEIVE_BUFFER_BYTES + REPLY_BUFFER_BYTES
    }

    fn wiped(mut self) -> Self {
        self.receive.wipe();
        self.reply.wipe();
        self
    }
}

/// The buffers of all connections.
#[derive(Debug)]
pub(super) struct BufferPool {
    lent_bytes_max: AtomicUsize,
    locked: bool,
    state: Mutex<PoolState>,
}

#[derive(Debug, Default)]
struct PoolState {
    lent_bytes: usize,
    large: Vec<Storage>,
    small: Vec<Storage>,
}

/// What a loan takes from the budget.
#[derive(Debug)]
struct Loan {
    /// Who has it.
    party: Arc<Party>,
    bytes: usize,
    /// Whether the socket's own buffers may be enlarged.
    sockets: bool,
}

impl BufferPool {
    pub(super) fn new(limits: &Limits) -> Self {
        let small = limits.connections_max.saturating_mul(2 * SMALL_BUFFER_BYTES);
        let locked = secret::data_may_be_locked(limits.buffer_bytes_max.saturating_add(small));
        Self { lent_bytes_max: limits.buffer_bytes_max.into(), locked, state: Mutex::default() }
    }

    /// Another budget from now on; what is lent above it comes back by itself.
    pub(super) fn set_budget(&self, lent_bytes_max: usize) {
        self.lent_bytes_max.store(lent_bytes_max, Ordering::Relaxed);
    }

    /// Large storage, with the right to `socket_bytes` of the kernel's if there is budget for them too, or nothing.
    fn lend(&self, socket_bytes: usize, turn: &Turn) -> Option<(Loan, Storage)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self.lent_bytes_max.load(Ordering::Relaxed).saturating_sub(state.lent_bytes);
        let with_sockets = Storage::large_bytes().saturating_add(socket_bytes);
        let (bytes, sockets) = match left {
            _ if !turn.may_borrow(&turn.party.lent_bytes, left) => return None,
            _ if left >= with_sockets => (with_sockets, true),
            _ if left >= Storage::large_bytes() => (Storage::large_bytes(), false),
            _ => return None,
        };
        let loan = Loan { party: Arc::clone(&turn.party), bytes, sockets };
        loan.party.lent_bytes.fetch_add(bytes, Ordering::Relaxed);
        state.lent_bytes += loan.bytes;
        let kept = state.large.pop();
        drop(state);
        Some((loan, kept.unwrap_or_else(|| Storage::large(self.locked))))
    }

    fn give_back(&self, loan: &Loan, storage: Storage) {
        let storage = storage.wiped();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lent_bytes -= loan.bytes;
        loan.party.lent_bytes.fetch_sub(loan.bytes, Ordering::Relaxed);
        if (state.large.len() + 1) * Storage::large_bytes() <= KEPT_BYTES_MAX {
            state.large.push(storage);
        }
    }

    fn small(&self) -> Storage {
        let kept = self.state.lock().unwrap_or_else(PoisonError::into_inner).small.pop();
        kept.unwrap_or_else(|| Storage::small(self.locked))
    }

    fn give_back_small(&self, storage: Storage) {
        let storage = storage.wiped();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.small.len() < KEPT_SMALL_MAX {
            state.small.push(storage);
        }
    }

    fn left_bytes(&self) -> usize {
        self.lent_bytes_max.load(Ordering::Relaxed).saturating_sub(self.lent_bytes())
    }

    /// Bytes that are lent now, the kernel's included.
    pub(super) fn lent_bytes(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).lent_bytes
    }
}

/// The two buffers of a connection.
#[derive(Debug)]
pub(super) struct Buffers<'a> {
    pub(super) receive: ReceiveBuffer,
    pub(super) reply: ReplyBuffer,
    pool: &'a BufferPool,
    /// The small storage while the large one is in use.
    resting: Option<(Loan, Storage)>,
}

/// What changed with the buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Changed {
    /// Nothing.
    No,
    /// The memory alone.
    Memory,
    /// The memory, and the socket's own buffers may be changed likewise.
    MemoryAndSockets,
}

impl Changed {
    fn with(loan: &Loan) -> Self {
        if loan.sockets { Self::MemoryAndSockets } else { Self::Memory }
    }
}

impl<'a> Buffers<'a> {
    pub(super) fn small(pool: &'a BufferPool) -> Self {
        let Storage { receive, reply } = pool.small();
        let receive = ReceiveBuffer { memory: receive, start: 0, end: 0 };
        Self { receive, reply: ReplyBuffer { memory: reply, filled: 0 }, pool, resting: None }
    }

    pub(super) fn are_large(&self) -> bool {
        self.resting.is_some()
    }

    /// Changes to large buffers if the budget allows it. What they hold comes along.
    pub(super) fn enlarge(&mut self, socket_bytes: usize, turn: &Turn) -> Changed {
        if self.resting.is_some() || self.receive.unread().len() > SMALL_BUFFER_BYTES {
            return Changed::No;
        }
        let Some((loan, large)) = self.pool.lend(socket_bytes, turn) else { return Changed::No };
        let changed = Changed::with(&loan);
        self.resting = Some((loan, self.exchange(large)));
        changed
    }

    /// Whether its client has clearly more of the pool than is left for others, so that these go back.
    pub(super) fn are_too_many(&self, turn: &Turn) -> bool {
        self.resting.as_ref().is_some_and(|(loan, _)| {
            let left = self.pool.left_bytes().saturating_add(2 * loan.bytes);
            !turn.may_borrow(&loan.party.lent_bytes, left)
        })
    }

    /// Returns the large buffers if what they hold fits the small ones, where it then is.
    pub(super) fn rest(&mut self) -> Changed {
        let fits = self.receive.unread().len() <= SMALL_BUFFER_BYTES && self.reply.filled <= SMALL_BUFFER_BYTES;
        let Some((loan, small)) = self.resting.take_if(|_| fits) else { return Changed::No };
        let large = self.exchange(small);
        self.pool.give_back(&loan, large);
        Changed::with(&loan)
    }

    /// Wipes everything but what is unread and what waits to be sent.
    pub(super) fn wipe_spent(&mut self) {
        let ReceiveBuffer { memory, start, end } = &mut self.receive;
        memory.wipe_around(*start..*end);
        self.reply.memory.wipe_around(0..self.reply.filled);
        if let Some((_, small)) = &mut self.resting {
            small.receive.wipe();
            small.reply.wipe();
        }
    }

    fn exchange(&mut self, storage: Storage) -> Storage {
        let receive = self.receive.exchange(storage.receive);
        Storage { receive, reply: self.reply.exchange(storage.reply) }
    }
}

impl Drop for Buffers<'_> {
    fn drop(&mut self) {
        let nothing = || Memory { bytes: SecretBytes::for_data(0, false), used: 0 };
        let mut take = || {
            let receive = std::mem::replace(&mut self.receive.memory, nothing());
            Storage { receive, reply: std::mem::replace(&mut self.reply.memory, nothing()) }
        };
        match self.resting.take() {
            None => self.pool.give_back_small(take()),
            Some((loan, small)) => {
                self.pool.give_back(&loan, take());
                self.pool.give_back_small(small);
            }
        }
    }
}

/// Bytes received and not processed yet.
#[derive(Debug)]
pub(super) struct ReceiveBuffer {
    memory: Memory,
    start: usize,
    end: usize,
}

impl ReceiveBuffer {
    #[inline]
    pub(super) fn unread(&self) -> &[u8] {
        &self.memory.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, len_bytes: usize) {
        debug_assert!(len_bytes <= self.end - self.start);
        self.start += len_bytes;
    }

    /// Room for more, after the unread bytes. These are moved so that the byte `lead_bytes` after the first unread one
    /// is aligned: that is where a payload begins. Empty only if the buffer is full of unread bytes.
    pub(super) fn room(&mut self, lead_bytes: usize) -> &mut [u8] {
        // Pages are aligned better than payloads need to be.
        let wanted = PAYLOAD_ALIGNMENT.saturating_sub(lead_bytes % PAYLOAD_ALIGNMENT);
        let unread = self.end - self.start;
        let begin = if wanted + unread < self.memory.bytes.len() { wanted } else { 0 };
        if begin != self.start {
            self.memory.bytes.copy_within(self.start..self.end, begin);
            (self.start, self.end) = (begin, begin + unread);
            self.memory.used = self.memory.used.max(self.end);
        }
        &mut self.memory.bytes[self.end..]
    }

    /// Says that `len_bytes` of [`room`](Self::room) were received.
    pub(super) fn received(&mut self, len_bytes: usize) {
        self.end += len_bytes;
        self.memory.used = self.memory.used.max(self.end);
        debug_assert!(self.end <= self.memory.bytes.len());
    }

    /// Makes room for `len_bytes` unread bytes in total if there is none left.
    pub(super) fn reserve_if_full(&mut self, len_bytes: usize) {
        if self.end - self.start == self.memory.bytes.len() && self.memory.bytes.len() < len_bytes {
            let larger = Memory::new(len_bytes, false);
            let mut smaller = self.exchange(larger);
            smaller.wipe();
        }
    }

    /// Goes on in `memory`, which what is unread fits.
    fn exchange(&mut self, memory: Memory) -> Memory {
        let mut other = memory;
        let unread = self.end - self.start;
        other.bytes[..unread].copy_from_slice(self.unread());
        other.used = other.used.max(unread);
        (self.start, self.end) = (0, unread);
        std::mem::replace(&mut self.memory, other)
    }
}

/// Replies that have not been sent yet.
#[derive(Debug)]
pub(super) struct ReplyBuffer {
    memory: Memory,
    filled: usize,
}

impl ReplyBuffer {
    /// What waits to be sent.
    #[inline]
    pub(super) fn pending(&self) -> &[u8] {
        &self.memory.bytes[..self.filled]
    }

    pub(super) fn free_bytes(&self) -> usize {
        self.memory.bytes.len() - self.filled
    }

    pub(super) fn capacity_bytes(&self) -> usize {
        self.memory.bytes.len()
    }

    /// Appends bytes, for which there has to be room.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.grab(bytes.len()).copy_from_slice(bytes);
    }

    /// Appends `len_bytes` bytes that the caller overwrites, all of them, or takes back with [`truncate`](Self::truncate).
    pub(super) fn grab(&mut self, len_bytes: usize) -> &mut [u8] {
        let begin = self.filled;
        self.filled += len_bytes;
        self.memory.used = self.memory.used.max(self.filled);
        &mut self.memory.bytes[begin..self.filled]
    }

    /// Forgets what was appended after `len_bytes`.
    pub(super) fn truncate(&mut self, len_bytes: usize) {
        debug_assert!(len_bytes <= self.filled);
        self.filled = len_bytes;
    }

    /// Goes on in `memory`, which what is pending fits.
    fn exchange(&mut self, memory: Memory) -> Memory {
        let mut other = memory;
        other.bytes[..self.filled].copy_from_slice(self.pending());
        other.used = other.used.max(self.filled);
        std::mem::replace(&mut self.memory, other)
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::Identity;
    use super::super::fair::Fair;
    use super::*;

    fn pool(buffer_bytes_max: usize) -> BufferPool {
        BufferPool::new(&Limits { buffer_bytes_max, ..Limits::default() })
    }

    fn nobody() -> Turn {
        Arc::new(Fair::new()).join(Identity::Nobody)
    }

    #[test]
    fn whoever_has_the_whole_pool_leaves_half_of_it_when_somebody_else_comes() {
        let pool = pool(20 * Storage::large_bytes());
        let fair = Arc::new(Fair::new());
        let (greedy, mut all) = (fair.join(Identity::User(1)), Vec::new());
        for _ in 0..20 {
            let mut buffers = Buffers::small(&pool);
            buffers.enlarge(0, &greedy);
            all.push(buffers);
        }
        assert!(pool.left_bytes() == 0 && !all[0].are_too_many(&greedy), "it is alone");
        let other = fair.join(Identity::User(2));
        for buffers in &mut all {
            if buffers.are_too_many(&greedy) {
                buffers.rest();
            }
        }
        let of = |turn: &Turn| turn.party.lent_bytes.load(Ordering::Relaxed) / Storage::large_bytes();
        assert_eq!((of(&greedy), pool.left_bytes()), (10, 10 * Storage::large_bytes()));
        let mut more = Buffers::small(&pool);
        assert_eq!(more.enlarge(0, &greedy), Changed::No);
        assert_ne!(more.enlarge(0, &other), Changed::No);
        drop((all, more));
        assert_eq!((of(&greedy), of(&other), pool.lent_bytes()), (0, 0, 0));
    }

    #[test]
    fn the_pool_lends_its_budget_and_not_more() {
        let pool = pool(2 * Storage::large_bytes() + 1);
        let mut clients: Vec<_> = (0..3).map(|_| Buffers::small(&pool)).collect();
        for client in &mut clients {
            client.enlarge(0, &nobody());
        }
        assert_eq!(pool.lent_bytes(), 2 * Storage::large_bytes());
        assert_eq!(clients[2].reply.capacity_bytes(), SMALL_BUFFER_BYTES);
        clients[0].rest();
        clients[2].enlarge(0, &nobody());
        assert_eq!(clients[2].reply.capacity_bytes(), REPLY_BUFFER_BYTES);
        drop(clients);
        assert_eq!(pool.lent_bytes(), 0);
    }

    #[test]
    fn the_kernels_socket_buffers_count_and_are_the_first_to_go() {
        const SOCKETS: usize = 4 << 20;
        let pool = pool(2 * Storage::large_bytes() + SOCKETS);
        let mut clients: Vec<_> = (0..3).map(|_| Buffers::small(&pool)).collect();
        let changed: Vec<_> = clients.iter_mut().map(|client| client.enlarge(SOCKETS, &nobody())).collect();
        assert_eq!(changed, [Changed::MemoryAndSockets, Changed::Memory, Changed::No]);
        assert_eq!(pool.lent_bytes(), 2 * Storage::large_bytes() + SOCKETS);
        assert_eq!(clients[0].rest(), Changed::MemoryAndSockets);
        assert_eq!(pool.lent_bytes(), Storage::large_bytes());
    }

    #[test]
    fn what_buffers_hold_comes_along_and_leaves_no_copy() {
        let pool = pool(usize::MAX);
        let mut buffers = Buffers::small(&pool);
        buffers.reply.push(b"reply");
        buffers.receive.room(28)[..7].copy_from_slice(b"request");
        buffers.receive.received(7);
        for large in [true, false] {
            if large {
                buffers.enlarge(0, &nobody())
            } else {
                buffers.rest()
            };
            assert_eq!(buffers.are_large(), large);
            assert_eq!((buffers.reply.pending(), buffers.receive.unread()), (&b"reply"[..], &b"request"[..]));
        }
        let kept = pool.state.lock().unwrap();
        assert!(kept.large[0].reply.bytes.iter().chain(kept.large[0].receive.bytes.iter()).all(|byte| *byte == 0));
        drop(kept);
        drop(buffers);
        let kept = pool.state.lock().unwrap();
        assert!(kept.small[0].reply.bytes.iter().chain(kept.small[0].receive.bytes.iter()).all(|byte| *byte == 0));
    }

    #[test]
    fn more_than_small_buffers_hold_is_not_exchanged() {
        let pool = pool(usize::MAX);
        let mut buffers = Buffers::small(&pool);
        buffers.enlarge(0, &nobody());
        buffers.reply.grab(SMALL_BUFFER_BYTES + 1);
        assert_eq!(buffers.rest(), Changed::No);
        assert!(pool.lent_bytes() > 0 && buffers.are_large());
    }

    #[test]
    fn a_payload_behind_a_header_is_aligned() {
        let pool = pool(usize::MAX);
        let mut buffers = Buffers::small(&pool);
        let receive = &mut buffers.receive;
        for header_bytes in [28, 32] {
            let room = receive.room(header_bytes);
            assert_eq!(room[header_bytes..].as_ptr().align_offset(PAYLOAD_ALIGNMENT), 0);
            room[..40].fill(7);
            receive.received(40);
            receive.consume(header_bytes);
            receive.room(0);
            assert_eq!(receive.unread(), vec![7; 40 - header_bytes]);
            assert_eq!(receive.unread().as_ptr().align_offset(PAYLOAD_ALIGNMENT), 0);
            receive.consume(40 - header_bytes);
        }
    }

    #[test]
    fn a_full_buffer_of_unread_bytes_is_kept() {
        let pool = pool(0);
        let mut buffers = Buffers::small(&pool);
        let receive = &mut buffers.receive;
        let mut total = 0;
        loop {
            let room = receive.room(28).len();
            if room == 0 {
                break;
            }
            receive.room(28).fill(9);
            receive.received(room);
            total += room;
        }
        assert_eq!(total, SMALL_BUFFER_BYTES);
        receive.reserve_if_full(total + 1);
        assert!(!receive.room(28).is_empty());
        assert_eq!(receive.unread(), vec![9; total]);
    }
}

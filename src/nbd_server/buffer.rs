//! Request and reply memory of connections: small buffers that a connection always has, large ones from a pool.
//!
//! Guards: the large buffers of all connections together never exceed the configured budget; when it is used up, a
//! connection goes on with its small buffers, so nobody waits for another client's memory. Buffers hold plaintext
//! of earlier requests; [`ReplyBuffer`] therefore exposes only what was written since it was last emptied.

use std::sync::{Mutex, PoisonError};

use super::limits::{RECEIVE_BUFFER_BYTES, REPLY_BUFFER_BYTES, SMALL_BUFFER_BYTES};

/// Alignment that payloads get when they can, in bytes.
const PAYLOAD_ALIGNMENT: usize = 64;
/// Bytes of large buffers that stay allocated while nobody uses them.
const KEPT_BYTES_MAX: usize = 32 << 20;

/// Storage for one connection: for what it receives and for what it replies.
#[derive(Debug)]
pub(super) struct Storage {
    receive: Vec<u8>,
    reply: Vec<u8>,
}

impl Storage {
    fn large() -> Self {
        Self { receive: vec![0; RECEIVE_BUFFER_BYTES], reply: vec![0; REPLY_BUFFER_BYTES] }
    }

    fn bytes() -> usize {
        RECEIVE_BUFFER_BYTES + REPLY_BUFFER_BYTES
    }
}

/// The large buffers of all connections.
#[derive(Debug)]
pub(super) struct BufferPool {
    lent_max: usize,
    state: Mutex<PoolState>,
}

#[derive(Debug, Default)]
struct PoolState {
    lent: usize,
    free: Vec<Storage>,
}

impl BufferPool {
    pub(super) fn new(buffer_bytes_max: usize) -> Self {
        Self { lent_max: buffer_bytes_max / Storage::bytes(), state: Mutex::default() }
    }

    /// Large storage, or nothing when the budget is used up. It has to come back through [`give_back`](Self::give_back).
    pub(super) fn lend(&self) -> Option<Storage> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.lent == self.lent_max {
            return None;
        }
        state.lent += 1;
        let kept = state.free.pop();
        drop(state);
        Some(kept.unwrap_or_else(Storage::large))
    }

    pub(super) fn give_back(&self, storage: Storage) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lent -= 1;
        if (state.free.len() + 1) * Storage::bytes() <= KEPT_BYTES_MAX {
            state.free.push(storage);
        }
    }

    /// Bytes that are lent now.
    pub(super) fn lent_bytes(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).lent * Storage::bytes()
    }
}

/// The two buffers of a connection. They are exchanged between small and large only while both are empty.
#[derive(Debug)]
pub(super) struct Buffers<'a> {
    pub(super) receive: ReceiveBuffer,
    pub(super) reply: ReplyBuffer,
    pool: &'a BufferPool,
    /// The small storage while the large one is in use.
    resting: Option<Storage>,
}

impl<'a> Buffers<'a> {
    pub(super) fn small(pool: &'a BufferPool) -> Self {
        let receive = ReceiveBuffer { bytes: vec![0; SMALL_BUFFER_BYTES], start: 0, end: 0 };
        let reply = ReplyBuffer { bytes: vec![0; SMALL_BUFFER_BYTES], filled: 0 };
        Self { receive, reply, pool, resting: None }
    }

    fn is_empty(&self) -> bool {
        self.receive.unread().is_empty() && self.reply.pending().is_empty()
    }

    /// Changes to large buffers if nothing is buffered and the budget allows it.
    pub(super) fn enlarge(&mut self) {
        if self.resting.is_none()
            && self.is_empty()
            && let Some(large) = self.pool.lend()
        {
            self.resting = Some(self.exchange(large));
        }
    }

    /// Returns the large buffers if nothing is buffered.
    pub(super) fn rest(&mut self) {
        if self.is_empty()
            && let Some(small) = self.resting.take()
        {
            let large = self.exchange(small);
            self.pool.give_back(large);
        }
    }

    fn exchange(&mut self, storage: Storage) -> Storage {
        let receive = std::mem::replace(&mut self.receive, ReceiveBuffer { bytes: storage.receive, start: 0, end: 0 });
        let reply = std::mem::replace(&mut self.reply, ReplyBuffer { bytes: storage.reply, filled: 0 });
        Storage { receive: receive.bytes, reply: reply.bytes }
    }
}

impl Drop for Buffers<'_> {
    fn drop(&mut self) {
        if let Some(small) = self.resting.take() {
            let large = self.exchange(small);
            self.pool.give_back(large);
        }
    }
}

/// Bytes received and not processed yet.
#[derive(Debug)]
pub(super) struct ReceiveBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl ReceiveBuffer {
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, len_bytes: usize) {
        debug_assert!(len_bytes <= self.end - self.start);
        self.start += len_bytes;
    }

    /// Room for more, after the unread bytes. These are moved so that the byte `lead_bytes` after the first unread one
    /// is aligned: that is where a payload begins. Empty only if the buffer is full of unread bytes.
    pub(super) fn room(&mut self, lead_bytes: usize) -> &mut [u8] {
        let aligned = self.bytes.as_ptr().align_offset(PAYLOAD_ALIGNMENT);
        let wanted = (aligned + PAYLOAD_ALIGNMENT).saturating_sub(lead_bytes % PAYLOAD_ALIGNMENT);
        let unread = self.end - self.start;
        let begin = if wanted + unread < self.bytes.len() { wanted } else { 0 };
        if begin != self.start {
            self.bytes.copy_within(self.start..self.end, begin);
            (self.start, self.end) = (begin, begin + unread);
        }
        &mut self.bytes[self.end..]
    }

    /// Says that `len_bytes` of [`room`](Self::room) were received.
    pub(super) fn received(&mut self, len_bytes: usize) {
        self.end += len_bytes;
        debug_assert!(self.end <= self.bytes.len());
    }

    /// Makes room for `len_bytes` unread bytes in total if there is none left.
    pub(super) fn reserve_if_full(&mut self, len_bytes: usize) {
        if self.end - self.start == self.bytes.len() && self.bytes.len() < len_bytes {
            self.bytes.resize(len_bytes, 0);
        }
    }
}

/// Replies that have not been sent yet.
#[derive(Debug)]
pub(super) struct ReplyBuffer {
    bytes: Vec<u8>,
    filled: usize,
}

impl ReplyBuffer {
    /// What waits to be sent.
    pub(super) fn pending(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    pub(super) fn free_bytes(&self) -> usize {
        self.bytes.len() - self.filled
    }

    pub(super) fn capacity_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Appends bytes, for which there has to be room.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.grab(bytes.len()).copy_from_slice(bytes);
    }

    /// Appends `len_bytes` bytes that the caller overwrites, all of them, or takes back with [`truncate`](Self::truncate).
    pub(super) fn grab(&mut self, len_bytes: usize) -> &mut [u8] {
        let begin = self.filled;
        self.filled += len_bytes;
        &mut self.bytes[begin..self.filled]
    }

    /// Forgets what was appended after `len_bytes`.
    pub(super) fn truncate(&mut self, len_bytes: usize) {
        debug_assert!(len_bytes <= self.filled);
        self.filled = len_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_lends_its_budget_and_not_more() {
        let pool = BufferPool::new(2 * Storage::bytes() + 1);
        let mut clients: Vec<_> = (0..3).map(|_| Buffers::small(&pool)).collect();
        clients.iter_mut().for_each(Buffers::enlarge);
        assert_eq!(pool.lent_bytes(), 2 * Storage::bytes());
        assert_eq!(clients[2].reply.capacity_bytes(), SMALL_BUFFER_BYTES);
        clients[0].rest();
        clients[2].enlarge();
        assert_eq!(clients[2].reply.capacity_bytes(), REPLY_BUFFER_BYTES);
        drop(clients);
        assert_eq!(pool.lent_bytes(), 0);
    }

    #[test]
    fn buffers_in_use_are_not_exchanged() {
        let pool = BufferPool::new(usize::MAX);
        let mut buffers = Buffers::small(&pool);
        buffers.reply.push(b"reply");
        buffers.enlarge();
        assert_eq!(buffers.reply.pending(), b"reply");
        assert_eq!(pool.lent_bytes(), 0);
    }

    #[test]
    fn a_payload_behind_a_header_is_aligned() {
        let pool = BufferPool::new(usize::MAX);
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
        let pool = BufferPool::new(0);
        let mut receive = Buffers::small(&pool).receive_for_test();
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

    impl Buffers<'_> {
        fn receive_for_test(&mut self) -> ReceiveBuffer {
            std::mem::replace(&mut self.receive, ReceiveBuffer { bytes: Vec::new(), start: 0, end: 0 })
        }
    }
}

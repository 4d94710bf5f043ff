//! Requests that may take long, beside the thread of their connection: that one goes on with other requests meanwhile.
//!
//! ```text
//!  connection --Job--> Workers --Finished--> Outbox --bell--> connection --> reply
//! ```
//!
//! Guards: only the connection's own thread sends, so nothing here knows sockets' bytes or TLS; a job always finishes, even
//! when the export panics; work on a long range goes slice by slice, and ends between two slices when the server is about
//! to stop or the client has left. The order of replies is not that of requests, which the protocol leaves to the server;
//! what a flush has to cover was answered before it was received, so it was done before it began.

use std::collections::VecDeque;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::export::{Durability, Export, ExportError, Hole};
use super::fair::Turn;
use super::limits::{PERSIST_SLICE_BYTES, SLICE_BYTES, SLOW_THREADS_MAX};
use super::shared::{Client, Shared};
use super::transmission::Replies;
use super::wire::RequestHeader;
use crate::spawn::without_signals;

/// Stack of a thread, in bytes.
const STACK_BYTES: usize = 256 << 10;
/// How long a thread without work stays.
const IDLE_WAIT: Duration = Duration::from_secs(10);

/// What may take long. Offsets and lengths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Flush,
    Persist { offset: u64, len_bytes: u64 },
    Zeroes { offset: u64, len_bytes: u64, hole: Hole, durability: Durability },
    Discard { offset: u64, len_bytes: u64, durability: Durability },
    Prefetch { offset: u64, len_bytes: u64 },
}

impl Work {
    /// The same when an unknown part of it was done already.
    pub(super) const fn again(self) -> Self {
        match self {
            // Something may have been changed, so it is too late to say that it cannot be done fast.
            Self::Zeroes { offset, len_bytes, hole: Hole::Required, durability } => {
                Self::Zeroes { offset, len_bytes, hole: Hole::Allowed, durability }
            }
            other => other,
        }
    }

    /// Does it, for `client`. What waits for a device is not work that takes turns, but slices are.
    pub(super) fn run(
        self,
        export: &dyn Export,
        client: &Client,
        shared: &Shared,
        turn: &mut Turn,
    ) -> Result<(), ExportError> {
        let goes_on = || !(shared.hurries() || client.has_left());
        if self == Self::Flush || matches!(self, Self::Persist { .. }) {
            turn.rest();
        }
        let (offset, len_bytes, durability) = match self {
            Self::Flush => return export.flush(),
            Self::Persist { offset, len_bytes } => (offset, len_bytes, Durability::Fua),
            Self::Zeroes { offset, len_bytes, hole, durability } => {
                in_slices(offset, len_bytes, SLICE_BYTES, &goes_on, turn, |at, len| {
                    match export.write_zeroes(at, len, hole) {
                        // Something has been changed, so it is too late to say that it cannot be done fast.
                        Err(ExportError::Unsupported) if hole == Hole::Required && at > offset => {
                            export.write_zeroes(at, len, Hole::Allowed)
                        }
                        done => done,
                    }
                })?;
                (offset, len_bytes, durability)
            }
            Self::Discard { offset, len_bytes, durability } => {
                in_slices(offset, len_bytes, SLICE_BYTES, &goes_on, turn, |at, len| export.discard(at, len))?;
                (offset, len_bytes, durability)
            }
            Self::Prefetch { offset, len_bytes } => {
                return in_slices(offset, len_bytes, SLICE_BYTES, &goes_on, turn, |at, len| export.prefetch(at, len));
            }
        };
        turn.rest();
        match durability {
            Durability::Cached => Ok(()),
            // One wait for the device for whatever fits a request; more only for what no payload could bring.
            Durability::Fua if len_bytes <= PERSIST_SLICE_BYTES => export.persist(offset, len_bytes),
            Durability::Fua => slices(offset, len_bytes, PERSIST_SLICE_BYTES).try_for_each(|(at, len)| {
                if at > offset && !goes_on() { Err(ExportError::ShuttingDown) } else { export.persist(at, len) }
            }),
        }
    }
}

/// Does a range piece by piece, as long as it goes on.
fn in_slices(
    offset: u64,
    len_bytes: u64,
    slice_bytes: u64,
    goes_on: &dyn Fn() -> bool,
    turn: &mut Turn,
    mut run: impl FnMut(u64, u64) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    for (at, len) in slices(offset, len_bytes, slice_bytes) {
        if at > offset && !goes_on() {
            return Err(ExportError::ShuttingDown);
        }
        turn.work();
        run(at, len)?;
        turn.moved(len);
    }
    Ok(())
}

/// Cuts a range at multiples of `slice_bytes`: pairs of offset and length.
fn slices(offset: u64, len_bytes: u64, slice_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len_bytes;
    let cut = move |at: u64| end.min((at / slice_bytes + 1) * slice_bytes);
    std::iter::successors((offset < end).then_some(offset), move |at| Some(cut(*at)).filter(|next| *next < end))
        .map(move |at| (at, cut(at) - at))
}

/// A request that has ended.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) work: Work,
    pub(super) header: RequestHeader,
    pub(super) replies: Replies,
    pub(super) start: Instant,
    pub(super) result: Result<(), ExportError>,
}

/// What a connection has given away, and what has come back.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    finished: Mutex<Vec<Finished>>,
    /// Length of `finished`, for a look without the lock.
    count: AtomicUsize,
}

impl Outbox {
    fn put(&self, finished: Finished) {
        let mut all = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(finished);
        self.count.store(all.len(), Ordering::Release);
    }

    fn take(&self) -> Vec<Finished> {
        let mut all = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        self.count.store(0, Ordering::Relaxed);
        std::mem::take(&mut *all)
    }
}

/// The requests of one connection that run beside it.
#[derive(Debug, Default)]
pub(super) struct Slow {
    outbox: Arc<Outbox>,
    in_flight: usize,
}

impl Slow {
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether something has ended.
    pub(super) fn any_finished(&self) -> bool {
        self.in_flight > 0 && self.outbox.count.load(Ordering::Acquire) > 0
    }

    /// What has ended.
    pub(super) fn take_finished(&mut self) -> Vec<Finished> {
        let finished = self.outbox.take();
        self.in_flight -= finished.len();
        finished
    }

    /// Gives work away; `false` when nobody takes it.
    pub(super) fn give_away(
        &mut self,
        work: Work,
        (header, replies, start): (RequestHeader, Replies, Instant),
        export: Arc<dyn Export>,
        (client, shared, turn_of): (&Arc<Client>, &Arc<Shared>, &Turn),
    ) -> bool {
        let outbox = Arc::clone(&self.outbox);
        let (client, for_job) = (Arc::clone(client), Arc::clone(shared));
        let mut turn = turn_of.another();
        let job = move || {
            let run = AssertUnwindSafe(|| work.run(export.as_ref(), &client, &for_job, &mut turn));
            let result = std::panic::catch_unwind(run).unwrap_or_else(|_| {
                tracing::error!(?work, "a request panicked");
                Err(ExportError::Io(io::Error::other("a request panicked")))
            });
            // Nothing of the export is held when its connection is told, and no share of anything.
            turn.party.slow_threads.fetch_sub(1, Ordering::Relaxed);
            drop((export, for_job, turn));
            outbox.put(Finished { work, header, replies, start, result });
            client.bell.ring();
        };
        let own = &turn_of.party.slow_threads;
        let may = |left| {
            let may = turn_of.may_borrow(own, left);
            own.fetch_add(usize::from(may), Ordering::Relaxed);
            may
        };
        let taken = shared.workers.take_on(Box::new(job), may);
        self.in_flight += usize::from(taken);
        taken
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that come when there is work and go when there is none.
#[derive(Clone, Default)]
pub(super) struct Workers(Arc<Crew>);

#[derive(Default)]
struct Crew {
    state: Mutex<CrewState>,
    work: Condvar,
}

#[derive(Default)]
struct CrewState {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Threads that run something or are about to.
    busy: usize,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").finish_non_exhaustive()
    }
}

impl Crew {
    fn state(&self) -> MutexGuard<'_, CrewState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a thread.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.state();
                state.busy -= 1;
                continue;
            }
            state.idle += 1;
            let (again, waited) = self.work.wait_timeout(state, IDLE_WAIT).unwrap_or_else(PoisonError::into_inner);
            state = again;
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

impl Workers {
    /// Has a thread run `job` at once; `false` when every thread that may be is busy, or when it may not have one of those
    /// that are left.
    fn take_on(&self, job: Job, may: impl FnOnce(usize) -> bool) -> bool {
        let mut state = self.0.state();
        if !may(SLOW_THREADS_MAX - state.busy) {
            return false;
        }
        if state.idle > state.queue.len() {
            state.queue.push_back(job);
            state.busy += 1;
            drop(state);
            self.0.work.notify_one();
            return true;
        }
        if state.threads == SLOW_THREADS_MAX {
            return false;
        }
        let crew = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("daxcrypt-slow".into()).stack_size(STACK_BYTES);
        if without_signals(|| thread.spawn(move || crew.work())).is_err() {
            return false;
        }
        state.threads += 1;
        state.busy += 1;
        state.queue.push_back(job);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_the_range_and_are_cut_at_multiples() {
        for (offset, len) in [(0, 0), (5, 0), (0, 4), (3, 1), (3, 2), (1, 17), (8, 8), (u64::MAX >> 1, 9)] {
            let all: Vec<_> = slices(offset, len, 4).collect();
            assert_eq!(all.iter().map(|slice| slice.1).sum::<u64>(), len, "{all:?}");
            assert!(all.iter().skip(1).all(|slice| slice.0 % 4 == 0), "{all:?}");
            assert!(all.iter().all(|slice| (1..=4).contains(&slice.1)), "{all:?}");
            assert_eq!(all.first().map(|slice| slice.0), (len > 0).then_some(offset));
        }
    }

    #[test]
    fn there_are_so_many_threads_and_then_none() {
        let workers = Workers::default();
        let (gate, count) = (Arc::new((Mutex::new(false), Condvar::new())), Arc::new(AtomicUsize::new(0)));
        let job = || {
            let (gate, count) = (Arc::clone(&gate), Arc::clone(&count));
            Box::new(move || {
                let mut open = gate.0.lock().unwrap();
                while !*open {
                    open = gate.1.wait(open).unwrap();
                }
                count.fetch_add(1, Ordering::SeqCst);
            })
        };
        assert!(!workers.take_on(job(), |left| left < SLOW_THREADS_MAX), "it may not");
        assert!((0..SLOW_THREADS_MAX).all(|_| workers.take_on(job(), |_| true)));
        assert!(!workers.take_on(job(), |_| true), "one more than there may be");
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        let start = Instant::now();
        while count.load(Ordering::SeqCst) < SLOW_THREADS_MAX {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::yield_now();
        }
        assert_eq!(count.load(Ordering::SeqCst), SLOW_THREADS_MAX);
    }
}

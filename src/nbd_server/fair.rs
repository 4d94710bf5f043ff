//! Fairness between clients, without any limit being set.
//!
//! A party is one client with all of its connections ([`Identity`]). The rule: while several parties are at work, none has more
//! threads at work than any other may have, which is the processors divided by the parties, and at least one. The kernel's
//! scheduler gives every thread an equal share of the processors, and so every party, however many connections and requests it
//! has, and whether they are short or long. Of what is lent (threads for long requests, large buffers) a party gets more only
//! while it has less than what is left for the others.
//!
//! Guards: a party that is alone is never held up, and pays for one look at a flag; who waits for bytes, for room in a socket,
//! for a lock's end, for a limit or for a flush is not at work, so nobody's turn depends on a peer; threads of one party take
//! turns in the order in which they came, each for [`QUANTUM_BYTES`]. A page fault that waits for a disk is at work all the same:
//! with a backing that is no memory, parties that share it have fewer such waits at a time than one that is alone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::access::Identity;

/// How much a thread does before another one of its party has its turn, in bytes: about what it does in a slice of the kernel's
/// scheduler. Threads that take turns more often are woken more often, and a thread that was woken goes before one that works on.
const QUANTUM_BYTES: u64 = 8 << 20;
/// What a request counts for besides the bytes that it moves.
const REQUEST_BYTES: u64 = 16 << 10;
/// How long after its last work a party still has its share: longer than a client takes from a reply to its next request.
const ACTIVE: Duration = Duration::from_millis(10);
/// How long a count of the parties at work is good.
const COUNTED: Duration = Duration::from_millis(1);

/// What is shared fairly, and between whom.
#[derive(Debug)]
pub(super) struct Fair {
    processors: usize,
    /// There are several parties.
    crowded: AtomicBool,
    /// Parties that were at work when they were counted last, in nanoseconds since `start`.
    active: AtomicUsize,
    counted: AtomicU64,
    parties: Mutex<BTreeMap<Identity, Arc<Party>>>,
    start: Instant,
}

/// One client, with all of its connections.
#[derive(Debug)]
pub(super) struct Party {
    identity: Identity,
    /// Changed while the parties are locked.
    members: AtomicUsize,
    /// When it was at work last, in nanoseconds since the start of [`Fair`].
    seen: AtomicU64,
    /// Threads at work; changed while `waiting` is locked. Where threads wait, one is at work.
    at_work: AtomicUsize,
    waiting: Mutex<VecDeque<Arc<Waiter>>>,
    /// Threads that run requests of it beside its connections.
    pub(super) slow_threads: AtomicUsize,
    /// Large buffers that it has, in bytes.
    pub(super) lent_bytes: AtomicUsize,
}

#[derive(Debug)]
struct Waiter {
    granted: AtomicBool,
    thread: Thread,
}

impl Fair {
    pub(super) fn new() -> Self {
        Self::of(std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn of(processors: usize) -> Self {
        Self {
            processors,
            crowded: false.into(),
            active: 1.into(),
            counted: 0.into(),
            parties: Mutex::default(),
            start: Instant::now(),
        }
    }

    /// Takes a thread of a client in.
    pub(super) fn join(self: &Arc<Self>, identity: Identity) -> Turn {
        let mut parties = self.parties();
        let party = parties.entry(identity).or_insert_with_key(|identity| Arc::new(Party::new(identity.clone())));
        party.members.fetch_add(1, Ordering::Relaxed);
        let party = Arc::clone(party);
        self.crowded.store(parties.len() > 1, Ordering::Relaxed);
        drop(parties);
        Turn { fair: Arc::clone(self), party, held: false, quantum: 0, moved: 0 }
    }

    /// Whether there are several parties.
    #[inline]
    pub(super) fn is_crowded(&self) -> bool {
        self.crowded.load(Ordering::Relaxed)
    }

    fn parties(&self) -> MutexGuard<'_, BTreeMap<Identity, Arc<Party>>> {
        self.parties.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many threads of each party may be at work.
    fn share(&self) -> usize {
        match self.active.load(Ordering::Relaxed) {
            0 | 1 => usize::MAX,
            active => self.processors.div_ceil(active),
        }
    }

    /// The party is at work: the others make room at once if it has not been lately.
    fn note(&self, party: &Party) {
        let now = nanoseconds(self.start.elapsed());
        let seen = party.seen.swap(now, Ordering::Relaxed);
        let is_old = |at: u64, age: Duration| now.saturating_sub(at) > nanoseconds(age);
        if seen == 0 || is_old(seen, ACTIVE) || is_old(self.counted.load(Ordering::Relaxed), COUNTED) {
            self.count(now);
        }
    }

    fn count(&self, now: u64) {
        let is_active = |party: &&Arc<Party>| {
            let seen = party.seen.load(Ordering::Relaxed);
            let lately = seen > 0 && now.saturating_sub(seen) <= nanoseconds(ACTIVE);
            lately || party.at_work.load(Ordering::Relaxed) > 0
        };
        let active = self.parties().values().filter(is_active).count();
        self.active.store(active, Ordering::Relaxed);
        self.counted.store(now, Ordering::Relaxed);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}

impl Party {
    fn new(identity: Identity) -> Self {
        let none = AtomicUsize::default;
        Self {
            identity,
            members: none(),
            seen: 0.into(),
            at_work: none(),
            waiting: Mutex::default(),
            slow_threads: none(),
            lent_bytes: none(),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Arc<Waiter>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to work, when it is the thread's turn.
    fn enter(&self, fair: &Fair) {
        let mut waiting = self.waiting();
        let waiter = Arc::new(Waiter { granted: false.into(), thread: std::thread::current() });
        waiting.push_back(Arc::clone(&waiter));
        self.grant(&mut waiting, fair.share());
        drop(waiting);
        while !waiter.granted.load(Ordering::Acquire) {
            std::thread::park();
        }
    }

    fn leave(&self, fair: &Fair) {
        let mut waiting = self.waiting();
        self.at_work.fetch_sub(1, Ordering::Relaxed);
        self.grant(&mut waiting, fair.share());
    }

    fn grant(&self, waiting: &mut VecDeque<Arc<Waiter>>, share: usize) {
        while self.at_work.load(Ordering::Relaxed) < share {
            let Some(next) = waiting.pop_front() else { return };
            self.at_work.fetch_add(1, Ordering::Relaxed);
            next.granted.store(true, Ordering::Release);
            next.thread.unpark();
        }
    }

    /// Whether another thread is to have its turn.
    fn is_pressed(&self, share: usize) -> bool {
        self.at_work.load(Ordering::Relaxed) > share || !self.waiting().is_empty()
    }
}

/// What a thread needs to work for a party. Dropping it ends that.
#[derive(Debug)]
pub(super) struct Turn {
    fair: Arc<Fair>,
    pub(super) party: Arc<Party>,
    held: bool,
    /// What was done in this turn.
    quantum: u64,
    /// Bytes that were moved since somebody asked for that.
    moved: u64,
}

impl Turn {
    /// Another thread of the same party.
    pub(super) fn another(&self) -> Self {
        self.fair.join(self.party.identity.clone())
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.party.identity
    }

    /// Whether there are other parties.
    #[inline]
    pub(super) fn is_crowded(&self) -> bool {
        self.fair.is_crowded()
    }

    /// Whether the party may have more of what is lent: less than what is left for the others.
    pub(super) fn may_borrow(&self, own: &AtomicUsize, left: usize) -> bool {
        !self.is_crowded() || own.load(Ordering::Relaxed) < left
    }

    /// Whether the thread is counted as one that works.
    #[inline]
    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    /// Comes before work: waits for a turn, if there are other parties.
    #[inline]
    pub(super) fn work(&mut self) {
        if !self.held && self.is_crowded() {
            self.begin();
        }
    }

    #[cold]
    fn begin(&mut self) {
        self.fair.note(&self.party);
        self.party.enter(&self.fair);
        (self.held, self.quantum) = (true, 0);
    }

    /// Comes before everything that may wait for somebody else.
    #[inline]
    pub(super) fn rest(&mut self) {
        if std::mem::take(&mut self.held) {
            self.party.leave(&self.fair);
        }
    }

    /// So many bytes were moved, or a request was answered: another thread of the party has its turn now and then.
    #[inline]
    pub(super) fn moved(&mut self, len_bytes: u64) {
        self.moved += len_bytes;
        self.quantum += len_bytes + REQUEST_BYTES;
        if self.held && self.quantum >= QUANTUM_BYTES {
            self.renew();
        }
    }

    /// Bytes that were moved since this was asked last.
    pub(super) fn take_moved(&mut self) -> u64 {
        std::mem::take(&mut self.moved)
    }

    fn renew(&mut self) {
        self.quantum = 0;
        self.fair.note(&self.party);
        if self.party.is_pressed(self.fair.share()) {
            self.rest();
            self.work();
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.rest();
        let mut parties = self.fair.parties();
        if self.party.members.fetch_sub(1, Ordering::Relaxed) == 1 {
            parties.remove(&self.party.identity);
        }
        self.fair.crowded.store(parties.len() > 1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(fair: &Arc<Fair>, uid: u32) -> Turn {
        fair.join(Identity::User(uid))
    }

    fn at_work(turn: &Turn) -> usize {
        turn.party.at_work.load(Ordering::Relaxed)
    }

    #[test]
    fn a_party_that_is_alone_is_not_even_counted() {
        let fair = Arc::new(Fair::of(1));
        let mut turns: Vec<_> = (0..9).map(|_| user(&fair, 1)).collect();
        turns.iter_mut().for_each(Turn::work);
        assert!(turns.iter().all(|turn| !turn.is_held()));
        let other = user(&fair, 2);
        assert!(fair.is_crowded());
        drop(other);
        assert!(!fair.is_crowded());
        drop(turns);
        assert!(fair.parties().is_empty());
    }

    #[test]
    fn as_many_threads_work_for_each_party_as_there_are_processors_for_it() {
        for (processors, parties, share) in [(1, 2, 1), (2, 2, 1), (3, 2, 2), (8, 2, 4), (8, 3, 3), (2, 5, 1)] {
            let fair = Arc::new(Fair::of(processors));
            let mut all: Vec<_> = (0..parties).map(|uid| user(&fair, uid)).collect();
            all.iter_mut().for_each(Turn::work);
            assert_eq!(fair.share(), share, "{processors} processors, {parties} parties");
        }
    }

    #[test]
    fn threads_of_one_party_take_turns_while_another_one_works() {
        let fair = Arc::new(Fair::of(2));
        let (mut first, mut other) = (user(&fair, 1), user(&fair, 2));
        other.work();
        first.work();
        let order = Arc::new(Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for number in 0..3 {
                let (mut turn, order) = (first.another(), Arc::clone(&order));
                scope.spawn(move || {
                    turn.work();
                    assert_eq!(at_work(&turn), 1);
                    order.lock().unwrap().push(number);
                });
                // In this order.
                while first.party.waiting().len() <= number {
                    std::thread::yield_now();
                }
            }
            assert!(order.lock().unwrap().is_empty(), "the processor is the first one's");
            first.moved(QUANTUM_BYTES);
            // It had its turn again behind those who waited before.
            assert_eq!(*order.lock().unwrap(), [0, 1, 2]);
        });
        assert!(first.is_held());
        drop(other);
    }

    #[test]
    fn who_has_not_worked_lately_leaves_its_share_to_the_others() {
        let fair = Arc::new(Fair::of(2));
        let (mut first, mut other) = (user(&fair, 1), user(&fair, 2));
        first.work();
        other.work();
        assert_eq!(fair.share(), 1);
        let later = |fair: &Fair| nanoseconds(fair.start.elapsed() + 2 * ACTIVE);
        fair.count(later(&fair));
        assert_eq!(fair.share(), 1, "it still works");
        other.rest();
        fair.count(later(&fair));
        assert_eq!(fair.share(), usize::MAX);
    }

    #[test]
    fn of_what_is_lent_as_much_is_left() {
        let fair = Arc::new(Fair::of(2));
        let first = user(&fair, 1);
        let take = |turn: &Turn, total: usize| {
            let own = &turn.party.lent_bytes;
            let used = || fair.parties().values().map(|party| party.lent_bytes.load(Ordering::Relaxed)).sum::<usize>();
            while used() < total && turn.may_borrow(own, total - used()) {
                own.fetch_add(1, Ordering::Relaxed);
            }
            own.load(Ordering::Relaxed)
        };
        assert_eq!(take(&first, 60), 60, "it is alone");
        first.party.lent_bytes.store(0, Ordering::Relaxed);
        let (second, third) = (user(&fair, 2), user(&fair, 3));
        assert_eq!([take(&first, 64), take(&second, 64), take(&third, 64)], [32, 16, 8]);
    }
}

//! A fair lock over byte ranges: any number of disjoint or shared ranges at once, exclusive where they overlap.
//!
//! Invariant: a request waits for requests that it conflicts with (they overlap, and at least one is exclusive) and that were
//! made before it, and is overtaken by at most [`OVERTAKEN_MAX`] later ones, so nobody starves. Strict order would cost a
//! sleep and a waking for every word of a log that several threads append to: the next in line sleeps mostly, and nobody
//! else could use what is free until it runs. The lock orders threads of this process; other processes are kept out by the
//! lock on the backing (`pmem`). It guards no data of its own: what a range stands for is the caller's business.
//!
//! The table is small and under one mutex. A range is given back without the mutex, by one store to a flag that the next
//! request finds: after `persist` has waited for its cache line, everything that waits for stores once more costs a tenth of
//! it. Who must wait looks at the flag for a moment, because most ranges are held shorter than a thread takes to wake, and
//! then sleeps. Before, it says so and looks at the flags again, with the heavy half of a barrier between, while everybody
//! who gives a range back looks for waiters with the light half: either the flag is seen or the waiter is. The barrier is
//! the sleeper's alone: nobody waits for the mutex meanwhile. Who gives a range back wakes those who can have theirs now.
//!
//! Some work need be done only once for all who ask for it before it begins (making a word durable). Who finds the very range
//! taken joins a [`Party`] of those who wait for it; whoever is granted it takes down how many have joined so far, does the
//! work, and says that these are served. They need the range no more. It costs who meets nobody one comparison.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut, Range};

use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError, barrier, hint, thread, thread_number};

/// How many ranges are held at once; more wait. One for each bit of a word.
const SLOTS: usize = u64::BITS as usize;

/// How many later requests may overtake one that waits.
const OVERTAKEN_MAX: u32 = 32;

/// How often a request looks whether its range is free before it sleeps: first it watches, then it lets others run.
const WATCHES: u32 = 3;
const YIELDS: u32 = 12;

/// How many ranges have a party at a time; who finds none free waits for its turn as others do.
const PARTIES: usize = 4;

/// How often a handler of signals lets others run before it believes that nobody but its own thread has the table: seconds.
const TABLE_LOOKS: u32 = 10_000_000;

/// How often a watch looks at the flag of the holder in its way: together some microseconds.
const LOOKS: u32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Shared,
    Exclusive,
    /// Exclusive over everything, empty ranges too.
    Alone,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    start: u64,
    end: u64,
    mode: Mode,
}

impl Request {
    fn conflicts_with(&self, other: &Self) -> bool {
        let overlap = self.start.max(other.start) < self.end.min(other.end);
        let either = |mode| self.mode == mode || other.mode == mode;
        either(Mode::Alone) || (overlap && either(Mode::Exclusive))
    }
}

#[derive(Debug)]
struct Table {
    /// By slot.
    granted: [Request; SLOTS],
    /// The slots that are in use, as bits; the holders of some may have ended.
    slots: u64,
    /// In the order in which they came.
    waiting: VecDeque<Waiter>,
    next_ticket: u64,
    /// The first so many of `parties` have been used.
    party_count: usize,
    parties: [Party; PARTIES],
}

/// Those who wait for the same work on the same range.
#[derive(Clone, Copy, Debug)]
struct Party {
    start: u64,
    end: u64,
    /// How many have joined, ever: it never goes back, also when the party becomes that of another range.
    joined: u64,
}

/// A place in a party.
#[derive(Clone, Copy, Debug)]
struct Member {
    party: usize,
    /// Served when so many and one more are.
    number: u64,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    request: Request,
    /// How many later ones were granted before it.
    overtaken: u32,
    /// [`thread_number`] of the thread.
    number: usize,
    /// Whether it was woken and has not looked since.
    woken: bool,
    thread: thread::Thread,
}

impl Waiter {
    /// Whether `request`, which came later, must wait for it.
    fn blocks(&self, request: &Request) -> bool {
        self.overtaken >= OVERTAKEN_MAX && self.request.conflicts_with(request)
    }
}

/// What is in the way of a request.
#[derive(Clone, Copy, Debug)]
enum InTheWay {
    /// The holder of this slot.
    Holder(usize),
    /// A waiter that was overtaken often enough, or all slots.
    Line,
}

/// The table, which nobody else looks at meanwhile.
struct TableGuard<'a> {
    table: MutexGuard<'a, Table>,
    looker: &'a AtomicUsize,
}

impl Deref for TableGuard<'_> {
    type Target = Table;

    #[inline]
    fn deref(&self) -> &Table {
        &self.table
    }
}

impl DerefMut for TableGuard<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Table {
        &mut self.table
    }
}

impl Drop for TableGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.looker.store(0, Ordering::Relaxed); // before the mutex goes
    }
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct RangeLock {
    table: Mutex<Table>,
    /// The thread that looks at the table; 0 for nobody.
    looker: AtomicUsize,
    /// How many wait. Changes under the mutex, so that a waiter who was seen can be woken.
    waiters: AtomicUsize,
    /// By slot: whether its holder has ended.
    ended: [AtomicBool; SLOTS],
    /// By slot: the thread that was granted it. Right where `ended` is false.
    holders: [AtomicUsize; SLOTS],
    /// By party: how many of those who joined have been served.
    served: [AtomicU64; PARTIES],
    /// By party: how many wait in it. Grows under the mutex.
    members: [AtomicUsize; PARTIES],
}

/// A granted range; given back when dropped.
#[derive(Debug)]
#[must_use = "the range is free again as soon as the guard is dropped"]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    slot: usize,
}

/// Those for whom whoever was granted a range does the work too.
#[derive(Debug)]
pub(crate) struct ForAll<'a> {
    lock: &'a RangeLock,
    /// The party, and how many of it.
    party: Option<(usize, u64)>,
}

impl ForAll<'_> {
    /// The work is done.
    pub(crate) fn served(self) {
        if let Some((party, count)) = self.party {
            self.lock.served[party].fetch_max(count, Ordering::Release);
        }
    }
}

impl Default for RangeLock {
    fn default() -> Self {
        barrier::prepare();
        let nothing = Request { start: 0, end: 0, mode: Mode::Shared };
        let nobody = Party { start: 0, end: 0, joined: 0 };
        let table = Table {
            granted: [nothing; SLOTS],
            slots: 0,
            waiting: VecDeque::new(),
            next_ticket: 0,
            party_count: 0,
            parties: [nobody; PARTIES],
        };
        Self {
            table: Mutex::new(table),
            looker: AtomicUsize::new(0),
            waiters: AtomicUsize::new(0),
            ended: std::array::from_fn(|_| AtomicBool::new(true)),
            holders: std::array::from_fn(|_| AtomicUsize::new(0)),
            served: std::array::from_fn(|_| AtomicU64::new(0)),
            members: std::array::from_fn(|_| AtomicUsize::new(0)),
        }
    }
}

impl RangeLock {
    /// Waits until no exclusive holder overlaps `range`. An empty range conflicts with [`Self::alone`] only.
    pub(crate) fn shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range.start, range.end, Mode::Shared)
    }

    /// Waits until no holder overlaps `range`.
    pub(crate) fn exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range.start, range.end, Mode::Exclusive)
    }

    /// As [`Self::exclusive`], if it can be had at once. In a handler of signals too: it neither waits nor allocates, and the
    /// guard, when it is dropped, waits for nobody but others who look at the table.
    pub(crate) fn try_exclusive(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        let request = Request { start: range.start, end: range.end, mode: Mode::Exclusive };
        let mut table = self.try_table()?;
        let in_line = table.waiting.len();
        let slot = self.grant(&mut table, &request, in_line).ok()?;
        Some(RangeGuard { lock: self, slot })
    }

    /// Whether a handler of signals has come upon this thread while it holds a range, waits for one, or looks at the table:
    /// the handler must not wait for a range, whoever gets it.
    pub(crate) fn is_entered_here(&self) -> bool {
        let here = thread_number();
        let holds = |slot: usize| {
            !self.ended[slot].load(Ordering::Acquire) && self.holders[slot].load(Ordering::Relaxed) == here
        };
        if (0..SLOTS).any(holds) {
            return true;
        }
        for _ in 0..TABLE_LOOKS {
            if self.looker.load(Ordering::Relaxed) == here {
                return true;
            }
            if let Some(mut table) = self.try_table() {
                self.wake_those_of(&mut table); // this thread may have been about to
                return table.waiting.iter().any(|waiter| waiter.number == here);
            }
            thread::yield_now();
        }
        true // nobody else looks at the table for so long: this thread had it, and had not said so yet
    }

    /// As [`Self::exclusive`], to do what need be done once for all who ask for it before it begins. `None` when somebody
    /// else has begun and done it since this call.
    #[inline]
    pub(crate) fn exclusive_unless_served(&self, range: Range<u64>) -> Option<(RangeGuard<'_>, ForAll<'_>)> {
        let request = Request { start: range.start, end: range.end, mode: Mode::Exclusive };
        let mut table = self.table();
        let in_line = table.waiting.len();
        match self.grant(&mut table, &request, in_line) {
            Ok(slot) => Some(self.granted_for_all(&table, &request, slot)),
            Err(in_the_way) => {
                let same =
                    |slot: usize| table.granted[slot].start == range.start && table.granted[slot].end == range.end;
                let member = match in_the_way {
                    InTheWay::Holder(slot) if !same(slot) => None,
                    _ => self.join(&mut table, &request),
                };
                drop(table);
                self.wait(&request, in_the_way, member)
            }
        }
    }

    #[inline]
    fn granted_for_all(&self, table: &Table, request: &Request, slot: usize) -> (RangeGuard<'_>, ForAll<'_>) {
        let party = table.party_of(request).map(|party| (party, table.parties[party].joined));
        (RangeGuard { lock: self, slot }, ForAll { lock: self, party })
    }

    /// Who had it last may have served between the last look and the grant: then it is given back.
    fn granted_unless_served(
        &self,
        table: TableGuard<'_>,
        request: &Request,
        slot: usize,
        member: Option<Member>,
    ) -> Option<(RangeGuard<'_>, ForAll<'_>)> {
        let granted = self.granted_for_all(&table, request, slot);
        drop(table); // whoever gives a range back may need it
        if self.is_served(member) { None } else { Some(granted) }
    }

    /// A place among those who wait for the same range.
    fn join(&self, table: &mut Table, request: &Request) -> Option<Member> {
        let empty = |party: &usize| self.members[*party].load(Ordering::Acquire) == 0;
        let party = table.party_of(request).or_else(|| (0..PARTIES).find(empty))?;
        table.party_count = table.party_count.max(party + 1);
        let joined = table.parties[party].joined;
        table.parties[party] = Party { start: request.start, end: request.end, joined: joined + 1 };
        self.members[party].fetch_add(1, Ordering::AcqRel);
        Some(Member { party, number: joined })
    }

    fn is_served(&self, member: Option<Member>) -> bool {
        member.is_some_and(|Member { party, number }| self.served[party].load(Ordering::Acquire) > number)
    }

    fn leave(&self, member: Option<Member>) {
        if let Some(Member { party, .. }) = member {
            self.members[party].fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits until there is no holder at all.
    pub(crate) fn alone(&self) -> RangeGuard<'_> {
        self.acquire(0, u64::MAX, Mode::Alone)
    }

    /// The arguments come in registers: a structure in memory would have to get there before the request could be noted.
    fn acquire(&self, start: u64, end: u64, mode: Mode) -> RangeGuard<'_> {
        let request = Request { start, end, mode };
        let mut table = self.table();
        let in_line = table.waiting.len();
        match self.grant(&mut table, &request, in_line) {
            Ok(slot) => RangeGuard { lock: self, slot },
            Err(in_the_way) => {
                drop(table);
                self.wait(&request, in_the_way, None).expect("nobody serves who has not joined").0
            }
        }
    }

    /// `None` when `member` was served.
    #[cold]
    fn wait(
        &self,
        request: &Request,
        in_the_way: InTheWay,
        member: Option<Member>,
    ) -> Option<(RangeGuard<'_>, ForAll<'_>)> {
        let granted = self.wait_awake(request, in_the_way, member).unwrap_or_else(|| self.sleep(request, member));
        self.leave(member);
        granted
    }

    /// `None` when it is time to sleep; nothing in it when `member` was served.
    fn wait_awake(
        &self,
        request: &Request,
        in_the_way: InTheWay,
        member: Option<Member>,
    ) -> Option<Option<(RangeGuard<'_>, ForAll<'_>)>> {
        let mut in_the_way = in_the_way;
        for round in 0..WATCHES + YIELDS {
            match in_the_way {
                InTheWay::Holder(slot) if round < WATCHES => self.watch(slot),
                _ => thread::yield_now(),
            }
            if self.is_served(member) {
                return Some(None);
            }
            let mut table = self.table();
            let in_line = table.waiting.len();
            match self.grant(&mut table, request, in_line) {
                Ok(slot) => return Some(self.granted_unless_served(table, request, slot, member)),
                Err(now) => in_the_way = now,
            }
        }
        None
    }

    /// Looks for a moment whether the holder of `slot` has ended.
    fn watch(&self, slot: usize) {
        for _ in 0..LOOKS {
            if self.ended[slot].load(Ordering::Acquire) {
                return;
            }
            hint::spin_loop();
        }
    }

    /// `None` when `member` was served.
    fn sleep(&self, request: &Request, member: Option<Member>) -> Option<(RangeGuard<'_>, ForAll<'_>)> {
        let ticket = self.get_in_line(request);
        barrier::heavy();
        let mut table = self.table();
        loop {
            let own =
                table.waiting.iter().position(|waiter| waiter.ticket == ticket).expect("a waiter keeps its place");
            let served = self.is_served(member);
            let granted = if served { None } else { self.grant(&mut table, request, own).ok() };
            if served || granted.is_some() {
                table.waiting.remove(own);
                self.waiters.store(table.waiting.len(), Ordering::SeqCst);
            }
            if let Some(slot) = granted {
                return self.granted_unless_served(table, request, slot, member);
            }
            if served {
                drop(table);
                self.wake(); // it may have been woken in place of who needs the range
                return None;
            }
            table.waiting[own].woken = false;
            drop(table);
            thread::park();
            table = self.table();
        }
    }

    /// The ticket.
    fn get_in_line(&self, request: &Request) -> u64 {
        let (thread, number) = (thread::current(), thread_number());
        let mut table = self.table();
        let ticket = table.next_ticket;
        table.next_ticket += 1;
        table.waiting.push_back(Waiter { ticket, request: *request, overtaken: 0, number, woken: false, thread });
        self.waiters.store(table.waiting.len(), Ordering::SeqCst);
        ticket
    }

    /// Gives `request` a slot, if no holder is in its way, and none of the first `in_line` waiters that was overtaken often
    /// enough.
    #[inline(always)]
    fn grant(&self, table: &mut Table, request: &Request, in_line: usize) -> Result<usize, InTheWay> {
        let mut rest = table.slots;
        while rest != 0 {
            let slot = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if self.ended[slot].load(Ordering::Acquire) {
                table.slots &= !(1 << slot);
            } else if table.granted[slot].conflicts_with(request) {
                return Err(InTheWay::Holder(slot));
            }
        }
        let slot = table.slots.trailing_ones() as usize;
        if slot == SLOTS || (in_line > 0 && !overtake(table, request, in_line)) {
            return Err(InTheWay::Line);
        }
        table.slots |= 1 << slot;
        table.granted[slot] = *request;
        self.holders[slot].store(thread_number(), Ordering::Relaxed);
        self.ended[slot].store(false, Ordering::Release); // the mutex orders it, and nobody else has the slot
        Ok(slot)
    }

    /// Wakes those of the waiters who can have their ranges now. A waiter that does not sleep yet has looked at the flags
    /// before, so its mutex is waited for.
    #[cold]
    fn wake(&self) {
        self.wake_those_of(&mut self.table());
    }

    fn wake_those_of(&self, table: &mut Table) {
        while let Some(index) = self.next_to_wake(table) {
            table.waiting[index].woken = true;
            table.waiting[index].thread.unpark();
        }
    }

    /// A waiter who sleeps and could have its range now, if those who were woken before it had theirs.
    fn next_to_wake(&self, table: &Table) -> Option<usize> {
        let holds = |slot: &usize| table.slots & (1 << slot) != 0 && !self.ended[*slot].load(Ordering::Acquire);
        if (0..SLOTS).filter(holds).count() == SLOTS {
            return None;
        }
        let waiting = &table.waiting;
        (0..waiting.len()).find(|&index| {
            let Waiter { request, woken, .. } = &waiting[index];
            let comes_first = |earlier: &Waiter| {
                (earlier.woken && earlier.request.conflicts_with(request)) || earlier.blocks(request)
            };
            !woken
                && !(0..SLOTS).filter(holds).any(|slot| table.granted[slot].conflicts_with(request))
                && !waiting.iter().take(index).any(comes_first)
        })
    }

    /// The table is consistent between any two statements that can panic, so a poisoned mutex is still good.
    fn table(&self) -> TableGuard<'_> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        self.looker.store(thread_number(), Ordering::Relaxed);
        TableGuard { table, looker: &self.looker }
    }

    /// Without waiting for it.
    fn try_table(&self) -> Option<TableGuard<'_>> {
        let table = self.table.try_lock().ok()?;
        self.looker.store(thread_number(), Ordering::Relaxed);
        Some(TableGuard { table, looker: &self.looker })
    }
}

impl Table {
    /// The party that waits, or has waited, for that range.
    #[inline]
    fn party_of(&self, request: &Request) -> Option<usize> {
        let parties = self.parties.iter().take(self.party_count);
        parties.into_iter().position(|party| party.start == request.start && party.end == request.end)
    }
}

/// Lets `request` overtake the first `in_line` waiters, unless one of them was overtaken often enough.
#[cold]
fn overtake(table: &mut Table, request: &Request, in_line: usize) -> bool {
    if table.waiting.iter().take(in_line).any(|earlier| earlier.blocks(request)) {
        return false;
    }
    for earlier in table.waiting.iter_mut().take(in_line).filter(|earlier| earlier.request.conflicts_with(request)) {
        earlier.overtaken += 1;
    }
    true
}

impl Drop for RangeGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.lock.ended[self.slot].store(true, Ordering::Release);
        barrier::light();
        if self.lock.waiters.load(Ordering::Relaxed) > 0 {
            self.lock.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Whether `acquire` is granted while `held` is kept.
    fn granted(held: Mode, held_range: Range<u64>, mode: Mode, range: Range<u64>) -> bool {
        let lock = Arc::new(RangeLock::default());
        let guard = lock.acquire(held_range.start, held_range.end, held);
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = {
            let lock = Arc::clone(&lock);
            thread::spawn(move || {
                let _guard = lock.acquire(range.start, range.end, mode);
                sender.send(()).unwrap();
            })
        };
        let granted = loop {
            match receiver.recv_timeout(Duration::from_millis(1)) {
                Ok(()) => break true,
                Err(_) if !lock.table().waiting.is_empty() => break false,
                Err(_) => {}
            }
        };
        drop(guard);
        other.join().unwrap();
        granted
    }

    #[test]
    fn only_overlap_with_an_exclusive_side_conflicts() {
        use Mode::{Alone, Exclusive, Shared};
        assert!(granted(Shared, 0..10, Shared, 5..15));
        assert!(!granted(Exclusive, 0..10, Shared, 5..15));
        assert!(!granted(Shared, 0..10, Exclusive, 5..15));
        assert!(!granted(Exclusive, 0..10, Exclusive, 9..10));
        assert!(granted(Exclusive, 0..10, Exclusive, 10..20));
        assert!(granted(Exclusive, 10..20, Exclusive, 0..10));
        assert!(granted(Exclusive, 0..10, Exclusive, 5..5));
        assert!(!granted(Shared, 5..5, Alone, 0..0));
        assert!(!granted(Alone, 0..0, Shared, 5..5));
    }

    /// Waits until somebody is in line.
    fn until_somebody_waits(lock: &RangeLock) {
        while lock.table().waiting.is_empty() {
            thread::yield_now();
        }
    }

    #[test]
    fn a_waiting_writer_is_overtaken_by_so_many_readers_and_no_more() {
        let lock = RangeLock::default();
        let first_reader = lock.shared(0..10);
        thread::scope(|scope| {
            let writer = scope.spawn(|| drop(lock.exclusive(0..10)));
            until_somebody_waits(&lock);
            for _ in 0..OVERTAKEN_MAX {
                drop(lock.shared(5..15));
            }
            assert!(lock.grant(&mut lock.table(), &request(5, 15, Mode::Shared), 1).is_err(), "one more has to wait");
            assert!(!writer.is_finished());
            drop(lock.exclusive(10..20)); // which conflicts with nobody
            drop(first_reader);
            writer.join().unwrap();
        });
        drop(lock.exclusive(5..15));
    }

    #[test]
    fn of_those_who_sleep_only_who_can_go_on_is_woken() {
        let lock = RangeLock::default();
        let (held, other) = (lock.exclusive(0..10), lock.exclusive(20..30));
        thread::scope(|scope| {
            for (index, range) in [0..5_u64, 0..7, 5..8, 20..25].into_iter().enumerate() {
                scope.spawn({
                    let lock = &lock;
                    move || drop(lock.exclusive(range))
                });
                while lock.table().waiting.len() == index {
                    thread::yield_now();
                }
            }
            {
                let mut table = lock.table();
                assert_eq!(lock.next_to_wake(&table), None);
                lock.ended[held.slot].store(true, Ordering::Release);
                assert_eq!(lock.next_to_wake(&table), Some(0));
                table.waiting[0].woken = true;
                assert_eq!(lock.next_to_wake(&table), Some(2), "not the one that would have to wait for the first");
                table.waiting[2].woken = true;
                assert_eq!(lock.next_to_wake(&table), None);
                table.waiting.iter_mut().for_each(|waiter| waiter.woken = false);
            }
            drop((held, other));
        });
        assert!(lock.table().waiting.is_empty());
    }

    fn request(start: u64, end: u64, mode: Mode) -> Request {
        Request { start, end, mode }
    }

    #[test]
    fn many_writers_of_one_place_all_come_to_their_end() {
        let lock = RangeLock::default();
        let counter = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for round in 0..3000_u64 {
                        let _guard = lock.exclusive(0..16);
                        let seen = counter.load(Ordering::Relaxed);
                        if round % 100 == 0 {
                            thread::yield_now(); // longer than anybody watches
                        }
                        counter.store(seen + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(counter.into_inner(), 24_000);
        assert!(lock.table().waiting.is_empty());
    }

    /// Has `count` threads ask for 0..16 while it is held; how many do the work when it is given back.
    fn work_of_a_party(count: u64, serve: bool) -> u64 {
        let (lock, works) = (RangeLock::default(), AtomicU64::new(0));
        let held = lock.exclusive(0..16);
        thread::scope(|scope| {
            for _ in 0..count {
                scope.spawn(|| {
                    if let Some((_guard, for_all)) = lock.exclusive_unless_served(0..16) {
                        works.fetch_add(1, Ordering::Relaxed);
                        if serve {
                            for_all.served();
                        }
                    }
                });
            }
            while lock.table().parties[0].joined < count {
                thread::yield_now();
            }
            drop(held);
        });
        assert!(lock.members.iter().all(|members| members.load(Ordering::Relaxed) == 0));
        assert!(lock.table().waiting.is_empty());
        works.into_inner()
    }

    #[test]
    fn one_of_those_who_wait_for_the_same_work_does_it_for_all() {
        for count in [1, 2, 8, 40] {
            assert_eq!(work_of_a_party(count, true), 1, "{count} threads");
        }
        assert_eq!(work_of_a_party(8, false), 8, "work that failed is nobody else's");
    }

    #[test]
    fn nobody_is_served_by_work_that_had_begun_or_by_that_on_another_range() {
        let lock = RangeLock::default();
        let (guard, for_all) = lock.exclusive_unless_served(0..16).unwrap();
        thread::scope(|scope| {
            let late = scope.spawn(|| lock.exclusive_unless_served(0..16).is_some());
            let wider = scope.spawn(|| lock.exclusive_unless_served(0..32).is_some());
            while lock.table().parties[0].joined < 1 || lock.table().waiting.len() < 2 {
                thread::yield_now();
            }
            for_all.served();
            drop(guard);
            assert!(late.join().unwrap() && wider.join().unwrap());
        });
    }

    /// Each thread counts its word up and asks for the words to be saved: what it finds saved then is no older.
    #[test]
    fn what_was_stored_before_the_call_is_part_of_the_work() {
        const ROUNDS: u64 = 5000;
        let lock = RangeLock::default();
        let words: [AtomicU64; 4] = std::array::from_fn(|_| AtomicU64::new(0));
        let saved: [AtomicU64; 4] = std::array::from_fn(|_| AtomicU64::new(0));
        let works = AtomicU64::new(0);
        thread::scope(|scope| {
            for own in 0..4 {
                let (lock, words, saved, works) = (&lock, &words, &saved, &works);
                scope.spawn(move || {
                    for count in 1..=ROUNDS {
                        words[own].store(count, Ordering::Relaxed);
                        if let Some((_guard, for_all)) = lock.exclusive_unless_served(0..16) {
                            works.fetch_add(1, Ordering::Relaxed);
                            for (word, saved) in words.iter().zip(saved) {
                                saved.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
                            }
                            if count % 64 == 0 {
                                thread::yield_now(); // so that others join
                            }
                            for_all.served();
                        }
                        assert!(saved[own].load(Ordering::Relaxed) >= count);
                    }
                });
            }
        });
        assert!(works.into_inner() <= 4 * ROUNDS);
    }

    #[test]
    fn exclusive_sections_never_overlap() {
        let lock = RangeLock::default();
        let counter = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (lock, counter) = (&lock, &counter);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let start = (thread + round) % 3;
                        let _guard = lock.exclusive(start..start + 4);
                        let seen = counter.load(Ordering::Relaxed);
                        counter.store(seen + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(counter.into_inner(), 8000);
        drop(lock.shared(0..1));
        let table = lock.table();
        assert_eq!((table.slots, table.waiting.len()), (1, 0), "every request forgets those that have ended");
    }
}

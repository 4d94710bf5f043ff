//! Limits on how much is asked of an export, by all of its clients together and by each: bytes and requests a second, bytes under
//! way, connections.
//!
//! A client is all of its connections ([`Identity`]). Of clients that have to wait for the export, that one is next which has had
//! least; requests of one client pass in the order in which they came.
//!
//! Guards: a request waits for what was let through before it and never for itself, so that the largest one passes. One that waits
//! has cost nothing, and what was let through and not done is given back, so a client that leaves again and again takes nothing
//! from others; what it owes outlives its connections, so it gains nothing either. Who waits has received no payload yet, and
//! still sees that its client leaves, that the server stops, and that the limit has changed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::access::Identity;
use super::connection::{End, Session};
use super::socket::{self, Bell, Beside};
use super::transmission::{Request, Verdict};

/// What may be asked at once after a rest, in time.
const BURST: Duration = Duration::from_millis(100);
/// What a request counts for besides its bytes when it is found out who has had least.
const REQUEST_BYTES: u64 = 4096;

/// How much may be asked; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Bytes a second that are read and written.
    pub bytes_per_second: u64,
    /// Requests a second of every kind.
    pub requests_per_second: u64,
    /// Bytes of reads and writes that have begun and are not answered. A request that is larger waits until it is alone.
    pub bytes_under_way: u64,
    /// Connections at a time.
    pub connections: usize,
}

/// How much may be asked of an export.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExportLimits {
    /// By all of its clients together.
    pub all: Quota,
    /// By each client, over all of its connections.
    pub each_client: Quota,
}

/// Lets the requests for one export through.
#[derive(Debug)]
pub(super) struct Throttle {
    /// Whether there is any limit but those on connections.
    limited: AtomicBool,
    state: Mutex<State>,
    start: Instant,
}

#[derive(Debug, Default)]
struct State {
    limits: ExportLimits,
    all: Meter,
    clients: BTreeMap<Identity, Account>,
    /// What the client that was let through last had had before.
    had: u64,
    next_number: u64,
}

/// What was let through. Times are in nanoseconds since the start.
#[derive(Debug, Default, Clone, Copy)]
struct Meter {
    /// When it is paid for.
    due: u64,
    bytes_under_way: u64,
    connections: usize,
}

#[derive(Debug, Default)]
struct Account {
    meter: Meter,
    /// Bytes that it has had, as far as that counts against others.
    had: u64,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    len_bytes: u64,
    bell: Arc<Bell>,
}

impl Quota {
    /// For how long a request uses the rates up, in nanoseconds.
    fn cost(&self, len_bytes: u64) -> u64 {
        let of = |count: u64, rate: u64| match rate {
            0 => 0,
            _ => u128::from(count) * 1_000_000_000 / u128::from(rate),
        };
        let cost = of(len_bytes, self.bytes_per_second).max(of(1, self.requests_per_second));
        u64::try_from(cost).unwrap_or(u64::MAX)
    }

    fn admits(&self, meter: &Meter, len_bytes: u64) -> bool {
        let sum = meter.bytes_under_way.saturating_add(len_bytes);
        self.bytes_under_way == 0 || meter.bytes_under_way == 0 || sum <= self.bytes_under_way
    }

    const fn limits_requests(&self) -> bool {
        self.bytes_per_second > 0 || self.requests_per_second > 0 || self.bytes_under_way > 0
    }

    const fn admits_connection(&self, meter: &Meter) -> bool {
        self.connections == 0 || meter.connections < self.connections
    }
}

impl Meter {
    fn charge(&mut self, quota: &Quota, len_bytes: u64, now: u64) {
        let least = now.saturating_sub(nanoseconds(BURST));
        self.due = self.due.max(least).saturating_add(quota.cost(len_bytes));
        self.bytes_under_way = self.bytes_under_way.saturating_add(len_bytes);
    }

    fn refund(&mut self, quota: &Quota, len_bytes: u64, done_bytes: u64) {
        self.due = self.due.saturating_sub(quota.cost(len_bytes).saturating_sub(quota.cost(done_bytes)));
    }
}

/// What becomes of a request now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Passes,
    /// It waits until then, or until its bell rings.
    Waits(Option<u64>),
}

impl State {
    /// The client that is next, of those whose own limits let it.
    fn next(&self, now: u64) -> Option<&Identity> {
        let may = |account: &&Account| {
            let own = &self.limits.each_client;
            let admits = |first: &Waiting| own.admits(&account.meter, first.len_bytes);
            account.meter.due <= now && account.waiting.front().is_some_and(admits)
        };
        let clients = self.clients.iter().filter(|(_, account)| may(account));
        clients.min_by_key(|(_, account)| account.had).map(|(identity, _)| identity)
    }

    /// Has the one that is next look again.
    fn ring_next(&self, now: u64) {
        let next = self.next(now).and_then(|identity| self.clients.get(identity));
        next.and_then(|account| account.waiting.front()).inspect(|first| first.bell.ring());
    }

    fn ring_first_of(&self, identity: &Identity) {
        self.clients.get(identity).and_then(|account| account.waiting.front()).inspect(|first| first.bell.ring());
    }

    fn ask(&mut self, identity: &Identity, len_bytes: u64, bell: &Arc<Bell>) -> u64 {
        let had = self.had;
        let account = self.clients.entry(identity.clone()).or_default();
        if account.waiting.is_empty() {
            // Nobody saves up while asking for nothing.
            account.had = account.had.max(had);
        }
        self.next_number += 1;
        account.waiting.push_back(Waiting { number: self.next_number, len_bytes, bell: Arc::clone(bell) });
        self.next_number
    }

    fn look(&mut self, identity: &Identity, number: u64, now: u64) -> Fate {
        let (all, each) = (self.limits.all, self.limits.each_client);
        let Some(account) = self.clients.get(identity) else { return Fate::Passes };
        let Some(first) = account.waiting.front() else { return Fate::Passes };
        let len_bytes = first.len_bytes;
        if first.number != number {
            return Fate::Waits(None);
        }
        if account.meter.due > now {
            return Fate::Waits(Some(account.meter.due));
        }
        if self.next(now) != Some(identity) || !all.admits(&self.all, len_bytes) {
            return Fate::Waits(None);
        }
        if self.all.due > now {
            return Fate::Waits(Some(self.all.due));
        }
        self.all.charge(&all, len_bytes, now);
        if let Some(account) = self.clients.get_mut(identity) {
            account.waiting.pop_front();
            account.meter.charge(&each, len_bytes, now);
            self.had = account.had;
            account.had = account.had.saturating_add(len_bytes).saturating_add(REQUEST_BYTES);
        }
        self.ring_next(now);
        self.ring_first_of(identity);
        Fate::Passes
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self { limited: false.into(), state: Mutex::default(), start: Instant::now() }
    }
}

impl Throttle {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        nanoseconds(self.start.elapsed())
    }

    /// From now on these; what was asked before counts no more where they changed.
    pub(super) fn set(&self, limits: ExportLimits) {
        let mut state = self.state();
        if state.limits == limits {
            return;
        }
        state.limits = limits;
        state.all.due = 0;
        state.clients.values_mut().for_each(|account| account.meter.due = 0);
        let limited = limits.all.limits_requests() || limits.each_client.limits_requests();
        self.limited.store(limited, Ordering::Relaxed);
        state.clients.values().filter_map(|account| account.waiting.front()).for_each(|first| first.bell.ring());
    }

    /// A place for one connection more of a client, if there may be one.
    pub(super) fn join(self: &Arc<Self>, identity: &Identity, bell: &Arc<Bell>) -> Option<Seat> {
        let now = self.now();
        let mut state = self.state();
        // What is owed is not forgotten before it is paid for.
        state.clients.retain(|_, account| account.meter.connections > 0 || account.meter.due > now);
        let (all, each) = (state.limits.all, state.limits.each_client);
        let own = state.clients.get(identity).map(|account| account.meter).unwrap_or_default();
        if !all.admits_connection(&state.all) || !each.admits_connection(&own) {
            return None;
        }
        state.all.connections += 1;
        state.clients.entry(identity.clone()).or_default().meter.connections += 1;
        drop(state);
        let (throttle, identity, bell) = (Arc::clone(self), identity.clone(), Arc::clone(bell));
        Some(Seat { throttle, identity, bell, bytes_under_way: 0, answered_bytes: 0 })
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The place of one connection at its export. Dropping it gives everything back.
#[derive(Debug)]
pub(super) struct Seat {
    throttle: Arc<Throttle>,
    identity: Identity,
    bell: Arc<Bell>,
    /// Of requests that were let through, and of those among them whose replies have not left.
    bytes_under_way: u64,
    answered_bytes: u64,
}

impl Seat {
    /// Asks for a request to be let through; its number if it has to wait.
    #[inline]
    fn ask(&mut self, len_bytes: u64) -> Option<u64> {
        if self.throttle.limited.load(Ordering::Relaxed) { self.ask_limited(len_bytes) } else { None }
    }

    #[cold]
    fn ask_limited(&mut self, len_bytes: u64) -> Option<u64> {
        let number = self.throttle.state().ask(&self.identity, len_bytes, &self.bell);
        (self.look(number, len_bytes) != Fate::Passes).then_some(number)
    }

    fn look(&mut self, number: u64, len_bytes: u64) -> Fate {
        let fate = self.throttle.state().look(&self.identity, number, self.throttle.now());
        if fate == Fate::Passes {
            self.bytes_under_way = self.bytes_under_way.saturating_add(len_bytes);
        }
        fate
    }

    /// A request that waits is not asked for any more.
    fn withdraw(&self, number: u64) {
        let mut state = self.throttle.state();
        if let Some(account) = state.clients.get_mut(&self.identity) {
            account.waiting.retain(|waiting| waiting.number != number);
        }
        state.ring_next(self.throttle.now());
        state.ring_first_of(&self.identity);
    }

    /// A request of `len_bytes` has ended early: what was not done of it is not owed.
    pub(super) fn refund(&mut self, len_bytes: u64, done_bytes: u64) {
        if self.bytes_under_way == 0 && len_bytes > 0 {
            return; // it was not let through under any limit
        }
        let mut state = self.throttle.state();
        let (all, each) = (state.limits.all, state.limits.each_client);
        state.all.refund(&all, len_bytes, done_bytes);
        if let Some(account) = state.clients.get_mut(&self.identity) {
            account.meter.refund(&each, len_bytes, done_bytes);
        }
        state.ring_next(self.throttle.now());
        state.ring_first_of(&self.identity);
    }

    /// The reply to a request of so many bytes waits to be sent.
    #[inline]
    pub(super) fn answered(&mut self, len_bytes: u64) {
        self.answered_bytes = self.answered_bytes.saturating_add(len_bytes).min(self.bytes_under_way);
    }

    /// All replies have left.
    #[inline]
    pub(super) fn sent(&mut self) {
        if self.answered_bytes > 0 {
            let bytes = std::mem::take(&mut self.answered_bytes);
            self.release(bytes);
        }
    }

    #[cold]
    fn release(&mut self, bytes: u64) {
        self.bytes_under_way -= bytes;
        let mut state = self.throttle.state();
        state.all.bytes_under_way = state.all.bytes_under_way.saturating_sub(bytes);
        if let Some(account) = state.clients.get_mut(&self.identity) {
            account.meter.bytes_under_way = account.meter.bytes_under_way.saturating_sub(bytes);
        }
        state.ring_next(self.throttle.now());
        state.ring_first_of(&self.identity);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.release(self.bytes_under_way);
        let mut state = self.throttle.state();
        state.all.connections -= 1;
        if let Some(account) = state.clients.get_mut(&self.identity) {
            account.meter.connections -= 1;
        }
    }
}

/// Bytes that a request moves, of those that are counted.
pub(super) fn payload_bytes(verdict: &Verdict) -> u64 {
    match verdict {
        Verdict::Run(Request::Read { len_bytes, .. } | Request::Write { len_bytes, .. }) => u64::from(*len_bytes),
        Verdict::Refuse { drain_bytes, .. } => *drain_bytes,
        _ => 0,
    }
}

impl Session<'_> {
    /// Waits until a request of so many bytes may go on.
    #[inline]
    pub(super) fn throttle(&mut self, len_bytes: u64) -> Result<(), End> {
        match self.link.seat.as_mut().and_then(|seat| seat.ask(len_bytes)) {
            Some(number) => self.wait_for_turn(number, len_bytes),
            None => Ok(()),
        }
    }

    #[cold]
    fn wait_for_turn(&mut self, number: u64, len_bytes: u64) -> Result<(), End> {
        let waited = self.wait_until_let_through(number, len_bytes);
        if let (Ok(false) | Err(_), Some(seat)) = (&waited, &self.link.seat) {
            seat.withdraw(number);
        }
        waited.map(|_| ())
    }

    /// `false` when the server stops meanwhile.
    fn wait_until_let_through(&mut self, number: u64, len_bytes: u64) -> Result<bool, End> {
        loop {
            self.collect()?;
            self.link.send_replies()?;
            self.tidy();
            self.link.turn.rest();
            let Some(seat) = &mut self.link.seat else { return Ok(true) };
            let until = match seat.look(number, len_bytes) {
                Fate::Passes => return Ok(true),
                Fate::Waits(until) => until.and_then(|due| seat.throttle.start.checked_add(Duration::from_nanos(due))),
            };
            let (client, stop) = (self.link.client, &self.link.shared.stop);
            match socket::wait_beside(&client.socket, &client.bell, stop, until)? {
                Beside::Left => return Err(End::Closed),
                Beside::Stopping => return Ok(false),
                Beside::Rang => client.bell.silence(),
                Beside::TimedOut => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn quota(bytes_per_second: u64, requests_per_second: u64) -> Quota {
        Quota { bytes_per_second, requests_per_second, ..Quota::default() }
    }

    fn of_all(all: Quota) -> State {
        State { limits: ExportLimits { all, ..ExportLimits::default() }, ..State::default() }
    }

    fn of_each(each_client: Quota) -> State {
        State { limits: ExportLimits { each_client, ..ExportLimits::default() }, ..State::default() }
    }

    fn bell() -> Arc<Bell> {
        Arc::new(Bell::new().unwrap())
    }

    const ONE: Identity = Identity::User(1);
    const TWO: Identity = Identity::User(2);

    /// Asks and looks at once.
    fn asks(state: &mut State, who: &Identity, len_bytes: u64, now: u64) -> (u64, Fate) {
        let number = state.ask(who, len_bytes, &bell());
        (number, state.look(who, number, now))
    }

    #[test]
    fn requests_pay_for_those_before_them() {
        let mut state = of_all(quota(1000, 0));
        let now = 10 * SECOND;
        assert_eq!(asks(&mut state, &ONE, 5000, now).1, Fate::Passes, "nothing came before");
        let due = now + 5 * SECOND - nanoseconds(BURST);
        let (number, fate) = asks(&mut state, &ONE, u64::MAX, now);
        assert_eq!(fate, Fate::Waits(Some(due)));
        assert_eq!(state.look(&ONE, number, due), Fate::Passes, "it does not wait for itself");
        let mut state = of_all(quota(0, 10));
        assert_eq!(asks(&mut state, &ONE, 0, now).1, Fate::Passes);
        assert_eq!(asks(&mut state, &ONE, 0, now).1, Fate::Passes, "so much at once after a rest");
        assert_eq!(asks(&mut state, &ONE, 0, now).1, Fate::Waits(Some(now + SECOND / 10)));
    }

    #[test]
    fn what_a_client_owes_is_that_of_all_its_connections_and_outlives_them() {
        let throttle = Arc::new(Throttle::default());
        throttle.set(ExportLimits { each_client: quota(1, 0), ..ExportLimits::default() });
        let (mut first, mut second) = (throttle.join(&ONE, &bell()).unwrap(), throttle.join(&ONE, &bell()).unwrap());
        assert_eq!(first.ask(1 << 20), None);
        let number = second.ask(1).unwrap();
        assert_eq!(throttle.join(&TWO, &bell()).unwrap().ask(1 << 20), None, "another client");
        second.withdraw(number);
        drop((first, second));
        assert!(throttle.join(&ONE, &bell()).unwrap().ask(1).is_some(), "it has connected again");
    }

    #[test]
    fn what_was_not_done_is_not_owed() {
        let throttle = Arc::new(Throttle::default());
        throttle.set(ExportLimits { all: quota(1 << 20, 0), ..ExportLimits::default() });
        for _ in 0..1000 {
            let mut seat = throttle.join(&ONE, &bell()).unwrap();
            assert_eq!(seat.ask(64 << 20), None, "what was not done before is not waited for");
            seat.refund(64 << 20, 0);
        }
        let (mut greedy, mut other) = (throttle.join(&ONE, &bell()).unwrap(), throttle.join(&TWO, &bell()).unwrap());
        assert_eq!(greedy.ask(64 << 20), None);
        let number = other.ask(512).unwrap();
        // Of those that wait and leave nothing is owed either.
        for _ in 0..1000 {
            let mut seat = throttle.join(&ONE, &bell()).unwrap();
            let number = seat.ask(64 << 20).unwrap();
            seat.withdraw(number);
        }
        greedy.refund(64 << 20, 0);
        assert_eq!(other.look(number, 512), Fate::Passes);
    }

    #[test]
    fn who_has_had_least_is_next_however_many_wait_of_the_other() {
        let mut state = of_all(quota(0, 1));
        let mut now = 10 * SECOND;
        let mut numbers: Vec<_> = (0..50).map(|_| (ONE, state.ask(&ONE, 512, &bell()))).collect();
        numbers.extend((0..5).map(|_| (TWO, state.ask(&TWO, 512, &bell()))));
        let mut order = Vec::new();
        while order.len() < 10 {
            now += SECOND;
            let passed = numbers.iter().position(|(who, number)| state.look(who, *number, now) == Fate::Passes);
            order.push(numbers.remove(passed.unwrap()).0);
        }
        assert_eq!(order.iter().filter(|who| **who == TWO).count(), 5, "{order:?}");
    }

    #[test]
    fn a_client_that_its_own_limit_holds_back_does_not_hold_others_back() {
        let mut state = of_each(quota(0, 1));
        state.limits.all = quota(0, 1_000_000);
        let now = 10 * SECOND;
        assert_eq!(asks(&mut state, &ONE, 0, now).1, Fate::Passes);
        assert!(matches!(asks(&mut state, &ONE, 0, now).1, Fate::Waits(Some(_))));
        assert_eq!(asks(&mut state, &TWO, 0, now).1, Fate::Passes);
    }

    #[test]
    fn bytes_under_way_are_bounded_and_a_larger_request_goes_alone() {
        for each in [true, false] {
            let throttle = Arc::new(Throttle::default());
            let most = Quota { bytes_under_way: 1000, ..Quota::default() };
            let limits = ExportLimits::default();
            let (all, other) = (ExportLimits { all: most, ..limits }, if each { &ONE } else { &TWO });
            throttle.set(if each { ExportLimits { each_client: most, ..limits } } else { all });
            let (mut first, mut second) =
                (throttle.join(&ONE, &bell()).unwrap(), throttle.join(other, &bell()).unwrap());
            assert_eq!((first.ask(600), second.ask(400)), (None, None));
            let number = first.ask(5000).unwrap();
            second.answered(400);
            assert_eq!(first.look(number, 5000), Fate::Waits(None), "the reply has not left");
            second.sent();
            assert_eq!(first.look(number, 5000), Fate::Waits(None));
            first.answered(600);
            first.sent();
            assert_eq!(first.look(number, 5000), Fate::Passes);
            let number = second.ask(1).unwrap();
            drop(first);
            assert_eq!(second.look(number, 1), Fate::Passes, "who has left has nothing under way");
        }
    }

    #[test]
    fn a_new_limit_begins_anew() {
        let throttle = Arc::new(Throttle::default());
        throttle.set(ExportLimits { all: quota(1, 0), ..ExportLimits::default() });
        let (bell, mut seat) = (bell(), throttle.join(&ONE, &bell()).unwrap());
        seat.bell = bell;
        assert_eq!(seat.ask(1 << 30), None);
        let number = seat.ask(1).unwrap();
        throttle.set(ExportLimits::default());
        assert_eq!(seat.look(number, 1), Fate::Passes);
    }

    #[test]
    fn connections_are_counted_of_all_and_of_each() {
        let throttle = Arc::new(Throttle::default());
        let most = |connections| Quota { connections, ..Quota::default() };
        throttle.set(ExportLimits { all: most(3), each_client: most(2) });
        let seats = [throttle.join(&ONE, &bell()), throttle.join(&ONE, &bell())];
        assert!(seats.iter().all(Option::is_some));
        assert!(throttle.join(&ONE, &bell()).is_none(), "it has two");
        let third = throttle.join(&TWO, &bell());
        assert!(third.is_some() && throttle.join(&TWO, &bell()).is_none(), "there are three");
        drop(seats);
        assert!(throttle.join(&TWO, &bell()).is_some());
    }
}

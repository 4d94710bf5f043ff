//! Limits on how much is asked of an export, and by each connection of it: bytes and requests a second.
//!
//! Guards: a request waits for what was asked before it and never for itself, so that the largest one passes; who waits has
//! received no payload yet, and still sees that its client leaves, that the server stops, and that the limit has changed. Requests
//! of several connections pass in the order in which they came, so none keeps the others away.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::connection::{End, Session};
use super::socket::{self, Beside};
use super::wire::{NBD_CMD_DISC, NBD_CMD_READ, NBD_CMD_WRITE, RequestHeader};

/// What may be asked at once after a rest, in time.
const BURST: Duration = Duration::from_millis(100);

/// How much may be asked in a second; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Bytes that are read and written.
    pub bytes_per_second: u64,
    /// Requests of every kind.
    pub requests_per_second: u64,
}

/// Lets requests through at a rate.
#[derive(Debug)]
pub(super) struct Throttle {
    bytes_per_second: AtomicU64,
    requests_per_second: AtomicU64,
    /// When what was let through so far is paid for, in nanoseconds since `start`.
    due: AtomicU64,
    /// How often the rates were set.
    settings: AtomicU64,
    start: Instant,
}

impl Default for Throttle {
    fn default() -> Self {
        let none = AtomicU64::default;
        Self {
            bytes_per_second: none(),
            requests_per_second: none(),
            due: none(),
            settings: none(),
            start: Instant::now(),
        }
    }
}

impl Throttle {
    /// From now on these; what was asked before counts no more.
    pub(super) fn set(&self, rates: Rates) {
        let now = (self.bytes_per_second.load(Ordering::Relaxed), self.requests_per_second.load(Ordering::Relaxed));
        if now == (rates.bytes_per_second, rates.requests_per_second) {
            return;
        }
        self.bytes_per_second.store(rates.bytes_per_second, Ordering::Relaxed);
        self.requests_per_second.store(rates.requests_per_second, Ordering::Relaxed);
        self.due.store(0, Ordering::Relaxed);
        self.settings.fetch_add(1, Ordering::Release);
    }

    /// When a request may go on that comes now and moves so many bytes; at once without a limit.
    fn take(&self, len_bytes: u64) -> Option<Instant> {
        let (bytes, requests) =
            (self.bytes_per_second.load(Ordering::Relaxed), self.requests_per_second.load(Ordering::Relaxed));
        if bytes == 0 && requests == 0 {
            return None;
        }
        let of = |count: u64, rate: u64| u128::from(count) * 1_000_000_000 / u128::from(rate.max(1));
        let for_bytes = if bytes == 0 { 0 } else { of(len_bytes, bytes) };
        let for_request = if requests == 0 { 0 } else { of(1, requests) };
        let cost = u64::try_from(for_bytes.max(for_request)).unwrap_or(u64::MAX);
        let now = nanoseconds(self.start.elapsed());
        let least = now.saturating_sub(nanoseconds(BURST));
        let paid = |due: u64| Some(due.max(least).saturating_add(cost));
        let due = self.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, paid).unwrap_or_default();
        (due > now).then(|| self.start.checked_add(Duration::from_nanos(due))).flatten()
    }

    fn settings(&self) -> u64 {
        self.settings.load(Ordering::Acquire)
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Session<'_> {
    /// Waits until a request may go on.
    #[inline]
    pub(super) fn throttle(&mut self, header: &RequestHeader) -> Result<(), End> {
        let len_bytes = match header.command {
            NBD_CMD_DISC => return Ok(()),
            NBD_CMD_READ | NBD_CMD_WRITE => header.len_bytes,
            _ => 0,
        };
        let of_export = self.machine.negotiated().served.throttle.take(len_bytes);
        let own = self.link.client.throttle.take(len_bytes);
        match of_export.max(own) {
            Some(until) => self.wait_until(until),
            None => Ok(()),
        }
    }

    #[cold]
    fn wait_until(&mut self, until: Instant) -> Result<(), End> {
        let settings = self.settings();
        loop {
            self.collect()?;
            self.link.send_replies()?;
            self.tidy();
            self.link.turn.rest();
            let (client, stop) = (self.link.client, &self.link.shared.stop);
            match socket::wait_beside(&client.socket, &client.bell, stop, Some(until))? {
                Beside::Left => return Err(End::Closed),
                Beside::Stopping | Beside::TimedOut => return Ok(()),
                Beside::Rang => client.bell.silence(),
            }
            if self.settings() != settings {
                return Ok(());
            }
        }
    }

    fn settings(&self) -> (u64, u64) {
        (self.machine.negotiated().served.throttle.settings(), self.link.client.throttle.settings())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_pay_for_those_before_them() {
        let throttle = Throttle::default();
        assert_eq!(throttle.take(u64::MAX), None, "no limit");
        throttle.set(Rates { bytes_per_second: 1000, requests_per_second: 0 });
        assert_eq!(throttle.take(5000), None, "nothing came before");
        let (second, third) = (throttle.take(1000).unwrap(), throttle.take(0).unwrap());
        assert!(second >= throttle.start + Duration::from_millis(4900));
        assert_eq!(third, second + Duration::from_secs(1));
        assert_eq!(throttle.take(u64::MAX), Some(third), "one that moves nothing costs nothing");
        let _far = throttle.take(u64::MAX);
        throttle.set(Rates { bytes_per_second: 0, requests_per_second: 10 });
        assert_eq!(throttle.take(5000), None, "a new limit begins anew");
        throttle.set(Rates::default());
        assert_eq!(throttle.take(5000), None);
    }
}

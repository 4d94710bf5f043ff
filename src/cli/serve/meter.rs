//! How fast something goes lately.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The time that counts as lately.
const WINDOW: Duration = Duration::from_secs(10);
/// How often, at most, it is noted how far it has come.
const NOTE_INTERVAL: Duration = Duration::from_millis(250);

/// Notes how far something has come, and when.
#[derive(Debug, Default)]
pub(super) struct Meter {
    notes: Mutex<VecDeque<(Instant, u64)>>,
}

impl Meter {
    /// It has come so far.
    pub(super) fn note(&self, now: Instant, done_bytes: u64) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        // The last one moves until it is old enough to stay; the first one stays where it began.
        if notes.iter().rev().nth(1).is_some_and(|(at, _)| now.duration_since(*at) < NOTE_INTERVAL) {
            notes.pop_back();
        }
        notes.push_back((now, done_bytes));
        // One note from before the window stays, as where it begins.
        while notes.get(1).is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
            notes.pop_front();
        }
    }

    /// Bytes a second, from the oldest note that counts until `now`: something that stands still becomes slower.
    pub(super) fn bytes_per_second(&self, now: Instant) -> u64 {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, last_bytes)) = notes.back() else { return 0 };
        let started = notes.iter().rev().find(|(at, _)| now.duration_since(*at) >= WINDOW).or_else(|| notes.front());
        let Some((since, first_bytes)) = started else { return 0 };
        let nanoseconds = now.duration_since(*since).as_nanos();
        let moved = u128::from(last_bytes.saturating_sub(*first_bytes));
        let rate = (moved * 1_000_000_000).checked_div(nanoseconds).unwrap_or(0);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_the_time_until_now() {
        let (meter, start) = (Meter::default(), Instant::now());
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        assert_eq!(meter.bytes_per_second(start), 0);
        meter.note(start, 500);
        assert_eq!(meter.bytes_per_second(start), 0);
        meter.note(at(0.1), 600);
        assert!((999..=1001).contains(&meter.bytes_per_second(at(0.1))));
        // A thousand a second for a long time, and then ten times as fast.
        (1..=2000_u32).for_each(|tenth| meter.note(at(f64::from(tenth) / 10.0), 500 + u64::from(tenth) * 100));
        assert!((990..=1010).contains(&meter.bytes_per_second(at(200.0))), "{}", meter.bytes_per_second(at(200.0)));
        assert!(meter.notes.lock().unwrap().len() < 60, "{:?}", meter.notes);
        (1..=200_u32)
            .for_each(|tenth| meter.note(at(200.0 + f64::from(tenth) / 10.0), 200_500 + u64::from(tenth) * 1000));
        assert!((9_900..=10_100).contains(&meter.bytes_per_second(at(220.0))), "{}", meter.bytes_per_second(at(220.0)));
        // It stands still: slower and slower, and soon not at all.
        assert!((4_000..=6_000).contains(&meter.bytes_per_second(at(225.0))));
        assert_eq!(meter.bytes_per_second(at(240.0)), 0);
    }
}

//! Whether a connection polls its socket before it sleeps.
//!
//! Guards: a client that is idle, or always a little too slow, costs next to nothing.

use std::time::Duration;

/// Whether to poll before sleeping.
///
/// One poll in vain ends it, so an idle connection polls once and then costs nothing. Bytes that come soon after
/// falling asleep start it again; each further poll in vain doubles how often that has to happen, so a client that
/// is always a little too slow costs next to nothing either.
#[derive(Debug)]
pub(super) struct Spin {
    pub(super) limit: Duration,
    pub(super) worthwhile: bool,
    /// Short sleeps until polling is tried again.
    short_sleeps_left: u32,
    /// What `short_sleeps_left` starts from after the next poll in vain.
    short_sleeps_wanted: u32,
}

impl Spin {
    /// A sleep is short when it takes no more than this many poll limits: it contains two wake-ups, the client's and
    /// ours, and polling saves one of them.
    const SHORT_SLEEP_LIMITS: u32 = 4;
    /// The most short sleeps that polling waits for.
    const SHORT_SLEEPS_MAX: u32 = 64;

    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, worthwhile: !limit.is_zero(), short_sleeps_left: 1, short_sleeps_wanted: 1 }
    }

    pub(super) fn paid(&mut self) {
        self.short_sleeps_wanted = 1;
    }

    pub(super) fn in_vain(&mut self) {
        self.worthwhile = false;
        self.short_sleeps_left = self.short_sleeps_wanted;
        self.short_sleeps_wanted = (2 * self.short_sleeps_wanted).min(Self::SHORT_SLEEPS_MAX);
    }

    pub(super) fn slept_for(&mut self, duration: Duration) {
        if !self.worthwhile && duration < self.limit * Self::SHORT_SLEEP_LIMITS {
            self.short_sleeps_left = self.short_sleeps_left.saturating_sub(1);
            self.worthwhile = self.short_sleeps_left == 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    #[test]
    fn polling_ends_in_vain_and_begins_again_after_short_sleeps() {
        let mut spin = Spin::new(LIMIT);
        assert!(spin.worthwhile);
        spin.in_vain();
        assert!(!spin.worthwhile);
        spin.slept_for(Duration::from_millis(1));
        assert!(!spin.worthwhile, "the client is idle");
        spin.slept_for(LIMIT);
        assert!(spin.worthwhile);
    }

    #[test]
    fn a_client_that_is_always_too_slow_is_polled_less_and_less() {
        let mut spin = Spin::new(LIMIT);
        let mut polls = 0;
        for _ in 0..1000 {
            if spin.worthwhile {
                polls += 1;
                spin.in_vain();
            }
            spin.slept_for(2 * LIMIT);
        }
        assert!((10..30).contains(&polls), "{polls} polls");
        spin.worthwhile = true;
        spin.paid();
        spin.in_vain();
        spin.slept_for(LIMIT);
        assert!(spin.worthwhile, "a poll that paid forgives those in vain");
    }

    #[test]
    fn polling_that_is_off_stays_off() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.slept_for(Duration::ZERO);
        assert!(!spin.worthwhile);
    }
}

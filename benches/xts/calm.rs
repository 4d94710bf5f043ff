//! Whether the CPU is disturbed while something is measured.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Tells whether this CPU has its core to itself: a virtual machine's CPU may be one of two hardware threads, the other
/// of which belongs to a neighbour, who takes a third of everything without any clock showing it.
///
/// A fixed piece of arithmetic is timed beside every slice. It says nothing of the subjects, so it favours none.
pub(crate) struct Calm {
    best: Duration,
}

impl Calm {
    /// The slowdown that is still calm.
    const SLACK: f64 = 1.06;

    pub(crate) fn new() -> Self {
        let best = (0..2000).map(|_| yardstick()).min().unwrap();
        Self { best }
    }

    pub(crate) fn now(&mut self) -> bool {
        let took = yardstick().min(yardstick());
        self.best = self.best.min(took);
        took.as_secs_f64() <= self.best.as_secs_f64() * Self::SLACK
    }
}

/// Eight chains of arithmetic that fill the integer units: about 20 microseconds.
fn yardstick() -> Duration {
    let start = Instant::now();
    let mut sums = black_box([1_u64, 2, 3, 4, 5, 6, 7, 8]);
    for i in 0..16_000_u64 {
        for sum in &mut sums {
            *sum = (sum.rotate_left(7) ^ i).wrapping_add(i);
        }
    }
    black_box(sums);
    start.elapsed()
}

//! Fault-ahead: how many pages one fault brings in.
//!
//! A few runs of sequential touches are followed at a time (several threads, or the two sides of a merge). Each doubles
//! what it brings in with every fault that continues it; any other touch brings in one page and begins a new run.

/// Runs that are followed at a time.
const RUN_COUNT: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Run {
    /// The page that would continue it.
    next: u64,
    /// How many pages it brought in the last time; 0 for none yet.
    page_count: u64,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct FaultAhead {
    runs: [Run; RUN_COUNT],
    oldest: usize,
}

impl FaultAhead {
    /// How many pages to bring in from `page` on: at least 1, at most `page_count_max`.
    pub(super) fn pages(&mut self, page: u64, page_count_max: u64) -> u64 {
        let known = self.runs.iter_mut().find(|run| run.page_count > 0 && run.next == page);
        let (run, wanted) = match known {
            Some(run) => {
                let wanted = run.page_count * 2;
                (run, wanted)
            }
            None => {
                self.oldest = (self.oldest + 1) % RUN_COUNT;
                (&mut self.runs[self.oldest], 1)
            }
        };
        run.page_count = wanted.min(page_count_max).max(1);
        run.next = page + run.page_count;
        run.page_count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_while_touches_are_sequential() {
        let mut ahead = FaultAhead::default();
        assert_eq!([0, 1, 3, 7, 15].map(|page| ahead.pages(page, 8)), [1, 2, 4, 8, 8]);
        assert_eq!([100, 90, 80].map(|page| ahead.pages(page, 8)), [1, 1, 1]);
        assert_eq!(ahead.pages(23, 8), 8, "the run goes on after other touches");
        assert_eq!(ahead.pages(31, 0), 1, "without room for more, one page");
    }

    #[test]
    fn runs_that_alternate_are_told_apart() {
        let mut ahead = FaultAhead::default();
        for (page, count) in [(0, 1), (1000, 1), (1, 2), (1001, 2), (3, 4), (1003, 4)] {
            assert_eq!(ahead.pages(page, 64), count, "{page}");
        }
    }
}

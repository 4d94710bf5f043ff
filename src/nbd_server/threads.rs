//! An export whose large reads and writes are shared out over a few threads: one connection then uses more than one CPU.
//!
//! Guards: pieces begin at multiples of [`PIECE_BYTES_MIN`] of the export, so no data unit is written by two threads; a
//! request returns when all of its pieces have, with the error of one of those that failed. What small requests need
//! stays on the thread that received them.

use std::sync::Arc;

use rayon::iter::{IntoParallelIterator, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use super::export::{Export, ExportError, Extent, Hole};
use crate::spawn::without_signals;

/// The smallest piece that is worth another thread, in bytes: waking one costs as much as encrypting this.
const PIECE_BYTES_MIN: u64 = 128 << 10;

/// The threads that large requests of all connections share.
pub(super) fn pool(threads: usize) -> Result<Arc<ThreadPool>, ThreadPoolBuildError> {
    let name = |index| format!("daxcrypt-large-{index}");
    let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(name);
    Ok(Arc::new(without_signals(|| builder.build())?))
}

/// An export behind a pool of threads.
pub(super) struct SharedOut {
    export: Arc<dyn Export>,
    pool: Arc<ThreadPool>,
}

impl SharedOut {
    pub(super) fn new(export: Arc<dyn Export>, pool: Arc<ThreadPool>) -> Self {
        Self { export, pool }
    }

    /// Where a range is cut, as lengths in bytes; one length if it stays whole.
    fn pieces(&self, offset: u64, len_bytes: u64) -> Vec<usize> {
        let share = len_bytes / self.pool.current_num_threads() as u64;
        let piece = share.max(1).next_multiple_of(PIECE_BYTES_MIN);
        let (mut at, end) = (offset, offset + len_bytes);
        let mut lengths = Vec::new();
        while at < end {
            let next = end.min((at / piece + 1) * piece);
            lengths.push(usize::try_from(next - at).unwrap_or(usize::MAX));
            at = next;
        }
        lengths
    }
}

impl Export for SharedOut {
    fn size_bytes(&self) -> u64 {
        self.export.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        let len_bytes = buf.len() as u64;
        if len_bytes < 2 * PIECE_BYTES_MIN {
            return self.export.read_at(offset, buf);
        }
        let (mut at, mut rest, mut parts) = (offset, buf, Vec::new());
        for len in self.pieces(offset, len_bytes) {
            let (part, after) = rest.split_at_mut(len);
            parts.push((at, part));
            (at, rest) = (at + len as u64, after);
        }
        self.pool.install(|| parts.into_par_iter().try_for_each(|(at, part)| self.export.read_at(at, part)))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        let len_bytes = data.len() as u64;
        if len_bytes < 2 * PIECE_BYTES_MIN {
            return self.export.write_at(offset, data);
        }
        let (mut at, mut rest, mut parts) = (offset, data, Vec::new());
        for len in self.pieces(offset, len_bytes) {
            let (part, after) = rest.split_at(len);
            parts.push((at, part));
            (at, rest) = (at + len as u64, after);
        }
        self.pool.install(|| parts.into_par_iter().try_for_each(|(at, part)| self.export.write_at(at, part)))
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, hole: Hole) -> Result<(), ExportError> {
        self.export.write_zeroes(offset, len_bytes, hole)
    }

    fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        self.export.discard(offset, len_bytes)
    }

    fn persist(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        self.export.persist(offset, len_bytes)
    }

    fn durability_waits(&self) -> bool {
        self.export.durability_waits()
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.export.flush()
    }

    fn prefetch(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        self.export.prefetch(offset, len_bytes)
    }

    fn prefetches(&self) -> bool {
        self.export.prefetches()
    }

    fn is_poisoned(&self) -> bool {
        self.export.is_poisoned()
    }

    fn is_locked(&self) -> bool {
        self.export.is_locked()
    }

    fn fast_zero(&self) -> bool {
        self.export.fast_zero()
    }

    fn discards(&self) -> bool {
        self.export.discards()
    }

    fn resident_plaintext_bytes(&self) -> u64 {
        self.export.resident_plaintext_bytes()
    }

    fn extents(&self, offset: u64, len_bytes: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        self.export.extents(offset, len_bytes, limit)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Mutex;
    use std::thread::ThreadId;
    use std::time::Duration;

    use super::*;

    /// Remembers who did what. Every piece takes a while, so that one thread cannot do them all.
    #[derive(Default)]
    struct Recorder {
        bytes: Mutex<Vec<u8>>,
        pieces: Mutex<Vec<(u64, usize, ThreadId)>>,
        bad_offset: Option<u64>,
    }

    impl Recorder {
        fn note(&self, offset: u64, len: usize) -> Result<(), ExportError> {
            std::thread::sleep(Duration::from_millis(20));
            self.pieces.lock().unwrap().push((offset, len, std::thread::current().id()));
            let bad = self.bad_offset.is_some_and(|bad| (offset..offset + len as u64).contains(&bad));
            if bad { Err(ExportError::Media) } else { Ok(()) }
        }
    }

    impl Export for Recorder {
        fn size_bytes(&self) -> u64 {
            self.bytes.lock().unwrap().len() as u64
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
            self.note(offset, buf.len())?;
            let at = usize::try_from(offset).unwrap();
            buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
            Ok(())
        }

        fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
            self.note(offset, data.len())?;
            let at = usize::try_from(offset).unwrap();
            self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
            Ok(())
        }

        fn write_zeroes(&self, _: u64, _: u64, _: Hole) -> Result<(), ExportError> {
            Err(ExportError::Unsupported)
        }

        fn discard(&self, _: u64, _: u64) -> Result<(), ExportError> {
            Err(ExportError::Unsupported)
        }

        fn flush(&self) -> Result<(), ExportError> {
            Ok(())
        }
    }

    fn shared_out(bad_offset: Option<u64>) -> (Arc<Recorder>, SharedOut) {
        let recorder = Arc::new(Recorder { bytes: Mutex::new(vec![0; 4 << 20]), bad_offset, ..Recorder::default() });
        (recorder.clone(), SharedOut::new(recorder, pool(3).unwrap()))
    }

    #[test]
    fn a_large_request_runs_on_several_threads_in_aligned_pieces() {
        let (recorder, shared) = shared_out(None);
        let text: Vec<u8> = (0..1_000_001_u32).map(|i| (i * 7 % 251).to_be_bytes()[3]).collect();
        shared.write_at(4099, &text).unwrap();
        let mut back = vec![0; text.len()];
        shared.read_at(4099, &mut back).unwrap();
        assert!(back == text);
        let pieces = recorder.pieces.lock().unwrap();
        let threads: HashSet<ThreadId> = pieces.iter().map(|piece| piece.2).collect();
        assert!(threads.len() > 1, "{pieces:?}");
        assert_eq!(pieces.iter().map(|piece| piece.1).sum::<usize>(), 2 * text.len());
        assert!(pieces.iter().all(|piece| piece.0 == 4099 || piece.0.is_multiple_of(PIECE_BYTES_MIN)), "{pieces:?}");
    }

    #[test]
    fn a_small_request_stays_on_its_thread() {
        let (recorder, shared) = shared_out(None);
        shared.write_at(0, &[1; 200 << 10]).unwrap();
        assert_eq!(*recorder.pieces.lock().unwrap(), [(0, 200 << 10, std::thread::current().id())]);
    }

    #[test]
    fn the_error_of_one_piece_is_that_of_the_request() {
        let (_recorder, shared) = shared_out(Some(700_000));
        assert!(matches!(shared.read_at(0, &mut vec![0; 1 << 20]), Err(ExportError::Media)));
        assert!(matches!(shared.write_at(0, &vec![0; 1 << 20]), Err(ExportError::Media)));
        shared.read_at(1 << 20, &mut vec![0; 1 << 20]).unwrap();
    }
}

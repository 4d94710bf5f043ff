//! Media that are mostly zero: what is kept of them, and copied, are the other pages.

use super::replay::PAGE_BYTES;

const PAGE_LEN: usize = 4096;

const _: () = assert!(PAGE_LEN as u64 == PAGE_BYTES);

static ZEROES: [u8; PAGE_LEN] = [0; PAGE_LEN];

/// The bytes of a medium at the beginning of a recording.
#[derive(Debug)]
pub(super) struct SparseMedia {
    len: usize,
    /// Pages that are not zero, by their offsets.
    pages: Vec<(usize, Box<[u8]>)>,
}

impl SparseMedia {
    pub(super) fn of(media: &[u8]) -> Self {
        let pages = media.chunks(PAGE_LEN).enumerate().filter(|(_, page)| !is_zero(page));
        Self { len: media.len(), pages: pages.map(|(index, page)| (index * PAGE_LEN, page.into())).collect() }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// The pages that are not zero, with their offsets.
    pub(super) fn pages(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.pages.iter().map(|(offset, page)| (*offset, &page[..]))
    }

    /// All bytes, and zeroes behind them up to `len`.
    pub(super) fn to_vec(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for (offset, page) in self.pages() {
            bytes[offset..offset + page.len()].copy_from_slice(page);
        }
        bytes
    }
}

/// Whether a page, or the rest of one, is zero.
pub(super) fn is_zero(page: &[u8]) -> bool {
    *page == ZEROES[..page.len()]
}

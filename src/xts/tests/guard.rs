//! Memory between two pages that fault at any touch: a kernel that reads or writes outside of its run dies here.
#![allow(unsafe_code)]

use std::ptr;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::memory::{Source, Target};

/// Which guard page a run touches.
#[derive(Clone, Copy, Debug)]
pub(super) enum Edge {
    Before,
    Behind,
}

/// Readable and writable pages between two that are neither.
pub(super) struct Guarded {
    map: *mut u8,
    usable_bytes: usize,
    page_bytes: usize,
}

impl Guarded {
    /// Room for `len_bytes`.
    pub(super) fn new(len_bytes: usize) -> Self {
        let page_bytes = rustix::param::page_size();
        let usable_bytes = len_bytes.next_multiple_of(page_bytes);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let map = unsafe {
            mmap_anonymous(ptr::null_mut(), usable_bytes + 2 * page_bytes, ProtFlags::empty(), MapFlags::PRIVATE)
        };
        let map = map.unwrap().cast::<u8>();
        let start = map.wrapping_add(page_bytes).cast();
        // SAFETY: pages of the mapping above, to which nothing refers yet.
        unsafe { mprotect(start, usable_bytes, MprotectFlags::READ | MprotectFlags::WRITE) }.unwrap();
        Self { map, usable_bytes, page_bytes }
    }

    /// `len_bytes` bytes that touch the guard page at `edge`.
    pub(super) fn target(&mut self, edge: Edge, len_bytes: usize) -> Target<'_> {
        let start = self.start(edge, len_bytes);
        // SAFETY: within the usable pages, and `self` is borrowed for as long.
        unsafe { Target::from_raw(start, len_bytes) }
    }

    /// The same bytes for reading.
    pub(super) fn source(&self, edge: Edge, len_bytes: usize) -> Source<'_> {
        let start = self.start(edge, len_bytes);
        // SAFETY: within the usable pages, and `self` is borrowed for as long.
        unsafe { Source::from_raw(start, len_bytes) }
    }

    fn start(&self, edge: Edge, len_bytes: usize) -> *mut u8 {
        assert!(len_bytes <= self.usable_bytes);
        let skip_bytes = match edge {
            Edge::Before => 0,
            Edge::Behind => self.usable_bytes - len_bytes,
        };
        self.map.wrapping_add(self.page_bytes + skip_bytes)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping of the constructor, which nothing refers to any more.
        unsafe { munmap(self.map.cast(), self.usable_bytes + 2 * self.page_bytes) }.unwrap();
    }
}

//! The mapped bytes of a backing: the only place that holds their address.
//!
//! Other processes and other threads change these bytes at any time, so no `&[u8]` or `&mut [u8]` ever points into them.
//! This file gives out [`Source`] and [`Target`], which carry raw pointers, and nothing else. Overlap between our own
//! threads is not ruled here but by the range lock of the volume.
//!
//! A file is mapped with room to spare behind its end, so that it can grow without moving: address space costs nothing.
//! Nothing touches the room, because every range is checked against the backing's length first.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr;

use memmap2::{MmapOptions, MmapRaw};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use super::bitmap::Bitmap;
use super::options::Access;
use super::persist;
use super::sigbus::Registration;
use crate::barrier;
use crate::memory::{Source, Target};

/// A shared mapping that is registered with the SIGBUS handler. Ranges are bytes from its start.
#[derive(Debug)]
pub(super) struct Mapping {
    // The order of the fields is the order of their end: the handler forgets the mapping before the memory goes.
    registration: Registration,
    bad_pages: Bitmap,
    page_bytes: usize,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Ordinary(MmapRaw),
    Direct(DirectMemory),
}

impl Memory {
    fn start(&self) -> *mut u8 {
        match self {
            Self::Ordinary(memory) => memory.as_mut_ptr(),
            Self::Direct(memory) => memory.start,
        }
    }

    fn len_bytes(&self) -> usize {
        match self {
            Self::Ordinary(memory) => memory.len(),
            Self::Direct(memory) => memory.len_bytes,
        }
    }
}

/// A mapping made with flags that memmap2 does not offer.
#[derive(Debug)]
struct DirectMemory {
    start: *mut u8,
    len_bytes: usize,
}

// SAFETY: the memory belongs to this value, and is reached through raw pointers only.
unsafe impl Send for DirectMemory {}
// SAFETY: sharing the address allows nothing that sending it does not.
unsafe impl Sync for DirectMemory {}

impl Drop for DirectMemory {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `Mapping::direct`, and nothing that borrowed it is left.
        let unmapped = unsafe { munmap(self.start.cast::<c_void>(), self.len_bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping: {unmapped:?}");
    }
}

impl Mapping {
    /// Maps `len_bytes` of a file or block device through the page cache, shared.
    pub(super) fn ordinary(file: &File, access: Access, len_bytes: usize) -> io::Result<Self> {
        let mut options = MmapOptions::new();
        options.len(len_bytes).no_reserve_swap();
        let memory = match access {
            Access::ReadOnly => options.map_raw_read_only(file),
            Access::ReadWrite => options.map_raw(file),
        }?;
        Self::register(Memory::Ordinary(memory), rustix::param::page_size())
    }

    /// Maps `len_bytes` of a DAX file or device with `MAP_SYNC`: a store fault returns only when the file system's
    /// metadata is durable. `page_bytes` is the smallest piece that can be mapped over.
    pub(super) fn direct(file: &File, access: Access, len_bytes: usize, page_bytes: usize) -> io::Result<Self> {
        let protection = match access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let flags = MapFlags::SHARED_VALIDATE | MapFlags::SYNC;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { mmap(ptr::null_mut(), len_bytes, protection, flags, file, 0) }?;
        Self::register(Memory::Direct(DirectMemory { start: start.cast(), len_bytes }), page_bytes)
    }

    /// Anonymous zeroed memory that stands for a medium in tests.
    pub(super) fn anonymous(len_bytes: usize) -> io::Result<Self> {
        let memory = MmapOptions::new().len(len_bytes).no_reserve_swap().map_anon()?.into();
        Self::register(Memory::Ordinary(memory), rustix::param::page_size())
    }

    fn register(memory: Memory, page_bytes: usize) -> io::Result<Self> {
        let bad_pages = Bitmap::new(memory.len_bytes().div_ceil(page_bytes) + 1)?;
        // SAFETY: the memory and the bitmap outlive the registration by the order of the fields, and this file makes no
        // reference into the memory.
        let registration =
            unsafe { Registration::new(memory.start(), memory.len_bytes(), page_bytes, bad_pages.words()) }?;
        Ok(Self { registration, bad_pages, page_bytes, memory })
    }

    /// Bytes mapped, at least as many as the backing has.
    pub(super) fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }

    /// The bytes at `range`, for reading.
    pub(super) fn source(&self, range: &Range<usize>) -> Source<'_> {
        let start = self.address(range);
        // SAFETY: the range is mapped and readable as long as `self` is borrowed, and everyone uses raw pointers.
        unsafe { Source::from_raw(start, range.len()) }
    }

    /// The bytes at `range`, for writing. The caller has opened the backing for writing.
    #[inline]
    pub(super) fn target(&self, range: &Range<usize>) -> Target<'_> {
        let start = self.address(range);
        // SAFETY: the range is mapped and writable as long as `self` is borrowed, and everyone uses raw pointers.
        unsafe { Target::from_raw(start, range.len()) }
    }

    /// The first byte of the first bad page that `range` touches, as far as accesses so far have found.
    ///
    /// Called after an access, it tells whether the access was sound. The barrier puts the access before the question even
    /// for stores, so that a store that went to a covered page cannot miss the mark: the handler has the other half of it
    /// between marking a page and covering it.
    #[inline]
    pub(super) fn first_bad(&self, range: &Range<usize>) -> Option<usize> {
        barrier::light();
        if self.registration.faults() == 0 { None } else { self.look_up(range) }
    }

    fn look_up(&self, range: &Range<usize>) -> Option<usize> {
        if range.is_empty() {
            return None;
        }
        let pages = range.start / self.page_bytes..range.end.div_ceil(self.page_bytes);
        if self.bad_pages.contains(self.len_bytes().div_ceil(self.page_bytes)) {
            return Some(pages.start * self.page_bytes);
        }
        Some(self.bad_pages.first_in(pages)? * self.page_bytes)
    }

    /// Starts the write-back of the cache lines of `range`.
    #[inline]
    pub(super) fn write_back(&self, range: &Range<usize>) {
        let start = self.address(range);
        // SAFETY: the range is mapped and readable.
        unsafe { persist::write_back(start, range.len()) };
    }

    /// Writes the pages of `range` to the medium and waits (`msync`).
    pub(super) fn write_pages(&self, range: &Range<usize>) -> Result<(), Errno> {
        let page_bytes = rustix::param::page_size();
        let pages = range.start - range.start % page_bytes..range.end;
        let start = self.address(&pages);
        // SAFETY: the range is mapped and begins at a page; msync changes no byte of it.
        unsafe { msync(start.cast::<c_void>(), pages.len(), MsyncFlags::SYNC) }
    }

    #[inline]
    fn address(&self, range: &Range<usize>) -> *mut u8 {
        let len_bytes = self.memory.len_bytes();
        assert!(range.start <= range.end && range.end <= len_bytes, "{range:?} is outside of {len_bytes} mapped bytes");
        // SAFETY: the range was checked, so the address is within (or one past) the mapping.
        unsafe { self.memory.start().add(range.start) }
    }
}

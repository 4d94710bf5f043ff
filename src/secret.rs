//! Key memory: pages that are locked in RAM, left out of core dumps, emptied in a forked child and wiped on drop.
//!
//! Every long-lived secret (volume key, wrapping key, expanded key schedule, passphrase) lives in a [`SecretBytes`] or a
//! [`SecretBox`], each on pages of its own. Neither is `Clone`, and `Debug` prints no byte. [`VolumeKey`] is the one key
//! type that both the on-media layer and the cipher know.
//!
//! Locking needs `RLIMIT_MEMLOCK`; where the limit refuses, the secret still works and [`lock_refused`] says so, for the
//! program to report. Hardware register state and the stack of a running kernel are outside of what this can promise;
//! [`with_wiped_stack`] clears both where a key was set up.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::mem::{align_of, size_of};
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

static LOCK_REFUSED: AtomicBool = AtomicBool::new(false);

/// Whether the kernel has refused to lock any secret in RAM so far (see `ulimit -l`).
#[must_use]
pub fn lock_refused() -> bool {
    LOCK_REFUSED.load(Ordering::Relaxed)
}

/// What keys may take of the limit on locked memory, in bytes.
const KEPT_FOR_KEYS_BYTES: u64 = 64 << 20;

/// Whether `len_bytes` of data may be locked in RAM and enough of the limit is left for keys.
#[must_use]
pub fn data_may_be_locked(len_bytes: usize) -> bool {
    let limit = getrlimit(Resource::Memlock).current;
    let privileged = || capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    limit.is_none_or(|limit| limit >= (len_bytes as u64).saturating_add(KEPT_FOR_KEYS_BYTES)) || privileged()
}

/// Bytes of stack that [`scrub_stack`] overwrites: the largest frame of an AES-XTS kernel (3.2 KiB), the largest one of what
/// calls it (4.3 KiB, where there are holes), and smaller ones between. The search through memory in `tests/dax_lock.rs` finds
/// what it leaves.
/// Compiled without optimisation, every small function of a kernel has a frame of its own.
const SCRUB_BYTES: usize = if cfg!(debug_assertions) { 32 << 10 } else { 10 << 10 };

/// Overwrites the stack below the caller's frame, where functions that have returned may have left round keys and data
/// that the compiler had spilled there.
#[inline(never)]
pub(crate) fn scrub_stack() {
    let mut bytes = [0_u8; SCRUB_BYTES];
    std::hint::black_box(&mut bytes);
}

/// How much of the stack is overwritten by [`with_wiped_stack`], in bytes: more than the frames of any key derivation or key
/// expansion take.
const WIPED_STACK_BYTES: usize = 64 << 10;

/// Runs `f`, which handles a secret, and overwrites the stack and the vector registers that it used: compilers leave copies
/// on the stack, and the dynamic linker and signals put there what is left in registers. Nothing else would ever wipe it.
pub fn with_wiped_stack<R>(f: impl FnOnce() -> R) -> R {
    let result = in_frames_of_its_own(f);
    clear_vector_registers();
    wipe_stack();
    result
}

/// Clears the registers that round keys are in; what cannot be cleared, nothing here uses.
fn clear_vector_registers() {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has the feature.
            unsafe { clear_zmm16_to_31() };
        }
        if is_x86_feature_detected!("avx") {
            // SAFETY: the CPU has the feature.
            unsafe { std::arch::x86_64::_mm256_zeroall() };
        }
    }
}

/// The upper half of the AVX-512 registers, which `vzeroall` leaves alone.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn clear_zmm16_to_31() {
    macro_rules! clear {
        ($($register:tt)*) => {
            // SAFETY: the registers are declared as overwritten; neither memory nor flags are touched.
            unsafe {
                std::arch::asm!(
                    $(concat!("vpxord ", $register, ", ", $register, ", ", $register),)*
                    $(out($register) _,)*
                    options(nomem, nostack, preserves_flags)
                );
            }
        };
    }
    clear!("zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22" "zmm23");
    clear!("zmm24" "zmm25" "zmm26" "zmm27" "zmm28" "zmm29" "zmm30" "zmm31");
}

#[inline(never)]
fn in_frames_of_its_own<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[inline(never)]
fn wipe_stack() {
    let mut frames = [0_u8; WIPED_STACK_BYTES];
    frames.zeroize();
    std::hint::black_box(&mut frames);
}

/// Why bytes cannot be a volume key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// The length is that of neither key size.
    #[error("a volume key has {len_bytes} bytes, but must have 32 (AES-128-XTS) or 64 (AES-256-XTS)")]
    Length {
        /// Bytes given.
        len_bytes: usize,
    },
    /// Data half and tweak half are the same (NIST SP 800-38E via FIPS 140 IG C.I: Key_1 != Key_2).
    #[error("the data half and the tweak half of the volume key are equal, which weakens XTS")]
    EqualHalves,
    /// The kernel's random number generator failed.
    #[error("the kernel's random number generator failed")]
    Random(#[source] getrandom::Error),
}

/// Anonymous private pages with the protections of the module's head.
struct LockedPages {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the pages belong to this value alone, as a Box's memory does.
unsafe impl Send for LockedPages {}
// SAFETY: shared access reads only.
unsafe impl Sync for LockedPages {}

impl LockedPages {
    /// Maps zeroed pages for `len_bytes` bytes (one page for none) and locks them.
    ///
    /// # Panics
    ///
    /// Panics when the address space or memory is exhausted, as an allocation does.
    fn new(len_bytes: usize) -> Self {
        Self::try_new(len_bytes).unwrap_or_else(|error| panic!("no memory for a secret of {len_bytes} bytes: {error}"))
    }

    /// [`Self::new`], where being without memory is an error.
    fn try_new(len_bytes: usize) -> io::Result<Self> {
        let pages = Self::map(len_bytes)?;
        if !pages.lock() {
            LOCK_REFUSED.store(true, Ordering::Relaxed);
        }
        Ok(pages)
    }

    /// Maps zeroed pages that are not dumped and not inherited, and not yet locked.
    fn map(len_bytes: usize) -> rustix::io::Result<Self> {
        let page_bytes = rustix::param::page_size();
        let len_bytes = len_bytes.max(1).checked_next_multiple_of(page_bytes).ok_or(rustix::io::Errno::NOMEM)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            mmap_anonymous(ptr::null_mut(), len_bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }?;
        for advice in [Advice::LinuxDontDump, Advice::LinuxWipeOnFork] {
            // SAFETY: neither advice changes the content that this process sees.
            let advised = unsafe { madvise(start, len_bytes, advice) };
            debug_assert!(advised.is_ok(), "madvise {advice:?} on private anonymous memory: {advised:?}");
        }
        let start = NonNull::new(start.cast::<u8>()).expect("mmap never returns null");
        Ok(Self { start, len_bytes })
    }

    /// Locks the pages in RAM. Whether the limit permits it.
    fn lock(&self) -> bool {
        // SAFETY: the range was mapped by `map` and is owned.
        unsafe { mlock(self.start.as_ptr().cast::<c_void>(), self.len_bytes) }.is_ok()
    }
}

impl Drop for LockedPages {
    fn drop(&mut self) {
        let words = self.start.cast::<u64>();
        // SAFETY: the pages are owned, mapped, writable and a whole number of words; nobody borrows them any more.
        unsafe { std::slice::from_raw_parts_mut(words.as_ptr(), self.len_bytes / size_of::<u64>()) }.zeroize();
        // SAFETY: the range is exactly the one mapped in `new`; nothing refers to it after this.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.len_bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of our own pages: {unmapped:?}");
    }
}

/// Secret bytes of any length, page aligned. Compare them with [`ConstantTimeEq`] only.
pub struct SecretBytes {
    pages: LockedPages,
    len_bytes: usize,
}

impl SecretBytes {
    /// `len_bytes` zero bytes, to be filled in place.
    ///
    /// # Panics
    ///
    /// Panics when memory is exhausted.
    #[must_use]
    pub fn zeroed(len_bytes: usize) -> Self {
        Self { pages: LockedPages::new(len_bytes), len_bytes }
    }

    /// `len_bytes` zero bytes for data that passes through, with everything that secrets have but, unless `locked`, the lock
    /// in RAM: data is large, and must not use up the limit that keys need.
    ///
    /// # Panics
    ///
    /// Panics when memory is exhausted.
    #[must_use]
    pub fn for_data(len_bytes: usize, locked: bool) -> Self {
        let pages = LockedPages::map(len_bytes)
            .unwrap_or_else(|error| panic!("no memory for a buffer of {len_bytes} bytes: {error}"));
        // A refusal costs the lock alone.
        let _ = locked && pages.lock();
        Self { pages, len_bytes }
    }

    /// [`Self::zeroed`], where being without memory is no reason to end.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory is exhausted.
    pub fn try_zeroed(len_bytes: usize) -> io::Result<Self> {
        Ok(Self { pages: LockedPages::try_new(len_bytes)?, len_bytes })
    }

    /// A copy of `bytes`; wiping the original is the caller's part.
    ///
    /// # Panics
    ///
    /// Panics when memory is exhausted.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut secret = Self::zeroed(bytes.len());
        secret.copy_from_slice(bytes);
        secret
    }

    /// `len_bytes` bytes from the kernel's random number generator.
    ///
    /// # Errors
    ///
    /// [`KeyError::Random`] when the generator fails.
    ///
    /// # Panics
    ///
    /// Panics when memory is exhausted.
    pub fn random(len_bytes: usize) -> Result<Self, KeyError> {
        let mut secret = Self::zeroed(len_bytes);
        getrandom::fill(&mut secret).map_err(KeyError::Random)?;
        Ok(secret)
    }

    /// Shortens to `len_bytes`, wiping the rest; no effect when already as short.
    pub fn truncate(&mut self, len_bytes: usize) {
        if len_bytes < self.len_bytes {
            self[len_bytes..].zeroize();
            self.len_bytes = len_bytes;
        }
    }
}

impl Deref for SecretBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the pages hold at least `len_bytes` initialised bytes and live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.pages.start.as_ptr(), self.len_bytes) }
    }
}

impl DerefMut for SecretBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pages.start.as_ptr(), self.len_bytes) }
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.len_bytes)
    }
}

/// A value on secret pages, at the start of a page. The value's own drop runs before the pages are wiped.
pub struct SecretBox<T> {
    pages: LockedPages,
    value: NonNull<T>,
}

// SAFETY: the box owns its value.
unsafe impl<T: Send> Send for SecretBox<T> {}
// SAFETY: a shared box gives shared access to its value only.
unsafe impl<T: Sync> Sync for SecretBox<T> {}

impl<T> SecretBox<T> {
    /// Moves `value` to secret pages. The move may leave a copy on the stack: prefer [`Self::zeroed`] and fill in place
    /// where the type permits.
    ///
    /// # Panics
    ///
    /// Panics when memory is exhausted or `T` needs more than page alignment.
    #[must_use]
    pub fn new(value: T) -> Self {
        assert!(align_of::<T>() <= rustix::param::page_size(), "alignment above a page");
        let pages = LockedPages::new(size_of::<T>());
        let slot = pages.start.cast::<T>();
        // SAFETY: the pages are large enough, aligned (checked above) and owned.
        unsafe { slot.as_ptr().write(value) };
        Self { pages, value: slot }
    }
}

impl<const N: usize> SecretBox<[u8; N]> {
    /// `N` zero bytes, to be filled in place.
    ///
    /// # Panics
    ///
    /// Panics when memory is exhausted.
    #[must_use]
    pub fn zeroed() -> Self {
        let pages = LockedPages::new(N);
        let value = pages.start.cast::<[u8; N]>();
        Self { pages, value }
    }
}

impl<T> Deref for SecretBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the value was written by the constructor (or is an array of zero bytes) and lives as long as `self`.
        unsafe { self.value.as_ref() }
    }
}

impl<T> DerefMut for SecretBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow exclusive.
        unsafe { self.value.as_mut() }
    }
}

impl<T> Drop for SecretBox<T> {
    fn drop(&mut self) {
        // SAFETY: the value is initialised and dropped once, here; the pages are freed after it.
        unsafe { ptr::drop_in_place(self.value.as_ptr()) };
    }
}

impl<T> fmt::Debug for SecretBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBox({} bytes)", self.pages.len_bytes.min(size_of::<T>()))
    }
}

/// What Argon2 works in. Its last block gives the derived key away, and its first ones the passphrase to whoever guesses:
/// the memory is not dumped, wiped on every way out, and locked where the limit permits it. A refusal does not count for
/// [`lock_refused`]: 256 MiB are more than most limits, and nothing stays in them.
pub(crate) struct KdfArena {
    pages: LockedPages,
    count: usize,
}

impl KdfArena {
    /// `count` blocks of zeros, `None` when there is no memory for them.
    pub(crate) fn new(count: usize) -> Option<Self> {
        const { assert!(align_of::<argon2::Block>() <= 4096, "a page is aligned for a block") };
        let pages = LockedPages::map(count.checked_mul(size_of::<argon2::Block>())?).ok()?;
        pages.lock();
        Some(Self { pages, count })
    }
}

impl AsMut<[argon2::Block]> for KdfArena {
    fn as_mut(&mut self) -> &mut [argon2::Block] {
        let blocks = self.pages.start.cast::<argon2::Block>();
        // SAFETY: the pages hold `count` blocks, are aligned for them, and zero bytes are a block; `&mut self` makes the
        // borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(blocks.as_ptr(), self.count) }
    }
}

/// There is no memory for a key derivation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory;

/// Fills `out` with the key that Argon2 derives from a passphrase, in memory of the kind above. What it leaves on the stack
/// is the caller's part ([`with_wiped_stack`]).
///
/// # Panics
///
/// Panics when the salt or the length of `out`, which the caller has checked, are impossible.
pub(crate) fn stretch(
    argon2: &argon2::Argon2<'_>,
    passphrase: &[u8],
    salt: &[u8],
    out: &mut [u8],
) -> Result<(), NoMemory> {
    let mut arena = KdfArena::new(argon2.params().block_count()).ok_or(NoMemory)?;
    let stretched = argon2.hash_password_into_with_memory(passphrase, salt, out, &mut arena);
    stretched.unwrap_or_else(|error| panic!("lengths and cost were checked: {error}"));
    Ok(())
}

/// The XTS key of a namespace: data half (Key_1 of IEEE 1619), then tweak half (Key_2), which differ.
pub struct VolumeKey(SecretBytes);

impl VolumeKey {
    /// Takes 32 bytes (AES-128-XTS) or 64 bytes (AES-256-XTS).
    ///
    /// # Errors
    ///
    /// [`KeyError::Length`] and [`KeyError::EqualHalves`].
    pub fn new(bytes: SecretBytes) -> Result<Self, KeyError> {
        let len_bytes = bytes.len();
        if len_bytes != 32 && len_bytes != 64 {
            return Err(KeyError::Length { len_bytes });
        }
        let (data, tweak) = bytes.split_at(len_bytes / 2);
        if bool::from(data.ct_eq(tweak)) {
            return Err(KeyError::EqualHalves);
        }
        Ok(Self(bytes))
    }

    /// A fresh random key of 32 or 64 bytes.
    ///
    /// # Errors
    ///
    /// [`KeyError::Length`] for another length, [`KeyError::Random`] when the kernel's generator fails.
    pub fn generate(len_bytes: usize) -> Result<Self, KeyError> {
        Self::new(SecretBytes::random(len_bytes)?)
    }

    /// Key_1, which encrypts data: 16 or 32 bytes.
    #[must_use]
    pub fn data_half(&self) -> &[u8] {
        &self.0[..self.0.len() / 2]
    }

    /// Key_2, which encrypts tweak values: as long as the data half.
    #[must_use]
    pub fn tweak_half(&self) -> &[u8] {
        &self.0[self.0.len() / 2..]
    }

    /// Both halves: 32 or 64 bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_another_length_is_refused() {
        for len_bytes in [0, 16, 31, 33, 48, 63, 65, 128] {
            let refused = VolumeKey::new(SecretBytes::random(len_bytes).unwrap()).unwrap_err();
            assert_eq!(refused, KeyError::Length { len_bytes });
        }
    }

    #[test]
    fn equal_halves_are_refused_and_one_bit_of_difference_is_enough() {
        for len_bytes in [32, 64] {
            let equal = SecretBytes::copy_of(&vec![7; len_bytes]);
            assert_eq!(VolumeKey::new(equal).unwrap_err(), KeyError::EqualHalves);
            let mut different = vec![7; len_bytes];
            different[len_bytes - 1] ^= 0x80;
            let key = VolumeKey::new(SecretBytes::copy_of(&different)).unwrap();
            assert_eq!(key.data_half().len(), len_bytes / 2);
            assert_ne!(key.data_half(), key.tweak_half());
        }
    }

    #[test]
    fn generated_keys_differ() {
        let (a, b) = (VolumeKey::generate(64).unwrap(), VolumeKey::generate(64).unwrap());
        assert_ne!(a.bytes(), b.bytes());
    }

    #[test]
    fn debug_prints_no_byte() {
        let key = VolumeKey::new(SecretBytes::copy_of(&(0xa0..0xe0).collect::<Vec<u8>>())).unwrap();
        assert_eq!(format!("{key:?}"), "VolumeKey(64 bytes)");
        assert_eq!(format!("{:?}", SecretBytes::copy_of(b"hunter2")), "SecretBytes(7 bytes)");
        assert_eq!(format!("{:?}", SecretBox::new([0xaa_u8; 16])), "SecretBox(16 bytes)");
    }

    #[test]
    fn truncate_wipes_what_it_cuts() {
        let mut secret = SecretBytes::copy_of(b"passphrase\n");
        secret.truncate(10);
        assert_eq!(&*secret, b"passphrase");
        secret.len_bytes = 11;
        assert_eq!(secret[10], 0);
    }

    #[test]
    fn a_boxed_value_is_dropped_once() {
        struct Counter<'a>(&'a std::cell::Cell<u32>);
        impl Drop for Counter<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let drops = std::cell::Cell::new(0);
        drop(SecretBox::new(Counter(&drops)));
        assert_eq!(drops.get(), 1);
    }
}

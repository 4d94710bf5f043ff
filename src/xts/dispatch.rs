//! The expanded key in the form that its backend reads, and the one place where kernels are called.
//!
//! A variant exists only when made from a [`Backend`] of its kind, which is proof that the CPU has what the kernel
//! needs: that is what makes the calls sound.
#![allow(unsafe_code)]

use super::backend::Kind;
use super::portable::PortableKey;
#[cfg(target_arch = "x86_64")]
use super::schedule::RoundKeys;
#[cfg(target_arch = "x86_64")]
use super::vaes512;
use super::{Backend, DataUnit, Direction};
use crate::memory::{Source, Store, Target};
use crate::secret::SecretBox;

/// A key expanded for one kernel.
pub(super) enum Schedule {
    Portable(SecretBox<PortableKey>),
    #[cfg(target_arch = "x86_64")]
    Vaes512(RoundKeys),
}

impl Schedule {
    pub(super) fn new(data: &[u8], tweak: &[u8], backend: Backend) -> Self {
        match backend.kind() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this kind of backend is proof of AES-NI and AVX.
            Kind::Vaes512 => Self::Vaes512(unsafe { RoundKeys::expand(data, tweak) }),
            _ => Self::Portable(PortableKey::boxed(data, tweak)),
        }
    }

    /// Blocks `first_block..` of the one unit whose 128-bit tweak is `tweak`.
    pub(super) fn blocks(
        &self,
        direction: Direction,
        tweak: u128,
        first_block: usize,
        src: Source<'_>,
        dst: Target<'_>,
        store: Store,
    ) {
        match self {
            Self::Portable(key) => key.blocks(direction, tweak, first_block, src, dst),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::Vaes512(keys) => unsafe { vaes512::blocks(keys, direction, tweak, first_block, src, dst, store) },
        }
    }

    /// Whole units, the first of which has tweak value `tweak`.
    pub(super) fn units(
        &self,
        direction: Direction,
        unit: DataUnit,
        tweak: u64,
        src: Source<'_>,
        dst: Target<'_>,
        store: Store,
    ) {
        match self {
            Self::Portable(key) => key.units(direction, unit, tweak, src, dst),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::Vaes512(keys) => unsafe { vaes512::units(keys, direction, unit, tweak, src, dst, store) },
        }
    }
}

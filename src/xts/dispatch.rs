//! The expanded key in the form that its backend reads, and the one place where kernels are called.
//!
//! A variant exists only when made from a [`Backend`] of its kind, which is proof that the CPU has what the kernel
//! needs: that is what makes the calls sound.
#![allow(unsafe_code)]

use super::backend::Kind;
use super::portable::PortableKey;
#[cfg(target_arch = "x86_64")]
use super::x86::{self, RoundKeys, aesni, vaes256, vaes512};
use super::{Backend, DataUnit, Direction, Pass};
use crate::memory::{Source, Store, Target};
use crate::secret::SecretBox;

/// A key expanded for one kernel.
pub(super) enum Schedule {
    Portable(SecretBox<PortableKey>),
    #[cfg(target_arch = "x86_64")]
    AesNi(RoundKeys),
    #[cfg(target_arch = "x86_64")]
    Vaes256(RoundKeys),
    #[cfg(target_arch = "x86_64")]
    Vaes512(RoundKeys),
}

impl Schedule {
    pub(super) fn new(data: &[u8], tweak: &[u8], backend: Backend) -> Self {
        match backend.kind() {
            Kind::Portable => Self::Portable(PortableKey::boxed(data, tweak)),
            #[cfg(target_arch = "aarch64")]
            Kind::Armv8 => Self::Portable(PortableKey::boxed(data, tweak)),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the kind is proof of AES-NI and AVX.
            Kind::AesNi => Self::AesNi(unsafe { RoundKeys::expand(data, tweak) }),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the kind is proof of AES-NI and AVX.
            Kind::Vaes256 => Self::Vaes256(unsafe { RoundKeys::expand(data, tweak) }),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the kind is proof of AES-NI and AVX.
            Kind::Vaes512 => Self::Vaes512(unsafe { RoundKeys::expand(data, tweak) }),
        }
    }

    /// Blocks `first_block..` of the one unit whose 128-bit tweak is `tweak`.
    pub(super) fn blocks(&self, tweak: u128, first_block: usize, pass: Pass<'_>) {
        match self {
            Self::Portable(key) => key.blocks(pass.direction, tweak, first_block, pass.src, pass.dst),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::AesNi(keys) => unsafe { aesni::blocks(keys, tweak, first_block, pass) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::Vaes256(keys) => unsafe { vaes256::blocks(keys, tweak, first_block, pass) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::Vaes512(keys) => unsafe { vaes512::blocks(keys, tweak, first_block, pass) },
        }
    }

    /// At most 64 bytes of one unit, from `first_block` on, stored through the cache.
    pub(super) fn line(&self, direction: Direction, tweak: u64, first_block: usize, src: Source<'_>, dst: Target<'_>) {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::Vaes512(keys) => unsafe { vaes512::line(keys, direction, tweak, first_block, src, dst) },
            _ => self.blocks(tweak.into(), first_block, Pass { direction, src, dst, store: Store::Cached }),
        }
    }

    /// Whole units, the first of which has tweak value `tweak`.
    pub(super) fn units(&self, unit: DataUnit, tweak: u64, pass: Pass<'_>) {
        match self {
            Self::Portable(key) => key.units(pass.direction, unit, tweak, pass.src, pass.dst),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::AesNi(keys) => unsafe { aesni::units(keys, unit, tweak, pass) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::Vaes256(keys) => unsafe { vaes256::units(keys, unit, tweak, pass) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the variant is proof of the CPU's features.
            Self::Vaes512(keys) => unsafe { vaes512::units(keys, unit, tweak, pass) },
        }
    }

    /// Orders non-temporal stores before everything that follows; nothing where the kernel has none.
    pub(super) fn fence(&self) {
        #[cfg(target_arch = "x86_64")]
        if !matches!(self, Self::Portable(_)) {
            x86::fence();
        }
    }
}

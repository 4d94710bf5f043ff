//! Which instructions encrypt: a value of [`Backend`] is proof that this CPU has them.
//!
//! The kind is private and every constructor asks the CPU, so safe code cannot reach a kernel that the CPU cannot run.
//! The environment variable `DAXCRYPT_XTS_BACKEND` overrides the choice, for tests and comparisons; it never widens it.

use std::env;
use std::fmt;

/// The environment variable that [`Backend::from_env`] reads.
const VARIABLE: &str = "DAXCRYPT_XTS_BACKEND";

/// Why a backend cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendError {
    /// No backend has that name.
    #[error("no AES-XTS backend is called {name:?}; there are portable, vaes512 and armv8")]
    Unknown {
        /// What was asked for.
        name: Box<str>,
    },
    /// The CPU lacks an instruction set.
    #[error("the AES-XTS backend {name} needs {feature}, which this CPU lacks")]
    Lacking {
        /// The backend asked for.
        name: &'static str,
        /// The first CPU feature that is missing, as /proc/cpuinfo spells it.
        feature: &'static str,
    },
}

/// The instructions that a key is used with.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Backend(Kind);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Vaes512,
    #[cfg(target_arch = "aarch64")]
    Armv8,
}

/// Every backend's name, best first within an architecture.
const NAMES: [&str; 3] = ["vaes512", "armv8", "portable"];

impl Backend {
    /// The fastest backend of this CPU.
    #[must_use]
    pub fn detect() -> Self {
        NAMES.iter().find_map(|name| Self::from_name(name).ok()).unwrap_or(Self(Kind::Portable))
    }

    /// Every backend of this CPU, the fastest first; `portable` is always there.
    #[must_use]
    pub fn available() -> Vec<Self> {
        NAMES.iter().filter_map(|name| Self::from_name(name).ok()).collect()
    }

    /// The backend called `portable`, `vaes512` (x86-64) or `armv8` (aarch64).
    ///
    /// `portable` and `armv8` run the same code over the `aes` crate, which picks the CPU's AES instructions by itself
    /// and constant-time software without them; `armv8` is the promise that the instructions are there.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unknown`] for another name, [`BackendError::Lacking`] when the CPU cannot run it.
    pub fn from_name(name: &str) -> Result<Self, BackendError> {
        match name {
            "portable" => Ok(Self(Kind::Portable)),
            "vaes512" => Self::vaes512(),
            "armv8" => Self::armv8(),
            _ => Err(BackendError::Unknown { name: name.into() }),
        }
    }

    /// The backend that the environment variable `DAXCRYPT_XTS_BACKEND` names, or [`Self::detect`] without it.
    ///
    /// # Errors
    ///
    /// As [`Self::from_name`].
    pub fn from_env() -> Result<Self, BackendError> {
        match env::var_os(VARIABLE) {
            Some(name) => Self::from_name(&name.to_string_lossy()),
            None => Ok(Self::detect()),
        }
    }

    /// The name that [`Self::from_name`] takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Vaes512 => "vaes512",
            #[cfg(target_arch = "aarch64")]
            Kind::Armv8 => "armv8",
        }
    }

    pub(super) const fn kind(self) -> Kind {
        self.0
    }

    #[cfg(target_arch = "x86_64")]
    fn vaes512() -> Result<Self, BackendError> {
        let features = [
            ("aes", is_x86_feature_detected!("aes")),
            ("avx", is_x86_feature_detected!("avx")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("vaes", is_x86_feature_detected!("vaes")),
            ("vpclmulqdq", is_x86_feature_detected!("vpclmulqdq")),
        ];
        match features.into_iter().find(|(_, present)| !present) {
            None => Ok(Self(Kind::Vaes512)),
            Some((feature, _)) => Err(BackendError::Lacking { name: "vaes512", feature }),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    const fn vaes512() -> Result<Self, BackendError> {
        Err(BackendError::Lacking { name: "vaes512", feature: "the x86-64 instruction set" })
    }

    #[cfg(target_arch = "aarch64")]
    fn armv8() -> Result<Self, BackendError> {
        if std::arch::is_aarch64_feature_detected!("aes") {
            Ok(Self(Kind::Armv8))
        } else {
            Err(BackendError::Lacking { name: "armv8", feature: "aes" })
        }
    }

    #[cfg(not(target_arch = "aarch64"))]
    const fn armv8() -> Result<Self, BackendError> {
        Err(BackendError::Lacking { name: "armv8", feature: "the aarch64 instruction set" })
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backend({})", self.name())
    }
}

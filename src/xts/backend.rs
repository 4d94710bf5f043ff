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
    #[error("no AES-XTS backend is called {name:?}; there are vaes512, vaes256, aesni, armv8 and portable")]
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
    AesNi,
    #[cfg(target_arch = "x86_64")]
    Vaes256,
    #[cfg(target_arch = "x86_64")]
    Vaes512,
    #[cfg(target_arch = "aarch64")]
    Armv8,
}

/// Every backend's name, best first within an architecture.
const NAMES: [&str; 5] = ["vaes512", "vaes256", "aesni", "armv8", "portable"];

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

    /// The backend called `portable`, `aesni`, `vaes256`, `vaes512` (x86-64) or `armv8` (aarch64).
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
            "aesni" => Self::aesni(),
            "vaes256" => Self::vaes256(),
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
            Kind::AesNi => "aesni",
            #[cfg(target_arch = "x86_64")]
            Kind::Vaes256 => "vaes256",
            #[cfg(target_arch = "x86_64")]
            Kind::Vaes512 => "vaes512",
            #[cfg(target_arch = "aarch64")]
            Kind::Armv8 => "armv8",
        }
    }

    /// Whether at most 64 bytes of one data unit go through it in registers alone, so that nothing of them is left on the
    /// stack.
    #[must_use]
    pub(crate) const fn keeps_lines_in_registers(self) -> bool {
        match self.kind() {
            #[cfg(target_arch = "x86_64")]
            // Compiled without optimisation, nothing stays in registers.
            Kind::Vaes512 => !cfg!(debug_assertions),
            _ => false,
        }
    }

    pub(super) const fn kind(self) -> Kind {
        self.0
    }

    #[cfg(target_arch = "x86_64")]
    fn aesni() -> Result<Self, BackendError> {
        let features = [
            ("aes", is_x86_feature_detected!("aes")),
            ("avx", is_x86_feature_detected!("avx")),
            ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
        ];
        Self::proven(Kind::AesNi, &features)
    }

    #[cfg(target_arch = "x86_64")]
    fn vaes256() -> Result<Self, BackendError> {
        let features = [
            ("aes", is_x86_feature_detected!("aes")),
            ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
            ("avx2", is_x86_feature_detected!("avx2")),
            ("vaes", is_x86_feature_detected!("vaes")),
            ("vpclmulqdq", is_x86_feature_detected!("vpclmulqdq")),
        ];
        Self::proven(Kind::Vaes256, &features)
    }

    #[cfg(target_arch = "x86_64")]
    fn vaes512() -> Result<Self, BackendError> {
        let features = [
            ("aes", is_x86_feature_detected!("aes")),
            ("avx", is_x86_feature_detected!("avx")),
            ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("vaes", is_x86_feature_detected!("vaes")),
            ("vpclmulqdq", is_x86_feature_detected!("vpclmulqdq")),
        ];
        Self::proven(Kind::Vaes512, &features)
    }

    /// `kind`, if every feature that it needs is present.
    #[cfg(target_arch = "x86_64")]
    fn proven(kind: Kind, features: &[(&'static str, bool)]) -> Result<Self, BackendError> {
        match features.iter().find(|(_, present)| !present) {
            None => Ok(Self(kind)),
            Some((feature, _)) => Err(BackendError::Lacking { name: Self(kind).name(), feature }),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    const fn aesni() -> Result<Self, BackendError> {
        Err(BackendError::Lacking { name: "aesni", feature: "the x86-64 instruction set" })
    }

    #[cfg(not(target_arch = "x86_64"))]
    const fn vaes256() -> Result<Self, BackendError> {
        Err(BackendError::Lacking { name: "vaes256", feature: "the x86-64 instruction set" })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_is_called_what_it_is_asked_for() {
        for backend in Backend::available() {
            assert_eq!(Backend::from_name(backend.name()), Ok(backend));
            assert_eq!(backend.to_string(), backend.name());
            assert_eq!(format!("{backend:?}"), format!("Backend({})", backend.name()));
        }
        assert_eq!(Backend::available().first(), Some(&Backend::detect()));
        assert_eq!(Backend::available().last().map(|backend| backend.name()), Some("portable"));
    }

    #[test]
    fn an_unknown_name_is_an_error_that_lists_the_known_ones() {
        for name in ["", "VAES512", "avx512"] {
            let error = Backend::from_name(name).unwrap_err();
            assert_eq!(error, BackendError::Unknown { name: name.into() });
            for known in NAMES {
                assert!(error.to_string().contains(known), "{error}");
            }
        }
    }

    #[test]
    fn a_backend_of_another_architecture_says_so() {
        let foreign = if cfg!(target_arch = "aarch64") { ["aesni", "vaes512"] } else { ["armv8", "armv8"] };
        for name in foreign {
            let error = Backend::from_name(name).unwrap_err();
            assert!(matches!(error, BackendError::Lacking { feature, .. } if feature.contains("instruction set")));
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_first_feature_that_is_missing_is_named() {
        let features = [("aes", true), ("avx2", true), ("vaes", false), ("vpclmulqdq", false)];
        let error = Backend::proven(Kind::Vaes256, &features).unwrap_err();
        assert_eq!(error, BackendError::Lacking { name: "vaes256", feature: "vaes" });
        assert_eq!(error.to_string(), "the AES-XTS backend vaes256 needs vaes, which this CPU lacks");
        assert_eq!(Backend::proven(Kind::Vaes256, &features[..2]), Ok(Backend(Kind::Vaes256)));
    }
}

//! From what the user knows or has to the key that unwraps a slot.
//!
//! A passphrase goes through Argon2id (RFC 9106), whose cost a header may name only within [`KdfCost::check`]: the check
//! comes before any memory is allocated. A key file is high-entropy already and goes through HKDF (RFC 5869) alone. Both
//! end in HKDF-SHA256 with an info string of their own, so that the same bytes used as passphrase and as key file give
//! unrelated keys.
//!
//! Passphrases are bytes: no Unicode normalisation, no trimming, NUL and newline allowed. Stripping the newline that ends
//! a passphrase file is the program's matter.

use std::fmt;

use hkdf::Hkdf;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::secret::{self, SecretBox, SecretBytes};

/// Fewest bytes of a key file: less could not hold 256 bits of entropy.
pub const KEY_FILE_BYTES_MIN: usize = 32;

/// Most bytes of a key file.
pub const KEY_FILE_BYTES_MAX: usize = 8 << 20;

/// Most bytes of a passphrase.
pub const PASSPHRASE_BYTES_MAX: usize = 64 << 10;

/// Bytes of salt in a slot.
pub(super) const SALT_BYTES: usize = 32;

const INFO_PASSPHRASE: &[u8] = b"daxcrypt v1 passphrase slot";
const INFO_KEY_FILE: &[u8] = b"daxcrypt v1 key file slot";

/// A 256-bit key that wraps or authenticates; never used for data.
pub(super) type Key256 = SecretBox<[u8; 32]>;

/// What a user unlocks with.
pub enum Credential {
    /// Something to remember, of low entropy: Argon2id makes guessing expensive.
    Passphrase(SecretBytes),
    /// The exact bytes of a key file, of full entropy: at least 32 bytes.
    KeyFile(SecretBytes),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passphrase(_) => "Passphrase",
            Self::KeyFile(_) => "KeyFile",
        })
    }
}

/// Why bytes cannot be a credential, or could not be used as one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CredentialError {
    /// An empty passphrase protects nothing.
    #[error("the passphrase is empty")]
    PassphraseEmpty,
    /// The passphrase is too long.
    #[error("the passphrase has {len_bytes} bytes, more than {max_bytes}")]
    PassphraseLength {
        /// Bytes given.
        len_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// The key file is too short or too long.
    #[error("the key file has {len_bytes} bytes, but must have {min_bytes} to {max_bytes}")]
    KeyFileLength {
        /// Bytes given.
        len_bytes: usize,
        /// Fewest bytes.
        min_bytes: usize,
        /// Most bytes.
        max_bytes: usize,
    },
    /// Argon2id could not get its memory.
    #[error("deriving the key from the passphrase needs {memory_kib} KiB of memory, which could not be had")]
    Memory {
        /// Memory that the slot's cost names.
        memory_kib: u32,
    },
}

/// What Argon2id costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KdfCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Number of passes over the memory.
    pub time: u32,
    /// Degree of parallelism. This implementation computes lanes one after the other.
    pub lanes: u32,
}

/// A cost outside of the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Argon2id {name} of {value} is outside of {min}..={max}")]
pub struct CostError {
    /// The parameter.
    pub name: &'static str,
    /// Its value.
    pub value: u32,
    /// The least value allowed.
    pub min: u32,
    /// The greatest value allowed.
    pub max: u32,
}

/// What key derivation costs in time: KiB of memory x passes over it, a microsecond each on a slow machine. PBKDF2 has four
/// iterations for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KdfWork(pub u64);

impl KdfWork {
    /// The most that one unlocking does, over all slots that it may have to try: 256 GiB x passes, about four minutes. The
    /// bounds of a single cost alone would let a header that nobody has authenticated ask for an hour a slot.
    pub const UNLOCK_MAX: Self = Self(256 << 20);

    /// Refuses slots (number and work) that are more together than one unlocking does.
    ///
    /// # Errors
    ///
    /// [`WorkError`] names the most expensive one.
    pub fn check(slots: impl IntoIterator<Item = (u32, Self)>) -> Result<(), WorkError> {
        let (mut total, mut most) = (Self(0), (0, Self(0)));
        for (id, work) in slots {
            total.0 = total.0.saturating_add(work.0);
            if work > most.1 {
                most = (id, work);
            }
        }
        if total <= Self::UNLOCK_MAX { Ok(()) } else { Err(WorkError { slot: most.0, slot_work: most.1, total }) }
    }
}

impl fmt::Display for KdfWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} GiB x passes", self.0.div_ceil(1 << 20))
    }
}

/// Slots whose key derivation would take too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "key slot {slot} asks for a key derivation of {slot_work}, and all slots that one unlocking tries for {total}: more than \
     {} is refused",
    KdfWork::UNLOCK_MAX
)]
pub struct WorkError {
    /// The most expensive slot.
    pub slot: u32,
    /// What it costs.
    pub slot_work: KdfWork,
    /// What all cost together.
    pub total: KdfWork,
}

impl KdfCost {
    /// What it costs in time.
    #[must_use]
    pub const fn work(&self) -> KdfWork {
        KdfWork(self.memory_kib as u64 * self.time as u64)
    }

    /// Most memory that a header may ask for, in KiB: 4 GiB.
    pub const MEMORY_KIB_MAX: u32 = 4 << 20;
    /// Most passes that a header may ask for.
    pub const TIME_MAX: u32 = 1024;
    /// Most lanes that a header may ask for.
    pub const LANES_MAX: u32 = 64;
    /// Least memory per lane in KiB (RFC 9106, section 3.1).
    pub const MEMORY_KIB_PER_LANE_MIN: u32 = 8;
    /// The lowest cost there is, for passphrases that are random keys in disguise, and for tests.
    pub const LEAST: Self = Self { memory_kib: Self::MEMORY_KIB_PER_LANE_MIN, time: 1, lanes: 1 };

    /// Checks the bounds.
    ///
    /// # Errors
    ///
    /// [`CostError`] names the first parameter that is out of its bounds.
    pub const fn check(&self) -> Result<(), CostError> {
        if let Err(error) = check_bounds("lanes", self.lanes, 1, Self::LANES_MAX) {
            return Err(error);
        }
        if let Err(error) = check_bounds("time", self.time, 1, Self::TIME_MAX) {
            return Err(error);
        }
        let memory_min = Self::MEMORY_KIB_PER_LANE_MIN * self.lanes;
        check_bounds("memory in KiB", self.memory_kib, memory_min, Self::MEMORY_KIB_MAX)
    }
}

impl Default for KdfCost {
    /// Close to one second (0.8 s on one core of an AMD EPYC server): 256 MiB, 3 passes. One lane, since the lanes are computed one after the
    /// other here, and more of them would only help a guesser with more cores.
    fn default() -> Self {
        Self { memory_kib: 256 << 10, time: 3, lanes: 1 }
    }
}

const fn check_bounds(name: &'static str, value: u32, min: u32, max: u32) -> Result<(), CostError> {
    if value < min || value > max { Err(CostError { name, value, min, max }) } else { Ok(()) }
}

/// How a slot turns a credential into its wrapping key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Kdf {
    /// A passphrase slot.
    Argon2id(KdfCost),
    /// A key-file slot.
    HkdfSha256,
}

impl Kdf {
    /// What it costs in time.
    pub(super) const fn work(&self) -> KdfWork {
        match self {
            Self::Argon2id(cost) => cost.work(),
            Self::HkdfSha256 => KdfWork(0),
        }
    }

    /// The kind of slot for a credential; the cost counts for a passphrase.
    pub(super) const fn for_credential(credential: &Credential, cost: KdfCost) -> Self {
        match credential {
            Credential::Passphrase(_) => Self::Argon2id(cost),
            Credential::KeyFile(_) => Self::HkdfSha256,
        }
    }

    /// Whether the credential is of this slot's kind.
    #[must_use]
    pub const fn suits(&self, credential: &Credential) -> bool {
        matches!(
            (self, credential),
            (Self::Argon2id(_), Credential::Passphrase(_)) | (Self::HkdfSha256, Credential::KeyFile(_))
        )
    }
}

/// Refuses a credential that could not protect anything.
pub(super) fn check_credential(credential: &Credential) -> Result<(), CredentialError> {
    match credential {
        Credential::Passphrase(bytes) if bytes.is_empty() => Err(CredentialError::PassphraseEmpty),
        Credential::Passphrase(bytes) if bytes.len() > PASSPHRASE_BYTES_MAX => {
            Err(CredentialError::PassphraseLength { len_bytes: bytes.len(), max_bytes: PASSPHRASE_BYTES_MAX })
        }
        Credential::KeyFile(bytes) if !(KEY_FILE_BYTES_MIN..=KEY_FILE_BYTES_MAX).contains(&bytes.len()) => {
            Err(CredentialError::KeyFileLength {
                len_bytes: bytes.len(),
                min_bytes: KEY_FILE_BYTES_MIN,
                max_bytes: KEY_FILE_BYTES_MAX,
            })
        }
        _ => Ok(()),
    }
}

/// The wrapping key of a slot. The cost must have been checked, and the kind of the credential must suit.
pub(super) fn derive_wrapping_key(
    credential: &Credential,
    kdf: &Kdf,
    salt: &[u8; SALT_BYTES],
) -> Result<Key256, CredentialError> {
    match (credential, kdf) {
        (Credential::Passphrase(passphrase), Kdf::Argon2id(cost)) => {
            let stretched = stretch(passphrase, cost, salt)?;
            Ok(derive_key(salt, &*stretched, INFO_PASSPHRASE))
        }
        (Credential::KeyFile(bytes), Kdf::HkdfSha256) => Ok(derive_key(salt, bytes, INFO_KEY_FILE)),
        _ => unreachable!("the caller offers a slot only a credential that suits its kind"),
    }
}

/// HKDF-SHA256 (RFC 5869), extract and expand, to 32 bytes.
pub(super) fn derive_key(salt: &[u8], key_material: &[u8], info: &[u8]) -> Key256 {
    let mut key = Key256::zeroed();
    Hkdf::<Sha256>::new(Some(salt), key_material).expand(info, &mut *key).expect("HKDF-SHA256 gives up to 8160 bytes");
    key
}

fn stretch(passphrase: &[u8], cost: &KdfCost, salt: &[u8; SALT_BYTES]) -> Result<Key256, CredentialError> {
    let params = argon2::Params::new(cost.memory_kib, cost.time, cost.lanes, Some(32))
        .expect("bounds checked: narrower than those of Argon2id");
    let argon2 = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
    let mut stretched = Key256::zeroed();
    secret::stretch(&argon2, passphrase, salt, &mut *stretched)
        .map_err(|secret::NoMemory| CredentialError::Memory { memory_kib: cost.memory_kib })?;
    Ok(stretched)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passphrase(bytes: &[u8]) -> Credential {
        Credential::Passphrase(SecretBytes::copy_of(bytes))
    }

    fn key_file(bytes: &[u8]) -> Credential {
        Credential::KeyFile(SecretBytes::copy_of(bytes))
    }

    #[test]
    fn each_cost_is_bounded_on_both_sides() {
        let refused = |memory_kib, time, lanes| KdfCost { memory_kib, time, lanes }.check().unwrap_err().name;
        assert_eq!(KdfCost::LEAST.check(), Ok(()));
        assert_eq!(KdfCost::default().check(), Ok(()));
        assert_eq!(KdfCost { memory_kib: 4 << 20, time: 1024, lanes: 64 }.check(), Ok(()));
        assert_eq!(refused((4 << 20) + 1, 1, 1), "memory in KiB");
        assert_eq!(refused(7, 1, 1), "memory in KiB");
        assert_eq!(refused(15, 1, 2), "memory in KiB");
        assert_eq!(refused(u32::MAX, u32::MAX, 0), "lanes");
        assert_eq!(refused(1 << 20, 1, 65), "lanes");
        assert_eq!(refused(8, 0, 1), "time");
        assert_eq!(refused(8, 1025, 1), "time");
    }

    #[test]
    fn the_work_of_all_slots_together_is_bounded() {
        let slots = |count: u32, cost: KdfCost| KdfWork::check((0..count).map(|id| (id, cost.work())));
        assert_eq!(slots(32, KdfCost::default()), Ok(()));
        assert_eq!(slots(1, KdfCost { memory_kib: 4 << 20, time: 64, lanes: 1 }), Ok(()));
        let error = slots(1, KdfCost { memory_kib: 4 << 20, time: 65, lanes: 1 }).unwrap_err();
        assert_eq!(error.slot_work, error.total);
        assert!(error.to_string().contains("key slot 0 asks for a key derivation of 260 GiB x passes"), "{error}");
        let quarter = KdfCost { memory_kib: 1 << 20, time: 64, lanes: 1 };
        assert_eq!(slots(4, quarter), Ok(()));
        assert!(slots(5, quarter).unwrap_err().to_string().contains("for 320 GiB x passes"));
        let one = KdfWork::check([(3, KdfWork(1)), (7, KdfWork(u64::MAX)), (9, KdfWork(2))]).unwrap_err();
        assert_eq!((one.slot, one.total), (7, KdfWork(u64::MAX)));
    }

    #[test]
    fn a_weak_or_oversize_credential_is_refused() {
        assert_eq!(check_credential(&passphrase(b"")), Err(CredentialError::PassphraseEmpty));
        assert_eq!(check_credential(&passphrase(b"\0\n")), Ok(()));
        let (min_bytes, max_bytes) = (32, 8 << 20);
        for len_bytes in [0, 31, (8 << 20) + 1] {
            let refused = Err(CredentialError::KeyFileLength { len_bytes, min_bytes, max_bytes });
            assert_eq!(check_credential(&key_file(&vec![1; len_bytes])), refused);
        }
        assert_eq!(check_credential(&key_file(&[1; 32])), Ok(()));
        let len_bytes = PASSPHRASE_BYTES_MAX + 1;
        let refused = Err(CredentialError::PassphraseLength { len_bytes, max_bytes: PASSPHRASE_BYTES_MAX });
        assert_eq!(check_credential(&passphrase(&vec![1; len_bytes])), refused);
    }

    #[test]
    fn the_key_depends_on_every_input() {
        let bytes = [7; 40];
        let cost = KdfCost::LEAST;
        let base = derive_wrapping_key(&passphrase(&bytes), &Kdf::Argon2id(cost), &[1; 32]).unwrap();
        let again = derive_wrapping_key(&passphrase(&bytes), &Kdf::Argon2id(cost), &[1; 32]).unwrap();
        assert_eq!(*base, *again);
        let others = [
            derive_wrapping_key(&passphrase(&bytes[1..]), &Kdf::Argon2id(cost), &[1; 32]),
            derive_wrapping_key(&passphrase(&bytes), &Kdf::Argon2id(cost), &[2; 32]),
            derive_wrapping_key(&passphrase(&bytes), &Kdf::Argon2id(KdfCost { time: 2, ..cost }), &[1; 32]),
            derive_wrapping_key(&passphrase(&bytes), &Kdf::Argon2id(KdfCost { memory_kib: 16, ..cost }), &[1; 32]),
            derive_wrapping_key(&key_file(&bytes), &Kdf::HkdfSha256, &[1; 32]),
            derive_wrapping_key(&key_file(&bytes), &Kdf::HkdfSha256, &[2; 32]),
        ];
        for (index, other) in others.into_iter().enumerate() {
            assert_ne!(*base, *other.unwrap(), "{index}");
        }
    }

    #[test]
    fn hkdf_is_that_of_rfc_5869() {
        // RFC 5869, appendix A.1, the first 32 bytes of its output.
        let salt: Vec<u8> = (0..=12).collect();
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        let key = derive_key(&salt, &[0x0b; 22], &info);
        assert_eq!(
            super::super::hex::encode(&*key),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        );
    }

    #[test]
    fn debug_names_the_kind_only() {
        assert_eq!(format!("{:?}", passphrase(b"secret")), "Passphrase");
    }
}

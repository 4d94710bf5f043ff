//! Hashes and key derivation of LUKS2, with bounds that hold before memory or time is spent.

use hmac::digest::{Digest, Output};
use sha2::{Sha256, Sha512};
use zeroize::Zeroizing;

use super::metadata::{KdfObject, decode_base64};
use crate::namespace::{KdfCost, KdfWork};
use crate::secret::{self, SecretBytes};

/// Most iterations of PBKDF2 that a header may ask for: minutes on a slow machine. `cryptsetup` asks for two seconds.
pub const PBKDF2_ITERATIONS_MAX: u32 = 1 << 28;

/// Fewest iterations, as `cryptsetup` wants them (RFC 8018, section 4.2).
pub(super) const PBKDF2_ITERATIONS_MIN: u32 = 1000;

/// How many iterations take as long as one pass of Argon2 over a KiB.
const PBKDF2_ITERATIONS_PER_WORK: u64 = 4;

/// Bytes of every salt.
pub(super) const SALT_BYTES: usize = 32;

/// The longest digest.
const DIGEST_BYTES_MAX: usize = 64;

/// A hash that this program computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha256,
    Sha512,
}

impl Hash {
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name {
            "sha256" => Some(Self::Sha256),
            "sha512" => Some(Self::Sha512),
            _ => None,
        }
    }

    pub(super) const fn len_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The digest of both parts, in the first `len_bytes` bytes.
    pub(super) fn digest(self, head: &[u8], tail: &[u8]) -> Zeroizing<[u8; DIGEST_BYTES_MAX]> {
        let mut digest = Zeroizing::new([0; DIGEST_BYTES_MAX]);
        let out = &mut digest[..self.len_bytes()];
        match self {
            Self::Sha256 => out.copy_from_slice(digest_of::<Sha256>(head, tail).as_slice()),
            Self::Sha512 => out.copy_from_slice(digest_of::<Sha512>(head, tail).as_slice()),
        }
        digest
    }

    /// What PBKDF2 costs in time: the iterations once for each digest that the output has room for.
    pub(super) const fn pbkdf2_work(self, iterations: u32, len_bytes: usize) -> KdfWork {
        KdfWork((iterations as u64 * len_bytes.div_ceil(self.len_bytes()) as u64).div_ceil(PBKDF2_ITERATIONS_PER_WORK))
    }

    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(password, salt, iterations, out),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(password, salt, iterations, out),
        }
    }
}

fn digest_of<D: Digest>(head: &[u8], tail: &[u8]) -> Output<D> {
    D::new().chain_update(head).chain_update(tail).finalize()
}

/// How a slot turns a passphrase into the key of its area; in its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kdf {
    Pbkdf2 { hash: Hash, iterations: u32 },
    Argon2 { algorithm: argon2::Algorithm, cost: KdfCost },
}

/// A key derivation with its salt.
#[derive(Clone, Debug)]
pub(super) struct SaltedKdf {
    pub(super) kdf: Kdf,
    pub(super) salt: [u8; SALT_BYTES],
}

impl SaltedKdf {
    /// The derivation that the metadata describes, or why it cannot be computed.
    pub(super) fn from_object(object: &KdfObject) -> Result<Self, String> {
        let (kdf, salt) = match object {
            KdfObject::Pbkdf2 { hash, iterations, salt } => {
                let hash = Hash::from_name(hash).ok_or_else(|| format!("hash {hash:?} is not supported"))?;
                if !(1..=PBKDF2_ITERATIONS_MAX).contains(iterations) {
                    return Err(format!("{iterations} iterations of PBKDF2 are refused"));
                }
                (Kdf::Pbkdf2 { hash, iterations: *iterations }, salt)
            }
            KdfObject::Argon2i { time, memory, cpus, salt } => {
                (argon2(argon2::Algorithm::Argon2i, *time, *memory, *cpus)?, salt)
            }
            KdfObject::Argon2id { time, memory, cpus, salt } => {
                (argon2(argon2::Algorithm::Argon2id, *time, *memory, *cpus)?, salt)
            }
        };
        let salt = decode_base64(salt).and_then(|salt| salt.try_into().ok());
        Ok(Self { kdf, salt: salt.ok_or("its salt does not have 32 bytes")? })
    }

    /// `len_bytes` bytes of key, or `None` when there is no memory for it.
    pub(super) fn derive(&self, passphrase: &[u8], len_bytes: usize) -> Option<SecretBytes> {
        let mut key = SecretBytes::zeroed(len_bytes);
        match self.kdf {
            Kdf::Pbkdf2 { hash, iterations } => hash.pbkdf2(passphrase, &self.salt, iterations, &mut key),
            Kdf::Argon2 { algorithm, cost } => {
                let params = argon2::Params::new(cost.memory_kib, cost.time, cost.lanes, Some(len_bytes))
                    .expect("bounds checked: narrower than those of Argon2");
                let argon2 = argon2::Argon2::new(algorithm, argon2::Version::V0x13, params);
                secret::stretch(&argon2, passphrase, &self.salt, &mut key).ok()?;
            }
        }
        Some(key)
    }

    /// What the derivation of `len_bytes` bytes costs in time.
    pub(super) const fn work(&self, len_bytes: usize) -> KdfWork {
        match self.kdf {
            Kdf::Pbkdf2 { hash, iterations } => hash.pbkdf2_work(iterations, len_bytes),
            Kdf::Argon2 { cost, .. } => cost.work(),
        }
    }

    /// Memory that the derivation needs, in KiB.
    pub(super) const fn memory_kib(&self) -> u32 {
        match self.kdf {
            Kdf::Pbkdf2 { .. } => 0,
            Kdf::Argon2 { cost, .. } => cost.memory_kib,
        }
    }
}

fn argon2(algorithm: argon2::Algorithm, time: u32, memory_kib: u32, lanes: u32) -> Result<Kdf, String> {
    let cost = KdfCost { memory_kib, time, lanes };
    cost.check().map_err(|error| error.to_string())?;
    Ok(Kdf::Argon2 { algorithm, cost })
}

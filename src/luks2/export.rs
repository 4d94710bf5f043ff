//! A detached LUKS2 header for a namespace whose header is detached: `cryptsetup open --header` then maps the same bytes.
//!
//! It has one key slot, the namespace's uuid and label, and the layout that `cryptsetup luksFormat --header` writes: two
//! headers of 16 KiB and room for key slots up to 16 MiB.

use serde_json::json;

use super::antiforensic::{self, STRIPE_COUNT};
use super::error::ExportError;
use super::header::{self, BINARY_BYTES, HeaderCopy, LENGTH_WRITTEN};
use super::kdf::{Hash, Kdf, PBKDF2_ITERATIONS_MAX, PBKDF2_ITERATIONS_MIN, SALT_BYTES, SaltedKdf};
use super::metadata::encode_base64;
use super::slot::{AREA_ENCRYPTION, AREA_START, area_cipher, material_bytes};
use crate::memory::Target;
use crate::namespace::{Credential, Header, KdfCost, KdfWork, Namespace};
use crate::secret::{KeyError, SecretBytes, VolumeKey};

/// Bytes of the whole file.
const FILE_BYTES: usize = 16 << 20;

/// Where the only key slot's area begins.
const AREA_OFFSET: usize = 2 * LENGTH_WRITTEN;

const AREA_ALIGNMENT_BYTES: usize = 4096;

/// Bytes of the key of the area: AES-256-XTS.
const AREA_KEY_BYTES: usize = 64;

/// What guessing the passphrase of the exported slot costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKdf {
    /// Argon2id, for `cryptsetup` 2.0 and later.
    Argon2id(KdfCost),
    /// PBKDF2-HMAC-SHA256, where Argon2id is not to be had.
    Pbkdf2 {
        /// At least 1000, at most [`PBKDF2_ITERATIONS_MAX`].
        iterations: u32,
    },
}

/// What an exported header is to be.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// The key derivation of its slot.
    pub kdf: SlotKdf,
}

/// The bytes of a LUKS2 header that opens `namespace` with the bytes of `credential` as passphrase.
///
/// # Errors
///
/// [`ExportError`] where LUKS2 cannot say where the data is, and for a cost out of its bounds.
pub fn export(namespace: &Namespace, credential: &Credential, options: ExportOptions) -> Result<Vec<u8>, ExportError> {
    let header = namespace.header();
    if header.ephemeral {
        return Err(ExportError::Ephemeral);
    }
    if !header.detached {
        return Err(ExportError::NotDetached);
    }
    let first_tweak = namespace.geometry().tweak_at(0).value();
    if first_tweak != 0 {
        return Err(ExportError::FirstTweak { first_tweak });
    }
    let kdf = SaltedKdf { kdf: checked(options.kdf)?, salt: random()? };
    let (Credential::Passphrase(passphrase) | Credential::KeyFile(passphrase)) = credential;
    let memory_kib = kdf.memory_kib();
    let area_key = kdf.derive(passphrase, AREA_KEY_BYTES).ok_or(ExportError::Memory { memory_kib })?;
    let volume_key = namespace.volume_key();
    let material = encrypted_stripes(volume_key, area_key)?;
    let digest = DigestParts::of(volume_key)?;
    let copy = HeaderCopy {
        length_bytes: LENGTH_WRITTEN as u64,
        sequence: 1,
        label: header.label.clone(),
        uuid: header.uuid.to_string(),
        subsystem: String::new(),
        json: metadata(volume_key.bytes().len(), &header, &kdf, &digest),
    };
    let mut bytes = header::encode(&copy, &[random()?, random()?]);
    bytes.resize(FILE_BYTES, 0);
    bytes[AREA_OFFSET..AREA_OFFSET + material.len()].copy_from_slice(&material);
    Ok(bytes)
}

fn checked(kdf: SlotKdf) -> Result<Kdf, ExportError> {
    match kdf {
        SlotKdf::Argon2id(cost) => {
            cost.check()?;
            KdfWork::check([(0, cost.work())])?;
            Ok(Kdf::Argon2 { algorithm: argon2::Algorithm::Argon2id, cost })
        }
        SlotKdf::Pbkdf2 { iterations } => {
            let (min, max) = (PBKDF2_ITERATIONS_MIN, PBKDF2_ITERATIONS_MAX);
            if !(min..=max).contains(&iterations) {
                return Err(ExportError::Iterations { iterations, min, max });
            }
            Ok(Kdf::Pbkdf2 { hash: Hash::Sha256, iterations })
        }
    }
}

/// The stripes of the volume key as they are in the area.
fn encrypted_stripes(volume_key: &VolumeKey, area_key: SecretBytes) -> Result<SecretBytes, KeyError> {
    let stripes = antiforensic::split(volume_key.bytes(), Hash::Sha256)?;
    let mut material = SecretBytes::zeroed(material_bytes(volume_key.bytes().len()));
    material[..stripes.len()].copy_from_slice(&stripes);
    area_cipher(&VolumeKey::new(area_key)?).encrypt_in_place(AREA_START, Target::from_slice(&mut material));
    Ok(material)
}

/// What tells a right volume key from a wrong one.
struct DigestParts {
    salt: [u8; SALT_BYTES],
    digest: [u8; 32],
}

impl DigestParts {
    fn of(volume_key: &VolumeKey) -> Result<Self, KeyError> {
        let (salt, mut digest) = (random()?, [0; 32]);
        Hash::Sha256.pbkdf2(volume_key.bytes(), &salt, PBKDF2_ITERATIONS_MIN, &mut digest);
        Ok(Self { salt, digest })
    }
}

fn metadata(key_bytes: usize, described: &Header, kdf: &SaltedKdf, digest: &DigestParts) -> Vec<u8> {
    let area_bytes = material_bytes(key_bytes).next_multiple_of(AREA_ALIGNMENT_BYTES);
    let salt = encode_base64(&kdf.salt);
    let kdf = match kdf.kdf {
        Kdf::Pbkdf2 { iterations, .. } => {
            json!({"type": "pbkdf2", "hash": "sha256", "iterations": iterations, "salt": salt})
        }
        Kdf::Argon2 { cost, .. } => {
            json!({"type": "argon2id", "time": cost.time, "memory": cost.memory_kib, "cpus": cost.lanes, "salt": salt})
        }
    };
    let metadata = json!({
        "keyslots": {"0": {
            "type": "luks2",
            "key_size": key_bytes,
            "af": {"type": "luks1", "stripes": STRIPE_COUNT, "hash": "sha256"},
            "area": {
                "type": "raw",
                "offset": AREA_OFFSET.to_string(),
                "size": area_bytes.to_string(),
                "encryption": AREA_ENCRYPTION,
                "key_size": AREA_KEY_BYTES,
            },
            "kdf": kdf,
        }},
        "tokens": {},
        "segments": {"0": {
            "type": "crypt",
            "offset": "0",
            // Not dynamic: behind the data is its tag.
            "size": described.size_bytes.to_string(),
            "iv_tweak": "0",
            "encryption": AREA_ENCRYPTION,
            "sector_size": described.unit_bytes,
        }},
        "digests": {"0": {
            "type": "pbkdf2",
            "keyslots": ["0"],
            "segments": ["0"],
            "hash": "sha256",
            "iterations": PBKDF2_ITERATIONS_MIN,
            "salt": encode_base64(&digest.salt),
            "digest": encode_base64(&digest.digest),
        }},
        "config": {
            "json_size": (LENGTH_WRITTEN - BINARY_BYTES).to_string(),
            "keyslots_size": (FILE_BYTES - AREA_OFFSET).to_string(),
        },
    });
    serde_json::to_vec(&metadata).expect("a JSON value has a text")
}

fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(KeyError::Random)?;
    Ok(bytes)
}

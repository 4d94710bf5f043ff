//! A key slot: one way to unwrap the volume key.
//!
//! The wrap is AES-256-GCM-SIV (RFC 8452) with a fresh random nonce. Its associated data is the canonical encoding of
//! everything the volume key is meant for: uuid, place, size, cipher, unit, and the slot's own parameters. A slot that
//! is copied to another header, or whose header was moved or edited, does not unwrap.
//!
//! Each slot also keeps its wrapping key sealed under a key derived from the volume key. Whoever has unlocked the
//! namespace can thus wrap again, for every slot and without its passphrase, when size or place change.

use aes_gcm_siv::aead::{AeadInOut, KeyInit};
use aes_gcm_siv::{Aes256GcmSiv, Key, Nonce, Tag};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroize;

use super::geometry::Placement;
use super::hex;
use super::kdf::{self, CostError, Credential, CredentialError, Kdf, KdfCost, Key256, SALT_BYTES, WorkError};
use super::metadata::{Cipher, LABEL_BYTES_MAX, MetadataError};
use crate::secret::{KeyError, SecretBytes, VolumeKey};

/// Bytes that the AEAD adds to what it wraps.
pub(super) const TAG_BYTES: usize = 16;

/// Bytes of the AEAD's nonce.
pub(super) const NONCE_BYTES: usize = 12;
const WRAP_LABEL: &[u8; 16] = b"daxcrypt slot v1";
const REWRAP_LABEL: &[u8; 16] = b"daxcrypt rwrp v1";

/// Which namespace a wrapped volume key is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Purpose {
    pub(super) uuid: Uuid,
    pub(super) cipher: Cipher,
    pub(super) placement: Placement,
}

/// A slot as the metadata holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Slot {
    /// 0..32, unique in the header.
    pub(super) id: u32,
    /// The user's name for it, may be empty.
    pub(super) label: String,
    pub(super) kdf: Kdf,
    #[serde(with = "hex")]
    pub(super) salt: [u8; SALT_BYTES],
    #[serde(with = "hex")]
    pub(super) nonce: [u8; NONCE_BYTES],
    /// The volume key under the wrapping key, then the tag.
    #[serde(with = "hex")]
    pub(super) wrapped: Vec<u8>,
    #[serde(with = "hex")]
    pub(super) rewrap_nonce: [u8; NONCE_BYTES],
    /// The wrapping key under a key derived from the volume key, then the tag.
    #[serde(with = "hex")]
    pub(super) rewrap: [u8; 32 + TAG_BYTES],
}

/// Why a slot could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// A label is too long or holds a control character.
    #[error("the label is refused (at most {LABEL_BYTES_MAX} bytes, no control characters)")]
    Label(#[source] MetadataError),
    /// The cost of the key derivation is out of its bounds.
    #[error(transparent)]
    Cost(#[from] CostError),
    /// An unlocking that has to try it would take too long.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The credential cannot be used.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// No random bytes for salt or nonce.
    #[error(transparent)]
    Random(#[from] KeyError),
}

impl Slot {
    /// Wraps the volume key so that `credential` opens it.
    pub(super) fn create(
        id: u32,
        label: &str,
        kdf: Kdf,
        credential: &Credential,
        purpose: &Purpose,
        volume_key: &VolumeKey,
    ) -> Result<Self, SlotError> {
        kdf::check_credential(credential)?;
        let salt = random()?;
        let wrapping_key = kdf::derive_wrapping_key(credential, &kdf, &salt)?;
        let mut slot = Self {
            id,
            label: label.to_owned(),
            kdf,
            salt,
            nonce: [0; NONCE_BYTES],
            wrapped: Vec::new(),
            rewrap_nonce: [0; NONCE_BYTES],
            rewrap: [0; 32 + TAG_BYTES],
        };
        slot.wrap(&wrapping_key, purpose, volume_key)?;
        Ok(slot)
    }

    /// The volume key, when the credential is the one that this slot was made with, for this purpose. `None` otherwise:
    /// a wrong passphrase and a manipulated slot cannot be told apart. A slot with the cost of a recovery phrase takes one in
    /// capitals and without dashes, too.
    pub(super) fn open(
        &self,
        credential: &Credential,
        purpose: &Purpose,
    ) -> Result<Option<SecretBytes>, CredentialError> {
        let opened = self.open_with(credential, purpose)?;
        let is_for_phrases = opened.is_none() && self.kdf == Kdf::Argon2id(KdfCost::LEAST);
        match credential.as_recovery_phrase().filter(|_| is_for_phrases) {
            Some(phrase) => self.open_with(&phrase, purpose),
            None => Ok(opened),
        }
    }

    fn open_with(&self, credential: &Credential, purpose: &Purpose) -> Result<Option<SecretBytes>, CredentialError> {
        let wrapping_key = kdf::derive_wrapping_key(credential, &self.kdf, &self.salt)?;
        let (ciphertext, tag) = self.wrapped.split_at(self.wrapped.len().saturating_sub(TAG_BYTES));
        let Some(tag) = tag.try_into().ok().map(|tag: [u8; TAG_BYTES]| Tag::from(tag)) else {
            return Ok(None);
        };
        let mut key = SecretBytes::copy_of(ciphertext);
        let associated = self.wrap_associated_data(purpose);
        let opened =
            aead(&wrapping_key).decrypt_inout_detached(&Nonce::from(self.nonce), &associated, (&mut *key).into(), &tag);
        Ok(opened.is_ok().then_some(key))
    }

    /// Wraps the volume key again for a new purpose, without the credential. `None` when the slot's sealed wrapping key
    /// does not open.
    pub(super) fn rewrapped(
        &self,
        old_key: &VolumeKey,
        old_purpose: &Purpose,
        new_key: &VolumeKey,
        new_purpose: &Purpose,
    ) -> Result<Option<Self>, KeyError> {
        let mut wrapping_key = Key256::zeroed();
        wrapping_key.copy_from_slice(&self.rewrap[..32]);
        let tag: [u8; TAG_BYTES] = self.rewrap[32..].try_into().expect("16 of 48 bytes");
        let opened = aead(&rewrap_key(old_key, old_purpose)).decrypt_inout_detached(
            &Nonce::from(self.rewrap_nonce),
            &self.rewrap_associated_data(old_purpose),
            (&mut wrapping_key[..]).into(),
            &Tag::from(tag),
        );
        if opened.is_err() {
            return Ok(None);
        }
        let mut slot = self.clone();
        slot.wrap(&wrapping_key, new_purpose, new_key)?;
        Ok(Some(slot))
    }

    fn wrap(&mut self, wrapping_key: &Key256, purpose: &Purpose, volume_key: &VolumeKey) -> Result<(), KeyError> {
        self.nonce = random()?;
        self.rewrap_nonce = random()?;
        let mut key = SecretBytes::copy_of(volume_key.bytes());
        let tag = aead(wrapping_key)
            .encrypt_inout_detached(&Nonce::from(self.nonce), &self.wrap_associated_data(purpose), (&mut *key).into())
            .expect("a volume key is far below the AEAD's length limit");
        self.wrapped = [&*key, tag.as_slice()].concat();
        let mut sealed = Key256::zeroed();
        sealed.copy_from_slice(&wrapping_key[..]);
        let tag = aead(&rewrap_key(volume_key, purpose))
            .encrypt_inout_detached(
                &Nonce::from(self.rewrap_nonce),
                &self.rewrap_associated_data(purpose),
                (&mut sealed[..]).into(),
            )
            .expect("a wrapping key is far below the AEAD's length limit");
        self.rewrap[..32].copy_from_slice(&sealed[..]);
        self.rewrap[32..].copy_from_slice(tag.as_slice());
        sealed.zeroize();
        Ok(())
    }

    /// `format.md`, "Associated data of a slot".
    fn wrap_associated_data(&self, purpose: &Purpose) -> Vec<u8> {
        let Placement { origin: _, base, data_offset, size_bytes, unit, bound_address, detached } = purpose.placement;
        let (kdf_number, cost) = match self.kdf {
            Kdf::Argon2id(cost) => (1, [cost.memory_kib, cost.time, cost.lanes]),
            Kdf::HkdfSha256 => (2, [0; 3]),
        };
        let mut data = Vec::with_capacity(128);
        data.extend_from_slice(WRAP_LABEL);
        data.extend_from_slice(purpose.uuid.as_bytes());
        for number in [base, data_offset, size_bytes, bound_address.unwrap_or(0)] {
            data.extend_from_slice(&number.to_le_bytes());
        }
        let flags = u32::from(bound_address.is_some()) | u32::from(detached) << 1;
        for number in [flags, unit.bytes(), purpose.cipher.key_bits(), self.id, kdf_number].into_iter().chain(cost) {
            data.extend_from_slice(&number.to_le_bytes());
        }
        data.extend_from_slice(&self.salt);
        data
    }

    /// `format.md`, "Associated data of a sealed wrapping key".
    fn rewrap_associated_data(&self, purpose: &Purpose) -> Vec<u8> {
        [REWRAP_LABEL, purpose.uuid.as_bytes(), &self.id.to_le_bytes()[..], &self.salt].concat()
    }
}

fn rewrap_key(volume_key: &VolumeKey, purpose: &Purpose) -> Key256 {
    kdf::derive_key(purpose.uuid.as_bytes(), volume_key.bytes(), b"daxcrypt v1 slot rewrap")
}

pub(super) fn aead(key: &Key256) -> Aes256GcmSiv {
    Aes256GcmSiv::new(<&Key<Aes256GcmSiv>>::from(&**key))
}

pub(super) fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(KeyError::Random)?;
    Ok(bytes)
}

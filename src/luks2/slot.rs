//! A LUKS2 key slot: from a passphrase to the volume key, and the digest that tells whether it is the right one.

use std::ops::Range;

use subtle::ConstantTimeEq;

use super::antiforensic::{self, STRIPE_COUNT};
use super::error::UnlockError;
use super::kdf::{Hash, PBKDF2_ITERATIONS_MAX, SaltedKdf};
use super::metadata::{self, Digest as DigestObject, Metadata};
use crate::memory::Target;
use crate::namespace::KdfWork;
use crate::pmem::Backing;
use crate::secret::{SecretBytes, VolumeKey};
use crate::xts::{Backend, DataUnit, Span, XtsKey};

/// What the area of a slot is encrypted with: AES-XTS in sectors of 512 bytes, the first of which has tweak 0.
pub(super) const AREA_ENCRYPTION: &str = "aes-xts-plain64";

/// Bytes of a sector in a key slot's area.
pub(super) const SECTOR_BYTES: usize = 512;

/// A slot that this program can open, for the volume that it is about.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) id: u32,
    pub(super) key_bytes: usize,
    /// From the start of the header device.
    area: Range<u64>,
    area_key_bytes: usize,
    pub(super) kdf: SaltedKdf,
    splitter_hash: Hash,
    digest: Digest,
    /// 2 is tried first, 1 then, 0 never.
    pub(super) priority: u8,
}

#[derive(Clone, Debug)]
struct Digest {
    hash: Hash,
    iterations: u32,
    salt: Vec<u8>,
    digest: Vec<u8>,
}

impl Slot {
    /// Slot `id` of the metadata, or why it cannot be used.
    pub(super) fn from_metadata(metadata: &Metadata, id: metadata::Id) -> Result<Self, String> {
        let slot = &metadata.keyslots[&id];
        let key_bytes = slot.key_size as usize;
        if slot.kind != "luks2" {
            return Err(format!("it is of type {:?}", slot.kind));
        }
        let (Some(kdf), Some(splitter)) = (&slot.kdf, &slot.af) else {
            return Err("it has no `kdf` or no `af`".into());
        };
        let is_of = |digest: &&DigestObject| {
            digest.keyslots.contains(&id)
                && digest.segments.iter().any(|segment| metadata.segments.contains_key(segment))
        };
        let digest = metadata.digests.values().find(is_of).ok_or("its key is not that of the volume")?;
        let encryption = slot.area.encryption.as_deref();
        let area_key_bytes = slot.area.key_size.unwrap_or(0) as usize;
        if slot.area.kind != "raw" || encryption != Some(AREA_ENCRYPTION) || ![32, 64].contains(&area_key_bytes) {
            return Err(format!("its area is not {AREA_ENCRYPTION}"));
        }
        if ![32, 64].contains(&key_bytes) {
            return Err(format!("its key has {key_bytes} bytes"));
        }
        if splitter.kind != "luks1" || splitter.stripes as usize != STRIPE_COUNT {
            return Err("its key is split in another way than into 4000 stripes".into());
        }
        let area = slot.area.range().ok_or("its area is impossible")?;
        if area.end - area.start < material_bytes(key_bytes) as u64 {
            return Err("its area is too small".into());
        }
        Ok(Self {
            id: id.0,
            key_bytes,
            area,
            area_key_bytes,
            kdf: SaltedKdf::from_object(kdf)?,
            splitter_hash: Hash::from_name(&splitter.hash).ok_or("the hash of its splitter is not supported")?,
            digest: Digest::from_object(digest)?,
            priority: slot.priority.unwrap_or(1),
        })
    }

    /// What trying a passphrase costs in time: its derivation, and the digest of the key that comes out.
    pub(super) const fn work(&self) -> KdfWork {
        let digest = self.digest.hash.pbkdf2_work(self.digest.iterations, self.digest.hash.len_bytes());
        KdfWork(self.kdf.work(self.area_key_bytes).0.saturating_add(digest.0))
    }

    /// The volume key, when `passphrase` is the one of this slot. The header begins at byte `base` of `backing`.
    pub(super) fn open(
        &self,
        passphrase: &[u8],
        backing: &Backing,
        base: u64,
    ) -> Result<Option<VolumeKey>, UnlockError> {
        let memory_kib = self.kdf.memory_kib();
        let key = self.kdf.derive(passphrase, self.area_key_bytes).ok_or(UnlockError::Memory { memory_kib })?;
        let mut material = SecretBytes::zeroed(material_bytes(self.key_bytes));
        let start = base.saturating_add(self.area.start);
        let range = start..start.saturating_add(material.len() as u64);
        backing.read(range, |source| source.copy_to(&mut material))?;
        // Equal halves are as improbable as the right passphrase by chance: no slot of ours.
        let Ok(key) = VolumeKey::new(key) else { return Ok(None) };
        area_cipher(&key).decrypt_in_place(AREA_START, Target::from_slice(&mut material));
        let key = antiforensic::merge(&material, self.key_bytes, self.splitter_hash);
        if !self.digest.is_of(&key) {
            return Ok(None);
        }
        Ok(Some(VolumeKey::new(key)?))
    }
}

/// The first sector of an area.
pub(super) const AREA_START: Span = Span { unit: DataUnit::Bytes512, tweak: 0, skip_bytes: 0 };

pub(super) fn area_cipher(key: &VolumeKey) -> XtsKey {
    XtsKey::new(key, Backend::detect())
}

/// Bytes of the stripes of a key, in whole sectors.
pub(super) const fn material_bytes(key_bytes: usize) -> usize {
    (STRIPE_COUNT * key_bytes).next_multiple_of(SECTOR_BYTES)
}

impl Digest {
    fn from_object(object: &DigestObject) -> Result<Self, String> {
        if object.kind != "pbkdf2" {
            return Err(format!("the digest of its key is of type {:?}", object.kind));
        }
        let hash = object.hash.as_deref().and_then(Hash::from_name).ok_or("the hash of its digest is not supported")?;
        let iterations = object.iterations.filter(|iterations| (1..=PBKDF2_ITERATIONS_MAX).contains(iterations));
        let salt = metadata::decode_base64(&object.salt).filter(|salt| salt.len() == super::kdf::SALT_BYTES);
        let digest = metadata::decode_base64(&object.digest).filter(|digest| digest.len() == hash.len_bytes());
        Ok(Self {
            hash,
            iterations: iterations.ok_or("the iterations of its digest are refused")?,
            salt: salt.ok_or("the salt of its digest does not have 32 bytes")?,
            digest: digest.ok_or("its digest has another length than its hash")?,
        })
    }

    fn is_of(&self, key: &[u8]) -> bool {
        let mut computed = vec![0; self.digest.len()];
        self.hash.pbkdf2(key, &self.salt, self.iterations, &mut computed);
        computed.ct_eq(&self.digest).into()
    }
}

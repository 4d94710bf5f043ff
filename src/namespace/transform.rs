//! A transform: the data area on its way from one key and place to another.
//!
//! While one is under way the header belongs to the *new* volume key: its slots, its MAC and its geometry. The old volume
//! key and the old place stand in the field `transform`, the key wrapped under a key derived from the new one, and the
//! field is under the MAC like everything else. How far it has come stands in the [`Journal`], under a MAC too.
//!
//! Order is the guarantee. A record of step 0 is durable before the header tells of the transform, so a header that does
//! always has a record; both header copies are durable before the first window moves, so no copy that is left knows the
//! old slots; the windows that the journal has saved are wiped before a header forgets that there were any, so that a wipe
//! that failed is done again; and both copies are durable without the old key before the records are wiped. Moving data is
//! not done here.

use aes_gcm_siv::aead::AeadInOut;
use aes_gcm_siv::{Nonce, Tag};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::area::CopyState;
use super::error::UpdateError;
use super::geometry::{DataUnit, Geometry, GeometryError, HEADER_AREA_BYTES, Layout, Placement, data_offset_for};
use super::header::MacKey;
use super::hex;
use super::info::SlotInfo;
use super::journal::{Journal, Record};
use super::kdf::{self, Credential, Key256};
use super::metadata::{Cipher, Metadata};
use super::site::Site;
use super::slot::{NONCE_BYTES, Slot, SlotError, TAG_BYTES, aead, random};
use super::unlocked::Namespace;
use crate::pmem::MediaError;
use crate::secret::{KeyError, SecretBytes, VolumeKey};

/// What the header requires of a reader while a transform is under way.
pub(super) const REQUIREMENT: &str = "transform";

/// Bytes of the random identity of a transform.
pub(super) const ID_BYTES: usize = 16;

const KEY_LABEL: &[u8; 16] = b"daxcrypt trns v1";

/// The field `transform` of the metadata: where the data came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Transform {
    /// Random; ties the records of the journal to this transform.
    #[serde(with = "hex")]
    id: [u8; ID_BYTES],
    key_bits: Cipher,
    unit_bytes: DataUnit,
    data_start: u64,
    first_address: u64,
    #[serde(with = "hex")]
    nonce: [u8; NONCE_BYTES],
    /// Whether it rests until somebody asks for more.
    paused: bool,
    /// Where the header area was that knew the old key, when the header has moved too; wiped before any data moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) former_base: Option<u64>,
    /// The old volume key under a key derived from the new one, then the tag.
    #[serde(with = "hex")]
    wrapped: Vec<u8>,
}

impl Transform {
    /// `origin` is where the backing begins on its disk.
    fn create(
        source: &Layout,
        origin: u64,
        former_base: Option<u64>,
        old_key: &VolumeKey,
        new_key: &VolumeKey,
        uuid: Uuid,
    ) -> Result<Self, KeyError> {
        let cipher = Cipher::of_key_bytes(old_key.bytes().len()).expect("a volume key has one of two lengths");
        let mut transform = Self {
            id: random()?,
            key_bits: cipher,
            unit_bytes: source.unit(),
            data_start: source.data_start() + origin,
            first_address: source.first_address(),
            nonce: random()?,
            paused: false,
            former_base,
            wrapped: Vec::new(),
        };
        let mut key = SecretBytes::copy_of(old_key.bytes());
        let tag = aead(&old_key_key(new_key, uuid))
            .encrypt_inout_detached(
                &Nonce::from(transform.nonce),
                &transform.associated_data(uuid, source.size_bytes()),
                (&mut *key).into(),
            )
            .expect("a volume key is far below the AEAD's length limit");
        transform.wrapped = [&*key, tag.as_slice()].concat();
        Ok(transform)
    }

    pub(super) const fn former_base(&self) -> Option<u64> {
        self.former_base
    }

    pub(super) const fn first_address(&self) -> u64 {
        self.first_address
    }

    pub(super) const fn paused(&self) -> bool {
        self.paused
    }

    fn open_key(&self, new_key: &VolumeKey, uuid: Uuid, size_bytes: u64) -> Result<VolumeKey, TransformError> {
        let (ciphertext, tag) = self.wrapped.split_at(self.wrapped.len().saturating_sub(TAG_BYTES));
        let tag: [u8; TAG_BYTES] = tag.try_into().map_err(|_| TransformError::SourceKey)?;
        let mut key = SecretBytes::copy_of(ciphertext);
        aead(&old_key_key(new_key, uuid))
            .decrypt_inout_detached(
                &Nonce::from(self.nonce),
                &self.associated_data(uuid, size_bytes),
                (&mut *key).into(),
                &Tag::from(tag),
            )
            .map_err(|_| TransformError::SourceKey)?;
        Ok(VolumeKey::new(key)?)
    }

    /// `format.md`, "Associated data of the old volume key".
    fn associated_data(&self, uuid: Uuid, size_bytes: u64) -> Vec<u8> {
        let mut data = [KEY_LABEL, uuid.as_bytes(), &self.id[..]].concat();
        for number in [self.data_start, self.first_address, size_bytes] {
            data.extend_from_slice(&number.to_le_bytes());
        }
        for number in [self.unit_bytes.bytes(), self.key_bits.key_bits()] {
            data.extend_from_slice(&number.to_le_bytes());
        }
        data
    }
}

fn old_key_key(new_key: &VolumeKey, uuid: Uuid) -> Key256 {
    kdf::derive_key(uuid.as_bytes(), new_key.bytes(), b"daxcrypt v1 transform old key")
}

/// What happens to the key slots besides the one of the credential.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OtherSlots {
    /// They are gone: nobody but the holder of the credential opens the namespace afterwards.
    #[default]
    Drop,
    /// Each wraps the new volume key under its old wrapping key. Whoever knew the old volume key and has an old header knows
    /// that wrapping key too: this shuts nobody out, and is for a change of cipher, unit or place.
    Keep,
}

/// What a re-key is to change besides the volume key.
#[derive(Clone, Copy, Debug, Default)]
pub struct RekeyOptions {
    /// The cipher; without it, the present one.
    pub cipher: Option<Cipher>,
    /// The data unit; without it, the present one.
    pub unit: Option<DataUnit>,
    /// What happens to the other key slots.
    pub other_slots: OtherSlots,
}

/// Why a transform could not begin, go on or end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransformError {
    /// One is under way.
    #[error("a re-key is under way: it must end before another one begins")]
    UnderWay,
    /// The credential opens no slot, so it cannot have one of the new header.
    #[error("no key slot opens with that passphrase or key file")]
    Credential,
    /// The volume was locked: its keys are gone.
    #[error("the volume is locked")]
    Locked,
    /// None is under way.
    #[error("no re-key is under way")]
    NotUnderWay,
    /// There is no key that could be changed.
    #[error("an ephemeral namespace has a new key at every opening: there is nothing to re-key")]
    Ephemeral,
    /// The new unit, size or place is not possible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The key slot could not be made.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A key could not be made, or is not acceptable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The header could not be changed.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// The old volume key in the header does not open.
    #[error("the old volume key in the header does not open under the new one")]
    SourceKey,
    /// How far the transform has come is not known.
    #[error("neither record of the re-key's journal can be used: how far it has come is not known")]
    JournalLost,
    /// The window that was being moved is lost.
    #[error(
        "the journal's copy of the window that was being moved is damaged: its CRC-32 is {computed:#010x}, but the record says {stored:#010x}"
    )]
    SavedWindow {
        /// The checksum in the record.
        stored: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// It was unlocked by its volume key, and so there is no slot to make anew.
    #[error("it was unlocked by its volume key: unlock it with the key of a slot to re-key it")]
    NoSlot,
    /// The media failed.
    #[error(transparent)]
    Media(#[from] MediaError),
}

/// A transform that is under way.
#[derive(Debug)]
pub struct Pending {
    source: Layout,
    source_key: VolumeKey,
    journal: Journal,
    record: Record,
}

impl Pending {
    /// Where the data came from.
    #[must_use]
    pub const fn source(&self) -> &Layout {
        &self.source
    }

    /// The old volume key.
    #[must_use]
    pub const fn source_key(&self) -> &VolumeKey {
        &self.source_key
    }

    /// How far it has come, as the journal says.
    #[must_use]
    pub const fn record(&self) -> Record {
        self.record
    }

    /// The journal.
    #[must_use]
    pub const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Records that the next window is being moved, durably: `ciphertext` is saved in the journal.
    ///
    /// # Errors
    ///
    /// [`UpdateError::Changed`] when somebody else has moved data meanwhile. [`TransformError::Media`]; which of the two
    /// states a crash would leave is then unknown.
    pub fn advance(&mut self, ciphertext: &[u8]) -> Result<(), TransformError> {
        self.journal.check(&self.record, self.source.size_bytes())?;
        let record = self.record.moving(ciphertext);
        self.journal.write(&record)?;
        self.record = record;
        Ok(())
    }

    /// Records that the window has arrived, durably and in both places of the journal.
    ///
    /// # Errors
    ///
    /// As [`Self::advance`].
    pub fn arrive(&mut self) -> Result<(), TransformError> {
        self.journal.check(&self.record, self.source.size_bytes())?;
        self.record = self.journal.write_twice(&self.record.moved())?;
        Ok(())
    }

    /// Records that the next `bytes` bytes had no data, and are without data where they are to be.
    ///
    /// # Errors
    ///
    /// As [`Self::advance`].
    pub fn skip(&mut self, bytes: u64) -> Result<(), TransformError> {
        self.journal.check(&self.record, self.source.size_bytes())?;
        self.record = self.journal.write_twice(&self.record.skipped(bytes))?;
        Ok(())
    }

    /// Makes durable what was read from the journal.
    pub(super) fn confirm(&mut self) -> Result<(), TransformError> {
        self.record = self.journal.confirm(&self.record)?;
        Ok(())
    }
}

/// The new state of a transform that is to begin.
struct Plan {
    geometry: Geometry,
    metadata: Metadata,
    new_key: VolumeKey,
    id: [u8; ID_BYTES],
}

impl Namespace {
    /// The transform that is under way.
    #[must_use]
    pub const fn pending_transform(&self) -> Option<&Pending> {
        self.pending.as_ref()
    }

    /// As [`Self::pending_transform`], to record progress.
    pub const fn pending_transform_mut(&mut self) -> Option<&mut Pending> {
        self.pending.as_mut()
    }

    /// Makes the slot that `credential` opens the one that counts as unlocked: a re-key gives that slot a successor.
    ///
    /// # Errors
    ///
    /// [`TransformError::Credential`] when it opens none.
    pub fn use_slot_of(&mut self, credential: &Credential) -> Result<(), TransformError> {
        let purpose = self.metadata.purpose();
        for slot in self.metadata.slots.iter().filter(|slot| slot.kdf.suits(credential)) {
            let opened = slot.open(credential, &purpose).map_err(SlotError::from)?;
            if opened.is_some_and(|key| bool::from(key.ct_eq(self.volume_key.bytes()))) {
                self.slot_id = Some(slot.id);
                return Ok(());
            }
        }
        Err(TransformError::Credential)
    }

    /// The slots besides the one that unlocked.
    #[must_use]
    pub fn other_slots(&self) -> Vec<SlotInfo> {
        let slots = self.header().slots.into_iter();
        slots.filter(|slot| Some(slot.id) != self.slot_id).collect()
    }

    /// Begins to give the namespace a new volume key: the header has it when this returns, with a fresh slot for
    /// `credential`, in the place of the slot that unlocked; no data has moved yet.
    ///
    /// # Errors
    ///
    /// [`TransformError`]. The namespace is as it was, unless the error is [`UpdateError::Write`].
    pub fn begin_rekey(&mut self, credential: &Credential, options: &RekeyOptions) -> Result<(), TransformError> {
        let unit = options.unit.unwrap_or_else(|| self.geometry.unit());
        let placement = Placement { unit, ..self.geometry.placement() };
        self.begin_transform(self.geometry.layout(), &placement, credential, options)
    }

    /// Begins to move the data to another offset from the base, which may overlap the present one, under a new volume key.
    ///
    /// # Errors
    ///
    /// As [`Self::begin_rekey`].
    pub fn begin_move(
        &mut self,
        data_offset: u64,
        credential: &Credential,
        options: &RekeyOptions,
    ) -> Result<(), TransformError> {
        let unit = options.unit.unwrap_or_else(|| self.geometry.unit());
        let placement = Placement { unit, data_offset, ..self.geometry.placement() };
        self.begin_transform(self.geometry.layout(), &placement, credential, options)
    }

    /// Begins to bring the data from `source` to the place that `placement` says, under a new volume key.
    pub(super) fn begin_transform(
        &mut self,
        source: Layout,
        placement: &Placement,
        credential: &Credential,
        options: &RekeyOptions,
    ) -> Result<(), TransformError> {
        let plan = self.plan(source, placement, &self.site, None, credential, options)?;
        let Plan { geometry, mut metadata, new_key, id } = plan;
        metadata.tag_offset = self.tag_offset_for(&geometry, &source);
        // A copy that a failed update left may be the header of another transform, whose record is overwritten now.
        self.even_out()?;
        let journal = Journal::new(&self.area, &new_key, self.metadata.uuid, id);
        let record = journal.begin()?;
        self.write_next_tag(&metadata, &new_key)?;
        let new_mac_key = MacKey::new(&new_key, self.metadata.uuid);
        let old_mac_key = std::mem::replace(&mut self.mac_key, new_mac_key);
        let updated = self.update(metadata);
        if self.metadata.transform.is_none() {
            // No copy is known to be durable: the old header stays in force here, and a crash may still leave the new one,
            // under which nothing has moved. It is taken back where that is possible; where not, its record stays.
            self.mac_key = old_mac_key;
            let _ = self.even_out(); // the first error is the one to report
            return Ok(updated?);
        }
        let source_key = std::mem::replace(&mut self.volume_key, new_key);
        self.geometry = geometry;
        self.pending = Some(Pending { source, source_key, journal, record });
        Ok(updated?)
    }

    /// Writes, at the start of `site`, the header that begins to bring the data from here to there, under a new volume
    /// key. Durable when this returns; the header that is here stays in force until nobody can find it any more.
    pub(super) fn begin_at(
        self,
        site: Site,
        credential: &Credential,
        options: &RekeyOptions,
    ) -> Result<Self, TransformError> {
        let source = self.geometry.layout();
        let (base, unit) = (site.base(), options.unit.unwrap_or_else(|| self.geometry.unit()));
        let placement = Placement { base, data_offset: data_offset_for(base)?, unit, ..self.geometry.placement() };
        let (available_bytes, header_bytes) = (site.available_bytes(), HEADER_AREA_BYTES);
        let mut area = site.area().ok_or(GeometryError::NoRoom { available_bytes, header_bytes })?;
        let plan = self.plan(source, &placement, &site, Some(self.site.base()), credential, options)?;
        let Plan { geometry, metadata, new_key, id } = plan;
        area.clear().map_err(UpdateError::Write)?;
        let journal = Journal::new(&area, &new_key, metadata.uuid, id);
        let record = journal.begin()?;
        let mut moving = Self {
            site,
            area,
            geometry,
            mac_key: MacKey::new(&new_key, metadata.uuid),
            metadata,
            pending: Some(Pending { source, source_key: self.volume_key, journal, record }),
            volume_key: new_key,
            copies: [const { CopyState::Good { sequence: 0 } }; 2],
            ..self
        };
        moving.publish()?;
        Ok(moving)
    }

    /// What a transform to `placement` at `site` needs: all that can be refused is refused here.
    fn plan(
        &self,
        source: Layout,
        placement: &Placement,
        site: &Site,
        former_base: Option<u64>,
        credential: &Credential,
        options: &RekeyOptions,
    ) -> Result<Plan, TransformError> {
        if self.pending.is_some() {
            return Err(TransformError::UnderWay);
        }
        if self.metadata.ephemeral {
            return Err(TransformError::Ephemeral);
        }
        let geometry = Geometry::new(placement, site.available_bytes())?;
        let cipher = options.cipher.unwrap_or(self.metadata.key_bits);
        let new_key = VolumeKey::generate(cipher.key_bytes())?;
        let transform =
            Transform::create(&source, site.origin(), former_base, &self.volume_key, &new_key, self.metadata.uuid)?;
        let id = transform.id;
        let mut metadata = Metadata {
            requirements: vec![REQUIREMENT.to_owned()],
            key_bits: cipher,
            unit_bytes: placement.unit,
            base: placement.base,
            data_offset: placement.data_offset,
            bound_address: placement.bound_address,
            transform: Some(transform),
            ..self.metadata.clone()
        };
        metadata.slots = self.slots_for(&metadata, &new_key, credential, options.other_slots)?;
        Ok(Plan { geometry, metadata, new_key, id })
    }

    /// The slots of the new header: a fresh one for the credential, and the others as `other_slots` says.
    fn slots_for(
        &self,
        metadata: &Metadata,
        new_key: &VolumeKey,
        credential: &Credential,
        other_slots: OtherSlots,
    ) -> Result<Vec<Slot>, TransformError> {
        let own = self.slot_id.ok_or(TransformError::NoSlot)?;
        let (old_purpose, new_purpose) = (self.metadata.purpose(), metadata.purpose());
        let mut slots = Vec::new();
        for slot in &self.metadata.slots {
            let id = slot.id;
            if id == own {
                slots.push(Slot::create(id, &slot.label, slot.kdf, credential, &new_purpose, new_key)?);
            } else if other_slots == OtherSlots::Keep {
                let kept = slot.rewrapped(&self.volume_key, &old_purpose, new_key, &new_purpose)?;
                slots.push(kept.ok_or(UpdateError::RewrapFailed { id })?);
            }
        }
        Ok(slots)
    }

    /// Whether the transform that is under way rests until somebody asks for more.
    #[must_use]
    pub fn transform_paused(&self) -> bool {
        self.metadata.transform.as_ref().is_some_and(|transform| transform.paused)
    }

    /// Records whether the transform that is under way is to rest.
    ///
    /// # Errors
    ///
    /// [`TransformError::NotUnderWay`] and [`TransformError::Update`].
    pub fn set_transform_paused(&mut self, paused: bool) -> Result<(), TransformError> {
        let mut metadata = self.metadata.clone();
        let transform = metadata.transform.as_mut().ok_or(TransformError::NotUnderWay)?;
        if transform.paused != paused {
            transform.paused = paused;
            self.update(metadata)?;
        }
        Ok(())
    }

    /// Ends the transform, all of whose bytes have arrived: the windows that the journal has saved are wiped from media, both
    /// header copies forget the old volume key, it is wiped from memory, and then the records from media.
    ///
    /// # Errors
    ///
    /// [`TransformError`]; the transform then still counts as under way, unless only the records could not be wiped. Who
    /// opens the namespace next for writing wipes them.
    pub fn finish_transform(&mut self) -> Result<(), TransformError> {
        let Some(pending) = &self.pending else { return Ok(()) };
        debug_assert_eq!(pending.record.done_bytes, pending.source.size_bytes(), "every byte has arrived");
        pending.journal.check(&pending.record, pending.source.size_bytes())?; // or it would be somebody else's window
        pending.journal.clear_saved()?;
        let metadata = Metadata { requirements: Vec::new(), transform: None, ..self.metadata.clone() };
        self.update(metadata)?;
        if let Some(pending) = self.pending.take() {
            pending.journal.clear_records()?;
        }
        Ok(self.settle_tag()?)
    }

    /// Reads where a transform stands that was under way when the namespace was closed. The header is authentic.
    pub(super) fn load_transform(&mut self) -> Result<(), TransformError> {
        let Some(transform) = &self.metadata.transform else { return Ok(()) };
        let (uuid, size_bytes) = (self.metadata.uuid, self.metadata.size_bytes);
        let (base, origin) = (transform.data_start, self.site.origin());
        let data_start = base.checked_sub(origin).ok_or(GeometryError::BeforePartition { base, origin })?;
        let source = Layout::new(data_start, transform.first_address, size_bytes, transform.unit_bytes)?;
        let end = source.data_start() + size_bytes;
        let available_bytes = self.site.data().len_bytes();
        if end > available_bytes {
            return Err(GeometryError::DoesNotFit { needed_bytes: end, available_bytes }.into());
        }
        let source_key = transform.open_key(&self.volume_key, uuid, size_bytes)?;
        let journal = Journal::new(&self.area, &self.volume_key, uuid, transform.id);
        let record = journal.read(size_bytes)?;
        self.pending = Some(Pending { source, source_key, journal, record });
        Ok(())
    }
}

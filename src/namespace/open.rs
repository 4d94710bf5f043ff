//! A namespace found on media and not yet unlocked: well-formed and where it should be, but not authenticated.

use std::sync::Arc;

use super::area::{Chosen, CopyName, HeaderArea, WriteError, choose};
use super::destroy::destroy;
use super::error::{OpenError, UnlockError};
use super::geometry::{Geometry, HEADER_AREA_BYTES};
use super::header::{HeaderCopy, MacKey};
use super::info::Header;
use super::kdf::{self, Credential, Kdf, KdfWork};
use super::metadata::Metadata;
use super::signature::{Signature, foreign_beginning, known_format};
use super::site::Site;
use super::slot::Slot;
use super::transform::TransformError;
use super::unlocked::Namespace;
use crate::pmem::{Backing, MediaError};
use crate::secret::{self, SecretBytes, VolumeKey};

/// A namespace whose header is well-formed, fits its backing and is where it was written.
#[derive(Debug)]
pub struct LockedNamespace {
    site: Site,
    area: HeaderArea,
    geometry: Geometry,
    chosen: Chosen,
    header: Header,
    /// Whether the header is that of the place on media: not a backup of it, and not that of another place.
    is_on_media: bool,
}

impl LockedNamespace {
    /// Opens the namespace that takes a whole backing.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing on media changes.
    pub fn open(backing: Arc<Backing>) -> Result<Self, OpenError> {
        Self::open_in(Site::whole(backing))
    }

    /// Opens the namespace in the `available_bytes` of the backing from byte `start` on: a partition.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing on media changes.
    pub fn open_at(backing: Arc<Backing>, start: u64, available_bytes: u64) -> Result<Self, OpenError> {
        Self::open_in(Site::part(backing, start, available_bytes))
    }

    /// Opens the namespace at a site, whose header may be detached.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing on media changes.
    pub fn open_in(site: Site) -> Result<Self, OpenError> {
        let mut area = site.area().ok_or_else(|| too_small(&site))?;
        let [a, b] = area.read_copies();
        let chosen = match choose(a, b) {
            Err(OpenError::NotANamespace { .. }) => {
                let found = known_format(area.backing(), area.base())?.map(Signature::Known);
                return Err(OpenError::NotANamespace { found });
            }
            other => other?,
        };
        Self::check(site, area, chosen)
    }

    /// Checks a well-formed header against the place of its area.
    pub(super) fn check(site: Site, area: HeaderArea, chosen: Chosen) -> Result<Self, OpenError> {
        let (metadata, base) = (&chosen.copy.metadata, site.base());
        match (metadata.detached, site.is_detached()) {
            (true, false) => return Err(OpenError::Detached),
            (false, true) => return Err(OpenError::NotDetached),
            _ => {}
        }
        if metadata.base != base {
            return Err(OpenError::Relocated { header_base: metadata.base, actual_base: base });
        }
        let geometry = Geometry::new(&metadata.placement(site.origin()), site.available_bytes())?;
        check_address(&geometry, &site)?;
        if site.is_detached()
            && let Some(found) = foreign_beginning(site.data(), site.start().saturating_add(metadata.data_offset))?
        {
            return Err(OpenError::DataIsOther { found });
        }
        let header = Header::of(metadata, chosen.copy.sequence, &chosen.states);
        Ok(Self { site, area, geometry, chosen, header, is_on_media: true })
    }

    /// The same for a header that is not on media yet: opening it writes nothing.
    pub(super) fn not_on_media(self) -> Self {
        Self { is_on_media: false, ..self }
    }

    /// A namespace that is not where its header says, for [`MovedNamespace`](super::moved::MovedNamespace) alone.
    pub(super) fn unchecked(site: Site, area: HeaderArea, geometry: Geometry, chosen: Chosen) -> Self {
        let header = Header::of(&chosen.copy.metadata, chosen.copy.sequence, &chosen.states);
        Self { site, area, geometry, chosen, header, is_on_media: false }
    }

    /// What the header says.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    pub(super) const fn metadata(&self) -> &Metadata {
        &self.chosen.copy.metadata
    }

    /// Where the data is.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Unlocks with any slot of the credential's kind, the lowest first, and authenticates the header.
    ///
    /// Where the backing is open for writing this makes the header durable, and finishes an update of it that was cut:
    /// nobody acts on what a power cut could take back.
    ///
    /// # Errors
    ///
    /// [`UnlockError::WrongCredential`] when no slot opens, [`UnlockError::Forged`] when the header is not genuine,
    /// [`UnlockError::Settle`] when the media refuse writes.
    pub fn unlock_key(self, credential: &Credential) -> Result<Namespace, UnlockError> {
        let (chosen, other, before) = (self.chosen.clone(), self.other_copy(), self.before_transform());
        let unlocked = self
            .suitable_slots(credential)
            .and_then(|slots| secret::with_wiped_stack(|| self.unlock_with(credential, &slots)));
        match (unlocked, before) {
            (Err(UnlockError::Transform(TransformError::JournalLost)), Some(before)) => before.unlock_key(credential),
            (unlocked, _) => unlocked.map_err(|error| {
                other.and_then(|other| other.instead_of(&chosen, credential, &error)).unwrap_or(error)
            }),
        }
    }

    /// The other copy, where it is a header and not the same one.
    fn other_copy(&self) -> Option<OtherCopy> {
        let name = self.chosen.name.other();
        let copy = self.area.read_copy(name).ok()?;
        let is_same = copy.sequence == self.chosen.copy.sequence && copy.metadata == self.chosen.copy.metadata;
        (!is_same).then_some(OtherCopy { name, copy })
    }

    /// Unlocks with slot `id` only.
    ///
    /// # Errors
    ///
    /// As [`Self::unlock_key`], and [`UnlockError::EmptySlot`].
    pub fn unlock_slot(self, credential: &Credential, id: u32) -> Result<Namespace, UnlockError> {
        if !self.header.slots.iter().any(|slot| slot.id == id) {
            return Err(UnlockError::EmptySlot { id });
        }
        let slots: Vec<_> = self.suitable_slots(credential)?.into_iter().filter(|slot| slot.id == id).collect();
        secret::with_wiped_stack(|| self.unlock_with(credential, &slots))
    }

    /// Opens an ephemeral namespace with a fresh random key: whatever the data area held is noise now.
    ///
    /// Its header is not authenticated, since there is no key that could. A forged one can cause a loss, but no plaintext:
    /// no key is at stake, and no cipher but AES-XTS exists.
    ///
    /// # Errors
    ///
    /// [`UnlockError::NotEphemeral`], and [`UnlockError::Key`] when there are no random bytes.
    pub fn unlock_ephemeral(self) -> Result<Namespace, UnlockError> {
        let metadata = &self.chosen.copy.metadata;
        if !metadata.ephemeral {
            return Err(UnlockError::NotEphemeral);
        }
        let volume_key = VolumeKey::generate(metadata.key_bits.key_bytes())?;
        let mac_key = MacKey::new(&volume_key, metadata.uuid);
        Ok(self.into_namespace(volume_key, mac_key, None))
    }

    /// Unlocks with the volume key itself, as it was put in escrow, and authenticates the header.
    ///
    /// # Errors
    ///
    /// [`UnlockError::OtherVolumeKey`] when the header was not written by the holder of that key.
    pub fn unlock_volume_key(self, volume_key: VolumeKey) -> Result<Namespace, UnlockError> {
        if self.chosen.copy.metadata.ephemeral {
            return Err(UnlockError::Ephemeral);
        }
        let is_of_size = volume_key.bytes().len() == self.chosen.copy.metadata.key_bits.key_bytes();
        let mac_key = MacKey::new(&volume_key, self.chosen.copy.metadata.uuid);
        if !is_of_size || !self.chosen.copy.is_genuine(&mac_key) {
            let genuine = self.other_copy().filter(|other| other.was_written_by(&volume_key));
            let newer = self.chosen.name;
            return Err(genuine
                .map_or(UnlockError::OtherVolumeKey, |other| UnlockError::OtherCopy { newer, genuine: other.name }));
        }
        self.complete(volume_key, mac_key, None)
    }

    /// The header copy in use, to be kept somewhere else: 65536 bytes. Whoever has it and a credential of one of its slots
    /// has the volume key, also after that slot was removed or the namespace erased.
    ///
    /// # Errors
    ///
    /// A [`MediaError`] when it cannot be read.
    pub fn backup(&self) -> Result<Vec<u8>, MediaError> {
        Ok(self.area.read_image(self.chosen.name)?.to_vec())
    }

    /// Destroys every key slot and both header copies: overwritten, durable and read back. Without a backup of the header
    /// the data is lost. No key is needed.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; key material may then be left.
    pub fn erase(self) -> Result<(), WriteError> {
        destroy(&self.site)
    }

    /// The namespace as the other copy has it, when that is from before the transform that the newer one tells of. Data moves
    /// only when both copies tell of it, so nothing has moved.
    fn before_transform(&self) -> Option<Self> {
        self.chosen.copy.metadata.transform.as_ref()?;
        let copy = self.chosen.other.clone()?;
        if !self.is_on_media || copy.metadata.transform.is_some() || copy.metadata.uuid != self.header.uuid {
            return None;
        }
        let (name, states) = (self.chosen.name.other(), self.chosen.states.clone());
        Self::check(self.site.clone(), self.area.clone(), Chosen { copy, name, other: None, states }).ok()
    }

    fn suitable_slots(&self, credential: &Credential) -> Result<Vec<Slot>, UnlockError> {
        suitable_slots(&self.chosen.copy.metadata, credential)
    }

    fn unlock_with(self, credential: &Credential, slots: &[Slot]) -> Result<Namespace, UnlockError> {
        KdfWork::check(slots.iter().map(|slot| (slot.id, slot.kdf.work())))?;
        let purpose = self.chosen.copy.metadata.purpose();
        for slot in slots {
            if let Some(key) = slot.open(credential, &purpose)? {
                return self.authenticate(key, slot.id);
            }
        }
        Err(UnlockError::WrongCredential { slots_tried: u32::try_from(slots.len()).unwrap_or(u32::MAX) })
    }

    fn authenticate(self, key: SecretBytes, slot_id: u32) -> Result<Namespace, UnlockError> {
        let volume_key = VolumeKey::new(key)?;
        let mac_key = MacKey::new(&volume_key, self.chosen.copy.metadata.uuid);
        if !self.chosen.copy.is_genuine(&mac_key) {
            return Err(UnlockError::Forged);
        }
        self.complete(volume_key, mac_key, Some(slot_id))
    }

    /// The namespace that an authentic header tells of, with its transform. Every way in ends here.
    fn complete(self, volume_key: VolumeKey, mac_key: MacKey, slot_id: Option<u32>) -> Result<Namespace, UnlockError> {
        let is_on_media = self.is_on_media;
        let mut namespace = self.into_namespace(volume_key, mac_key, slot_id);
        namespace.load_transform()?;
        if !is_on_media {
            return Ok(namespace);
        }
        // Before anything is written: the data may be somebody else's.
        let is_to_be_bound = namespace.check_data()?;
        namespace.settle().map_err(UnlockError::Settle)?;
        if is_to_be_bound {
            namespace.bind_data().map_err(|error| UnlockError::Settle(error.into()))?;
        }
        Ok(namespace)
    }

    fn into_namespace(self, volume_key: VolumeKey, mac_key: MacKey, slot_id: Option<u32>) -> Namespace {
        Namespace {
            site: self.site,
            area: self.area,
            geometry: self.geometry,
            metadata: self.chosen.copy.metadata,
            sequence: self.chosen.copy.sequence,
            newest: self.chosen.name,
            copies: self.chosen.states,
            volume_key,
            mac_key,
            slot_id,
            pending: None,
        }
    }
}

/// A copy that is a header, and not the one that counts.
struct OtherCopy {
    name: CopyName,
    copy: HeaderCopy,
}

impl OtherCopy {
    /// The error that says more than `error`: this copy opens and is genuine, and the `chosen` one is not. A credential that
    /// was removed in the newer header opens the older one too, but then both are genuine.
    fn instead_of(&self, chosen: &Chosen, credential: &Credential, error: &UnlockError) -> Option<UnlockError> {
        match error {
            UnlockError::Forged | UnlockError::WrongCredential { .. } => {}
            UnlockError::NoSlotOfKind { .. } | UnlockError::Erased | UnlockError::Work(_) => {}
            _ => return None,
        }
        let volume_key = secret::with_wiped_stack(|| volume_key_of(&self.copy, credential))?.1;
        let newer_is_genuine = was_written_by(&chosen.copy, &volume_key);
        (self.was_written_by(&volume_key) && !newer_is_genuine)
            .then_some(UnlockError::OtherCopy { newer: chosen.name, genuine: self.name })
    }

    fn was_written_by(&self, volume_key: &VolumeKey) -> bool {
        was_written_by(&self.copy, volume_key)
    }
}

/// Whether the holder of the volume key has written a copy.
pub(super) fn was_written_by(copy: &HeaderCopy, volume_key: &VolumeKey) -> bool {
    volume_key.bytes().len() == copy.metadata.key_bits.key_bytes()
        && copy.is_genuine(&MacKey::new(volume_key, copy.metadata.uuid))
}

/// The slot of a copy that the credential opens, and the volume key in it; the copy may be forged all the same.
pub(super) fn volume_key_of(copy: &HeaderCopy, credential: &Credential) -> Option<(u32, VolumeKey)> {
    let slots = suitable_slots(&copy.metadata, credential).ok()?;
    KdfWork::check(slots.iter().map(|slot| (slot.id, slot.kdf.work()))).ok()?;
    let purpose = copy.metadata.purpose();
    let key = slots.iter().find_map(|slot| Some((slot.id, slot.open(credential, &purpose).ok()??)));
    key.and_then(|(id, key)| Some((id, VolumeKey::new(key).ok()?)))
}

/// There is no room for a header at the site.
pub(super) fn too_small(site: &Site) -> OpenError {
    OpenError::TooSmall { available_bytes: site.header_available_bytes(), header_bytes: HEADER_AREA_BYTES }
}

fn count(slots: &[&Slot]) -> u32 {
    u32::try_from(slots.len()).unwrap_or(u32::MAX)
}

fn check_address(geometry: &Geometry, site: &Site) -> Result<(), OpenError> {
    match (geometry.bound_address(), site.physical_address()) {
        (Some(bound), actual) if actual != Some(bound) => Err(OpenError::AddressChanged { bound, actual }),
        _ => Ok(()),
    }
}

/// The slots that a credential may open, which are worth trying.
fn suitable_slots(metadata: &Metadata, credential: &Credential) -> Result<Vec<Slot>, UnlockError> {
    if metadata.ephemeral {
        return Err(UnlockError::Ephemeral);
    }
    if metadata.slots.is_empty() {
        return Err(UnlockError::Erased);
    }
    kdf::check_credential(credential)?;
    let (passphrase, key_file): (Vec<_>, Vec<_>) =
        metadata.slots.iter().partition(|slot| matches!(slot.kdf, Kdf::Argon2id(_)));
    let (passphrase_slots, key_file_slots) = (count(&passphrase), count(&key_file));
    let suitable = if matches!(credential, Credential::Passphrase(_)) { passphrase } else { key_file };
    if suitable.is_empty() {
        return Err(UnlockError::NoSlotOfKind { passphrase_slots, key_file_slots });
    }
    Ok(suitable.into_iter().cloned().collect())
}

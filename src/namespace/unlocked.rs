//! An unlocked namespace: it holds the volume key and may change the header.
//!
//! Every change writes the older header copy first, and the other one only when that is durable.

use std::sync::Arc;

use super::area::{CopyName, CopyState, HeaderArea, WriteError};
use super::destroy::destroy;
use super::error::{Chain, UpdateError};
use super::geometry::{Geometry, Placement};
use super::header::{self, COPY_BYTES, MacKey};
use super::info::Header;
use super::kdf::{Credential, Kdf, KdfCost, KdfWork};
use super::metadata::{Cipher, Metadata, SLOT_COUNT_MAX, check_label};
use super::site::Site;
use super::slot::{Slot, SlotError};
use super::transform::Pending;
use crate::pmem::Backing;
use crate::secret::VolumeKey;

/// A namespace whose key is known and whose header is authenticated.
#[derive(Debug)]
pub struct Namespace {
    pub(super) site: Site,
    pub(super) area: HeaderArea,
    pub(super) geometry: Geometry,
    pub(super) metadata: Metadata,
    pub(super) sequence: u64,
    /// The copy that the next update must not overwrite first.
    pub(super) newest: CopyName,
    pub(super) copies: [CopyState; 2],
    pub(super) volume_key: VolumeKey,
    pub(super) mac_key: MacKey,
    pub(super) slot_id: Option<u32>,
    pub(super) pending: Option<Pending>,
}

impl Namespace {
    /// The backing of the data.
    #[must_use]
    pub const fn backing(&self) -> &Arc<Backing> {
        self.site.data()
    }

    /// Where it is.
    #[must_use]
    pub const fn site(&self) -> &Site {
        &self.site
    }

    /// The backing of the header: that of the data, unless the header is detached.
    #[must_use]
    pub const fn header_backing(&self) -> &Arc<Backing> {
        self.area.backing()
    }

    /// Where the data is.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The cipher.
    #[must_use]
    pub const fn cipher(&self) -> Cipher {
        self.metadata.key_bits
    }

    /// The volume key.
    #[must_use]
    pub const fn volume_key(&self) -> &VolumeKey {
        &self.volume_key
    }

    /// The slot that it was unlocked with; none for an ephemeral namespace, and when the volume key itself unlocked it.
    #[must_use]
    pub const fn slot_id(&self) -> Option<u32> {
        self.slot_id
    }

    /// The header as it is now.
    #[must_use]
    pub fn header(&self) -> Header {
        Header::of(&self.metadata, self.sequence, &self.copies)
    }

    /// Writes the header again, to both copies: this is how a backup that was unlocked is restored. Other key slots than those
    /// of the header that is there need `replace_slots`; that discards are allowed stays so.
    ///
    /// # Errors
    ///
    /// [`UpdateError::OtherVolumeKey`] when the header that is there now has another volume key: it was re-keyed since the
    /// backup. [`UpdateError::OtherSlots`]; [`UpdateError::Write`] when the header cannot be written.
    pub fn write_header(&mut self, replace_slots: bool) -> Result<(), UpdateError> {
        let present = CopyName::BOTH.into_iter().filter_map(|name| self.area.read_copy(name).ok());
        let present: Vec<_> = present.filter(|copy| copy.metadata.uuid == self.metadata.uuid).collect();
        // One copy that this volume key wrote is enough: anybody can put a forged one beside it.
        let genuine: Vec<_> = present.iter().filter(|copy| copy.is_genuine(&self.mac_key)).collect();
        if genuine.is_empty() && !present.is_empty() {
            return Err(UpdateError::OtherVolumeKey);
        }
        let newest = genuine.iter().max_by_key(|copy| copy.sequence);
        if let Some(newest) = newest.filter(|_| !replace_slots) {
            self.compare_slots(&newest.metadata)?;
        }
        // What was punched since is holes for ever, whatever an older header says.
        let discards = self.metadata.discards || genuine.iter().any(|copy| copy.metadata.discards);
        // The header that is there is what a power cut is to leave until the backup is durable.
        self.area.rewrite_copy(self.newest)?;
        self.update(Metadata { discards, ..self.metadata.clone() })
    }

    /// A slot keeps its salt as long as its credential opens it.
    fn compare_slots(&self, present: &Metadata) -> Result<(), UpdateError> {
        let missing = |from: &Metadata, there: &Metadata| -> Vec<u32> {
            let is_there = |slot: &Slot| there.slots.iter().any(|other| (other.id, other.salt) == (slot.id, slot.salt));
            from.slots.iter().filter(|slot| !is_there(slot)).map(|slot| slot.id).collect()
        };
        let (revived, lost) = (missing(&self.metadata, present), missing(present, &self.metadata));
        if revived.is_empty() && lost.is_empty() { Ok(()) } else { Err(UpdateError::OtherSlots { revived, lost }) }
    }

    /// Records that the namespace is in use (`true`) or closed in order (`false`). An ephemeral one has nothing to record:
    /// its content does not outlive its use.
    ///
    /// # Errors
    ///
    /// [`UpdateError`] when the header cannot be written.
    pub fn set_unclean(&mut self, unclean: bool) -> Result<(), UpdateError> {
        if self.metadata.ephemeral {
            return Ok(());
        }
        let metadata = Metadata { unclean, ..self.metadata.clone() };
        self.update(metadata)
    }

    /// Records whether the data area is still to be filled with noise. An ephemeral namespace has nothing to record.
    ///
    /// # Errors
    ///
    /// [`UpdateError`] when the header cannot be written.
    pub fn set_wiping(&mut self, wiping: bool) -> Result<(), UpdateError> {
        if self.metadata.ephemeral || self.metadata.wiping == wiping {
            return Ok(());
        }
        let metadata = Metadata { wiping, ..self.metadata.clone() };
        self.update(metadata)
    }

    /// Records that discards punch holes from now on, which read as zeroes. There is no way back: zeroes that were written
    /// may be holes.
    ///
    /// # Errors
    ///
    /// [`UpdateError`] when the header cannot be written.
    pub fn allow_discards(&mut self) -> Result<(), UpdateError> {
        if self.metadata.discards {
            return Ok(());
        }
        let metadata = Metadata { discards: true, ..self.metadata.clone() };
        self.update(metadata)
    }

    /// Adds a key slot, in the lowest free place when `id` is `None`, and gives its number.
    ///
    /// # Errors
    ///
    /// [`UpdateError`]; the slots are as before unless the error is one of writing.
    pub fn add_slot(
        &mut self,
        id: Option<u32>,
        label: &str,
        credential: &Credential,
        cost: KdfCost,
    ) -> Result<u32, UpdateError> {
        check_label(label).map_err(SlotError::Label)?;
        let id = self.free_slot(id)?;
        let mut metadata = self.metadata.clone();
        let index = metadata.slots.partition_point(|slot| slot.id < id);
        metadata.slots.insert(index, self.make_slot(id, label, credential, cost)?);
        self.update(metadata)?;
        Ok(id)
    }

    /// Removes a key slot from both header copies; the last one only with `even_last`.
    ///
    /// # Errors
    ///
    /// [`UpdateError`]; the slots are as before unless the error is one of writing.
    pub fn remove_slot(&mut self, id: u32, even_last: bool) -> Result<(), UpdateError> {
        let index = self.slot_index(id)?;
        if self.metadata.slots.len() == 1 && !even_last {
            return Err(UpdateError::LastSlot { id });
        }
        let mut metadata = self.metadata.clone();
        metadata.slots.remove(index);
        self.update(metadata)
    }

    /// Replaces the credential of a key slot, keeping its number and label.
    ///
    /// # Errors
    ///
    /// [`UpdateError`]; the slots are as before unless the error is one of writing.
    pub fn change_slot(&mut self, id: u32, credential: &Credential, cost: KdfCost) -> Result<(), UpdateError> {
        let index = self.slot_index(id)?;
        let mut metadata = self.metadata.clone();
        let label = metadata.slots[index].label.clone();
        metadata.slots[index] = self.make_slot(id, &label, credential, cost)?;
        self.update(metadata)
    }

    /// Takes note that the namespace may use `available_bytes` from its base on, because its backing or partition has
    /// another size now. What the backing does not have does not count.
    pub fn set_available_bytes(&mut self, available_bytes: u64) {
        self.site.set_available_bytes(available_bytes);
    }

    /// Whether the data area may get another size, wherever it is to have room: smaller only with `even_smaller`, and not
    /// while a transform is under way.
    ///
    /// # Errors
    ///
    /// [`UpdateError::Transforming`], [`UpdateError::Shrinks`], [`UpdateError::Geometry`].
    pub fn check_resize(&self, size_bytes: u64, even_smaller: bool) -> Result<(), UpdateError> {
        if self.pending.is_some() {
            return Err(UpdateError::Transforming);
        }
        let old_bytes = self.geometry.size_bytes();
        if size_bytes < old_bytes && !even_smaller {
            return Err(UpdateError::Shrinks { old_bytes, new_bytes: size_bytes });
        }
        Geometry::new(&Placement { size_bytes, ..self.geometry.placement() }, u64::MAX)?;
        Ok(())
    }

    /// Gives the data area another size, at most what its place has room for; smaller only with `even_smaller`. The
    /// data that stays is not touched.
    ///
    /// # Errors
    ///
    /// [`UpdateError`]; the size is as before unless the error is one of writing.
    pub fn resize(&mut self, size_bytes: u64, even_smaller: bool) -> Result<(), UpdateError> {
        self.resize_header(size_bytes, even_smaller)?;
        self.settle_tag()
    }

    /// [`Self::resize`] up to where the header tells the new size. The tag of data that became smaller is still where it was,
    /// because somebody may be writing to where it belongs: [`Self::settle_tag`] brings it there.
    pub(crate) fn resize_header(&mut self, size_bytes: u64, even_smaller: bool) -> Result<(), UpdateError> {
        self.check_resize(size_bytes, even_smaller)?;
        let (former_tag, tag_offset) = (self.metadata.tag_offset, self.tag_offset_of_size(size_bytes)?);
        let mut metadata = Metadata { size_bytes, tag_offset, ..self.metadata.clone() };
        let geometry = Geometry::new(&metadata.placement(self.site.origin()), self.site.available_bytes())?;
        let (old, new) = (self.metadata.purpose(), metadata.purpose());
        for slot in &mut metadata.slots {
            let id = slot.id;
            let rewrapped = slot.rewrapped(&self.volume_key, &old, &self.volume_key, &new)?;
            *slot = rewrapped.ok_or(UpdateError::RewrapFailed { id })?;
        }
        self.write_tag_at(tag_offset)?;
        // What holds it is that long, but perhaps not durably: whoever made it longer may have died.
        self.site.data().sync_blocks().map_err(WriteError::from)?;
        let updated = self.update(metadata);
        if self.metadata.size_bytes == size_bytes {
            self.geometry = geometry; // it is in force with the first copy that is durable
        }
        updated?;
        self.forget_tag_at(former_tag)
    }

    /// Writes both copies of the header, as after [`format_withheld`](super::format_withheld).
    ///
    /// # Errors
    ///
    /// [`UpdateError`].
    pub fn publish(&mut self) -> Result<(), UpdateError> {
        let metadata = self.metadata.clone();
        self.update(metadata)
    }

    /// Destroys every key slot and both header copies: overwritten, durable and read back. The data is then lost.
    ///
    /// # Errors
    ///
    /// [`WriteError`]; key material may then be left.
    pub fn erase(self) -> Result<(), WriteError> {
        destroy(&self.site)
    }

    fn make_slot(&self, id: u32, label: &str, credential: &Credential, cost: KdfCost) -> Result<Slot, UpdateError> {
        if self.metadata.ephemeral {
            return Err(UpdateError::Ephemeral);
        }
        cost.check().map_err(SlotError::Cost)?;
        let kdf = Kdf::for_credential(credential, cost);
        let others = self.metadata.slots.iter().filter(|slot| slot.id != id).map(|slot| (slot.id, slot.kdf.work()));
        KdfWork::check(others.chain([(id, kdf.work())])).map_err(SlotError::Work)?;
        Ok(Slot::create(id, label, kdf, credential, &self.metadata.purpose(), &self.volume_key)?)
    }

    fn free_slot(&self, wanted: Option<u32>) -> Result<u32, UpdateError> {
        let taken = |id: u32| self.metadata.slots.iter().any(|slot| slot.id == id);
        match wanted {
            Some(id) if id >= SLOT_COUNT_MAX => Err(UpdateError::SlotNumber { id }),
            Some(id) if taken(id) => Err(UpdateError::SlotInUse { id }),
            Some(id) => Ok(id),
            None => (0..SLOT_COUNT_MAX).find(|&id| !taken(id)).ok_or(UpdateError::SlotsFull),
        }
    }

    fn slot_index(&self, id: u32) -> Result<usize, UpdateError> {
        if id >= SLOT_COUNT_MAX {
            return Err(UpdateError::SlotNumber { id });
        }
        self.metadata.slots.iter().position(|slot| slot.id == id).ok_or(UpdateError::SlotEmpty { id })
    }

    /// Makes `metadata` the header, in both copies. This object follows as soon as one copy is durable.
    pub(super) fn update(&mut self, metadata: Metadata) -> Result<(), UpdateError> {
        if self.metadata.ephemeral {
            return Err(UpdateError::Ephemeral);
        }
        let sequence = self.sequence.checked_add(1).ok_or(UpdateError::SequenceExhausted)?;
        let image = header::encode(sequence, &metadata, &self.mac_key)?;
        let older = self.newest.other();
        self.write_copy(older, sequence, &image)?;
        (self.sequence, self.metadata, self.newest) = (sequence, metadata, older);
        Ok(self.write_copy(older.other(), sequence, &image)?)
    }

    /// Writes one copy, and remembers what became of it.
    pub(super) fn write_copy(
        &mut self,
        name: CopyName,
        sequence: u64,
        image: &[u8; COPY_BYTES],
    ) -> Result<(), WriteError> {
        let written = self.area.write_copy(name, image);
        self.copies[name as usize] = match &written {
            Ok(()) => CopyState::Good { sequence },
            Err(error) => CopyState::Bad { reason: Chain(error).to_string() },
        };
        written
    }
}

//! The key slots of a namespace that moves to another place: they open the namespace there as they opened it here.

use super::error::UpdateError;
use super::kdf::Credential;
use super::slot::Slot;
use super::unlocked::Namespace;

impl Namespace {
    /// Gives this namespace, whose header is [withheld](super::format_withheld), the key slots of `from`, with their numbers
    /// and names: a fresh one for `credential` in the place of the one that unlocked `from`, and the others under their old
    /// wrapping keys. [`Self::publish`] then writes them.
    ///
    /// # Errors
    ///
    /// [`UpdateError`]; nothing has changed.
    pub fn carry_slots(&mut self, from: &Self, credential: &Credential) -> Result<(), UpdateError> {
        let (old_purpose, purpose) = (from.metadata.purpose(), self.metadata.purpose());
        let mut slots = Vec::with_capacity(from.metadata.slots.len());
        for slot in &from.metadata.slots {
            let id = slot.id;
            if Some(id) == from.slot_id {
                slots.push(Slot::create(id, &slot.label, slot.kdf, credential, &purpose, &self.volume_key)?);
            } else {
                let kept = slot.rewrapped(&from.volume_key, &old_purpose, &self.volume_key, &purpose)?;
                slots.push(kept.ok_or(UpdateError::RewrapFailed { id })?);
            }
        }
        self.metadata.slots = slots;
        self.slot_id = from.slot_id;
        Ok(())
    }
}

//! The key slots of a namespace. The volume key itself never changes here: a slot that was removed opens again from an old
//! copy of the header.

use super::error::Cause;
use crate::namespace::{Credential, Kdf, KdfCost, Namespace};
use crate::secret::VolumeKey;
use crate::volume::Volume;

/// Adds a key slot, in the lowest free place when `slot` is `None`, and gives its number.
///
/// # Errors
///
/// [`Cause::Update`].
pub fn add(
    namespace: &mut Namespace,
    slot: Option<u32>,
    label: &str,
    credential: &Credential,
    cost: KdfCost,
) -> Result<u32, Cause> {
    Ok(namespace.add_slot(slot, label, credential, cost)?)
}

/// Removes a key slot from both header copies: the last one, and the one that unlocked, only with `force`.
///
/// # Errors
///
/// [`Cause::OwnSlot`], [`Cause::Update`].
pub fn remove(namespace: &mut Namespace, slot: u32, force: bool) -> Result<(), Cause> {
    let is_last = namespace.header().slots.len() == 1;
    if namespace.slot_id() == Some(slot) && !is_last && !force {
        return Err(Cause::OwnSlot { slot });
    }
    Ok(namespace.remove_slot(slot, force)?)
}

/// Gives a key slot, or the one that unlocked, another credential; its number.
///
/// # Errors
///
/// [`Cause::SlotNeeded`], [`Cause::Update`].
pub fn change(
    namespace: &mut Namespace,
    slot: Option<u32>,
    credential: &Credential,
    cost: KdfCost,
) -> Result<u32, Cause> {
    let slot = slot.or_else(|| namespace.slot_id()).ok_or(Cause::SlotNeeded)?;
    namespace.change_slot(slot, credential, cost)?;
    Ok(slot)
}

/// What the key derivation of a slot costs that is to be changed (`None` is the one that unlocked), for the passphrase that
/// it gets: what it costs today. A slot of a recovery phrase or a key file, which needs no expensive one, gets the default.
#[must_use]
pub fn present_cost(namespace: &Namespace, slot: Option<u32>) -> KdfCost {
    let id = slot.or_else(|| namespace.slot_id());
    let slots = namespace.header().slots;
    match slots.iter().find(|slot| Some(slot.id) == id).map(|slot| slot.kdf) {
        Some(Kdf::Argon2id(cost)) if cost != KdfCost::LEAST => cost,
        _ => KdfCost::default(),
    }
}

/// The volume key, to be kept in escrow: it decrypts everything until the next re-key, whatever becomes of the slots.
#[must_use]
pub const fn dump(namespace: &Namespace) -> &VolumeKey {
    namespace.volume_key()
}

/// As [`add`], while the volume is in use; `present` is the credential of one of its slots.
///
/// # Errors
///
/// [`Cause::Transform`] when `present` opens none, and as [`add`].
pub fn add_in_use(
    volume: &Volume,
    present: &Credential,
    slot: Option<u32>,
    label: &str,
    credential: &Credential,
    cost: KdfCost,
) -> Result<u32, Cause> {
    volume.use_slot_of(present)?;
    volume.with_namespace(|namespace| add(namespace, slot, label, credential, cost))
}

/// As [`remove`], while the volume is in use; `present` is the credential of one of its slots.
///
/// # Errors
///
/// [`Cause::Transform`] when `present` opens none, and as [`remove`].
pub fn remove_in_use(volume: &Volume, present: &Credential, slot: u32, force: bool) -> Result<(), Cause> {
    volume.use_slot_of(present)?;
    volume.with_namespace(|namespace| remove(namespace, slot, force))
}

/// As [`change`], while the volume is in use; `present` is the credential of one of its slots, and `cost` makes what the
/// slot costs of what it [costs today](present_cost).
///
/// # Errors
///
/// [`Cause::Transform`] when `present` opens none, and as [`change`].
pub fn change_in_use(
    volume: &Volume,
    present: &Credential,
    slot: Option<u32>,
    credential: &Credential,
    cost: impl FnOnce(KdfCost) -> KdfCost,
) -> Result<u32, Cause> {
    volume.use_slot_of(present)?;
    volume.with_namespace(|namespace| {
        let cost = cost(present_cost(namespace, slot));
        change(namespace, slot, credential, cost)
    })
}

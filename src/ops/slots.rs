//! What becomes of the key slots that the key at hand does not open, when the volume key changes: one policy for every
//! operation that changes it.

use super::error::Cause;
use crate::namespace::{OtherSlots, SlotInfo};

/// What is said about the other slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotPolicy {
    /// Nothing: when there are some, it must be said.
    #[default]
    Ask,
    /// They open the new volume key as they opened the old one.
    Keep,
    /// They are gone.
    Drop,
}

impl SlotPolicy {
    /// What happens to `others`.
    ///
    /// # Errors
    ///
    /// [`Cause::OtherSlots`] with the slots that it must be said about.
    pub fn decide(self, others: &[SlotInfo]) -> Result<OtherSlots, Cause> {
        match self {
            Self::Ask if !others.is_empty() => Err(Cause::OtherSlots(others.to_vec())),
            Self::Ask | Self::Drop => Ok(OtherSlots::Drop),
            Self::Keep => Ok(OtherSlots::Keep),
        }
    }
}

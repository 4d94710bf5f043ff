//! A new volume key for a namespace, in place.
//!
//! The namespace is usable at every instant: it opens with its key whether this ended, was stopped or was killed, and both
//! halves decrypt. What is left is done by whoever resumes it, or by a server while it serves.

use std::time::{Duration, Instant};

use super::error::Cause;
use super::slots::SlotPolicy;
use crate::namespace::{
    Cipher, Credential, DataUnit, Geometry, Namespace, Placement, RekeyOptions, SlotInfo, TransformError,
};
use crate::volume::{Volume, VolumeError};

/// How much is decrypted to see how fast that is, at most.
const TRIAL_BYTES: u64 = 64 << 20;
/// How long that may take.
const TRIAL_TIME: Duration = Duration::from_secs(2);

/// What a re-key is to change besides the volume key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish {
    /// The cipher from now on; without it, the present one.
    pub cipher: Option<Cipher>,
    /// The data unit from now on; without it, the present one.
    pub unit: Option<DataUnit>,
    /// What becomes of the key slots that the key at hand does not open.
    pub slots: SlotPolicy,
}

impl Wish {
    fn options(self, others: &[SlotInfo]) -> Result<RekeyOptions, Cause> {
        Ok(RekeyOptions { cipher: self.cipher, unit: self.unit, other_slots: self.slots.decide(others)? })
    }
}

/// What has begun.
#[derive(Debug)]
pub struct Began {
    /// The slot that is new, and opens with the key at hand.
    pub slot: Option<u32>,
    /// The others, which were kept or dropped.
    pub others: Vec<SlotInfo>,
}

/// Begins to give a namespace that `credential` unlocked a new volume key: the header has it when this returns.
///
/// # Errors
///
/// [`Cause::OtherSlots`], with nothing changed; [`Cause::Transform`].
pub fn begin(namespace: &mut Namespace, credential: &Credential, wish: Wish) -> Result<Began, Cause> {
    let others = namespace.other_slots();
    let options = wish.options(&others)?;
    namespace.begin_rekey(credential, &options)?;
    Ok(Began { slot: namespace.slot_id(), others })
}

/// As [`begin`], while the volume is in use; `credential` must be that of one of its slots.
///
/// # Errors
///
/// As [`begin`].
pub fn begin_in_use(volume: &Volume, credential: &Credential, wish: Wish) -> Result<(), Cause> {
    volume.use_slot_of(credential)?;
    let options = wish.options(&volume.other_slots())?;
    Ok(volume.begin_rekey(credential, &options)?)
}

/// What a re-key would cost.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Estimate {
    /// Bytes that would be written anew.
    pub size_bytes: u64,
    /// Bytes a second that are read and decrypted here.
    pub decrypted_bytes_per_second: u64,
    /// The slots besides the one that unlocked.
    pub others: Vec<SlotInfo>,
    /// Bytes of the data that have no blocks yet, and will need them.
    pub blocks_bytes: u64,
    /// Bytes that the file system under a file can still give; nothing for a device.
    pub free_bytes: Option<u64>,
}

/// What a re-key of `volume` as `wish` says would cost; nothing is written.
///
/// # Errors
///
/// [`Cause::Transform`] for a unit that is not possible here, [`Cause::Volume`].
pub fn estimate(volume: &Volume, wish: Wish) -> Result<Estimate, Cause> {
    let geometry = volume.geometry();
    let placement = Placement { unit: wish.unit.unwrap_or_else(|| geometry.unit()), ..geometry.placement() };
    Geometry::new(&placement, u64::MAX).map_err(TransformError::from)?;
    Ok(Estimate {
        size_bytes: volume.size(),
        decrypted_bytes_per_second: decryption_rate(volume)?,
        others: volume.other_slots(),
        blocks_bytes: volume.blocks_needed(geometry.data_offset())?,
        free_bytes: volume.backing().free_bytes(),
    })
}

/// Bytes a second, from the beginning of the volume.
fn decryption_rate(volume: &Volume) -> Result<u64, VolumeError> {
    let mut buffer = zeroize::Zeroizing::new(vec![0; 1 << 20]);
    let (started, mut offset) = (Instant::now(), 0);
    while offset < volume.size().min(TRIAL_BYTES) && started.elapsed() < TRIAL_TIME {
        let len = usize::try_from(volume.size() - offset).unwrap_or(usize::MAX).min(buffer.len());
        volume.read_at(&mut buffer[..len], offset)?;
        offset += len as u64;
    }
    let nanoseconds = started.elapsed().as_nanos().max(1);
    Ok(u64::try_from(u128::from(offset) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX))
}

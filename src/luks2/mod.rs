//! LUKS2: the volumes of `cryptsetup`, opened as they are, and headers that it opens.
//!
//! [`Locked::open`] reads and checks a header, [`Locked::unlock`] opens a key slot, and what comes of it is served and
//! mapped like a namespace. [`export()`] writes a detached header for a namespace whose header is detached, too, so that
//! `cryptsetup` and the kernel take over. The format is that of the "LUKS2 On-Disk Format Specification", version 1.1.
//!
//! What is read was written by anybody: every length is bounded before it is used, and a header that this program does not
//! understand in full (requirements, an unfinished reencryption, integrity, another cipher) is refused and never repaired.
//! Nothing here changes a LUKS2 header.
#![deny(clippy::little_endian_bytes)]

mod antiforensic;
mod error;
mod export;
mod header;
mod kdf;
mod metadata;
mod open;
mod slot;

pub use error::{ExportError, HeaderFault, OpenError, UnlockError};
pub use export::{ExportOptions, SlotKdf, export};
pub use kdf::PBKDF2_ITERATIONS_MAX;
pub use open::{Info, Locked, SlotInfo, Unlocked};

#[cfg(test)]
mod tests;

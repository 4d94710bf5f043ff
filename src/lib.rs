//! Encrypted persistent memory in user space: what dm-crypt is to disks, for pmem and DAX.
//!
//! A *namespace* (a file, a device, or a part of one) holds AES-XTS ciphertext under one key. Unlocked, it is a
//! [`Volume`](volume::Volume): plaintext by logical offset, read and written from many threads, served over NBD by
//! [`nbd_server`], and mapped into the program's own memory by [`dax`]. The XTS tweak is the physical offset of the data,
//! so ciphertext that was moved reads as noise.
//!
//! ```
//! use daxcrypt::namespace::Credential;
//! use daxcrypt::secret::SecretBytes;
//! use daxcrypt::volume::Volume;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! let path = folder.path().join("vault.img");
//! let key = Credential::KeyFile(SecretBytes::random(64)?);
//! drop(Volume::create(&path, 1 << 20, &key)?);
//!
//! let volume = Volume::open(&path, &key)?;
//! volume.write_at(b"hello, pmem", 4096)?;
//! volume.persist(4096..4107)?; // durable on media when it returns
//!
//! let mut text = [0; 11];
//! volume.read_at(&mut text, 4096)?;
//! assert_eq!(&text, b"hello, pmem");
//! # Ok(())
//! # }
//! ```
//!
//! What is protected, and what not, is in [`threat_model`]; what people ask first in [`faq`].
//!
//! # Features
//!
//! | feature | what it adds | needs |
//! |---|---|---|
//! | (none) | namespaces, volumes, the direct map, `ops`: everything that is done to namespaces | |
//! | `luks2` | volumes and headers of LUKS2 | |
//! | `nbd` | the NBD server | |
//! | `tls` | TLS for its connections | `nbd` |
//! | `cli` | the program | `nbd`, `tls`, `luks2` |
//! | `sim` | simulated media, which lose what was not flushed: for crash tests | |
//!
//! `cli` and `sim` are the default. A library asks for `default-features = false`.
//!
//! # Layers
//!
//! Imports point downwards only (`tests/tidy.rs`):
//!
//! ```text
//! main -> cli
//!          |
//!     +----+------+
//!    ops     nbd_server    dax                what is done to namespaces; NBD; the direct map
//!     |           |         |
//!     +-------> volume <----+                 the decrypted view
//!                  |
//!       +----------+---------+
//!   namespace     xts       pmem               (luks2, beside the volume's namespace, uses all three)
//!   on media    AES-XTS   mapping, persist, media errors
//!       |
//!   secret, memory                            key memory, raw memory
//! ```

// What a layer above asks for is not dead where that layer is left out.
#![cfg_attr(not(all(feature = "cli", feature = "sim")), allow(dead_code))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", target_endian = "little")))]
compile_error!("daxcrypt supports 64-bit little-endian Linux only");

mod barrier;
#[cfg(feature = "cli")]
pub mod cli;
pub mod dax;
#[doc = include_str!("../docs/faq.md")]
pub mod faq {}
#[cfg(feature = "luks2")]
pub mod luks2;
pub mod memory;
pub mod namespace;
#[cfg(feature = "nbd")]
pub mod nbd_server;
pub mod ops;
mod owner;
#[cfg(feature = "nbd")]
mod peer_groups;
pub mod pmem;
pub mod secret;
mod spawn;
mod sync;
#[doc = include_str!("../docs/threat-model.md")]
pub mod threat_model {}
mod uffd;
pub mod volume;
pub mod xts;

/// What no operation may leave on media; shared with the tests of the program.
#[cfg(test)]
#[path = "../tests/common/leftovers.rs"]
mod leftovers;

/// The Rust of README and of the library's guide compiles as it is printed.
#[cfg(doctest)]
mod printed {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/library.md")]
    struct Library;
}

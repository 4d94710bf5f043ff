//! Encrypted persistent memory in user space: what dm-crypt is to disks, for pmem and DAX.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", target_endian = "little")))]
compile_error!("daxcrypt supports 64-bit little-endian Linux only");

pub mod cli;
pub mod dax;
pub mod memory;
pub mod namespace;
pub mod nbd_server;
pub mod pmem;
pub mod secret;
pub mod volume;
pub mod xts;

//! What the examples share: a namespace of 16 MiB in a folder, with a key file beside it.
//!
//! A key beside its data protects nothing. It keeps the examples short.

use std::error::Error;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use daxcrypt::namespace::Credential;
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;

const SIZE_BYTES: u64 = 16 << 20;

/// Unlocks `folder/vault.img` with `folder/vault.key`, after making both when they are not there.
pub(crate) fn open_or_create(folder: &Path) -> Result<Arc<Volume>, Box<dyn Error>> {
    let (image, key_file) = (folder.join("vault.img"), folder.join("vault.key"));
    if image.exists() {
        let key = Credential::KeyFile(SecretBytes::copy_of(&fs::read(key_file)?));
        return Ok(Volume::open(image, &key)?);
    }
    let key = SecretBytes::random(64)?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(key_file)?;
    std::io::Write::write_all(&mut file, &key)?;
    let volume = Volume::create(image, SIZE_BYTES, &Credential::KeyFile(key))?;
    volume.write_zeroes(0, SIZE_BYTES)?; // a new namespace reads as noise
    volume.flush()?;
    Ok(volume)
}

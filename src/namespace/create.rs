//! Making a namespace: a fresh volume key, one key slot, and both header copies.

use std::sync::Arc;

use uuid::Uuid;

use super::area::{CopyName, CopyState, WriteError};
use super::data_tag;
use super::destroy::emptied;
use super::error::FormatError;
use super::geometry::{
    DataUnit, Geometry, GeometryError, HEADER_AREA_BYTES, Placement, data_offset_for, detached_data_offset_for,
    size_that_fits,
};
use super::header::{self, MacKey};
use super::kdf::{Credential, Kdf, KdfCost, KdfWork};
use super::metadata::{Cipher, CipherName, Metadata, check_label};
use super::signature::{foreign_signature, telling_pages};
use super::site::Site;
use super::slot::{Slot, SlotError};
use super::unlocked::Namespace;
use super::wipe::{confirm_zeros, overwrite_with_zeros};
use crate::pmem::Backing;
use crate::secret::{self, VolumeKey};

const FIRST_SEQUENCE: u64 = 1;
const FIRST_SLOT: u32 = 0;

/// What a new namespace is to be.
#[derive(Debug)]
pub struct FormatOptions {
    /// The cipher.
    pub cipher: Cipher,
    /// The data unit.
    pub unit: DataUnit,
    /// The user's name for the namespace, may be empty.
    pub label: String,
    /// What Argon2id costs, for a passphrase.
    pub kdf_cost: KdfCost,
    /// Size of the data area in bytes; without it, all that fits: a page is left for the tag behind data whose header is
    /// detached. With it, such data gets a tag where there is room for one.
    pub size_bytes: Option<u64>,
    /// Where in the backing the namespace begins. (When the backing is a partition of the kernel's, the base in the header
    /// is that offset on the disk.)
    pub base: u64,
    /// Bytes from the base that it may use; without it, up to the end of the backing.
    pub available_bytes: Option<u64>,
    /// Whether the tweaks are bound to the physical address of the backing.
    pub bind_address: bool,
    /// Whether discards punch holes, which then read as zeroes and show on media which units are unused.
    pub allow_discards: bool,
    /// The volume key to use; without it, a random one.
    pub volume_key: Option<VolumeKey>,
    /// Where the header goes when it is detached: the data then takes the namespace from its first byte, or from its
    /// first 2 MiB boundary of the backing.
    pub header: Option<Arc<Backing>>,
}

impl Default for FormatOptions {
    /// AES-256-XTS in units of 4096 bytes, over the whole backing.
    fn default() -> Self {
        Self {
            cipher: Cipher::Aes256Xts,
            unit: DataUnit::Bytes4096,
            label: String::new(),
            kdf_cost: KdfCost::default(),
            size_bytes: None,
            base: 0,
            available_bytes: None,
            bind_address: false,
            allow_discards: false,
            volume_key: None,
            header: None,
        }
    }
}

/// Writes a new namespace, unlocked by `credential`. The header area is overwritten; the data area is not touched, but for a
/// header or partition table in front of what becomes the data of a detached header. Behind that its tag is written.
///
/// Asking [`signature_found`](super::signature_found) first is the caller's part.
///
/// # Errors
///
/// [`FormatError`]; until the error is one of writing, nothing on media has changed.
pub fn format(
    backing: Arc<Backing>,
    options: FormatOptions,
    credential: &Credential,
) -> Result<Namespace, FormatError> {
    let mut namespace = create(backing, options, Some(credential))?;
    namespace.write_new()?;
    Ok(namespace)
}

/// As [`format()`], but leaves the header area empty: durable when this returns. What was there opens no more, and what
/// is to be there opens when [`Namespace::publish`] has written the header. For data that takes long to arrive.
///
/// # Errors
///
/// As [`format()`].
pub fn format_withheld(
    backing: Arc<Backing>,
    options: FormatOptions,
    credential: &Credential,
) -> Result<Namespace, FormatError> {
    create(backing, options, Some(credential))
}

/// Writes a new namespace whose volume key is never stored: each opening has a key, and thus content, of its own. For
/// swap and scratch space.
///
/// # Errors
///
/// As [`format()`].
pub fn format_ephemeral(backing: Arc<Backing>, options: FormatOptions) -> Result<Namespace, FormatError> {
    let mut namespace = create(backing, options, None)?;
    namespace.write_new()?;
    Ok(namespace)
}

/// With a credential its slot is made; without one the namespace is ephemeral. Media have an empty header area then.
fn create(
    backing: Arc<Backing>,
    options: FormatOptions,
    credential: Option<&Credential>,
) -> Result<Namespace, FormatError> {
    check_label(&options.label).map_err(SlotError::Label)?;
    options.kdf_cost.check().map_err(SlotError::Cost)?;
    KdfWork::check([(0, options.kdf_cost.work())]).map_err(SlotError::Work)?;
    let site = Site::part(backing, options.base, options.available_bytes.unwrap_or(u64::MAX));
    let site = site.with_header(options.header.clone());
    let (geometry, tag_offset) = place(&site, &options, credential.is_some())?;
    let available_bytes = site.header_available_bytes();
    site.area().ok_or(GeometryError::NoRoom { available_bytes, header_bytes: HEADER_AREA_BYTES })?;
    let mut metadata = empty_metadata(&geometry, options.cipher, options.label, options.allow_discards);
    let volume_key = volume_key(options.cipher, options.volume_key)?;
    (metadata.ephemeral, metadata.tag_offset) = (credential.is_none(), tag_offset);
    if let Some(credential) = credential {
        let kdf = Kdf::for_credential(credential, options.kdf_cost);
        let purpose = metadata.purpose();
        let slot = secret::with_wiped_stack(|| Slot::create(FIRST_SLOT, "", kdf, credential, &purpose, &volume_key));
        metadata.slots.push(slot?);
    }
    let mac_key = MacKey::new(&volume_key, metadata.uuid);
    // Before anything is overwritten: what does not fit into a copy is found here.
    header::encode(FIRST_SEQUENCE, &metadata, &mac_key)?;
    // A namespace that was here is destroyed with all that it has elsewhere.
    let area = emptied(&site)?;
    if site.is_detached() {
        clear_foreign_header(&site)?;
        data_tag::write_first(&site, &metadata, &volume_key)?;
    }
    Ok(Namespace {
        site,
        area,
        geometry,
        metadata,
        sequence: FIRST_SEQUENCE,
        newest: CopyName::A,
        copies: [CopyName::A, CopyName::B].map(|_| CopyState::Bad { reason: "it is not written yet".into() }),
        volume_key,
        mac_key,
        slot_id: credential.map(|_| FIRST_SLOT),
        pending: None,
    })
}

/// How much of what a header announces may hold keys: both copies of ours, or a LUKS2 header with its key slots.
const FOREIGN_HEADER_BYTES: u64 = 16 << 20;

/// Destroys the header that detached data begins with: its keys are not the new namespace's, and whoever has one could open
/// what it encrypted, until writes happen to reach it.
fn clear_foreign_header(site: &Site) -> Result<(), WriteError> {
    let Some((_, signature)) = foreign_signature(site.data(), site.start())? else {
        // An earlier try may have cleared it without making that durable.
        let pages = telling_pages(site.data(), site.start());
        return Ok(pages.into_iter().try_for_each(|page| confirm_zeros(site.data(), page))?);
    };
    let end = site.start() + site.available_bytes().min(FOREIGN_HEADER_BYTES);
    // What announces it goes last: after a power cut in between the next try must find that there is something left.
    for range in [signature.end..end, site.start()..signature.start, signature] {
        overwrite_with_zeros(site.data(), range, |_| {})?;
    }
    Ok(())
}

impl Namespace {
    /// Writes both copies of the first header.
    fn write_new(&mut self) -> Result<(), FormatError> {
        let image = header::encode(self.sequence, &self.metadata, &self.mac_key)?;
        CopyName::BOTH.into_iter().try_for_each(|name| Ok(self.write_copy(name, self.sequence, &image)?))
    }
}

/// Where it is to be, and where the tag of detached data that keeps its key.
fn place(site: &Site, options: &FormatOptions, keeps_key: bool) -> Result<(Geometry, Option<u64>), FormatError> {
    let (base, available_bytes, detached) = (site.base(), site.available_bytes(), site.is_detached());
    let data_offset = if detached { detached_data_offset_for(base)? } else { data_offset_for(base)? };
    let (size_bytes, tag_offset) = match options.size_bytes {
        wished if detached && keeps_key => data_tag::new_data(data_offset, available_bytes, options.unit, wished)?,
        Some(size_bytes) => (size_bytes, None),
        None => (size_that_fits(data_offset, available_bytes, options.unit)?, None),
    };
    let bound_address = match (options.bind_address, site.physical_address()) {
        (false, _) => None,
        (true, None) => return Err(FormatError::NoPhysicalAddress),
        (true, address) => address,
    };
    let (origin, unit) = (site.origin(), options.unit);
    let placement = Placement { origin, base, data_offset, size_bytes, unit, bound_address, detached };
    Ok((Geometry::new(&placement, available_bytes)?, tag_offset))
}

fn volume_key(cipher: Cipher, given: Option<VolumeKey>) -> Result<VolumeKey, FormatError> {
    let expected_bytes = cipher.key_bytes();
    match given {
        None => Ok(VolumeKey::generate(expected_bytes)?),
        Some(key) if key.bytes().len() == expected_bytes => Ok(key),
        Some(key) => Err(FormatError::KeyLength { key_bytes: key.bytes().len(), expected_bytes }),
    }
}

fn empty_metadata(geometry: &Geometry, cipher: Cipher, label: String, allow_discards: bool) -> Metadata {
    Metadata {
        requirements: Vec::new(),
        uuid: Uuid::new_v4(),
        label,
        cipher: CipherName::AesXtsPlain64,
        key_bits: cipher,
        unit_bytes: geometry.unit(),
        base: geometry.base(),
        data_offset: geometry.data_offset(),
        size_bytes: geometry.size_bytes(),
        bound_address: geometry.bound_address(),
        detached: geometry.placement().detached,
        ephemeral: false,
        unclean: false,
        discards: allow_discards,
        slots: Vec::new(),
        tag_offset: None,
        wiping: false,
        transform: None,
    }
}

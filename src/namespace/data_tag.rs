//! What tells the data of a detached header from any other: a tag under the volume key, in a page of its own behind it.
//!
//! The header says where that page is. One rule holds at every instant: the tag under the volume key of a header that may be
//! on media is on media, where that header says, before the header is. So a tag is written first and the header then; and what
//! was the tag until then is overwritten when both header copies are durable. A new volume key writes its tag beside that of
//! the old one, in the same page: a power cut tears one of them, and the header in force needs the other.
//!
//! Around its tag the page holds noise, so that detached data shows nothing but noise. Nobody but the namespace uses it: the
//! data area ends before it.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::area::WriteError;
use super::error::{FormatError, UnlockError, UpdateError};
use super::geometry::{DataUnit, Geometry, GeometryError, Layout, size_that_fits};
use super::kdf;
use super::metadata::Metadata;
use super::site::Site;
use super::slot::random;
use super::transform::TransformError;
use super::unlocked::Namespace;
use crate::pmem::{Access, Backing, MediaError};
use crate::secret::{KeyError, VolumeKey};

/// Bytes of the page that holds the tag.
const PAGE_BYTES: usize = 4096;
const TAG_PAGE_BYTES: u64 = PAGE_BYTES as u64;

const TAG_BYTES: usize = 32;

/// Where in its page a tag may be: in different sectors, so that both can be there while the volume key changes.
const PLACES: [u64; 2] = [0, 2048];

const LABEL: &[u8; 20] = b"daxcrypt data tag v1";

type Tag = [u8; TAG_BYTES];

fn tag_of(volume_key: &VolumeKey, uuid: Uuid) -> Tag {
    let key = kdf::derive_key(uuid.as_bytes(), volume_key.bytes(), b"daxcrypt v1 data tag");
    let mac = Hmac::<Sha256>::new_from_slice(&key[..]).expect("HMAC takes keys of any length");
    mac.chain_update(LABEL).chain_update(uuid.as_bytes()).finalize().into_bytes().into()
}

/// Bytes from the base to the page behind `size_bytes` of data: whole pages from the start of the data on.
pub(super) fn page_offset(data_offset: u64, size_bytes: u64) -> Option<u64> {
    data_offset.checked_add(size_bytes.checked_next_multiple_of(TAG_PAGE_BYTES)?)
}

/// Bytes from the base that detached data of `size_bytes` takes with the page of its tag. `None` above 2^64.
#[must_use]
pub fn detached_bytes(data_offset: u64, size_bytes: u64) -> Option<u64> {
    page_offset(data_offset, size_bytes)?.checked_add(TAG_PAGE_BYTES)
}

/// The size and the place of the tag of new detached data: all that fits with a tag behind it, unless a size is wished for,
/// and then the tag where there is room.
pub(super) fn new_data(
    data_offset: u64,
    available_bytes: u64,
    unit: DataUnit,
    wished: Option<u64>,
) -> Result<(u64, Option<u64>), GeometryError> {
    let fits = |size_bytes| detached_bytes(data_offset, size_bytes).is_some_and(|end| end <= available_bytes);
    let size_bytes = match wished {
        Some(size_bytes) => size_bytes,
        None => size_that_fits(data_offset, before_page(data_offset, available_bytes), unit)?,
    };
    Ok((size_bytes, page_offset(data_offset, size_bytes).filter(|_| fits(size_bytes))))
}

/// Bytes from the base to the last page of `available_bytes`; all of them where a page would leave nothing.
fn before_page(data_offset: u64, available_bytes: u64) -> u64 {
    let room = available_bytes.saturating_sub(data_offset);
    match (room - room % TAG_PAGE_BYTES).checked_sub(TAG_PAGE_BYTES) {
        None | Some(0) => available_bytes,
        Some(left) => data_offset + left,
    }
}

/// A page for tags, which is known to lie in what the namespace may use.
struct Page<'a> {
    backing: &'a Backing,
    start: u64,
}

impl<'a> Page<'a> {
    fn at(site: &'a Site, offset: u64) -> Option<Self> {
        let is_there = offset.checked_add(TAG_PAGE_BYTES).is_some_and(|end| end <= site.available_bytes());
        is_there.then(|| Self { backing: site.data(), start: site.start() + offset })
    }

    /// Which of its places holds this tag.
    fn find(&self, tag: &Tag) -> Result<Option<usize>, MediaError> {
        for (index, place) in PLACES.into_iter().enumerate() {
            let (mut found, start) = ([0; TAG_BYTES], self.start + place);
            self.backing.read(start..start + TAG_BYTES as u64, |source| source.copy_to(&mut found))?;
            if bool::from(found.ct_eq(tag)) {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// Writes it whole: noise, and this tag.
    fn write_new(&self, tag: &Tag) -> Result<(), UpdateError> {
        Ok(self.put(0, &image(tag)?)?)
    }

    /// Overwrites it with noise; no tag is left.
    fn forget(&self) -> Result<(), UpdateError> {
        let noise: [u8; PAGE_BYTES] = random()?;
        Ok(self.put(0, &noise)?)
    }

    /// Durable, and compared with what the media gives back, when this returns.
    fn put(&self, at: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.backing.check_flushes()?;
        let range = self.start + at..self.start + at + bytes.len() as u64;
        self.backing.write(range.clone(), |mut target| target.copy_from(bytes))?;
        self.backing.persist(range.clone())?;
        let mut found = vec![0; bytes.len()];
        self.backing.read(range.clone(), |source| source.copy_to(&mut found))?;
        match found.iter().zip(bytes).position(|(found, written)| found != written) {
            Some(index) => Err(WriteError::ReadBack { offset: range.start + index as u64 }),
            None => Ok(()),
        }
    }
}

/// Writes the tag behind the data of a namespace whose header is not written yet.
pub(super) fn write_first(site: &Site, metadata: &Metadata, volume_key: &VolumeKey) -> Result<(), FormatError> {
    match metadata.tag_offset.and_then(|offset| Page::at(site, offset)) {
        Some(page) => Ok(page.put(0, &image(&tag_of(volume_key, metadata.uuid))?)?),
        None => Ok(()),
    }
}

/// A page of noise with this tag in its first place.
fn image(tag: &Tag) -> Result<[u8; PAGE_BYTES], KeyError> {
    let mut image: [u8; PAGE_BYTES] = random()?;
    image[..TAG_BYTES].copy_from_slice(tag);
    Ok(image)
}

impl Namespace {
    /// Whether the data is that of this header, as far as can be told: it has the header's tag, or the header knows of none.
    ///
    /// # Errors
    ///
    /// [`UnlockError::OtherData`]; [`UnlockError::Changed`] when the tag has gone elsewhere since the header was read.
    pub fn verify_data(&self) -> Result<(), UnlockError> {
        let Some(offset) = self.metadata.tag_offset else { return Ok(()) };
        let found = self.page(offset).map_or(Ok(None), |page| page.find(&self.tag()));
        let at = self.site.start().saturating_add(offset);
        match found {
            Ok(Some(_)) => Ok(()),
            // Who looks without a lock may see a tag go while he derives a key.
            _ if !self.area.is_unchanged() => Err(UnlockError::Changed),
            Ok(None) => Err(UnlockError::OtherData { at, source: None }),
            Err(error) => Err(UnlockError::OtherData { at, source: Some(error) }),
        }
    }

    /// [`Self::verify_data`], unless the data is [accepted](Site::accepting_data); whether it gets its tag then.
    pub(crate) fn check_data(&self) -> Result<bool, UnlockError> {
        let is_for_writing =
            [self.site.data(), self.area.backing()].iter().all(|backing| backing.access() == Access::ReadWrite);
        let can_have_tag = self.metadata.detached && !self.metadata.ephemeral;
        let accepts = self.site.accepts_data() && is_for_writing && can_have_tag;
        match self.verify_data() {
            Ok(()) => Ok(accepts && self.metadata.tag_offset.is_none()),
            Err(_) if accepts => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Gives data that is accepted as that of this header its tag, where there is room for one; the header then knows.
    pub(crate) fn bind_data(&mut self) -> Result<(), UpdateError> {
        let source_end = self.pending.as_ref().map_or(0, |pending| self.end_of(pending.source()));
        let offset = offset_behind(&self.site, &self.geometry, source_end);
        if let Some(page) = offset.and_then(|offset| self.page(offset)) {
            page.write_new(&self.tag())?;
        }
        self.set_tag_offset(offset)
    }

    /// Where the tag is when the header tells of another size: behind larger data, and where it is for smaller data, until
    /// [`Self::settle_tag`].
    pub(super) fn tag_offset_of_size(&self, size_bytes: u64) -> Result<Option<u64>, GeometryError> {
        let Some(present) = self.metadata.tag_offset else { return Ok(None) };
        let wanted = page_offset(self.metadata.data_offset, size_bytes).unwrap_or(u64::MAX);
        let offset = match wanted.saturating_sub(present) {
            0 => return Ok(Some(present)),
            // Pages that overlap could not both be there at a time.
            apart if apart < TAG_PAGE_BYTES => wanted.saturating_add(TAG_PAGE_BYTES),
            _ => wanted,
        };
        let (needed_bytes, available_bytes) = (offset.saturating_add(TAG_PAGE_BYTES), self.site.available_bytes());
        self.page(offset).ok_or(GeometryError::DoesNotFit { needed_bytes, available_bytes })?;
        Ok(Some(offset))
    }

    /// Writes the tag at another place, before a header says that it is there.
    pub(super) fn write_tag_at(&self, offset: Option<u64>) -> Result<(), UpdateError> {
        match offset.filter(|_| offset != self.metadata.tag_offset).and_then(|offset| self.page(offset)) {
            Some(page) => page.write_new(&self.tag()),
            None => Ok(()),
        }
    }

    /// Overwrites the page where the tag was before the data grew over it, before anybody writes there.
    pub(super) fn forget_tag_at(&self, former: Option<u64>) -> Result<(), UpdateError> {
        match former.filter(|_| former != self.metadata.tag_offset).and_then(|offset| self.page(offset)) {
            // Where zeroes are holes, what was never written reads as zeroes.
            Some(page) if self.metadata.discards => Ok(page.put(0, &[0; PAGE_BYTES])?),
            Some(page) => page.forget(),
            None => Ok(()),
        }
    }

    /// Stores the tag again that was found, and makes it durable: what a killed process has stored, or one whose flush failed,
    /// may be seen only.
    pub(super) fn confirm_tag(&self) -> Result<(), UpdateError> {
        let Some(page) = self.metadata.tag_offset.and_then(|offset| self.page(offset)) else { return Ok(()) };
        match page.find(&self.tag()).map_err(WriteError::from)? {
            Some(index) => Ok(page.put(PLACES[index], &self.tag())?),
            None => Ok(()),
        }
    }

    /// Brings a tag that is farther back than it needs to be (the data became smaller, or has moved) to right behind the data.
    pub(crate) fn settle_tag(&mut self) -> Result<(), UpdateError> {
        let Some(present) = self.metadata.tag_offset.filter(|_| self.pending.is_none()) else { return Ok(()) };
        let wanted = page_offset(self.metadata.data_offset, self.metadata.size_bytes);
        // Pages that overlap could not both be there at a time.
        let Some(offset) = wanted.filter(|&wanted| wanted.abs_diff(present) >= TAG_PAGE_BYTES) else { return Ok(()) };
        let Some(page) = self.page(offset) else { return Ok(()) };
        page.write_new(&self.tag())?;
        self.set_tag_offset(Some(offset))?;
        self.page(present).map_or(Ok(()), |page| page.forget())
    }

    /// Where the tag is while the data goes from `source` to `geometry`: behind both, and where it is if that will do. `None`
    /// without a tag, and where there is no room for one.
    pub(super) fn tag_offset_for(&self, geometry: &Geometry, source: &Layout) -> Option<u64> {
        let (present, source_end) = (self.metadata.tag_offset?, self.end_of(source));
        let end = geometry.data_offset().saturating_add(geometry.size_bytes());
        if present >= end.max(source_end) {
            return Some(present).filter(|&present| self.page(present).is_some());
        }
        offset_behind(&self.site, geometry, source_end.max(present.saturating_add(TAG_PAGE_BYTES)))
    }

    /// Writes the tag of a new volume key, before the header has that key: where the tag in force is, beside it.
    pub(super) fn write_next_tag(&self, next: &Metadata, new_key: &VolumeKey) -> Result<(), UpdateError> {
        let Some(page) = next.tag_offset.and_then(|offset| self.page(offset)) else { return Ok(()) };
        let tag = tag_of(new_key, next.uuid);
        let is_same = next.tag_offset == self.metadata.tag_offset;
        match if is_same { page.find(&self.tag()).map_err(WriteError::from)? } else { None } {
            Some(index) => Ok(page.put(PLACES[1 - index], &tag)?),
            None => page.write_new(&tag),
        }
    }

    /// Overwrites the tag of the old volume key, when both header copies know the new one. Without a look whether it is there:
    /// what an earlier try has left may be seen and not be on media.
    pub(super) fn forget_former_tag(&self) -> Result<(), TransformError> {
        let Some(offset) = self.metadata.tag_offset.filter(|_| self.pending.is_some()) else { return Ok(()) };
        let Some(page) = self.page(offset) else { return Ok(()) };
        if let Some(index) = page.find(&self.tag())? {
            let noise: Tag = random()?;
            page.put(PLACES[1 - index], &noise).map_err(UpdateError::from)?;
        }
        Ok(())
    }

    /// Bytes from the base that data of `size_bytes` needs, with its tag if it has one.
    pub(crate) fn needed_bytes(&self, size_bytes: u64) -> u64 {
        let data_offset = self.metadata.data_offset;
        let with_tag = self.metadata.tag_offset.map(|_| detached_bytes(data_offset, size_bytes).unwrap_or(u64::MAX));
        with_tag.unwrap_or_else(|| data_offset.saturating_add(size_bytes))
    }

    /// The largest size that fits into `available_bytes` from the base, with its tag if it has one.
    pub(crate) fn size_that_fits(&self, available_bytes: u64) -> Result<u64, GeometryError> {
        let data_offset = self.metadata.data_offset;
        let available_bytes = match self.metadata.tag_offset {
            Some(_) => before_page(data_offset, available_bytes),
            None => available_bytes,
        };
        size_that_fits(data_offset, available_bytes, self.geometry.unit())
    }

    fn set_tag_offset(&mut self, tag_offset: Option<u64>) -> Result<(), UpdateError> {
        if self.metadata.tag_offset == tag_offset {
            return Ok(());
        }
        let metadata = Metadata { tag_offset, ..self.metadata.clone() };
        self.update(metadata)
    }

    fn end_of(&self, layout: &Layout) -> u64 {
        layout.data_start().saturating_add(layout.size_bytes()).saturating_sub(self.site.start())
    }

    fn page(&self, offset: u64) -> Option<Page<'_>> {
        Page::at(&self.site, offset)
    }

    fn tag(&self) -> Tag {
        tag_of(&self.volume_key, self.metadata.uuid)
    }
}

/// The first page behind the data, and behind `end` bytes from the base; where there is room.
fn offset_behind(site: &Site, geometry: &Geometry, end: u64) -> Option<u64> {
    let data_offset = geometry.data_offset();
    let occupied = end.saturating_sub(data_offset).max(geometry.size_bytes());
    page_offset(data_offset, occupied).filter(|&offset| Page::at(site, offset).is_some())
}

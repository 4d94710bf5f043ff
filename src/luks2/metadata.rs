//! The metadata of a LUKS2 header: JSON (specification, section 3), as far as unlocking needs it.
//!
//! Decoding checks the shape, [`Metadata::check`] what the objects say of each other. Fields that only newer programs know
//! are ignored, as the specification wants it: what must not be ignored is announced in `requirements`.

use std::collections::BTreeMap;
use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::error::OpenError;
use super::header::BINARY_BYTES;

/// Most key slots, segments and digests (specification, section 3).
const OBJECT_COUNT_MAX: usize = 32;

/// Most bytes of all key slots together.
const SLOTS_BYTES_MAX: u64 = 128 << 20;

/// What areas are aligned to.
const AREA_ALIGNMENT_BYTES: u64 = 4096;

/// All of it. Every section must be there.
#[derive(Debug, Deserialize)]
pub(super) struct Metadata {
    pub(super) keyslots: BTreeMap<Id, Slot>,
    #[expect(dead_code, reason = "the section must be there; what its objects say is for others")]
    tokens: BTreeMap<Id, Value>,
    pub(super) segments: BTreeMap<Id, Segment>,
    pub(super) digests: BTreeMap<Id, Digest>,
    config: Config,
}

/// The name of an object: a number without a leading zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id(pub(super) u32);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let id = decimal(&text).and_then(|number| u32::try_from(number).ok());
        let id = id.filter(|&id| (id as usize) < OBJECT_COUNT_MAX);
        id.map(Self).ok_or_else(|| de::Error::invalid_value(de::Unexpected::Str(&text), &"an object's number below 32"))
    }
}

/// A number as a string of decimal digits, which is how LUKS2 writes 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decimal(pub(super) u64);

impl<'de> Deserialize<'de> for Decimal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = decimal(&text).map(Self);
        number.ok_or_else(|| de::Error::invalid_value(de::Unexpected::Str(&text), &"a number in decimal digits"))
    }
}

fn decimal(text: &str) -> Option<u64> {
    let is_canonical = text.bytes().all(|digit| digit.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| is_canonical)
}

#[derive(Debug, Deserialize)]
pub(super) struct Slot {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) key_size: u32,
    pub(super) area: Area,
    pub(super) priority: Option<u8>,
    /// Of a slot of type `luks2`.
    pub(super) kdf: Option<KdfObject>,
    pub(super) af: Option<Splitter>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Area {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) offset: Decimal,
    pub(super) size: Decimal,
    pub(super) encryption: Option<String>,
    pub(super) key_size: Option<u32>,
}

impl Area {
    /// Where it is, from the start of the header device.
    pub(super) fn range(&self) -> Option<Range<u64>> {
        Some(self.offset.0..self.offset.0.checked_add(self.size.0)?)
    }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum KdfObject {
    Pbkdf2 { hash: String, iterations: u32, salt: String },
    Argon2i { time: u32, memory: u32, cpus: u32, salt: String },
    Argon2id { time: u32, memory: u32, cpus: u32, salt: String },
}

#[derive(Debug, Deserialize)]
pub(super) struct Splitter {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) stripes: u32,
    pub(super) hash: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Segment {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) offset: Decimal,
    pub(super) size: String,
    pub(super) iv_tweak: Option<Decimal>,
    pub(super) encryption: Option<String>,
    pub(super) sector_size: Option<u32>,
    pub(super) integrity: Option<Value>,
    #[serde(default)]
    pub(super) flags: Vec<String>,
}

impl Segment {
    /// Its size in bytes, `None` when it goes on to the end of the device.
    pub(super) fn size_bytes(&self) -> Result<Option<u64>, OpenError> {
        match self.size.as_str() {
            "dynamic" => Ok(None),
            text => decimal(text).map(Some).ok_or(OpenError::Field { field: "segments.0.size" }),
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Digest {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) keyslots: Vec<Id>,
    pub(super) segments: Vec<Id>,
    pub(super) hash: Option<String>,
    pub(super) iterations: Option<u32>,
    pub(super) salt: String,
    pub(super) digest: String,
}

#[derive(Debug, Deserialize)]
struct Config {
    json_size: Decimal,
    keyslots_size: Decimal,
    #[serde(default)]
    requirements: Requirements,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Requirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

impl Metadata {
    /// Parses and checks the metadata of a header of `header_bytes` bytes.
    pub(super) fn decode(json: &[u8], header_bytes: u64) -> Result<Self, OpenError> {
        let metadata: Self = serde_json::from_slice(json)?;
        metadata.check(header_bytes)?;
        Ok(metadata)
    }

    fn check(&self, header_bytes: u64) -> Result<(), OpenError> {
        if let Some(name) = self.config.requirements.mandatory.first() {
            let is_reencryption = name.contains("reencrypt");
            return Err(if is_reencryption {
                OpenError::Reencryption
            } else {
                OpenError::Requirement { name: name.clone() }
            });
        }
        if self.keyslots.values().any(|slot| slot.kind == "reencrypt") {
            return Err(OpenError::Reencryption);
        }
        let slots_bytes = self.config.keyslots_size.0;
        if self.config.json_size.0 != header_bytes - BINARY_BYTES as u64 {
            return Err(OpenError::Field { field: "config.json_size" });
        }
        if slots_bytes > SLOTS_BYTES_MAX || !slots_bytes.is_multiple_of(AREA_ALIGNMENT_BYTES) {
            return Err(OpenError::Field { field: "config.keyslots_size" });
        }
        self.check_areas(&self.slots_place(header_bytes))?;
        for digest in self.digests.values() {
            if digest.keyslots.iter().any(|id| !self.keyslots.contains_key(id)) {
                return Err(OpenError::Field { field: "digests.keyslots" });
            }
            if digest.segments.iter().any(|id| !self.segments.contains_key(id)) {
                return Err(OpenError::Field { field: "digests.segments" });
            }
        }
        Ok(())
    }

    /// Where key slots may be in a header of `header_bytes` bytes: behind both copies, and in front of the data. The size
    /// has been checked.
    pub(super) const fn slots_place(&self, header_bytes: u64) -> Range<u64> {
        2 * header_bytes..2 * header_bytes + self.config.keyslots_size.0
    }

    /// Areas lie in their place, aligned, and apart.
    fn check_areas(&self, place: &Range<u64>) -> Result<(), OpenError> {
        let mut areas = Vec::new();
        for (&Id(id), slot) in &self.keyslots {
            let area = slot.area.range().filter(|area| {
                area.start < area.end
                    && area.start >= place.start
                    && area.end <= place.end
                    && area.start.is_multiple_of(AREA_ALIGNMENT_BYTES)
            });
            areas.push((area.ok_or(OpenError::Area { id })?, id));
        }
        areas.sort_by_key(|(area, _)| area.start);
        let mut neighbours = areas.iter().zip(areas.iter().skip(1));
        match neighbours.find(|((area, _), (next, _))| area.end > next.start) {
            Some((_, (_, id))) => Err(OpenError::Area { id: *id }),
            None => Ok(()),
        }
    }
}

/// The bytes of a base64 text, `None` when it is none.
pub(super) fn decode_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// The base64 text of `bytes`.
pub(super) fn encode_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

//! What must not be left on media when an operation has ended: read from raw bytes, by `src/namespace/format.md` alone and
//! with nothing of the program under test. For the crash tests of the library and the tests of the program.
#![allow(dead_code, unreachable_pub, missing_docs)]

const HEADER_MAGIC: &[u8] = b"DAXCRYPT";
const JOURNAL_MAGIC: &[u8] = b"DAXJRNL1";
const COPY_BYTES: usize = 64 << 10;
const COPY_DISTANCE: usize = 256 << 10;
const PREFIX_BYTES: usize = 128;
const HEADER_AREA_BYTES: usize = 2 << 20;
const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// Secrets of headers of before: whatever of a key slot, or of a re-key, leads to a volume key.
#[derive(Clone, Debug, Default)]
pub struct Old {
    sealed: Vec<Vec<u8>>,
}

impl Old {
    /// Everything that is sealed in the headers on these media.
    pub fn of(media: &[u8]) -> Self {
        let copies = starts_with_magic(media, HEADER_MAGIC).into_iter();
        let texts = copies.map(|start| &media[start..media.len().min(start + COPY_BYTES)]);
        let mut sealed: Vec<_> = texts.flat_map(sealed_in).collect();
        sealed.sort();
        sealed.dedup();
        Self { sealed }
    }

    /// How many secrets.
    pub fn len(&self) -> usize {
        self.sealed.len()
    }

    /// What of `media` is one of the secrets.
    pub fn found_in(&self, media: &[u8]) -> Option<usize> {
        let keys: Vec<[u8; 16]> = self.sealed.iter().map(|text| text[..16].try_into().unwrap()).collect();
        let last = media.len().saturating_sub(16);
        let mut at = 0;
        while at < last {
            if at % PAGE == 0 && is_zero(&media[at..media.len().min(at + PAGE + 16)]) {
                at += PAGE;
                continue;
            }
            // Hexadecimal: every 16th byte of a text of 96 digits and more is one.
            if !media[at + 15].is_ascii_hexdigit() {
                at = (at + 16).min((at / PAGE + 1) * PAGE);
                continue;
            }
            if keys.iter().any(|key| media[at..at + 16] == *key) {
                return Some(at);
            }
            at += 1;
        }
        None
    }
}

/// Checks that the media hold a settled header at each of `places`, no other one, nothing of a journal and nothing that is
/// `old`.
pub fn nothing_old_is_left(media: &[u8], places: &[u64], old: &Old) -> Result<(), String> {
    let places: Vec<_> = places.iter().map(|&place| usize::try_from(place).unwrap()).collect();
    for start in starts_with_magic(media, HEADER_MAGIC) {
        if !places.iter().any(|&place| start == place || start == place + COPY_DISTANCE) {
            return Err(format!("a header copy is left at byte {start}"));
        }
    }
    if let Some(start) = starts_with_magic(media, JOURNAL_MAGIC).first() {
        return Err(format!("a record of a journal is left at byte {start}"));
    }
    for place in places {
        check_area(&media[place..place + HEADER_AREA_BYTES])
            .map_err(|error| format!("header area {place}: {error}"))?;
    }
    match old.found_in(media) {
        Some(at) => Err(format!("an old sealed key is left at byte {at}")),
        None => Ok(()),
    }
}

/// Both copies say the same, no re-key is under way, and there is nothing else.
fn check_area(area: &[u8]) -> Result<(), String> {
    let [a, b] = [0, COPY_DISTANCE].map(|start| &area[start..start + COPY_BYTES]);
    if !a.starts_with(HEADER_MAGIC) {
        return Err("there is no header".into());
    }
    if a != b {
        return Err("the copies differ".into());
    }
    if contains(text_of(a), b"\"transform\"") {
        return Err("a re-key is under way".into());
    }
    let rest = [COPY_BYTES..COPY_DISTANCE, COPY_DISTANCE + COPY_BYTES..HEADER_AREA_BYTES];
    match rest.into_iter().find(|range| !area[range.clone()].chunks(PAGE).all(is_zero)) {
        Some(range) => Err(format!("something is left between its bytes {} and {}", range.start, range.end)),
        None => Ok(()),
    }
}

fn text_of(copy: &[u8]) -> &[u8] {
    let len = copy.get(16..20).map_or(0, |field| u32::from_le_bytes(field.try_into().unwrap()) as usize);
    copy.get(PREFIX_BYTES..).map_or(&[][..], |text| &text[..text.len().min(len)])
}

/// The hexadecimal values of the fields that hold a sealed key.
fn sealed_in(copy: &[u8]) -> Vec<Vec<u8>> {
    let text = text_of(copy);
    let mut found = Vec::new();
    for field in [&b"\"wrapped\":\""[..], b"\"rewrap\":\""] {
        for at in 0..text.len() {
            if text[at..].starts_with(field) {
                let value = &text[at + field.len()..];
                let len = value.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
                assert!(len >= 96, "a sealed key has 48 bytes or more");
                found.push(value[..len].to_vec());
            }
        }
    }
    found
}

fn starts_with_magic(media: &[u8], magic: &[u8]) -> Vec<usize> {
    (0..media.len()).step_by(SECTOR).filter(|&start| media[start..].starts_with(magic)).collect()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn is_zero(page: &[u8]) -> bool {
    static ZEROES: [u8; 2 * PAGE] = [0; 2 * PAGE];
    *page == ZEROES[..page.len()]
}

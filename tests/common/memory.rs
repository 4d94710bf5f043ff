//! The memory of another process, searched byte by byte.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const CHUNK: usize = 1 << 20;

/// A piece of another process's memory.
pub struct Mapping {
    pub name: String,
    start: u64,
    end: u64,
    /// Left out of core dumps (VmFlags `dd`).
    pub is_not_dumped: bool,
    /// Locked in RAM (VmFlags `lo`).
    pub is_locked: bool,
}

fn mappings(pid: u32) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or("");
        if let Some((start, end)) = first.split_once('-') {
            let number = |digits| u64::from_str_radix(digits, 16).unwrap();
            let (start, end, name) = (number(start), number(end), line.to_owned());
            mappings.push(Mapping { name, start, end, is_not_dumped: false, is_locked: false });
        } else if first == "VmFlags:" {
            let mapping = mappings.last_mut().unwrap();
            mapping.is_not_dumped = line.split_whitespace().any(|flag| flag == "dd");
            mapping.is_locked = line.split_whitespace().any(|flag| flag == "lo");
        }
    }
    assert!(mappings.len() > 10, "{text}");
    mappings.retain(|mapping| !mapping.name.contains("[v")); // the kernel's pages
    mappings
}

/// Every needle that a reader of a range holds, which is read in pieces that overlap.
pub fn search(
    needles: &[(String, Vec<u8>)],
    start: u64,
    end: u64,
    read: impl Fn(&mut [u8], u64) -> bool,
) -> Vec<String> {
    let longest = needles.iter().map(|(_, needle)| needle.len()).max().unwrap();
    let (mut found, mut at) = (Vec::new(), start);
    let mut buffer = vec![0; CHUNK + longest];
    while at < end {
        let len = usize::try_from((end - at).min(buffer.len() as u64)).unwrap();
        if read(&mut buffer[..len], at) {
            for (name, needle) in needles {
                if contains(&buffer[..len], needle) {
                    found.push(name.clone());
                }
            }
        }
        at += CHUNK as u64;
    }
    found
}

/// Looks for the first byte first, which is fast enough for hundreds of mebibytes.
pub fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some(at) = memchr(needle[0], rest) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

fn memchr(byte: u8, bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|&other| other == byte)
}

/// What was found where in a process, outside of the backing's mapping.
pub fn in_process(pid: u32, needles: &[(String, Vec<u8>)]) -> Vec<(String, Mapping)> {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut all = Vec::new();
    for mapping in mappings(pid).into_iter().filter(|mapping| !mapping.name.contains("vault.img")) {
        // Guard pages and the like cannot be read, and hold nothing.
        let read = |buffer: &mut [u8], at| memory.read_exact_at(buffer, at).is_ok();
        for name in search(needles, mapping.start, mapping.end, read) {
            all.push((name, Mapping { name: mapping.name.clone(), ..mapping }));
        }
    }
    all
}

pub fn describe(found: &[(String, Mapping)]) -> Vec<String> {
    found.iter().map(|(needle, mapping)| format!("{needle} in {}", mapping.name)).collect()
}

/// Pieces of the page that all data consists of, so that whatever is left of it is found.
pub fn data_needles(page: &[u8]) -> Vec<(String, Vec<u8>)> {
    let pieces = page.chunks(16).step_by(41).enumerate();
    pieces.map(|(index, piece)| (format!("data, piece {index}"), piece.to_vec())).collect()
}

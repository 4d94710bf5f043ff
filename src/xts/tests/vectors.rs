//! Published vectors: NIST CAVP and ACVP, IEEE 1619 Annex B, Wycheproof, aws-lc. Whole blocks only; the rest is counted.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::*;

/// One published case.
struct Vector {
    source: &'static str,
    key: Vec<u8>,
    tweak: u128,
    plain: Vec<u8>,
    cipher: Vec<u8>,
    /// CAVP has messages that end inside a byte.
    len_bits: usize,
}

impl Vector {
    /// Runs the case both ways through every backend; `false` when it is not whole blocks or not our key size.
    fn applies(&self) -> bool {
        let half_bytes = self.key.len() / 2;
        if !self.len_bits.is_multiple_of(8 * BLOCK_BYTES) || (half_bytes != 16 && half_bytes != 32) {
            return false;
        }
        let (data, tweak_half) = self.key.split_at(half_bytes);
        for backend in Backend::available() {
            let key = XtsKey::from_halves(data, tweak_half, backend);
            for (direction, from, to) in
                [(Direction::Encrypt, &self.plain, &self.cipher), (Direction::Decrypt, &self.cipher, &self.plain)]
            {
                let mut out = vec![0; from.len()];
                let (src, dst) = (Source::from_slice(from), Target::from_slice(&mut out));
                key.schedule.blocks(self.tweak, 0, Pass { direction, src, dst, store: Store::Cached });
                assert_eq!(&out, to, "{} {direction:?} with {backend}", self.source);
            }
        }
        true
    }
}

fn read(name: &str) -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/vectors", name].iter().collect();
    fs::read_to_string(path).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_str(&read(name)).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "half a byte in {text}");
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn field(value: &Value, name: &str) -> Vec<u8> {
    unhex(value[name].as_str().unwrap())
}

/// A tweak given as up to 16 bytes, the missing ones being zero.
fn tweak(bytes: &[u8]) -> u128 {
    let mut padded = [0; 16];
    padded[..bytes.len()].copy_from_slice(bytes);
    u128::from_le_bytes(padded)
}

/// Runs all and returns how many applied and how many did not.
fn run(vectors: &[Vector]) -> (usize, usize) {
    let applied = vectors.iter().filter(|vector| vector.applies()).count();
    (applied, vectors.len() - applied)
}

fn cavp(name: &'static str) -> Vec<Vector> {
    let text = read(name);
    let mut vectors = Vec::new();
    let mut fields = std::collections::HashMap::new();
    for line in text.lines() {
        let Some((name_of_field, value)) = line.split_once(" = ") else { continue };
        fields.insert(name_of_field.to_owned(), value.trim().to_owned());
        if name_of_field == "COUNT" {
            fields.retain(|name_of_field, _| name_of_field == "COUNT");
        }
        if fields.len() == 6 {
            vectors.push(Vector {
                source: name,
                key: unhex(&fields["Key"]),
                tweak: tweak(&unhex(&fields["i"])),
                plain: unhex(&fields["PT"]),
                cipher: unhex(&fields["CT"]),
                len_bits: fields["DataUnitLen"].parse().unwrap(),
            });
        }
    }
    vectors
}

#[test]
fn nist_cavp() {
    assert_eq!(run(&cavp("nist_cavp_XTSGenAES128.rsp")), (600, 400));
    assert_eq!(run(&cavp("nist_cavp_XTSGenAES256.rsp")), (600, 400));
}

#[test]
fn ieee_1619_annex_b() {
    let vectors: Vec<Vector> = json("ieee1619_annexB_golang.json")["vectors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| Vector {
            source: "IEEE 1619 Annex B",
            key: field(case, "key"),
            tweak: case["sector"].as_u64().unwrap().into(),
            plain: field(case, "pt"),
            cipher: field(case, "ct"),
            len_bits: field(case, "pt").len() * 8,
        })
        .collect();
    assert_eq!(run(&vectors), (6, 0));
}

#[test]
fn wycheproof() {
    let file = json("wycheproof_aes_xts_test.json");
    let mut vectors = Vec::new();
    for case in file["testGroups"].as_array().unwrap().iter().flat_map(|group| group["tests"].as_array().unwrap()) {
        assert_eq!(case["result"], "valid");
        vectors.push(Vector {
            source: "Wycheproof",
            key: field(case, "key"),
            tweak: tweak(&field(case, "iv")),
            plain: field(case, "msg"),
            cipher: field(case, "ct"),
            len_bits: field(case, "msg").len() * 8,
        });
    }
    assert_eq!(run(&vectors), (42, 81));
}

#[test]
fn aws_lc() {
    let vectors: Vec<Vector> = json("awslc_xts256_cases.json")["vectors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| Vector {
            source: "aws-lc",
            key: field(case, "key"),
            tweak: tweak(&field(case, "iv")),
            plain: field(case, "pt"),
            cipher: field(case, "ct"),
            len_bits: field(case, "pt").len() * 8,
        })
        .collect();
    assert_eq!(run(&vectors), (25, 27));
}

#[test]
fn nist_acvp() {
    let tests = |name: &str| -> Vec<Value> {
        json(name)[1]["testGroups"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|group| group["tests"].as_array().unwrap().clone())
            .collect()
    };
    let expected = tests("acvp_xts_expected.json");
    let vectors: Vec<Vector> = tests("acvp_xts_prompt.json")
        .iter()
        .map(|case| {
            let answer = expected.iter().find(|answer| answer["tcId"] == case["tcId"]).unwrap();
            let text = |name: &str| if case[name].is_string() { field(case, name) } else { field(answer, name) };
            Vector {
                source: "NIST ACVP",
                key: field(case, "key"),
                tweak: case["sequenceNumber"].as_u64().unwrap().into(),
                plain: text("pt"),
                cipher: text("ct"),
                len_bits: text("pt").len() * 8,
            }
        })
        .collect();
    assert_eq!(run(&vectors), (2, 0));
}

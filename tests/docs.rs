//! What the documents say of files, functions, tests, commands and options is so.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every document that people read outside of the code.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths: Vec<PathBuf> = ["src/namespace/format.md", "src/cli/json.md"].iter().map(PathBuf::from).collect();
    for folder in [".", "docs"] {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        paths.extend(entries.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    assert!(paths.len() > 12, "run from the package's folder");
    paths.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn has_function(file: &str, name: &str) -> bool {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"));
    ["(", "<"].iter().any(|end| text.contains(&format!("fn {name}{end}")))
}

#[test]
fn the_readme_is_short_and_begins_with_the_two_commands() {
    let readme = fs::read_to_string("README.md").unwrap();
    assert!(readme.lines().count() <= 120, "{} lines", readme.lines().count());
    for command in ["cargo run --release -- demo", "tools/test"] {
        let line = readme.lines().position(|line| line.split("  ").next() == Some(command));
        assert!(line.is_some_and(|line| line < 20), "{command} stands by itself near the beginning");
    }
}

/// Rows of the tables under headings that begin with `heading`: file cell and name cell.
fn rows<'a>(text: &'a str, heading: &str) -> Vec<(Vec<&'a str>, Vec<&'a str>)> {
    let sections = text.split("\n## ").filter(|section| section.starts_with(heading));
    let rows = sections.flat_map(|section| section.lines().filter(|line| line.starts_with("| `")));
    let cells = rows.map(|row| row.split('|').skip(1).take(2).collect::<Vec<_>>());
    cells.map(|cells| (quoted(cells[0]).collect(), quoted(cells[1]).collect())).collect()
}

#[test]
fn the_walks_go_through_functions_that_are_there() {
    let text = fs::read_to_string("ARCHITECTURE.md").unwrap();
    let walks = rows(&text, "Walk");
    assert!(walks.len() > 25, "{} rows", walks.len());
    for (files, functions) in walks {
        assert!(!functions.is_empty(), "{files:?}");
        for function in functions {
            assert!(files.iter().any(|file| has_function(file, function)), "{function} is not in {files:?}");
        }
    }
    // `NAME` in `FILE`, and `NAME` and `NAME` in `FILE`, in the text around them.
    let flat = text.replace('\n', " ");
    let mut checked = 0;
    for part in flat.split(". ").flat_map(|sentence| sentence.split(", ")) {
        let Some((names, rest)) = part.split_once(" in `src/") else { continue };
        let file = format!("src/{}", rest.split('`').next().unwrap());
        if file.ends_with(".rs") && !part.contains('|') {
            for name in quoted(&format!("{names} ")).filter(|name| !name.contains('/')) {
                checked += 1;
                assert!(has_function(&file, name), "{name} is not in {file}");
            }
        }
    }
    assert!(checked >= 5, "{checked} names in the text");
}

#[test]
fn the_locks_of_the_order_are_there() {
    let text = fs::read_to_string("ARCHITECTURE.md").unwrap();
    for (names, files) in rows(&text, "Lock order") {
        let mut source = String::new();
        for file in files {
            let path = Path::new(file);
            let inside = if path.is_dir() {
                fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect()
            } else {
                vec![path.to_owned()]
            };
            inside.iter().filter(|path| path.is_file()).for_each(|path| source += &fs::read_to_string(path).unwrap());
        }
        for name in names {
            let held = ["Mutex<", "RwLock<"].iter().any(|lock| source.contains(&format!("{name}: {lock}")));
            assert!(held, "no lock {name}");
        }
    }
}

/// Places in this repository that a text names by their path from its root.
fn paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["src/", "tests/", "tools/", "docs/", "examples/", "benches/"] {
        for (at, _) in text.match_indices(folder) {
            let before = text[..at].chars().next_back().unwrap_or(' ');
            let rest = &text[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"_./@-".contains(c)).unwrap_or(rest.len());
            let follows = rest[end..].chars().next();
            if !before.is_ascii_alphanumeric() && !"/.-_@".contains(before) && follows != Some('*') {
                found.push(rest[..end].trim_end_matches(['.', '-']).to_owned());
            }
        }
    }
    found
}

#[test]
fn every_file_that_a_document_names_exists() {
    let mut count = 0;
    for (document, text) in documents() {
        for path in paths(&text) {
            count += 1;
            assert!(Path::new(&path).exists(), "{}: {path}", document.display());
        }
    }
    assert!(count > 100, "{count} paths");
}

#[test]
fn every_link_leads_to_a_file_of_this_repository() {
    let root = fs::canonicalize(".").unwrap();
    for (document, text) in documents() {
        for target in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if target.starts_with("http") || text.contains(&format!("`]({target}`")) {
                continue;
            }
            let file = target.split('#').next().unwrap();
            let from = if file.is_empty() { document.clone() } else { document.parent().unwrap().join(file) };
            let leads = fs::canonicalize(&from).unwrap_or_else(|_| panic!("{}: {target}", document.display()));
            assert!(leads.starts_with(&root), "{}: {target} leads out of the repository", document.display());
            if let Some((_, heading)) = target.split_once('#') {
                let headings = fs::read_to_string(leads).unwrap();
                let anchor = |line: &str| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
                let there = headings.lines().filter(|line| line.starts_with('#')).any(|line| anchor(line) == heading);
                assert!(there, "{}: no heading {heading}", document.display());
            }
        }
    }
}

#[test]
fn every_test_that_the_faq_names_exists() {
    let text = fs::read_to_string("docs/faq.md").unwrap().replace('\n', " ");
    let mut count = 0;
    for file in paths(&text).into_iter().filter(|path| path.ends_with(".rs")) {
        let mut rest = text.split(&format!("{file}: `")).skip(1).map(str::to_owned).collect::<Vec<_>>();
        for names in rest.drain(..) {
            let names = format!("`{}", names.split(['*', ';']).next().unwrap());
            for name in quoted(&names) {
                count += 1;
                assert!(has_function(&file, name), "{file}: no {name}");
            }
        }
    }
    assert!(count > 20, "{count} tests");
}

/// The command lines in the code blocks of a document, comments taken off, cut where the shell begins another one.
fn command_lines(text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in text.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
            continue;
        }
        if !in_block && !line.starts_with("    ") {
            continue;
        }
        let line = line.split(" #").next().unwrap();
        for command in line.split(['|', ';', '&', '(', ')']) {
            let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
            let is_command = words.first().is_some_and(|word| word == "daxcrypt");
            if is_command && words.get(1).is_some_and(|word| word != "=") {
                found.push(words[1..].to_vec());
            }
        }
    }
    found
}

#[test]
fn every_command_and_option_in_the_documents_is_one() {
    let mut helps: BTreeMap<Vec<String>, String> = BTreeMap::new();
    let with_commands = BTreeSet::from(["key", "header", "region", "exports", "client"]);
    let mut count = 0;
    for (document, text) in documents() {
        for words in command_lines(&text) {
            let depth = if with_commands.contains(words[0].as_str()) { 2 } else { 1 };
            let command: Vec<String> = words.iter().take(depth).cloned().collect();
            if command[0].starts_with('-') {
                continue;
            }
            let help = helps.entry(command.clone()).or_insert_with(|| {
                let output =
                    Command::new(env!("CARGO_BIN_EXE_daxcrypt")).args(&command).arg("--help").output().unwrap();
                assert!(output.status.success(), "{}: daxcrypt {}", document.display(), command.join(" "));
                String::from_utf8(output.stdout).unwrap()
            });
            for option in words.iter().filter(|word| word.starts_with("--") && word.len() > 2) {
                let option = option.split('=').next().unwrap();
                count += 1;
                let known = help.split_whitespace().any(|word| word.trim_end_matches([',', '.']) == option);
                assert!(known, "{}: daxcrypt {} has no {option}", document.display(), command.join(" "));
            }
        }
    }
    assert!(count > 80, "{count} options");
}

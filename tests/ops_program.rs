//! A part of the table of operations and states by the program: its exit code says what the table says, and what it refuses
//! has changed no byte.
#![allow(clippy::unwrap_used)]

mod common;
mod table;

use std::fs;

use common::noise;
use daxcrypt::ops::{Operation, State, gate};
use table::{Cell, Entry, Files, Place, Variant, fixture, folder_parent, put_back};

/// What people type for an operation on the namespace at `path`; nothing for what they do otherwise.
fn command_line(operation: Operation, path: &str) -> Option<Vec<&str>> {
    Some(match operation {
        Operation::Export => vec!["export", path, "out.img"],
        Operation::Import => vec!["import", "in.img", path, "--force"],
        Operation::RekeyPreview => vec!["rekey", path, "--dry-run"],
        Operation::RekeyBegin => vec!["rekey", path, "--drop-slots"],
        Operation::RekeyResume => vec!["rekey", path, "--resume"],
        Operation::RekeyPause => vec!["rekey", path, "--pause"],
        Operation::RekeyStatus => vec!["rekey", path, "--status"],
        Operation::RelocateSource => vec!["relocate", path, "to.img", "--keep-slots"],
        Operation::CopySource => vec!["relocate", path, "to.img", "--keep-source", "--keep-slots"],
        Operation::Adopt => vec!["relocate", "--in-place", path, "--keep-slots"],
        Operation::Resize => vec!["resize", path, "--size", "256K"],
        Operation::HeaderBackup => vec!["header", "backup", path, "backup"],
        Operation::HeaderRestore => vec!["header", "restore", path, "backup.was", "--replace-slots"],
        Operation::HeaderRepair => vec!["header", "repair", path, "--copy", "A"],
        Operation::KeyList => vec!["key", "list", path],
        Operation::KeyTest => vec!["key", "test", path],
        Operation::KeyAdd => vec!["key", "add", path, "--new-key-file", "other.key"],
        Operation::KeyChange => vec!["key", "change", path, "--slot", "0", "--new-key-file", "other.key"],
        Operation::KeyDump => vec!["key", "dump", path, "--volume-key-file", "escrow"],
        Operation::DmTable => vec!["dmtable", path],
        Operation::Info => vec!["info", path],
        Operation::Erase => vec!["erase", path, "--yes"],
        Operation::Remove => vec!["remove", path, "--yes"],
        Operation::FormatOver => vec!["format", path, "--size", "192K"],
        Operation::Serve | Operation::ServeReadOnly | Operation::RelocateDestination => return None,
        Operation::Compact | Operation::AllowDiscards => return None,
        Operation::ExportLuks2 | Operation::KeyRemove | Operation::Lock => return None,
    })
}

#[test]
fn the_program_says_what_the_table_says() {
    let (mut runs, mut wrong) = (0, Vec::new());
    for (number, state) in State::ALL.into_iter().enumerate() {
        for place in [Place::File, Place::Region] {
            if state == State::Sliding && place != Place::Region {
                continue;
            }
            let fixture = fixture(state, place, Variant(number % 8));
            for operation in Operation::ALL {
                let bench = common::Bench::under(folder_parent());
                let files = Files::new(place, bench.dir.path());
                let cell = Cell { operation, state, entry: Entry::Slot, files: &files, fixture: &fixture };
                let path = if place == Place::Region { "data.img#a" } else { "data.img" };
                let Some(mut args) = command_line(operation, path).filter(|_| cell.exists()) else { continue };
                put_back(&files, &fixture);
                bench.secret("own.key", &[1; 32]);
                bench.secret("other.key", &noise(5, 40));
                fs::write(bench.path("in.img"), noise(6, 5000)).unwrap();
                fs::write(bench.path("backup.was"), &fixture.backup).unwrap();
                let has_key = !matches!(operation, Operation::HeaderBackup | Operation::KeyList | Operation::Info)
                    && !matches!(operation, Operation::Erase | Operation::Remove);
                if has_key && state != State::Ephemeral || operation == Operation::FormatOver {
                    args.extend(["--key-file", "own.key"]);
                }
                let done = bench.run(&args);
                let permitted = gate::check(operation, &fixture.states, cell.way()).is_ok();
                let changed = files.bytes() != fixture.bytes;
                if done.status.success() != permitted || changed && !permitted {
                    let [state, how] = [format!("{state:?}"), format!("{:?}, changed: {changed}", done.status.code())];
                    wrong.push(format!("{args:?} in {state}: {how}, permitted: {permitted}: {}", done.stderr));
                }
                runs += 1;
            }
        }
    }
    println!("{runs} cells of the table by the program");
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(runs > 300);
}

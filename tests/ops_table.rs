//! The whole table of operations and states, each cell done: with the key of a slot, with the volume key from escrow, and
//! asked of a server that has the namespace for writing or for reading; in a file, with a detached header and in a region;
//! with both units, both ciphers, with discards and without.
//!
//! What the gate permits must end right: with the content that is expected, under a key that opens it. What it refuses must be
//! refused, and then no byte of any file may have changed.
#![allow(clippy::unwrap_used)]

mod common;
mod table;

use std::any::Any;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;

use daxcrypt::ops::{Operation, State};
use table::{Cell, Entry, Files, Fixture, Place, Variant, fixture, folder, put_back};

/// All cells of one kind of place.
fn cells_in(place: Place) {
    let mut fixtures: HashMap<(State, Variant), Fixture> = HashMap::new();
    let (mut cells, mut permitted, mut wrong) = (0, 0, Vec::new());
    for (state_number, state) in State::ALL.into_iter().enumerate() {
        if state == State::Sliding && place != Place::Region {
            continue;
        }
        for (operation_number, operation) in Operation::ALL.into_iter().enumerate() {
            let entries = [Entry::Slot, Entry::Escrow, Entry::Server, Entry::ReadOnlyServer];
            for (entry_number, entry) in entries.into_iter().enumerate() {
                // Every operation meets every state in all eight variants, in one place or another.
                let variant = Variant((state_number + operation_number + 4 * place as usize + entry_number) % 8);
                let fixture = fixtures.entry((state, variant)).or_insert_with(|| fixture(state, place, variant));
                let folder = folder();
                let files = Files::new(place, folder.path());
                let cell = Cell { operation, state, entry, files: &files, fixture };
                if !cell.exists() {
                    continue;
                }
                put_back(&files, fixture);
                cells += 1;
                match std::panic::catch_unwind(AssertUnwindSafe(|| cell.check())) {
                    Ok(was) => permitted += u32::from(was),
                    Err(panic) => wrong.push(said(&*panic)),
                }
            }
        }
    }
    println!("{cells} cells of the table, {place:?}: {permitted} ended right, {} were refused", cells - permitted);
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(cells > 800 && permitted > 350 && cells - permitted > 500);
}

#[test]
fn every_operation_in_every_state_of_a_file_ends_right_or_changes_nothing() {
    cells_in(Place::File);
}

#[test]
fn every_operation_in_every_state_with_a_detached_header_ends_right_or_changes_nothing() {
    cells_in(Place::Detached);
}

#[test]
fn every_operation_in_every_state_in_a_region_ends_right_or_changes_nothing() {
    cells_in(Place::Region);
}

/// Two namespaces whose headers are detached, and the data of one with the header of the other.
#[test]
fn every_operation_in_every_state_refuses_the_data_of_another_detached_header() {
    let other = &fixture(State::Settled, Place::Detached, Variant(0)).bytes[0];
    let (mut cells, mut wrong) = (0, Vec::new());
    for (number, state) in State::ALL.into_iter().enumerate().filter(|(_, state)| *state != State::Sliding) {
        let fixture = fixture(state, Place::Detached, Variant(number % 8));
        for (operation, entry) in Operation::ALL
            .into_iter()
            .flat_map(|operation| [Entry::Slot, Entry::Escrow].map(|entry| (operation, entry)))
        {
            let folder = folder();
            let files = Files::new(Place::Detached, folder.path());
            let cell = Cell { operation, state, entry, files: &files, fixture: &fixture };
            if !cell.looks_at_the_data() {
                continue;
            }
            put_back(&files, &fixture);
            cells += 1;
            if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| cell.check_other_data(other))) {
                wrong.push(said(&*panic));
            }
        }
    }
    println!("{cells} cells of the table with other data: all were refused");
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(cells > 250);
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref().copied()).unwrap_or_default().to_owned()
}

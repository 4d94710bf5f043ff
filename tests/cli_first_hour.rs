//! The first hour of a new user: typing errors lead to no harm, errors name what is missing, help can be pasted.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{Bench, Run};

/// Commands that destroy or overwrite.
const DESTRUCTIVE: [&str; 5] = ["erase", "remove", "import", "wipe", "kick"];

fn stderr(run: Run) -> String {
    run.fails(1, &[]).stderr
}

#[test]
fn a_word_from_elsewhere_leads_to_the_right_command() {
    let bench = Bench::new();
    for (word, command) in [
        ("open", "daxcrypt serve"),
        ("mount", "daxcrypt serve"),
        ("luksOpen", "daxcrypt serve"),
        ("close", "daxcrypt lock"),
        ("umount", "daxcrypt lock"),
        ("create", "daxcrypt format"),
        ("luksFormat", "daxcrypt format"),
        ("move", "daxcrypt relocate"),
        ("copy", "--keep-source"),
        ("grow", "daxcrypt resize"),
        ("shrink", "daxcrypt resize"),
        ("backup", "daxcrypt header backup"),
        ("luksHeaderBackup", "daxcrypt header backup"),
        ("luksHeaderRestore", "daxcrypt header restore"),
        ("luksDump", "daxcrypt info"),
        ("luksAddKey", "daxcrypt key add"),
        ("luksChangeKey", "daxcrypt key change"),
        ("luksSuspend", "daxcrypt lock"),
        ("luksResume", "daxcrypt unlock"),
        ("luksSomething", "--luks2"),
        ("reencrypt", "daxcrypt rekey"),
        ("list", "daxcrypt key list"),
    ] {
        let said = stderr(bench.run(&[word, "vault.img"]));
        assert!(
            said.contains(&format!("'{word}'")) && said.contains("tip: ") && said.contains(command),
            "{word}: {said}"
        );
        assert_eq!(said.matches("tip: ").count(), 1, "{word}: {said}");
    }
    for command in ["lock", "unlock"] {
        assert!(stderr(bench.run(&[command, "vault.img"])).contains("daxcrypt serve"), "{command}");
    }
}

#[test]
fn no_typing_error_leads_to_what_destroys() {
    let bench = Bench::new();
    let words = [
        "move",
        "create",
        "mount",
        "delete",
        "destroy",
        "rm",
        "luksErase",
        "luksKillSlot",
        "remov",
        "removed",
        "eras",
        "easre",
        "imprt",
        "imports",
        "purge",
    ];
    for word in words {
        let said = stderr(bench.run(&[word, "vault.img"]));
        let tips = said.split_once("tip: ").map_or("", |(_, tips)| tips);
        for command in DESTRUCTIVE {
            let named = tips.contains(&format!("'{command}'")) || tips.contains(&format!("daxcrypt {command}"));
            assert!(!named, "{word} leads to {command}: {said}");
        }
    }
    for (command, word) in [("key", "remov"), ("exports", "remov"), ("client", "kik")] {
        assert!(!stderr(bench.run(&[command, word])).contains("tip: "), "{command} {word}");
    }
    // What is spelled alike and does no harm is named as before.
    assert!(stderr(bench.run(&["serv"])).contains("'serve'"));
    assert!(stderr(bench.run(&["key", "lst"])).contains("'list'"));
}

#[test]
fn a_name_that_leads_nowhere_is_exit_1_everywhere_and_its_folder_is_named_once() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    let key = ["--key-file", "vault.key"];
    let commands: [&[&str]; 13] = [
        &["info", "none/x"],
        &["key", "list", "none/x"],
        &["format", "none/x", "--size", "4M"],
        &["region", "create", "none/x", "--size", "64M"],
        &["relocate", "vault.img", "none/x"],
        &["serve", "vault.img", "--socket", "none/x"],
        &["serve", "vault.img", "--socket", "s", "--control", "none/x"],
        &["serve", "--config", "none/x"],
        &["status", "--control", "none/x"],
        &["export", "vault.img", "none/x"],
        &["import", "none/x", "vault.img"],
        &["header", "backup", "vault.img", "none/x"],
        &["header", "restore", "vault.img", "none/x"],
    ];
    for command in commands {
        let wants_key = ["format", "relocate", "export", "import"].contains(&command[0])
            || command.contains(&"restore")
            || (command[0] == "serve" && command[1] == "vault.img");
        let line = if wants_key { [command, &key].concat() } else { command.to_vec() };
        let said = stderr(bench.run(&line));
        assert!(said.contains("there is no folder none: mkdir -p none"), "{command:?}: {said}");
        assert_eq!(said.matches("none/x").count(), 1, "{command:?}: {said}");
    }
    // Without a folder to blame, the file is.
    for command in [&["info", "x"][..], &["status", "--control", "x"], &["import", "x", "vault.img", key[0], key[1]]] {
        let said = stderr(bench.run(command));
        assert!(!said.contains("folder"), "{command:?}: {said}");
    }
    bench.run(&["header", "backup", "vault.img", "vault.key/x"]).fails(1, &["vault.key is a file and no folder"]);
    // Nor is anything overwritten.
    bench.run(&["export", "vault.img", "vault.key", key[0], key[1]]).fails(1, &["vault.key", "nothing is overwritten"]);
}

#[test]
fn a_size_is_read_or_answered_with_what_is_one() {
    let bench = Bench::new();
    let format = |size| bench.run(&["format", "vault.img", "--size", size, "--key-file", "vault.key"]);
    format("10GB").fails(1, &["powers of 1000", "type 10G"]);
    format("+1G").fails(1, &["whole size", "daxcrypt info"]);
    format("5000").fails(1, &["4096 and 8192"]);
    format("lots").fails(1, &["such as 512M, 1.5T or 4G"]);
    assert!(!bench.path("vault.img").exists());
    format("1.5M").succeeds();
    assert!(bench.run(&["info", "vault.img"]).succeeds().stdout.contains("1572864 bytes"));
}

#[test]
fn info_takes_several_and_one_that_fails_keeps_nobody_from_the_others() {
    let bench = Bench::new();
    bench.format("a.img", "4M", &["--label", "first"]);
    bench.format("b.img", "4M", &["--label", "second"]);
    let both = bench.run(&["info", "a.img", "b.img"]).succeeds().stdout;
    assert!(both.contains("first") && both.contains("second"), "{both}");
    let run =
        bench.run(&["info", "a.img", "none.img", "nor.img", "b.img", "--json"]).fails(1, &["none.img", "nor.img"]);
    let read: Vec<serde_json::Value> =
        serde_json::Deserializer::from_str(&run.stdout).into_iter().collect::<Result<_, _>>().unwrap();
    assert_eq!(read.iter().map(|info| info["label"].as_str().unwrap()).collect::<Vec<_>>(), ["first", "second"]);
}

/// The command that a line of the list names, unless the line goes on with what was said of the one before.
fn name_of(line: &str) -> Option<&str> {
    line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?.split_whitespace().next()
}

/// Every command, with those below it.
fn commands_below(bench: &Bench, command: &[String], all: &mut Vec<Vec<String>>) {
    let line: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
    let help = bench.run(&line).succeeds().stdout;
    let Some((_, list)) = help.split_once("Commands:\n") else { return };
    for word in list.lines().take_while(|line| !line.is_empty()).filter_map(name_of) {
        if word != "help" {
            let below = [command, &[word.to_owned()]].concat();
            commands_below(bench, &below, all);
            all.push(below);
        }
    }
}

#[test]
fn examples_can_be_pasted_from_a_terminal_of_80_columns() {
    let bench = Bench::new();
    let mut commands = Vec::new();
    commands_below(&bench, &[], &mut commands);
    assert!(commands.iter().any(|command| command == &["man"]), "`man` is listed");
    let mut count = 0;
    for command in &commands {
        let line: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
        let help = bench.run(&line).succeeds().stdout;
        let Some((_, examples)) = help.split_once("\nExamples:\n") else { continue };
        for example in examples.lines() {
            count += 1;
            assert!(example.chars().count() <= 80, "{command:?}: {example}");
            let wanted = ["  daxcrypt ", "  (umask", "  nbd", "  losetup", "  mkdir", "    "];
            let prose = !example.starts_with(' ') || wanted.iter().any(|start| example.starts_with(start));
            assert!(prose, "{command:?}: {example}");
        }
    }
    assert!(count > 60, "{count} lines");
}

#[test]
fn without_arguments_it_tells_how_to_begin() {
    let bench = Bench::new();
    bench.run(&[]).fails(1, &["Usage: daxcrypt", "daxcrypt demo", "Exit codes"]);
    fs::create_dir(bench.path("man")).unwrap();
    bench.run(&["man", "man"]).succeeds();
    assert!(
        fs::read_to_string(bench.path("man/daxcrypt-serve.1")).unwrap().contains(".SH EXAMPLES\n.nf\n  daxcrypt serve")
    );
}

//! Where keys come from: the kernel's keyring, systemd's credentials, the output of a program.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{Bench, CHEAP_KDF, Run, tool};

const PHRASE: &[u8] = b"correct horse";

/// `vault.img`, which opens with the passphrase in `pass`.
fn vault() -> Bench {
    let bench = Bench::new();
    bench.secret("pass", PHRASE);
    let format = ["format", "vault.img", "--size", "4M", "--passphrase-file", "pass"];
    bench.run(&[&format[..], &CHEAP_KDF].concat()).succeeds();
    bench
}

fn test(more: &[&'static str]) -> Vec<&'static str> {
    [&["key", "test", "vault.img"][..], more].concat()
}

#[test]
fn a_command_prints_the_passphrase() {
    let bench = vault();
    bench.run(&test(&["--passphrase-command", "cat pass"])).succeeds();
    bench.run(&test(&["--passphrase-command", "printf %s 'correct horse'"])).succeeds();
    bench.run(&test(&["--passphrase-command", "echo correct horse"])).succeeds();
    bench.refused(&test(&["--passphrase-command", "echo wrong"]), 2, &["wrong passphrase"]);
    bench.refused(&test(&["--passphrase-command", "false"]), 1, &["passphrase command false failed", "exit status: 1"]);
    bench.refused(&test(&["--passphrase-command", "true"]), 1, &["true failed", "printed nothing"]);
    bench.refused(&test(&["--passphrase-command", "no-such-program x"]), 1, &["no-such-program", "No such file"]);
    bench.refused(&test(&["--passphrase-command", "echo 'x"]), 1, &["quote"]);
    // No shell: the semicolon and what follows are arguments.
    bench.refused(&test(&["--passphrase-command", "echo x; touch made-by-shell"]), 2, &["wrong passphrase"]);
    assert!(!bench.path("made-by-shell").exists());
    let both = test(&["--passphrase-command", "cat pass", "--passphrase-file", "pass"]);
    bench.refused(&both, 1, &["cannot be used with"]);
    // A new key comes from the same places.
    let add = ["key", "add", "vault.img", "--passphrase-file", "pass", "--new-passphrase-command", "echo another"];
    bench.run(&[&add[..], &CHEAP_KDF].concat()).succeeds();
    bench.run(&test(&["--passphrase-command", "echo another"])).succeeds();
}

#[test]
fn systemd_passes_a_credential() {
    let bench = vault();
    let args = test(&["--credential", "vault"]);
    bench.refused(&args, 1, &["no credential vault", "CREDENTIALS_DIRECTORY", "LoadCredential=vault"]);
    fs::create_dir(bench.path("credentials")).unwrap();
    bench.secret("credentials/vault", b"correct horse\n");
    let with_folder = |name: &str| {
        let mut command = bench.command(&["key", "test", "vault.img", "--credential", name]);
        command.env("CREDENTIALS_DIRECTORY", bench.path("credentials")).stderr(Stdio::piped());
        Run::of(command)
    };
    with_folder("vault").succeeds();
    with_folder("other").fails(1, &["credential", "other", "No such file"]);
    for name in ["../pass", "/etc/passwd", "", "."] {
        with_folder(name).fails(1, &["has no folder in it"]);
    }
}

/// Runs `script` in a session keyring of its own, with `$DAXCRYPT` for the program.
fn in_keyring(bench: &Bench, script: &str) -> Run {
    let mut command = Command::new("keyctl");
    command.args(["session", "-", "sh", "-c", script]).current_dir(bench.dir.path());
    command.env("DAXCRYPT", env!("CARGO_BIN_EXE_daxcrypt"));
    Run::of(command)
}

#[test]
fn the_keyring_holds_the_passphrase() {
    tool("keyctl", &["--version"]);
    let bench = vault();
    let add = "keyctl padd user daxcrypt-test @s < pass > /dev/null";
    let test = "$DAXCRYPT key test vault.img --keyring";
    in_keyring(&bench, &format!("{add} && {test} user:daxcrypt-test")).succeeds();
    in_keyring(&bench, &format!("{test} user:daxcrypt-test"))
        .fails(1, &["cannot read the key user:daxcrypt-test", "no such key", "keyctl padd user daxcrypt-test"]);
    in_keyring(
        &bench,
        &format!("echo wrong | keyctl padd user daxcrypt-test @s > /dev/null && {test} user:daxcrypt-test"),
    )
    .fails(2, &["wrong passphrase"]);
    in_keyring(&bench, &format!("{test} nonsense")).fails(1, &["say which key, such as user:vault"]);
    in_keyring(&bench, &format!("{test} user:")).fails(1, &["say which key"]);
}

#[test]
fn a_logon_key_cannot_be_read_and_is_told_apart_from_none() {
    let bench = vault();
    let add = "keyctl add logon daxcrypt:test secret @s > /dev/null";
    let test = "$DAXCRYPT key test vault.img --keyring";
    in_keyring(&bench, &format!("{add} && {test} logon:daxcrypt:test"))
        .fails(1, &["logon", "never shows to a program"]);
    in_keyring(&bench, &format!("{add} && {test} user:daxcrypt:test"))
        .fails(1, &["logon:daxcrypt:test is of type logon", "keyctl padd user"]);
}

#[test]
fn a_configuration_file_names_every_source() {
    let bench = vault();
    let serve = |lines: &str| {
        let text = format!("[[namespace]]\npath = 'vault.img'\n{lines}\n[[listen]]\nunix = 'vault.sock'\n");
        fs::write(bench.path("daxcrypt.toml"), text).unwrap();
        bench.command(&["serve", "--config", "daxcrypt.toml"])
    };
    let socket = bench.path("vault.sock");
    common::Server::start(serve("passphrase_command = 'cat pass'"), socket.clone()).stop();
    fs::create_dir(bench.path("credentials")).unwrap();
    bench.secret("credentials/vault", PHRASE);
    let mut command = serve("credential = 'vault'");
    command.env("CREDENTIALS_DIRECTORY", bench.path("credentials"));
    common::Server::start(command, socket).stop();
    Run::of(serve("keyring = 'logon:x:y'")).fails(1, &["logon"]);
    Run::of(serve("keyring = 'user:x'\ncredential = 'y'")).fails(1, &["both keyring and credential"]);
}

#[test]
fn a_closed_standard_output_ends_quietly() {
    let bench = vault();
    let run = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = bench.command(args);
        command.stdout(writer).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        drop(command); // and with it our end for writing
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for args in [&["info", "vault.img"][..], &["info", "vault.img", "--json"], &["key", "list", "vault.img"]] {
        assert_eq!(run(args), (Some(0), String::new()), "{args:?}");
    }
    // What a command does, it does to the end.
    let erase = run(&["erase", "vault.img", "--yes"]);
    assert_eq!(erase, (Some(0), String::new()));
    bench.run(&["info", "vault.img"]).fails(3, &["not a daxcrypt namespace"]);
    let mut full = bench.command(&["--help"]);
    full.stdout(fs::File::options().write(true).open("/dev/full").unwrap()).stderr(Stdio::piped());
    assert!(!String::from_utf8(full.output().unwrap().stderr).unwrap().contains("panicked"));
}

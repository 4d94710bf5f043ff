//! What an operator sees of a running server: health, progress, and both of them live.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/terminal.rs"]
mod terminal;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};

use common::{Bench, Server, noise};
use nbd::{Raw, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use terminal::{SIGNAL, typed};

const READ: u16 = 0;

/// `vault.img` of 8 MiB, served with a control socket and metrics at the address that is given back.
fn serve(bench: &Bench) -> (Server, String) {
    bench.format("vault.img", "8M", &[]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let metrics = format!("127.0.0.1:{port}");
    (bench.serve("vault.img", &["--control", "control", "--metrics", &metrics]), metrics)
}

fn client(server: &Server) -> Raw {
    let mut raw = Raw::greeted(&server.socket);
    raw.go("vault");
    raw
}

fn status(bench: &Bench) -> Value {
    serde_json::from_str(&bench.run(&["status", "--control", "control", "--json"]).succeeds().stdout).unwrap()
}

fn table(bench: &Bench) -> String {
    bench.run(&["status", "--control", "control"]).succeeds().stdout
}

/// What a metric of the export is now.
fn metric(address: &str, name: &str, labels: &str) -> f64 {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let start = format!("daxcrypt_nbd_{name}{{export=\"vault\"{labels}}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_else(|| panic!("no {start} in\n{page}")).parse().unwrap()
}

#[test]
fn errors_are_counted_by_their_reason() {
    let bench = Bench::new();
    let (server, metrics) = serve(&bench);
    let mut raw = client(&server);
    assert!(!table(&bench).contains("errors of"));
    raw.request(99, 0, 1, 0, 0);
    assert_ne!(raw.errno(), 0);
    // The second half of the data goes: what lies there cannot be read, what lies before it can.
    File::options().write(true).open(bench.path("vault.img")).unwrap().set_len(6 << 20).unwrap();
    for _ in 0..2 {
        assert!(raw.read(0, 7 << 20, 4096).is_err());
    }
    let export = status(&bench)["exports"][0].clone();
    assert_eq!((&export["stats"]["errors"], &export["stats"]["failures"]["media"]), (&3.into(), &2.into()), "{export}");
    assert_eq!(export["stats"]["failures"]["invalid"], 1);
    assert!(table(&bench).contains("\nerrors of vault: 1 invalid, 2 media\n"), "{}", table(&bench));
    // They stay when the client has left.
    drop(raw);
    eventually("nobody is there", || status(&bench)["connections"] == 0);
    assert_eq!(metric(&metrics, "failures_total", ",reason=\"media\""), 2.0);
    assert_eq!(metric(&metrics, "failures_total", ",reason=\"flush\""), 0.0);
    server.kill();
}

#[test]
fn a_rekey_tells_how_far_it_is_how_fast_and_why_it_could_not_go_on() {
    let bench = Bench::new();
    let (server, metrics) = serve(&bench);
    assert_eq!(client(&server).write(0, 0, &noise(1, 8 << 20)), 0);
    assert_eq!(status(&bench)["rekeys"], Value::Array(Vec::new()));
    let begin = ["rekey", "vault.img", "--key-file", "vault.key", "--control", "control", "--max-rate", "1M", "--json"];
    let mut follower = bench.command(&begin).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let rekey = || status(&bench)["rekeys"][0].clone();
    eventually("its speed is known", || rekey()["bytes_per_second"].as_u64() > Some(0));
    follower.kill().unwrap();
    follower.wait().unwrap();
    let told = rekey();
    assert_eq!((&told["export"], &told["running"]), (&"vault".into(), &true.into()));
    assert!(told["seconds_left"].as_u64() > Some(0) && told["failed"].is_null(), "{told}");
    assert_eq!(metric(&metrics, "rekey_running", ""), 1.0);
    assert_eq!(metric(&metrics, "rekey_total_bytes", ""), f64::from(8 << 20));
    assert!(metric(&metrics, "rekey_bytes_per_second", "") > 0.0);
    let line = table(&bench);
    let line = line.lines().find(|line| line.starts_with("re-key of ")).unwrap();
    assert!(line.contains(" of 8 MiB done, ") && line.contains("/s, ") && line.ends_with(" left"), "{line}");
    // One that rests has no speed.
    bench.run(&["rekey", "vault.img", "--control", "control", "--pause"]).succeeds();
    assert_eq!((&rekey()["paused"], &rekey()["bytes_per_second"]), (&true.into(), &0.into()));
    assert_eq!(metric(&metrics, "rekey_paused", ""), 1.0);
    // One that meets a broken medium says so.
    let resume = ["rekey", "vault.img", "--control", "control", "--resume", "--max-rate", "2M"];
    let mut follower = bench.command(&resume).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("it goes on", || rekey()["running"] == true);
    File::options().write(true).open(bench.path("vault.img")).unwrap().set_len(4 << 20).unwrap();
    eventually("it has failed", || rekey()["failed"].is_string());
    follower.wait().unwrap();
    assert!(rekey()["progress"]["done_bytes"].as_u64() < Some(8 << 20));
    assert_eq!(metric(&metrics, "rekey_failed", ""), 1.0);
    assert!(table(&bench).contains("it FAILED: "), "{}", table(&bench));
    let mut raw = client(&server);
    raw.request(READ, 0, 1, 0, 4096);
    assert_eq!(raw.errno(), 0, "what lies before the fault can be read");
    server.kill();
}

/// `status --watch` without a terminal.
fn watch(bench: &Bench, more: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut command = bench.command(&[&["status", "--control", "control", "--watch", "0.1"], more].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap());
    (child, lines)
}

/// Lines up to one that begins so.
fn until(lines: &mut impl BufRead, start: &str) -> String {
    loop {
        let mut line = String::new();
        assert!(lines.read_line(&mut line).unwrap() > 0, "no line begins with {start}");
        if line.starts_with(start) {
            return line;
        }
    }
}

#[test]
fn a_live_table_shows_what_happens_in_a_second_and_ctrl_c_ends_it() {
    let bench = Bench::new();
    let (server, _) = serve(&bench);
    let (mut child, mut lines) = watch(&bench, &[]);
    // There is nothing to compare the first block with.
    until(&mut lines, "EXPORT  SIZE   ACCESS      PLAINTEXT  READ/s  WRITTEN/s  REQUESTS/s  ERRORS");
    let first = until(&mut lines, "vault");
    assert!(first.contains(" -       -          -           0"), "{first}");
    let mut raw = client(&server);
    let busy = std::iter::from_fn(|| {
        assert_eq!(raw.write(0, 0, &noise(1, 1 << 20)), 0);
        Some(until(&mut lines, "vault"))
    });
    let seen: Vec<_> = busy.take(5).collect();
    let rates: Vec<_> = seen.iter().filter(|line| line.contains(" MiB  ") && !line.contains(" - ")).collect();
    assert!(!rates.is_empty(), "{seen:?}");
    until(&mut lines, "CLIENT");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    // A reader that has gone ends it as well, and so does SIGTERM.
    let (mut child, lines) = watch(&bench, &[]);
    drop(lines);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let (mut child, mut lines) = watch(&bench, &["--json"]);
    let mut ups = Vec::new();
    for _ in 0..3 {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(told["exports"][0]["name"], "vault");
        ups.push(told["uptime_seconds"].as_u64().unwrap());
    }
    assert!(ups.is_sorted());
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    server.stop();
}

#[test]
fn a_live_table_on_a_terminal_is_drawn_in_place_and_leaves_the_terminal_as_it_was() {
    let bench = Bench::new();
    let (server, _) = serve(&bench);
    let args = ["status", "--control", "control", "--watch", "0.1"];
    let again = "\x1b[5A\r";
    for end in [b"\x03".to_vec(), [SIGNAL, &[15]].concat()] {
        let run = typed(&bench, &args, &[("EXPORT", b"keys"), (again, b""), (again, &end)]);
        assert_eq!((&run["code"], &run["echo"]), (&json!(0), &json!(true)), "{run}");
        let shown = run["shown"].as_str().unwrap();
        assert!(!shown.contains("keys") && shown.contains("\x1b[K\r\nup "), "{shown:?}");
    }
    server.stop();
}

#[test]
fn a_live_table_says_that_the_server_has_gone() {
    let bench = Bench::new();
    for more in [&[][..], &["--json"]] {
        let (server, _) = serve(&bench);
        let (child, mut lines) = watch(&bench, more);
        lines.read_line(&mut String::new()).unwrap();
        server.kill();
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("the server at control has stopped answering"), "{said}");
        for file in ["vault.img", "control"] {
            std::fs::remove_file(bench.path(file)).unwrap();
        }
    }
    // One that was never there is not gone.
    let mut args = vec!["status", "--control", "nowhere", "--watch"];
    bench.run(&args).fails(1, &["cannot ask the server at nowhere"]);
    args.push("soon");
    bench.run(&args).fails(1, &["seconds from 0.1 to 86400"]);
}

/// The units of `tools/systemd`, as systemd reads them; what they run is in another place here.
#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let bench = Bench::new();
    let mut units = vec!["verify".to_owned(), "--man=no".to_owned()];
    for unit in std::fs::read_dir("tools/systemd").unwrap().map(|unit| unit.unwrap().path()) {
        if unit.extension().is_some_and(|extension| extension == "service" || extension == "socket") {
            let text = std::fs::read_to_string(&unit).unwrap();
            let here = bench.path(unit.file_name().unwrap().to_str().unwrap());
            std::fs::write(&here, text.replace("/usr/bin/daxcrypt", env!("CARGO_BIN_EXE_daxcrypt"))).unwrap();
            units.push(here.display().to_string());
        }
    }
    assert!(units.iter().any(|unit| unit.ends_with("/daxcrypt-sleep.service")), "{units:?}");
    let run = common::tool("systemd-analyze", &units);
    assert!(run.stdout.is_empty() && run.stderr.is_empty(), "{}{}", run.stdout, run.stderr);
}

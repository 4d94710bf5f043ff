//! Passphrases typed at a real terminal: python3's `pty` holds the other end of it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Bench, CHEAP_KDF};
use serde_json::{Value, json};

/// Runs a program on a terminal of its own, waits for texts and types bytes, and tells how the program ended and how it left
/// the terminal.
const TYPIST: &str = r#"
import fcntl, json, os, pty, signal, struct, sys, termios
steps, argv = json.loads(sys.argv[1]), sys.argv[2:]
pid, terminal = pty.fork()
if pid == 0:
    for kind in (signal.SIGINT, signal.SIGQUIT):  # whoever runs the tests in the background has them ignored
        signal.signal(kind, signal.SIG_DFL)
    os.execv(argv[0], argv)
number = struct.unpack("i", fcntl.ioctl(terminal, 0x80045430, b"\0" * 4))[0]  # TIOCGPTN
kept = os.open(f"/dev/pts/{number}", os.O_RDWR | os.O_NOCTTY)  # so that its modes outlive the program
shown, seen = b"", 0
for wait_for, typed in steps:
    while wait_for.encode() not in shown[seen:]:
        shown += os.read(terminal, 4096)
    seen = len(shown)
    if typed.startswith("signal "):
        os.kill(pid, int(typed[7:]))
    else:
        os.write(terminal, bytes.fromhex(typed))
_, status = os.waitpid(pid, 0)
os.set_blocking(terminal, False)
try:
    shown += os.read(terminal, 65536)
except BlockingIOError:
    pass
modes = termios.tcgetattr(kept)[3]
print(json.dumps({
    "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
    "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
    "echo": bool(modes & termios.ECHO) and bool(modes & termios.ICANON) and bool(modes & termios.ISIG),
    "shown": shown.decode("latin-1"),
}))
"#;

const PROMPT: &str = "Passphrase for vault.img: ";

/// A namespace that `passphrase` opens.
fn bench(passphrase: &[u8]) -> Bench {
    let bench = Bench::new();
    bench.secret("pass", passphrase);
    let format = ["format", "vault.img", "--size", "4M", "--passphrase-file", "pass"];
    bench.run(&[&format[..], &CHEAP_KDF].concat()).succeeds();
    bench
}

/// Instead of something typed: the number of a signal follows, which somebody else sends.
const SIGNAL: &[u8] = b"signal ";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn typed(bench: &Bench, args: &[&str], steps: &[(&str, &[u8])]) -> Value {
    let hex = |bytes: &[u8]| match bytes.strip_prefix(SIGNAL) {
        Some(number) => format!("signal {}", number[0]),
        None => hex(bytes),
    };
    let steps: Vec<_> = steps.iter().map(|(wait_for, bytes)| json!([wait_for, hex(bytes)])).collect();
    let steps = serde_json::to_string(&steps).unwrap();
    let folder = bench.path(".");
    let line = format!("cd {} && exec python3 -c \"$TYPIST\" \"$@\"", folder.display());
    let mut command = common::tool_command("sh", &["-c", &line, "typist", &steps, env!("CARGO_BIN_EXE_daxcrypt")]);
    command.args(args).env("TYPIST", TYPIST);
    serde_json::from_str(&common::Run::of(command).succeeds().stdout).unwrap()
}

#[test]
fn ctrl_c_ends_the_program_and_leaves_the_echo_on() {
    let bench = bench(b"secret");
    for (key, signal) in [(b"\x03", 2), (b"\x1c", 3)] {
        let run = typed(&bench, &["key", "test", "vault.img"], &[(PROMPT, &[b"secr", &key[..]].concat())]);
        assert_eq!((&run["signal"], &run["echo"]), (&json!(signal), &json!(true)), "{run}");
        assert!(!run["shown"].as_str().unwrap().contains("secr"), "{run}");
    }
}

#[test]
fn a_signal_from_elsewhere_ends_the_program_and_leaves_the_echo_on() {
    let bench = bench(b"secret");
    for signal in [15, 1] {
        let sent = [SIGNAL, &[signal]].concat();
        let run = typed(&bench, &["key", "test", "vault.img"], &[(PROMPT, &sent)]);
        assert_eq!((&run["signal"], &run["echo"]), (&json!(signal), &json!(true)), "{run}");
    }
}

#[test]
fn what_is_typed_arrives_byte_by_byte_and_can_be_corrected() {
    for passphrase in [&b"tab\there"[..], b"caf\xe9", "schl\u{fc}ssel \u{1f512}".as_bytes(), b"\x01\x1b[A\xff"] {
        let bench = bench(passphrase);
        let corrections: [&[u8]; 5] = [b"", b"wrong\x15", b"wrong \xc3\xa4 x\x17\x17\x17", b"\xe4\x7f", b"stop\x1a"];
        for before in corrections {
            let again = [(PROMPT, before), (PROMPT, &[passphrase, b"\n"].concat())];
            let at_once = [(PROMPT, &[before, passphrase, b"\r"].concat()[..])];
            // After Ctrl-Z the question is asked again; there is nobody here who would stop it.
            let steps = if before.ends_with(b"\x1a") { &again[..] } else { &at_once[..] };
            let run = typed(&bench, &["key", "test", "vault.img"], steps);
            assert_eq!((&run["code"], &run["echo"]), (&json!(0), &json!(true)), "{passphrase:?} {before:?} {run}");
        }
    }
}

#[test]
fn a_new_passphrase_is_typed_twice_and_not_shown() {
    let bench = bench(b"secret");
    let add = ["key", "add", "vault.img", "--kdf-memory", "8M", "--kdf-time", "1"];
    let new = "Passphrase for the key slot of vault.img, new: ";
    let run = typed(&bench, &add, &[(PROMPT, b"secret\n"), (new, b"second\n"), ("The same again: ", b"secund\n")]);
    assert_eq!(run["code"], 1, "{run}");
    assert!(run["shown"].as_str().unwrap().contains("differ"), "{run}");
    let run = typed(&bench, &add, &[(PROMPT, b"secret\n"), (new, b"second\n"), ("The same again: ", b"second\n")]);
    assert_eq!((&run["code"], &run["echo"]), (&json!(0), &json!(true)), "{run}");
    assert!(!run["shown"].as_str().unwrap().contains("sec"), "{run}");
}

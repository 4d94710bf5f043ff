//! A program on a terminal of its own: python3's `pty` holds the other end of it.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use serde_json::{Value, json};

use crate::common::{Bench, Run, tool_command};

/// Runs a program on a terminal of its own, waits for texts and types bytes, and tells how the program ended and how it left
/// the terminal.
const TYPIST: &str = r#"
import fcntl, json, os, pty, signal, struct, sys, termios
steps, argv = json.loads(sys.argv[1]), sys.argv[2:]
pid, terminal = pty.fork()
if pid == 0:
    for kind in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # whoever runs the tests in the background has them ignored
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

/// Instead of something typed: the number of a signal follows, which somebody else sends.
pub const SIGNAL: &[u8] = b"signal ";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What became of the program with `args`, which was shown each text and then typed the bytes beside it.
pub fn typed(bench: &Bench, args: &[&str], steps: &[(&str, &[u8])]) -> Value {
    let hex = |bytes: &[u8]| match bytes.strip_prefix(SIGNAL) {
        Some(number) => format!("signal {}", number[0]),
        None => hex(bytes),
    };
    let steps: Vec<_> = steps.iter().map(|(wait_for, bytes)| json!([wait_for, hex(bytes)])).collect();
    let steps = serde_json::to_string(&steps).unwrap();
    let folder = bench.path(".");
    let line = format!("cd {} && exec python3 -c \"$TYPIST\" \"$@\"", folder.display());
    let mut command = tool_command("sh", &["-c", &line, "typist", &steps, env!("CARGO_BIN_EXE_daxcrypt")]);
    command.args(args).env("TYPIST", TYPIST);
    serde_json::from_str(&Run::of(command).succeeds().stdout).unwrap()
}

//! What is said to a command that does not exist: the one that was meant, and never one that destroys something.
//!
//! clap suggests what is spelled alike, so that `move` suggested `remove`. Here the meaning decides first.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Commands that a typing error must not lead to: they destroy or overwrite.
const DESTRUCTIVE: &[&str] = &["erase", "remove", "import", "relocate", "kick"];

/// Words that people know from elsewhere, and what does it here.
const MEANT: &[(&[&str], &str)] = &[
    (
        &["open", "luksopen", "plainopen", "mount", "attach", "map", "activate", "start"],
        "`daxcrypt serve PATH --socket SOCKET` unlocks a namespace and serves it; nbd-client makes a block device of that",
    ),
    (
        &["close", "luksclose", "umount", "unmount", "detach", "unmap", "deactivate", "stop"],
        "SIGTERM stops a server, and `nbd-client -d DEVICE` detaches a block device; \
         `daxcrypt lock NAME --control SOCKET` wipes the key of an export",
    ),
    (
        &["create", "new", "init", "make", "mkfs", "luksformat"],
        "`daxcrypt format PATH --size SIZE` makes a namespace, `daxcrypt region create PATH --size SIZE` a region of many",
    ),
    (
        &["move", "mv", "migrate", "rename"],
        "`daxcrypt relocate SOURCE DESTINATION` moves a namespace, and erases the source when all is verified",
    ),
    (
        &["copy", "cp", "clone", "dd"],
        "`daxcrypt relocate SOURCE DESTINATION --keep-source` copies a namespace; `daxcrypt export PATH FILE` writes plaintext",
    ),
    (
        &["grow", "extend", "expand", "enlarge", "shrink", "reduce"],
        "`daxcrypt resize PATH --size SIZE` gives a namespace another size",
    ),
    (
        &["backup", "luksheaderbackup", "save"],
        "`daxcrypt header backup PATH FILE` backs the header up; `daxcrypt export PATH FILE` writes the plaintext out",
    ),
    (&["restore", "luksheaderrestore"], "`daxcrypt header restore PATH BACKUP` puts a header back"),
    (
        &["repair", "fsck", "check", "verify"],
        "`daxcrypt info PATH` tells what state it is in, `daxcrypt header repair PATH` looks at both copies of the header",
    ),
    (
        &["luksdump", "dump", "show", "inspect", "isluks", "luksuuid", "uuid"],
        "`daxcrypt info PATH` shows what a namespace is; of cryptsetup's volumes with --luks2",
    ),
    (
        &["list", "ls", "keys", "slots", "clients", "regions"],
        "`daxcrypt key list PATH`, `daxcrypt region list PATH`; of a server `daxcrypt status --control SOCKET`",
    ),
    (
        &["luksaddkey", "addkey", "add-key", "add", "lukschangekey", "changekey", "passwd", "luksconvertkey"],
        "`daxcrypt key add PATH` adds a key slot, `daxcrypt key change PATH` gives one another key",
    ),
    (
        &["luksremovekey", "lukskillslot", "removekey"],
        "`daxcrypt key list PATH` shows the slots, `daxcrypt key --help` what can be done with them",
    ),
    (
        &["lukssuspend", "suspend"],
        "`daxcrypt lock NAME --control SOCKET --wait` has a server wipe the key of an export while requests wait",
    ),
    (
        &["luksresume", "resume", "continue"],
        "`daxcrypt unlock NAME --control SOCKET` after a lock; `daxcrypt rekey PATH --resume` for a re-key",
    ),
    (&["reencrypt", "re-key", "rotate"], "`daxcrypt rekey PATH` gives a namespace a new volume key, in place"),
    (&["encrypt"], "`daxcrypt format PATH --size SIZE` makes a namespace, which `daxcrypt help import` fills"),
    (&["decrypt"], "`daxcrypt export PATH FILE` writes the plaintext of a namespace to a file"),
    (&["benchmark"], "`daxcrypt bench`"),
    (
        &["delete", "del", "rm", "destroy", "wipe", "purge", "lukserase", "erasekeys", "clear"],
        "nothing was changed; `daxcrypt --help` tells which commands destroy something",
    ),
];

/// What is said to `word`; nothing where nobody knows what it means.
fn meant(word: &str) -> Option<&'static str> {
    let word = word.to_ascii_lowercase();
    let known = MEANT.iter().find(|(words, _)| words.contains(&word.as_str())).map(|(_, advice)| *advice);
    known.or_else(|| {
        word.starts_with("luks")
            .then_some("`daxcrypt info --luks2` and `daxcrypt serve --luks2` open cryptsetup's volumes")
    })
}

/// Puts what was meant in the place of what is spelled alike. `first` is the first argument of the program.
pub(super) fn correct(mut error: clap::Error, first: Option<&str>) -> clap::Error {
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let alike = error.remove(ContextKind::SuggestedSubcommand);
            let wrong = error.get(ContextKind::InvalidSubcommand).map(ToString::to_string);
            let advice = if wrong.as_deref() == first { first.and_then(meant) } else { None };
            if let Some(advice) = advice {
                suggest(&mut error, advice);
            } else if let Some(harmless) = alike.and_then(harmless) {
                error.insert(ContextKind::SuggestedSubcommand, harmless);
            }
        }
        // People unlock what nobody serves yet.
        ErrorKind::MissingRequiredArgument if matches!(first, Some("lock" | "unlock")) => suggest(
            &mut error,
            "it speaks to a running server; `daxcrypt serve PATH --socket SOCKET` unlocks a namespace and serves it",
        ),
        _ => {}
    }
    error
}

fn suggest(error: &mut clap::Error, advice: &'static str) {
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![advice.into()]));
}

/// What is spelled alike and destroys nothing.
fn harmless(alike: ContextValue) -> Option<ContextValue> {
    let words = match alike {
        ContextValue::String(word) => vec![word],
        ContextValue::Strings(words) => words,
        _ => return None,
    };
    let words: Vec<_> = words.into_iter().filter(|word| !DESTRUCTIVE.contains(&word.as_str())).collect();
    (!words.is_empty()).then_some(ContextValue::Strings(words))
}

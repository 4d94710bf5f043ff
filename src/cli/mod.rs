//! The command line: parse, run one command, print the error chain and what to try next.
//!
//! One file a command. Nothing below this layer prints, and nothing here knows how anything is done.

mod bench;
mod compact;
mod control;
mod credentials;
mod demo;
mod dmtable;
mod dump;
mod duration;
mod erase;
mod error;
mod export_limits;
mod export_options;
mod format;
mod from_ops;
mod generate;
mod header;
mod info;
#[doc = include_str!("json.md")]
pub mod json {}
mod key;
mod live;
mod lock;
mod log;
mod open;
mod output;
mod pace;
mod place;
mod plain;
mod progress;
mod prompt;
mod recovery;
mod region;
mod rekey;
mod relocate;
mod resize;
mod secrets;
mod serve;
mod size;
mod status;
mod steer;
mod suggest;
mod undumped;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use self::error::{Error, Exit};

const EXIT_CODES: &str = "\
New here?
  daxcrypt demo            shows all of it on a temporary file
  daxcrypt COMMAND --help  has examples

Exit codes:
  0  ok
  1  usage: the command line or a file that it names cannot be used
  2  wrong passphrase or key file
  3  not a namespace, or damaged
  4  I/O error
  5  busy: another process uses it
  6  stopped by a signal before its end: it can go on

Environment:
  DAXCRYPT_LOG                what `serve` logs, as --log does
  DAXCRYPT_XTS_BACKEND        AES-XTS backend to use instead of the fastest one
  DAXCRYPT_FORCE_GRANULARITY  page or cacheline, for tests: durability is then not what the media give";

/// Encrypted persistent memory: dm-crypt for pmem, in user space, without losing DAX
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a namespace in a file or on a device
    #[command(after_help = "\
Examples:
  (umask 077; head -c 64 /dev/urandom > vault.key)
  daxcrypt format vault.img --size 4G --key-file vault.key
  daxcrypt format /dev/pmem0 --label tank       # asks for a passphrase")]
    Format(format::FormatArgs),
    /// Show what a namespace is, without its key
    #[command(after_help = "\
Examples:
  daxcrypt info vault.img other.img
  daxcrypt info vault.img --json | jq .size_bytes")]
    Info(info::InfoArgs),
    /// Serve namespaces over NBD until SIGTERM or SIGINT
    #[command(after_help = "\
Examples:
  daxcrypt serve vault.img --key-file vault.key --socket vault.sock
  daxcrypt serve vault.img --key-file vault.key --listen 127.0.0.1:10809
  daxcrypt serve vault.img --key-file vault.key --listen 0.0.0.0:10809 \\
    --tls-certificates /etc/daxcrypt/tls
  daxcrypt serve --config /etc/daxcrypt/daxcrypt.toml

Then, with the kernel's client:
  nbd-client -unix vault.sock /dev/nbd0 -N vault
or without it:
  nbdfuse mnt 'nbd+unix:///vault?socket=vault.sock' &
  losetup -f --show mnt/nbd")]
    Serve(Box<serve::ServeArgs>),
    /// Show what a running server and its clients do
    #[command(after_help = "\
Examples:
  daxcrypt serve vault.img --key-file vault.key --socket vault.sock \\
    --control vault.control &
  daxcrypt status --control vault.control
  daxcrypt status --control vault.control --watch        # a live table
  daxcrypt status --control vault.control --json | jq .exports
  daxcrypt status --control vault.control --json --watch 10 >> status.jsonl")]
    Status(status::StatusArgs),
    /// Have a running server forget the key of an export, and all plaintext of it
    #[command(after_help = "\
Examples:
  daxcrypt lock vault --control vault.control --wait   # requests wait
  daxcrypt lock vault --control vault.control          # requests fail
  daxcrypt lock --all --control vault.control --wait")]
    Lock(lock::LockArgs),
    /// Give a running server the key of an export that is locked; requests that wait are answered
    #[command(after_help = "\
Examples:
  daxcrypt unlock vault --control vault.control --key-file vault.key
  daxcrypt unlock vault --control vault.control        # asks for a passphrase")]
    Unlock(lock::UnlockArgs),
    /// Have a running server serve one namespace more, or one less
    #[command(after_help = "\
Examples:
  daxcrypt exports add other.img --key-file other.key --control vault.control
  daxcrypt exports add region.img#a --read-only --control vault.control
  daxcrypt exports remove a --control vault.control")]
    Exports(steer::ExportsCommandArgs),
    /// List the clients of a running server, and close one
    #[command(after_help = "\
Examples:
  daxcrypt client list --control vault.control
  daxcrypt client kick 7 --control vault.control")]
    Client(steer::ClientCommandArgs),
    /// Have a running server read its lists, limits and certificates again, as SIGHUP does, and say what became of it
    #[command(after_help = "\
Examples:
  daxcrypt reload --control vault.control")]
    Reload(steer::ReloadArgs),
    /// Print the dm-crypt table line for the same bytes
    #[command(after_help = "\
Examples:
  daxcrypt dmtable /dev/pmem0 --key-file vault.key     # the key stays hidden
  daxcrypt dmtable /dev/pmem0 --key-file vault.key --show-key |
    dmsetup create vault                               # the kernel maps it")]
    Dmtable(dmtable::DmtableArgs),
    /// List, add, remove, change and test key slots
    #[command(after_help = "\
Examples:
  daxcrypt key list vault.img --json
  daxcrypt key add vault.img --key-file vault.key --label desk  # asks for it
  daxcrypt key change vault.img --slot 1 --new-key-file new.key
  daxcrypt key add vault.img --key-file vault.key --recovery-key
  daxcrypt key remove vault.img --key-file vault.key --slot 1
  daxcrypt key dump vault.img --key-file vault.key --volume-key-file escrow")]
    Key(key::KeyCommandArgs),
    /// Give a namespace a new volume key, in place: safe at every instant, and it can be interrupted
    #[command(after_help = "\
Examples:
  daxcrypt rekey vault.img --key-file vault.key --dry-run
  daxcrypt rekey vault.img --key-file vault.key --max-rate 200M # Ctrl-C is safe
  daxcrypt rekey vault.img --key-file vault.key --resume
  daxcrypt rekey vault.img --key-file vault.key --control vault.control
  daxcrypt rekey vault.img --key-file vault.key --cipher aes-128-xts \\
    --unit 512 --keep-slots")]
    Rekey(rekey::RekeyArgs),
    /// Move a namespace to another file, device or place in a region, under a new volume key
    #[command(after_help = "\
Examples:
  daxcrypt relocate vault.img /dev/pmem0 --key-file vault.key
  daxcrypt relocate vault.img copy.img --key-file vault.key --keep-source
  daxcrypt relocate vault.img region.img#tenant-a --key-file vault.key
  daxcrypt relocate region.img#tenant-a vault.img --key-file vault.key
  daxcrypt relocate --in-place /dev/pmem1 --key-file vault.key # dd moved it")]
    Relocate(relocate::RelocateArgs),
    /// Encrypt a disk image into a namespace
    #[command(after_help = "\
Examples:
  daxcrypt format vault.img --size 4G --key-file vault.key
  daxcrypt import disk.img vault.img --key-file vault.key
  nbdcopy nbd://localhost/disk - |
    daxcrypt import - vault.img --key-file vault.key")]
    Import(plain::ImportArgs),
    /// Decrypt a namespace to a disk image
    #[command(after_help = "\
Examples:
  daxcrypt export vault.img disk.img --key-file vault.key
  daxcrypt export vault.img - --key-file vault.key | zstd > disk.zst")]
    Export(plain::ExportArgs),
    /// Back the header up, put a backup back, and look at one
    #[command(after_help = "\
Examples:
  daxcrypt header backup vault.img vault.header
  daxcrypt header inspect vault.header
  daxcrypt header restore vault.img vault.header --key-file vault.key")]
    Header(header::HeaderCommandArgs),
    /// Destroy all key slots and both header copies: the data is then lost
    #[command(after_help = "\
Examples:
  daxcrypt erase vault.img          # asks for the label
  daxcrypt erase vault.img --yes --wipe-data")]
    Erase(erase::EraseArgs),
    /// Give the data area another size
    #[command(after_help = "\
Examples:
  daxcrypt resize vault.img --size 8G --key-file vault.key
  daxcrypt resize region.img#tenant-a --size 2G --key-file a.key --force
  daxcrypt resize vault.img --size 16G --control vault.control   # while served")]
    Resize(resize::ResizeArgs),
    /// Make, list and compact regions: many namespaces in one file or device
    #[command(after_help = "\
Examples:
  daxcrypt region create region.img --size 64G
  daxcrypt format region.img#tenant-a --size 16G --key-file a.key
  daxcrypt region list region.img --json
  daxcrypt region compact region.img --key tenant-a=a.key --key tenant-b=b.key
  daxcrypt serve region.img#tenant-a --key-file a.key --socket a.sock")]
    Region(region::RegionCommandArgs),
    /// Destroy a namespace of a region and give its place back
    #[command(after_help = "\
Examples:
  daxcrypt remove region.img#tenant-a          # asks for the label")]
    Remove(region::RemoveArgs),
    /// Print completions for a shell
    #[command(after_help = "\
Examples:
  daxcrypt completions bash > /etc/bash_completion.d/daxcrypt")]
    Completions(generate::CompletionsArgs),
    /// Write the manual pages
    #[command(after_help = "\
Examples:
  mkdir -p man && daxcrypt man man")]
    Man(generate::ManArgs),
    /// Measure AES-XTS on this machine: every backend, in cache and in memory, beside memcpy (about 10 seconds)
    Bench(bench::BenchArgs),
    /// Show all of it on a temporary file: no root, no hardware, no configuration
    Demo,
}

/// Runs the program with the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let first = std::env::args().nth(1);
            let error = suggest::correct(error, first.as_deref());
            let _ = error.print();
            let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return if asked_for { ExitCode::SUCCESS } else { ExitCode::from(Exit::Usage as u8) };
        }
    };
    if handles_keys(&cli.command) {
        undumped::protect_process();
    }
    match run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(format_args!("{}", error.chain()));
            if let Some(hint) = error.hint() {
                output::hint(&hint);
            }
            ExitCode::from(error.exit() as u8)
        }
    }
}

/// Whether secrets may come into the memory of the process.
const fn handles_keys(command: &Command) -> bool {
    match command {
        Command::Completions(_) | Command::Man(_) | Command::Bench(_) | Command::Info(_) | Command::Status(_) => false,
        Command::Lock(_) | Command::Client(_) | Command::Reload(_) => false,
        Command::Format(_)
        | Command::Unlock(_)
        | Command::Exports(_)
        | Command::Serve(_)
        | Command::Dmtable(_)
        | Command::Key(_)
        | Command::Rekey(_)
        | Command::Relocate(_)
        | Command::Import(_)
        | Command::Export(_)
        | Command::Header(_)
        | Command::Erase(_)
        | Command::Resize(_)
        | Command::Region(_)
        | Command::Remove(_)
        | Command::Demo => true,
    }
}

fn run(command: &Command) -> Result<(), Error> {
    match command {
        Command::Format(args) => format::run(args),
        Command::Info(args) => info::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Status(args) => status::run(args),
        Command::Exports(args) => steer::exports(args),
        Command::Client(args) => steer::client(args),
        Command::Reload(args) => steer::reload(args),
        Command::Lock(args) => lock::lock(args),
        Command::Unlock(args) => lock::unlock(args),
        Command::Dmtable(args) => dmtable::run(args),
        Command::Key(args) => key::run(args),
        Command::Rekey(args) => rekey::run(args),
        Command::Relocate(args) => relocate::run(args),
        Command::Import(args) => plain::import(args),
        Command::Export(args) => plain::export(args),
        Command::Header(args) => header::run(args),
        Command::Resize(args) => resize::run(args),
        Command::Region(args) => region::run(args),
        Command::Remove(args) => region::remove(args),
        Command::Completions(args) => generate::completions::<Cli>(args),
        Command::Man(args) => generate::man::<Cli>(args),
        Command::Erase(args) => erase::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Demo => demo::run(),
    }
}

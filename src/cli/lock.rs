//! `daxcrypt lock` and `unlock`: a running server forgets the key of an export, and gets it again.
//!
//! The key goes over the control socket, which only the server's user and root may use, and the server derives: it alone has
//! the header open and locked, so that what is unlocked is what was locked.

use std::path::{Path, PathBuf};

use clap::Args;

use super::control::{Answer, ExportCommand, LockedLine, ServerCommand, What, ask_for};
use super::credentials::KeyArgs;
use super::error::Error;
use super::output::outln;
use super::steer::credential;

#[derive(Args, Debug)]
pub(crate) struct LockArgs {
    /// Name of the export, as `status` shows it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    name: Option<String>,
    /// Lock every export but ephemeral ones, as before the machine sleeps
    #[arg(long)]
    all: bool,
    /// Control socket of the server (its --control)
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// Have requests wait until it is unlocked, for filesystems that stay mounted; without it they fail with ESHUTDOWN
    #[arg(long)]
    wait: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct UnlockArgs {
    /// Name of the export, as `status` shows it
    name: String,
    /// Control socket of the server (its --control)
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
}

pub(crate) fn lock(args: &LockArgs) -> Result<(), Error> {
    let wait = args.wait;
    let asked = match &args.name {
        Some(name) => What::Export { name: name.clone(), command: ExportCommand::Lock { wait } },
        None => What::Server(ServerCommand::LockAll { wait }),
    };
    let answer = ask_for(&args.control, asked, &[])?.or_error(&args.control)?;
    let Answer::Locked(lines) = answer else { return Err(Error::unexpected_answer()) };
    if args.json {
        outln!("{}", serde_json::to_string(&lines).unwrap_or_default())?;
    } else {
        lines.iter().try_for_each(|line| outln!("{}", sentence(line)))?;
    }
    match lines.into_iter().find_map(|LockedLine { name, failed, .. }| failed.map(|reason| (name, reason))) {
        Some((name, reason)) => Err(Error::LockedWithLoss { name, reason }),
        None => Ok(()),
    }
}

fn sentence(line: &LockedLine) -> String {
    let meanwhile = if line.waits { "requests wait" } else { "requests fail" };
    format!("{}: locked; {meanwhile} until `daxcrypt unlock`", line.name.escape_debug())
}

pub(crate) fn unlock(args: &UnlockArgs) -> Result<(), Error> {
    let name = Path::new(&args.name);
    let (credential, by_volume_key) = credential(&args.key, &args.name)?;
    let asked = What::Export { name: args.name.clone(), command: ExportCommand::Unlock { by_volume_key } };
    match ask_for(&args.control, asked, &[&credential])? {
        Answer::WrongCredential => Err(Error::WrongKey { name: args.name.clone() }),
        answer => match answer.or_error(name)? {
            Answer::Unlocked => outln!("{}: unlocked", args.name.escape_debug()),
            _ => Err(Error::unexpected_answer()),
        },
    }
}

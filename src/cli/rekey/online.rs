//! `rekey --control`: the server that has the namespace does it, and this follows.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{RekeyArgs, say_done, say_estimate};
use crate::cli::control::{Answer, Asked, Change, Command, RekeyState};
use crate::cli::credentials::Prompt;
use crate::cli::error::Error;
use crate::cli::output::{complain, outln};
use crate::cli::pace::{catch_signals, policy};
use crate::cli::progress::Progress;
use crate::cli::size::ByteSize;
use crate::namespace::Cipher;
use crate::ops::{Ended, Watch};
use crate::volume::TransformProgress;

/// How often a server is asked how far it is.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

pub(super) fn run(args: &RekeyArgs, socket: &Path) -> Result<(), Error> {
    let command = command(args);
    let asked = Asked::new(socket, command.operation(), &args.place.location())?;
    let credential = match command {
        Command::RekeyBegin { .. } => Some(args.key.read(Prompt::Once, &args.place.path.display().to_string())?),
        _ => None,
    };
    let follows = matches!(command, Command::RekeyBegin { .. } | Command::RekeyResume { .. });
    let stop = follows.then(catch_signals).transpose()?;
    let credentials: Vec<_> = credential.iter().collect();
    let state = match asked.about(command, &credentials)? {
        Answer::Rekey(state) => state,
        Answer::Estimate(estimate) => return say_estimate(args, &estimate),
        _ => return Err(Error::unexpected_answer()),
    };
    drop(credential);
    match (stop, state.progress) {
        (Some(stop), Some(first)) => follow(args, &asked, first, || stop.load(Ordering::Relaxed)),
        _ => say(args, &state),
    }
}

fn command(args: &RekeyArgs) -> Command {
    let change = Change {
        key_bits: args.cipher.map(Cipher::from),
        unit_bytes: args.unit(),
        slots: policy(args.keep_slots, args.drop_slots),
    };
    let max_rate = args.pace.bytes_per_second();
    if args.status {
        Command::RekeyStatus
    } else if args.pause {
        Command::RekeyPause
    } else if args.stop {
        Command::RekeyStop
    } else if args.resume {
        Command::RekeyResume { max_rate }
    } else if args.dry_run {
        Command::RekeyPreview(change)
    } else {
        Command::RekeyBegin { change, max_rate }
    }
}

/// How it stands. One that could not go on is an error.
fn say(args: &RekeyArgs, state: &RekeyState) -> Result<(), Error> {
    let path = args.place.path.display();
    let Some(TransformProgress { done_bytes, total_bytes }) = state.progress else {
        return outln!("{path}: no re-key is under way");
    };
    let rests = match (state.paused, state.running) {
        (true, _) => "; it is paused",
        (false, false) => "; it rests",
        (false, true) => "",
    };
    if args.pace.json {
        outln!("{}", serde_json::to_string(state).unwrap_or_default())?;
    } else {
        outln!("{path}: {} of {} done{rests}", ByteSize(done_bytes), ByteSize(total_bytes))?;
    }
    died(args, state)
}

fn died(args: &RekeyArgs, state: &RekeyState) -> Result<(), Error> {
    match &state.failed {
        Some(reason) => Err(Error::RekeyDied { path: args.place.path.clone(), reason: reason.clone() }),
        None => Ok(()),
    }
}

/// Shows what the server does until it has done it, until it rests or has died, or until a signal: then the server goes on
/// alone.
fn follow(args: &RekeyArgs, asked: &Asked<'_>, first: TransformProgress, stop: impl Fn() -> bool) -> Result<(), Error> {
    let (mut done_bytes, total_bytes) = (first.done_bytes, first.total_bytes);
    let mut progress = Progress::new(args.pace.json);
    progress.begin(done_bytes, total_bytes);
    while !stop() {
        let Answer::Rekey(state) = asked.about(Command::RekeyStatus, &[])? else {
            return Err(Error::unexpected_answer());
        };
        let Some(reached) = state.progress else {
            progress.end(Ended::Done, total_bytes);
            return if args.pace.json { Ok(()) } else { say_done(args, None) };
        };
        done_bytes = reached.done_bytes;
        // A pause may end, and then there is something to follow again.
        if !state.running && !state.paused {
            progress.end(Ended::Stopped, done_bytes);
            died(args, &state)?;
            let (path, done, total) = (args.place.path.clone(), ByteSize(done_bytes), ByteSize(total_bytes));
            return Err(Error::RekeyStopped { path, done, total });
        }
        progress.reach(done_bytes);
        std::thread::sleep(FOLLOW_INTERVAL);
    }
    progress.end_as("left", done_bytes);
    complain(format_args!("{}: the server goes on with it", args.place.path.display()));
    Ok(())
}

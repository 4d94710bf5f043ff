//! `daxcrypt exports`, `client` and `reload`: a running server changes what it serves, and to whom.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::control::{Answer, ExportCommand, NewExport, ServerCommand, What, ask_for};
use super::credentials::{KeyArgs, Prompt};
use super::error::Error;
use super::export_options::ExportOptions;
use super::output::outln;
use super::place::PlaceArgs;
use super::secrets;
use super::status;
use crate::namespace::Credential;
use crate::secret::SecretBytes;

#[derive(Args, Debug)]
pub(crate) struct ControlArgs {
    /// Control socket of the server (its --control)
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct ExportsCommandArgs {
    #[command(subcommand)]
    command: ExportsCommand,
}

#[derive(Debug, Subcommand)]
enum ExportsCommand {
    /// Serve one more namespace
    Add(Box<AddArgs>),
    /// Close the clients of an export, make everything durable, and serve it no more
    Remove {
        /// Name of the export, as `status` shows it
        name: String,
        #[command(flatten)]
        server: ControlArgs,
    },
}

#[derive(Args, Debug)]
struct AddArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// It has a new key at each opening, and needs none
    #[arg(long, conflicts_with = "KeyArgs")]
    ephemeral: bool,
    #[command(flatten)]
    options: ExportOptions,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    server: ControlArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ClientCommandArgs {
    #[command(subcommand)]
    command: ClientCommand,
}

#[derive(Debug, Subcommand)]
enum ClientCommand {
    /// Show who has chosen which export
    List {
        #[command(flatten)]
        server: ControlArgs,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Close the connection of a client; it may come again
    Kick {
        /// Its number, as `client list` shows it
        client: u64,
        #[command(flatten)]
        server: ControlArgs,
    },
}

#[derive(Args, Debug)]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    server: ControlArgs,
}

/// The credential that the options name, and whether it is the volume key itself.
pub(crate) fn credential(key: &KeyArgs, what: &str) -> Result<(Credential, bool), Error> {
    match &key.escrow_file {
        Some(file) => Ok((Credential::KeyFile(SecretBytes::copy_of(secrets::escrow_file(file)?.bytes())), true)),
        // LUKS2 sets no lower bound for key files, and the server knows what it opens.
        None => Ok((key.read_with(Prompt::Once, what, 1)?, false)),
    }
}

pub(crate) fn exports(args: &ExportsCommandArgs) -> Result<(), Error> {
    match &args.command {
        ExportsCommand::Add(args) => add(args),
        ExportsCommand::Remove { name, server } => {
            done(server, What::Export { name: name.clone(), command: ExportCommand::Remove })?;
            outln!("{}: not served any more", name.escape_debug())
        }
    }
}

fn add(args: &AddArgs) -> Result<(), Error> {
    let path = &args.place.path;
    args.options.check().map_err(|reason| Error::Usage(format!("{}: {reason}", path.display())))?;
    let found = |path: &Path| {
        std::path::absolute(path).map_err(|source| Error::Io { doing: "cannot tell the server where it is", source })
    };
    let (absolute, header) = (found(path)?, args.place.header.as_deref().map(found).transpose()?);
    let given = if args.ephemeral { None } else { Some(credential(&args.key, &path.display().to_string())?) };
    let new = NewExport {
        path: absolute,
        header,
        accept_data: args.place.accept_data,
        options: args.options.clone(),
        by_volume_key: given.as_ref().is_some_and(|(_, by_volume_key)| *by_volume_key),
    };
    let credentials: Vec<_> = given.iter().map(|(credential, _)| credential).collect();
    let answer = ask_for(&args.server.control, What::Server(ServerCommand::AddExport(Box::new(new))), &credentials)?;
    match answer {
        Answer::WrongCredential => Err(Error::WrongKey { name: path.display().to_string() }),
        answer => match answer.or_error(path)? {
            Answer::Added(name) => outln!("{}: served as {name:?}", path.display()),
            _ => Err(Error::unexpected_answer()),
        },
    }
}

pub(crate) fn client(args: &ClientCommandArgs) -> Result<(), Error> {
    match &args.command {
        ClientCommand::List { server, json } => status::clients(&server.control, *json),
        ClientCommand::Kick { client, server } => {
            done(server, What::Server(ServerCommand::KickClient(*client)))?;
            outln!("client {client}: closed")
        }
    }
}

pub(crate) fn reload(args: &ReloadArgs) -> Result<(), Error> {
    done(&args.server, What::Server(ServerCommand::Reload))?;
    outln!("read again: clients, limits and certificates")
}

/// Asks for something that has no answer but that it is done.
fn done(server: &ControlArgs, what: What) -> Result<(), Error> {
    match ask_for(&server.control, what, &[])?.or_error(&server.control)? {
        Answer::Done => Ok(()),
        _ => Err(Error::unexpected_answer()),
    }
}
